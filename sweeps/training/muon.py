"""Muon: every matrix takes steps that are equally long in all directions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sweeps.training.optimizers import SGD

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b and c of the polynomial, the authors'."""

ITERATIONS = 5
"""How often it is applied, theirs too."""


class Muon(SGD):
    """Momentum orthogonalised by Newton-Schulz iterations, Jordan et al. 2024.

    For each matrix W `[m, n]` with gradient G, from B = 0, as in kellerjordan.github.io/posts/muon;
    a convolution `[out, in, k, k]` is a matrix `[out, in k k]`:

    - B ← μ B + G;
    - O = `orthogonalised(B)`, with `nesterov` that of G + μ B;
    - W ← W - γ (√max(1, m / n) O + β W), with the group's `lr` γ and `weight_decay` β.

    That is `torch.optim.Muon`, which takes parameters of two dimensions alone and orthogonalises
    them in bfloat16, which many CPUs emulate.

    Groups with `matrices = False` are for all else, the classifier included: the authors have it,
    as scales and biases, trained by another optimizer. They take steps of `torch.optim.SGD`.

    `stacked` parameters hold those of D networks, `[D, ...]`, each of which takes steps of its own.

    Args:
        params: groups of parameters; one may have every argument but `dtype` of its own.
        lr: γ.
        momentum: μ, or the momentum of SGD.
        weight_decay: β, or the L2 penalty of SGD.
        nesterov: Nesterov's form of the momentum.
        matrices: whether a group's parameters are matrices.
        dtype: what they are orthogonalised in; None is their own.
        stacked: whether the parameters hold those of several networks.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        matrices: bool = True,
        dtype: torch.dtype | None = None,
        stacked: bool = False,
    ) -> None:
        self._dtype = dtype
        self._stacked = stacked
        self._usual = {"momentum": momentum, "nesterov": nesterov, "matrices": matrices}
        super().__init__(params, lr=lr, weight_decay=weight_decay, fused=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters, with arguments of their own where the group has some."""
        group = self._usual | param_group
        group["orthogonal_momentum"] = group["momentum"]
        group["orthogonal_nesterov"] = group["nesterov"]
        if group["matrices"]:
            # SGD takes what is orthogonalised as it is.
            group |= {"momentum": 0.0, "nesterov": False}
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step; parameters without a gradient stay. Nothing waits for the device.

        The gradients of the matrices are overwritten by what SGD takes as their steps.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["matrices"]:
                self._orthogonalise(group)
        super().step()
        return loss

    def _orthogonalise(self, group: dict[str, Any]) -> None:
        weights: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        if not weights:
            return
        gradients: list[Tensor] = [p.grad for p in weights if p.grad is not None]
        directions = self._with_momentum(
            weights, gradients, group["orthogonal_momentum"], nesterov=group["orthogonal_nesterov"]
        )
        # Those of one shape at once: a small matrix takes a GPU no time beside the call.
        alike: dict[tuple[int, int], list[int]] = {}
        for index, weight in enumerate(weights):
            matrix = weight[0] if self._stacked else weight
            alike.setdefault((len(matrix), matrix[0].numel()), []).append(index)
        for (rows, columns), indices in alike.items():
            stack = torch.stack([directions[i].reshape(-1, rows, columns) for i in indices])
            steps = orthogonalised(stack.flatten(0, 1).to(self._dtype or stack.dtype))
            steps = steps * max(1.0, rows / columns) ** 0.5
            for i, step in zip(indices, steps.to(stack.dtype).view_as(stack), strict=True):
                gradients[i].copy_(step.view_as(gradients[i]))


def orthogonalised(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices near 1 and keep their singular vectors.

    Of each matrix M = U S Vᵀ: X = M / |M|, then five times X ← a X + (b A + c A²) X with
    A = X Xᵀ. That applies the odd polynomial a s + b s³ + c s⁵ to the singular values; with the
    authors' coefficients those above about 0.01 end between 0.68 and 1.14, smaller ones below 1.21.
    Zeros stay zeros.

    Args:
        matrices: `[N, m, n]`.

    Returns:
        `[N, m, n]`, of the same dtype.
    """
    a, b, c = COEFFICIENTS
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.shape[1] > matrices.shape[2] else x
