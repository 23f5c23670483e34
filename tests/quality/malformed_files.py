"""Named malformed preference files: their bytes, and what a reader has to say about them."""

from __future__ import annotations

import gzip
import io
import json
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class MalformedFile:
    """A file that is wrong somewhere.

    Attributes:
        name: What is wrong.
        file: Its file name.
        data: Its bytes.
        faults: Words that the fault of each faulty row must have, by row; `file` is one of them by itself.
        good: The rows without a fault, exactly as they must be read.
        problem: Words of the error if the whole file is unusable.
    """

    name: str
    file: str
    data: bytes
    faults: dict[int, tuple[str, ...]] = field(default_factory=dict)
    good: list[dict[str, Any]] = field(default_factory=list)
    problem: tuple[str, ...] = ()


def text_row(i: int) -> dict[str, Any]:
    return {"prompt": f"Frage {i}: größer?", "chosen": f"Ja {i} 😀", "rejected": f"Nein {i}", "score": i + 0.5}


def chat_row(i: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"Question {i}?"}]
    return {
        "prompt": turns,
        "chosen": [{"role": "assistant", "content": f"yes {i}"}],
        "rejected": [{"role": "assistant", "content": f"no {i}"}],
    }


def line(row: Any) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


GOOD = [text_row(0), text_row(1), text_row(2)]
_BEFORE, _AFTER = line(GOOD[0]) + line(GOOD[1]), line(GOOD[2])
_CHATS = [chat_row(0), chat_row(1), chat_row(2)]
_CSV = b"prompt,chosen,rejected,score\n"
_CSV_GOOD = [{"prompt": f"q{i}", "chosen": f"a{i}", "rejected": f"b{i}", "score": i} for i in range(2)]
_CSV_LINES = b"q0,a0,b0,0\n", b"q1,a1,b1,1\n"


def _in_line_3(name: str, bad: bytes, *reason: str) -> MalformedFile:
    """One bad line after two good ones and before another."""
    return MalformedFile(name, "pairs.jsonl", _BEFORE + bad + _AFTER, {2: ("line 3:", *reason)}, GOOD)


def _in_chats(name: str, bad: Any, *reason: str) -> MalformedFile:
    data = line(_CHATS[0]) + line(bad) + line(_CHATS[1]) + line(_CHATS[2])
    return MalformedFile(name, "chats.jsonl", data, {1: ("line 2:", *reason)}, _CHATS)


def _unusable(name: str, file: str, data: bytes, *problem: str) -> MalformedFile:
    return MalformedFile(name, file, data, problem=problem)


def _changed(i: int, **values: Any) -> dict[str, Any]:
    return {**text_row(i), **values}


def _without(i: int, name: str) -> dict[str, Any]:
    return {key: value for key, value in text_row(i).items() if key != name}


def _parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(GOOD), file)
    return file.getvalue()


def _not_utf8_parquet() -> bytes:
    wrong = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"a0\xe9!"))
    table = pa.table({"prompt": ["q0", "q1"], "chosen": wrong, "rejected": ["b0", "b1"], "score": [0, 1]})
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def _arrow_stream(cut: int) -> bytes:
    table = pa.Table.from_pylist(GOOD * 500)
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()[:-cut]


def _arrow_offsets() -> bytes:
    """A stream whose texts would begin before the data does."""
    wrong = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\xf0\xff\xff\xff\4\0\0\0"), pa.py_buffer(b"a0!!"))
    table = pa.table({"chosen": wrong, "rejected": ["b0", "b1"]})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()


def _damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 0x55 for byte in data[middle : middle + 40]) + data[middle + 40 :]


def _many(n: int) -> bytes:
    return b"".join(line(text_row(i)) for i in range(n))


_ARRAY = json.dumps(GOOD, ensure_ascii=False, indent=1).encode()
_LATIN = b'{"prompt": "q", "chosen": "caf\xe9", "rejected": "b"}\n'

