"""What others do with the same pairs, and our audit with a static model; left out where something is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.audit_texts import COLUMNS, as_rows, run_audit
from support.inputs import Pair, spread
from support.measure import in_turns, say

# A transformer on a CPU takes minutes for what the others do in a second.
SENTENCE_PAIRS = 200
REPEATS = 3
MAX_SIMILARITY = 0.95

Run = Callable[[], str]


@dataclass(frozen=True)
class Peer:
    """Something to measure beside the default audit.

    Attributes:
        module: What must be installed.
        option: The option that names its model.
        model: The model's folder, ``None`` if none was named.
        pairs: What it is measured on.
        make: Loads the model and returns what is timed, which says what it found.
    """

    module: str
    option: str
    model: Path | None
    pairs: Sequence[Pair]
    make: Callable[[Sequence[Pair], Path], Run]

    @property
    def left_out(self) -> str:
        """Why it cannot be measured, ``""`` if it can."""
        if importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        return f"no model was named with {self.option}" if self.model is None else ""


def measure(pairs: Sequence[Pair], tokenizer: Any, static: Path | None, sentence: Path | None) -> dict[str, Any]:
    """Measures every peer on the pairs, in turns with the default audit; loading a model does not count.

    Args:
        pairs: Pairs of one workload.
        tokenizer: For our audits.
        static: A model's folder as model2vec writes it, or ``None``.
        sentence: A model's folder as sentence-transformers writes it, or ``None``.

    Returns:
        By name, either the figures or, in ``left_out``, why there are none.
    """

    def audited(pairs: Sequence[Pair], folder: Path) -> Run:
        return _audit(pairs, tokenizer, f"model2vec:{folder}")

    few = spread(pairs, SENTENCE_PAIRS)
    peers = {
        "ours_static_model": Peer("model2vec", "--static-model", static, pairs, audited),
        "semhash": Peer("semhash", "--static-model", static, pairs, _semhash),
        "sentence_transformers": Peer(
            "sentence_transformers", "--sentence-model", sentence, few, _sentence_transformers
        ),
    }
    found: dict[str, Any] = {name: {"left_out": peer.left_out} for name, peer in peers.items() if peer.left_out}
    runs = {name: peer.make(peer.pairs, peer.model) for name, peer in peers.items() if not peer.left_out and peer.model}
    if runs:
        say(f"peers: {len(pairs):,} pairs, at most {SENTENCE_PAIRS} of them through sentence-transformers")
        runs["ours"] = _audit(pairs, tokenizer, "lexical")
        for name, taken in in_turns(runs, REPEATS).items():
            count = len(peers[name].pairs) if name in peers else len(pairs)
            rate = count / taken.seconds
            found[name] = {"pairs": count, "seconds": taken.seconds, "pairs_per_s": rate, "found": taken.value}
    return found


def _audit(pairs: Sequence[Pair], tokenizer: Any, embedder: str) -> Run:
    from datasets import Dataset

    dataset = Dataset.from_list(as_rows(pairs)[0])
    return lambda: f"{len(run_audit(dataset, tokenizer, embedder).dropped_rows)} pairs to drop"


def _semhash(pairs: Sequence[Pair], folder: Path) -> Run:
    """Finds near-duplicates across the set; semhash has no check within a pair."""
    from model2vec import StaticModel
    from semhash import SemHash

    model = StaticModel.from_pretrained(folder)
    _, texts = as_rows(pairs)
    records = [dict(zip(COLUMNS, row, strict=True)) for row in zip(*texts.values(), strict=True)]

    def run() -> str:
        result = SemHash.from_records(records, columns=list(COLUMNS), model=model).self_deduplicate()
        return f"{len(result.filtered)} near-duplicates"

    return run


def _sentence_transformers(pairs: Sequence[Pair], folder: Path) -> Run:
    """Computes each pair's cosine as a script of one's own would; texts end where the model's length does."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    _, texts = as_rows(pairs)

    def run() -> str:
        chosen, rejected = (
            model.encode(texts[side], normalize_embeddings=True, show_progress_bar=False)
            for side in ("chosen", "rejected")
        )
        similar = (chosen * rejected).sum(axis=1) > MAX_SIMILARITY
        return f"{int(similar.sum())} pairs above {MAX_SIMILARITY}"

    return run


def print_table(peers: dict[str, Any]) -> None:
    """Prints one line for each peer, and for the default audit that was measured in turns with them."""
    for name, one in peers.items():
        if "left_out" in one:
            print(f"{name:<22} left out: {one['left_out']}")
        else:
            print(f"{name:<22} {one['pairs']:>7,} pairs {one['pairs_per_s']:>9,.1f} pairs/s   {one['found']}")
