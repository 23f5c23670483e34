"""How a run is spread over its processes, from its keys."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from axolotl_dpo_ext.reference.situation import Situation

pytestmark = pytest.mark.usefixtures("store", "undistributed")

ZERO3 = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {"stage": 0, "devices": 8, "whole_at_start": True}),
        ({"deepspeed": "deepspeed_configs/zero2.json"}, {"stage": 2, "devices": 8, "whole_at_start": True}),
        ({"deepspeed": "absent/zero3_bf16.json"}, {"stage": 3, "whole_at_start": False, "optimizer_on_host": False}),
        ({"deepspeed": ZERO3}, {"stage": 3, "whole_at_start": False, "optimizer_on_host": True}),
        ({"fsdp_config": {"reshard_after_forward": True}}, {"stage": 3, "devices": 8, "whole_at_start": True}),
        ({"fsdp_config": {"cpu_ram_efficient_loading": True}, "dp_shard_size": 4}, {"devices": 4, "whole_at_start": False}),
    ],
)  # fmt: skip
def test_how_processes_share_the_memory(
    keys: dict[str, Any], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "8")
    found = dataclasses.asdict(Situation.of(keys).sharding)
    assert {key: found[key] for key in expected} == expected


def test_a_deepspeed_file_is_read(tmp_path: Path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(ZERO3), encoding="utf-8")
    assert Situation.of({"deepspeed": str(file)}).sharding == Situation.of({"deepspeed": ZERO3}).sharding
