"""What stored reference log-probabilities depend on, besides the tokens of each row."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from axolotl_dpo_ext.reference.logprobs import causal_model_of
from axolotl_dpo_ext.reference.processes import Processes
from axolotl_dpo_ext.reference.rows import LogProbDefinition
from axolotl_dpo_ext.reference.weights import weights_digest
from axolotl_dpo_ext.vocabulary import RunStopped

# What a configuration says beside how the model computes.
_NOT_COMPUTING = {
    "_name_or_path", "name_or_path", "transformers_version", "architectures", "use_cache", "dtype", "torch_dtype",
    "bos_token_id", "eos_token_id", "pad_token_id", "return_dict", "output_attentions", "output_hidden_states",
    "tokenizer_class", "finetuning_task", "task_specific_params", "quantization_config", "attn_implementation",
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """Where a model was loaded from.

    Attributes:
        name: A folder or a name on the hub.
        revision: Branch, tag or commit.
    """

    name: str
    revision: str | None = None


def reference_identity(
    model: nn.Module,
    adapter: bool,
    definition: LogProbDefinition,
    autocast: torch.dtype | None,
    checkpoint: Checkpoint | None,
    remember_in: Path | None = None,
) -> dict[str, Any]:
    """Returns everything that a reference's values depend on, other than the rows.

    Beta, learning rate, output folder, seeds and a fresh adapter's rank are not among it, nor is the order of rows.

    Args:
        model: The reference: a causal language model, or a PEFT model around one.
        adapter: Whether the PEFT model's adapter is part of the reference.
        definition: What the log-probability of an answer is; truncation shows in the rows' tokens themselves.
        autocast: The dtype of ``torch.autocast``, or ``None``.
        checkpoint: Where the base weights were loaded from, unchanged; ``None`` if that is not known, and the weights
            in memory are hashed instead.
        remember_in: Where digests of weight files are remembered.
    """
    causal = causal_model_of(model)
    config = causal.config.get_text_config()
    return {
        "weights": _weights(model, checkpoint, remember_in),
        "adapter": _adapter_identity(model) if adapter else None,
        "config": _config_digest(config.to_dict()),
        "architecture": type(causal).__name__,
        "code": _code(type(causal)),
        "dtype": str(causal.dtype),
        "autocast": None if autocast is None else str(autocast),
        "attention": getattr(config, "_attn_implementation", None),
        "quantization": _quantization(causal.config),
        "ld_alpha": definition.ld_alpha,
    }


def _weights(model: nn.Module, checkpoint: Checkpoint | None, remember_in: Path | None) -> str:
    if checkpoint is not None:
        return f"files:{weights_digest(checkpoint.name, checkpoint.revision, remember_in)}"
    return f"memory:{memory_digest(_base_tensors(model))}"


def _code(architecture: type) -> str | None:
    """Returns a digest of the file that computes, for a model that brings its own (``trust_remote_code``, a script's).

    A release of transformers may change such a file without changing a value; of its own models nothing is noted, and
    the first batch of a run is compared instead.
    """
    if architecture.__module__.partition(".")[0] == "transformers":
        return None
    try:
        file = inspect.getsourcefile(architecture)
        return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()[:32]
    except (TypeError, OSError):
        return None  # made in a notebook or an interpreter


def _adapter_identity(model: Any) -> str:
    """Returns a digest of an adapter's tensors and of how they act (alpha, rank-stabilised scaling, DoRA …)."""
    settings = {name: config.to_dict() for name, config in model.peft_config.items() if name != "ref"}
    for config in settings.values():
        for name in ("base_model_name_or_path", "inference_mode", "revision", "task_type"):
            config.pop(name, None)
    text = json.dumps(settings, sort_keys=True, default=_plain)
    return f"{memory_digest(_adapter_tensors(model))} {hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _quantization(config: Any) -> Any:
    found: Any = getattr(config, "quantization_config", None)
    return json.loads(json.dumps(found.to_dict() if hasattr(found, "to_dict") else found, default=str))


def _config_digest(config: Mapping[str, Any]) -> str:
    computing = {key: value for key, value in config.items() if key not in _NOT_COMPUTING}
    return hashlib.sha256(json.dumps(computing, sort_keys=True, default=str).encode()).hexdigest()[:32]


def memory_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Returns a digest of tensors in memory: names, shapes, dtypes and every bit.

    XXH3 runs at memory speed, an order of magnitude above SHA-256; nobody forges weights against their own cache.

    Args:
        tensors: Names and tensors; their order does not matter.

    Raises:
        RunStopped: A tensor is on the meta device or was partitioned away, so that its values are not here.
    """
    total = xxhash.xxh3_128()
    for name, tensor in sorted(tensors, key=lambda named: named[0]):
        if is_elsewhere(tensor):
            raise RunStopped(
                f"the weights have to be identified by their values, and those of {name} are not in this process\n"
                f"    why: the model is sharded, and it is not known to be a checkpoint's unchanged content\n"
                f"    fix: save the model, and load it by that folder's name"
            )
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        total.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return total.hexdigest()


def is_elsewhere(tensor: Tensor) -> bool:
    """Whether a tensor's values are not in this process: meta device, ZeRO-3 partition, sharded DTensor."""
    return tensor.is_meta or hasattr(tensor, "ds_id") or type(tensor).__name__ == "DTensor"


def _adapter_prefix(model: nn.Module) -> str | None:
    tuner = getattr(model, "base_model", None)
    prefix = getattr(tuner, "prefix", None)
    return prefix if hasattr(model, "peft_config") and isinstance(prefix, str) else None


def _base_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Returns the weights without any adapter, under the names that they have without PEFT."""
    prefix = _adapter_prefix(model)
    tensors = causal_model_of(model).state_dict(keep_vars=True).items()
    if prefix is None:
        return list(tensors)
    return [
        (name.replace(".base_layer.", ".").replace(".original_module.", "."), tensor)
        for name, tensor in tensors
        if prefix not in name and ".modules_to_save." not in name and ".trainable_tokens_" not in name
    ]


def _adapter_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    prefix = _adapter_prefix(model) or ""
    return [
        (name, tensor)
        for name, tensor in causal_model_of(model).state_dict(keep_vars=True).items()
        if (prefix in name or ".modules_to_save." in name or ".trainable_tokens_" in name) and ".ref." not in name
    ]


def is_fresh_adapter(model: nn.Module) -> bool:
    """Whether a PEFT model's adapter changes nothing yet: a LoRA whose ``B`` matrices are zero.

    Modules that are trained whole (``modules_to_save``) must still equal the originals.

    Args:
        model: A PEFT model.
    """
    if _adapter_prefix(model) != "lora_":
        return False
    named = _adapter_tensors(model)
    if not all(_equals_original(model, name, tensor) for name, tensor in named if ".modules_to_save." in name):
        return False
    factors = [tensor for name, tensor in named if "lora_B" in name or "lora_embedding_B" in name]
    return bool(factors) and all(not is_elsewhere(tensor) and not tensor.any() for tensor in factors)


def _equals_original(model: nn.Module, name: str, tensor: Tensor) -> bool:
    before, _, after = name.partition(".modules_to_save.")
    original = (
        causal_model_of(model).state_dict(keep_vars=True).get(f"{before}.original_module.{after.partition('.')[2]}")
    )
    return original is not None and not is_elsewhere(tensor) and torch.equal(original, tensor)


def trains_base_weights(model: nn.Module) -> bool:
    """Whether training changes what a PEFT model is without its adapter, or the model has none.

    Args:
        model: The policy.
    """
    base = {id(tensor) for _, tensor in _base_tensors(model)}
    return any(parameter.requires_grad and id(parameter) in base for parameter in model.parameters())


def changes_base_weights(model: nn.Module) -> bool:
    """Whether an adapter's initialisation may have changed the base weights: PiSSA, OLoRA, LoftQ and their like.

    Args:
        model: Any model.
    """
    configs = getattr(model, "peft_config", {})
    inits = [getattr(config, "init_lora_weights", True) for config in configs.values()]
    return any(isinstance(init, str) and init not in ("gaussian", "eva", "orthogonal") for init in inits)


def sample_digest(model: nn.Module) -> str | None:
    """Returns a digest of a few bytes of every parameter, or ``None`` if any is not in this process.

    Processes that loaded the same model have the same; with FSDP's CPU-efficient loading all but one hold zeros.

    Args:
        model: Any model.
    """
    total = xxhash.xxh3_128()
    for name, parameter in model.named_parameters():
        if is_elsewhere(parameter):
            return None
        few = parameter.detach().flatten()[:16].cpu().contiguous()
        total.update(name.encode())
        total.update(few.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def whole_everywhere(model: nn.Module, processes: Processes) -> bool:
    """Whether every process holds the whole model, with the same weights.

    Args:
        model: The model that every process has under this name.
        processes: The processes; each must call this.
    """
    samples = processes.gather(sample_digest(model))
    return None not in samples and len(set(samples)) == 1


def check_on_one_device(model: nn.Module, strategy: str) -> None:
    """Refuses a model that ``device_map`` spreads over devices: moving it anywhere would put all of it on one.

    Args:
        model: A causal language model, or a PEFT model around one.
        strategy: The strategy that would move it.

    Raises:
        RunStopped: Its parts are on several devices.
    """
    places = sorted({str(place) for place in (getattr(causal_model_of(model), "hf_device_map", None) or {}).values()})
    if len(places) > 1:
        raise RunStopped(
            f"`reference: {strategy}`, and device_map spreads the policy over {', '.join(places)}\n"
            f"    why: it is moved as a whole while the reference is made, which would put all of it on one device\n"
            f"    fix: use `reference: adapter` with a LoRA or `reference: gpu`, or load the policy on one device"
        )
