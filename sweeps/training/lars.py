"""LARS: every layer takes steps in proportion to its own weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from sweeps.training.optimizers import Uncompiled


class LARS(Uncompiled):
    """Layer-wise adaptive rate scaling, You, Gitman and Ginsburg 2017 (arXiv 1708.03888).

    Algorithm 1, for each parameter w with gradient g, weight decay β and momentum m:

    - local rate λ = η |w| / (|g| + β |w|), with the trust coefficient η;
    - v ← m v + γ λ (g + β w), from v = 0, with γ the group's `lr`;
    - w ← w - v.

    Where |w| or |g| is 0, λ is 1, as in the usual implementations (NVIDIA's Apex, timm): a layer
    that starts at zero takes its first step at the full rate γ. So it is in groups with
    `layerwise = False`, which are for biases, scales and other scalars: they take steps of SGD.

    The learning rate stands within the momentum, as in the paper, and not in front of it, as in
    `torch.optim.SGD`: after a change of rate, steps taken before it keep their size. At a
    constant rate the two are the same.

    With `nesterov` the last line is w ← w - (m v + γ λ (g + β w)), as in `torch.optim.SGD`; the
    paper has none.

    Args:
        params: parameters or groups of them; a group may have `layerwise` and every other
            argument of its own.
        lr: γ.
        momentum: m.
        weight_decay: β.
        trust_coefficient: η.
        nesterov: see above.
        layerwise: whether λ is worked out or 1.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        nesterov: bool = False,
        layerwise: bool = True,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "trust_coefficient": trust_coefficient,
                "nesterov": nesterov,
                "layerwise": layerwise,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; parameters without a gradient stay. Nothing waits for the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step(group)
        return loss

    def _step(self, group: dict[str, Any]) -> None:
        weights: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        if not weights:
            return
        gradients: list[Tensor] = [p.grad for p in weights if p.grad is not None]
        steps = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
        if group["layerwise"]:
            rates = _local_rates(weights, gradients, group) * group["lr"]
            torch._foreach_mul_(steps, list(rates.unbind()))
        else:
            torch._foreach_mul_(steps, group["lr"])
        steps = self._with_momentum(weights, steps, group["momentum"], nesterov=group["nesterov"])
        torch._foreach_sub_(weights, steps)


def _local_rates(weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> Tensor:
    """λ of each parameter, `[len(weights)]`, on their device."""
    w = torch.stack(torch._foreach_norm(weights))
    g = torch.stack(torch._foreach_norm(gradients))
    rates = group["trust_coefficient"] * w / (g + group["weight_decay"] * w)
    return torch.where((w > 0) & (g > 0), rates, torch.ones_like(rates))
