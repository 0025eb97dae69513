"""Studies deleted whole: all that are named in one transaction, and none that a worker is in.

Optuna deletes a study row by row, through objects: of a thousand trials of a hundred epochs that
takes ten seconds, in which no other worker of a SQLite file can write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from storage.database import CachedDatabase
from storage.engine import sql_engine
from storage.study_tables import StudyTables

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

    from storage.remote import RemoteTrialTable


def delete_studies(
    storage: BaseStorage, study_ids: Sequence[int]
) -> list[tuple[int, int, str | None]]:
    """Delete studies with all that belongs to them; none of them while one of their trials runs.

    Safe to repeat: a study that is not there counts as deleted.

    Args:
        storage: from :func:`storage.engine.open_storage`, open to write.
        study_ids: Optuna's own.

    Returns:
        The running trials: study, number, lease as stored. Nothing was deleted if there are any.

    Raises:
        StorageError: the storage is neither a database nor one that `sweep serve` serves.
    """
    claims: RemoteTrialTable | None = getattr(storage, "claims", None)
    if claims is not None:
        return claims.delete_studies(study_ids)
    tables = StudyTables()
    with sql_engine(storage).begin() as connection:
        tables.lock(connection, study_ids)
        running = tables.running(connection, study_ids)
        if not running:
            tables.delete(connection, study_ids)
    if not running and isinstance(storage, CachedDatabase):
        for study_id in study_ids:
            storage.forget(study_id)
    return running
