"""Which of TRL's losses work with reference log-probabilities that are handed over as one number for each answer."""

from __future__ import annotations

from typing import Any

from axolotl_dpo_ext.vocabulary import RunStopped

# Those that use the reference only through the sums of each answer (DPOTrainer._compute_loss of TRL 1.9 to 1.16);
# `ipo` and `sigmoid_norm` divide the sums by the lengths that the batch itself has.
SERVED = frozenset({
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
})  # fmt: skip


def check_loss(strategy: str, args: Any) -> None:
    """Checks that a run's losses work with sums.

    Args:
        strategy: The strategy's name.
        args: TRL's ``DPOConfig``.

    Raises:
        RunStopped: Naming the losses that are not known to.
    """
    losses = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)
    unknown = [loss for loss in losses if loss not in SERVED]
    if unknown:
        raise RunStopped(
            f"`reference: {strategy}` with the loss {', '.join(unknown)}\n"
            f"    why: it is not known to use the reference through each answer's summed log-probability only\n"
            f"    fix: use `reference: gpu`, or one of {', '.join(sorted(SERVED))}"
        )
    if getattr(args, "use_liger_kernel", False):
        raise RunStopped(
            f"`reference: {strategy}` with use_liger_kernel\n"
            f"    why: Liger's loss computes the reference inside, and takes no log-probabilities from outside\n"
            f"    fix: set use_liger_kernel=False, or use `reference: gpu`, or `adapter` with a LoRA"
        )
    if getattr(args, "sync_ref_model", False):
        raise RunStopped(
            f"`reference: {strategy}` with sync_ref_model\n"
            f"    why: a reference that follows the policy is not the one whose log-probabilities were computed\n"
            f"    fix: set sync_ref_model=False, or use `reference: gpu`"
        )
