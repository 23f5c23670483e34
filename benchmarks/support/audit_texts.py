"""Pairs for the audit: as rows of a dataset, as flat text for its peers, and as many of them as are wanted."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from support.inputs import Message, Pair, spread

COLUMNS = ("prompt", "chosen", "rejected")
MAX_LENGTH = 1024
HOLDOUT = 0.1
# Words that copies get. Two copies of a text are equal only if they get the same stretch of it.
_FOREIGN_WORDS = 2**22

Texts = dict[str, list[str]]


def run_audit(dataset: Any, tokenizer: Any, embedder: str = "lexical") -> Any:
    """Runs the whole default audit. It never stops for what it drops: the time is what counts here."""
    from axolotl_dpo_ext.quality import audit
    from axolotl_dpo_ext.settings import QualitySettings

    settings = QualitySettings(embedder=embedder, max_drop_fraction=1.0)
    return audit(dataset, tokenizer, settings=settings, holdout=HOLDOUT, max_length=MAX_LENGTH)


def outcome(audited: Any) -> dict[str, Any]:
    """Returns how many pairs an audit dropped, held out, and flagged by check."""
    return {
        "dropped": len(audited.dropped_rows),
        "heldout": len(audited.heldout_rows),
        "flagged": audited.counts,
    }


def as_rows(pairs: Sequence[Pair]) -> tuple[list[dict[str, Any]], Texts]:
    """Returns pairs as the rows of a dataset, and their text.

    Returns:
        Rows of three texts where every prompt is one message, of three conversations otherwise; and three columns of
        text, one entry per pair, in which the messages of a conversation are joined by line breaks.
    """
    texts = {name: [_text(pair[name]) for pair in pairs] for name in COLUMNS}
    if all(len(pair[name]) == 1 for pair in pairs for name in COLUMNS):
        return [dict(zip(COLUMNS, row, strict=True)) for row in zip(*texts.values(), strict=True)], texts
    return [dict(pair) for pair in pairs], texts


def _text(messages: Sequence[Message]) -> str:
    return "\n".join(message["content"] for message in messages)


def varied(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """Returns as many pairs as are wanted: evenly spread ones, or all and then copies with changed words."""
    return spread(pairs, count) if count <= len(pairs) else list(islice(copies(pairs), count))


def copies(pairs: Sequence[Pair], words: int | None = None) -> Iterator[Pair]:
    """Yields the pairs, then without end copies in which every second word is another of the data's words.

    So copies are as long as what they are made from, share half of its words, and are no near-duplicates. Texts that
    were equal stay equal within a copy, so that as many pairs share a prompt.

    Args:
        pairs: Pairs to begin with.
        words: Length to which every message is cut, in words; ``None`` leaves the first round as it is.
    """
    changed = _Changed(pairs)
    yield from pairs if words is None else (changed.pair(pair, 0, words) for pair in pairs)
    copy = 1
    while True:
        yield from (changed.pair(pair, copy, words) for pair in pairs)
        copy += 1


class _Changed:
    """Makes changed copies of pairs.

    Args:
        pairs: The pairs whose words are used.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        own = {word for pair in pairs for name in COLUMNS for message in pair[name] for word in _words(message)}
        self._foreign = random.Random(0).choices(sorted(own), k=_FOREIGN_WORDS)

    def pair(self, pair: Pair, copy: int, words: int | None) -> Pair:
        return {name: [self._message(message, copy, words) for message in pair[name]] for name in COLUMNS}

    def _message(self, message: Message, copy: int, words: int | None) -> Message:
        own = _words(message)[:words]
        places = own[1::2]
        start = zlib.crc32(f"{copy} {message['content']}".encode()) % (_FOREIGN_WORDS - len(places))
        own[1::2] = self._foreign[start : start + len(places)]
        return {"role": message["role"], "content": " ".join(own)}


def _words(message: Message) -> list[str]:
    return message["content"].split()
