"""Plants known faults in sound preference pairs, and says which rows have them.

This file states the truth that checks are measured against, so it uses nothing of the pack. Its figures hold for
any tokenizer: a text has at least as many tokens as words and at most as many as UTF-8 bytes.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

from .conftest import REAL_DATA

Row = dict[str, Any]

#: The longest prompt with answer, in tokens: clean pairs have fewer bytes, truncated ones more words.
MAX_LENGTH = 2048
#: What a prompt or an answer with a doubled BOS begins with: it has to be the tokenizer's, and added to plain text.
BOS = "<s>"
#: The faults, named as the checks that find them; which other checks rightly flag a pair with one as well.
IMPLIED: dict[str, set[str]] = {
    "malformed": set(),
    "identical": {"similarity", "minimal_edit"},
    "length_ratio": set(),
    "similarity": {"minimal_edit"},  # one word more is a small edit
    "minimal_edit": {"similarity"},
    "contradiction": set(),
    "duplicate": set(),
    "doubled_bos": set(),
    "truncated": set(),
    "same_tokens": {"truncated"},
    "label_noise": set(),
    "tie": set(),
    "reference_likelihood": set(),
}
_LONG = 80  # words: one word changed in so many is little, however it is measured
_SYLLABLES = ["".join(parts) for parts in product("bcdfghjklmnprstvwxz", "aeiouy", ["", *"lmnrst"])]


def clean_pairs(n: int, seed: int = 0) -> list[Row]:
    """Returns ``n`` pairs that have none of the faults, one for each prompt: real ones first, then made-up ones.

    Rows have ``prompt``, ``chosen``, ``rejected`` (text), ``chosen_score`` above ``rejected_score``, and
    ``ref_chosen_logps`` and ``ref_rejected_logps``, sums in proportion to the length of the answer.
    """
    rng = random.Random(seed)
    rows, seen = [], set()
    for prompt, chosen, rejected in _candidates(rng):
        texts = {_words_of(text) for text in (prompt, chosen, rejected)}
        if len(rows) == n:
            break
        if _is_clean(prompt, chosen, rejected) and not texts & seen:
            seen |= texts
            rows.append(_with_figures({"prompt": prompt, "chosen": chosen, "rejected": rejected}, rng))
    return rows


def plant(dataset_rows: list[Row], each: int, seed: int) -> tuple[list[Row], dict[str, set[int]]]:
    """Plants every fault of `IMPLIED` and returns the rows in random order.

    A fault is one row, but a contradiction is the two rows or the cycle of three that contradict each other; all of
    them are returned. Of duplicates only the copies are, the originals are under ``duplicate_original``: which of
    the two is kept is up to the check, and both have the same prompt, which no other row has.

    Args:
        dataset_rows: Clean pairs; they are not changed.
        each: How many faults of each kind.
        seed: Chooses the rows and their order.

    Returns:
        The rows, more than were given, and the positions of the planted ones by fault.

    Raises:
        ValueError: If there are not enough rows, or not enough long ones.
    """
    rng = random.Random(seed)
    takers = {**dict.fromkeys(IMPLIED, each), "contradiction": 2 * each}  # a cycle needs a third answer
    pool = rng.sample(dataset_rows, len(dataset_rows))
    # Only the changes of one word need long pairs, so these are dealt out first.
    order = sorted(takers, key=lambda fault: fault not in ("similarity", "minimal_edit", "duplicate"))
    pool.sort(key=lambda row: _shorter(row) < _LONG)
    if len(pool) < sum(takers.values()) or (each and _shorter(pool[3 * each - 1]) < _LONG):
        raise ValueError(
            f"{len(pool)} rows, {sum(_shorter(row) >= _LONG for row in pool)} of them of {_LONG} words or more, are "
            f"too few for {each} of each fault: that takes {sum(takers.values())} rows and {3 * each} long ones"
        )
    rest = pool[3 * each :]
    pool[3 * each :] = rng.sample(rest, len(rest))  # sorted, the other faults would get long pairs only
    marked: list[tuple[str, Row]] = []
    for fault in order:
        sound, pool = pool[: takers[fault]], pool[takers[fault] :]
        marked += _plant_one(fault, sound, rng)
    marked += [("", row) for row in pool]
    rng.shuffle(marked)
    planted: dict[str, set[int]] = {fault: set() for fault in (*IMPLIED, "duplicate_original")}
    for position, (fault, _) in enumerate(marked):
        if fault:
            planted[fault].add(position)
    return [row for _, row in marked], planted


def in_tokens(rows: list[Row], count: Callable[[str], int]) -> list[Row]:
    """Returns rows whose log-probabilities are in proportion to tokens, four characters each, not to characters.

    Real text has fewer tokens a character than made-up words, so that a set of both would have two likelihoods. As in
    TRL they are sums over the tokens that the run keeps.
    """
    made = []
    for row in rows:
        texts = {f"ref_{side}_logps": row[side] for side in ("chosen", "rejected") if row[side]}
        room = max(MAX_LENGTH - count(row["prompt"] or ""), 0)
        kept = {name: min(count(text), room) for name, text in texts.items()}
        made.append(row | {name: row[name] * 4 * kept[name] / len(text) for name, text in texts.items()})
    return made


def to_conversations(rows: list[Row], planted: dict[str, set[int]]) -> list[Row]:
    """Returns planted rows as conversations; the malformed ones now have the faults that only conversations can have.

    These are an answer that begins or ends with the user's message, none at all, and one without text. A BOS at the
    beginning of a user's message is not at the beginning of the sequence, so it is moved to the answer.
    """
    made = []
    for row in rows:
        if row["prompt"].startswith(BOS):
            row = {**row, "prompt": row["prompt"].removeprefix(BOS), "chosen": BOS + row["chosen"]}
        sides = {side: _message("assistant", row[side]) for side in ("chosen", "rejected")}
        made.append({**row, "prompt": _message("user", row["prompt"]), **sides})
    user = _message("user", "And why is that so?")
    for i, position in enumerate(sorted(planted["malformed"])):
        side, answer = ("chosen", "rejected")[i % 2], _message("assistant", "Because of this.")
        made[position] |= {"chosen": answer, "rejected": answer}
        made[position][side] = [user + answer, answer + user, [], _message("assistant", None)][i // 2 % 4]
    return made


def _candidates(rng: random.Random) -> Iterator[tuple[str, str, str]]:
    path = REAL_DATA / "alpaca_eval_dev.jsonl.gz"
    if path.exists():
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for row in map(json.loads, file):
                yield row["prompt"], row["chosen"], row["rejected"]
    while True:
        yield _made_text(rng, 9) + "?", _made_text(rng, rng.randint(80, 90)), _made_text(rng, rng.randint(80, 90))


def _is_clean(prompt: str, chosen: str, rejected: str) -> bool:
    """Whether a pair has none of the faults, judged with a wide margin."""
    shorter, longer = sorted((chosen, rejected), key=len)
    a, b = _words_of(shorter), _words_of(longer)
    return (
        len(a) >= 25
        and max(len(longer) / len(shorter), len(b) / len(a), len(a) / len(b)) <= 1.3
        and len(set(a) & set(b)) <= 0.5 * len(set(a) | set(b))
        and len((prompt + longer).encode()) <= MAX_LENGTH - 64  # the rest is room for a chat template
        and bool(prompt.strip())
        # Neither special tokens nor ruled tables, whose rules make any two of them alike.
        and not re.search(r"<\W?[a-z]+\W?>|\[/?INST\]|(\W)\1{9}", prompt + chosen + rejected)
    )


def _words_of(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.casefold()))


def _shorter(row: Row) -> int:
    """Returns the length of the shorter answer in words."""
    return min(len(row["chosen"].split()), len(row["rejected"].split()))


def _made_text(rng: random.Random, words: int) -> str:
    """Returns sentences of made-up words: so many different ones that no two texts are alike."""
    made = ["".join(rng.choices(_SYLLABLES, k=rng.choice((1, 2, 2, 3, 3)))) for _ in range(words)]
    for start in range(0, words, 12):
        made[start] = made[start].capitalize()
        made[min(start + 11, words - 1)] += "."
    return " ".join(made)


def _with_figures(row: Row, rng: random.Random, per_character: float = -0.4) -> Row:
    """Adds scores and log-probabilities; -0.4 a character is about -1.6 a token, what a model gives its own kind."""
    figures = {"chosen_score": round(rng.uniform(6, 10), 2), "rejected_score": round(rng.uniform(0, 5), 2)}
    for side in ("chosen", "rejected"):
        figures[f"ref_{side}_logps"] = rng.uniform(0.9, 1.1) * per_character * len(row[side])
    return {**row, **figures}


def _with_answers(row: Row, chosen: str, rejected: str, rng: random.Random) -> Row:
    return _with_figures({**row, "chosen": chosen, "rejected": rejected}, rng)


def _change_word(text: str, rng: random.Random) -> str:
    """Returns the text with one word of its middle changed; a number if there is one."""
    words = list(re.finditer(r"\S+", text))
    middle = words[len(words) // 4 : 3 * len(words) // 4]
    word = rng.choice([word for word in middle if word[0].isdecimal()] or middle)
    new = str(int(word[0]) + 1) if word[0].isdecimal() else "quirvenol"
    return text[: word.start()] + new + text[word.end() :]


def _message(role: str, text: str | None) -> list[dict[str, str | None]]:
    return [{"role": role, "content": text}]


def _plant_one(fault: str, rows: list[Row], rng: random.Random) -> list[tuple[str, Row]]:
    """Returns the rows with the fault, and those that it adds, each with the name it is counted under."""
    if fault == "contradiction":
        return _contradiction(rows, rng)
    if fault == "duplicate":
        return _duplicate(rows, rng)
    return [(fault, {**row, **_CHANGES[fault](row, i, rng)}) for i, row in enumerate(rows)]


def _malformed(row: Row, i: int, rng: random.Random) -> Row:
    return {("chosen", "rejected")[i % 2]: ["", "  \n\t ", None, "\u200b\u00a0"][i // 2 % 4]}


def _identical(row: Row, i: int, rng: random.Random) -> Row:
    chosen = row["chosen"] + " Voil\u00e0, d\u00e9j\u00e0 vu."
    spaced = chosen.replace(" ", "  ") + "\n"
    return _with_answers(row, chosen, [chosen, spaced, unicodedata.normalize("NFD", chosen)][i % 3], rng)


def _length_ratio(row: Row, i: int, rng: random.Random) -> Row:
    # Cutting one answer, not extending the other, keeps the pair shorter than any max_length.
    side = ("chosen", "rejected")[i % 2]
    words = row[side].split()
    return _with_figures({**row, side: " ".join(words[: len(words) // 4])}, rng)


def _similarity(row: Row, i: int, rng: random.Random) -> Row:
    sides = [row["chosen"], row["chosen"] + " Indeed."]
    return _with_answers(row, *sides[:: (1, -1)[i % 2]], rng)


def _minimal_edit(row: Row, i: int, rng: random.Random) -> Row:
    return _with_answers(row, row["chosen"], _change_word(row["chosen"], rng), rng)


def _contradiction(rows: list[Row], rng: random.Random) -> list[tuple[str, Row]]:
    """Plants a swapped pair and a cycle of three in turn; the third answer is another pair's, which is used up."""
    made = []
    for i, (row, spare) in enumerate(zip(rows[::2], rows[1::2], strict=True)):
        a, b, c = row["chosen"], row["rejected"], _of_length(spare, row)
        beaten = [(a, b), (b, c), (c, a)] if i % 2 else [(a, b), (b, a)]
        made += [("contradiction", _with_answers(row, chosen, rejected, rng)) for chosen, rejected in beaten]
    return made


