"""Which parameters matter: Optuna's PED-ANOVA.

Watanabe, Bansal and Hutter, "PED-ANOVA: Efficiently Quantifying Hyperparameter Importance in
Arbitrary Subspaces", IJCAI 2023, https://arxiv.org/abs/2304.10255.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


def importance_shares(trials: Sequence[FrozenTrial], quantile: float) -> dict[str, float]:
    """How much the values of each parameter in the best trials differ from those in all of them.

    Args:
        trials: complete ones with finite values, of which the larger is better.
        quantile: the share of trials that count as the best, above 0 and at most 1.

    Returns:
        Shares by parameter that add to one; empty where all trials count as the best, as among
        those that scored alike.
    """
    import optuna

    values = sorted((trial.value for trial in trials if trial.value is not None), reverse=True)
    if not values or values[math.ceil(quantile * len(values)) - 1] == values[-1]:
        return {}
    # In memory, as the store may be read-only; without the attributes, which hold whole curves.
    study = optuna.create_study(direction="maximize")
    study.add_trials(
        optuna.trial.create_trial(
            value=trial.value, params=trial.params, distributions=trial.distributions
        )
        for trial in trials
    )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=quantile)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)
