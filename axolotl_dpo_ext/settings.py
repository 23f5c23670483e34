"""Typed settings behind the YAML key ``dpo_ext:``, also usable from Python.

Each part takes a scalar for the common case (``reference: auto``, ``quality: true``) or a mapping. The
description of every field below is its documentation: the JSON schema for editors, the table in the docs
and ``dpo-doctor`` all read it from here.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from axolotl_dpo_ext.vocabulary import ConfigurationError, Problem

Policy = Literal["drop", "flag", "keep"]

# The pack's strategies that never read a store; `auto` may choose one that does, and a third party's may be one.
STORELESS = ("gpu", "adapter", "cpu_offload")


class _Part(BaseModel):
    """A part of the settings: unknown keys are errors, nothing is coerced from another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _number(value: Any) -> Any:
    """Lets ``1`` stand for ``1.0``, but not ``true`` for either: in YAML those are different wishes."""
    if isinstance(value, bool):
        raise ValueError("expected a number, not true/false")
    if isinstance(value, int) and abs(value) > 2**53:
        raise ValueError("the number is too large")
    return float(value) if isinstance(value, int) else value


def holdout_fault(size: float) -> str:
    """Returns why a number cannot be the size of a held-out split, ``""`` if it can."""
    if size >= 0 and (size < 1 or size.is_integer()):
        return ""
    return "it is neither a fraction from 0 up to, not including, 1 nor a whole number of pairs"


def _size(value: float) -> float:
    if fault := holdout_fault(value):
        raise ValueError(fault)
    return value


def _folder(value: Any, info: ValidationInfo) -> Any:
    value = os.fspath(value) if isinstance(value, PurePath) else value
    if value == "":
        raise ValueError("an empty name is no folder")
    strategy = info.data.get("strategy")
    if value is not None and strategy in STORELESS:
        raise ValueError(f"`{strategy}` stores nothing, so it would be without effect; remove it, or use `precomputed`")
    return value


Number = Annotated[float, BeforeValidator(_number)]
Size = Annotated[Number, AfterValidator(_size)]


class ReferenceSettings(_Part):
    """``reference:``, how the frozen reference model's log-probabilities are obtained."""

    strategy: str = Field(
        default="auto",
        description="`auto`, or the name of a strategy: `gpu` (a frozen second copy), `adapter` (the policy with its "
        "LoRA adapter disabled), `cpu_offload` (a copy in host memory, streamed), `precomputed` (computed once and "
        "stored), or a third party's.",
    )
    store: Annotated[str | None, BeforeValidator(_folder)] = Field(
        default=None,
        description="Folder of the stored log-probabilities of `precomputed` (or `auto`). Default: the environment "
        "variable `AXOLOTL_DPO_EXT_REFERENCE_STORE`, else `dpo_reference` in the Hugging Face cache folder "
        "(`HF_HOME`).",
    )
    model: Literal["initial", "base"] = Field(
        default="initial",
        description="Which model the reference is: `initial`, the policy before its first step, with a continued "
        "adapter if there is one; or `base`, the base model without any adapter.",
    )


