"""`sweep serve`: one process has the database, others reach it over gRPC.

Optuna's storage proxy and the claims of :mod:`storage.trial_table` on one server. The claims run
here as the transactions that they are on the database itself, so they are as exact through the
server as without it, and processes that use the database directly may work beside it.

Nothing is encrypted, and nobody is asked who they are: whoever reaches the port can read, change
and delete every study.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import TYPE_CHECKING, Any

import grpc
import optuna
from optuna.storages._grpc.auto_generated import api_pb2_grpc
from optuna.storages._grpc.servicer import OptunaStorageProxyService
from optuna.trial import TrialState

from storage.deletion import delete_studies
from storage.engine import close_storage, exclusive, open_storage, sql_engine
from storage.errors import StorageError
from storage.overview import overview_rows
from storage.remote import PROTOCOL, SERVICE
from storage.retries import is_transient, reason
from storage.trial_table import TrialTable
from storage.urls import is_grpc, sqlite_path

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

THREADS = 16
LOCK_SECONDS = 5.0
"""How long a call waits for other processes on a SQLite file before the client asks again."""

SERVER_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Two servers on one port would each get some of the clients.
    ("grpc.so_reuseport", 0),
    # Finds dead clients, and lets theirs find a dead server.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
]


class StoreServer:
    """A gRPC server over a store; `start`, then `stop`.

    Args:
        url: of the store, a database.
        host: address to listen on.
        port: 0 takes a free one.

    Attributes:
        port: the port it listens on.

    Raises:
        StorageError: the store cannot be opened, or is itself served by another process.
        OSError: the address cannot be had.
    """

    def __init__(self, url: str, host: str, port: int) -> None:
        if is_grpc(url):
            raise StorageError(
                f"{url} is served already; name the database itself (sqlite:/// or "
                "postgresql+psycopg://), or give that address to the workers"
            )
        _check_port(host, port)
        self._url = url
        self._storage = open_storage(url, lock_seconds=LOCK_SECONDS)
        self._stopping = threading.Event()
        self._server = grpc.server(
            ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="serve"),
            interceptors=[_Failures()],
            options=SERVER_OPTIONS,
        )
        table = TrialTable(sql_engine(self._storage))
        api_pb2_grpc.add_StorageServiceServicer_to_server(
            OptunaStorageProxyService(self._storage), self._server
        )
        claims = _Claims(self._storage, table, url, self._stopping)
        self._server.add_generic_rpc_handlers((claims.handler(),))
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            self.port: int = self._server.add_insecure_port(address)
        except RuntimeError as error:
            close_storage(self._storage, url)
            raise OSError(str(error)) from error

    def start(self) -> None:
        """Begin to answer."""
        self._server.start()

    def stop(self, grace: float = 10.0) -> None:
        """Take no more calls, finish the running ones, close the store.

        Args:
            grace: seconds that the running calls may take.
        """
        self._stopping.set()
        self._server.stop(grace).wait()
        close_storage(self._storage, self._url)


def _check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be had, in the system's words instead of gRPC's.

    Raises:
        OSError: somebody else listens there, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


_AS_IT_IS = ("take", "create", "set_params", "fix_params", "forget_steps", "beat", "report")


class _Claims:
    """The service that Optuna's proxy lacks."""

    def __init__(
        self, storage: BaseStorage, table: TrialTable, url: str, stopping: threading.Event
    ) -> None:
        self._storage = storage
        self._table = table
        self._url = url
        self._stopping = stopping
        self._waiting = threading.Lock()

    def handler(self) -> Any:
        operations: dict[str, Callable[..., Any]] = {
            "hello": self._hello,
            "running": self._running,
            "candidates": self._candidates,
            "unfinished": lambda studies: self._table.unfinished(_pairs(studies)),
            "total": self._table.total,
            "overview": functools.partial(overview_rows, sql_engine(self._storage)),
            "read": self._read,
            "requeue": self._requeue,
            "finish": self._finish,
            "delete_studies": functools.partial(delete_studies, self._storage),
            **{name: self._as_it_is(name) for name in _AS_IT_IS},
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(_unary(operation), json.loads, _to_json)
            for name, operation in operations.items()
        }
        handlers["exclusive"] = grpc.unary_stream_rpc_method_handler(
            self._exclusive, json.loads, _to_json
        )
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def _as_it_is(self, name: str) -> Callable[..., Any]:
        """Return an operation whose arguments and result are JSON already."""

        @functools.wraps(getattr(self._table, name))
        def operation(**arguments: Any) -> Any:
            return getattr(self._table, name)(**arguments)

        return operation

    def _hello(self) -> dict[str, Any]:
        return {
            "protocol": PROTOCOL,
            "optuna": optuna.__version__,
            "store": _identity(self._url),
        }

    def _running(self, study_ids: list[int]) -> list[list[Any]]:
        return [
            [
                trial.study_id,
                trial.trial_id,
                trial.number,
                None if trial.started is None else trial.started.isoformat(),
                trial.lease_text,
            ]
            for trial in self._table.running(study_ids)
        ]

    def _candidates(self, studies: list[list[int]], lag: int) -> list[list[Any]]:
        return [
            [found.number, found.position, found.study_id, found.trial_id]
            for found in self._table.candidates(_pairs(studies), lag)
        ]

    def _read(self, trial_id: int) -> list[Any] | None:
        row = self._table.read(trial_id)
        return None if row is None else [row[0].name, row[1]]

    def _requeue(self, trial_id: int, old: str | None, died: bool, started: str | None) -> bool:
        began = None if started is None else datetime.fromisoformat(started)
        return self._table.requeue(trial_id, old, died=died, started=began)

    def _finish(
        self,
        trial_id: int,
        token: str,
        state: str,
        value: float | None,
        user_attrs: dict[str, Any],
        system_attrs: dict[str, Any],
    ) -> bool:
        return self._table.finish(
            trial_id, token, TrialState[state], value, user_attrs, system_attrs
        )

    def _exclusive(self, request: Any, context: Any) -> Iterator[bool]:
        """Answer True and hold the store's lock until the client goes; False if it is held."""
        # One thread waits for the lock at most: the others must stay free for its holder.
        if not self._waiting.acquire(blocking=False):
            yield False
            return
        try:
            ended: queue.SimpleQueue[None] = queue.SimpleQueue()
            if not context.add_callback(lambda: ended.put(None)):
                return
            with exclusive(self._storage, self._url):
                yield True
                while not self._stopping.is_set() and context.is_active():
                    try:
                        ended.get(timeout=0.5)
                        return
                    except queue.Empty:
                        continue
        finally:
            self._waiting.release()


