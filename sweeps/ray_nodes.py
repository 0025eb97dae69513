"""Whether the nodes of a Ray cluster can work on a sweep: what each has installed, and its disk.

Every node is asked beforehand, as a worker that lacks a package or the store would fail again and
again. What is refused is refused in a line that says what to install or where to keep the store.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sweeps.errors import SweepError, first_line

PACKAGES = ("sweep", "torch", "optuna")
"""What has to be of one version on all nodes."""

NODE_SECONDS = 60.0
"""How long a node may take to say what is installed there."""

_NO_SQLITE = (
    "a SQLite file is for one machine; serve it with sweep serve and name it as --storage "
    "grpc://HOST:PORT, or use PostgreSQL"
)


@dataclass(frozen=True)
class NodeFacts:
    """What a node says of itself.

    Attributes:
        versions: as :func:`installed` gives them.
        folder: as :func:`folder_identity` gives it.
    """

    versions: dict[str, str | None]
    folder: str


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


def ask_nodes(nodes: Sequence[Mapping[str, Any]], folder: Path | None) -> dict[str, NodeFacts]:
    """What each node says of itself, by its address.

    Args:
        nodes: those alive, as `ray.nodes()` describes them.
        folder: of a SQLite store; None for any other.

    Raises:
        SweepError: one does not answer, or cannot be used.
    """
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

        from sweeps.ray_nodes import folder_identity

        return versions, folder_identity(Path(folder))

    where = None if folder is None else str(folder)
    ask = ray.remote(num_cpus=0, max_retries=1)(facts)
    asked = {
        ask.options(scheduling_strategy=only_on(node)).remote(PACKAGES, where): node
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
            raise SweepError(f"the Ray node {address} cannot be used: {said(error)}") from None
        found[address] = NodeFacts(*answer)
    return found


def only_on(node: Mapping[str, Any]) -> Any:
    """Ray's scheduling strategy for actors and calls that are to run on one node."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)


def said(error: BaseException) -> str:
    """What an error of Ray's says, for a sentence that goes on."""
    return first_line(error).rstrip(".")
