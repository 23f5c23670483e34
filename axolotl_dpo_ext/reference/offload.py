"""A frozen reference whose weights stay in host memory.

Without an accelerator it is computed where it lies. With one, its decoder layers pass through two places on the device,
one after the other, each layer computing every micro-batch of an optimizer step before the next one comes: the weights
cross the bus once a step, however many micro-batches there are.
"""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_dpo_ext.reference.logprobs import LanguageModelHead, backbone_of, causal_model_of
from axolotl_dpo_ext.vocabulary import RunStopped

# What TRL's collator puts into a batch and TRL does not hand to the model (compute_ref_log_probs).
NOT_FOR_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
# What the part of a model that reads text understands. Anything else (images) it would drop without a word.
TEXT = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
# Every tensor starts at a multiple of this, as memory that torch allocates does: kernels load 16 bytes at a time.
ALIGNMENT = 256
# How far the two ways may be apart, as ‖difference‖ / ‖values‖. On one device the same kernels run on the same numbers,
# so nothing but a wrong order shows; between devices the rounding of a whole model does, and TF32 where it is on.
TOLERANCE_ON_ONE_DEVICE = 1e-4
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
TOLERANCE_ACROSS_DEVICES_FLOAT32 = 2e-3
ON_ANY_DEVICE = ("eager", "sdpa")


class OffloadError(RunStopped):
    """A reference cannot be computed from host memory: what was found, why it cannot work, what to use instead."""

    def __init__(self, architecture: str, found: str, reason: str, fix: str | None = None) -> None:
        fix = fix or "set `reference: precomputed`, or `reference: gpu` where a second copy fits on the device"
        super().__init__(f"reference: cpu_offload, with {architecture}: {found}\n    why: {reason}\n    fix: {fix}")


