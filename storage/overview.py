"""What trials have come to, without their curves: by five statements, however long they trained.

Optuna reads a study with every step of every trial, as objects: seconds for some thousand trials.
A look at how far they are needs of each trial its state, value, parameters and last step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from storage.engine import sql_engine
from storage.readers import READ_ONLY_OPTION
from storage.statements import FIXED

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage
    from sqlalchemy import Select
    from sqlalchemy.engine import Engine

    from storage.remote import RemoteTrialTable


@dataclass(frozen=True)
class TrialOverview:
    """One trial, as plain values that are JSON.

    Attributes:
        number: Optuna's, within the study.
        state: the name of its `optuna.trial.TrialState`.
        value: the objective, or None. It may be infinite.
        step: the last step that was reported, or None.
        last: what was reported for it, or None. It may be infinite or no number.
        params: its parameters; before a worker has suggested any, those it was enqueued with.
        user_attrs: those that were asked for, where it has them.
        system_attrs: the same, of a running trial; empty for any other.
    """

    number: int
    state: str
    value: float | None
    step: int | None
    last: float | None
    params: Mapping[str, Any]
    user_attrs: Mapping[str, Any]
    system_attrs: Mapping[str, Any]

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return self.state not in ("RUNNING", "WAITING")


class OverviewReader:
    """Reads the trials of studies, all as of one moment and without a lock, as often as asked.

    A trial that has ended stays as it is, so those before the first that has not are read once.

    Args:
        storage: from :func:`storage.engine.open_storage`.
        user_attrs: keys of the user attributes to read of each trial.
        running_attrs: keys of the system attributes to read of each running trial.
    """

    def __init__(
        self,
        storage: BaseStorage,
        *,
        user_attrs: Sequence[str] = (),
        running_attrs: Sequence[str] = (),
    ) -> None:
        self._storage = storage
        self._user_attrs = list(user_attrs)
        self._running_attrs = list(running_attrs)
        # Study → trial id → what it had come to.
        self._known: dict[int, dict[int, TrialOverview]] = {}

    def read(self, study_ids: Iterable[int]) -> dict[int, list[TrialOverview]]:
        """Return for each study its trials by number; a study that does not exist has none.

        Raises:
            StorageError: the storage is neither a database nor one that `sweep serve` serves.
        """
        ids = list(study_ids)
        known = {study_id: self._known.get(study_id, {}) for study_id in ids}
        unfinished = [
            trial_id
            for its in known.values()
            for trial_id, trial in its.items()
            if not trial.finished
        ]
        last = max((trial_id for its in known.values() for trial_id in its), default=-1)
        since = min(unfinished, default=last + 1)
        found = self._read(ids, since, known)
        if found is None:  # as where a long transaction has just added trials of earlier ids
            found = self._read(ids, 0, {study_id: {} for study_id in ids})
        assert found is not None
        self._known = found
        return {
            study_id: sorted(its.values(), key=lambda trial: trial.number)
            for study_id, its in found.items()
        }

    def _read(
        self, ids: list[int], since: int, known: Mapping[int, Mapping[int, TrialOverview]]
    ) -> dict[int, dict[int, TrialOverview]] | None:
        """What is known before an id, and what is read from there on; None if that is not all."""
        claims: RemoteTrialTable | None = getattr(self._storage, "claims", None)
        asked = (ids, since, self._user_attrs, self._running_attrs)
        if claims is not None:
            totals, rows = claims.overview(*asked)
        else:
            totals, rows = overview_rows(sql_engine(self._storage), *asked)
        found = {
            study_id: {trial_id: its[trial_id] for trial_id in its if trial_id < since}
            for study_id, its in known.items()
        }
        for study_id, trial_id, *row in rows:
            found[study_id][trial_id] = TrialOverview(*row)
        counted = {row[0]: row[1] for row in totals}
        whole = all(len(its) == counted.get(study_id, 0) for study_id, its in found.items())
        return found if whole or since == 0 else None


def overview_rows(
    engine: Engine,
    study_ids: Sequence[int],
    since: int,
    user_attrs: Sequence[str],
    running_attrs: Sequence[str],
) -> tuple[list[list[int]], list[list[Any]]]:
    """Read what :class:`OverviewReader` needs, as JSON.

    Args:
        engine: of Optuna's database.
        study_ids: Optuna's own.
        since: the lowest trial id of which to read.
        user_attrs: keys, as of the reader.
        running_attrs: the same.

    Returns:
        Pairs of study and how many trials it has; and a row for each trial: study, trial id, then
        the attributes of :class:`TrialOverview` in their order.
    """
    from optuna.storages._rdb.models import TrialIntermediateValueModel, TrialValueModel

    asked = {
        "studies": list(study_ids),
        "since": since,
        "user_attrs": list(user_attrs),
        "system_attrs": [*running_attrs, FIXED],
    }
    to_value = TrialValueModel.stored_repr_to_value
    to_step = TrialIntermediateValueModel.stored_repr_to_intermediate_value
    with engine.connect().execution_options(**_one_moment(engine)) as connection:
        totals, trials, params, user, system = (
            list(connection.execute(query, asked)) for query in _queries()
        )
    rows: dict[int, list[Any]] = {}
    for study_id, trial_id, number, state, value, kind, step, last, last_kind in trials:
        rows[trial_id] = [
            study_id,
            trial_id,
            number,
            state.name,
            None if kind is None else to_value(value, kind),
            step,
            None if last_kind is None else to_step(last, last_kind),
            {},
            {},
            {},
        ]
    for trial_id, name, value, text in params:
        rows[trial_id][-3][name] = _distribution(text).to_external_repr(value)
    for trial_id, key, text in user:
        rows[trial_id][-2][key] = json.loads(text)
    for trial_id, key, text in system:
        row = rows[trial_id]
        if key in running_attrs:
            row[-1][key] = json.loads(text)
        elif not row[-3]:
            row[-3] = json.loads(text)
    return [list(row) for row in totals], list(rows.values())


def _one_moment(engine: Engine) -> dict[str, Any]:
    """Options of a connection whose statements all see the store as the first one does."""
    options: dict[str, Any] = {READ_ONLY_OPTION: True}
    if engine.dialect.name == "postgresql":  # SQLite and MySQL do so by themselves
        options["isolation_level"] = "REPEATABLE READ"
    return options


@lru_cache(maxsize=256)
def _distribution(text: str) -> BaseDistribution:
    from optuna.distributions import json_to_distribution

    return json_to_distribution(text)


@lru_cache(maxsize=1)
def _queries() -> tuple[Select[Any], ...]:
    """How many trials there are; the trials; their parameters, user and system attributes."""
    from optuna.storages._rdb import models
    from optuna.trial import TrialState
    from sqlalchemy import and_, bindparam, func, or_, select

    trials: Any = models.TrialModel.__table__
    params: Any = models.TrialParamModel.__table__
    values: Any = models.TrialValueModel.__table__
    steps: Any = models.TrialIntermediateValueModel.__table__
    user: Any = models.TrialUserAttributeModel.__table__
    system: Any = models.TrialSystemAttributeModel.__table__
    of_studies = trials.c.study_id.in_(bindparam("studies", expanding=True))
    wanted = and_(of_studies, trials.c.trial_id >= bindparam("since"))
    of_trial = steps.alias()
    # One look into the index for each trial, where grouping would go through every step.
    last_step = (
        select(func.max(of_trial.c.step))
        .where(of_trial.c.trial_id == trials.c.trial_id)
        .scalar_subquery()
    )

    def of_trials(table: Any, *columns: Any) -> Select[Any]:
        joined = trials.join(table, table.c.trial_id == trials.c.trial_id)
        return select(trials.c.trial_id, *columns).select_from(joined).where(wanted)

    return (
        select(trials.c.study_id, func.count()).where(of_studies).group_by(trials.c.study_id),
        select(
            trials.c.study_id, trials.c.trial_id, trials.c.number, trials.c.state,
            values.c.value, values.c.value_type,
            steps.c.step, steps.c.intermediate_value, steps.c.intermediate_value_type,
        )
        .select_from(
            trials.outerjoin(
                values, and_(values.c.trial_id == trials.c.trial_id, values.c.objective == 0)
            ).outerjoin(
                steps, and_(steps.c.trial_id == trials.c.trial_id, steps.c.step == last_step)
            )
        )
        .where(wanted),
        of_trials(
            params, params.c.param_name, params.c.param_value, params.c.distribution_json
        ).order_by(params.c.param_id),
        of_trials(user, user.c.key, user.c.value_json).where(
            user.c.key.in_(bindparam("user_attrs", expanding=True))
        ),
        of_trials(system, system.c.key, system.c.value_json).where(
            system.c.key.in_(bindparam("system_attrs", expanding=True)),
            or_(trials.c.state == TrialState.RUNNING, system.c.key == FIXED),
        ),
    )  # fmt: skip
