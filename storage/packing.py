"""A training state as one block of bytes and a short text, and back.

``torch.save`` calls back into Python for every name, number and tensor of a state: that of a small
network takes milliseconds, in which nobody else can run Python. A packed one is two objects.

The block holds the tensors' elements one after the other, each with its strides, so that a tensor
comes back laid out as it was. The text is JSON: a number, a text, a truth value or null stands for
itself, everything else is a list that says first what it is.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_MARK = "sweep:packed"
_VERSION = 1

_ALIGNMENT = 64
_PLAIN = (str, int, float, bool, type(None))


class Packer:
    """Packs states, one after the other, into the same memory.

    The memory is that of the state's tensors, on the CPU.
    """

    def __init__(self) -> None:
        self._block: torch.Tensor | None = None
        # As long as they have the same shapes, tensors go where those before them went.
        self._table: list[Any] = []
        self._places = ""
        self._slots: list[torch.Tensor] = []

    def pack(self, state: dict[str, Any]) -> Packed:
        """Copy a state; whatever becomes of it, the copy stays as it is until the next call.

        Args:
            state: as of :meth:`storage.checkpoints.CheckpointStore.save`.
        """
        import torch

        walk = _Walk(torch.Tensor)
        layout = walk.node(state)
        tensors = walk.tensors
        gpu = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        table = [(t.dtype, t.shape, t.stride()) for t in tensors]
        if self._block is None or table != self._table:
            self._place(tensors, pinned=gpu is not None)
            self._table = table
        assert self._block is not None
        if tensors:
            with torch.no_grad():
                torch._foreach_copy_(self._slots, tensors, non_blocking=True)
        copied = None
        if gpu is not None:
            # What a training does next comes after the copies in the GPU's queue.
            copied = torch.cuda.Event(blocking=True)
            copied.record(torch.cuda.current_stream(gpu))
        return Packed(layout, self._places, self._block, walk.others, copied)

    def _place(self, tensors: Sequence[torch.Tensor], *, pinned: bool) -> None:
        places, size = [], 0
        for tensor in tensors:
            places.append((tensor.dtype, size, list(tensor.shape), _strides(tensor)))
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._block, self._slots = None, []  # before there is another
        self._block = _memory(size, pinned=pinned)
        self._slots = [_slot(self._block, *place) for place in places]
        named = [[str(dtype).removeprefix("torch."), *place] for dtype, *place in places]
        self._places = json.dumps(named, separators=(",", ":"))


class Packed:
    """A state that was packed; see :class:`Packer`."""

    def __init__(
        self,
        layout: Any,
        places: str,
        block: torch.Tensor,
        others: list[Any],
        copied: torch.cuda.Event | None,
    ) -> None:
        self._layout, self._places, self._block, self._others = layout, places, block, others
        self._copied = copied

    def content(self) -> dict[str, Any]:
        """Return what is to be saved, once the copies are complete; from any thread."""
        if self._copied is not None:
            self._copied.synchronize()
        return {
            _MARK: _VERSION,
            "layout": json.dumps(self._layout, separators=(",", ":")),
            "tensors": self._places,
            "block": self._block,
            "others": self._others,
        }


def unpack(content: dict[str, Any]) -> dict[str, Any]:
    """Return the state that was packed; what was not is returned as it is.

    Args:
        content: as loaded. It may come from anywhere.

    Raises:
        Exception: it is not what :class:`Packer` makes.
    """
    if _MARK not in content:
        return content
    if content[_MARK] != _VERSION:
        raise ValueError(f"its layout is version {content[_MARK]}; accepted: {_VERSION}")
    reader = _Reader(content["block"], json.loads(content["tensors"]), content["others"])
    state = reader.value(json.loads(content["layout"]))
    if not isinstance(state, dict):
        raise ValueError(f"holds a {type(state).__name__}, not a dict")
    return state


class _Walk:
    """Goes through a state and lays it out.

    Attributes:
        tensors: those that go into the block.
        others: copies of what does not.
    """

    def __init__(self, tensor: type[torch.Tensor]) -> None:
        self._tensor = tensor
        self.tensors: list[torch.Tensor] = []
        self.others: list[Any] = []

    def node(self, value: Any) -> Any:
        """Return what stands for a value in the text."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is dict:
            return ["dict", *self._pairs(value)]
        if kind is self._tensor and _is_packed(value):
            self.tensors.append(value)
            return ["tensor", len(self.tensors) - 1]
        if kind is OrderedDict:
            # A module's state has its versions as an attribute.
            return ["ordered", self.node(vars(value)), *self._pairs(value)]
        if kind is list:
            return ["list", *map(self.node, value)]
        if kind is tuple:
            return ["tuple", *map(self.node, value)]
        kept = value.detach().clone() if isinstance(value, self._tensor) else copy.deepcopy(value)
        self.others.append(kept)
        return ["other", len(self.others) - 1]

    def _pairs(self, value: dict[Any, Any]) -> list[Any]:
        parts = [part for item in value.items() for part in item]
        return [part if type(part) in _PLAIN else self.node(part) for part in parts]


