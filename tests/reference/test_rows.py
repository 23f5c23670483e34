"""A row of a dataset becomes what TRL's collator makes of it, with keys that tell apart what scores differently."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value, concatenate_datasets
from trl.trainer.dpo_trainer import DataCollatorForPreference

from axolotl_dpo_ext.reference.rows import Answer, LogProbDefinition, Pair, answer_key, make_pair, read_pairs

PLAIN = LogProbDefinition()
LD = LogProbDefinition(ld_alpha=0.5)


def ids(*tokens: int) -> Any:
    return np.array(tokens, np.int64)


def tokens_of(generator: random.Random, most: int) -> list[int]:
    return [generator.randrange(1, 50) for _ in range(generator.randrange(most + 1))]


def both(pair: Pair) -> tuple[Answer, Answer]:
    return pair.chosen, pair.rejected


def collated(row: dict[str, list[int]], definition: LogProbDefinition) -> list[dict[str, list[int]]]:
    """What TRL makes of a row: the tokens of each answer, and those whose log-probabilities it sums."""
    # 0 pads, and is no token of these tests.
    collator = DataCollatorForPreference(0, definition.max_length, definition.truncation_mode)
    batch = collator([row])
    answers = []
    for index in range(2):
        real = batch["attention_mask"][index].bool()
        ids = batch["input_ids"][index][real].long()
        counts = batch["completion_mask"][index][real][1:].bool()
        answers.append({"ids": ids.tolist(), "counted": ids[1:][counts].tolist()})
    return answers


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_pairs_are_what_the_collator_of_trl_makes_at_every_length(mode: Any):
    generator = random.Random(0)
    seen = {"cut": 0, "nothing counts": 0, "no prompt": 0, "empty answer": 0, "prompt cut": 0}
    for _ in range(1500):
        row = {name: tokens_of(generator, 6) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        if not row["prompt_ids"] + row["chosen_ids"] or not row["prompt_ids"] + row["rejected_ids"]:
            continue  # TRL itself can't collate a sequence of no tokens beside one of some
        limit = generator.choice([None, *range(1, 14)])
        definition = LogProbDefinition(limit, mode, generator.choice([None, 0.5]))
        pair = make_pair(*(ids(*row[name]) for name in row), definition)
        theirs = collated(row, definition)
        shared = min(len(answer["counted"]) for answer in theirs)
        for answer, wanted, given in zip(both(pair), theirs, (row["chosen_ids"], row["rejected_ids"]), strict=True):
            assert answer.ids.tolist() == wanted["ids"], (row, definition)
            assert answer.completion.tolist() == wanted["counted"], (row, definition)
            assert answer.tokens == len(wanted["counted"])
            assert np.concatenate([answer.prompt, answer.completion]).tolist() == wanted["ids"]
            assert answer.shared == (answer.tokens if definition.ld_alpha is None else shared)
            cut = limit is not None and len(row["prompt_ids"] + given) > limit
            seen["cut"] += cut
            seen["nothing counts"] += cut and not answer.tokens
            seen["prompt cut"] += cut and 0 < answer.start < len(row["prompt_ids"])
            seen["no prompt"] += not row["prompt_ids"]
            seen["empty answer"] += not given
    # Otherwise the loop above has shown less than it says.
    needed = {"cut", "nothing counts", "no prompt", "empty answer"} | ({"prompt cut"} if mode == "keep_end" else set())
    assert all(seen[name] > 30 for name in needed), seen


def test_an_answer_that_truncation_cuts_off_has_no_tokens():
    pair = make_pair(ids(1, 2, 3, 4), ids(5, 6), ids(7), LogProbDefinition(4, "keep_start"))
    assert [answer.tokens for answer in both(pair)] == [0, 0]
    assert [answer.prompt.tolist() for answer in both(pair)] == [[1, 2, 3, 4]] * 2


def test_truncation_at_the_start_leaves_an_answer_without_its_first_token_nothing_predicts():
    pair = make_pair(ids(1, 2), ids(3, 4, 5), ids(6), LogProbDefinition(3, "keep_end"))
    assert pair.chosen.ids.tolist() == [3, 4, 5]
    assert (pair.chosen.start, pair.chosen.first_predicted, pair.chosen.tokens) == (0, 1, 2)
    assert pair.rejected.ids.tolist() == [1, 2, 6]


def test_no_tokens_at_all_count_as_none():
    for definition in (PLAIN, LD, LogProbDefinition(3, "keep_end")):
        pair = make_pair(ids(), ids(), ids(4), definition)
        assert [answer.tokens for answer in both(pair)] == [0, 0]
        assert len({answer_key(answer, definition.ld_alpha) for answer in both(pair)}) == 2


def key(prompt: Any, chosen: Any, rejected: Any, definition: LogProbDefinition = PLAIN) -> bytes:
    return answer_key(make_pair(prompt, chosen, rejected, definition).chosen, definition.ld_alpha)


@pytest.mark.parametrize("definition", [PLAIN, LD])
def test_a_key_changes_with_every_token_and_with_the_boundary(definition: LogProbDefinition):
    prompt, chosen, rejected = ids(1, 2, 3), ids(4, 5), ids(6, 7)
    keys = {key(prompt, chosen, rejected, definition)}
    for place in range(3):
        changed = prompt.copy()
        changed[place] += 1
        keys.add(key(changed, chosen, rejected, definition))
    for place in range(2):
        changed = chosen.copy()
        changed[place] += 1
        keys.add(key(prompt, changed, rejected, definition))
    keys.add(key(ids(1, 2), ids(3, 4, 5), rejected, definition))
    keys.add(key(ids(1, 2, 3, 4), ids(5), rejected, definition))
    keys.add(key(prompt, ids(4, 5, 6), rejected, definition))
    # Beyond what one or two bytes hold.
    keys.add(key(prompt, ids(4, 5 + 2**16), rejected, definition))
    assert len(keys) == 10


def test_the_length_of_the_other_answer_matters_to_a_key_only_with_ld_alpha_and_only_if_it_is_shorter():
    prompt, chosen = ids(1, 2), ids(3, 4, 5)
    others = [ids(*range(9, 9 + length)) for length in range(6)]
    assert len({key(prompt, chosen, other) for other in others}) == 1
    # 0, 1, 2 tokens are shared; from 3 on all of the answer's.
    assert len({key(prompt, chosen, other, LD) for other in others}) == 4
    assert key(prompt, chosen, others[3], LD) == key(prompt, chosen, others[5], LD)
    assert key(prompt, chosen, others[3], LD) != key(prompt, chosen, others[3])


def test_a_key_does_not_change_with_what_does_not_matter():
    prompt, chosen, rejected = ids(1, 2, 3), ids(4, 5), ids(6, 7, 8)
    wanted = key(prompt, chosen, rejected)
    for dtype in (np.int32, np.uint16, ">i8"):
        assert key(prompt.astype(dtype), chosen.astype(dtype), rejected.astype(dtype)) == wanted
    assert key(np.repeat(prompt, 2)[::2], chosen, rejected) == wanted  # not contiguous in memory
    assert key(prompt, chosen, ids(9)) == wanted
    # The answer is better in one row and worse in another.
    assert answer_key(make_pair(prompt, rejected, chosen, PLAIN).rejected, None) == wanted
    # A limit that does not cut; and one that cuts both to the same tokens.
    assert key(prompt, chosen, rejected, LogProbDefinition(6, "keep_end")) == wanted
    assert key(prompt, ids(4, 5, 9), rejected, LogProbDefinition(5, "keep_start")) == wanted
    # Nothing predicts the first token of a sequence, whether it is the prompt's or the answer's.
    assert key(ids(), ids(1, 2, 3), rejected) == key(ids(1), ids(2, 3), rejected)


def test_a_key_is_the_same_in_every_process_and_version():
    # A changed digest would make every store that exists useless, without a word.
    assert key(ids(1, 2, 3), ids(4, 5), ids(6)).hex() == "bf07e30ed1c3195c974839283ec80d03"
    assert key(ids(1, 2, 3), ids(4, 5), ids(6), LD).hex() == "9c5a4921a56370aeeb24ed658e5ccb3c"


ROWS = [
    {
        "prompt_ids": tokens_of(generator, 5),
        "chosen_ids": tokens_of(generator, 4),
        "rejected_ids": tokens_of(generator, 4),
        "other": "text",
    }
    for generator in [random.Random(1)]
    for _ in range(60)
]  # fmt: skip
DATASET = Dataset.from_list(ROWS)


def read(dataset: Dataset, start: int = 0, stop: int | None = None) -> list[tuple[list[int], list[int], list[int]]]:
    stop = len(dataset) if stop is None else stop
    pairs = read_pairs(dataset, PLAIN, start, stop)
    return [(pair.chosen.start, pair.chosen.ids.tolist(), pair.rejected.ids.tolist()) for pair in pairs]


def wanted(rows: Any) -> list[tuple[list[int], list[int], list[int]]]:
    return [
        (len(row["prompt_ids"]), row["prompt_ids"] + row["chosen_ids"], row["prompt_ids"] + row["rejected_ids"])
        for row in rows
    ]


def in_chunks() -> Dataset:
    joined = concatenate_datasets([Dataset.from_list(ROWS[start : start + 7]) for start in range(0, 60, 7)])
    assert joined.data.column("prompt_ids").num_chunks == 9
    return joined


VARIANTS = {
    "as it is": lambda: DATASET,
    "several chunks": in_chunks,
    "selected": lambda: DATASET.select([5, 3, 3, 59, 0, 17]),
    "a range selected": lambda: DATASET.select(range(10, 30)),
    "shuffled": lambda: DATASET.shuffle(seed=3),
    "filtered": lambda: DATASET.filter(lambda row: len(row["chosen_ids"]) > 1),
    "sorted": lambda: DATASET.map(lambda row: {"length": len(row["chosen_ids"])}).sort("length"),
    "chunks shuffled": lambda: in_chunks().shuffle(seed=4),
    "shuffled chunks": lambda: concatenate_datasets([DATASET.shuffle(seed=seed) for seed in (1, 2)]),
    "torch format": lambda: DATASET.select(range(9, 0, -1)).with_format("torch"),
    "32 bits": lambda: DATASET.remove_columns("other").cast(
        Features({name: List(Value("int32")) for name in ("prompt_ids", "chosen_ids", "rejected_ids")})
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_read_are_the_rows_of_the_dataset(name: str):
    dataset = VARIANTS[name]()
    rows = dataset.with_format(None).to_list()
    assert len(rows) > 5
    assert read(dataset) == wanted(rows)
    for start, stop in ((0, 1), (2, 5), (len(rows) - 1, len(rows)), (3, 3)):
        assert read(dataset, start, stop) == wanted(rows[start:stop])


def test_parts_that_cross_arrow_chunks_are_read_whole():
    dataset = in_chunks()
    assert [pair for start in range(0, 60, 11) for pair in read(dataset, start, min(start + 11, 60))] == wanted(ROWS)


def test_a_column_of_empty_lists_is_read():
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [], "rejected_ids": [3 + row]} for row in range(3)]
    assert read(Dataset.from_list(rows)) == wanted(rows)


def test_rows_read_are_truncated_as_defined():
    for mode in ("keep_start", "keep_end"):
        definition = LogProbDefinition(4, mode, 0.5)
        rows = [row for row in ROWS if row["prompt_ids"]]
        for pair, row in zip(read_pairs(Dataset.from_list(rows), definition, 0, len(rows)), rows, strict=True):
            theirs = collated(row, definition)
            assert [answer.completion.tolist() for answer in both(pair)] == [each["counted"] for each in theirs]
