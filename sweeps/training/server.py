"""What the server of Federated Averaging makes of the devices' average.

With the weights x that all devices started from, and Δ = Σ_{d∈S} w_d·y_d - x after their local
steps, the rules are

- FedAvg (McMahan et al. 2017, arXiv 1602.05629, algorithm 1): x ← x + Δ;
- FedAvgM (Hsu, Qi and Brown 2019, arXiv 1909.06335, section 4.3): v ← βv - Δ, x ← x - ηv, from
  v = 0; the paper has η = 1;
- FedAdam (Reddi et al. 2021, arXiv 2003.00295, algorithm 2): m ← β₁m + (1 - β₁)Δ,
  v ← β₂v + (1 - β₂)Δ², x ← x + ηm / (√v + τ), from m = 0 and v = τ², without bias correction.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SERVER_OPTIMIZERS = ("sgd", "adam")


class Server:
    """Keeps the weights x, and what its rule remembers from one average to the next.

    Args:
        weights: x by name, changed in place.
        optimizer: "sgd" (FedAvg, FedAvgM) or "adam" (FedAdam).
        lr: η; FedAvg has 1.
        momentum: β of FedAvgM, β₁ of FedAdam; FedAvg has 0.
        beta2: β₂ of FedAdam.
        epsilon: τ of FedAdam.

    Attributes:
        weights: x.
        memory: m and v by name, each shaped as `weights`.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        optimizer: str,
        lr: float,
        momentum: float,
        beta2: float,
        epsilon: float,
    ) -> None:
        self.weights = weights
        self.memory: dict[str, dict[str, Tensor]] = {}
        self._adaptive = optimizer == "adam"
        self._lr = lr
        self._momentum = momentum
        self._beta2 = beta2
        self._epsilon = epsilon
        if self._adaptive:
            self.memory = {
                "m": {name: torch.zeros_like(x) for name, x in weights.items()},
                "v": {name: torch.full_like(x, epsilon**2) for name, x in weights.items()},
            }
        elif momentum:
            self.memory = {"v": {name: torch.zeros_like(x) for name, x in weights.items()}}

    @torch.no_grad()
    def step(self, means: Mapping[str, Tensor]) -> None:
        """Make new weights of the devices' average.

        Args:
            means: Σ_{d∈S} w_d·y_d by name, each shaped and typed as its weights.
        """
        for name, x in self.weights.items():
            mean = means[name]
            if self._adaptive:
                change = mean - x
                m, v = self.memory["m"][name], self.memory["v"][name]
                m.mul_(self._momentum).add_(change, alpha=1 - self._momentum)
                v.mul_(self._beta2).addcmul_(change, change, value=1 - self._beta2)
                x.addcdiv_(m, v.sqrt().add_(self._epsilon), value=self._lr)
            elif self._momentum:
                v = self.memory["v"][name]
                v.mul_(self._momentum).sub_(mean - x)
                x.sub_(v, alpha=self._lr)
            elif self._lr != 1.0:
                x.add_(mean - x, alpha=self._lr)
            else:
                x.copy_(mean)
