"""What the benchmarks share: inputs, timing, and the last line that each of them prints."""
