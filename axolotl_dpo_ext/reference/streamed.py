"""A reference whose decoder layers pass through two places on the device, one after the other.

Each layer computes every micro-batch of an optimizer step before the next one comes: the weights cross the bus once a
step, however many micro-batches there are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from axolotl_dpo_ext.reference.host_memory import HostBlock, Place, side_stream
from axolotl_dpo_ext.reference.layer_walk import LayerWalk, around_layers
from axolotl_dpo_ext.reference.logprobs import LanguageModelHead, causal_model_of, text_config
from axolotl_dpo_ext.reference.offload import MicroBatch, OffloadedReference, OffloadError, backbone_to_offload, freeze
from axolotl_dpo_ext.reference.streaming_checks import (
    failures_refused,
    probe_batches,
    probe_structure,
    refuse_difference,
    refuse_weights,
    tolerance_of,
)


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
        refuse_weights(self._causal)
        self._walk = LayerWalk(self._causal, backbone_to_offload(model))
        self._head = LanguageModelHead(model)
        freeze(model)
        with torch.no_grad():
            batches = probe_batches(text_config(self._causal).vocab_size)
            expected = probe_structure(model, self._walk, batches)
            self._move_in()
            self._walk.device = self._device
            self._probe_device(batches, expected)

    def _move_in(self) -> None:
        """Packs the weights into blocks of host memory and takes the memory on the device."""
        pinned = self._device.type == "cuda"
        outside = list(around_layers(self._walk.backbone, self._walk.layers))
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
        self._side = side_stream(self._device)
        self._places = [Place(self.layer_bytes, self._device, self._side) for _ in range(2)]
        self._top_place: Place | None = None
        self.copies = 0
        self._fetch(0, self._places[0])

    def _probe_device(self, batches: Sequence[Mapping[str, Tensor]], expected: Sequence[Tensor]) -> None:
        architecture = self._walk.architecture
        tolerance = tolerance_of(next(self._causal.parameters()).dtype, self._device)
        for self._without_padding in (True, False):
            try:
                with failures_refused(architecture, f"computing its layers on {self._device}"):
                    found = self.token_log_probs(batches)
                    refuse_difference(found, expected, tolerance, "log-probabilities of a tiny input", architecture)
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
        works = [MicroBatch.of(batch, self._device, self._walk.architecture) for batch in batches]
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
            self._top_place = Place(self._top.bytes, self._device, self._side)
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

    def _fetch(self, index: int, place: Place) -> None:
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
