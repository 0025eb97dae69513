"""Attributes of a study that are set together: whoever reads meets all of them, or none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from storage.engine import exclusive, sql_engine
from storage.statements import Upsert
from storage.urls import is_grpc

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


def set_study_system_attrs(
    storage: BaseStorage, url: str, study_id: int, attrs: Mapping[str, Any]
) -> None:
    """Set system attributes of a study in one transaction.

    Through `sweep serve` they are set one by one, while no other process does the same.

    Args:
        storage: open to write.
        url: what it was opened with.
        study_id: Optuna's own.
        attrs: key → JSON value.

    Raises:
        StorageError: the storage is not a database that others can reach.
    """
    if is_grpc(url):
        with exclusive(storage, url):
            for key, value in attrs.items():
                storage.set_study_system_attr(study_id, key, value)
        return
    from optuna.storages._rdb import models

    table: Any = models.StudySystemAttributeModel.__table__
    rows = [
        {"study_id": study_id, "key": key, "value_json": json.dumps(value)}
        for key, value in attrs.items()
    ]
    engine = sql_engine(storage)
    with engine.begin() as connection:
        Upsert(engine.dialect.name, table, ("study_id", "key"), ("value_json",)).run(
            connection, rows
        )
