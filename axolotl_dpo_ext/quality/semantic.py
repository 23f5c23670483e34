"""Embedders with a trained model behind them, through model2vec and sentence-transformers.

Both read answers to their end. The libraries' own defaults cut long texts (at 512 tokens, and at what the model was
trained for); two long answers with the same beginning would then look alike, and the pair would be dropped for it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from axolotl_dpo_ext.extras import require

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

# model2vec gathers the vectors of all tokens of equally long texts at once: few texts at a time bound the memory.
_STATIC_BATCH = 256
_SENTENCE_BATCH = 32


class Model2VecEmbedder:
    """Mean of static token vectors: a model of some megabytes, on the CPU, nearly as fast as tokenizing.

    Args:
        name: What the user wrote behind ``embedder:``.
        model: A folder, or a name on the Hub.

    Raises:
        MissingExtraError: model2vec is not installed.
    """

    def __init__(self, name: str, model: str) -> None:
        self.name = name
        library = require("model2vec", "semantic", f"the embedder {name!r}")
        self._model = library.StaticModel.from_pretrained(model)

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Returns one vector per text, shape ``(n, d)``, float32; zeros where the model knows no token of a text.

        A text's vector depends on nothing but the text.
        """
        # Its worker threads would switch off the tokenizers' own for the rest of the process.
        vectors = self._model.encode(
            list(texts), max_length=None, batch_size=_STATIC_BATCH, show_progress_bar=False, use_multiprocessing=False
        )
        return np.asarray(vectors, dtype=np.float32)


class SentenceTransformersEmbedder:
    """A transformer of sentence-transformers, on the GPU if there is one.

    A text longer than the model takes is cut into pieces of that length; its vector is the mean of theirs, weighted
    by their tokens.

    Args:
        name: What the user wrote behind ``embedder:``.
        model: A folder, or a name on the Hub. Code that comes with a model is never run.

    Raises:
        MissingExtraError: sentence-transformers is not installed.
    """

    def __init__(self, name: str, model: str) -> None:
        self.name = name
        library = require("sentence_transformers", "sentence-transformers", f"the embedder {name!r}")
        self._model = library.SentenceTransformer(model)
        self._window = _window(self._model)

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Returns one vector per text, shape ``(n, d)``, float32.

        Texts are padded to the longest of their batch, so a vector differs by rounding (about 1e-7) with the other
        texts of the call.
        """
        pieces, tokens, starts = self._pieces(texts)
        vectors = np.asarray(
            self._model.encode(pieces, batch_size=_SENTENCE_BATCH, show_progress_bar=False, convert_to_numpy=True),
            dtype=np.float32,
        )
        if len(pieces) == len(texts):
            return vectors
        share = tokens / np.repeat(np.add.reduceat(tokens, starts), np.diff([*starts, len(pieces)]))
        means: NDArray[np.float32] = np.add.reduceat(vectors * share[:, None].astype(np.float32), starts)
        return means

    def _pieces(self, texts: Sequence[str]) -> tuple[list[str], NDArray[np.int64], list[int]]:
        """Cuts texts at what the model takes.

        Returns:
            All pieces, the number of tokens of each (at least 1), and the index of each text's first piece.
        """
        if self._window is None:
            return list(texts), np.ones(len(texts), dtype=np.int64), list(range(len(texts)))
        offsets = self._model.tokenizer(
            list(texts), add_special_tokens=False, truncation=False, return_offsets_mapping=True, verbose=False
        )["offset_mapping"]
        pieces: list[str] = []
        tokens: list[int] = []
        starts: list[int] = []
        for text, spans in zip(texts, offsets, strict=True):
            starts.append(len(pieces))
            cut = [spans[start : start + self._window] for start in range(0, len(spans), self._window)]
            # A text that fits goes in as it is, with all that its tokens do not cover.
            pieces += [text] if len(cut) <= 1 else [text[part[0][0] : part[-1][1]] for part in cut]
            tokens += [len(part) for part in cut] or [1]
        return pieces, np.array(tokens, dtype=np.int64), starts


def _window(model: Any) -> int | None:
    """Returns how many tokens of text a model takes; ``None`` where it takes any length or cannot say which tokens."""
    limit = getattr(model, "max_seq_length", None)
    if limit is None or not math.isfinite(limit):
        return None
    if not getattr(model.tokenizer, "is_fast", False):
        logger.warning(
            "the embedding model reads the first %d tokens of an answer only: its tokenizer cannot say where a token "
            "begins, so longer answers cannot be cut into pieces",
            limit,
        )
        return None
    special: int = model.tokenizer.num_special_tokens_to_add()
    return max(1, int(limit) - special)
