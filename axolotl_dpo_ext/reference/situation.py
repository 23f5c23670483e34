"""What `auto` looks at to choose a reference strategy. Everything is the same on every rank, so the choice is too.

Nothing is downloaded, loaded or measured: sizes come from the headers of the weight files that are on this machine.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl_dpo_ext.vocabulary import RunStopped

# LoRA initialisations that leave the policy equal to its base model; `False` and the named ones do not.
_ZERO_INIT = (None, True, "gaussian")
# Hashing more than this only to decide would cost more than the decision is worth.
_HASHED_AT_ONCE = 2**26
_DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float64": 8.0}
# 4 bits and a float32 scale for 64 values (NF4); LLM.int8 keeps one scale a row.
_QUANTIZED_BYTES = {"load_in_4bit": 4.5 / 8, "load_in_8bit": 1.0}
# Axolotl's own defaults.
_SEQUENCE_LEN = 512
# Of a parameter's name: the number of the layer it is in.
_LAYER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class ModelShape:
    """The size of a checkpoint.

    Attributes:
        parameters: Number of parameters.
        in_layers: How many of them are in layers, not in embedding, head and final norm.
        trainable: How many of them, or of the adapter's, are trained.
        active_share: Share of the parameters that one token computes with: below 1 for a mixture of experts.
        vocabulary: Size of the vocabulary.
        hidden: Hidden size.
        layers: Number of decoder layers.
        bytes_per_parameter: Of the weights as loaded.
    """

    parameters: int
    in_layers: int
    trainable: int
    active_share: float
    vocabulary: int
    hidden: int
    layers: int
    bytes_per_parameter: float


@dataclass(frozen=True)
class Sharding:
    """How the processes of a run share the policy's memory.

    Attributes:
        stage: As DeepSpeed counts: 1 shards optimizer states, 2 gradients too, 3 weights too; FSDP counts as 3.
        devices: Over how many devices.
        master_weights: Whether a float32 copy of bfloat16 weights is kept, as DeepSpeed does.
        optimizer_on_host: Whether optimizer states are in host memory.
        whole_at_start: Whether every process has all weights before training, so that it can compute or copy them.
    """

    stage: int = 0
    devices: int = 1
    master_weights: bool = False
    optimizer_on_host: bool = False
    whole_at_start: bool = True


@dataclass(frozen=True)
class Device:
    """What a process computes on.

    Attributes:
        name: The accelerator's name, or ``None`` without one.
        memory: The accelerator's memory in bytes, or ``None`` without one.
        host_memory: A process's share of the machine's memory in bytes.
    """

    name: str | None
    memory: int | None
    host_memory: int


@dataclass(frozen=True)
class Situation:
    """What the choice between the strategies depends on.

    Attributes:
        base_model: Name of the base model.
        adapter: Kind of adapter, or ``None`` in full fine-tuning.
        fresh_adapter: Whether the adapter changes nothing before the first step.
        adapter_copy: Whether TRL keeps a frozen copy of a continued adapter beside it.
        losses: Names of the losses, as TRL has them.
        epochs: How often each pair is trained on; 1 where ``max_steps`` leaves that open.
        micro_tokens: Most tokens of a micro-batch, both answers of each pair.
        step_tokens: Most tokens of an optimizer step on one device.
        checkpointing: Whether activations are computed again in the backward pass.
        activation_bytes: Bytes of an activation: 2 in mixed precision.
        optimizer: Name of the optimizer.
        sharding: How processes share the policy's memory.
        device: What a process computes on.
        stored_rows: How many answers have stored log-probabilities under these weights.
        model: The model's size, or ``None`` where it cannot be known without a download.
    """

    base_model: str | None
    adapter: str | None
    fresh_adapter: bool
    adapter_copy: bool
    losses: tuple[str, ...]
    epochs: float
    micro_tokens: int
    step_tokens: int
    checkpointing: bool
    activation_bytes: int
    optimizer: str
    sharding: Sharding
    device: Device
    stored_rows: int
    model: ModelShape | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Situation:
        """Looks at a run.

        Args:
            config: The run's Axolotl keys, as in its YAML, or as ``keys_of_script`` returns them. Values that Axolotl
                will refuse count as not set.
        """
        name = config.get("base_model")
        name = name if isinstance(name, str) and name else None
        micro_batch = _number(config, "micro_batch_size", 1)
        micro_tokens = int(2 * micro_batch * _number(config, "sequence_len", _SEQUENCE_LEN))
        folder = _checkpoint_folder(name, config.get("revision_of_model"))
        model = None if folder is None else _model_shape(folder, config)
        return cls(
            base_model=name,
            adapter=config.get("adapter") or None,
            fresh_adapter=_is_fresh(config),
            adapter_copy=bool(config.get(ADAPTER_COPY)),
            losses=_losses(config),
            epochs=1.0 if _number(config, "max_steps", 0) else _number(config, "num_epochs", 1.0),
            micro_tokens=micro_tokens,
            step_tokens=micro_tokens * _accumulation(config, micro_batch),
            checkpointing=_checkpoints(config),
            activation_bytes=2 if _half_precision(config) else 4,
            optimizer=str(config.get("optimizer") or "adamw_torch_fused"),
            sharding=_sharding(config, 0.0 if model is None else model.bytes_per_parameter),
            device=_device(needed=model is not None),
            stored_rows=0 if folder is None else _stored_rows(config, folder),
            model=model,
        )


# Keys that Axolotl does not have, for what only a script can say.
FRESH_ADAPTER = "_fresh_adapter"
ADAPTER_COPY = "_frozen_adapter_copy"
WEIGHTS_DTYPE = "_weights_dtype"


def keys_of_script(model: Any, args: Any, peft_config: Any) -> dict[str, Any]:
    """Says what a TRL script does in Axolotl's keys, so that one rule decides for both.

    Three private keys say what Axolotl has no key for: whether an adapter in memory is fresh, whether TRL will keep a
    frozen copy of it, and the dtype of the weights.

    Args:
        model: What is given to ``DPOTrainer``: a name, a model, or a PEFT model.
        args: TRL's ``DPOConfig``.
        peft_config: What is given as ``peft_config``, or ``None``.
    """
    init = dict(getattr(args, "model_init_kwargs", None) or {})
    return {
        "rl": "dpo",
        "base_model": model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or None,
        "revision_of_model": init.get("revision"),
        WEIGHTS_DTYPE: _script_dtype(model, init),
        **_quantization_keys(model, init),
        **_adapter_keys(model, peft_config),
        "bf16": args.bf16,
        "fp16": args.fp16,
        "micro_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "sequence_len": args.max_length,
        "num_epochs": args.num_train_epochs,
        "max_steps": args.max_steps,
        "optimizer": getattr(args.optim, "value", args.optim),
        "gradient_checkpointing": args.gradient_checkpointing,
        "dpo_loss_type": args.loss_type,
        "dpo_use_liger_kernel": bool(getattr(args, "use_liger_kernel", False)),
        "trl": {"sync_ref_model": bool(getattr(args, "sync_ref_model", False))},
        **_sharding_keys(args),
    }


def _script_dtype(model: Any, init: Mapping[str, Any]) -> str:
    if not isinstance(model, str):
        return str(model.dtype)
    # TRL loads a model that is given by name in float32 (trl/trainer/utils.py: create_model_from_path).
    return str(init.get("dtype") or init.get("torch_dtype") or "float32")


def _quantization_keys(model: Any, init: Mapping[str, Any]) -> dict[str, Any]:
    asked = init.get("quantization_config")
    return {
        key: bool(
            init.get(key)
            or getattr(asked, key, False)
            or (isinstance(asked, Mapping) and asked.get(key))
            or getattr(model, f"is_{key.replace('load_', 'loaded_')}", False)
        )
        for key in _QUANTIZED_BYTES
    }


def _adapter_keys(model: Any, peft_config: Any) -> dict[str, Any]:
    given = getattr(model, "peft_config", None)
    if given is None and peft_config is None:
        return {"adapter": None}
    adapter = next(iter(given.values())) if given else peft_config
    is_lora = str(getattr(adapter.peft_type, "value", adapter.peft_type)).upper() == "LORA"
    keys = {
        "adapter": "lora" if is_lora else str(getattr(adapter.peft_type, "value", adapter.peft_type)).lower(),
        "lora_r": getattr(adapter, "r", None),
        "lora_target_modules": _names(getattr(adapter, "target_modules", None)),
        "lora_modules_to_save": _names(getattr(adapter, "modules_to_save", None)),
    }
    if given is None:
        return {**keys, "peft_init_lora_weights": getattr(adapter, "init_lora_weights", None)}
    from axolotl_dpo_ext.reference.identity import is_fresh_adapter

    # The weights themselves tell, whatever the configuration says of how they once began.
    fresh = is_fresh_adapter(model)
    init = getattr(adapter, "init_lora_weights", None)
    # TRL copies the adapter, unless PEFT can't (trl/trainer/dpo_trainer.py, peft#3340).
    copied = not fresh and is_lora and not getattr(adapter, "target_parameters", None)
    return {**keys, "peft_init_lora_weights": None if copied else init, FRESH_ADAPTER: fresh, ADAPTER_COPY: copied}


def _names(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | list | tuple) else value


def _sharding_keys(args: Any) -> dict[str, Any]:
    """Returns what the arguments, or else `accelerate launch` through the environment, say of DeepSpeed and FSDP."""
    environment = os.environ
    deepspeed = getattr(args, "deepspeed", None)
    if deepspeed is None and environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        deepspeed = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") or {
            "zero_optimization": {"stage": int(stage) if stage.isdigit() else 2}
        }
    fsdp = None
    if getattr(args, "fsdp", None) or environment.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        efficient = environment.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() == "true"
        fsdp = {"cpu_ram_efficient_loading": efficient, **(getattr(args, "fsdp_config", None) or {})}
    return {"deepspeed": deepspeed, "fsdp_config": fsdp}


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key)
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    return value if usable and value is not None else default


def _accumulation(config: Mapping[str, Any], micro_batch: float) -> int:
    # Axolotl works it out of `batch_size` where only that is set (utils/config: normalize_config).
    return int(_number(config, "gradient_accumulation_steps", _number(config, "batch_size", 0) // micro_batch or 1))


def _is_fresh(config: Mapping[str, Any]) -> bool:
    """Whether switching the adapter off gives the model that training starts from: a LoRA at zero, nothing else."""
    return (
        config.get("adapter") in ("lora", "qlora")
        and config.get("peft_init_lora_weights") in _ZERO_INIT
        and not config.get("lora_model_dir")
        and bool(config.get(FRESH_ADAPTER, True))
    )


def _losses(config: Mapping[str, Any]) -> tuple[str, ...]:
    if config.get("rl") == "ipo":
        return ("ipo",)
    given = config.get("dpo_loss_type") or "sigmoid"
    return (given,) if isinstance(given, str) else tuple(str(loss) for loss in given)


def _checkpoints(config: Mapping[str, Any]) -> bool:
    fsdp = config.get("fsdp_config")
    in_fsdp = isinstance(fsdp, Mapping) and (
        fsdp.get("activation_checkpointing") or fsdp.get("fsdp_activation_checkpointing")
    )
    return bool(config.get("gradient_checkpointing") or config.get("activation_offloading") or in_fsdp)


def _half_precision(config: Mapping[str, Any]) -> bool:
    return any(config.get(key) for key in ("bf16", "bfloat16", "fp16", "float16"))


# Sharding


def _sharding(config: Mapping[str, Any], bytes_per_parameter: float) -> Sharding:
    world = int(os.environ.get("WORLD_SIZE") or 1)
    fsdp = config.get("fsdp_config") or ({} if config.get("fsdp") else None)
    if isinstance(fsdp, Mapping):
        efficient = fsdp.get("cpu_ram_efficient_loading") or fsdp.get("fsdp_cpu_ram_efficient_loading")
        return Sharding(
            stage=3,
            devices=int(_number(config, "dp_shard_size", world)),
            optimizer_on_host=bool(fsdp.get("offload_params") or fsdp.get("fsdp_offload_params")),
            whole_at_start=not _true(efficient),
        )
    if not config.get("deepspeed"):
        return Sharding(devices=world)
    zero = _zero(config["deepspeed"])
    stage = zero.get("stage")
    stage = stage if isinstance(stage, int) else 0
    offload = zero.get("offload_optimizer")
    return Sharding(
        stage=stage,
        devices=world,
        master_weights=bytes_per_parameter <= 2,
        optimizer_on_host=isinstance(offload, Mapping) and offload.get("device") in ("cpu", "nvme"),
        whole_at_start=stage < 3,
    )


def _true(value: Any) -> bool:
    return value.lower() == "true" if isinstance(value, str) else bool(value)


def _zero(deepspeed: Any) -> Mapping[str, Any]:
    """Returns DeepSpeed's ``zero_optimization``, as far as its configuration can be read."""
    content = deepspeed
    if isinstance(deepspeed, str | os.PathLike):
        content = _read_json(Path(deepspeed))
        named = re.search(r"zero([0-3])", os.path.basename(deepspeed))
        if content is None and named:
            return {"stage": int(named[1])}
    found = content.get("zero_optimization") if isinstance(content, Mapping) else None
    return found if isinstance(found, Mapping) else {}


