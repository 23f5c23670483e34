"""What Axolotl makes of every kind of preference rows: the checks see the token ids that the trainer trains on."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration import runs
from tests.integration.quality_runs import FLAG_ALL, PLUGIN, keys, lines_of, load

KIND_ROWS = 12


def text_of(message: dict[str, str]) -> str:
    return message["content"]


# What datasets hold: prompt, chosen and rejected as messages, and whether the single answer is a good one.
ROWS_OF: dict[str, Callable[..., dict[str, Any]]] = {
    "messages": lambda m, c, r, _: {"turns": m, "good": c, "bad": r},
    "whole": lambda m, c, r, _: {"chosen": [*m, c], "rejected": [*m, r]},
    "plain": lambda m, c, r, _: {"prompt": text_of(m[0]), "chosen": text_of(c), "rejected": text_of(r)},
    "intel": lambda m, c, r, _: {
        "system": "Be kind.",
        "question": text_of(m[0]),
        "chosen": text_of(c),
        "rejected": text_of(r),
    },
    "ranked": lambda m, c, r, _: {
        "prompt": text_of(m[0]),
        "answers": [{"rank": 1, "answer": text_of(c)}, {"rank": 2, "answer": text_of(r)}],
    },
    "single": lambda m, c, r, good: {"prompt": text_of(m[0]), "completion": text_of(c if good else r), "label": good},
    "single-chat": lambda m, c, r, good: {"completion": [*m, c if good else r], "label": good},
}
RENAMED = {"field_messages": "turns", "field_chosen": "good", "field_rejected": "bad"}
OWN_PAIRS = {
    "field_prompt": "question",
    "prompt_format": "[INST] {system} {prompt} [/INST]",
    "chosen_format": "{chosen} ",
}
OWN_SINGLES = {"prompt_format": "<|system|>[INST] {prompt} [/INST]", "completion_format": "{completion} "}
KINDS: list[tuple[str, Any, str, dict[str, Any]]] = [
    ("dpo", "chat_template.default", "messages", {"source": RENAMED}),
    ("dpo", "chat_template.default", "messages", {"source": RENAMED, "name": "chat_template.default with BOS"}),
    ("simpo", "chat_template.default", "messages", {"source": RENAMED, "name": "chat_template.default with BOS"}),
    ("orpo", "chat_template.argilla", "whole", {"name": "chat_template.argilla with BOS"}),
    ("orpo", None, "plain", {"name": "none with unwritten BOS"}),
    ("simpo", "passthrough", "plain", {"name": "passthrough with BOS"}),
    ("dpo", None, "plain", {"name": "none with unwritten BOS"}),
    ("dpo", "chat_template.argilla_chat", "whole", {}),
    ("ipo", "chatml.intel", "intel", {}),
    ("dpo", "llama3.argilla_chat", "whole", {}),
    ("dpo", "zephyr.nectar", "ranked", {}),
    ("dpo", OWN_PAIRS, "intel", {"name": "user_defined"}),
    ("kto", "chatml.argilla_chat", "single-chat", {}),
    ("kto", OWN_SINGLES, "single", {"name": "user_defined with BOS"}),
    ("kto", None, "single", {}),
]


def test_every_kind_of_run_and_of_rows_is_audited_as_it_is_trained(inputs: Path, tmp_path: Path):
    """The token ids that the checks see are the trainer's own, for each of Axolotl's ways to make rows."""
    jobs = every_kind(inputs, tmp_path)
    found = load([{"keys": made, "trainer": True} for made in jobs.values()], tmp_path)
    doubled = set()
    for name, seen in zip(jobs, found, strict=True):
        assert seen["faults"] == [], name
        assert len(seen["train"]) == KIND_ROWS, name
        for side, ids in seen["trainer"].items():
            assert seen["audit"][side] == ids, (name, side)
        records = lines_of(tmp_path / name / "dpo_quality_records.jsonl")
        flagged = {record["row"] for record in records if record["check"] == "doubled_bos"}
        assert len(flagged) in (0, KIND_ROWS), name
        doubled |= {name} if flagged else set()
    # Axolotl renders BOS as text and TRL's tokenizer adds one; the trainers for ORPO and SimPO look first.
    assert doubled == {"dpo chat_template.default with BOS", "kto user_defined with BOS"}


def every_kind(inputs: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Returns a configuration for each kind of run and way to make rows, by name."""
    models = {
        "with BOS": save_model_with_bos(inputs / "model", folder / "with-bos", written=True),
        "with unwritten BOS": save_model_with_bos(inputs / "model", folder / "with-unwritten-bos", written=False),
    }
    sound = [row for number, row in enumerate(runs.made_pairs()) if number % 20 not in (7, 14)][:KIND_ROWS]
    files = {}
    for name, row in ROWS_OF.items():
        rows = [row(pair["messages"], pair["chosen"], pair["rejected"], bool(n % 2)) for n, pair in enumerate(sound)]
        files[name] = runs.write_rows(folder / f"{name}.jsonl", rows)
    made = {}
    for rl, transform, rows, more in KINDS:
        name = f"{rl} {more.get('name', transform or 'none')}"
        source = {"path": str(files[rows]), "split": "train", "type": transform, **more.get("source", {})}
        quality = {"policy": {"duplicate": "flag"}} if rl == "kto" else FLAG_ALL
        made[name] = keys(inputs, {"holdout": 0, **quality}, plugins=[PLUGIN], datasets=[source], rl=rl)
        made[name] |= {
            "output_dir": name,
            "dataset_prepared_path": f"prepared/{name}",
            "shuffle_merged_datasets": False,
        }
        model = next((path for ending, path in models.items() if name.endswith(ending)), inputs / "model")
        made[name] |= {"base_model": str(model)}
        made[name] |= {"simpo": {"simpo_gamma": 0.5}, "kto": {"remove_unused_columns": False}}.get(rl, {})
    return made


def save_model_with_bos(model: Path, folder: Path, written: bool) -> Path:
    """Saves the model with a tokenizer that has a BOS token; ``written`` by it and by the template, or by neither."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.bos_token = "<|system|>"
    if written:
        bos = ("<|system|>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|system|> $A", special_tokens=[bos])
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM.from_pretrained(model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("strategy", ["drop", "truncate"])
def test_empty_and_missing_answers_are_dropped_by_the_audit_and_end_no_run(inputs: Path, tmp_path: Path, strategy: str):
    texts = [
        {
            "prompt": pair["messages"][0]["content"],
            "chosen": pair["chosen"]["content"],
            "rejected": pair["rejected"]["content"],
        }
        for number, pair in enumerate(runs.made_pairs()[:80])
        if number % 20 not in (7, 14)
    ]
    texts[3]["chosen"], texts[5]["rejected"] = "", None
    data = runs.write_rows(tmp_path / "texts.jsonl", texts)
    made = keys(inputs, {"holdout": 0}, excess_length_strategy=strategy, plugins=[PLUGIN])
    made["datasets"] = [{"path": str(data), "ds_type": "json", "split": "train"}]
    (loaded,) = load([{"keys": made}], tmp_path)
    assert len(loaded["train"]) == len(texts) - 2
    assert any(re.search(r"malformed +drop +> 0.5 +2 ", line) for line in loaded["log"])
