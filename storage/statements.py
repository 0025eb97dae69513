"""The SQL statements on a trial's state and lease: :mod:`storage.trial_table` runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from storage.leases import LEASE_ATTR

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Executable, Select, Table
    from sqlalchemy.engine import Connection

FIXED = "fixed_params"
"""Optuna's system attribute of a trial whose parameters are given, not suggested."""

_CANDIDATES = 32


class Statements:
    """The statements, built once: building takes longer than running."""

    def __init__(self, dialect: str) -> None:
        from optuna.storages._rdb import models
        from optuna.trial import TrialState
        from sqlalchemy import and_, bindparam, delete, func, insert, select, update

        self.trials: Table = models.TrialModel.__table__
        self.attrs: Table = models.TrialSystemAttributeModel.__table__
        self._waiting: dict[tuple[int, ...], Select[Any]] = {}
        self._finished: dict[tuple[int, ...], Select[Any]] = {}
        studies: Table = models.StudyModel.__table__
        user_attrs: Table = models.TrialUserAttributeModel.__table__
        values: Table = models.TrialValueModel.__table__
        params: Table = models.TrialParamModel.__table__
        steps: Table = models.TrialIntermediateValueModel.__table__
        trials, attrs = self.trials, self.attrs
        one: Any = bindparam("id")
        of_studies: Any = bindparam("studies", expanding=True)
        is_one = trials.c.trial_id == one
        is_lease = and_(attrs.c.trial_id == one, attrs.c.key == LEASE_ATTR)
        lease = attrs.c.value_json
        with_lease = trials.outerjoin(
            attrs, and_(attrs.c.trial_id == trials.c.trial_id, attrs.c.key == LEASE_ATTR)
        )

        started = trials.c.datetime_start
        self.running = (
            select(trials.c.study_id, trials.c.trial_id, trials.c.number, started, lease)
            .select_from(with_lease)
            .where(trials.c.study_id.in_(of_studies), trials.c.state == TrialState.RUNNING)
        )
        self.totals = (
            select(trials.c.study_id, func.count())
            .where(trials.c.study_id.in_(of_studies))
            .group_by(trials.c.study_id)
        )
        self.state_and_lease = select(trials.c.state, lease).select_from(with_lease).where(is_one)
        self.lease = select(lease).where(is_lease)
        self.locked_lease = (
            select(trials.c.state, lease)
            .join_from(attrs, trials, attrs.c.trial_id == trials.c.trial_id)
            .where(is_lease)
            .with_for_update(of=attrs)
        )
        self.locked_study = (
            select(studies.c.study_id).where(studies.c.study_id == one).with_for_update()
        )
        self.total = select(func.count()).where(trials.c.study_id == one)
        self.numbered = select(trials.c.trial_id).where(
            trials.c.study_id == one, trials.c.number == bindparam("number")
        )
        self.add_trial = insert(trials).values(state=TrialState.RUNNING)
        self.take = (
            update(trials)
            .where(is_one, trials.c.state == TrialState.WAITING)
            .values(state=TrialState.RUNNING, datetime_start=bindparam("started"))
        )
        self.finish = (
            update(trials)
            .where(is_one, trials.c.state == TrialState.RUNNING)
            .values(state=bindparam("to"), datetime_complete=bindparam("completed"))
        )
        self.set_lease = update(attrs).where(is_lease).values(value_json=bindparam("new"))
        self.swap_lease = self.set_lease.where(lease == bindparam("old"))
        self.add_attr = insert(attrs)
        self.add_value = insert(values).values(
            objective=0, value_type=models.TrialValueModel.TrialValueType.FINITE
        )
        self.marked = (
            select(trials.c.trial_id)
            .join_from(user_attrs, trials, user_attrs.c.trial_id == trials.c.trial_id)
            .where(
                trials.c.study_id == bindparam("study"),
                user_attrs.c.key == bindparam("key"),
                user_attrs.c.value_json == bindparam("text"),
            )
        )
        self.fixed = (
            select(trials.c.trial_id)
            .join_from(attrs, trials, attrs.c.trial_id == trials.c.trial_id)
            .where(
                trials.c.study_id == bindparam("study"),
                attrs.c.key == FIXED,
                attrs.c.value_json == bindparam("text"),
            )
        )
        self.param_names = select(params.c.param_name).where(params.c.trial_id == one)
        self.add_params = insert(params)
        self.forget_steps = delete(steps).where(
            steps.c.trial_id == one, steps.c.step > bindparam("after")
        )
        self.set_step = Upsert(
            dialect, steps, ("trial_id", "step"), ("intermediate_value", "intermediate_value_type")
        )
        self.finite_step = models.TrialIntermediateValueModel.TrialIntermediateValueType.FINITE
        self.set_attr = Upsert(dialect, attrs, ("trial_id", "key"), ("value_json",))
        self.set_user_attr = Upsert(dialect, user_attrs, ("trial_id", "key"), ("value_json",))

    def _below_budget(self, studies: Sequence[int]) -> ColumnElement[bool]:
        from sqlalchemy import and_, bindparam, or_

        columns = self.trials.c
        return or_(
            *[
                and_(columns.study_id == study, columns.number < bindparam(f"budget_{study}"))
                for study in studies
            ]
        )

    def waiting(self, studies: tuple[int, ...]) -> Select[Any]:
        """Those below the budgets, the lowest numbers first."""
        from optuna.trial import TrialState
        from sqlalchemy import select

        if studies not in self._waiting:
            columns = self.trials.c
            self._waiting[studies] = (
                select(columns.number, columns.study_id, columns.trial_id)
                .where(columns.state == TrialState.WAITING, self._below_budget(studies))
                .order_by(columns.number)
                .limit(_CANDIDATES + len(studies))
            )
        return self._waiting[studies]

    def finished(self, studies: tuple[int, ...]) -> Select[Any]:
        """How many below the budgets are finished."""
        from optuna.trial import TrialState
        from sqlalchemy import func, select

        if studies not in self._finished:
            states = [state for state in TrialState if state.is_finished()]
            self._finished[studies] = select(func.count()).where(
                self.trials.c.state.in_(states), self._below_budget(studies)
            )
        return self._finished[studies]


