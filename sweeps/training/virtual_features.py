"""Virtual features: the classifier learns of classes that its device does not hold.

A device that holds few classes unlearns the others, and its classifier first: none of its images
speaks for them. Virtual features speak for them instead. They stem from what the participants
tell the server at the beginning of a round of the features h (what the classifier sees) that x
gives their first local batches: each class's mean μ_k and one covariance Σ within the classes,
which it sends to all of them. That takes one more forward pass a round. To the mean
cross-entropy of its images a device adds

    λ·Σ_k v_dk·ℓ_k,   ℓ_k = -ln softmax_k(z_k),
    z_kj = w_j·μ_k + b_j + ½ (w_j - w_k)ᵀ Σ (w_j - w_k),

the cross-entropy of features drawn from the normal distribution N(μ_k, Σ), by its upper bound in
closed form: E ln Σ_j exp(a_j) ≤ ln Σ_j E exp(a_j) (Wang et al. 2019, arXiv 1909.12220,
proposition 1). It has a gradient for the classifier (w, b) alone. v_dk = s_d·q_k - p_dk, where
p_dk is the share of class k in the images of device d, q_k its mean over all D devices, by images
where the averages are, and s_d = max_k p_dk / q_k the least factor for which no v_dk is negative:
with λ = 1 all classes have their overall shares in what the classifier learns from, and where
every device holds those there is no term. Sharing features' normal distributions is due to Luo
et al. 2021 (CCVR, arXiv 2106.05001), who train the classifier on them after FedAvg, and Tang et
al. 2024 (FedImpro, arXiv 2402.07011), who train the upper layers on them in the local steps, as
is done here. No image leaves its device, but statistics of a few images' features do. A class
that no first batch of a round shows keeps its last mean; v_dk is 0 until there is one. The term
counts as a part of the device's loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sweeps.training.rounds import rows_of


class VirtualFeatures:
    """What is known of the features of C classes, and the devices' losses on draws of them.

    Args:
        weight: the classifier's, `[C, F]`.
        class_counts: images of each class that each of the D devices holds, D rows of C.
        device_weights: what each of the D devices counts in the overall shares.

    Attributes:
        statistics: "mean", μ, `[C, F]`; "covariance", Σ, `[F, F]`; "known", bool `[C]`.
        shares: v_dk, `[D, C]`.

    Raises:
        ValueError: the counts are not of D devices with an image each, and C classes.
    """

    def __init__(
        self,
        weight: Tensor,
        class_counts: Sequence[Sequence[int]] | None,
        device_weights: Sequence[int],
    ) -> None:
        classes, width = weight.shape
        self.statistics = {
            "mean": torch.zeros_like(weight),
            "covariance": weight.new_zeros(width, width),
            "known": torch.zeros(classes, dtype=torch.bool, device=weight.device),
        }
        self.shares = _shares(class_counts, device_weights, classes).to(weight)

    @torch.no_grad()
    def observe(self, features: Tensor, labels: Tensor) -> None:
        """Take the statistics of `[B, F]` features, of images with int64 `[B]` labels."""
        mean, known = self.statistics["mean"], self.statistics["known"]
        features = features.to(mean.dtype)
        of_class = F.one_hot(labels, mean.shape[0]).to(mean.dtype)  # [B, C]
        counts = of_class.sum(dim=0)
        seen = counts > 0
        means = of_class.T @ features / counts.clamp(min=1).unsqueeze(1)
        mean.copy_(torch.where(seen.unsqueeze(1), means, mean))
        known.logical_or_(seen)
        residuals = features - mean[labels]
        freedom = (len(features) - seen.sum()).clamp(min=1)
        torch.div(residuals.T @ residuals, freedom, out=self.statistics["covariance"])

    def losses(self, weight: Tensor, bias: Tensor, participants: Tensor) -> Tensor:
        """Each participant's Σ_k v_dk·ℓ_k, `[m]`.

        Args:
            weight: the participants' classifiers', `[m, C, F]`.
            bias: theirs, `[m, C]`.
            participants: their numbers, int64 `[m]`.
        """
        q = weight @ self.statistics["covariance"] @ weight.mT
        diagonal = q.diagonal(dim1=1, dim2=2)
        spread = diagonal.unsqueeze(1) - 2 * q + diagonal.unsqueeze(2)
        logits = (weight @ self.statistics["mean"].T).mT + bias.unsqueeze(1) + spread / 2
        losses = -logits.log_softmax(dim=2).diagonal(dim1=1, dim2=2)  # [m, C]
        shares = rows_of(participants, self.shares) * self.statistics["known"]
        return (shares * losses).sum(dim=1)


def _shares(
    class_counts: Sequence[Sequence[int]] | None, device_weights: Sequence[int], classes: int
) -> Tensor:
    """v_dk, float64 `[D, C]`."""
    counts = torch.tensor([list(row) for row in class_counts or ()], dtype=torch.float64)
    num_devices = len(device_weights)
    if counts.shape != (num_devices, classes) or not (counts.sum(dim=1) > 0).all():
        raise ValueError(
            f"class_counts of shape {list(counts.shape)} are not accepted with virtual features; "
            f"accepted: numbers of images of {num_devices} devices by {classes} classes, "
            "at least one image a device"
        )
    p = counts / counts.sum(dim=1, keepdim=True)
    of_device = torch.tensor(list(device_weights), dtype=torch.float64)
    q = of_device @ p / of_device.sum()
    # A class that no device holds has no share anywhere: 0 / 1.
    least = (p / torch.where(q > 0, q, 1.0)).amax(dim=1, keepdim=True)
    return (least * q - p).clamp(min=0)
