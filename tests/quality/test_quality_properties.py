"""What holds of every audit: neither order, batches nor processes matter, and what is kept passes another audit."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from axolotl_dpo_ext.quality import AuditResult, audit
from axolotl_dpo_ext.quality.builtins import pair_checks
from axolotl_dpo_ext.quality.text import prompt_key
from axolotl_dpo_ext.settings import Policy, QualitySettings

from .planted_faults import MAX_LENGTH, Row, clean_pairs, plant, to_conversations

ROOT = Path(__file__).parents[2]
TEXTS = ("prompt", "chosen", "rejected")
LOOSE = {"max_drop_fraction": 1.0}
# A deviation from the median of what is there: dropping the outliers moves it, so more can then be outliers.
RELATIVE = "reference_likelihood"


def near_duplicates(row: Row, rng: random.Random) -> list[Row]:
    """Returns a chain of four variations, each nearer to the last than to the first, and one in capitals."""
    chain = [row]
    for _ in range(3):
        words = chain[-1]["chosen"].split(" ")
        words[rng.randrange(len(words))] = f"new{rng.randrange(10**6)}"
        chain.append({**row, "chosen": " ".join(words)})
    return [*chain, {side: text.upper() if side in TEXTS else text for side, text in row.items()}]


def mixed(seed: int) -> list[Row]:
    """Returns rows with every fault, chains of near-duplicates, cycles within cycles, and prompts with many rows."""
    rng = random.Random(seed)
    clean = clean_pairs(90, seed)
    rows, _ = plant(clean[:60], each=2, seed=seed)
    rows += [copy for row in clean[60:70] for copy in near_duplicates(row, rng)]
    for row, other in zip(clean[70:80], clean[80:], strict=True):
        a, b, c, d = row["chosen"], row["rejected"], other["chosen"], other["rejected"]
        for better, worse in ((a, b), (b, c), (c, d), (c, a), (b, d), (d, a))[: rng.randint(2, 6)]:
            prompt = rng.choice([row["prompt"], f" {row['prompt'].upper()}\n"])
            rows.append({**row, "prompt": prompt, "chosen": better, "rejected": worse})
    rng.shuffle(rows)
    return [{**row, "source": rng.choice("abc")} for row in rows]


@pytest.fixture(scope="module", params=["text", "conversations"])
def data(request: pytest.FixtureRequest) -> Dataset:
    rows = mixed(0)
    unfit = {row for row, values in enumerate(rows) if not values["chosen"] or not values["rejected"]}
    return Dataset.from_list(rows if request.param == "text" else to_conversations(rows, {"malformed": unfit}))


@pytest.fixture(scope="module")
def audited(data: Dataset, chat_tokenizer: Any) -> AuditResult:
    return audit(data, chat_tokenizer, QualitySettings(**LOOSE), holdout=0.1, **given(data))


def given(data: Dataset) -> dict[str, Any]:
    """Returns what the audits of one dataset have in common."""
    return {"max_length": MAX_LENGTH, "sources": "source", "test": data.select(range(30))}


def key(row: dict[str, Any]) -> str:
    return json.dumps([row[side] for side in TEXTS])


def decisions(result: AuditResult) -> dict[str, Counter[str]]:
    """Returns the texts in each part of the data."""
    parts = {"train": result.train, "heldout": result.heldout, "dropped": result.dropped}
    return {name: Counter(map(key, part or [])) for name, part in parts.items()}


def findings(result: AuditResult) -> Counter[str]:
    """Returns the records, with texts in place of row numbers."""
    texts = dict(enumerate(map(key, result.scored.dataset)))
    return Counter(
        json.dumps({**r, "row": texts[r["row"]], "matched_row": texts.get(r["matched_row"])}) for r in result.records
    )


def everything(result: AuditResult) -> tuple[Any, ...]:
    """Returns what users see of a result, as values that can be compared."""
    rows = [result.dropped_rows.tolist(), result.heldout_rows.tolist(), result.train.to_list()]
    return json.dumps([rows, result.records]), result.summary_table(), json.dumps(result.section().data)


@pytest.mark.parametrize("seed", [1, 2])
def test_row_order_changes_nothing_but_row_numbers(data: Dataset, chat_tokenizer: Any, seed: int):
    settings = QualitySettings(holdout=0.2, group_similar_prompts=True, **LOOSE)
    order = random.Random(seed).sample(range(len(data)), len(data))
    here = audit(data, chat_tokenizer, settings, max_length=MAX_LENGTH)
    there = audit(data.select(order), chat_tokenizer, settings, max_length=MAX_LENGTH, batch_size=11 * seed)
    assert {name for name, flagged in here.counts.items() if flagged} >= {"duplicate", "contradiction", "truncated"}
    assert decisions(here) == decisions(there)
    assert findings(here) == findings(there)


def test_batch_size_changes_nothing_at_all(data: Dataset, chat_tokenizer: Any):
    settings = QualitySettings(holdout=0.2, group_similar_prompts=True, **LOOSE)
    one, *others = (
        everything(audit(data, chat_tokenizer, settings, max_length=MAX_LENGTH, sources="source", batch_size=size))
        for size in (1000, 1, 37)
    )
    assert others == [one, one]


@pytest.mark.parametrize(
    "policy",
    [{}, *({c.name: "drop"} for c in pair_checks() if c.default_policy != "drop" and c.name != RELATIVE)],
    ids=lambda policy: next(iter(policy), "defaults"),
)
def test_auditing_what_was_kept_drops_nothing_more(
    audited: AuditResult, data: Dataset, chat_tokenizer: Any, policy: dict[str, Policy]
):
    first = audited.rethreshold(QualitySettings(policy=policy, **LOOSE), holdout=0)
    again = audit(first.train, chat_tokenizer, first.settings, **given(data))
    assert 0 < len(first.dropped) < len(data)
    assert len(again.dropped) == 0
    assert {reason.check for reason in again.reasons if reason.flagged}.isdisjoint(policy)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sources", [None, "source"])
def test_no_prompt_is_on_both_sides(seed: int, sources: str | None):
    rows = mixed(seed)
    holdout = (0.05, 0.3, 40)[seed]
    result = audit(Dataset.from_list(rows), None, QualitySettings(**LOOSE), holdout=holdout, sources=sources)
    assert result.heldout is not None
    train, heldout = ({prompt_key(prompt) for prompt in part["prompt"]} for part in (result.train, result.heldout))
    assert train
    assert heldout
    assert not train & heldout


@pytest.mark.parametrize("sources", [None, "source"])
def test_near_duplicate_prompts_are_on_one_side_if_that_is_asked_for(sources: str | None):
    clean, rng = clean_pairs(400), random.Random(3)
    variations = [" please", "?", " now", " today"]
    rows = [
        {**row, "prompt": clean[i // 4]["chosen"] + variations[i % 4], "source": rng.choice("abc")}
        for i, row in enumerate(clean)
    ]
    of_prompt = {row["prompt"]: i // 4 for i, row in enumerate(rows)}
    shared = {}
    for together in (False, True):
        settings = QualitySettings(group_similar_prompts=together, **LOOSE)
        result = audit(Dataset.from_list(rows), None, settings, holdout=0.3, sources=sources)
        assert result.heldout is not None
        shared[together] = {of_prompt[p] for p in result.train["prompt"]} & {
            of_prompt[p] for p in result.heldout["prompt"]
        }
    assert shared[False]
    assert not shared[True]


def test_scores_do_not_depend_on_which_answer_is_the_chosen_one(data: Dataset, chat_tokenizer: Any):
    names = {"chosen": "rejected", "chosen_score": "rejected_score", "ref_chosen_logps": "ref_rejected_logps"}
    there_and_back = {**names, **{new: old for old, new in names.items()}}
    swapped = data.rename_columns({old: f"{new}!" for old, new in there_and_back.items()})
    swapped = swapped.rename_columns({f"{new}!": new for new in there_and_back})
    here, there = (audit(d, chat_tokenizer, QualitySettings(**LOOSE), max_length=MAX_LENGTH) for d in (data, swapped))
    one_sided = {"label_noise", "duplicate", "leakage"}
    for name in here.scores.keys() - one_sided:
        assert np.array_equal(here.scores[name], there.scores[name], equal_nan=True), name
        assert len(np.unique(here.scores[name])) > 1, name
    assert np.array_equal(here.scores["label_noise"], -there.scores["label_noise"], equal_nan=True)
    assert here.scored.log_ratio == pytest.approx(-there.scored.log_ratio, nan_ok=True)


def random_settings(rng: random.Random) -> QualitySettings:
    """Returns other values for everything that is decided after scoring."""
    policies: tuple[Policy, ...] = ("drop", "flag", "keep")
    return QualitySettings(
        max_length_ratio=rng.uniform(1.05, 5),
        max_similarity=rng.uniform(0.2, 1),
        min_edit_distance=rng.uniform(0, 0.5),
        max_duplicate_similarity=rng.uniform(0.8, 0.99),
        max_likelihood_deviation=rng.uniform(0.5, 10),
        holdout=rng.choice([None, 0, 0.2, 30]),
        policy={check.name: rng.choice(policies) for check in pair_checks() if rng.random() < 0.5},
        **LOOSE,
    )


@pytest.mark.parametrize("seed", range(3))
def test_rethreshold_equals_a_new_audit(audited: AuditResult, data: Dataset, chat_tokenizer: Any, seed: int):
    settings = random_settings(random.Random(seed))
    holdout = 0.1 if settings.holdout is None else settings.holdout
    again = audited.rethreshold(settings, holdout=holdout)
    new = audit(data, chat_tokenizer, settings, holdout=holdout, **given(data))
    assert everything(again) == everything(new)
    assert everything(again) != everything(audited)


AUDIT = """
import json, sys
from datasets import Dataset
from axolotl_dpo_ext.quality import audit
from axolotl_dpo_ext.settings import QualitySettings
settings = QualitySettings(max_drop_fraction=1.0, holdout=0.2, group_similar_prompts=True)
result = audit(Dataset.from_parquet(sys.argv[1], cache_dir=sys.argv[2]), None, settings, sources="source")
rows = [result.dropped_rows.tolist(), result.heldout_rows.tolist()]
sys.stdout.write(json.dumps([rows, result.records, result.section().data]) + result.summary_table())
"""


def test_every_process_finds_the_same(tmp_path: Path):
    path = tmp_path / "pairs.parquet"
    Dataset.from_list(mixed(0)).to_parquet(path)
    shown = []
    for seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", AUDIT, str(path), str(tmp_path / seed)]
        shown.append(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    assert shown[0] == shown[1]
    assert b'"check": "duplicate"' in shown[0]