def _of_length(spare: Row, row: Row) -> str:
    """Returns an answer that is about as long as those of ``row``, made of another pair's two."""
    words = f"{spare['chosen']} {spare['rejected']}".split(" ")
    size = (len(row["chosen"]) + len(row["rejected"])) // 2
    count = next((k for k in range(1, len(words)) if len(" ".join(words[:k])) >= size), len(words))
    return " ".join(words[:count])


def _duplicate(rows: list[Row], rng: random.Random) -> list[tuple[str, Row]]:
    """Plants exact copies and copies with one word changed on each side in turn."""
    copies = [
        {**row, "chosen": _change_word(row["chosen"], rng), "rejected": _change_word(row["rejected"], rng)}
        if i % 2
        else dict(row)
        for i, row in enumerate(rows)
    ]
    return [("duplicate_original", row) for row in rows] + [("duplicate", copy) for copy in copies]


def _doubled_bos(row: Row, i: int, rng: random.Random) -> Row:
    column = ("prompt", "chosen", "rejected")[i % 3]
    return {column: BOS + row[column]}


def _truncated(row: Row, i: int, rng: random.Random) -> Row:
    chosen, rejected = (f"{row[side]} {_made_text(rng, MAX_LENGTH)}" for side in ("chosen", "rejected"))
    return _with_answers(row, chosen, rejected, rng)


def _same_tokens(row: Row, i: int, rng: random.Random) -> Row:
    # What differs is long too, so that the whole answers are not alike.
    shared = f"{row['chosen']} {_made_text(rng, MAX_LENGTH)} "
    ends = (_made_text(rng, MAX_LENGTH // 2) for _ in range(2))
    return _with_answers(row, *(shared + end for end in ends), rng)


def _label_noise(row: Row, i: int, rng: random.Random) -> Row:
    return {"chosen_score": row["rejected_score"], "rejected_score": row["chosen_score"]}


def _tie(row: Row, i: int, rng: random.Random) -> Row:
    return {"chosen_score": row["rejected_score"]}


def _reference_likelihood(row: Row, i: int, rng: random.Random) -> Row:
    return _with_figures(row, rng, per_character=-2.4)


_CHANGES = {
    "malformed": _malformed,
    "identical": _identical,
    "length_ratio": _length_ratio,
    "similarity": _similarity,
    "minimal_edit": _minimal_edit,
    "doubled_bos": _doubled_bos,
    "truncated": _truncated,
    "same_tokens": _same_tokens,
    "label_noise": _label_noise,
    "tie": _tie,
    "reference_likelihood": _reference_likelihood,
}
