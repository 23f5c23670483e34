"""Every benchmark runs on tiny settings, and its last line is what it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SIDE = {"seconds", "cpu_seconds", "pairs_per_s", "tokens_per_s"}


def benchmark(name: str, *arguments: object) -> dict:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / f"{name}.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["benchmark"] == name
    assert result["ratio"] > 0
    return result


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {
            "prompt": f"Which number comes after {number}? " * 12,
            "chosen": f"{number + 1}, of course.",
            "rejected": "No.",
        }
        for number in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = "import sys; from pathlib import Path; from support import inputs; inputs.make_model(Path(sys.argv[1]))"
    folder = tmp_path_factory.mktemp("model")
    subprocess.run([sys.executable, "-c", script, str(folder)], cwd=ROOT / "benchmarks", check=True)
    return folder


@pytest.mark.slow
def test_throughput_says_both_sides_figures_and_compares_the_values(pairs: Path, model: Path):
    result = benchmark("reference_throughput", "--data", pairs, "--model", model, "--pairs", 4, "--repeats", 1)
    found = result["workloads"]["data"]
    assert all(set(found[side]) == SIDE for side in ("ours", "trl_default", "trl_best"))
    assert result["ratio"] == found["ratio_default"]
    assert found["pairs"] == 4
    assert found["trl_best_batch_size"] in (1, 2, 4, 8, 16)
    assert found["ratio_best"] <= found["ratio_default"] * 2  # the best is looked for on a part, so it may lose
    assert found["largest_relative_difference"] <= 1e-4
    assert found["mean_tokens"]["prompt"] > found["mean_tokens"]["chosen"]


@pytest.mark.slow
def test_a_start_with_everything_stored_runs_no_forward(pairs: Path, model: Path):
    result = benchmark("reference_startup", "--data", pairs, "--model", model, "--pairs", 4)
    starts = result["ours"]["starts"]
    assert starts.pop("first")["forwards"] > 0
    assert set(starts) == {"nothing", "beta", "learning_rate", "seed", "lora_rank", "output_dir"}
    assert {one["forwards"] for one in starts.values()} == {0}
    assert result["ours"]["recomputed"] == []
    assert set(result["trl"]["recomputed"]) <= set(starts)
    assert result["ours"]["largest_share_of_first"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own count of memory")
def test_scaling_says_cost_and_memory_of_every_size():
    result = benchmark("reference_scaling", "--largest", 1000)
    assert [size["rows"] for size in result["sizes"]] == [1000]
    for name in ("first", "complete"):
        assert set(result[name]) == {
            "us_per_row_largest_to_smallest",
            "us_per_row_largest_to_next",
            "memory_bytes_per_further_row",
        }
        assert all(size[name]["us_per_row"] > 0 for size in result["sizes"])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="--scaling reads Linux's own count of memory")
def test_the_audit_is_measured_against_tokenizing_the_same_texts(tmp_path: Path, model: Path):
    data = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"Add {n} and {n}.", "chosen": f"It is {2 * n} for sure.", "rejected": f"Maybe it was {n}?"}
        for n in range(12)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = benchmark(
        "audit_throughput",
        "--data",
        data,
        "--model",
        model,
        "--pairs",
        30,
        "--repeats",
        3,
        "--scaling",
        "--sizes",
        20,
        40,
    )
    found = result["workloads"]["data"]
    assert found["pairs"] == 30, "more than the file has: copies with changed words"
    assert found["tokens"] > 30 * 3
    assert found["heldout"] > 0
    assert (
        result["ratio"]
        == found["ratio"]
        == pytest.approx(found["ours"]["seconds"] / found["floor"]["seconds"], rel=1e-3)
    )
    assert set(result["peers"]) == {"ours_static_model", "semhash", "sentence_transformers"}
    assert all(one["left_out"] for one in result["peers"].values()), "no model was named"
    sizes = result["scaling"]["sizes"]
    assert [one["pairs"] for one in sizes] == [20, 40]
    assert all(0 < one["peak_gib_before_audit"] <= one["peak_gib"] for one in sizes)


@pytest.mark.slow
def test_what_runs_on_a_gpu_runs_on_a_cpu_with_a_tiny_model(pairs: Path):
    result = benchmark("gpu_memory", "--device", "cpu", "--size", "tiny", "--data", pairs)
    assert set(result["training"]) == {"gpu", "cpu_offload", "precomputed"}
    losses = [one["losses"] for one in result["training"].values()]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0] == pytest.approx(losses[2], abs=1e-4)
    assert all(one["step_seconds"] > 0 for one in result["training"].values())
    assert result["host_reference"]["two_layers_and_head_gb"] > 0


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_for_one_says_so():
    done = subprocess.run([ROOT / "benchmarks" / "gpu.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no GPU" in done.stderr