class QualitySettings(_Part):
    """``quality:``, checks of every preference pair before training, and the held-out split."""

    max_length_ratio: Annotated[Number, Field(ge=1.0)] = Field(
        default=2.0,
        description="Largest allowed ratio longer : shorter of the two answers, in tokens of the run's "
        "tokenizer. Pairs above it are handled by the policy of `length_ratio`.",
    )
    max_similarity: Annotated[Number, Field(gt=0.0, le=1.0)] = Field(
        default=0.95,
        description="Largest allowed cosine similarity between chosen and rejected. Pairs above it are "
        "handled by the policy of `similarity`.",
    )
    min_edit_distance: Annotated[Number, Field(ge=0.0, le=0.5)] = Field(
        default=0.05,
        description="Smallest allowed edit distance between chosen and rejected, as a share of the longer one's "
        "tokens. Pairs below it are handled by the policy of `minimal_edit`.",
    )
    max_duplicate_similarity: Annotated[Number, Field(ge=0.8, lt=1.0)] = Field(
        default=0.9,
        description="Largest allowed similarity between two pairs: of prompt, chosen and rejected, the least similar "
        "one's share of common 8-byte sequences (Jaccard). Pairs above it are handled by the policy of `duplicate`.",
    )
    max_likelihood_deviation: Annotated[Number, Field(gt=0.0)] = Field(
        default=5.0,
        description="How many (robust) standard deviations an answer's log-likelihood per token under the reference "
        "may lie below the median. Pairs beyond it are handled by the policy of `reference_likelihood`.",
    )
    embedder: str = Field(
        default="lexical",
        description="Text encoder behind `similarity`: `lexical` (character n-grams, no download), "
        "`model2vec:NAME_OR_PATH`, `sentence-transformers:NAME_OR_PATH`, the path of such a model, or a third party's.",
    )
    holdout: Size | None = Field(
        default=None,
        description="Size of the held-out split: a fraction below 1, or a number of pairs. Prompts never "
        "appear on both sides. Default in an Axolotl run: `val_set_size` if set, none if `test_datasets` is set, else "
        "0.1; in Python: none. `0` turns it off.",
    )
    group_similar_prompts: bool = Field(
        default=False,
        description="Keep prompts that are nearly the same (four fifths of their 8-byte sequences in common) on one "
        "side of the held-out split, not only those that are the same.",
    )
    policy: dict[str, Policy] = Field(
        default_factory=dict,
        description="What happens to a pair that a check flags, by check: `drop`, `flag` (keep and record) or "
        "`keep` (do not run the check).",
    )
    max_drop_fraction: Annotated[Number, Field(ge=0.0, le=1.0)] = Field(
        default=0.5,
        description="The run stops when a larger share of the pairs than this would be dropped.",
    )


class ReportSettings(_Part):
    """``report:``, the run report in ``output_dir``."""

    enabled: bool = Field(default=True, description="Write `dpo_report.html` and `dpo_report.json`.")
    baseline: bool = Field(
        default=True,
        description="Evaluate once before the first step, so that the report can show before → after.",
    )


