"""Weights in blocks of host memory, and places on the device that one block after another is copied to."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Every tensor starts at a multiple of this, as memory that torch allocates does: kernels load 16 bytes at a time.
ALIGNMENT = 256


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


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Returns a stream to copy on beside computation, or ``None`` for a device without streams."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


class Place:
    """Memory on the device for one block, with the events that say when it may be read and when written.

    The host never waits: the two streams wait for each other's events. Without a stream everything is in order anyway.

    Args:
        size: Bytes of the largest block that comes here.
        device: Where the memory is.
        side: The stream that copies, as ``side_stream`` returns it.

    Attributes:
        block: The memory, uint8.
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
        """Copies a block to the device as soon as nothing computes with what is there.

        Args:
            source: At most as large as this place.
        """
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
