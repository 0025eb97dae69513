"""The store behind `sweep serve`, as a client sees it.

Two services share one channel: Optuna's own storage proxy, for everything that Optuna does, and
``sweep.Claims``, which runs the transactions of :class:`storage.trial_table.TrialTable` on the
server. A request of the latter is a JSON object, its answer a JSON list of one value. The
channel is neither encrypted nor authenticated.

A call that gets no answer fails with :class:`ProxyError` instead of hanging: on a dead server
after :data:`CALL_SECONDS`, on a dead network after the keepalive's time-out. It may be repeated:
claims are recognised by their token.
"""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

import grpc
import optuna
from optuna.storages import GrpcStorageProxy
from optuna.storages._grpc.auto_generated import api_pb2_grpc
from optuna.storages._grpc.client import GrpcClientCache

from storage.errors import StorageAwayError, StorageError
from storage.retries import stop_overdue
from storage.trial_table import Candidate, RunningTrial
from storage.urls import grpc_address

if TYPE_CHECKING:
    from optuna.trial import TrialState

SERVICE = "sweep.Claims"

PROTOCOL = 3
"""Raised when the two sides of :data:`SERVICE` would misunderstand each other."""

CALL_SECONDS = 120.0
"""How long one call may take: reading a study of thousands of trials takes seconds."""

HELLO_SECONDS = 20.0

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A proxy for web pages knows nothing of the machines of a lab.
    ("grpc.enable_http_proxy", 0),
]

_EXCLUSIVE_POLL_SECONDS = 0.2
_STOP_POLL_SECONDS = 0.25

_PASSING = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
)


class ProxyError(grpc.RpcError):  # type: ignore[misc]  # gRPC has no types
    """A call to the server failed; one line.

    Attributes:
        transient: whether the same call may succeed later.
    """

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self._code = code
        self._details = details
        self.transient = code in _PASSING

    def code(self) -> grpc.StatusCode:
        """What gRPC calls the failure."""
        return self._code

    def details(self) -> str:
        """The reason in words."""
        return self._details