class _Failures(grpc.ServerInterceptor):  # type: ignore[misc]  # gRPC has no types
    """Tells clients which failures pass by themselves, and why the others do not."""

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        handler = continuation(details)
        if handler is None or handler.unary_unary is None:
            return handler

        def call(request: Any, context: Any) -> Any:
            if not context.is_active():
                # The client gave up while the call stood in line. It may have asked again by
                # now, and a change made late would come as a surprise.
                context.abort(grpc.StatusCode.CANCELLED, "the client has gone")
            try:
                return handler.unary_unary(request, context)
            except StorageError as error:
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            except Exception as error:
                if context.code() is not None:
                    raise  # it was told already
                if is_transient(error):
                    message = f"the database behind the server: {reason(error)}"
                    context.abort(grpc.StatusCode.UNAVAILABLE, message)
                context.abort(
                    grpc.StatusCode.INTERNAL,
                    f"the server failed ({type(error).__name__}: {reason(error)})",
                )

        return grpc.unary_unary_rpc_method_handler(
            call, handler.request_deserializer, handler.response_serializer
        )


def _unary(operation: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    accepted = inspect.signature(operation)

    def call(request: Any, context: Any) -> Any:
        if not isinstance(request, dict):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a request is a JSON object")
        try:
            accepted.bind(**request)
        except TypeError as error:
            # As of a worker that was begun before the server was upgraded.
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the store is served by another version of sweep ({error}); install the same one "
                "on both sides",
            )
        return operation(**request)

    return call


def _to_json(value: Any) -> bytes:
    # In a list: gRPC takes None for an answer that could not be read.
    return json.dumps([value]).encode()


def _pairs(studies: list[list[int]]) -> list[tuple[int, int]]:
    return [(study_id, budget) for study_id, budget in studies]


def _identity(url: str) -> str:
    """Return a name for the store that tells nothing of where it is."""
    file = sqlite_path(url)
    place = url.rpartition("@")[2] if file is None else str(file.resolve())
    return hashlib.sha256(f"{socket.gethostname()}:{place}".encode()).hexdigest()[:32]