class OffloadedReference(ABC):
    """A frozen reference that leaves the accelerator's memory to the policy."""

    @abstractmethod
    def token_log_probs(self, batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """Returns the log-probability of each token of the answers.

        Args:
            batches: The micro-batches of one optimizer step, each as TRL's ``DataCollatorForPreference`` makes it:
                ``input_ids``, ``attention_mask`` and ``completion_mask`` of shape ``(B, L)``, chosen rows first.

        Returns:
            For each micro-batch the log-probabilities of ``input_ids[:, 1:]``, shape ``(B, L - 1)``, float32, on the
            batch's device; zero where ``completion_mask[:, 1:]`` is. They are what TRL's ``compute_ref_log_probs`` sums
            up. The random state is not touched.
        """


class CpuReference(OffloadedReference):
    """A reference computed on the CPU, in the dtype of its weights, by its own forward.

    Args:
        model: A ``transformers`` causal language model, or a PEFT model around one. It is frozen and set to evaluation.
    """

    def __init__(self, model: nn.Module) -> None:
        self._architecture = type(causal_model_of(model)).__name__
        self._backbone = _backbone(model)
        self._head = LanguageModelHead(model)
        _freeze(model)

    @torch.no_grad()
    def token_log_probs(self, batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """Computes one micro-batch after the other; see the base class."""
        results = []
        for batch in batches:
            work = _take(batch, torch.device("cpu"), self._architecture)
            results.append(work.log_probs(self._head, self._backbone(**work.given)))
        return results


class StreamedReference(OffloadedReference):
    """A reference whose layers pass through the device while its weights stay in page-locked host memory.

    On the device are, of the reference: two layers (one computing, one arriving, in memory taken once), for the last
    part of a call the language-model head, and at all times what little lies outside layers, embeddings and head (final
    norm, rotary frequencies). Embeddings are looked up on the CPU. A head tied to the embedding is copied like any
    other, and the copy is given back at the end of the call: for a vocabulary of 128k that is the size of two layers,
    which the policy's step can use better than the bus can use the few milliseconds. Nothing is ever copied back.

    Two tiny inputs are run at construction, layer by layer and in the model's own way, and must give the same.

    Args:
        model: A ``transformers`` causal language model on the CPU, or a PEFT model around one. It is frozen and set to
            evaluation, and belongs to this object from here on: its weights move into blocks of one layer each.
        device: Where to compute. ``cpu`` takes the same way, for tests.

    Attributes:
        copies: How many times a layer was copied to the device so far: one sweep a call, and one layer ahead.
        layer_bytes: Bytes of the largest layer.
        sweep_bytes: Bytes that one call copies: every layer, and the head.
        sweep_parameters: Number of parameters among them.
        device_bytes: Most bytes of the reference that are on the device at one time.

    Raises:
        OffloadError: The model's weights or its structure do not allow it.
    """

    def __init__(self, model: nn.Module, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._causal = causal_model_of(model)
        _refuse_weights(self._causal)
        self._walk = LayerWalk(self._causal, _backbone(model))
        self._head = LanguageModelHead(model)
        _freeze(model)
        with torch.no_grad():
            batches = _probe_batches(_config(self._causal).vocab_size)
            expected = _probe_structure(model, self._walk, batches)
            self._move_in()
            self._walk.device = self._device
            self._probe_device(batches, expected)

    def _move_in(self) -> None:
        """Packs the weights into blocks of host memory and takes the memory on the device."""
        pinned = self._device.type == "cuda"
        outside = list(_outside(self._walk.backbone, self._walk.layers))
        lookups = {id(part) for lookup in self._walk.embeddings for part in lookup.modules()}
        stays = {id(module) for module in outside}
        self._layers = [
            HostBlock([module for module in layer.modules() if id(module) not in stays], pinned)
            for layer in self._walk.layers
        ]
        self._top = HostBlock(self._walk.above, pinned)
        self._rest = HostBlock([module for module in outside if id(module) not in lookups], pinned=False)
        self._rest.attach(self._rest.home.to(self._device, copy=True))
        self.layer_bytes = max(block.bytes for block in self._layers)
        self.sweep_bytes = sum(block.bytes for block in self._layers) + self._top.bytes
        self.sweep_parameters = sum(block.parameters for block in [*self._layers, self._top])
        self.device_bytes = 2 * self.layer_bytes + self._top.bytes + self._rest.bytes
        self._side = _side_stream(self._device)
        self._places = [_Place(self.layer_bytes, self._device, self._side) for _ in range(2)]
        self._top_place: _Place | None = None
        self.copies = 0
        self._fetch(0, self._places[0])

    def _probe_device(self, batches: Sequence[Mapping[str, Tensor]], expected: Sequence[Tensor]) -> None:
        tolerance = TOLERANCE.get(_dtype(self._causal), TOLERANCE_ON_ONE_DEVICE)
        if self._device.type != "cpu" and tolerance <= TOLERANCE_ON_ONE_DEVICE:
            tolerance = TOLERANCE_ACROSS_DEVICES_FLOAT32
        for self._without_padding in (True, False):
            try:
                with _as_refusal(self._walk.architecture, f"computing its layers on {self._device}"):
                    found = self.token_log_probs(batches)
                    _compare(found, expected, tolerance, "log-probabilities of a tiny input", self._walk.architecture)
                return
            except OffloadError as error:
                refusal = error
        self._rest.attach(self._rest.home)
        raise refusal

    @torch.no_grad()
    def token_log_probs(self, batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """Computes all micro-batches in one sweep through the layers; see the base class."""
        if not batches:
            return []
        works = [_take(batch, self._device, self._walk.architecture) for batch in batches]
        if self._without_padding:
            for work in works:
                work.forget_padding()
        passages = [self._walk.enter(work.given) for work in works]
        for index in range(len(self._layers)):
            with self._layer(index):
                for passage in passages:
                    self._walk.pass_layer(index, passage)
        with self._language_model_head():
            return [
                work.log_probs(self._head, self._walk.leave(work.given, passage))
                for work, passage in zip(works, passages, strict=True)
            ]

    @contextlib.contextmanager
    def _layer(self, index: int) -> Iterator[None]:
        """Puts a layer's weights on the device, and sends for the next one's."""
        here, there = self._places
        if self._coming != index:  # an earlier call was cut short
            self._fetch(index, here)
        after = (index + 1) % len(self._layers)
        if after == 0:
            # Taken before the wrap-around, so that the head is there when the last layer is done.
            self._top_place = _Place(self._top.bytes, self._device, self._side)
            self._top_place.load(self._top)
        # After the last layer comes the first: the next call finds it there.
        self._fetch(after, there)
        here.wait()
        self._layers[index].attach(here.block)
        try:
            yield
        finally:
            self._layers[index].attach(self._layers[index].home)
            here.release()
            self._places.reverse()

    def _fetch(self, index: int, place: _Place) -> None:
        place.load(self._layers[index])
        self._coming = index
        self.copies += 1

    @contextlib.contextmanager
    def _language_model_head(self) -> Iterator[None]:
        place = self._top_place
        assert place is not None  # the last layer sent for it
        place.wait()
        self._top.attach(place.block)
        try:
            # A head inside a multimodal model looks up the ids that stand in for real ones.
            with self._walk.lookups():
                yield
        finally:
            self._top.attach(self._top.home)
            self._top_place = None


@dataclass(frozen=True)
class _Work:
    """A micro-batch as the model gets it, with the positions whose log-probabilities are wanted.

    Attributes:
        given: The model's keyword arguments, on the computing device.
        rows: Row of each position that predicts a token of an answer, shape ``(N,)``.
        columns: Its column, shape ``(N,)``.
        targets: The token that it predicts, shape ``(N,)``.
        shape: ``(B, L - 1)``.
        home: Device of the batch, and of the result.
    """

    given: dict[str, Any]
    rows: Tensor
    columns: Tensor
    targets: Tensor
    shape: torch.Size
    home: torch.device

    def forget_padding(self) -> None:
        """Gives the model a mask of ones where padding is at the ends of rows only: a causal model does not see it.

        That spares the ``(B, 1, L, L)`` masks that ``transformers`` would make, and that a sweep would hold for all
        micro-batches at once.
        """
        mask = self.given.get("attention_mask")
        if mask is not None and bool((mask[:, 1:] <= mask[:, :-1]).all()):
            self.given["attention_mask"] = torch.ones_like(mask)

    def log_probs(self, head: LanguageModelHead, outputs: Any) -> Tensor:
        """Returns the result for this micro-batch from what the backbone returned."""
        hidden = outputs.last_hidden_state[self.rows, self.columns]
        result = torch.zeros(self.shape, dtype=torch.float32, device=hidden.device)
        result[self.rows, self.columns] = head.log_probs(hidden, self.targets, outputs)
        return result.to(self.home)


def _take(batch: Mapping[str, Any], device: torch.device, architecture: str) -> _Work:
    given = {name: _to(value, device) for name, value in batch.items() if name not in NOT_FOR_THE_MODEL}
    if unknown := sorted(set(given) - set(TEXT)):
        found = f"a batch with {', '.join(unknown)}"
        raise OffloadError(architecture, found, "only the part of a model that reads text is computed from host memory")
    ids: Tensor = given["input_ids"]
    given["use_cache"] = False
    wanted = batch["completion_mask"][:, 1:].to(device) != 0
    rows, columns = wanted.nonzero(as_tuple=True)
    return _Work(given, rows, columns, ids[rows, columns + 1], wanted.shape, batch["input_ids"].device)


class HostBlock:
    """The weights of some modules in one block of host memory, and where on the device they are used.

    Args:
        modules: The modules; their own parameters and buffers, not those of modules within.
        pinned: Whether the memory is page-locked, so that copies from it can run beside computation.

    Attributes:
        home: The block, uint8.
        bytes: Its size.
        parameters: Number of parameters in it.
    """

    def __init__(self, modules: Iterable[nn.Module], pinned: bool) -> None:
        self._tensors: list[tuple[Tensor, int, int]] = []
        self.bytes = self.parameters = 0
        for tensor in _own_tensors(modules):
            size = tensor.numel() * tensor.element_size()
            self._tensors.append((tensor, self.bytes, size))
            self.bytes += -(-size // ALIGNMENT) * ALIGNMENT
            self.parameters += tensor.numel() if isinstance(tensor, nn.Parameter) else 0
        self.home = torch.empty(self.bytes, dtype=torch.uint8, pin_memory=pinned)
        for tensor, start, size in self._tensors:
            _view(self.home, tensor, start, size).copy_(tensor.data)
        self.attach(self.home)

    def attach(self, block: Tensor) -> None:
        """Makes the modules compute with a block that has the contents of ``home``, or is about to have them.

        Args:
            block: uint8, at least ``bytes`` long, on any device.
        """
        for tensor, start, size in self._tensors:
            # `.data`, not another parameter: whoever holds the tensor too (a tied embedding) keeps holding it.
            tensor.data = _view(block, tensor, start, size)


def _view(block: Tensor, like: Tensor, start: int, size: int) -> Tensor:
    return block[start : start + size].view(like.dtype).view(like.shape)


def _own_tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    for module in modules:
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None:
                found[id(tensor)] = tensor
    return list(found.values())


def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


class _Place:
    """Memory on the device for one block, with the events that say when it may be read and when written.

    The host never waits: the two streams wait for each other's events. Without a stream everything is in order anyway.
    """

    def __init__(self, size: int, device: torch.device, side: torch.cuda.Stream | None) -> None:
        self.block = torch.empty(size, dtype=torch.uint8, device=device)
        self._side = side
        if side is not None:
            # Should the memory be given back while a copy is still under way, nobody else gets it before its end.
            self.block.record_stream(side)
            self._loaded = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._free = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # Whoever had this memory before may still be computing with it.
        self.release()

    def load(self, source: HostBlock) -> None:
        """Copies a block to the device as soon as nothing computes with what is there."""
        if self._side is not None:
            self._side.wait_event(self._free)
        with torch.cuda.stream(self._side):  # no change of stream for None
            self.block[: source.bytes].copy_(source.home, non_blocking=True)
        if self._side is not None:
            self._loaded.record(self._side)

    def wait(self) -> None:
        """Lets whatever is computed from here on wait for the copy."""
        if self._side is not None:
            torch.cuda.current_stream(self._side.device).wait_event(self._loaded)

    def release(self) -> None:
        """Lets the next copy wait for whatever was computed up to here."""
        if self._side is not None:
            self._free.record(torch.cuda.current_stream(self._side.device))


@dataclass
class _Passage:
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
        count = int(_config(causal).num_hidden_layers)
        self.layers = list(_decoder_layers(self.architecture, backbone, count))
        self.embeddings = [part for part in _outside(backbone, self.layers) if isinstance(part, nn.Embedding)]
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

    def enter(self, given: Mapping[str, Any]) -> _Passage:
        """Computes what comes before the layers.

        Args:
            given: The backbone's keyword arguments.
        """
        passage = _Passage(torch.empty(0))

        def recorder(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs.pop(self._first[index])
                self._check_order(index, passage, hidden)
                passage.hidden = hidden
                passage.calls.append((args[1:], kwargs))
                return self._returned(hidden)

            return forward

        replaced = [(layer, recorder(index)) for index, layer in enumerate(self.layers)]
        with _forwards(replaced), self.lookups(passage.embedded):
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
                there = {name: _to(value, where) for name, value in kwargs.items()}
                found: Tensor = looked_up(*(_to(value, where) for value in args), **there)
                if record is not None:
                    record.append((found.shape, found.dtype))
                return found.to(self.device)

            return forward

        with _forwards([(embedding, lookup(embedding)) for embedding in self.embeddings]):
            yield

    def pass_layer(self, index: int, passage: _Passage) -> None:
        """Takes an input through one layer.

        Args:
            index: The layer.
            passage: The input; its hidden states are replaced.
        """
        args, kwargs = passage.calls[index]
        output = self.layers[index](passage.hidden, *args, **kwargs)
        passage.hidden = output[0] if isinstance(output, tuple) else output

    def leave(self, given: Mapping[str, Any], passage: _Passage) -> Any:
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

        with _forwards([*((layer, arrived) for layer in self.layers), *((one, nothing) for one in self.embeddings)]):
            return self.backbone(**given)

    def _returned(self, hidden: Tensor) -> Any:
        return (hidden, *[None] * (self._tuple - 1)) if self._tuple else hidden

    def _check_order(self, index: int, passage: _Passage, hidden: Tensor) -> None:
        if index != len(passage.calls):
            found = f"layer {len(passage.calls)} was expected to run, and layer {index} of {len(self.layers)} did"
            raise OffloadError(self.architecture, found, "streaming needs each layer to run once, in order")
        if index and hidden is not passage.hidden:
            found = f"hidden states are changed between layers {index - 1} and {index}"
            raise OffloadError(self.architecture, found, "streaming runs the layers without what is between them")


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@contextlib.contextmanager
def _forwards(replacements: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Gives modules another forward for a while; hooks and whatever else surrounds it stay."""
    before: list[tuple[nn.Module, Any]] = []
    try:
        for module, forward in replacements:
            before.append((module, module.__dict__.get("forward")))
            module.forward = forward
        yield
    finally:
        for module, own in reversed(before):
            if own is None:
                del module.forward
            else:
                module.forward = own


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


def _outside(module: nn.Module, layers: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """Yields a module and those within it that are reached on a way around the layers."""
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


def _backbone(model: nn.Module) -> nn.Module:
    try:
        return backbone_of(model)
    except TypeError as error:
        reason = "logits are computed for the answers only, from what its backbone returns"
        raise OffloadError(type(model).__name__, str(error), reason) from error


def _config(causal: Any) -> Any:
    return causal.config.get_text_config()


def _freeze(model: nn.Module) -> None:
    model.eval()
    model.requires_grad_(False)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _refuse_weights(model: nn.Module) -> None:
    architecture = type(model).__name__
    if getattr(model, "is_quantized", False):
        found = f"quantised weights ({getattr(model, 'quantization_method', None) or 'is_quantized'})"
        _refuse_quantised(architecture, found)
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            _refuse_quantised(architecture, f"{name} is a {type(parameter).__name__} of {parameter.dtype}")
        if parameter.device.type != "cpu" or hasattr(parameter, "ds_id"):
            where = "partitioned by DeepSpeed ZeRO-3" if hasattr(parameter, "ds_id") else f"on {parameter.device}"
            raise OffloadError(
                architecture,
                f"{name} is {where}",
                "the weights are streamed from this process's host memory, so all of them must be there",
                "load the reference with device_map='cpu' and outside of DeepSpeed's zero.Init",
            )


def _refuse_quantised(architecture: str, found: str) -> None:
    raise OffloadError(
        architecture,
        found,
        "quantised weights carry state beside their tensors, which copying the tensors leaves behind",
        "load the reference unquantised for cpu_offload, or set `reference: precomputed` or `reference: gpu`",
    )


def _probe_batches(vocabulary: int) -> list[dict[str, Tensor]]:
    # Two shapes: what one layer leaves behind for another shows as soon as a second micro-batch comes between them.
    generator = torch.Generator().manual_seed(0)
    batches = []
    for length in (12, 9):
        mask = torch.ones(2, length, dtype=torch.long)
        mask[1, -3:] = 0
        answers = mask.clone()
        answers[:, : length // 3] = 0
        ids = torch.randint(vocabulary, (2, length), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": mask, "completion_mask": answers})
    return batches


def _probe_structure(model: nn.Module, walk: LayerWalk, batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """Runs inputs in the model's own way and layer by layer, both on the CPU, and compares the hidden states.

    Returns:
        The log-probabilities that the model's own way gives, as ``token_log_probs`` returns them.
    """
    expected: list[Tensor] = []
    hidden: list[Tensor] = []
    given: list[dict[str, Any]] = []
    with _attention_of_any_device(causal_model_of(model)), _as_refusal(walk.architecture, "running its layers in turn"):
        for batch in batches:
            inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask")}
            given.append({**inputs, "use_cache": False})
            logits, states = walk.observe(model, given[-1])
            log_probs = logits[:, :-1].float().log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
            expected.append(log_probs * batch["completion_mask"][:, 1:])
            hidden.append(states * batch["attention_mask"][..., None])
        passages = [walk.enter(one) for one in given]
        for index in range(len(walk.layers)):
            for passage in passages:
                walk.pass_layer(index, passage)
        found = [
            walk.leave(one, passage).last_hidden_state * one["attention_mask"][..., None]
            for one, passage in zip(given, passages, strict=True)
        ]
    _compare(found, hidden, TOLERANCE_ON_ONE_DEVICE, "hidden states of a tiny input", walk.architecture)
    return expected


@contextlib.contextmanager
def _attention_of_any_device(causal: nn.Module) -> Iterator[None]:
    """Lets a model whose attention is made for GPUs (FlashAttention) run on the CPU."""
    config = _config(causal)
    before = config._attn_implementation
    if before not in ON_ANY_DEVICE:
        config._attn_implementation = "sdpa" if getattr(causal, "_supports_sdpa", False) else "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


@contextlib.contextmanager
def _as_refusal(architecture: str, doing: str) -> Iterator[None]:
    """Turns what goes wrong in a probe into a refusal; running out of memory is no trait of a model, and stays."""
    try:
        yield
    except (OffloadError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        found = f"{doing} failed with {type(error).__name__}: {error}"
        reason = "a layer depends on more than its arguments, or on a tensor that is neither parameter nor buffer"
        raise OffloadError(architecture, found, reason) from error


def _compare(
    found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, what: str, architecture: str
) -> None:
    left, right = (torch.cat([part.float().flatten() for part in parts]) for parts in (found, expected))
    apart = float((left - right).norm() / right.norm())
    if not apart <= tolerance:  # so that NaN is refused too
        seen = f"the {what} are {apart:.1e} apart (relative) from what the model's own forward gives"
        reason = f"at most {tolerance:.0e} is allowed: a layer seems to depend on more than its arguments"
        raise OffloadError(architecture, seen, reason)
