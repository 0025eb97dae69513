"""Adaptive gradient clipping: no unit's gradient is long beside the unit's own weights.

Brock et al. 2021 (arXiv 2102.06171), section 4.1, equation 3: row i of a layer's gradient G
becomes

    G_i * min(1, λ * max(|W_i|, ε) / |G_i|), with ε = 1e-3.

A row is what makes one output: of a convolution `[out, in, k, k]` or a matrix `[out, in]` all
that belongs to one index of the first dimension. Weights that are zero begin with steps of λε and
grow by them.

The paper leaves the network's last linear layer out; which one that is, the caller knows.
Parameters of at most one dimension are left out too: norms' scales, biases, Fixup's scalars. The
equation is of weight matrices, while the authors' code and timm take such a parameter for one
unit. Here many start at zero, where that slows them: ResNet-8 with Group Normalization, whose
last scales start there, reached 0.784 that way and 0.809 with its scales left alone (means of 3
seeds on the noisy digits of `groupnorm-largebatch --quick`, batch 320, linear scaling, λ = 0.04);
with `scalar_lr_factor = 0.1` it was 0.31 and 0.81 (λ = 0.02 and 0.08).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

EPSILON = 1e-3
"""A unit's norm counts as this at least, or weights that are zero could never leave it."""


@torch.no_grad()
def clip_units_(
    pairs: Iterable[tuple[Tensor, Tensor]], factor: float, *, stacked: bool = False
) -> None:
    """Clip gradients in place.

    Args:
        pairs: parameters with their gradients, of one shape each; those of less than two
            dimensions stay as they are.
        factor: λ.
        stacked: whether the first dimension counts devices, each with units of its own.
    """
    first = 2 if stacked else 1
    for parameter, gradient in pairs:
        if parameter.ndim <= first:
            continue
        inner = tuple(range(first, parameter.ndim))
        weights, lengths = (
            torch.linalg.vector_norm(tensor, dim=inner, keepdim=True)
            for tensor in (parameter, gradient)
        )
        limits = weights.clamp_(min=EPSILON).mul_(factor)
        # A gradient of zero gives infinity, which is 1 after the clamp.
        gradient.mul_(limits.div_(lengths).clamp_(max=1.0))
