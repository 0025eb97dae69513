"""Workers as actors of a Ray cluster: `sweep start NAME --on ray`.

Ray does what it is there for: it finds each worker a node with enough free CPUs and GPUs (also a
fraction of one), shows that worker its GPU as the only one, starts a lost worker process again
somewhere, and brings what workers print to the terminal. An actor runs `sweep worker` in a process
of its own, whose threads are counted before PyTorch loads and which hears of its actor's end by
the end of its stdin. All else goes through the store, as with workers of any other kind.

Ray itself is imported only when a cluster is asked for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from sweeps.errors import SweepError
from sweeps.launch import MAX_RESTARTS, Restarts, Workers
from sweeps.machine import NOTHING_KNOWN, Need, Slot
from sweeps.machine import cores as _cores

PACKAGES = ("sweep", "torch", "optuna")
"""What has to be of one version on all nodes."""

CONNECT_SECONDS = 5.0
"""How long a cluster's port may take to answer."""

NODE_SECONDS = 60.0
"""How long a node may take to say what is installed there."""

KILL_SECONDS = 5.0
"""How long a worker that is ended by force may take to say so before its actor is ended."""

OBJECT_STORE_BYTES = 80 * 2**20
"""Shared memory of a cluster that is started for one run: next to nothing goes through it."""


def parse_address(text: str) -> str | None:
    """The ADDRESS of `--on ray=ADDRESS` as Ray takes it; None for `--on ray`.

    Args:
        text: `""`, `auto`, `local`, `HOST:PORT` or `ray://HOST:PORT`.

    Raises:
        ValueError: it is none of these.
    """
    if text in ("", "auto", "local"):
        return text or None
    parts = None
    with contextlib.suppress(ValueError):
        parts = urlsplit(text if "://" in text else f"gcs://{text}")
        if parts.port and parts.hostname and parts.scheme in ("gcs", "ray"):
            host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
            plain = f"{host}:{parts.port}"
            if text.removeprefix("ray://").lower() == plain:
                return text
    raise ValueError(
        f"{text!r} is no address of a Ray cluster; accepted: auto, local, HOST:PORT and "
        "ray://HOST:PORT"
    )


