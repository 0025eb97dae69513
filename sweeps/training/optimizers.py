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

_sgd_step: Callable[..., Any] = inspect.unwrap(torch.optim.SGD.step)


class Uncompiled(Optimizer):
    """An optimizer whose methods do not import the compiler."""

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)

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
