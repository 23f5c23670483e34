"""The bytes of text files, compressed or not, and what makes a whole file unusable."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa

COMPRESSIONS = (".gz", ".zst")
_TO_UTF8 = "save it as UTF-8, for example with `iconv -f {} -t UTF-8 FILE`"
LATIN_1_FIX = "if the file is Latin-1, " + _TO_UTF8.format("LATIN1")


class UnusableFileError(Exception):
    """Nothing of a file can be used.

    Attributes:
        found: What the file is or holds.
        reason: Why that cannot be read.
        fix: What to change.
    """

    def __init__(self, found: str, reason: str, fix: str) -> None:
        super().__init__(f"{found}: {reason}")
        self.found, self.reason, self.fix = found, reason, fix


class CutOffError(Exception):
    """A compressed file ends before its data does; all that came before was read."""


class Row(NamedTuple):
    """One row of a file as Python values.

    Attributes:
        number: Line of a file of lines, from 1; else the row, from 0.
        values: Values by column; empty where the row could not be read.
        fault: Why the row could not be read, ``""`` where it could.
        size: Roughly how many bytes it takes, so that a chunk of huge rows can be kept short.
    """

    number: int
    values: dict[str, Any]
    fault: str = ""
    size: int = 0


def data_suffix(path: Path) -> str:
    """Returns a file's suffix in lower case, without that of a compression: ``.jsonl`` of ``a.jsonl.gz``."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return name.suffix.lower()


def is_name(text: str) -> bool:
    """Tells whether Arrow can keep a text as a column's name: in UTF-8, and without NUL, at which names end."""
    return "\0" not in text and (text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text))


def read_lines(path: Path) -> Iterator[bytes]:
    r"""Yields the lines of a file with their ends (``\n``), without a byte order mark.

    Raises:
        UnusableFileError: It cannot be opened, is damaged, or is not UTF-8 from its first bytes on.
        CutOffError: It is compressed and ends too early.
    """
    with _open(path) as file:
        first = file.readline()
        check_encoding(first[:64])
        if first := first.removeprefix(b"\xef\xbb\xbf"):
            yield first
        yield from file


def read_all(path: Path) -> tuple[str, bool]:
    """Returns a file's text and whether it is all of it; bytes that are not UTF-8 become surrogates.

    Raises:
        UnusableFileError: It cannot be opened, is damaged, or is not UTF-8 from its first bytes on.
    """
    chunks: list[bytes] = []
    whole = True
    try:
        with _open(path) as file:
            while chunk := file.read(1 << 20):
                chunks.append(chunk)
    except CutOffError:
        whole = False
    data = b"".join(chunks)
    check_encoding(data[:64])
    return data.decode("utf-8-sig", "surrogateescape"), whole


def check_encoding(head: bytes) -> None:
    """Raises UnusableFileError if a text file's first bytes are those of UTF-16 or UTF-32."""
    encoding = json.detect_encoding(head)
    if encoding.startswith("utf-8"):
        return
    # Without a byte order mark it is a guess from zero bytes; zeros that are damage must not pass for UTF-16.
    text = head[: len(head) // 4 * 4].decode(encoding, "replace").lstrip("\ufeff \r\n\t")
    if text.isprintable() or not head.strip(b"\0"):
        name = encoding.upper()
        raise UnusableFileError(f"text in {name}", "only UTF-8 can be read", _TO_UTF8.format(name))


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    try:
        with _opened(path) as file:
            yield file
    except EOFError as error:
        raise CutOffError from error
    except (OSError, zlib.error) as error:
        if path.suffix.lower() == ".zst" and "runcated" in str(error):
            raise CutOffError from error
        reason = f"it cannot be read: {error}"
        raise UnusableFileError("a damaged or unreadable file", reason, "check or copy the file again") from error


def _opened(path: Path) -> BinaryIO:
    match path.suffix.lower():
        case ".gz":
            return cast(BinaryIO, gzip.open(path, "rb"))
        case ".zst":
            return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(path), compression="zstd"), 1 << 18))
        case _:
            return path.open("rb", buffering=1 << 18)
