"""Which parameters matter: Optuna's PED-ANOVA.

Watanabe, Bansal and Hutter, "PED-ANOVA: Efficiently Quantifying Hyperparameter Importance in
Arbitrary Subspaces", IJCAI 2023, https://arxiv.org/abs/2304.10255.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


def importance_shares(store: BaseStorage, study_name: str, quantile: float) -> dict[str, float]:
    """How much the values of each parameter in the best trials differ from those in all of them.

    Args:
        store: of the study; nothing is written.
        study_name: one with complete trials, of which the larger value is better.
        quantile: the share of complete trials that count as the best, above 0 and at most 1.

    Returns:
        Shares by parameter that add to one; empty where all trials count as the best, as among
        those that scored alike.
    """
    import optuna
    from optuna.trial import TrialState

    study = optuna.load_study(study_name=study_name, storage=store)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    values = sorted((trial.value for trial in complete if trial.value is not None), reverse=True)
    if not values or values[math.ceil(quantile * len(values)) - 1] == values[-1]:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=quantile)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)
