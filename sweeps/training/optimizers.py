"""PyTorch's optimizers without its compiler.

`torch.optim` tells `torch.compile` to keep off its methods, and for that imports the compiler when
an optimizer is made: more than a second of every worker's start, and some 85 MB in each. Nothing
is compiled here. What the methods do is the same: those within PyTorch's wrappers are called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_load_state_dict: Callable[..., None] = inspect.unwrap(Optimizer.load_state_dict)
_sgd_step: Callable[..., Any] = inspect.unwrap(torch.optim.SGD.step)


class Uncompiled(Optimizer):
    """An optimizer whose methods do not import the compiler."""

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, on another device or in another layout as well."""
        _load_state_dict(self, state_dict)
        for p, kept in self.state.items():
            for name, value in kept.items():
                # Fused steps go through memory place by place; of another layout than the
                # weight's, momentum would meet other weights.
                if isinstance(value, Tensor) and value.shape == p.shape:
                    kept[name] = torch.empty_like(p).copy_(value)

    def _with_momentum(
        self, weights: Sequence[Tensor], steps: list[Tensor], momentum: float, *, nesterov: bool
    ) -> list[Tensor]:
        """Take steps v in, from V = 0: V ← m V + v; return V, or with `nesterov` v + m V.

        V is kept in the parameters' state as `momentum_buffer`, and `steps` are overwritten or
        given back: what is returned is to be read only.
        """
        if not momentum:
            return steps
        for p in weights:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        velocities: list[Tensor] = [self.state[p]["momentum_buffer"] for p in weights]
        torch._foreach_mul_(velocities, momentum)
        torch._foreach_add_(velocities, steps)
        if not nesterov:
            return velocities
        torch._foreach_add_(steps, velocities, alpha=momentum)
        return steps


class SGD(Uncompiled, torch.optim.SGD):
    """`torch.optim.SGD`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step."""
        return _sgd_step(self, closure)
