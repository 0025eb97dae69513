"""Two hosts: network namespaces with a cable between, each with a name and processes of its own."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import command, environment
from helpers import begin, make_spec, trials, url, wait_until
from optuna.trial import TrialState

from storage.leases import LEASE_ATTR, parse_lease
from storage.trials import TrialQueue
from sweeps.studies import stored_sweep

HERE, FAR = "10.213.7.1", "10.213.7.2"
NAMES = (f"swp{os.getpid() % 10000}a", f"swp{os.getpid() % 10000}b")


def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def hosts() -> Iterator[tuple[list[str], list[str]]]:
    """The words to put before a command so that it runs on either host."""
    here, far = NAMES
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("needs the ip and unshare commands")
    made = ip("netns", "add", here)
    if made.returncode:
        pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
    try:
        ip("netns", "add", far)
        ip("link", "add", here, "netns", here, "type", "veth", "peer", "name", far, "netns", far)
        for name, address in ((here, HERE), (far, FAR)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", name)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", name, "up")
        own = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        far_shell = [*own, "sh", "-c", 'hostname far && exec "$@"', "sh"]
        yield ["ip", "netns", "exec", here], ["ip", "netns", "exec", far, *far_shell]
    finally:
        for name in NAMES:
            ip("netns", "delete", name)


def test_a_host_that_is_cut_off_loses_its_trial_and_goes_on_when_it_is_back(
    tmp_path: Path, hosts: tuple[list[str], list[str]]
) -> None:
    store = begin(tmp_path, make_spec(train={"epochs": 40}, budget={"trials": 4}))
    here, far = hosts
    far_home = {**environment(), "XDG_DATA_HOME": str(tmp_path / "far")}

    def start(host: list[str], env: dict[str, str], *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*host, *command(*arguments)], cwd=tmp_path, env=env)

    def holders() -> dict[int, str]:
        running = [t for t in trials(tmp_path) if t.state == TrialState.RUNNING]
        leases = {t.number: t.system_attrs.get(LEASE_ATTR) for t in running}
        found = {n: v if isinstance(v, dict) else parse_lease(v) for n, v in leases.items()}
        return {n: str(lease.get("host", "")).split("|")[0] for n, lease in found.items()}

    served = ["serve", "--storage", url(tmp_path), "--host", HERE, "--port", "13000"]
    worker = ["worker", "tiny", "--threads", "1", "--lease-seconds", "4"]
    processes = [start(here, environment(), *served)]
    try:
        processes.append(start(far, far_home, *worker, "--storage", f"grpc://{HERE}:13000"))
        wait_until(lambda: "far" in holders().values() or processes[1].poll() is not None)
        (cut_off,) = holders()
        wait_until(lambda: bool(trials(tmp_path)[cut_off].intermediate_values))
        ip("-n", NAMES[0], "link", "set", NAMES[0], "down")
        processes.append(start(here, environment(), *worker, "--storage", url(tmp_path)))
        wait_until(
            lambda: (
                trials(tmp_path)[cut_off].state.is_finished()
                or holders().get(cut_off, "far") != "far"
            )
        )
        ip("-n", NAMES[0], "link", "set", NAMES[0], "up")
        assert processes[2].wait(300) == 0
        assert processes[1].wait(300) == 0
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    found = trials(tmp_path)
    assert [t.state for t in found] == [TrialState.COMPLETE] * 4
    assert {len(t.intermediate_values) for t in found} == {40}
    sweep = stored_sweep(store, "tiny")
    queue = TrialQueue(store, worker_id="test")
    assert queue.pending([(s.study_id, s.budget) for s in sweep.studies]) == 0
