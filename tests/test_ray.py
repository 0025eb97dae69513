"""Workers on a real Ray cluster of this machine, as `sweep start --on ray` places them."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from commands import command, environment, run
from filelock import FileLock
from helpers import trials, write_spec
from optuna.trial import TrialState
from test_cli import mistake, wait_for_epochs, worker_pids

from storage.checkpoints import CheckpointStore
from storage.leases import LEASE_ATTR
from sweeps.errors import SweepError
from sweeps.launch import open_place
from sweeps.ray_cluster import capacity, parse_address
from sweeps.ray_nodes import (
    NodeFacts,
    check_address,
    check_nodes,
    check_sqlite_nodes,
    differences,
    folder_identity,
    installed,
)

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
needs_ray = pytest.mark.skipif(
    find_spec("ray") is None,
    reason="Ray is not installed; pip install 'sweep[ray]'",
)
pytestmark = pytest.mark.xdist_group("ray")

EPOCHS = 60
LONG: dict[str, Any] = {
    "train": {"epochs": EPOCHS}, "budget": {"trials": 3}, "workers": {"threads": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A cluster of one node with two CPUs; one at a time, whichever process runs the tests."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed")
    with FileLock(tmp_path_factory.getbasetemp().parent / "ray.lock"):
        made = cluster_utils.Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 2,
                "include_dashboard": False,
                "object_store_memory": 80 * 2**20,
            },
        )
        try:
            yield made
        finally:
            made.shutdown()


@contextmanager
def in_a_terminal(cwd: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`sweep start` in a process group of its own, all of which a Ctrl-C reaches."""
    process = subprocess.Popen(
        command("start", *arguments),
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def parents(pids: list[int]) -> list[int]:
    stats = [Path(f"/proc/{pid}/stat").read_text() for pid in pids]
    return [int(stat.rpartition(")")[2].split()[1]) for stat in stats]


@needs_ray
def test_killed_workers_start_again_and_the_budget_is_exact(tmp_path: Path, cluster: Any) -> None:
    write_spec(tmp_path / "tiny.toml", **LONG)
    with in_a_terminal(tmp_path, "tiny.toml", "--on", f"ray={cluster.address}") as process:
        wait_for_epochs(tmp_path, 2, busy=2)
        # One worker process, and the actor of the other.
        one, other = worker_pids(tmp_path)
        (actor,) = parents([other])
        os.kill(one, signal.SIGKILL)
        os.kill(actor, signal.SIGKILL)
        out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "cluster of 1 node, 2 CPUs, 0 GPUs" in err
    assert "2 workers" in err
    assert "was ended by SIGKILL; its trial goes back" in err
    assert "was ended by the loss of its process or node" in err
    assert "[3/3]" in err
    assert "3 of 3 trials; 3 complete" in out
    assert "ray" not in out
    finished = trials(tmp_path)
    assert [t.state for t in finished] == [TrialState.COMPLETE] * 3
    assert sorted(t.system_attrs[LEASE_ATTR]["attempt"] for t in finished) == [1, 2, 2]
    for trial in finished:
        assert sorted(trial.intermediate_values) == list(range(1, EPOCHS + 1))


@needs_ray
def test_a_second_ctrl_c_on_ray_stops_at_once(tmp_path: Path, cluster: Any) -> None:
    write_spec(tmp_path / "tiny.toml", **{**LONG, "train": {"epochs": 100_000}})
    with in_a_terminal(tmp_path, "tiny.toml", "--on", f"ray={cluster.address}") as process:
        wait_for_epochs(tmp_path, 2, busy=2)
        for pid in worker_pids(tmp_path):
            os.kill(pid, signal.SIGSTOP)  # they cannot stop politely
        os.killpg(process.pid, signal.SIGINT)
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("stopping"):
                break
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert {t.state for t in trials(tmp_path)} == {TrialState.WAITING}
    assert all(len(t.intermediate_values) >= 2 for t in trials(tmp_path))


@needs_ray
def test_what_a_failing_worker_said_is_shown(tmp_path: Path, cluster: Any) -> None:
    write_spec(tmp_path / "tiny.toml", **LONG)
    kept = CheckpointStore(tmp_path / "sweep.db.checkpoints")
    for number in range(3):
        kept.path(f"tiny/{number}").mkdir(parents=True)  # where a file is to be
    done = run("start", "tiny.toml", "--on", f"ray={cluster.address}", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "worker 0 ended with status 1: sweep: " in done.stderr
    assert "sweep.db.checkpoints" in done.stderr
    assert "Traceback" not in done.stderr


@needs_ray
def test_sqlite_is_refused_where_there_are_two_nodes(tmp_path: Path, cluster: Any) -> None:
    write_spec(tmp_path / "tiny.toml")
    second = cluster.add_node(num_cpus=1)
    try:
        done = run("start", "tiny.toml", "--on", f"ray={cluster.address}", cwd=tmp_path)
    finally:
        cluster.remove_node(second)
    mistake(done, 1, "2 nodes", "sweep serve", "grpc://", "PostgreSQL")
    assert not (tmp_path / "sweep.db").exists()


@needs_ray
def test_ctrl_c_on_a_cluster_of_its_own_leaves_all_to_be_gone_on_with(tmp_path: Path) -> None:
    write_spec(
        tmp_path / "tiny.toml", **{**LONG, "train": {"epochs": 200}, "budget": {"trials": 1}}
    )
    with in_a_terminal(tmp_path, "tiny.toml", "--on", "ray=local", "--workers", "1") as process:
        wait_for_epochs(tmp_path, 3, busy=1)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "no cluster is running here; started one, 1 node" in err
    assert "go on:" in out
    assert "Traceback" not in err
    left = trials(tmp_path)
    assert {t.state for t in left} == {TrialState.WAITING}
    (kept,) = (t.intermediate_values for t in left)
    assert len(kept) >= 3
    done = run("start", "tiny.toml", "--workers", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    finished = trials(tmp_path)
    assert [t.state for t in finished] == [TrialState.COMPLETE]
    assert all(finished[0].intermediate_values[step] == value for step, value in kept.items())


@needs_ray
def test_the_pages_commands_run(tmp_path: Path, cluster: Any) -> None:
    """Those that need no GPU, on the cluster of the tests."""
    page = (Path(__file__).parent.parent / "docs" / "ray.md").read_text(encoding="utf-8")
    lines = re.findall(r"^sweep (start .*?) *(?:#.*)?$", page, flags=re.M)
    ran = [line for line in lines if "--gpus-per-worker" not in line]
    assert len(ran) >= 2
    for index, line in enumerate(ran):
        write_spec(tmp_path / f"tiny{index}.toml", budget={"trials": 1}, train={"epochs": 1})
        here = line.replace("fixup-largebatch", f"tiny{index}.toml")
        here = re.sub(r"--on ray(=\S+)?", f"--on ray={cluster.address}", here)
        done = run(*shlex.split(here), cwd=tmp_path)
        assert done.returncode == 0, (line, done.stderr)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--on", "rye"], 2, "ray=ADDRESS"),
        (["--on", "ray="], 2, "ray=ADDRESS"),
        (["--on", "local=here"], 2, "ray=ADDRESS"),
        (["--on", "ray=head"], 2, "ray://HOST:PORT"),
        (["--gpus-per-worker", "0.5"], 2, "--on ray"),
        (["--on", "ray", "--gpus-per-worker", "3"], 2, "from 0 to 1"),
        pytest.param(["--on", "ray=127.0.0.1:1"], 1, "ray start --head", marks=needs_ray),
    ],
)
def test_a_place_that_is_none_is_one_line(
    tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    write_spec(tmp_path / "tiny.toml")
    mistake(run("start", "tiny.toml", *arguments, cwd=tmp_path), code, said)
    assert not (tmp_path / "sweep.db").exists()


def test_without_ray_the_extra_is_named(tmp_path: Path) -> None:
    write_spec(tmp_path / "tiny.toml")
    # None is Python's own mark of a module that cannot be imported.
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from sweeps.cli import main; sys.argv = ['sweep', 'start', 'tiny.toml', '--on', 'ray']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment(),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    mistake(done, 1, "pip install 'sweep[ray]'")


@pytest.mark.parametrize(
    "address", ["auto", "local", "10.0.0.1:6379", "ray://head:10001", "Head:1", "[::1]:6379"]
)
def test_rays_own_addresses_are_taken_as_they_are(address: str) -> None:
    assert parse_address(address) == address


@pytest.mark.parametrize(
    "address",
    ["head", "head:", "head:x", "head:0", "head:70000", "ray://", "ray://head", "http://head:1",
     "u:p@head:1", "head:1/x", "head:1?y"],
)  # fmt: skip
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"ray://HOST:PORT"):
        parse_address(address)


def test_workers_are_counted_node_by_node() -> None:
    head, gpus = {"CPU": 3.0}, {"CPU": 16.0, "GPU": 2.0}
    assert capacity([head, gpus], threads=2, share=0.0) == 1 + 8
    assert capacity([head, gpus], threads=2, share=1.0) == 2
    assert capacity([head, gpus], threads=2, share=0.5) == 4
    # 0.4 of a GPU: two on each, as no worker's share lies on two.
    assert capacity([head, gpus], threads=2, share=0.4) == 4
    assert capacity([head, gpus], threads=2, share=0.1) == 8
    assert capacity([head], threads=4, share=0.0) == 0


def test_nodes_with_other_packages_are_named_with_what_differs(tmp_path: Path) -> None:
    here = installed()
    assert differences(here, here) == ""
    fine = NodeFacts(here, folder_identity(tmp_path))
    check_nodes({"10.0.0.1": fine}, tmp_path)
    other = NodeFacts({**here, "torch": "1.0"}, fine.folder)
    without = NodeFacts({**here, "sweep": None}, fine.folder)
    with pytest.raises(SweepError, match=r"10\.0\.0\.2 has torch 1\.0 \(here .*\); 10\.0\.0\.3"):
        check_nodes({"10.0.0.1": fine, "10.0.0.2": other, "10.0.0.3": without}, None)
    (tmp_path / "other").mkdir()
    elsewhere = NodeFacts(here, folder_identity(tmp_path / "other"))
    check_nodes({"10.0.0.4": elsewhere}, None)
    with pytest.raises(SweepError, match="another machine"):
        check_nodes({"10.0.0.4": elsewhere}, tmp_path)


def test_one_node_may_have_a_sqlite_store_and_two_may_not() -> None:
    check_sqlite_nodes([{"Alive": True}])
    with pytest.raises(SweepError, match="sweep serve"):
        check_sqlite_nodes([{"Alive": True}, {"Alive": True}])


def test_workers_run_on_this_machine_unless_told_otherwise() -> None:
    with open_place("local") as place:
        assert len(place.plan(2, 1, 5)) == 2


@pytest.mark.parametrize("place", ["grpc://localhost:13000", "postgresql+psycopg://me@127.0.0.1/s"])
def test_an_address_that_each_node_takes_for_itself_is_refused(place: str) -> None:
    check_address([{}], place)
    check_address([{}, {}], "grpc://10.0.0.1:13000")
    with pytest.raises(SweepError, match="all of them reach"):
        check_address([{}, {}], place)
