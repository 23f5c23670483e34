"""The decoder layers of a model, found and run one at a time, for several inputs side by side."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_dpo_ext.reference.forwards import replaced_forwards
from axolotl_dpo_ext.reference.logprobs import causal_model_of, text_config
from axolotl_dpo_ext.reference.offload import OffloadError, to_device


@dataclass
class Passage:
    """A micro-batch on its way through the layers.

    Attributes:
        hidden: Its hidden states.
        calls: For each layer what it is given beside them.
        embedded: Shape and dtype of what each embedding lookup gave.
    """

    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    embedded: list[tuple[torch.Size, torch.dtype]] = field(default_factory=list)


class LayerWalk:
    """Runs the decoder layers of a model in an order of one's own, for several inputs side by side.

    What a layer is given beside hidden states (masks, positions) is recorded from the backbone's own forward, in which
    each layer hands on what it got. The backbone's forward runs once more at the end, with the last layer's result for
    what the layers return: what an architecture does before and after its layers is its own code.

    Args:
        causal: The causal language model.
        backbone: The part of it below the head.

    Attributes:
        architecture: Name of the model's class.
        device: Where everything but the embedding lookups happens; whoever changes it moves the weights.
        backbone: As given.
        layers: The decoder layers.
        above: The modules outside the backbone that text goes through, as seen by ``observe``.
        embeddings: The lookups outside the layers; they happen on the CPU.

    Raises:
        OffloadError: No decoder layers are found.
    """

    def __init__(self, causal: nn.Module, backbone: nn.Module) -> None:
        self.device = torch.device("cpu")
        self.architecture = type(causal).__name__
        self.backbone = backbone
        count = int(text_config(causal).num_hidden_layers)
        self.layers = list(_decoder_layers(self.architecture, backbone, count))
        self.embeddings = [part for part in around_layers(backbone, self.layers) if isinstance(part, nn.Embedding)]
        self.above: list[nn.Module] = []
        self._first = [next(iter(inspect.signature(layer.forward).parameters)) for layer in self.layers]
        self._tuple = 0

    def observe(self, model: nn.Module, given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Runs a model in its own way and takes note of how its layers return, and of what runs above its backbone.

        Args:
            model: The causal language model, or a PEFT model around it.
            given: Its keyword arguments.

        Returns:
            The logits, and the backbone's hidden states.

        Raises:
            OffloadError: The layers return neither a tensor nor a tuple that begins with one.
        """
        below = {id(module) for module in self.backbone.modules()}
        above = [module for module in causal_model_of(model).modules() if id(module) not in below]
        ran: dict[int, nn.Module] = {}
        states: list[Tensor] = []
        hooks = [self.backbone.register_forward_hook(lambda _, __, output: states.append(output.last_hidden_state))]
        hooks += [layer.register_forward_hook(lambda _, __, output: self._note_form(output)) for layer in self.layers]
        hooks += [part.register_forward_hook(lambda part, _, __: ran.update({id(part): part})) for part in above]
        try:
            logits = model(**given).logits
        finally:
            for hook in hooks:
                hook.remove()
        self.above = list(ran.values())
        return logits, states[-1]

    def _note_form(self, output: Any) -> None:
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            self._tuple = len(output)
        elif not isinstance(output, Tensor):
            found = f"its layers return {type(output).__name__}"
            raise OffloadError(self.architecture, found, "it is not known where in it the hidden states are")

    def enter(self, given: Mapping[str, Any]) -> Passage:
        """Computes what comes before the layers.

        Args:
            given: The backbone's keyword arguments.
        """
        passage = Passage(torch.empty(0))

        def recorder(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs.pop(self._first[index])
                self._check_order(index, passage, hidden)
                passage.hidden = hidden
                passage.calls.append((args[1:], kwargs))
                return self._returned(hidden)

            return forward

        replaced = [(layer, recorder(index)) for index, layer in enumerate(self.layers)]
        with replaced_forwards(replaced), self.lookups(passage.embedded):
            self.backbone(**given)
        self._check_order(len(self.layers), passage, passage.hidden)
        return passage

    @contextlib.contextmanager
    def lookups(self, record: list[tuple[torch.Size, torch.dtype]] | None = None) -> Iterator[None]:
        """Looks embeddings up where they are, and brings what is found to the device.

        Args:
            record: Where to note the shape and dtype of each lookup.
        """

        def lookup(embedding: nn.Module) -> Callable[..., Tensor]:
            looked_up = embedding.forward

            def forward(*args: Any, **kwargs: Any) -> Tensor:
                where = next(embedding.parameters()).device
                there = {name: to_device(value, where) for name, value in kwargs.items()}
                found: Tensor = looked_up(*(to_device(value, where) for value in args), **there)
                if record is not None:
                    record.append((found.shape, found.dtype))
                return found.to(self.device)

            return forward

        with replaced_forwards([(embedding, lookup(embedding)) for embedding in self.embeddings]):
            yield

    def pass_layer(self, index: int, passage: Passage) -> None:
        """Takes an input through one layer.

        Args:
            index: The layer.
            passage: The input; its hidden states are replaced.
        """
        args, kwargs = passage.calls[index]
        output = self.layers[index](passage.hidden, *args, **kwargs)
        passage.hidden = output[0] if isinstance(output, tuple) else output

    def leave(self, given: Mapping[str, Any], passage: Passage) -> Any:
        """Computes what comes after the layers.

        Args:
            given: The backbone's keyword arguments, again.
            passage: The input behind the last layer.

        Returns:
            What the backbone returns.
        """
        embedded = iter(passage.embedded)

        def nothing(*args: Any, **kwargs: Any) -> Tensor:
            # Nobody asks for the embeddings any more: zeros without memory, and without waiting for the device.
            shape, dtype = next(embedded)
            return torch.zeros((), dtype=dtype, device=self.device).expand(shape)

        def arrived(*args: Any, **kwargs: Any) -> Any:
            return self._returned(passage.hidden)

        replaced = [*((layer, arrived) for layer in self.layers), *((one, nothing) for one in self.embeddings)]
        with replaced_forwards(replaced):
            return self.backbone(**given)

    def _returned(self, hidden: Tensor) -> Any:
        return (hidden, *[None] * (self._tuple - 1)) if self._tuple else hidden

    def _check_order(self, index: int, passage: Passage, hidden: Tensor) -> None:
        if index != len(passage.calls):
            found = f"layer {len(passage.calls)} was expected to run, and layer {index} of {len(self.layers)} did"
            raise OffloadError(self.architecture, found, "streaming needs each layer to run once, in order")
        if index and hidden is not passage.hidden:
            found = f"hidden states are changed between layers {index - 1} and {index}"
            raise OffloadError(self.architecture, found, "streaming runs the layers without what is between them")


def _decoder_layers(architecture: str, backbone: nn.Module, count: int) -> nn.ModuleList:
    lists = {name: part for name, part in backbone.named_modules() if isinstance(part, nn.ModuleList)}
    found: dict[str, nn.ModuleList] = {}
    for name, part in lists.items():
        # A layer may hold as many experts as the model holds layers.
        if len(part) == count and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = part
    if len(found) != 1:
        seen = ", ".join(f"{name} ({len(part)})" for name, part in list(lists.items())[:8]) or "none"
        raise OffloadError(
            architecture,
            f"{len(found)} lists of {count} modules (num_hidden_layers) in its backbone, not one; module lists: {seen}",
            "it is not known which of its modules are the decoder layers",
        )
    return next(iter(found.values()))


def around_layers(module: nn.Module, layers: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """Yields a module and those within it that are reached on a way around the layers.

    Args:
        module: The module that holds the layers.
        layers: The decoder layers.
    """
    skipped = {id(layer) for layer in layers}
    seen: set[int] = set()
    waiting = [module]
    while waiting:
        part = waiting.pop()
        if id(part) in skipped or id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        waiting.extend(part.children())
