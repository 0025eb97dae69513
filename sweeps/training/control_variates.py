"""SCAFFOLD's correction of the devices' drift.

To the gradient of its loss a device d adds c - c_d (Karimireddy et al. 2020, arXiv 1910.06378,
algorithm 1), with the control variates' option II, c_d ← c_d - c + (x - y_d) / (Hη) for d in S,
then by line 17 c ← c + (m/D)·mean_{d∈S}(change of c_d), all from 0, so that c is the mean of all D
variates, whoever took part. With the paper's plain SGD at a constant rate η this makes c_d the mean
of device d's gradients over its H steps. That mean is what is kept here, since it alone still means
something under momentum (where x - y_d grows by 1 / (1 - momentum)), under Muon, and under a rate
that changes or ends at 0. The gradients are those of the local objective, L2 penalty and proximal
term included. Variates are plain means whatever w_d is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sweeps.training.rounds import rows_of


class ControlVariates:
    """c_d of all D devices, c, and the sum of each participant's gradients in this round.

    Args:
        weights: x by name.
        num_devices: D.
        devices_per_round: m.

    Attributes:
        state: "device", c_d, `[D, ...]`; "server", c; "sum", `[m, ...]`; each by name.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], num_devices: int, devices_per_round: int
    ) -> None:
        self.state = {
            "device": {name: x.new_zeros(num_devices, *x.shape) for name, x in weights.items()},
            "server": {name: torch.zeros_like(x) for name, x in weights.items()},
            "sum": {name: x.new_zeros(devices_per_round, *x.shape) for name, x in weights.items()},
        }

    @torch.no_grad()
    def correct_(
        self, name: str, gradient: Tensor, y: Tensor, weight_decay: float, participants: Tensor
    ) -> None:
        """Take the participants' gradients of one parameter in, and correct them, in place.

        Args:
            name: of the parameter.
            gradient: of the loss, `[m, ...]`.
            y: the participants' weights, `[m, ...]`.
            weight_decay: the L2 penalty that the optimizer adds.
            participants: their numbers, int64 `[m]`.
        """
        self.state["sum"][name].add_(gradient).add_(y, alpha=weight_decay)
        own = rows_of(participants, self.state["device"][name])
        gradient.add_(self.state["server"][name] - own)

    @torch.no_grad()
    def update(self, participants: Tensor, local_steps: int) -> None:
        """Set the participants' c_d to the round's mean gradients, and c to the mean of all c_d.

        Args:
            participants: their numbers, int64 `[m]`.
            local_steps: H, how many gradients `correct_` has taken in of each.
        """
        for name, total in self.state["sum"].items():
            variates = self.state["device"][name]
            variates.index_copy_(0, participants, total / local_steps)
            torch.mean(variates, dim=0, out=self.state["server"][name])
            total.zero_()
