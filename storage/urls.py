"""Storage URLs: which kind of store one names, and whether it can be one at all."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from storage.errors import StorageError, StorageURLError

if TYPE_CHECKING:
    from sqlalchemy.engine import URL


def sqlite_path(url: str) -> Path | None:
    """Return the absolute path of the database file behind a SQLite URL.

    Returns None for any other URL, for an in-memory database and for text that is no URL.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return None
    if parsed.get_backend_name() != "sqlite":
        return None
    if not parsed.database or parsed.database == ":memory:" or parsed.database.startswith("file:"):
        return None
    return Path(parsed.database).absolute()


def check_url(url: str) -> URL:
    """Refuse a storage URL that cannot work, as far as that shows without opening anything.

    Raises:
        StorageURLError: it is no URL, or that of an in-memory database.
        StorageError: it is that of a file that cannot be there.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    if "://" not in url:
        path = Path(url).expanduser().absolute()
        raise StorageURLError(f"{url!r} is not a storage URL; for a file write sqlite:///{path}")
    if is_grpc(url):
        grpc_address(url)
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise StorageURLError(
            f"{url!r} is not a storage URL; expected sqlite:///FILE or postgresql+psycopg://…"
        ) from error
    if parsed.get_backend_name() == "sqlite":
        file = sqlite_path(url)
        if file is None:
            raise StorageURLError(
                f"{url!r} is not a database file, and workers are processes that could not share "
                "an in-memory database; write sqlite:///FILE"
            )
        check_file(file)
    return parsed


def is_grpc(url: str) -> bool:
    """Whether a URL is that of a store that another process serves."""
    return url.startswith("grpc://")


def grpc_address(url: str) -> tuple[str, int]:
    """Return host and port of a ``grpc://HOST:PORT`` URL.

    Raises:
        StorageURLError: it is not of that form.
        StorageError: gRPC is not installed.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or parts.path not in ("", "/"):
        raise StorageURLError(f"{url!r} is not the address of a server; write grpc://HOST:PORT")
    require_grpc(url)
    return host, port


def require_grpc(purpose: str) -> None:
    """Refuse to go on without the packages of the extra ``grpc``.

    Raises:
        StorageError: they are not installed.
    """
    for name in ("grpc", "google", "google.protobuf"):
        if find_spec(name) is None:
            raise StorageError(f"{purpose} needs gRPC; run pip install grpcio protobuf")


def check_file(file: Path) -> None:
    """Refuse the path of a database file that cannot be there, or not be read.

    Raises:
        StorageError: saying which.
    """
    try:
        is_folder = file.is_dir()
    except OSError as error:  # such as a name that is too long
        raise StorageError(f"cannot read {file} ({error.strerror}); name another file") from None
    if is_folder:
        raise StorageError(f"{file} is a folder; name a database file in it, such as sweep.db")
    if not file.parent.is_dir():
        raise StorageError(f"the folder {file.parent} does not exist; create it first")
    # The file's content is SQLite's to read: closing a descriptor of our own would drop the
    # locks that this process holds on the file through SQLite, and another process, believing
    # itself alone, would then delete the write-ahead log under us.
    if file.exists() and not os.access(file, os.R_OK):
        raise StorageError(f"cannot read {file} (permission denied)")
