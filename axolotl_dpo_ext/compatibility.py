"""Combinations of Axolotl and TRL keys that cannot work, each found before anything loads.

One function a rule; each names the upstream issue or file that it rests on. A rule sees the Axolotl keys of
the run, the settings under ``dpo_ext:`` and the installed versions, and yields problems.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from packaging.version import Version

from axolotl_dpo_ext.extras import install_line
from axolotl_dpo_ext.settings import DPOExtSettings
from axolotl_dpo_ext.vocabulary import Problem

MOST_PAIRS = 2**53  # beyond it a float is no count
PAIRED_RL = ("dpo", "ipo", "orpo", "simpo")
REFERENCE_RL = ("dpo", "ipo")
# Kinds whose trainers log rewards, so that there is something to report.
LOGGED_RL = (*PAIRED_RL, "kto")


@dataclass(frozen=True)
class Run:
    """What a rule looks at.

    Attributes:
        config: The run's Axolotl keys, as in its YAML with command-line overrides.
        settings: What stands under ``dpo_ext:``.
        versions: Installed versions by package name; ``None`` where it is not installed.
        strategy: The reference strategy, if it hands the log-probabilities over to TRL.
    """

    config: Mapping[str, Any]
    settings: DPOExtSettings
    versions: Mapping[str, Version | None]
    strategy: str | None = None

    @property
    def rl(self) -> str | None:
        """The ``rl:`` kind."""
        return self.config.get("rl")

    @property
    def precomputes(self) -> bool:
        """Whether TRL is told to compute the reference log-probabilities before training."""
        return bool(self.config.get("precompute_ref_log_probs"))

    @property
    def handed_over(self) -> str | None:
        """What makes TRL take reference log-probabilities from its batches, for messages; ``None`` if nothing does."""
        if self.strategy:
            return f"dpo_ext.reference: {self.strategy}"
        return "precompute_ref_log_probs: true" if self.precomputes else None

    def trl_key(self, key: str) -> Any:
        """Returns a key of the nested ``trl:`` mapping."""
        nested = self.config.get("trl")
        return nested.get(key) if isinstance(nested, Mapping) else None

    def trl_before(self, version: str) -> bool:
        """Whether the installed TRL is older; an unknown TRL counts as new."""
        installed = self.versions.get("trl")
        return installed is not None and installed < Version(version)

    @property
    def trl_name(self) -> str:
        """The installed TRL with its version, for messages."""
        return f"trl {self.versions.get('trl') or '(not installed)'}"


Rule = Callable[[Run], Iterator[Problem]]


def find_problems(run: Run) -> list[Problem]:
    """Applies every rule.

    Args:
        run: The configuration to look at.

    Returns:
        All problems found, fatal ones and advice, in the order of the rules.
    """
    return [problem for rule in RULES for problem in rule(run)]


def rl_kind_is_served(run: Run) -> Iterator[Problem]:
    """Each part serves certain ``rl:`` kinds; asked for elsewhere it would be without effect."""
    if run.rl not in LOGGED_RL:
        kind = f"rl: {run.rl}" if run.rl else "rl is not set (supervised fine-tuning)"
        yield Problem(
            setting="dpo_ext",
            found=kind,
            reason="every part is about preference data, which this kind of run does not have",
            fix=f"use one of rl: {', '.join(LOGGED_RL)}, or remove the dpo_ext key",
        )
        return
    if run.settings.reference is not None and run.rl not in REFERENCE_RL:
        yield Problem(
            setting="dpo_ext.reference",
            found=f"reference, with rl: {run.rl}",
            reason="that loss has no reference, or not one for pairs",
            fix=f"remove dpo_ext.reference, or use one of rl: {', '.join(REFERENCE_RL)}",
        )


def liger_with_precompute(run: Run) -> Iterator[Problem]:
    """TRL < 1.14: the fused loss takes no stored log-probs (trl/trainer/dpo_trainer.py; trl#7084)."""
    if run.handed_over and run.config.get("dpo_use_liger_kernel") and run.trl_before("1.14"):
        yield Problem(
            setting="dpo_use_liger_kernel",
            found=f"dpo_use_liger_kernel: true, with {run.handed_over}",
            reason=f"the Liger DPO loss of {run.trl_name} computes the reference itself and refuses stored log-probs",
            fix="remove one of the two keys, or use TRL 1.14 or newer",
        )


def synced_reference(run: Run) -> Iterator[Problem]:
    """A moving reference needs a reference model, and DPO in Axolotl does not pass the key on (core/builders/rl.py)."""
    if not run.trl_key("sync_ref_model"):
        return
    found = "trl.sync_ref_model: true"
    if run.handed_over:
        yield Problem(
            setting="trl.sync_ref_model",
            found=f"{found}, with {run.handed_over}",
            reason="stored log-probs belong to a fixed reference and are stale after its first update",
            fix="remove one of the two keys",
        )
    if run.config.get("adapter"):
        yield Problem(
            setting="trl.sync_ref_model",
            found=f"{found}, with adapter: {run.config['adapter']}",
            reason="with an adapter the reference is the policy with the adapter disabled; there is no model to update",
            fix="remove trl.sync_ref_model, or train all weights",
        )
    if run.rl in REFERENCE_RL and not run.handed_over and not run.config.get("adapter"):
        yield Problem(
            setting="trl.sync_ref_model",
            found=f"{found}, with rl: {run.rl}",
            reason="Axolotl passes that key to GRPO only, so the reference would silently stay fixed",
            fix="remove trl.sync_ref_model",
        )


def streaming_with_precompute(run: Run) -> Iterator[Problem]:
    """Stored log-probs are matched to rows, which an IterableDataset does not have (trl/trainer/dpo_trainer.py)."""
    before_training = run.handed_over if run.strategy != "cpu_offload" else None
    if run.config.get("streaming") and (before_training or run.settings.quality):
        asked = before_training or "dpo_ext.quality"
        yield Problem(
            setting="streaming",
            found=f"streaming: true, with {asked}",
            reason="it goes through all rows before training, and a streamed dataset has no fixed set of rows",
            fix="remove streaming: true (preference sets are small), or the other key",
        )


def vision_with_precompute(run: Run) -> Iterator[Problem]:
    """TRL refuses stored log-probs for image datasets (trl/trainer/dpo_trainer.py)."""
    vision = run.config.get("processor_type") or run.config.get("is_multimodal")
    if vision and run.handed_over:
        yield Problem(
            setting="dpo_ext.reference" if run.strategy else "precompute_ref_log_probs",
            found=f"{run.handed_over}, with a processor (vision) model",
            reason="TRL processes images on the fly and refuses to go over them beforehand",
            fix="remove that key: TRL then computes the reference during training",
        )
    if vision and run.settings.quality:
        yield Problem(
            setting="dpo_ext.quality",
            found="quality, with a processor (vision) model",
            reason="the checks compare texts; the images of a pair would go unseen",
            fix="remove dpo_ext.quality",
        )


def beta_set_twice(run: Run) -> Iterator[Problem]:
    """``trl.beta`` silently beats ``rl_beta`` (core/builders/rl.py), and that the old ``dpo_beta`` (axolotl#1242)."""
    betas = {
        "rl_beta": run.config.get("rl_beta"),
        "trl.beta": run.trl_key("beta"),
        "dpo_beta": run.config.get("dpo_beta"),
        "orpo_alpha": run.config.get("orpo_alpha") if run.rl == "orpo" else None,
    }
    given = {key: value for key, value in betas.items() if value is not None}
    if len(given) > 1:
        yield Problem(
            setting="rl_beta",
            found=", ".join(f"{key}: {value}" for key, value in given.items()),
            reason="beta is set more than once; Axolotl takes trl.beta before rl_beta before the others without a word",
            fix="keep rl_beta and remove the others",
        )


def padding_to_a_multiple(run: Run) -> Iterator[Problem]:
    """Axolotl's padding collator expects the columns that TRL's DPO had before 1.0 (utils/collators/dpo.py)."""
    if run.config.get("pad_to_multiple_of") and run.rl in REFERENCE_RL:
        yield Problem(
            setting="pad_to_multiple_of",
            found=f"pad_to_multiple_of: {run.config['pad_to_multiple_of']}, with rl: {run.rl}",
            reason="Axolotl's collator for it expects TRL's old column names; the first batch fails with "
            "'must specify exactly one of input_ids or inputs_embeds'",
            fix="remove pad_to_multiple_of",
        )


def fsdp2_with_precompute(run: Run) -> Iterator[Problem]:
    """TRL < 1.16 shards the policy in place before training (trl#6470; fixed by a separate reference in 1.16)."""
    if _fsdp_version(run) == 2 and run.precomputes and run.trl_before("1.16"):
        yield Problem(
            setting="precompute_ref_log_probs",
            found="precompute_ref_log_probs: true, with FSDP2",
            reason=f"{run.trl_name} crashes in this combination (trl#6470)",
            fix="use DeepSpeed ZeRO-3, use TRL 1.16 or newer, or remove precompute_ref_log_probs",
        )


def deepspeed_with_precompute(run: Run) -> Iterator[Problem]:
    """The combination never worked before TRL 1.9 (trl#6403)."""
    if run.config.get("deepspeed") and run.precomputes and run.trl_before("1.9"):
        yield Problem(
            setting="precompute_ref_log_probs",
            found=f"precompute_ref_log_probs: true, with deepspeed: {run.config['deepspeed']}",
            reason=f"{run.trl_name} fails in this combination (trl#6403)",
            fix="use TRL 1.9 or newer, or remove precompute_ref_log_probs",
        )


def deepspeed_is_installed(run: Run) -> Iterator[Problem]:
    """Axolotl finds out when it builds the trainer, after models and data are loaded."""
    if run.config.get("deepspeed") and "deepspeed" in run.versions and run.versions["deepspeed"] is None:
        yield Problem(
            setting="deepspeed",
            found=f"deepspeed: {run.config['deepspeed']}, and the package deepspeed is not installed",
            reason="the trainer cannot be built without it",
            fix=install_line("deepspeed"),
        )


def precompute_keeps_the_reference(run: Run) -> Iterator[Problem]:
    """Axolotl loads the second model all the same (train.py: setup_reference_model), and TRL keeps it."""
    if run.rl in REFERENCE_RL and run.precomputes and not run.config.get("adapter") and not run.strategy:
        yield Problem(
            setting="precompute_ref_log_probs",
            found="precompute_ref_log_probs: true, with full fine-tuning",
            reason="Axolotl still loads the reference model and TRL keeps it for the whole run, so this saves "
            "compute and no memory",
            fix="set `dpo_ext: {reference: precomputed}` instead, which loads no second model and keeps the values",
            fatal=False,
        )


def precomputed_twice(run: Run) -> Iterator[Problem]:
    """TRL's own cache would be asked for in vain: the strategy takes its place (reference/trainer.py)."""
    if run.strategy and run.precomputes:
        yield Problem(
            setting="precompute_ref_log_probs",
            found=f"precompute_ref_log_probs: true, with {run.handed_over}",
            reason="both say where the reference log-probabilities come from, and the strategy replaces TRL's own way",
            fix="remove precompute_ref_log_probs",
        )


def own_trainer_class(run: Run) -> Iterator[Problem]:
    """A strategy acts through the trainer class (core/builders/rl.py: `trainer_cls` replaces Axolotl's)."""
    if run.settings.reference is not None and run.config.get("trainer_cls"):
        yield Problem(
            setting="trainer_cls",
            found=f"trainer_cls: {run.config['trainer_cls']}, with dpo_ext.reference",
            reason="the strategy acts through the trainer class, which that key replaces",
            fix="remove dpo_ext.reference and derive your class from axolotl_dpo_ext.reference.ReferenceMixin, or "
            "remove trainer_cls",
        )


def precompute_outside_dpo(run: Run) -> Iterator[Problem]:
    """Only DPO's trainer arguments take the key (core/builders/rl.py)."""
    if run.precomputes and run.rl in PAIRED_RL and run.rl not in REFERENCE_RL:
        yield Problem(
            setting="precompute_ref_log_probs",
            found=f"precompute_ref_log_probs: true, with rl: {run.rl}",
            reason="that loss has no reference model, and Axolotl ignores the key there",
            fix="remove precompute_ref_log_probs",
        )


def saved_adapter_is_not_loaded(run: Run) -> Iterator[Problem]:
    """For DPO Axolotl reads a saved adapter's configuration only (loaders/model.py: config_only=True)."""
    folder = run.config.get("lora_model_dir")
    if folder and run.config.get("adapter") and run.rl in REFERENCE_RL and not run.config.get("merge_lora"):
        yield Problem(
            setting="lora_model_dir",
            found=f"lora_model_dir: {folder}, with rl: {run.rl}",
            reason="Axolotl does not load that adapter's weights here: policy and reference would both start from the "
            "bare base model, not from the fine-tuned one",
            fix="merge the adapter first (`axolotl merge-lora`), set base_model to the result, remove lora_model_dir",
        )


def padding_free(run: Run) -> Iterator[Problem]:
    """TRL 1.x warns and pads all the same (trl/trainer/dpo_trainer.py)."""
    if run.config.get("dpo_padding_free"):
        yield Problem(
            setting="dpo_padding_free",
            found="dpo_padding_free: true",
            reason=f"{run.trl_name} has no padding-free DPO: it warns and pads, so memory and speed are not what "
            "the key promises",
            fix="remove dpo_padding_free",
            fatal=False,
        )


def ignored_best_model_keys(run: Run) -> Iterator[Problem]:
    """Early stopping and best-model keys are read for supervised runs only (core/builders/causal.py)."""
    keys = ("early_stopping_patience", "metric_for_best_model", "greater_is_better", "load_best_model_at_end")
    given = [key for key in keys if run.config.get(key)]
    if given and run.rl in PAIRED_RL:
        yield Problem(
            setting=given[0],
            found=", ".join(f"{key}: {run.config[key]}" for key in given),
            reason=f"Axolotl reads these keys for supervised fine-tuning only and ignores them with rl: {run.rl}",
            fix="do not rely on them: the last model is the one that is saved",
            fatal=False,
        )


def two_held_out_sets(run: Run) -> Iterator[Problem]:
    """There can be one held-out set: the pack's grouped split, or the user's."""
    quality = run.settings.quality
    if quality is None or quality.holdout is None:
        return
    if run.config.get("test_datasets") and quality.holdout:
        yield Problem(
            setting="dpo_ext.quality.holdout",
            found=f"holdout: {quality.holdout:g}, with test_datasets",
            reason="both name the held-out pairs, and Axolotl takes only one source of them",
            fix="remove dpo_ext.quality.holdout (or set it to 0) to use your test_datasets",
        )
    val_set_size = run.config.get("val_set_size")
    if is_size(val_set_size) and val_set_size and val_set_size != quality.holdout:
        yield Problem(
            setting="dpo_ext.quality.holdout",
            found=f"holdout: {quality.holdout:g}, with val_set_size: {val_set_size}",
            reason="both give the size of the held-out split, and they differ",
            fix="remove val_set_size: the split by prompt replaces Axolotl's split by row",
        )


def val_set_size_is_a_number(run: Run) -> Iterator[Problem]:
    """The pack replaces that key with the size of its own split, so Axolotl would not see what was wrong with it."""
    found = run.config.get("val_set_size")
    if found is not None and run.settings.quality and not is_size(found):
        yield Problem(
            setting="val_set_size",
            found=f"val_set_size: {found!r}",
            reason="it is neither a fraction below 1 nor a number of pairs",
            fix="remove it, or set for example `val_set_size: 0.1`",
        )


def is_size(value: Any) -> TypeGuard[float]:
    """Whether a YAML value can be the size of a held-out split."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < MOST_PAIRS


def _fsdp_version(run: Run) -> int | None:
    """Returns 1 or 2, or ``None`` without FSDP. Axolotl 0.20 removed version 1 (utils/schemas/validation.py)."""
    nested = run.config.get("fsdp_config")
    nested = nested if isinstance(nested, Mapping) else {}
    if not nested and not run.config.get("fsdp"):
        return None
    version = run.config.get("fsdp_version") or nested.get("fsdp_version") or nested.get("version")
    if version is None:
        axolotl = run.versions.get("axolotl")
        return 1 if axolotl is not None and axolotl < Version("0.20") else 2
    return 2 if str(version) == "2" else 1


RULES: tuple[Rule, ...] = (
    rl_kind_is_served,
    liger_with_precompute,
    synced_reference,
    streaming_with_precompute,
    vision_with_precompute,
    beta_set_twice,
    padding_to_a_multiple,
    fsdp2_with_precompute,
    deepspeed_with_precompute,
    deepspeed_is_installed,
    precompute_keeps_the_reference,
    precomputed_twice,
    own_trainer_class,
    precompute_outside_dpo,
    saved_adapter_is_not_loaded,
    padding_free,
    ignored_best_model_keys,
    two_held_out_sets,
    val_set_size_is_a_number,
)
