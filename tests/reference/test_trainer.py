"""The trainer with a ``reference=``: one trajectory whatever the strategy, and no reference model where none is due."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from trl import DPOTrainer

from axolotl_dpo_ext.reference import (
    Checkpoint,
    ReferenceDPOTrainer,
)
from axolotl_dpo_ext.reference.losses import SERVED
from axolotl_dpo_ext.reference.processes import Processes
from axolotl_dpo_ext.settings import ReferenceSettings
from axolotl_dpo_ext.vocabulary import ConfigurationError, RunStopped
from tests.reference.conftest import make_pairs
from tests.reference.training import LORA, Arguments, changed_in_memory, trajectory

pytestmark = pytest.mark.stack


def lora() -> dict[str, Any]:
    return {"peft_config": LoraConfig(**LORA)}


@pytest.mark.parametrize(
    ("strategy", "peft"),
    [(s, False) for s in ("gpu", "precomputed", "cpu_offload", "auto")]
    + [(s, True) for s in ("gpu", "adapter", "precomputed", "cpu_offload", "auto")],
)
def test_every_strategy_gives_the_trajectory_of_plain_trl(
    strategy: str, peft: bool, model_dir: Path, arguments: Arguments, store: Path
):
    options = {"eval_strategy": "steps", "eval_steps": 2}

    def train(make: Callable[..., Any]) -> list[float]:
        torch.manual_seed(3)
        given = arguments(**options) | {"eval_dataset": make_pairs(5, first=100)}
        return trajectory(make(str(model_dir), **given, **(lora() if peft else {})))

    plain = train(DPOTrainer)
    assert len(plain) == 3 * 2 + 2
    for _ in range(2):  # with precomputed the second run finds everything stored
        ours = train(lambda *args, **named: ReferenceDPOTrainer(*args, reference=strategy, **named))
        assert ours == pytest.approx(plain, rel=1e-4, abs=1e-6)


# Both strategies hand over the same two numbers; three losses show that cpu_offload's arrive.
@pytest.mark.parametrize(
    ("strategy", "loss"),
    [("precomputed", loss) for loss in sorted(SERVED)]
    + [("cpu_offload", loss) for loss in ("sigmoid", "ipo", "sigmoid_norm")],
)
def test_every_served_loss_gets_what_it_needs(
    loss: str, strategy: str, model_dir: Path, arguments: Arguments, store: Path
):
    options = {"loss_type": [loss], "max_steps": 2, "label_smoothing": 0.01 if loss == "exo_pair" else 0.0}
    plain = trajectory(DPOTrainer(str(model_dir), **arguments(**options)))
    ours = trajectory(ReferenceDPOTrainer(str(model_dir), **arguments(**options), reference=strategy))
    assert ours == pytest.approx(plain, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"ld_alpha": 0.5},
        {"max_length": 9},
        {"max_length": 9, "truncation_mode": "keep_end"},
        {"loss_type": ["sigmoid", "sft"]},
    ],
)
@pytest.mark.parametrize("strategy", ["precomputed", "cpu_offload"])
def test_normalisation_and_truncation_are_trls(
    options: dict[str, Any], strategy: str, model_dir: Path, arguments: Arguments, store: Path
):
    plain = trajectory(DPOTrainer(str(model_dir), **arguments(**options)))
    ours = trajectory(ReferenceDPOTrainer(str(model_dir), **arguments(**options), reference=strategy))
    assert ours == pytest.approx(plain, rel=1e-4, abs=1e-6)


def test_longer_rows_of_a_model_that_scales_positions_by_them_are_refused_also_after_shorter_ones(
    model_dir: Path, arguments: Arguments, store: Path
):
    config = AutoConfig.from_pretrained(model_dir)
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
    config.max_position_embeddings = 10
    config.save_pretrained(model_dir)
    ReferenceDPOTrainer(str(model_dir), **arguments(max_length=9), reference="precomputed")
    with pytest.raises(RunStopped, match="depend on which answers are computed together"):
        ReferenceDPOTrainer(str(model_dir), **arguments(), reference="precomputed")


@pytest.mark.parametrize("strategy", ["precomputed", "cpu_offload"])
def test_a_model_spread_over_devices_is_refused_with_what_serves_it(
    strategy: str, model_dir: Path, arguments: Arguments, store: Path, tmp_path: Path
):
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, device_map={**places, "lm_head": "cpu"}, offload_folder=str(tmp_path / "disk")
    )
    with pytest.raises(RunStopped, match="spreads the policy over cpu, disk"):
        ReferenceDPOTrainer(model, **arguments(), reference=strategy, checkpoint=Checkpoint(str(model_dir)))


@pytest.mark.parametrize("strategy", ["precomputed", "cpu_offload"])
def test_what_is_not_known_to_work_with_sums_is_refused_by_name(strategy: str, model_dir: Path, arguments: Arguments):
    with pytest.raises(RunStopped, match="sync_ref_model"):
        ReferenceDPOTrainer(str(model_dir), **arguments(sync_ref_model=True), reference=strategy)
    given = arguments()
    given["args"].use_liger_kernel = True
    with pytest.raises(RunStopped, match="use_liger_kernel"):
        ReferenceDPOTrainer(str(model_dir), **given, reference=strategy)
    given = arguments()
    given["args"].loss_type = ["epsilon"]
    with pytest.raises(RunStopped, match="epsilon"):
        ReferenceDPOTrainer(str(model_dir), **given, reference=strategy)


def test_several_evaluation_sets_are_covered_before_training(
    model_dir: Path, arguments: Arguments, store: Path, forwards: list[int]
):
    sets = {"first": make_pairs(4, first=50), "second": make_pairs(4, first=80)}
    given = arguments(eval_strategy="steps", eval_steps=1)
    trainer = ReferenceDPOTrainer(str(model_dir), **given, eval_dataset=sets, reference="precomputed")
    assert set(trainer.reference_record) == {"train", "first", "second"}
    before = len(forwards)
    assert len(trajectory(trainer)) == 3 * 2
    assert len(forwards) == before


def test_no_reference_model_is_alive_under_precomputed(model_dir: Path, arguments: Arguments, store: Path):
    for _ in range(2):
        trainer = ReferenceDPOTrainer(str(model_dir), **arguments(), reference="precomputed")
        assert trainer.ref_model is None
        gc.collect()
        policy = trainer.accelerator.unwrap_model(trainer.model)
        weights = {id(parameter) for parameter in policy.parameters()}
        alive = [m for m in gc.get_objects() if type(m) is LlamaForCausalLM]
        assert all({id(parameter) for parameter in model.parameters()} <= weights for model in alive)
        trainer.train()
        del trainer, policy, alive
        gc.collect()


def test_a_continued_adapter_is_part_of_the_reference(model_dir: Path, arguments: Arguments, store: Path):
    def continued() -> Any:
        torch.manual_seed(1)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), LoraConfig(**LORA))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    plain = trajectory(DPOTrainer(continued(), **arguments()))
    for strategy in ("adapter", "precomputed", "cpu_offload"):
        ours = trajectory(ReferenceDPOTrainer(continued(), **arguments(), reference=strategy))
        assert ours == pytest.approx(plain, rel=1e-4, abs=1e-6), strategy
    base = {"strategy": "adapter", "model": "base"}
    other = trajectory(ReferenceDPOTrainer(continued(), **arguments(), reference=base))
    assert abs(other[0] - math.log(2)) > 1e-3  # the policy starts away from the bare base model
    with pytest.raises(RunStopped, match="a second copy of the base model is not the model"):
        ReferenceDPOTrainer(continued(), **arguments(), reference="gpu")


def test_an_adapter_that_changes_the_base_weights_is_refused(model_dir: Path, arguments: Arguments):
    peft = LoraConfig(**LORA, init_lora_weights="pissa")
    with pytest.raises((RunStopped, ConfigurationError), match=r"(?s)why: .*fix: "):
        ReferenceDPOTrainer(str(model_dir), **arguments(), peft_config=peft, reference="adapter")


def test_adapter_without_an_adapter_is_refused(model_dir: Path, arguments: Arguments):
    with pytest.raises(ConfigurationError, match="full fine-tuning changes the base weights"):
        ReferenceDPOTrainer(str(model_dir), **arguments(), reference="adapter")
    with pytest.raises(ConfigurationError, match="did you mean 'precomputed'"):
        ReferenceDPOTrainer(str(model_dir), **arguments(), reference="precomputd")


def test_a_reference_model_of_ones_own_is_used(model_dir: Path, arguments: Arguments, store: Path):
    def own() -> Any:
        torch.manual_seed(9)
        model = AutoModelForCausalLM.from_pretrained(model_dir)
        for parameter in model.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
        return model

    plain = trajectory(DPOTrainer(str(model_dir), own(), **arguments()))
    for strategy in ("gpu", "precomputed", "cpu_offload"):
        ours = trajectory(ReferenceDPOTrainer(str(model_dir), own(), **arguments(), reference=strategy))
        assert ours == pytest.approx(plain, rel=1e-4, abs=1e-6), strategy
    with pytest.raises(RunStopped, match="would go unused"):
        ReferenceDPOTrainer(str(model_dir), own(), **arguments(), **lora(), reference="adapter")


def test_values_of_other_weights_are_found_before_the_first_step(model_dir: Path, arguments: Arguments, store: Path):
    from axolotl_dpo_ext.reference import Checkpoint

    ReferenceDPOTrainer(str(model_dir), **arguments(), reference="precomputed")
    changed = AutoModelForCausalLM.from_pretrained(model_dir)
    changed.model.layers[0].mlp.up_proj.weight.data *= 1.5
    trainer = ReferenceDPOTrainer(
        changed, **arguments(), reference="precomputed", checkpoint=Checkpoint(str(model_dir))
    )
    with pytest.raises(RunStopped, match="are not the model's"):
        trainer.train()


def test_a_collator_that_drops_the_values_is_named(model_dir: Path, arguments: Arguments, store: Path):
    trainer = ReferenceDPOTrainer(str(model_dir), **arguments(), reference="precomputed")
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: {k: v for k, v in collate(rows).items() if not k.startswith("ref_")}
    with pytest.raises(RunStopped, match="dropped the columns"):
        trainer.train()


def test_one_sweep_for_all_micro_batches_of_a_step(
    model_dir: Path, arguments: Arguments, monkeypatch: pytest.MonkeyPatch
):
    from axolotl_dpo_ext.reference.offload import CpuReference

    handed: list[int] = []
    compute = CpuReference.token_log_probs
    monkeypatch.setattr(
        CpuReference, "token_log_probs", lambda self, batches: (handed.append(len(batches)), compute(self, batches))[1]
    )
    trainer = ReferenceDPOTrainer(str(model_dir), **arguments(), reference="cpu_offload")
    trainer.train()
    assert handed == [2, 2, 2]


class AnotherProcess(Processes):
    """The second of two processes, the first of which says ``gpu``."""

    def __init__(self) -> None:
        self.rank, self.count = 1, 2

    def gather(self, value: Any) -> list[Any]:
        return ["gpu", value]


def test_every_process_takes_the_first_ones_automatic_choice(
    model_dir: Path, arguments: Arguments, monkeypatch: pytest.MonkeyPatch
):
    from axolotl_dpo_ext.reference import trainer

    monkeypatch.setattr(trainer, "Processes", AnotherProcess)
    given = {"model": str(model_dir), "args": arguments()["args"]}
    # Alone it chooses the adapter; the first process may have seen another store or device.
    strategy = trainer._choose(ReferenceSettings(strategy="auto"), {**given, **lora()}, None)
    assert strategy.name == "gpu"
    with pytest.raises(RunStopped, match="different reference strategies: gpu, precomputed"):
        trainer._choose(ReferenceSettings(strategy="precomputed"), given, None)


def test_a_new_evaluation_set_after_training(model_dir: Path, arguments: Arguments, store: Path):
    new = make_pairs(4, first=200)

    def margin(make: Callable[..., Any]) -> float:
        torch.manual_seed(3)
        trainer = make(str(model_dir), **arguments(), **lora())
        trainer.train()
        return trainer.evaluate(new)["eval_rewards/margins"]

    # With the adapter as it is trained by then for a reference, every margin would be 0.
    plain = margin(DPOTrainer)
    assert abs(plain) > 1e-4
    ours = margin(lambda *args, **named: ReferenceDPOTrainer(*args, reference="precomputed", **named))
    assert ours == pytest.approx(plain, rel=1e-3, abs=1e-6)

    own = AutoModelForCausalLM.from_pretrained(model_dir)
    trainer = ReferenceDPOTrainer(str(model_dir), own, **arguments(), reference="precomputed")
    with pytest.raises(RunStopped, match="pass the dataset as `eval_dataset`"):
        trainer.evaluate(new)


def test_a_streamed_dataset_is_refused_by_name(model_dir: Path, arguments: Arguments, store: Path):
    given = arguments() | {"train_dataset": make_pairs(6).to_iterable_dataset()}
    with pytest.raises((RunStopped, ValueError), match=r"(?i)iterabledataset"):
        ReferenceDPOTrainer(str(model_dir), **given, reference="precomputed")


@pytest.mark.parametrize("strategy", ["gpu", "precomputed", "cpu_offload", "auto"])
def test_a_model_that_a_script_changed_is_its_own_reference(
    strategy: str, model_dir: Path, arguments: Arguments, store: Path
):
    # TRL itself would load the name that the model still carries, which is another model.
    trainer = ReferenceDPOTrainer(changed_in_memory(model_dir), **arguments(), reference=strategy)
    assert trajectory(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)


def test_evaluation_sets_beside_a_continued_adapter_or_a_reference_of_ones_own(
    model_dir: Path, arguments: Arguments, store: Path
):
    sets = {"first": make_pairs(4, first=50), "second": make_pairs(4, first=80)}
    for strategy in ("precomputed", "cpu_offload"):
        own = ReferenceDPOTrainer(
            str(model_dir), changed_in_memory(model_dir), **arguments(), eval_dataset=sets, reference=strategy
        )
        plain = DPOTrainer(str(model_dir), changed_in_memory(model_dir), **arguments(), eval_dataset=sets)
        assert own.evaluate()["eval_first_loss"] == pytest.approx(plain.evaluate()["eval_first_loss"], rel=1e-4)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), LoraConfig(**LORA))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    continued = ReferenceDPOTrainer(model, **arguments(), eval_dataset=sets, reference="precomputed")
    assert continued.evaluate()["eval_second_loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_pissa_and_modules_saved_whole_have_the_policy_before_its_first_step(
    model_dir: Path, arguments: Arguments, store: Path
):
    for more in ({"init_lora_weights": "pissa"}, {"modules_to_save": ["lm_head"]}):
        peft = LoraConfig(**LORA, **more)
        trainer = ReferenceDPOTrainer(str(model_dir), **arguments(), peft_config=peft, reference="precomputed")
        assert trajectory(trainer)[0] == pytest.approx(math.log(2), abs=1e-4), more
    peft = LoraConfig(**LORA, modules_to_save=["lm_head"])
    trainer = ReferenceDPOTrainer(str(model_dir), **arguments(), peft_config=peft, reference="adapter")
    assert trajectory(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)


def test_the_callers_arguments_stay_as_they_were(model_dir: Path, arguments: Arguments, store: Path):
    given = arguments()
    ReferenceDPOTrainer(str(model_dir), **given, reference="precomputed")
    assert given["args"].precompute_ref_log_probs is False


def test_half_precision_of_a_backend_does_not_round_the_values(model_dir: Path, arguments: Arguments, store: Path):
    trainer = ReferenceDPOTrainer(str(model_dir), **arguments(), reference="precomputed")
    wide = torch.tensor([-523.37])
    trainer._prepare_input = lambda data: data  # what DeepSpeed's bf16 does to other tensors must not reach these
    prepared = trainer._prepare_inputs(
        {"input_ids": torch.ones(1, 2), "ref_chosen_logps": wide, "ref_rejected_logps": wide}
    )
    assert prepared["ref_chosen_logps"].dtype == torch.float32
    assert prepared["ref_chosen_logps"].item() == wide.item()


def test_an_evaluation_set_that_the_trainer_prepared_can_be_given_again(
    model_dir: Path, arguments: Arguments, store: Path
):
    for strategy in ("precomputed", "cpu_offload"):
        trainer = ReferenceDPOTrainer(
            str(model_dir), **arguments(), eval_dataset=make_pairs(4, first=50), reference=strategy
        )
        first = trainer.evaluate()["eval_loss"]
        assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == pytest.approx(first)
    trainer.train()
    assert trainer.evaluate(make_pairs(3, first=300))["eval_loss"] != pytest.approx(math.log(2), abs=1e-5)
