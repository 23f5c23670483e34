from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from axolotl_dpo_ext.settings import DPOExtSettings, json_schema, parse_settings, read_settings
from axolotl_dpo_ext.vocabulary import ConfigurationError


def problems_of(value: object) -> dict[str, str]:
    with pytest.raises(ConfigurationError) as caught:
        parse_settings(value)
    return {problem.setting: f"{problem.found} | {problem.reason} | {problem.fix}" for problem in caught.value.problems}


def test_scalars_stand_for_the_common_case():
    short = parse_settings({"reference": "gpu", "quality": True, "report": False})
    long = parse_settings({"reference": {"strategy": "gpu"}, "quality": {}, "report": {"enabled": False}})
    assert short == long
    assert short.quality is not None
    assert short.quality.max_length_ratio == 2.0


def test_parts_that_are_not_asked_for_are_off():
    settings = parse_settings({})
    assert (settings.hardware, settings.reference, settings.quality) == (None, None, None)
    assert settings.report.enabled
    assert parse_settings({"quality": False}).quality is None
    assert parse_settings({"reference": False}) == parse_settings({"reference": None}) == settings
    assert parse_settings(True) == settings


def test_every_problem_is_told_at_once_and_by_name():
    found = problems_of(
        {
            "qualty": True,
            "hardware": 8,
            "reference": ["auto"],
            "quality": {
                "max_lenght_ratio": 3,
                "max_similarity": "high",
                "holdout": 1.5,
                "max_drop_fraction": True,
            },
            "report": {"baseline": "no"},
        }
    )
    assert set(found) == {
        "dpo_ext.qualty",
        "dpo_ext.hardware",
        "dpo_ext.reference.strategy",
        "dpo_ext.quality.max_lenght_ratio",
        "dpo_ext.quality.max_similarity",
        "dpo_ext.quality.holdout",
        "dpo_ext.quality.max_drop_fraction",
        "dpo_ext.report.baseline",
    }
    assert "did you mean 'quality'?" in found["dpo_ext.qualty"]
    assert "did you mean 'max_length_ratio'?" in found["dpo_ext.quality.max_lenght_ratio"]
    assert "'high'" in found["dpo_ext.quality.max_similarity"]


@pytest.mark.parametrize(
    ("quality", "setting"),
    [
        ({"holdout": 1.5}, "dpo_ext.quality.holdout"),
        ({"holdout": -1}, "dpo_ext.quality.holdout"),
        ({"max_length_ratio": 0.5}, "dpo_ext.quality.max_length_ratio"),
        ({"max_similarity": 1.01}, "dpo_ext.quality.max_similarity"),
        ({"max_drop_fraction": float("nan")}, "dpo_ext.quality.max_drop_fraction"),
        ({"policy": {"identical": "dropp"}}, "dpo_ext.quality.policy.identical"),
        ({"embedder": 3}, "dpo_ext.quality.embedder"),
        ("yes", "dpo_ext.quality"),
    ],
)
def test_values_out_of_range_are_refused(quality: object, setting: str):
    assert set(problems_of({"quality": quality})) == {setting}


@pytest.mark.parametrize("strategy", ["gpu", "adapter", "cpu_offload"])
def test_a_store_is_refused_where_nothing_would_read_it(strategy: str):
    (told,) = problems_of({"reference": {"strategy": strategy, "store": "x"}}).items()
    assert told[0] == "dpo_ext.reference.store"
    assert f"`{strategy}` stores nothing" in told[1]
    for other in ("precomputed", "auto", "lab_strategy"):
        parse_settings({"reference": {"strategy": other, "store": "x"}})


def test_a_store_is_a_folders_name_or_a_path():
    assert parse_settings({"reference": {"store": Path("a") / "b"}}) == parse_settings({"reference": {"store": "a/b"}})
    assert "empty name" in problems_of({"reference": {"store": ""}})["dpo_ext.reference.store"]
    assert set(problems_of({"reference": {"store": 3}})) == {"dpo_ext.reference.store"}


@pytest.mark.parametrize("holdout", [0, 0.0, 0.1, 1, 20, 20.0])
def test_holdout_is_a_share_or_a_count(holdout: float):
    quality = parse_settings({"quality": {"holdout": holdout}}).quality
    assert quality is not None
    assert quality.holdout == holdout


@pytest.mark.parametrize("key", [None, 0.5, float("nan"), 10**26, ("a", "b")])
def test_keys_that_are_no_text_are_unknown_keys(key: object):
    assert list(problems_of({key: 1, "quality": True})) == [f"dpo_ext.{key}"]


def test_huge_numbers_are_out_of_range():
    assert set(problems_of({"quality": {"holdout": 10**400, "max_length_ratio": 10**400}})) == {
        "dpo_ext.quality.holdout",
        "dpo_ext.quality.max_length_ratio",
    }


def test_a_value_that_is_no_mapping_says_what_to_write():
    assert "dpo_ext: {quality: true" in problems_of("auto")["dpo_ext"]


def test_sound_parts_survive_beside_wrong_ones():
    settings, problems = read_settings({"reference": "gpu", "quality": {"max_similarity": 2}})
    assert settings.reference is not None
    assert settings.quality is None
    assert len(problems) == 1


def test_the_schema_accepts_what_the_settings_accept():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for good in (
        {"reference": "auto", "quality": True},
        {"reference": False},
        {"quality": {"holdout": 0.1}, "report": False},
        {},
        True,
    ):
        jsonschema.validate({"dpo_ext": good}, schema)
        parse_settings(good)
    for bad in (
        "auto",
        {"reference": True},
        {"qualty": True},
        {"quality": {"max_similarity": "high"}},
        {"hardware": 3},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"dpo_ext": bad}, schema)
    assert json.dumps(schema)


def test_every_setting_is_described():
    for model in (DPOExtSettings, *_parts()):
        for name, info in model.model_fields.items():
            assert info.description, f"{model.__name__}.{name}"


def _parts() -> list[type]:
    from axolotl_dpo_ext.settings import QualitySettings, ReferenceSettings, ReportSettings

    return [QualitySettings, ReferenceSettings, ReportSettings]