class Upsert:
    """Inserts a row, or changes the one that has the same keys.

    Args:
        dialect: SQLAlchemy's name of the database.
        table: one with a unique index on the keys.
        keys: columns.
        columns: what changes.
    """

    def __init__(
        self, dialect: str, table: Table, keys: Sequence[str], columns: Sequence[str]
    ) -> None:
        from sqlalchemy import and_, bindparam, insert, update

        self._at_once: Executable | None = None
        is_it = and_(*[table.c[key] == bindparam(f"its_{key}") for key in keys])
        new: dict[str, Any] = {name: bindparam(f"new_{name}") for name in columns}
        self._keys, self._columns = keys, columns
        self._insert, self._update = insert(table), update(table).where(is_it).values(**new)
        if dialect in ("mysql", "mariadb"):
            from sqlalchemy.dialects import mysql

            add = mysql.insert(table)
            changes = {name: add.inserted[name] for name in columns}
            self._at_once = add.on_duplicate_key_update(**changes)
        elif dialect in ("sqlite", "postgresql"):
            from sqlalchemy.dialects import postgresql, sqlite

            offered = (sqlite if dialect == "sqlite" else postgresql).insert(table)
            self._at_once = offered.on_conflict_do_update(
                index_elements=list(keys), set_={name: offered.excluded[name] for name in columns}
            )

    def run(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Store rows, each with all keys and columns."""
        if not rows:
            return
        if self._at_once is not None:
            connection.execute(self._at_once, rows)
            return
        for row in rows:
            renamed = {f"its_{key}": row[key] for key in self._keys}
            renamed |= {f"new_{name}": row[name] for name in self._columns}
            if connection.execute(self._update, renamed).rowcount == 0:
                connection.execute(self._insert, row)


def budgets(studies: Sequence[tuple[int, int]]) -> dict[str, int]:
    """What :meth:`Statements.waiting` and :meth:`Statements.finished` are run with.

    Args:
        studies: (Optuna's id, budget) of each.
    """
    return {f"budget_{study}": budget for study, budget in studies}