class DPOExtSettings(_Part):
    """Everything under the YAML key ``dpo_ext:``."""

    hardware: str | None = Field(
        default=None,
        description="Name of a hardware preset; fills in Axolotl keys that the YAML does not set itself.",
    )
    reference: ReferenceSettings | None = Field(
        default=None,
        description="How the reference log-probabilities are obtained. Scalar: the strategy's name; `false` is off.",
    )
    quality: QualitySettings | None = Field(
        default=None,
        description="Checks of the preference pairs and the held-out split. Scalar: `true` for the defaults; `false` "
        "is off.",
    )
    report: ReportSettings = Field(
        default_factory=ReportSettings,
        description="The run report. Scalar: `false` turns it off.",
    )

    @model_validator(mode="before")
    @classmethod
    def _expand_scalars(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        expanded = dict(value)
        for part, expand in _SCALARS.items():
            if part in expanded and not isinstance(expanded[part], Mapping):
                expanded[part] = expand(expanded[part])
        return expanded


def _reference_scalar(value: Any) -> Any:
    return None if value is None or value is False else {"strategy": value}


def _quality_scalar(value: Any) -> Any:
    return {True: {}, False: None}.get(value, value) if isinstance(value, bool) else value


def _report_scalar(value: Any) -> Any:
    return {"enabled": value} if isinstance(value, bool) else value


_SCALARS = {"reference": _reference_scalar, "quality": _quality_scalar, "report": _report_scalar}


def read_settings(value: Any) -> tuple[DPOExtSettings, list[Problem]]:
    """Reads what stands under ``dpo_ext:`` in a YAML file, as far as it can be read.

    Args:
        value: The mapping under the key; ``True`` or an empty mapping asks for the defaults.

    Returns:
        The settings, and a problem for every unknown key, wrong type and value out of range. Where there
        are problems, the parts that have one are left at their defaults, so that the rest of a
        configuration can still be looked at and all problems be told at once.
    """
    if value is True:
        value = {}
    if not isinstance(value, Mapping):
        problem = Problem(
            setting="dpo_ext",
            found=repr(value),
            reason="the key takes a mapping of parts",
            fix="write for example `dpo_ext: {quality: true, reference: auto}`, or remove the key",
        )
        return DPOExtSettings(), [problem]
    named = {str(part): content for part, content in value.items()}
    try:
        return DPOExtSettings.model_validate(named), []
    except ValidationError as error:
        details = error.errors()
    wrong_parts = {detail["loc"][0] for detail in details if detail["loc"]}
    sound = {part: content for part, content in named.items() if part not in wrong_parts}
    return DPOExtSettings.model_validate(sound), [_problem(detail) for detail in details]


def parse_settings(value: Any) -> DPOExtSettings:
    """Reads settings that must be right: from Python, where there is no YAML around them.

    Args:
        value: What would stand under ``dpo_ext:``.

    Returns:
        The validated settings.

    Raises:
        ConfigurationError: With one problem for every unknown key, wrong type and value out of range.
    """
    settings, problems = read_settings(value)
    if problems:
        raise ConfigurationError(problems)
    return settings


def _problem(details: Any) -> Problem:
    path = [str(key) for key in details["loc"]]
    setting = ".".join(["dpo_ext", *path])
    if details["type"] == "extra_forbidden":
        return _unknown_key(setting, path)
    return Problem(
        setting=setting,
        found=repr(details["input"]),
        reason=details["msg"].removeprefix("Value error, "),
        fix=_expected(path) or "set a value of that kind, or remove the key to use the default",
    )


def _unknown_key(setting: str, path: list[str]) -> Problem:
    model = _model_at(path[:-1])
    known = list(model.model_fields) if model else []
    near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
    return Problem(
        setting=setting,
        found=f"unknown key {path[-1]!r}",
        reason="this version has no such setting, and a setting without effect would go unnoticed",
        fix=f"did you mean {near[0]!r}?" if near else f"remove it; known here: {', '.join(known)}",
    )


def _expected(path: list[str]) -> str:
    model = _model_at(path[:-1]) if path else None
    info = model.model_fields.get(path[-1]) if model else None
    return f"expected: {info.description}" if info else ""


def _model_at(path: list[str]) -> type[BaseModel] | None:
    """Returns the model that holds the keys at a path such as ``["quality"]``, or ``None``."""
    model: type[BaseModel] = DPOExtSettings
    for key in path:
        info = model.model_fields.get(key)
        if info is None:
            return None
        candidates = (info.annotation, *get_args(info.annotation))
        found = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if found is None:
            return None
        model = found
    return model


def json_schema() -> dict[str, Any]:
    """Returns a JSON schema for editors: the ``dpo_ext`` key, with its scalar shorthands, in an Axolotl YAML."""
    parts = DPOExtSettings.model_json_schema(ref_template="#/$defs/{model}")
    definitions = parts.pop("$defs", {})
    properties = parts["properties"]
    properties["reference"] = {"anyOf": [{"type": "string"}, {"const": False}, properties["reference"]]}
    properties["quality"] = {"anyOf": [{"type": "boolean"}, properties["quality"]]}
    properties["report"] = {"anyOf": [{"type": "boolean"}, properties["report"]]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Axolotl configuration with axolotl-dpo-ext",
        "type": "object",
        "properties": {"dpo_ext": {"anyOf": [{"type": "boolean"}, parts]}},
        "$defs": definitions,
    }


def settings_table() -> str:
    """Returns every setting with its default and description as a Markdown table: docs/settings.md holds it."""
    rows = ["| setting | default | what it is |", "|---|---|---|", *_table_rows(DPOExtSettings, "")]
    return "\n".join(rows)


def _table_rows(model: type[BaseModel], prefix: str) -> list[str]:
    rows = []
    for name, info in model.model_fields.items():
        path = f"{prefix}{name}"
        nested = _model_at(path.split("."))
        default = (
            "on" if name == "report" else "off" if nested else json.dumps(info.get_default(call_default_factory=True))
        )
        rows.append(f"| `{path}` | {default if nested else f'`{default}`'} | {info.description} |")
        rows += _table_rows(nested, f"{path}.") if nested else []
    return rows