class RemoteStorage(GrpcStorageProxy):
    """Optuna's client of a gRPC storage proxy, with a time limit on each call, and the claims.

    Attributes:
        claims: the claims of trials, of :class:`storage.trial_table.TrialTable`'s interface.
        store_id: names the store behind the server; empty before :meth:`hello`.

    Args:
        host: the server's name or address.
        port: its port.
        read_only: refuse to change anything.
    """

    def __init__(self, *, host: str, port: int, read_only: bool = False) -> None:
        self._read_only = read_only
        self.store_id = ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            super().__init__(host=host, port=port)

    def _setup(self) -> None:
        target = (
            f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"
        )
        self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._lock_stream: Any = None
        self._stub = api_pb2_grpc.StorageServiceStub(self._channel)
        for name, method in vars(self._stub).items():
            setattr(self._stub, name, self._limited(method, writes=not name.startswith("Get")))
        self._cache = GrpcClientCache(self._stub)
        self.claims = RemoteTrialTable(self)

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        for name in ("_lock_stream", "claims"):
            state.pop(name, None)
        return state

    def method(self, name: str, *, writes: bool) -> Any:
        """Return a method of :data:`SERVICE` as a function from request to answer, in JSON."""
        return self._limited(self._json("unary_unary", name), writes=writes)

    def _json(self, kind: str, name: str) -> Any:
        return getattr(self._channel, kind)(
            f"/{SERVICE}/{name}",
            request_serializer=lambda value: json.dumps(value).encode(),
            response_deserializer=json.loads,
        )

    def _limited(self, method: Any, *, writes: bool, seconds: float | None = None) -> Any:
        def call(request: Any) -> Any:
            if writes and self._read_only:
                raise ProxyError(
                    grpc.StatusCode.PERMISSION_DENIED, "this store was opened to be read only"
                )
            if self._lock_stream is not None and not self._lock_stream.is_active():
                raise ProxyError(
                    grpc.StatusCode.UNAVAILABLE, "the server lost the lock that this process held"
                )
            started = method.future(request, timeout=seconds or CALL_SECONDS)
            return _result(started)

        return call

    def get_n_trials(
        self, study_id: int, state: tuple[TrialState, ...] | TrialState | None = None
    ) -> int:
        """Count the trials of a study without reading them."""
        count = self.claims.total(study_id) if state is None else 0
        return count or super().get_n_trials(study_id, state)

    def hello(self) -> None:
        """Ask the server who it is, and note its ``store_id``.

        Raises:
            StorageError: it does not answer (:class:`storage.errors.StorageAwayError`), is no
                `sweep serve`, or one of another version.
        """
        place = f"grpc://{self._host}:{self._port}"
        ask = self._limited(self._json("unary_unary", "hello"), writes=False, seconds=HELLO_SECONDS)
        try:
            (answer,) = ask({})
        except ProxyError as error:
            if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                raise StorageError(
                    f"{place} is an Optuna storage proxy that cannot hand out trials exactly once; "
                    "run sweep serve there instead"
                ) from error
            raise (StorageAwayError if error.transient else StorageError)(
                f"nothing answers at {place} ({error}); run sweep serve on the machine that has "
                "the store, or check address and tunnel"
            ) from error
        if not isinstance(answer, dict) or answer.get("protocol") != PROTOCOL:
            raise StorageError(
                f"{place} is served by another version of sweep; install the same one on both sides"
            )
        ours, theirs = optuna.__version__, str(answer.get("optuna"))
        if ours.split(".")[0] != theirs.split(".")[0]:
            raise StorageError(
                f"{place} runs Optuna {theirs}, this machine {ours}; install the same one on both"
            )
        self.store_id = str(answer.get("store"))

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the server's lock, which also keeps out the processes on its own machine.

        It is held as long as the connection lives: a client that dies lets go of it, and one
        whose server restarts finds every further call refused within the block.
        """
        open_stream = self._json("unary_stream", "exclusive")
        while True:
            stream = open_stream({})
            try:
                (held,) = next(stream)
            except StopIteration:
                held = False
            except grpc.RpcError as error:
                raise ProxyError(error.code(), _details(error)) from None
            if held:
                break
            time.sleep(_EXCLUSIVE_POLL_SECONDS)
        self._lock_stream = stream
        try:
            yield
        finally:
            self._lock_stream = None
            stream.cancel()


class RemoteTrialTable:
    """The transactions of :class:`storage.trial_table.TrialTable`, run by the server."""

    def __init__(self, storage: RemoteStorage) -> None:
        self._storage = storage
        self._lock = threading.Lock()
        self._methods: dict[str, Any] = {}

    def _call(self, name: str, **arguments: Any) -> Any:
        with self._lock:
            if name not in self._methods:
                reads = name in ("running", "candidates", "unfinished", "read", "total", "overview")
                self._methods[name] = self._storage.method(name, writes=not reads)
        try:
            (answer,) = self._methods[name](arguments)
            return answer
        except ProxyError as error:
            if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
                raise StorageError(error.details()) from error
            raise

    def running(self, study_ids: Sequence[int]) -> list[RunningTrial]:
        """As :meth:`storage.trial_table.TrialTable.running`; so are the others."""
        rows = self._call("running", study_ids=list(study_ids))
        return [
            RunningTrial(study_id, trial_id, number, _time(started), lease_text)
            for study_id, trial_id, number, started, lease_text in rows
        ]

    def candidates(self, studies: Sequence[tuple[int, int]], lag: int = 0) -> list[Candidate]:
        """List what may be claimed, best first."""
        rows = self._call("candidates", studies=list(studies), lag=lag)
        return [Candidate(*row) for row in rows]

    def unfinished(self, studies: Sequence[tuple[int, int]]) -> int:
        """Count the trials below the budgets that are not finished."""
        return int(self._call("unfinished", studies=list(studies)))

    def total(self, study_id: int) -> int:
        """Count the trials of a study."""
        return int(self._call("total", study_id=study_id))

    def overview(
        self,
        study_ids: Sequence[int],
        since: int,
        user_attrs: Sequence[str],
        running_attrs: Sequence[str],
    ) -> tuple[list[list[int]], list[list[Any]]]:
        """As :func:`storage.overview.overview_rows`."""
        totals, rows = self._call(
            "overview", study_ids=list(study_ids), since=since, user_attrs=list(user_attrs),
            running_attrs=list(running_attrs),
        )  # fmt: skip
        return totals, rows

    def read(self, trial_id: int) -> tuple[TrialState, str | None] | None:
        """Return a trial's state and its lease as stored."""
        from optuna.trial import TrialState

        row = self._call("read", trial_id=trial_id)
        return None if row is None else (TrialState[row[0]], row[1])

    def take(self, trial_id: int, lease: dict[str, Any]) -> dict[str, Any] | None:
        """WAITING → RUNNING."""
        written: dict[str, Any] | None = self._call("take", trial_id=trial_id, lease=lease)
        return written

    def create(self, study_id: int, number: int, lease: dict[str, Any]) -> int | None:
        """Create the trial with that number, already held."""
        trial_id: int | None = self._call("create", study_id=study_id, number=number, lease=lease)
        return trial_id

    def requeue(
        self, trial_id: int, old: str | None, *, died: bool, started: datetime | None = None
    ) -> bool:
        """RUNNING → WAITING."""
        text = None if started is None else started.isoformat()
        return bool(self._call("requeue", trial_id=trial_id, old=old, died=died, started=text))

    def finish(
        self,
        trial_id: int,
        token: str,
        state: TrialState,
        value: float | None,
        user_attrs: Mapping[str, Any],
        system_attrs: Mapping[str, Any],
    ) -> bool:
        """RUNNING → ``state``."""
        return bool(
            self._call(
                "finish", trial_id=trial_id, token=token, state=state.name, value=value,
                user_attrs=dict(user_attrs), system_attrs=dict(system_attrs),
            )
        )  # fmt: skip

    def report(
        self, trial_id: int, token: str, step: int, value: float, system_attrs: Mapping[str, Any]
    ) -> bool:
        """Write a step's value and attributes."""
        return bool(
            self._call(
                "report", trial_id=trial_id, token=token, step=step, value=value,
                system_attrs=dict(system_attrs),
            )
        )  # fmt: skip

    def set_params(self, trial_id: int, token: str, params: Sequence[Sequence[Any]]) -> bool:
        """Write the parameters that a trial lacks, all or none."""
        arguments = {"trial_id": trial_id, "token": token, "params": list(params)}
        return bool(self._call("set_params", **arguments))

    def fix_params(
        self,
        study_id: int,
        trial_id: int,
        token: str,
        params: Mapping[str, Any],
        key: str,
        mark: str,
    ) -> bool | None:
        """Fix parameters of a trial that has none, and mark it."""
        made: bool | None = self._call(
            "fix_params", study_id=study_id, trial_id=trial_id, token=token, params=dict(params),
            key=key, mark=mark,
        )  # fmt: skip
        return made

    def forget_steps(self, trial_id: int, token: str, after: int) -> bool:
        """Delete the intermediate values beyond a step."""
        return bool(self._call("forget_steps", trial_id=trial_id, token=token, after=after))

    def beat(self, trial_id: int, token: str) -> bool:
        """Raise the beat of the lease with that token."""
        return bool(self._call("beat", trial_id=trial_id, token=token))

    def delete_studies(self, study_ids: Sequence[int]) -> list[tuple[int, int, str | None]]:
        """As :func:`storage.deletion.delete_studies`."""
        rows = self._call("delete_studies", study_ids=list(study_ids))
        return [(study_id, number, lease) for study_id, number, lease in rows]


