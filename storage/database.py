"""Optuna's storage in a database, whose reads take no lock.

On SQLite every transaction of a worker begins as a writer's (:mod:`storage.sqlite`), and Optuna's
reads are transactions like any other: workers would stand in line to read. Those of
:class:`Database` begin as readers, and no garbage is collected meanwhile. All else is Optuna's.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.storages._rdb import models
from optuna.trial import TrialState
from sqlalchemy.exc import DBAPIError, IntegrityError, NoSuchModuleError, OperationalError

from storage.errors import HELD, EmptyStorageError, StorageAwayError, StorageError, StorageURLError
from storage.readers import reading

T = TypeVar("T")

_COMPATIBLE: set[str] = set()
"""Versions of the tables that have passed Optuna's check in this process: one at the most."""

_CREATE_ATTEMPTS = 12

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
    """As Optuna's, but what only reads takes no lock, and a process looks up its schema once.

    Args:
        url, options, create: as of :func:`open_database`.

    Raises:
        RuntimeError: the tables are another version's.
    """

    def __init__(self, url: str, options: dict[str, Any], *, create: bool) -> None:
        # Optuna's check runs the scripts of all migrations that there ever were.
        super().__init__(
            url, engine_kwargs=options, skip_compatibility_check=True,
            skip_table_creation=not create,
        )  # fmt: skip
        self.skip_compatibility_check = False  # where this is unpickled
        version = self.get_current_version()
        if version not in _COMPATIBLE:
            self._version_manager.check_table_schema_compatibility()
            _COMPATIBLE.add(version)

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

    def forget(self, study_id: int) -> None:
        """Drop what is kept of a study that was deleted: SQLite gives its ids to later ones."""
        with self._lock:
            study = self._studies.pop(study_id, None)
            for number in study.trials if study is not None else ():
                trial_id = self._study_id_and_number_to_trial_id.pop((study_id, number), None)
                if trial_id is not None:
                    self._trial_id_to_study_id_and_number.pop(trial_id, None)

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


def open_database(
    url: str, options: dict[str, Any], *, place: str, create: bool = True
) -> Database:
    """Construct Optuna's storage; ``place`` names it in messages (no password).

    Args:
        url: SQLAlchemy's, password and all.
        options: SQLAlchemy's, of an engine.
        place: for messages.
        create: whether to create the tables where there are none.

    Raises:
        StorageError: it cannot be opened; :class:`EmptyStorageError` where nothing may be created
            and nothing is there, :class:`StorageAwayError` where a server may come back.
    """
    # Optuna takes the URL for a format string.
    template = url.replace("{", "{{").replace("}", "}}")
    attempt = 0
    while True:
        attempt += 1
        try:
            return Database(template, options, create=create)
        except (ImportError, NoSuchModuleError) as error:
            raise _missing_driver(url) from error
        except (DBAPIError, StorageInternalError, AssertionError) as error:
            # Two processes that create the same tables at once: one of them gets "already
            # exists" or a unique violation, and finds everything in place on its next try.
            if create and attempt < _CREATE_ATTEMPTS and _lost_creation_race(error):
                time.sleep(random.uniform(0.5, 1.0) * min(0.05 * 2**attempt, 2.0))
                continue
            raise _cannot_open(place, error, create=create) from error
        except RuntimeError as error:
            # Optuna's refusal of a foreign schema version, which names the upgrade command.
            address = place if "://" in place else f"sqlite:///{place}"
            advice = " ".join(str(error).split()).replace("$STORAGE_URL", repr(address))
            raise StorageError(f"{place}: {advice}") from error


def _lost_creation_race(error: BaseException) -> bool:
    cause = error.__cause__ if error.__cause__ is not None else error
    text = f"{error} {cause}".lower()
    words = ("already exists", "duplicate", "unique", "deadlock", "concurrent")
    return (
        isinstance(error, IntegrityError | AssertionError)
        or isinstance(cause, IntegrityError)
        or any(word in text for word in words)
    )


def _cannot_open(place: str, error: BaseException, *, create: bool) -> StorageError:
    cause = error.__cause__ if error.__cause__ is not None else error
    reason = (str(getattr(cause, "orig", cause)).strip() or type(cause).__name__).splitlines()[0]
    missing = any(word in reason for word in ("does not exist", "doesn't exist", "no such table"))
    if not create and missing:
        return EmptyStorageError(f"{place} holds no sweep yet ({reason}); start one there first")
    if "://" not in place:
        advice = "restore a copy of it, or name another file"
        if "locked" in reason:
            advice = HELD
        return StorageError(f"cannot open {place} ({reason}); {advice}")
    refused = (
        "authentication", "password", "pg_hba", "does not exist", "not known", "denied",
        "Unknown database", "SSL",
    )  # fmt: skip
    lost = any(isinstance(e, OperationalError) for e in (error, cause))
    away = lost and not any(word in reason for word in refused)
    return (StorageAwayError if away else StorageError)(
        f"cannot open {place} ({reason}); check the address, the account and the network"
    )


def _missing_driver(url: str) -> StorageError:
    scheme = url.split("://", 1)[0]
    database = scheme.partition("+")[0]
    if database in ("postgres", "postgresql"):
        return StorageError(
            f"no driver for {scheme}; run pip install 'psycopg[binary]' "
            "and write the URL as postgresql+psycopg://…"
        )
    if database in ("mysql", "mariadb"):
        return StorageError(
            f"no driver for {scheme}; run pip install pymysql and write mysql+pymysql://…"
        )
    return StorageURLError(
        f"no driver for {scheme}; use sqlite:///FILE, postgresql+psycopg://… or grpc://HOST:PORT"
    )