# Device


def _device(needed: bool) -> Device:
    """Looks at the device. Without a size to compare with there is no need to, nor to import torch for it."""
    processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    host = _host_memory() // processes
    if not needed:
        return Device(None, None, host)
    import torch

    if not torch.cuda.is_available():
        return Device(None, None, host)
    # The first device, not this process's: every rank must see the same.
    found = torch.cuda.get_device_properties(0)
    return Device(str(found.name), int(found.total_memory), host)


def _host_memory() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # "max" where the container has no limit
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return memory


# The checkpoint


def _checkpoint_folder(name: str | None, revision: Any) -> Path | None:
    """Returns a checkpoint's folder on this machine; a name on the hub counts once it has been downloaded."""
    if name is None:
        return None
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def _model_shape(folder: Path, config: Mapping[str, Any]) -> ModelShape | None:
    try:
        return _read_model_shape(folder, config)
    # Whatever is wrong with a checkpoint is told where it is loaded: here it only means that there are no figures.
    except Exception:
        return None


def _read_model_shape(folder: Path, config: Mapping[str, Any]) -> ModelShape | None:
    from axolotl_dpo_ext.reference.weights import weight_files

    # A hub checkpoint's config.json is there long before its weights. Only complete ones count, or a rank that starts
    # while another one downloads would decide by other figures.
    files = weight_files(folder)
    described = _read_json(folder / "config.json") or {}
    nested = described.get("text_config")
    text: Mapping[str, Any] = nested if isinstance(nested, Mapping) else described
    prequantized = "quantization_config" in described
    if prequantized or any(file.suffix != ".safetensors" for file in files):
        shapes = _meta_shapes(folder)
    else:
        shapes = {name: shape for file in files for name, shape in tensor_shapes(file).items()}
    parameters = sum(math.prod(shape) for shape in shapes.values())
    vocabulary, hidden = _first(text, "vocab_size"), _first(text, "hidden_size", "n_embd", "d_model")
    layers = _first(text, "num_hidden_layers", "n_layer", "num_layers")
    if not all((parameters, vocabulary, hidden, layers)):
        return None
    loaded = sum(file.stat().st_size for file in files) / parameters if prequantized else None
    return ModelShape(
        parameters=parameters,
        in_layers=sum(math.prod(shape) for name, shape in shapes.items() if _LAYER.search(name)),
        trainable=_adapter_parameters(shapes, config, vocabulary) if config.get("adapter") else parameters,
        active_share=_active_share(shapes, text, parameters),
        vocabulary=vocabulary,
        hidden=hidden,
        layers=layers,
        bytes_per_parameter=loaded or _loaded_bytes(config, described),
    )


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Reads the names and shapes of the tensors in a safetensors file from its header.

    Args:
        file: The file.

    Raises:
        ValueError: It has no such header.
    """
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > file.stat().st_size:
            raise ValueError(f"{file} is no safetensors file")
        header = json.loads(opened.read(length))
    return {name: tuple(facts["shape"]) for name, facts in header.items() if name != "__metadata__"}


def _meta_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Builds the model without memory, where the files do not tell its parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    described = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(described)  # type: ignore[no-untyped-call]
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _first(described: Mapping[str, Any], *names: str) -> int:
    return int(next((described[name] for name in names if described.get(name)), 0))


def _loaded_bytes(config: Mapping[str, Any], described: Mapping[str, Any]) -> float:
    quantized = next((size for key, size in _QUANTIZED_BYTES.items() if config.get(key)), None)
    if quantized is not None:
        return quantized
    asked = config.get(WEIGHTS_DTYPE)
    if asked is None:
        # Axolotl loads in the dtype it trains in (utils/config: resolve_dtype).
        return 2.0 if _half_precision(config) else 4.0
    name = str(asked).removeprefix("torch.")
    if name == "auto":
        name = str(described.get("dtype") or described.get("torch_dtype") or "float32")
    return _DTYPE_BYTES.get(name, 4.0)


def _active_share(shapes: Mapping[str, tuple[int, ...]], text: Mapping[str, Any], parameters: int) -> float:
    """Returns what ``bandwidth.active_fraction`` returns for the loaded model."""
    experts = _first(text, "num_local_experts", "num_experts", "n_routed_experts")
    used = _first(text, "num_experts_per_tok")
    if not experts or not used:
        return 1.0
    routed = sum(math.prod(shape) for name, shape in shapes.items() if re.search(r"\bexperts\b", name))
    return float(1 - routed / parameters * (1 - used / experts))


def _adapter_parameters(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], vocabulary: int) -> int:
    """Counts a LoRA's parameters: its rank times the sides of every matrix that it is put beside."""
    rank = int(_number(config, "lora_r", 8))
    targets = config.get("lora_target_modules")
    named = tuple(targets) if isinstance(targets, list) and not config.get("lora_target_linear") else None
    count = 0
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        is_layer = len(shape) == 2 and vocabulary not in shape and _LAYER.search(name)
        if is_layer and (named is None or module.endswith(named)):
            count += rank * sum(shape)
    return count