LINES = [
    _in_line_3("comma-missing", b'{"prompt": "q" "chosen": "a"}\n', "not JSON: Expecting ',' delimiter at character 16"),
    _in_line_3("number-row", b"17\n", "a number, not an object"),
    _in_line_3("list-row", b'["q", "a", "b"]\n', "a list, not an object"),
    _in_line_3("text-row", b'"just text"\n', "text, not an object"),
    _in_line_3("null-row", b"null\n", "null, not an object"),
    _in_line_3("empty-object", b"{}\n", "no column 'prompt', only an empty object"),
    _in_line_3("latin-1-line", _LATIN, "not UTF-8: byte 31 of the line is 0xe9", "iconv -f LATIN1"),
    _in_line_3("nul-bytes", b"\0" * 300 + b"\n", "not JSON", "NUL bytes"),
    _in_line_3("nul-in-text", b'{"prompt": "a\0b"}\n', "not JSON", "NUL bytes"),
    _in_line_3("too-deep", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "nested deeper than 64"),
    _in_line_3("deep", b'{"prompt": ' + b"[" * 70 + b"]" * 70 + b"}\n", "nested deeper than 64"),
    _in_line_3("key-twice", b'{"prompt": "q", "chosen": "a", "chosen": "b", "rejected": "c"}\n', "'chosen'", "twice"),
    _in_line_3("nested-key-twice", b'{"prompt": "q", "meta": {"a": 1, "a": 2}}\n', "'a'", "twice"),
    _in_line_3("no-chosen", line(_without(9, "chosen")), "no column 'chosen', only 'prompt', 'rejected', 'score'"),
    _in_line_3("no-prompt", line(_without(9, "prompt")), "no column 'prompt', only 'chosen'"),
    _in_line_3("number-for-text", line(_changed(9, chosen=42)), "chosen: a number, but it has to be text"),
    _in_line_3("bool-for-text", line(_changed(9, rejected=False)), "rejected: true or false, but it has to be text"),
    _in_line_3("chat-for-text", line(chat_row(9)), "prompt: a list of messages, but it has to be text"),
    _in_line_3("list-for-text", line(_changed(9, chosen=["a", "b"])), "chosen: a list that holds text"),
    _in_line_3("object-for-text", line(_changed(9, chosen={"text": "a"})), "chosen: an object that is no message"),
    _in_line_3("half-emoji", b'{"prompt": "q", "chosen": "\\ud83d", "rejected": "b"}\n', "chosen", "\\ud83d", "half"),
    _in_line_3("key-no-text", b'{"prompt": "q", "\\ud800": 1}\n', "a key is not Unicode text", "ud800"),
    _in_line_3("key-nul", b'{"prompt": "q", "a\\u0000b": 1}\n', "has a NUL"),
    _in_line_3("html-error-page", b"<html>502</html>\n", "not JSON: Expecting value at character 1"),
    _in_chats("text-for-chat", _without(9, "score"), "prompt: text, but it has to be a list of messages"),
    _in_chats("message-for-chat", {**chat_row(9), "chosen": {"role": "assistant", "content": "a"}}, "chosen: a message"),
    _in_chats("no-role", {**chat_row(9), "chosen": [{"content": "a"}]}, "chosen: a list that holds", "it has no role"),
    _in_chats("content-number", {**chat_row(9), "rejected": [{"role": "assistant", "content": 5}]}, "rejected: message 0: its 'content' is a number"),
    _in_chats("role-list", {**chat_row(9), "prompt": [{"role": ["user"], "content": "a"}]}, "prompt: message 0: its 'role' is a list"),
    _in_chats("list-of-texts", {**chat_row(9), "chosen": ["yes"]}, "chosen: a list that holds text"),
    MalformedFile("last-line-cut", "pairs.jsonl", _BEFORE + _AFTER + line(text_row(9))[:30], {3: ("line 4:", "not JSON", "cut off")}, GOOD),
    MalformedFile("first-line-bad", "pairs.jsonl", b"{oops\n" + _BEFORE + _AFTER, {0: ("line 1:", "not JSON")}, GOOD),
    MalformedFile("few-prompts", "pairs.jsonl", b"".join(line(_without(i, "prompt")) for i in range(5)), {}, [_without(i, "prompt") for i in range(5)]),
    MalformedFile("huge-row", "pairs.jsonl", _BEFORE + line(_changed(9, chosen="x" * 30_000_000)) + b"oops\n", {3: ("line 4:",)}, [*GOOD[:2], _changed(9, chosen="x" * 30_000_000)]),
    MalformedFile("bom-blank-crlf", "pairs.jsonl", b"\xef\xbb\xbf" + _BEFORE.replace(b"\n", b"\r\n") + b"\r\n  \n17\r\n" + _AFTER, {2: ("line 5:", "a number")}, GOOD),
    MalformedFile("fault-in-later-chunk", "pairs.jsonl", _many(1500) + line(_changed(1500, score="high")) + b"oops\n", {1501: ("line 1502:",)}, [*map(text_row, range(1500)), _changed(1500, score="high")]),
]  # fmt: skip
TEXTS = [
    MalformedFile("array-cut", "pairs.json", _ARRAY[:-20], {2: ("row 2:", "ends in the middle", "cut off")}, GOOD[:2]),
    MalformedFile("array-with-number", "pairs.json", _ARRAY[:-1] + b", 5]", {3: ("row 3:", "a number")}, GOOD),
    MalformedFile("array-key-twice", "pairs.json", b'[{"chosen": "a", "chosen": "b"},' + _ARRAY[1:], {0: ("row 0:", "twice")}, GOOD),
    MalformedFile("array-latin-1", "pairs.json", b"[" + _LATIN + b"," + _ARRAY[1:], {0: ("row 0:", "chosen: not UTF-8", "0xe9")}, GOOD),
    MalformedFile("columns-with-number", "pairs.json", b'{"chosen": ["a", 5, "c"], "rejected": ["d", "e", "f"]}', {1: ("row 1:", "chosen: a number")}, [{"chosen": "a", "rejected": "d"}, {"chosen": "c", "rejected": "f"}]),
    _unusable("array-broken", "pairs.json", b"[" + line(GOOD[0]) + b";" + line(GOOD[1]) + b"]", "broken JSON in line 2, column 1 (row 0)", ".jsonl"),
    _unusable("array-goes-on", "pairs.json", _ARRAY + b"\n{}", "broken JSON", "Extra data"),
    _unusable("array-too-deep", "pairs.json", b"[" * 100_000, "row 0", "nested deeper"),
    MalformedFile("csv-short-row", "pairs.csv", _CSV + _CSV_LINES[0] + b"q,a\n" + _CSV_LINES[1], {1: ("line 3:", "2 fields, but the first line has 4")}, _CSV_GOOD),
    MalformedFile("csv-long-row", "pairs.csv", _CSV + _CSV_LINES[0] + b"q,a,b,0,more\n" + _CSV_LINES[1], {1: ("line 3:", "5 fields")}, _CSV_GOOD),
    MalformedFile("csv-latin-1", "pairs.csv", _CSV + _CSV_LINES[0] + b"q,caf\xe9,b,0\n" + _CSV_LINES[1], {1: ("line 3:", "chosen: not UTF-8", "0xe9")}, _CSV_GOOD),
    MalformedFile("csv-quote", "pairs.csv", _CSV + _CSV_LINES[0] + b'q,"a" b,c,0\n' + _CSV_LINES[1], {1: ("line 3:", "not CSV")}, _CSV_GOOD),
    MalformedFile("tsv-after-multiline", "pairs.tsv", b'prompt\tchosen\trejected\n"q\n0"\ta\tb\nq\n', {1: ("line 4:", "1 fields")}, [{"prompt": "q\n0", "chosen": "a", "rejected": "b"}]),
    _unusable("csv-latin-1-header", "pairs.csv", b"chosen,rejected,gr\xf6\xdfe\na,b,1\n", "the first line", "names in UTF-8", "iconv -f LATIN1"),
    _unusable("csv-open-quote", "pairs.csv", _CSV + b'q,"a,b,0\n' + _CSV_LINES[1], "line 2", "never closed"),
    _unusable("csv-column-twice", "pairs.csv", b"chosen,chosen,rejected\na,b,c\n", "two columns 'chosen'"),
    _unusable("csv-semicolons", "pairs.csv", b"prompt;chosen;rejected\nq;a;b\n", "columns prompt;chosen;rejected"),
    _unusable("csv-header-only", "pairs.csv", _CSV, "no rows"),
    _unusable("utf-16", "pairs.jsonl", _BEFORE.decode().encode("utf-16"), "text in UTF-16", "iconv -f UTF-16"),
    _unusable("utf-16-no-mark", "pairs.csv", _CSV.decode().encode("utf-16-le"), "text in UTF-16-LE", "iconv"),
    _unusable("empty", "pairs.jsonl", b"", "0 bytes"),
    _unusable("blank-lines", "pairs.jsonl", b"\n \n", "no rows"),
    _unusable("empty-array", "pairs.json", b"[]", "no rows"),
    _unusable("not-json-at-all", "pairs.jsonl", b"\x89PNG\r\n\x1a\n" + bytes(range(200)), "no row that could be read", "line 1: not UTF-8"),
    _unusable("no-pair-columns", "pairs.jsonl", line({"question": "q", "answer": "a"}), "columns question, answer", "`chosen`"),
    _unusable("no-rejected", "pairs.jsonl", line(_without(0, "rejected")), "columns prompt, chosen, score"),
    _unusable("suffix", "pairs.txt", _BEFORE, "'.txt'", ".jsonl"),
    _unusable("gz-parquet", "pairs.parquet.gz", gzip.compress(_parquet()), "'.gz'", ".parquet"),
]  # fmt: skip
BINARIES = [
    _unusable("parquet-cut", "pairs.parquet", _parquet()[:-50], "damaged"),
    _unusable("parquet-damaged", "pairs.parquet", b"PAR1" + b"\0" * 500, "damaged"),
    _unusable("parquet-no-chosen", "pairs.parquet", _parquet().replace(b"chosen", b"ch0sen"), "ch0sen", "`chosen`"),
    MalformedFile("parquet-not-utf8", "pairs.parquet", _not_utf8_parquet(), {1: ("row 1:", "chosen", "not UTF-8")}, [{"prompt": "q0", "chosen": "a0", "rejected": "b0", "score": 0}]),
    _unusable("arrow-cut", "pairs.arrow", _arrow_stream(cut=3000), "damaged"),
    _unusable("arrow-offsets", "pairs.arrow", _arrow_offsets(), "damaged"),
    _unusable("arrow-text", "pairs.arrow", _BEFORE, "damaged"),
    _unusable("gz-of-nothing", "pairs.jsonl.gz", gzip.compress(_many(50))[:12], "no row that could be read", "cut off"),
    _unusable("gz-damaged", "pairs.jsonl.gz", _damaged(gzip.compress(_many(5000))), "cannot be read"),
    _unusable("gz-is-plain", "pairs.jsonl.gz", _BEFORE, "cannot be read"),
]  # fmt: skip
CASES = [*LINES, *TEXTS, *BINARIES]
