"""PyTorch's optimizers without its compiler.

`torch.optim` tells `torch.compile` to keep off its methods, and for that imports the compiler when
an optimizer is made: more than a second of every worker's start, and some 85 MB in each. Nothing
is compiled here. What the methods do is the same: those within PyTorch's wrappers are called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

_sgd_step: Callable[..., Any] = inspect.unwrap(torch.optim.SGD.step)


class Uncompiled(Optimizer):
    """An optimizer whose methods do not import the compiler."""

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)


class SGD(Uncompiled, torch.optim.SGD):
    """`torch.optim.SGD`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step."""
        return _sgd_step(self, closure)
