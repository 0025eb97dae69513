"""Optuna's tables, whole studies at a time: read in one snapshot, written under new ids.

Ids are the database's own and stand in no row of :mod:`storage.archive_rows`; they are found here
when rows are read, and given when rows are written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

from storage.archive_rows import NON_FINITE, OF_A_TRIAL, TRIAL_ID, Number, StudyRows, TrialRows
from storage.leases import LEASE_ATTR

if TYPE_CHECKING:
    from sqlalchemy import Table
    from sqlalchemy.engine import Connection

_ROWS_A_STATEMENT = 20_000

_KINDS = {text: name for name, text in NON_FINITE.items()}


class StudyTables:
    """Optuna's tables, whole studies at a time; every method is a part of its caller's
    transaction."""

    def __init__(self) -> None:
        from optuna.storages._rdb import models

        self._studies: Table = models.StudyModel.__table__
        self._directions: Table = models.StudyDirectionModel.__table__
        self._study_user: Table = models.StudyUserAttributeModel.__table__
        self._study_system: Table = models.StudySystemAttributeModel.__table__
        self._trials: Table = models.TrialModel.__table__
        self._params: Table = models.TrialParamModel.__table__
        self._values: Table = models.TrialValueModel.__table__
        self._intermediate: Table = models.TrialIntermediateValueModel.__table__
        self._user: Table = models.TrialUserAttributeModel.__table__
        self._system: Table = models.TrialSystemAttributeModel.__table__
        self._heartbeats: Table = models.TrialHeartbeatModel.__table__
        self._of_trials = (
            self._system, self._user, self._params, self._values, self._intermediate,
            self._heartbeats,
        )  # fmt: skip
        self._versions: Table = models.VersionInfoModel.__table__
        self._value_type = models.TrialValueModel.TrialValueType
        self._intermediate_type = models.TrialIntermediateValueModel.TrialIntermediateValueType

    def schema_version(self, connection: Connection) -> int:
        """The version of Optuna's tables."""
        from sqlalchemy import select

        return int(connection.execute(select(self._versions.c.schema_version)).scalar_one())

    def ids(
        self, connection: Connection, *, attr: tuple[str, str], names: Sequence[str] = ()
    ) -> list[int]:
        """The studies that have a user attribute (key, JSON text), or one of the names."""
        from sqlalchemy import or_, select

        columns, attrs = self._studies.c, self._study_user.c
        having = select(attrs.study_id).where(attrs.key == attr[0], attrs.value_json == attr[1])
        query = select(columns.study_id).where(
            or_(columns.study_id.in_(having), columns.study_name.in_(names))
        )
        return sorted(connection.execute(query).scalars())

    def lock(self, connection: Connection, study_ids: Sequence[int]) -> None:
        """Keep others from creating trials in these studies, or changing their state, until the
        transaction ends. On SQLite every writing transaction does."""
        from sqlalchemy import select

        for study_id in study_ids:
            # In the order in which a worker touches them, so that none waits for the other.
            studies, trials, system = self._studies.c, self._trials.c, self._system.c
            of_study = select(trials.trial_id).where(trials.study_id == study_id)
            for query in (
                select(studies.study_id).where(studies.study_id == study_id),
                select(system.trial_id)
                .where(system.trial_id.in_(of_study))
                .order_by(system.trial_id),
                of_study.order_by(trials.trial_id),
            ):
                connection.execute(query.with_for_update()).all()

    def running(
        self, connection: Connection, study_ids: Sequence[int]
    ) -> list[tuple[int, int, str | None]]:
        """The running trials of some studies: study, number, lease as stored."""
        from optuna.trial import TrialState
        from sqlalchemy import and_, select

        trials, system = self._trials.c, self._system.c
        is_lease = and_(system.trial_id == trials.trial_id, system.key == LEASE_ATTR)
        query = (
            select(trials.study_id, trials.number, system.value_json)
            .select_from(self._trials.outerjoin(self._system, is_lease))
            .where(trials.study_id.in_(study_ids), trials.state == TrialState.RUNNING)
            .order_by(trials.study_id, trials.number)
        )
        return [(row[0], row[1], row[2]) for row in connection.execute(query)]

    def delete(self, connection: Connection, study_ids: Sequence[int]) -> None:
        """Delete all rows of some studies."""
        from sqlalchemy import delete, select

        of_studies = select(self._trials.c.trial_id).where(self._trials.c.study_id.in_(study_ids))
        for table in self._of_trials:
            connection.execute(delete(table).where(table.c.trial_id.in_(of_studies)))
        for table in (
            self._trials, self._study_system, self._study_user, self._directions, self._studies,
        ):  # fmt: skip
            connection.execute(delete(table).where(table.c.study_id.in_(study_ids)))

    def read(self, connection: Connection, study_id: int) -> StudyRows:
        """All rows of one study."""
        from sqlalchemy import select

        columns = self._studies.c
        name = connection.execute(
            select(columns.study_name).where(columns.study_id == study_id)
        ).scalar_one()
        directions = connection.execute(
            select(self._directions.c.direction)
            .where(self._directions.c.study_id == study_id)
            .order_by(self._directions.c.objective)
        ).scalars()
        system = self._attrs_of_study(connection, self._study_system, study_id)
        of_trials: dict[int, dict[str, str]] = {}
        for key in [key for key in system if OF_A_TRIAL.fullmatch(key)]:
            trial_id = next(part for part in key.split(":") if part.isdigit())
            moved = key.replace(trial_id, TRIAL_ID, 1)
            of_trials.setdefault(int(trial_id), {})[moved] = system.pop(key)
        return StudyRows(
            name=name,
            directions=tuple(direction.name for direction in directions),
            user_attrs=self._attrs_of_study(connection, self._study_user, study_id),
            system_attrs=system,
            trials=self._read_trials(connection, study_id, of_trials),
            study_id=study_id,
        )

    def _attrs_of_study(
        self, connection: Connection, table: Table, study_id: int
    ) -> dict[str, str]:
        from sqlalchemy import select

        rows = connection.execute(
            select(table.c.key, table.c.value_json).where(table.c.study_id == study_id)
        )
        # Sorted here: databases collate differently, and equal states make equal files.
        return dict(sorted((key, text or "null") for key, text in rows))

    def _read_trials(
        self, connection: Connection, study_id: int, study_attrs: Mapping[int, dict[str, str]]
    ) -> list[TrialRows]:
        from sqlalchemy import select

        trials = self._trials.c
        found = connection.execute(
            select(
                trials.trial_id, trials.number, trials.state,
                trials.datetime_start, trials.datetime_complete,
            )
            .where(trials.study_id == study_id)
            .order_by(trials.number)
        ).all()  # fmt: skip
        of_study = select(trials.trial_id).where(trials.study_id == study_id)

        def rows(table: Table, *columns: Any, order: Any) -> Any:
            query = select(table.c.trial_id, *columns).where(table.c.trial_id.in_(of_study))
            return connection.execute(query.order_by(order))

        params: dict[int, dict[str, tuple[float, str]]] = {}
        table = self._params
        for trial_id, name, value, text in rows(
            table, table.c.param_name, table.c.param_value, table.c.distribution_json,
            order=table.c.param_id,
        ):  # fmt: skip
            params.setdefault(trial_id, {})[name] = (value, text)
        values: dict[int, list[Number]] = {}
        table = self._values
        for trial_id, value, kind in rows(
            table, table.c.value, table.c.value_type, order=table.c.objective
        ):
            values.setdefault(trial_id, []).append(NON_FINITE.get(kind.name, value))
        intermediate: dict[int, dict[int, Number]] = {}
        table = self._intermediate
        for trial_id, step, value, kind in rows(
            table, table.c.step, table.c.intermediate_value, table.c.intermediate_value_type,
            order=table.c.step,
        ):  # fmt: skip
            intermediate.setdefault(trial_id, {})[step] = NON_FINITE.get(kind.name, value)
        attrs: list[dict[int, dict[str, str]]] = []
        for table in (self._user, self._system):
            texts: dict[int, dict[str, str]] = {}
            for trial_id, key, text in rows(
                table, table.c.key, table.c.value_json, order=table.c.trial_id
            ):
                texts.setdefault(trial_id, {})[key] = text or "null"
            attrs.append(texts)
        table = self._heartbeats
        beats = {row[0]: row[1] for row in rows(table, table.c.heartbeat, order=table.c.trial_id)}
        return [
            TrialRows(
                number=number,
                state=state.name,
                started=started,
                completed=completed,
                heartbeat=beats.get(trial_id),
                params=params.get(trial_id, {}),
                values=tuple(values.get(trial_id, ())),
                intermediate=intermediate.get(trial_id, {}),
                user_attrs=dict(sorted(attrs[0].get(trial_id, {}).items())),
                system_attrs=dict(sorted(attrs[1].get(trial_id, {}).items())),
                study_attrs=study_attrs.get(trial_id, {}),
                trial_id=trial_id,
            )
            for trial_id, number, state, started, completed in found
        ]

    # --- to the database ------------------------------------------------------------------------

    def insert_study(self, connection: Connection, study: StudyRows) -> int:
        """Create a study with its trials; return its id."""
        from optuna.study import StudyDirection
        from sqlalchemy import insert

        key = connection.execute(
            insert(self._studies).values(study_name=study.name)
        ).inserted_primary_key
        assert key is not None
        study_id = int(key[0])
        self._bulk(
            connection,
            self._directions,
            [
                {"study_id": study_id, "objective": index, "direction": StudyDirection[name]}
                for index, name in enumerate(study.directions)
            ],
        )
        self.set_study_attrs(connection, study_id, user=study.user_attrs, system=study.system_attrs)
        self.insert_trials(connection, study_id, study.trials)
        return study_id

    def insert_trials(
        self, connection: Connection, study_id: int, trials: Sequence[TrialRows]
    ) -> None:
        """Create trials whose numbers are not taken; ids ascend with numbers, as Optuna's do."""
        from optuna.trial import TrialState
        from sqlalchemy import select

        trials = sorted(trials, key=lambda trial: trial.number)
        self._bulk(
            connection,
            self._trials,
            [
                {
                    "study_id": study_id,
                    "number": trial.number,
                    "state": TrialState[trial.state],
                    "datetime_start": trial.started,
                    "datetime_complete": trial.completed,
                }
                for trial in trials
            ],
        )
        columns = self._trials.c
        numbered = connection.execute(
            select(columns.number, columns.trial_id).where(columns.study_id == study_id)
        )
        ids = {row[0]: row[1] for row in numbered}
        self._insert_parts(connection, study_id, [(ids[trial.number], trial) for trial in trials])

    def replace_trial(
        self, connection: Connection, study_id: int, trial_id: int, trial: TrialRows
    ) -> None:
        """Give an existing trial the state and all the rows of another; its number stays."""
        from optuna.trial import TrialState
        from sqlalchemy import delete, update

        for table in self._of_trials:
            connection.execute(delete(table).where(table.c.trial_id == trial_id))
        connection.execute(
            update(self._trials)
            .where(self._trials.c.trial_id == trial_id)
            .values(
                state=TrialState[trial.state],
                datetime_start=trial.started,
                datetime_complete=trial.completed,
            )
        )
        self._insert_parts(connection, study_id, [(trial_id, trial)])

    def set_study_attrs(
        self,
        connection: Connection,
        study_id: int,
        *,
        user: Mapping[str, str] | None = None,
        system: Mapping[str, str] | None = None,
    ) -> None:
        """Set attributes of a study, replacing those of the same keys."""
        for table, texts in ((self._study_user, user or {}), (self._study_system, system or {})):
            self._set_attrs(connection, table, table.c.study_id, study_id, texts)

    def set_trial_attrs(
        self,
        connection: Connection,
        study_id: int,
        trial_id: int,
        *,
        user: Mapping[str, str] | None = None,
        system: Mapping[str, str] | None = None,
        study: Mapping[str, str] | None = None,
    ) -> None:
        """Set attributes of a trial, replacing those of the same keys; see :class:`TrialRows`."""
        for table, texts in ((self._user, user or {}), (self._system, system or {})):
            self._set_attrs(connection, table, table.c.trial_id, trial_id, texts)
        self.set_study_attrs(connection, study_id, system=_with_id(study or {}, trial_id))

    def _set_attrs(
        self, connection: Connection, table: Table, owner: Any, key: int, texts: Mapping[str, str]
    ) -> None:
        from sqlalchemy import delete

        if texts:
            connection.execute(delete(table).where(owner == key, table.c.key.in_(list(texts))))
            self._bulk(
                connection,
                table,
                [{owner.name: key, "key": k, "value_json": text} for k, text in texts.items()],
            )

    def _insert_parts(
        self, connection: Connection, study_id: int, trials: Sequence[tuple[int, TrialRows]]
    ) -> None:
        self._bulk(
            connection,
            self._params,
            [
                {
                    "trial_id": trial_id,
                    "param_name": name,
                    "param_value": value,
                    "distribution_json": text,
                }
                for trial_id, trial in trials
                for name, (value, text) in trial.params.items()
            ],
        )
        self._bulk(
            connection,
            self._values,
            [
                {
                    "trial_id": trial_id,
                    "objective": objective,
                    **_number("value", value, self._value_type),
                }
                for trial_id, trial in trials
                for objective, value in enumerate(trial.values)
            ],
        )
        self._bulk(
            connection,
            self._intermediate,
            [
                {
                    "trial_id": trial_id,
                    "step": step,
                    **_number("intermediate_value", value, self._intermediate_type),
                }
                for trial_id, trial in trials
                for step, value in trial.intermediate.items()
            ],
        )
        for table in (self._user, self._system):
            self._bulk(
                connection,
                table,
                [
                    {"trial_id": trial_id, "key": key, "value_json": text}
                    for trial_id, trial in trials
                    for key, text in (
                        trial.user_attrs if table is self._user else trial.system_attrs
                    ).items()
                ],
            )
        self._bulk(
            connection,
            self._heartbeats,
            [
                {"trial_id": trial_id, "heartbeat": trial.heartbeat}
                for trial_id, trial in trials
                if trial.heartbeat is not None
            ],
        )
        for trial_id, trial in trials:
            self.set_study_attrs(connection, study_id, system=_with_id(trial.study_attrs, trial_id))

    def _bulk(self, connection: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
        from sqlalchemy import insert

        if not rows:
            return
        if connection.dialect.name == "postgresql":
            self._bulk_from_arrays(connection, table, rows)
        else:
            connection.execute(insert(table), rows)

    def _bulk_from_arrays(
        self, connection: Connection, table: Table, rows: list[dict[str, Any]]
    ) -> None:
        """One array a column and one statement, where a statement for each row takes its time."""
        from sqlalchemy import bindparam, cast, func, insert, select
        from sqlalchemy.dialects.postgresql import ARRAY

        names = list(rows[0])
        kinds = {name: ARRAY(table.c[name].type) for name in names}
        columns = [
            func.unnest(cast(bindparam(f"all_{name}", type_=kind), kind))
            for name, kind in kinds.items()
        ]
        statement = insert(table).from_select(names, select(*columns))
        for start in range(0, len(rows), _ROWS_A_STATEMENT):
            some = rows[start : start + _ROWS_A_STATEMENT]
            connection.execute(
                statement, {f"all_{name}": [row[name] for row in some] for name in names}
            )


def _number(column: str, value: Number, kinds: type[Enum]) -> dict[str, Any]:
    """A number's column and that of its kind: only finite ones have a value in Optuna's tables."""
    if isinstance(value, str):
        return {column: None, f"{column}_type": kinds[_KINDS[value]]}
    return {column: value, f"{column}_type": kinds["FINITE"]}


def _with_id(attrs: Mapping[str, str], trial_id: int) -> dict[str, str]:
    return {key.replace(TRIAL_ID, str(trial_id), 1): text for key, text in attrs.items()}