class RayCluster:
    """A Ray cluster as a place for workers; use as a context.

    Args:
        address: as :func:`parse_address` gives it. None is the cluster that `RAY_ADDRESS` names
            or `ray start` began on this machine, or failing that, one that is started for as long
            as this object is entered.
        gpus_per_worker: from 0 to 1; None is one where the cluster has any, else none.

    Raises:
        SweepError: Ray is not installed.
    """

    def __init__(self, address: str | None, gpus_per_worker: float | None) -> None:
        if not _has_ray():
            raise SweepError("--on ray needs Ray; run pip install 'sweep[ray]'")
        # Read when Ray is imported. It is to ask nothing of the network or of the user.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
        # A worker without a GPU is given its device by name, so Ray need not hide any.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        self._address = address or os.environ.get("RAY_ADDRESS") or None
        self._share = gpus_per_worker
        self._say: Callable[[str], None] = print
        self._strategy: Any = "DEFAULT"

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if "ray" in sys.modules:
            import ray

            ray.shutdown()

    def expect(
        self, slots: Sequence[Slot], command: Sequence[str], variables: Mapping[str, str]
    ) -> None:
        """Nothing to do: how many workers there will be is the cluster's to say."""

    def prepare(self, storage_url: str, say: Callable[[str], None]) -> None:
        """Connect, and refuse a cluster whose nodes could not work on the sweep.

        Args:
            storage_url: the store that workers are going to open.
            say: gets a line about the cluster.

        Raises:
            SweepError: the cluster does not answer, its Ray or Python is another one, a node has
                other packages than this machine, or a SQLite store is out of the nodes' reach.
        """
        import ray

        self._say = say
        started = self._connect()
        nodes = [node for node in ray.nodes() if node["Alive"]]
        folder = sqlite_folder(storage_url)
        if folder is not None:
            check_sqlite_nodes(nodes)
        check_address(nodes, storage_url)
        check_nodes(_ask_nodes(nodes, folder), folder)
        if folder is not None:
            # A node that joins later could not reach the file.
            self._strategy = _only_on(nodes[0])
        cpus, gpus = (sum(n["Resources"].get(kind, 0.0) for n in nodes) for kind in ("CPU", "GPU"))
        if self._share is None:
            self._share = 1.0 if gpus >= 1 else 0.0
        size = f"{len(nodes)} node{'s'[: len(nodes) != 1]}, {cpus:g} CPUs, {gpus:g} GPUs"
        if started:
            say(f"Ray {ray.__version__}: no cluster is running here; started one, {size}")
        else:
            say(f"Ray {ray.__version__}: cluster of {size}")

    def plan(
        self, workers: int | None, threads: int, trials: int, need: Need = NOTHING_KNOWN
    ) -> list[Slot]:
        """Divide the cluster among workers.

        Args:
            workers: how many; None is as many as the nodes have CPUs and GPUs for. More than that
                wait until the cluster has room.
            threads: CPUs of each.
            trials: how many are left; more workers than that would have nothing to do.
            need: what each takes; Ray counts CPUs and GPUs alone.

        Raises:
            SweepError: no node has room for a worker.
        """
        import ray

        share = self._share or 0.0
        room = capacity([n["Resources"] for n in ray.nodes() if n["Alive"]], threads, share)
        if workers is None and room == 0:
            raise SweepError(
                f"no node of the Ray cluster has {threads} CPUs and {share:g} GPUs for a worker; "
                "lower threads in [workers] or --gpus-per-worker, or, where nodes join on "
                "demand, say how many with --workers"
            )
        count = min(workers or room, max(1, trials))
        if count > room:
            self._say(f"the cluster has room for {room} of {count} workers; the others wait for it")
        return [Slot("cuda:0" if share else "cpu", threads)] * count

    def launch(
        self,
        slots: Sequence[Slot],
        command: Sequence[str],
        variables: Mapping[str, str],
        say: Callable[[str], None],
    ) -> Workers:
        """Workers on the cluster, to be entered; arguments as of `LocalWorkers`."""
        return RayWorkers(
            slots, command, _portable(variables), say, share=self._share or 0.0,
            strategy=self._strategy,
        )  # fmt: skip

    def _connect(self) -> bool:
        """Connect to a cluster or start one; return whether it was started."""
        import ray

        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": True}
        local = {
            "num_cpus": _cores(),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
        if self._address not in (None, "auto", "local"):
            _check_port(self._address)
        # Ray says on stdout what it waits for, and in a warning what its error says again.
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                if self._address not in (None, "local"):
                    ray.init(self._address, **quiet)
                    return False
                try:
                    ray.init(self._address, **quiet, **local)
                    return True
                except ValueError:
                    # So Ray says that it has found a cluster, whose size is not ours to set.
                    if self._address is not None:
                        raise
                ray.init(**quiet)
                return False
            except (ConnectionError, RuntimeError, ValueError, ImportError, TimeoutError) as error:
                where = "" if self._address in (None, "auto") else f" at {self._address}"
                raise SweepError(
                    f"no Ray cluster can be used{where} ({_first_line(error)}); check with ray "
                    "status. One that asks for a token wants RAY_AUTH_MODE=token here, too; from a "
                    "machine that is none of its nodes, use --on ray=ray://HOST:10001"
                ) from None


class RayWorkers:
    """Worker processes on a Ray cluster; use as a context, so that none outlives it.

    Args:
        slots: one actor each.
        command: arguments of the `sweep` command for a worker, without its slot's.
        variables: environment variables for the workers. They go to each actor in a call, not in
            Ray's runtime environment or in a name, which its dashboard shows.
        say: receives what became of workers. What they print comes by Ray, to stderr.
        share: GPUs of each, from 0 to 1.
        strategy: Ray's scheduling strategy for the actors.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        command: Sequence[str],
        variables: Mapping[str, str],
        say: Callable[[str], None],
        *,
        share: float,
        strategy: Any = "DEFAULT",
    ) -> None:
        self._slots = list(slots)
        self._command = list(command)
        self._variables = dict(variables)
        self._say = say
        self._share = share
        self._strategy = strategy
        self._actors: list[Any] = []
        self._runs: list[Any] = []
        self._placed: list[Any] = []
        self._codes: list[int | None] = [None] * len(self._slots)
        self._restarts = Restarts(len(self._slots))
        self._stopping = False
        self._stdout = contextlib.redirect_stdout(sys.stderr)

    def __enter__(self) -> RayWorkers:
        import ray

        # Ray brings its own notices to stdout, which is for the answer.
        self._stdout = contextlib.redirect_stdout(sys.stderr)
        self._stdout.__enter__()
        for slot in self._slots:
            actor = ray.remote(SweepWorker).options(
                num_cpus=slot.threads,
                num_gpus=self._share,
                max_restarts=MAX_RESTARTS,
                # One call runs the worker, others end it meanwhile.
                max_concurrency=4,
                scheduling_strategy=self._strategy,
            )
            self._actors.append(actor.remote())
        self._placed = [actor.node.remote() for actor in self._actors]
        self._runs = [self._run(index) for index in range(len(self._slots))]
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.kill()
        finally:
            self._stdout.__exit__(None, None, None)

    def poll(self) -> list[int] | None:
        """Run workers again that were killed; when all have ended, return their exit codes."""
        for index in self._ready(self._runs):
            if self._codes[index] is not None:
                continue
            ended = self._ended(index)
            if ended.code < 0 and not self._stopping and self._restarts.again(index):
                self._say(
                    f"worker {index} was ended by {ended.reason}; its trial goes back to the "
                    "queue and the worker starts again"
                )
                self._runs[index] = self._run(index)
                continue
            self._codes[index] = ended.code
            if ended.code != 0 and not self._stopping:
                self._say(f"worker {index} ended with status {ended.code}: {ended.reason}")
        waiting = self._waiting()
        others = [code for i, code in enumerate(self._codes) if i not in waiting]
        if waiting and others and all(code == 0 for code in others):
            self._drop(waiting)  # the budget is met
        return None if None in self._codes else [c for c in self._codes if c is not None]

    def stop(self) -> None:
        """Ask every worker to end after its running update."""
        self._stopping = True
        self._drop(self._waiting())
        self._end(force=False)

    def kill(self) -> None:
        """End every worker at once."""
        import ray

        self._stopping = True
        self._drop(self._waiting())
        left = self._end(force=True)
        if left:
            # An actor that says so has seen its worker's end, so that its trial may be put back.
            ray.wait(left, num_returns=len(left), timeout=KILL_SECONDS)
        for index, actor in enumerate(self._actors):
            ray.kill(actor)
            if self._codes[index] is None:
                self._codes[index] = -9

    def _run(self, index: int) -> Any:
        slot = self._slots[index]
        self._restarts.note_start(index)
        command = [*self._command, "--device", slot.device, "--threads", str(slot.threads)]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(slot.threads))
        return self._actors[index].run.remote(command, {**self._variables, **threads}, installed())

    def _end(self, *, force: bool) -> list[Any]:
        """Pass a request to end on; return the calls that it ends."""
        left = [index for index, code in enumerate(self._codes) if code is None]
        for index in left:
            self._actors[index].end.remote(force)
        return [self._runs[index] for index in left]

    def _drop(self, waiting: set[int]) -> None:
        """Give up on workers that have found no room."""
        import ray

        for index in waiting:
            ray.kill(self._actors[index])
            self._codes[index] = 0

    def _waiting(self) -> set[int]:
        """Workers for which there was no room yet."""
        placed = self._ready(self._placed)
        return {i for i, code in enumerate(self._codes) if code is None and i not in placed}

    @staticmethod
    def _ready(calls: list[Any]) -> set[int]:
        import ray

        if not calls:
            return set()
        done, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        ended = set(done)
        return {index for index, call in enumerate(calls) if call in ended}

    def _ended(self, index: int) -> Ended:
        import ray

        try:
            found: Ended = ray.get(self._runs[index])
            return found
        except ray.exceptions.RayActorError as error:
            return Ended(-9, f"the loss of its process or node ({_first_line(error)})")
        except ray.exceptions.RayError as error:
            return Ended(1, _first_line(error))


@dataclass(frozen=True)
class Ended:
    """How a worker process ended.

    Attributes:
        code: its exit status, negative for a signal.
        reason: the signal's name, or the last line that the worker printed.
    """

    code: int
    reason: str


class SweepWorker:
    """One worker on a node: what the cluster runs as an actor."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._ending = False

    def node(self) -> str:
        """Answer as soon as the actor has found its place."""
        return socket.gethostname()

    def run(
        self, command: list[str], variables: dict[str, str], versions: dict[str, str | None]
    ) -> Ended:
        """Run `sweep worker` to its end.

        Args:
            command: arguments of the `sweep` command.
            variables: environment variables beside the actor's own, in which Ray has put what
                `CUDA_VISIBLE_DEVICES` is here.
            versions: what the launcher has installed.
        """
        # A node that was not there when the launcher asked them all.
        if differing := differences(installed(), versions):
            return Ended(1, f"{socket.gethostname()} has {differing}")
        # Called again by a launcher that could not reach this actor for a while: one at a time.
        with self._lock:
            if self._ending:
                return Ended(0, "")
            self._process = process = subprocess.Popen(
                [sys.executable, "-P", "-m", "sweeps.cli", *command, "--child"],
                env={**os.environ, **variables},
                # Its end tells the worker that this actor is gone.
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            if self._ending:
                process.terminate()
            last = ""
            assert process.stdout is not None
            for line in process.stdout:
                last = line.strip() or last
                print(line, end="", file=sys.stderr, flush=True)
            code = process.wait()
        return Ended(code, _signal_name(-code) if code < 0 else last)

    def end(self, force: bool) -> None:
        """End the worker: after its running update, or at once."""
        self._ending = True
        process = self._process
        if process is None or process.poll() is not None:
            return
        if force:
            process.kill()
        else:
            process.terminate()


def capacity(nodes: Sequence[Mapping[str, float]], threads: int, share: float) -> int:
    """How many workers of so many CPUs and so large a share of a GPU nodes have room for.

    Args:
        nodes: the resources of each, as Ray counts them: `CPU`, `GPU`.
        threads: CPUs of a worker.
        share: of one GPU, from 0 to 1.
    """
    total = 0
    for node in nodes:
        room = int(node.get("CPU", 0.0)) // threads
        if share:
            # A worker's share is always of a single GPU.
            room = min(room, int(node.get("GPU", 0.0)) * int(1 / share + 1e-9))
        total += room
    return total


def installed() -> dict[str, str | None]:
    """The versions of :data:`PACKAGES` here, None for one that is missing.

    Without the part after `+`: one release of PyTorch for CPUs here and for GPUs there is fine.
    """
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package).partition("+")[0]
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def differences(there: Mapping[str, str | None], here: Mapping[str, str | None]) -> str:
    """Say how a node's packages differ from those here; "" if they do not."""
    return ", ".join(
        f"{name} {there.get(name) or 'not installed'} (here {version})"
        if there.get(name)
        else f"no {name} (here {version})"
        for name, version in here.items()
        if there.get(name) != version
    )


def sqlite_folder(storage_url: str) -> Path | None:
    """The folder of a SQLite store; None for any other."""
    from storage.engine import sqlite_path

    file = sqlite_path(storage_url)
    return None if file is None else file.parent


def check_sqlite_nodes(nodes: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a SQLite store for a cluster of several nodes.

    Args:
        nodes: those alive, as `ray.nodes()` describes them.

    Raises:
        SweepError: there is more than one.
    """
    if len(nodes) > 1:
        raise SweepError(f"the Ray cluster has {len(nodes)} nodes, and {_NO_SQLITE}")


def check_address(nodes: Sequence[Mapping[str, Any]], storage_url: str) -> None:
    """Refuse an address that is another machine on each of several nodes.

    Args:
        nodes: those alive, as `ray.nodes()` describes them.
        storage_url: of the store.

    Raises:
        SweepError: the URL names this machine as `localhost`, and there are others.
    """
    host = urlsplit(storage_url).hostname
    if len(nodes) > 1 and host in ("localhost", "127.0.0.1", "::1"):
        raise SweepError(
            f"the Ray cluster has {len(nodes)} nodes, and {host} in the store's URL is another "
            "machine on each; name it by an address that all of them reach"
        )


def check_nodes(nodes: Mapping[str, NodeFacts], folder: Path | None) -> None:
    """Refuse nodes that have other packages, or another disk where the store is a file.

    Args:
        nodes: what each says of itself, by its address.
        folder: of a SQLite store.

    Raises:
        SweepError: naming every node and what differs there.
    """
    here = installed()
    wrong = {
        address: text
        for address, facts in nodes.items()
        if (text := differences(facts.versions, here))
    }
    if wrong:
        listed = "; ".join(f"{address} has {text}" for address, text in wrong.items())
        raise SweepError(f"nodes differ from this machine: {listed}. Install the same on all nodes")
    if folder is not None and any(f.folder != folder_identity(folder) for f in nodes.values()):
        raise SweepError(f"the Ray cluster is on another machine, and {_NO_SQLITE}")


@dataclass(frozen=True)
class NodeFacts:
    """What a node says of itself.

    Attributes:
        versions: as :func:`installed` gives them.
        folder: as :func:`folder_identity` gives it.
    """

    versions: dict[str, str | None]
    folder: str


def folder_identity(folder: Path) -> str:
    """Name a folder so that two processes agree only if they see the same one."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = socket.gethostname()
    try:
        found = folder.stat()
    except OSError:
        return f"{boot}: none"
    return f"{boot}:{found.st_dev}:{found.st_ino}"


_NO_SQLITE = (
    "a SQLite file is for one machine; serve it with sweep serve and name it as --storage "
    "grpc://HOST:PORT, or use PostgreSQL"
)


def _ask_nodes(nodes: Sequence[Mapping[str, Any]], folder: Path | None) -> dict[str, NodeFacts]:
    """What each node says of itself, by its address."""
    import ray

    # Defined here, it travels as code: it also runs where this package is missing.
    def facts(packages: tuple[str, ...], folder: str | None) -> tuple[dict[str, Any], str]:
        from importlib import metadata

        versions: dict[str, Any] = {}
        for package in packages:
            try:
                versions[package] = metadata.version(package).partition("+")[0]
            except metadata.PackageNotFoundError:
                versions[package] = None
        if versions.get("sweep") is None or folder is None:
            return versions, ""
        from pathlib import Path

        from sweeps.ray_cluster import folder_identity

        return versions, folder_identity(Path(folder))

    where = None if folder is None else str(folder)
    ask = ray.remote(num_cpus=0, max_retries=1)(facts)
    asked = {
        ask.options(scheduling_strategy=_only_on(node)).remote(PACKAGES, where): node
        for node in nodes
    }
    deadline = time.monotonic() + NODE_SECONDS
    found = {}
    for call, node in asked.items():
        address = str(node["NodeManagerAddress"])
        try:
            answer = ray.get(call, timeout=max(0.0, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            raise SweepError(
                f"the Ray node {address} did not answer within {NODE_SECONDS:.0f} s; ray status "
                "shows whether it is well"
            ) from None
        except ray.exceptions.RayError as error:
            raise SweepError(
                f"the Ray node {address} cannot be used: {_first_line(error)}"
            ) from None
        found[address] = NodeFacts(*answer)
    return found


def _only_on(node: Mapping[str, Any]) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)


def _check_port(address: str | None) -> None:
    """Find out whether anyone listens, as Ray would wait a minute for it."""
    assert address is not None
    parts = urlsplit(address if "://" in address else f"gcs://{address}")
    try:
        socket.create_connection((parts.hostname, parts.port), CONNECT_SECONDS).close()
    except OSError as error:
        raise SweepError(
            f"no Ray cluster answers at {address} ({error.strerror or error}); ray start --head "
            "begins one, on port 6379, and on 10001 for ray://"
        ) from None


def _portable(variables: Mapping[str, str]) -> dict[str, str]:
    """The same store and checkpoints, named so that the current folder does not matter."""
    from storage.engine import sqlite_path

    found = dict(variables)
    file = sqlite_path(found["SWEEP_STORAGE"])
    if file is not None:
        from sqlalchemy.engine import make_url

        url = make_url(found["SWEEP_STORAGE"]).set(database=str(file))
        found["SWEEP_STORAGE"] = url.render_as_string(hide_password=False)
    if named := os.environ.get("SWEEP_CHECKPOINT_DIR"):
        found["SWEEP_CHECKPOINT_DIR"] = str(Path(named).expanduser().absolute())
    return found


def _has_ray() -> bool:
    try:
        return find_spec("ray") is not None
    except ValueError:  # marked as one that cannot be imported
        return False


def _signal_name(number: int) -> str:
    import signal

    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
