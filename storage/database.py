"""Optuna's storage in a database, whose reads take no lock.

On SQLite every transaction of a worker begins as a writer's (:mod:`storage.engine`), and Optuna's
reads are transactions like any other: workers would stand in line to read. Those of
:class:`Database` begin as readers, and no garbage is collected meanwhile. All else is Optuna's.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.storages._rdb import models
from optuna.trial import TrialState

from storage.engine import reading

T = TypeVar("T")

_READS = (
    "get_all_studies", "get_study_id_from_name", "get_study_name_from_id", "get_study_directions",
    "get_study_user_attrs", "get_study_system_attrs", "get_all_trials", "_get_trials", "get_trial",
    "get_trial_id_from_study_id_trial_number", "get_trial_param", "get_trial_user_attrs",
    "get_trial_system_attrs", "_get_best_trial_id",
)  # fmt: skip


@contextmanager
def _without_collection() -> Iterator[None]:
    """Let the collector of garbage wait.

    A large study is read as hundreds of thousands of objects, all of which are needed. Looking
    through them again and again takes more than half of the time.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _without_lock(method: Callable[..., T]) -> Callable[..., T]:
    @wraps(method)
    def read(*arguments: Any, **keywords: Any) -> T:
        with reading(), _without_collection():
            return method(*arguments, **keywords)

    return read


class Database(RDBStorage):
    """As Optuna's, but what only reads takes no lock."""

    def study_of(self, trial_id: int) -> int | None:
        """The study of a trial; None if there is no such trial."""
        from sqlalchemy import select

        columns = models.TrialModel.__table__.c
        with reading(), self.engine.connect() as connection:
            query = select(columns.study_id).where(columns.trial_id == trial_id)
            return connection.execute(query).scalar()

    def count_trials(self, study_id: int) -> int:
        """How many trials a study has, 0 if there is no such study."""
        from sqlalchemy import func, select

        columns = models.TrialModel.__table__.c
        with reading(), self.engine.connect() as connection:
            query = select(func.count()).where(columns.study_id == study_id)
            return int(connection.execute(query).scalar_one())


for _name in _READS:
    setattr(Database, _name, _without_lock(getattr(RDBStorage, _name)))


class CachedDatabase(_CachedStorage):
    """As Optuna's, which keeps finished trials, but also for trials that it has not read yet."""

    _backend: Database

    def get_n_trials(
        self, study_id: int, state: tuple[TrialState, ...] | TrialState | None = None
    ) -> int:
        """Count the trials of a study; all of them without reading any."""
        count = self._backend.count_trials(study_id) if state is None else 0
        return count or super().get_n_trials(study_id, state)

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: Any
    ) -> None:
        """Store a parameter."""
        # Claimed trials are created beside Optuna's cache, which asks to have seen them.
        if trial_id not in self._trial_id_to_study_id_and_number:
            study_id = self._backend.study_of(trial_id)
            if study_id is None:
                raise KeyError(models.NOT_FOUND_MSG)
            self._read_trials_from_remote_storage(study_id)
        super().set_trial_param(trial_id, param_name, param_value_internal, distribution)
