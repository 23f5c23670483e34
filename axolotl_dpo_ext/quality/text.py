"""Normalisation of text: for comparing answers, for grouping prompts, for showing excerpts."""

from __future__ import annotations

import re
import unicodedata
from hashlib import blake2b

# Invisible characters that `str.strip` leaves: a "text" of only these is as empty as one of spaces.
_BLANK = re.compile(r"[\s\u200b-\u200d\u2060\ufeff]*\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# Chinese and Japanese write no spaces: one "word" would be a whole sentence. Korean does write them.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")


def is_blank(text: str) -> bool:
    """Tells whether there is nothing to see in a text."""
    return _BLANK.match(text) is not None


def collapse(text: str) -> str:
    """Returns the text in NFC with runs of whitespace as one space: what makes two answers identical."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFC", text)).split())


def prompt_key(text: str) -> str:
    """Returns the text in NFKC, case-folded, whitespace as single spaces: what makes two prompts the same."""
    folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    # Case folding can undo the normal form (it expands some letters), hence the second pass.
    return " ".join((folded if folded.isascii() else unicodedata.normalize("NFKC", folded)).split())


def stable_hash(text: str) -> int:
    """Returns 64 bits that are the same on every machine and in every run, unlike Python's own ``hash``."""
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, person=b"dpo-ext-prompt")
    return int.from_bytes(digest.digest(), "big")


def excerpt(text: str, limit: int = 120) -> str:
    """Returns the start of a text on one line, at most ``limit`` characters, safe to print in a terminal."""
    # The slice keeps huge rows cheap; twice the limit leaves room for the whitespace that is removed.
    line = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", " ".join(text[: 2 * limit + 2].split()))
    return line if len(line) <= limit and len(text) <= 2 * limit + 2 else line[: limit - 1].rstrip() + "…"


def common_length(a: str, b: str) -> int:
    """Returns how many characters two texts both begin with."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # bisection: a few comparisons of whole slices instead of one per character
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def split_words(text: str) -> list[str]:
    """Returns the words of a text; a Chinese or Japanese character is a word."""
    return text.split() if text.isascii() else _WORD.findall(text)
