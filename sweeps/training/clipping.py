"""Adaptive gradient clipping: no unit's gradient is long beside the unit's own weights.

Brock et al. 2021 (arXiv 2102.06171), section 4.1, equation 3: row i of a layer's gradient G
becomes

    G_i * min(1, λ * max(|W_i|, ε) / |G_i|), with ε = 1e-3.

A row is what makes one output: of a convolution `[out, in, k, k]` or a matrix `[out, in]` all
that belongs to one index of the first dimension. Parameters of at most one dimension, scales,
biases and Fixup's scalars, are one unit each, as in the authors' code and in timm. What starts
at zero begins with steps of λε and grows by them.

The paper leaves the network's last linear layer out; which one that is, the caller knows.
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
        pairs: parameters with their gradients, of one shape each.
        factor: λ.
        stacked: whether the first dimension counts devices, each with units of its own.
    """
    for parameter, gradient in pairs:
        limit = _unit_norms(parameter, stacked).clamp_(min=EPSILON).mul_(factor)
        # A gradient of zero gives infinity, which is 1 after the clamp.
        gradient.mul_(limit.div_(_unit_norms(gradient, stacked)).clamp_(max=1.0))


def _unit_norms(tensor: Tensor, stacked: bool) -> Tensor:
    """The units' norms, in a shape that multiplies with `tensor`."""
    first = int(stacked)
    if tensor.ndim - first >= 2:
        first += 1
    if tensor.ndim == first:  # a number of each device
        return tensor.abs()
    inner = tuple(range(first, tensor.ndim))
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=inner, keepdim=True)
    return norms