# What is stored already


def _stored_rows(config: Mapping[str, Any], folder: Path) -> int:
    """Counts stored answers of the same weights; 0 where telling would mean to hash a large checkpoint first."""
    if config.get("adapter") and not _is_fresh(config):
        return 0  # a continued adapter is part of the reference, and only loading it tells which it is
    from axolotl_dpo_ext.reference.store import store_root
    from axolotl_dpo_ext.reference.weights import weight_files, weights_digest

    root = store_root(_reference_setting(config, "store"))
    stores = list(_stores_of_files(root))
    if not stores:
        return 0
    try:
        if not all(_digest_is_cheap(file, root) for file in weight_files(folder)):
            return 0
        weights = f"files:{weights_digest(str(folder), remember_in=root)}"
    except (RunStopped, OSError, ValueError):
        return 0
    return sum(_rows_of(path) for path, stored in stores if stored == weights)


def _reference_setting(config: Mapping[str, Any], name: str) -> Any:
    """Returns a key of ``dpo_ext.reference``, where both are mappings."""
    found: Any = config.get("dpo_ext")
    for key in ("reference", name):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _stores_of_files(root: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(root.glob("*/identity.json")):
        content = _read_json(path) or {}
        identity = content.get("identity")
        weights = identity.get("weights") if isinstance(identity, Mapping) else None
        if isinstance(identity, Mapping) and identity.get("adapter") is None and str(weights).startswith("files:"):
            yield path.parent, str(weights)


def _digest_is_cheap(file: Path, root: Path) -> bool:
    """Whether ``weights_digest`` need not hash much: the file is small, its name is its digest, or it is remembered."""
    target = file.resolve()
    facts = target.stat()
    if facts.st_size <= _HASHED_AT_ONCE or (file.is_symlink() and target.parent.name == "blobs"):
        return True
    entries = ((_read_json(entry) or {}) for entry in (root / "weights").glob("*.json"))
    return any(e.get("path") == str(target) and e.get("mtime_ns") == facts.st_mtime_ns for e in entries)


def _rows_of(store: Path) -> int:
    rows = 0
    for shard in store.glob("shard-*.safetensors"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, struct.error):
            rows += tensor_shapes(shard)["keys"][0]
    return rows
