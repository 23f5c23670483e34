from __future__ import annotations

import pytest

from axolotl_dpo_ext.hardware import HardwarePreset, expand_preset
from axolotl_dpo_ext.vocabulary import ConfigurationError

PRESETS = {"cpu": HardwarePreset("cpu", "no accelerator", {"bf16": False, "attn_implementation": "sdpa"})}


def test_fills_in_what_the_user_does_not_set():
    keys, decision = expand_preset("cpu", {"rl": "dpo"}, PRESETS)
    assert keys == {"bf16": False, "attn_implementation": "sdpa"}
    assert "bf16: false" in decision.reason


@pytest.mark.parametrize(
    ("own", "left"),
    [
        ({"bf16": True}, {"attn_implementation": "sdpa"}),
        ({"bf16": False}, {"attn_implementation": "sdpa"}),
        ({"bf16": None}, {"bf16": False, "attn_implementation": "sdpa"}),
        # Axolotl refuses the old flag beside the new key, so the old flag counts as the user's own choice.
        ({"flash_attention": True}, {"bf16": False}),
        ({"bfloat16": True}, {"attn_implementation": "sdpa"}),
    ],
)
def test_the_users_own_keys_win_with_a_note(own: dict[str, object], left: dict[str, object]):
    keys, decision = expand_preset("cpu", own, PRESETS)
    assert keys == left
    assert ("your own" in decision.reason) == (len(left) < 2)


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(ConfigurationError, match="did you mean 'cpu'"):
        expand_preset("cpux", {}, PRESETS)
