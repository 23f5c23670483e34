"""Token ids of many texts in two arrays, by the run's tokenizer or, without one, as words."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from axolotl_dpo_ext.quality.text import split_words

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Encode = Callable[[list[str]], "TokenIds"]


@dataclass(frozen=True, eq=False)
class TokenIds:
    """The token ids of ``n`` texts, one behind the other.

    Attributes:
        ids: All ids, shape ``(total,)``.
        starts: Where each text's ids begin, and the end of the last, shape ``(n + 1,)``.
    """

    ids: NDArray[np.int64]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        """Returns the number of texts."""
        return len(self.starts) - 1

    def __getitem__(self, text: int) -> NDArray[np.int64]:
        """Returns the ids of one text, shape ``(length,)``, as a view."""
        return self.ids[self.starts[text] : self.starts[text + 1]]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """The number of tokens of each text, shape ``(n,)``."""
        return np.diff(self.starts)

    def take(self, rows: Sequence[int] | NDArray[np.intp]) -> TokenIds:
        """Returns the ids of the texts at these positions, in this order."""
        return TokenIds.of([self[row] for row in rows])

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]] | Sequence[NDArray[np.int64]]) -> TokenIds:
        """Joins one sequence of ids per text."""
        starts = np.zeros(len(sequences) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids in sequences], out=starts[1:])
        flat = itertools.chain.from_iterable(sequences)
        if sequences and isinstance(sequences[0], np.ndarray):
            return cls(np.concatenate(sequences).astype(np.int64, copy=False), starts)
        return cls(np.fromiter(flat, dtype=np.int64, count=int(starts[-1])), starts)


def words_as_ids(texts: list[str]) -> TokenIds:
    """Returns a number for each word; equal words have equal numbers, on every machine."""
    return TokenIds.of([[zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in split_words(t)] for t in texts])


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """What a run's tokenizer makes of texts.

    Attributes:
        encode: Token ids of texts, without special tokens around them.
        unit: What lengths are counted in, ``tokens`` or ``words``.
        tokenizer: The tokenizer, which renders conversations; ``None`` for words.
        opening: Ids that the tokenizer puts in front of a plain text, such as BOS.
        eos: The id and the text of the end-of-sequence token that TRL adds to plain answers, or ``None``.
        bos: Id of the token that begins a sequence, or ``None``.
        single_bos: Whether ``opening`` is left out in front of a plain text that begins with BOS.
    """

    encode: Encode
    unit: str = "words"
    tokenizer: Any = None
    opening: tuple[int, ...] = ()
    eos: tuple[int, str] | None = None
    bos: int | None = None
    single_bos: bool = False

    @classmethod
    def of(cls, tokenizer: Any, single_bos: bool = False) -> TextTokenizer:
        """Reads a Transformers tokenizer; ``None`` counts words.

        Args:
            tokenizer: The tokenizer, or any callable that takes a list of texts.
            single_bos: Whether the trainer puts BOS itself, in front of texts without one.

        Raises:
            TypeError: It cannot be called with a list of texts.
        """
        if tokenizer is None:
            return cls(encode=words_as_ids)
        if not callable(tokenizer):
            raise TypeError(
                f"tokenizer is a {type(tokenizer).__name__}, which cannot be called with texts; pass the tokenizer of "
                "the run (`AutoTokenizer.from_pretrained(…)`), and settings as `settings=…`"
            )
        # A processor of a vision model holds its tokenizer.
        inner = getattr(tokenizer, "tokenizer", tokenizer)
        eos, bos = getattr(inner, "eos_token_id", None), getattr(inner, "bos_token_id", None)
        return cls(
            encode=_encoder(inner),
            unit="tokens",
            tokenizer=inner if hasattr(inner, "apply_chat_template") else None,
            opening=_opening(inner, eos) if not single_bos else () if bos is None else (int(bos),),
            eos=None if eos is None else (int(eos), str(inner.eos_token)),
            bos=None if bos is None else int(bos),
            single_bos=single_bos,
        )


def _encoder(tokenizer: Any) -> Encode:
    # Not every callable takes them: a tokenizer of one's own needs only `add_special_tokens`.
    quiet = {"return_attention_mask": False, "verbose": False} if hasattr(tokenizer, "is_fast") else {}

    def encode(texts: list[str]) -> TokenIds:
        if not texts:
            return TokenIds.of([])
        answer = tokenizer(texts, add_special_tokens=False, **quiet)
        found = answer["input_ids"] if isinstance(answer, Mapping) or hasattr(answer, "keys") else answer
        if len(found) != len(texts):
            raise ValueError(f"the tokenizer returned {len(found)} sequences for {len(texts)} texts, not one each")
        return TokenIds.of(found)

    return encode


def _opening(tokenizer: Any, eos: int | None) -> tuple[int, ...]:
    """Returns what stands in front of a plain text, without an EOS that some tokenizers put behind it."""
    if not hasattr(tokenizer, "is_fast"):
        return ()
    ids = [int(token) for token in tokenizer("", verbose=False)["input_ids"]]
    bos = getattr(tokenizer, "bos_token_id", None)
    return tuple(ids[:-1] if ids and ids[-1] == eos and (len(ids) > 1 or eos != bos) else ids)
