"""A Ray cluster as a place for workers: `sweep start NAME --on ray`.

Ray does what it is there for: it finds each worker a node with enough free CPUs and GPUs (also a
fraction of one), shows that worker its GPU as the only one, starts a lost worker process again
somewhere, and brings what workers print to the terminal. All else goes through the store, as with
workers of any other kind.

Ray itself is imported only when a cluster is asked for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from sweeps.errors import SweepError
from sweeps.launch import Workers
from sweeps.machine import NOTHING_KNOWN, Need, Slot, cores
from sweeps.ray_nodes import (
    ask_nodes,
    check_address,
    check_nodes,
    check_sqlite_nodes,
    only_on,
    said,
)
from sweeps.ray_workers import RayWorkers

CONNECT_SECONDS = 5.0
"""How long a cluster's port may take to answer."""

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
        folder = _sqlite_folder(storage_url)
        if folder is not None:
            check_sqlite_nodes(nodes)
        check_address(nodes, storage_url)
        check_nodes(ask_nodes(nodes, folder), folder)
        if folder is not None:
            # A node that joins later could not reach the file.
            self._strategy = only_on(nodes[0])
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
            "num_cpus": cores(),
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
                    f"no Ray cluster can be used{where} ({said(error)}); check with ray "
                    "status. One that asks for a token wants RAY_AUTH_MODE=token here, too; from a "
                    "machine that is none of its nodes, use --on ray=ray://HOST:10001"
                ) from None


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


def _sqlite_folder(storage_url: str) -> Path | None:
    """The folder of a SQLite store; None for any other."""
    from storage.urls import sqlite_path

    file = sqlite_path(storage_url)
    return None if file is None else file.parent


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
    from storage.urls import sqlite_path

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
