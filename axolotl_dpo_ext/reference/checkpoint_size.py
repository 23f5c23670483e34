"""The size of a checkpoint on this machine, from its configuration and the headers of its weight files.

Nothing is downloaded, and no weight is read.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl_dpo_ext.reference.json_files import read_json
from axolotl_dpo_ext.reference.run_keys import WEIGHTS_DTYPE, half_precision, number

_DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float64": 8.0}
# 4 bits and a float32 scale for 64 values (NF4); LLM.int8 keeps one scale a row.
QUANTIZED_BYTES = {"load_in_4bit": 4.5 / 8, "load_in_8bit": 1.0}
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


def checkpoint_folder(name: str | None, revision: Any) -> Path | None:
    """Returns a checkpoint's folder on this machine; a name on the hub counts once it has been downloaded.

    Args:
        name: A folder, or a name on the hub.
        revision: The revision on the hub, if any is asked for.
    """
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


def model_shape(folder: Path, config: Mapping[str, Any]) -> ModelShape | None:
    """Returns the size of a checkpoint, or ``None`` where its files do not tell.

    Args:
        folder: The checkpoint's folder.
        config: The run's keys: they say how it is loaded and what is trained.
    """
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
    described = read_json(folder / "config.json") or {}
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


def _first(described: Mapping[str, Any], *names: str) -> int:
    return int(next((described[name] for name in names if described.get(name)), 0))


def _loaded_bytes(config: Mapping[str, Any], described: Mapping[str, Any]) -> float:
    quantized = next((size for key, size in QUANTIZED_BYTES.items() if config.get(key)), None)
    if quantized is not None:
        return quantized
    asked = config.get(WEIGHTS_DTYPE)
    if asked is None:
        # Axolotl loads in the dtype it trains in (utils/config: resolve_dtype).
        return 2.0 if half_precision(config) else 4.0
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
    rank = int(number(config, "lora_r", 8))
    targets = config.get("lora_target_modules")
    named = tuple(targets) if isinstance(targets, list) and not config.get("lora_target_linear") else None
    count = 0
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        is_layer = len(shape) == 2 and vocabulary not in shape and _LAYER.search(name)
        if is_layer and (named is None or module.endswith(named)):
            count += rank * sum(shape)
    return count