class _Reader:
    """Builds a state from its layout."""

    def __init__(self, block: torch.Tensor, places: list[Any], others: list[Any]) -> None:
        import torch

        self._others = others
        self._tensors = []
        end = 0
        for name, at, shape, strides in places:
            dtype = getattr(torch, name)
            # No byte is read twice: a state is no larger than its file.
            if not end <= at <= (end := at + math.prod(shape) * dtype.itemsize) <= block.numel():
                raise ValueError(f"it has a tensor at the bytes {at} to {end}")
            # A copy of its own: a part of the block would keep all of that in memory.
            self._tensors.append(_slot(block, dtype, at, shape, strides).clone())

    def value(self, node: Any) -> Any:
        """Return what a node of the text stands for."""
        if type(node) in _PLAIN:
            return node
        kind, *parts = node
        if kind == "tensor":
            return self._tensors[parts[0]]
        if kind == "other":
            return self._others[parts[0]]
        if kind == "ordered":
            attributes, *parts = parts
            ordered = OrderedDict(self._pairs(parts))
            vars(ordered).update(self.value(attributes))
            return ordered
        if kind == "dict":
            return dict(self._pairs(parts))
        if kind in ("list", "tuple"):
            values = [self.value(part) for part in parts]
            return values if kind == "list" else tuple(values)
        raise ValueError(f"it has a {str(kind)[:40]!r}")

    def _pairs(self, parts: list[Any]) -> list[tuple[Any, Any]]:
        values = [self.value(part) for part in parts]
        return list(zip(values[::2], values[1::2], strict=True))


def _is_packed(tensor: torch.Tensor) -> bool:
    import torch

    place = tensor.device.type in ("cpu", "cuda")
    return place and tensor.layout is torch.strided and not tensor.is_quantized


def _strides(tensor: torch.Tensor) -> list[int]:
    """Return a tensor's strides where its elements fill their memory, else those of its shape."""
    given = list(tensor.stride())
    if tensor.is_contiguous():
        return given
    if tensor.permute(sorted(range(len(given)), key=lambda d: -given[d])).is_contiguous():
        return given
    strides, step = [], 1
    for size in reversed(tensor.shape):
        strides.append(step)
        step *= max(size, 1)
    return strides[::-1]


def _slot(
    block: torch.Tensor, dtype: torch.dtype, at: int, shape: Sequence[int], strides: Sequence[int]
) -> torch.Tensor:
    """Return a part of the block as a tensor."""
    end = at + math.prod(shape) * dtype.itemsize
    return block[at:end].view(dtype).as_strided(shape, strides)


def _memory(size: int, *, pinned: bool) -> torch.Tensor:
    import torch

    if pinned:
        # A GPU copies into it by itself, at several times the rate.
        with contextlib.suppress(RuntimeError):  # there may be too little of it
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return torch.empty(size, dtype=torch.uint8)
