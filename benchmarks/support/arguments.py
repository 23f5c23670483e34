"""The command line that benchmarks with a dataset and a model of one's choice have in common."""

from __future__ import annotations

import argparse
from pathlib import Path


def parser(about: str, data: str, pairs: int, pairs_of: str) -> argparse.ArgumentParser:
    """Returns a parser of `--data`, `--model`, `--pairs` and `--threads`.

    Args:
        about: The benchmark's docstring.
        data: What is measured with a file of preference pairs, and without one.
        pairs: How many pairs are measured by default.
        pairs_of: Of what.
    """
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, help=f"a file of preference pairs{data}")
    made.add_argument("--model", type=Path, help="a model's folder; default: the small one of shared/, or a made one")
    made.add_argument("--pairs", type=int, default=pairs, help=f"pairs of {pairs_of} (default: %(default)s)")
    made.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    return made