def open_remote(url: str, *, read_only: bool) -> RemoteStorage:
    """Open the store that is served at ``grpc://HOST:PORT``.

    Raises:
        StorageError: the URL is no such address, or :meth:`RemoteStorage.hello` fails.
    """
    host, port = grpc_address(url)
    storage = RemoteStorage(host=host, port=port, read_only=read_only)
    try:
        storage.hello()
    except BaseException:
        storage.close()
        raise
    return storage


def _result(started: Any) -> Any:
    """Wait for a call's answer, but not for long in a process that was asked to stop."""
    while True:
        try:
            return started.result(timeout=_STOP_POLL_SECONDS)
        except grpc.FutureTimeoutError:
            if stop_overdue():
                started.cancel()
                raise ProxyError(
                    grpc.StatusCode.DEADLINE_EXCEEDED, "no answer, and this process is to stop"
                ) from None
        except grpc.FutureCancelledError:
            raise ProxyError(grpc.StatusCode.CANCELLED, "the call was cancelled") from None
        except grpc.RpcError as error:
            raise ProxyError(error.code(), _details(error)) from None


def _details(error: Any) -> str:
    text = str(error.details() or error.code().name).strip()
    # gRPC tells what the system said after a list of its own attempts.
    return text.splitlines()[0].rpartition("last error: ")[2].removeprefix("UNKNOWN: ")


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
