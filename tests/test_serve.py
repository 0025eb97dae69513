"""`sweep serve`: workers on the other side of a socket, and a server that goes away and returns."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from commands import Command, run
from filelock import FileLock, Timeout
from helpers import begin, make_spec, trials, url, wait_until, write_spec
from optuna.trial import FrozenTrial, TrialState

from storage.engine import exclusive, open_storage, own_url
from storage.errors import StorageError
from storage.leases import LEASE_ATTR
from storage.retries import is_transient, with_retries
from storage.trials import TrialQueue
from storage.urls import check_url

grpc = pytest.importorskip("grpc", reason="gRPC is not installed")

from storage.remote import ProxyError  # noqa: E402
from storage.serve import StoreServer  # noqa: E402

EPOCHS = 40


def serve(tmp_path: Path, port: int = 0) -> Command:
    """`sweep serve` on the store of a test."""
    return Command("serve", "--storage", url(tmp_path), "--port", str(port), cwd=tmp_path)


def port_of(server: Command) -> int:
    found = re.search(r"grpc://127\.0\.0\.1:(\d+);", server.line("serving"))
    assert found is not None
    return int(found[1])


def start_worker(tmp_path: Path, port: int) -> Command:
    place = f"grpc://127.0.0.1:{port}"
    return Command("worker", "tiny", "--storage", place, "--threads", "1", cwd=tmp_path)


def running(tmp_path: Path, epochs: int) -> list[FrozenTrial]:
    found = [t for t in trials(tmp_path) if t.state == TrialState.RUNNING]
    return [t for t in found if (t.last_step or 0) >= epochs]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Callable[..., StoreServer]]:
    """Return a function that serves the test's store from this process."""
    servers: list[StoreServer] = []

    def start(port: int = 0) -> StoreServer:
        servers.append(StoreServer(url(tmp_path), "127.0.0.1", port))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.stop(grace=0)


def place(server: StoreServer) -> str:
    return f"grpc://127.0.0.1:{server.port}"


# --- the commands -------------------------------------------------------------------------------


def test_two_starts_at_once_and_every_view(tmp_path: Path) -> None:
    write_spec(
        tmp_path / "tiny.toml",
        budget={"trials": 4},
        **{"try": [{"label": "known", "peak_lr": 0.05}, {"label": "bold", "peak_lr": 0.2}]},
    )
    with serve(tmp_path) as server:
        where = ["--storage", f"grpc://127.0.0.1:{port_of(server)}"]
        arguments = ["start", "tiny.toml", "--workers", "1", *where]
        with Command(*arguments, cwd=tmp_path) as one, Command(*arguments, cwd=tmp_path) as two:
            assert one.end() == 0, one.output
            assert two.end() == 0, two.output
        shown = run("status", "tiny", "--json", *where, cwd=tmp_path)
        (study,) = json.loads(shown.stdout)["studies"]
        assert study["counts"]["complete"] == 4
        assert [t["label"] for t in study["tries"]] == ["known", "bold"]
        assert "tiny" in run("list", *where, cwd=tmp_path).stdout
        assert run("report", "tiny", *where, cwd=tmp_path).returncode == 0
        assert list((tmp_path / "tiny-report").glob("*.html"))
        with Command("dashboard", *where, "--port", "0", cwd=tmp_path) as dashboard:
            address = dashboard.line("http://").split()[2]
            with urllib.request.urlopen(f"{address}api/studies", timeout=60) as answer:
                names = [s["study_name"] for s in json.load(answer)["study_summaries"]]
            assert names == ["tiny"]
        server.process.send_signal(signal.SIGINT)
        assert server.end() == 130
        assert "Traceback" not in server.output
    assert not (tmp_path / "sweep.db-wal").exists()
    found = trials(tmp_path)
    assert [t.state for t in found] == [TrialState.COMPLETE] * 4
    assert {t.system_attrs[LEASE_ATTR]["attempt"] for t in found} == {1}


def test_server_that_is_killed_and_started_again_loses_nothing(tmp_path: Path) -> None:
    begin(tmp_path, make_spec(train={"epochs": EPOCHS}, budget={"trials": 3}))
    with serve(tmp_path) as server:
        port = port_of(server)
        with start_worker(tmp_path, port) as patient, start_worker(tmp_path, port) as stopped:
            wait_until(lambda: len(running(tmp_path, 2)) == 2)
            server.process.kill()
            for worker in (patient, stopped):
                worker.line(f"the store at grpc://127.0.0.1:{port} does not answer")
            stopped.process.terminate()
            assert stopped.process.wait(30) == 130  # far below the time that the other waits
            assert "a trial left running goes to another worker" in stopped.line("stopped while")
            assert TrialState.RUNNING in {t.state for t in trials(tmp_path)}
            assert TrialState.WAITING not in {t.state for t in trials(tmp_path)}
            with serve(tmp_path, port) as restarted:
                assert port_of(restarted) == port
                patient.line("answers again")
                assert patient.end() == 0, patient.output
                restarted.process.terminate()
                assert restarted.end() == 0, restarted.output
    for worker in (patient, stopped):
        assert worker.output.count("does not answer (") == 1
        assert "Traceback" not in worker.output
    found = trials(tmp_path)
    assert [t.state for t in found] == [TrialState.COMPLETE] * 3
    leases = [t.system_attrs[LEASE_ATTR] for t in found]
    assert {int(lease["worker"].split("-")[-2]) for lease in leases} == {patient.process.pid}
    # What the one that went on held, it never lost; the other's trial was taken over at once.
    assert sorted(lease["attempt"] for lease in leases) == [1, 1, 2]
    for trial in found:
        assert sorted(trial.intermediate_values) == list(range(1, EPOCHS + 1))


def test_worker_that_starts_before_its_server_waits_for_it(tmp_path: Path) -> None:
    begin(tmp_path, make_spec(budget={"trials": 1}))
    with serve(tmp_path) as server:
        port = port_of(server)
    with start_worker(tmp_path, port) as patient, start_worker(tmp_path, port) as stopped:
        for worker in (patient, stopped):
            worker.line(f"the store at grpc://127.0.0.1:{port} does not answer")
        stopped.process.send_signal(signal.SIGINT)
        assert stopped.process.wait(30) == 130
        with serve(tmp_path, port):
            patient.line("answers again")
            assert patient.end() == 0, patient.output
    assert "Traceback" not in patient.output + stopped.output
    assert [t.state for t in trials(tmp_path)] == [TrialState.COMPLETE]


def test_stop_request_ends_a_worker_whose_server_hangs(tmp_path: Path) -> None:
    begin(tmp_path, make_spec(train={"epochs": EPOCHS}, budget={"trials": 1}))
    with serve(tmp_path) as server, start_worker(tmp_path, port_of(server)) as worker:
        wait_until(lambda: bool(running(tmp_path, 2)))
        server.process.send_signal(signal.SIGSTOP)
        worker.process.send_signal(signal.SIGINT)
        assert worker.process.wait(30) == 130
        assert "Traceback" not in worker.output


def test_stop_request_ends_a_worker_whose_file_is_locked(tmp_path: Path) -> None:
    begin(tmp_path, make_spec(train={"epochs": EPOCHS}, budget={"trials": 1}))
    with (
        Command("worker", "tiny", "--threads", "1", cwd=tmp_path) as worker,
        closing(sqlite3.connect(tmp_path / "sweep.db", timeout=60, isolation_level=None)) as other,
    ):
        wait_until(lambda: bool(running(tmp_path, 2)))
        other.execute("BEGIN IMMEDIATE")
        worker.line("does not answer (database is locked)")
        worker.process.terminate()
        assert worker.process.wait(30) == 130
        assert "Traceback" not in worker.output


# --- refusals -----------------------------------------------------------------------------------


def test_what_is_no_server_of_ours_is_refused(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from optuna.storages._grpc.auto_generated import api_pb2_grpc
    from optuna.storages._grpc.servicer import OptunaStorageProxyService

    plain = grpc.server(ThreadPoolExecutor(2))
    service = OptunaStorageProxyService(optuna.storages.InMemoryStorage())
    api_pb2_grpc.add_StorageServiceServicer_to_server(service, plain)
    port = plain.add_insecure_port("127.0.0.1:0")
    plain.start()
    with pytest.raises(StorageError, match="run sweep serve there instead"):
        open_storage(f"grpc://127.0.0.1:{port}")
    plain.stop(0).wait()
    with pytest.raises(StorageError, match=r"nothing answers at grpc://.* run sweep serve"):
        open_storage(f"grpc://127.0.0.1:{port}")
    for wrong in ("grpc://host", "grpc://host:x", "grpc://host:1/name", "grpc://:1"):
        with pytest.raises(StorageError, match="write grpc://HOST:PORT"):
            check_url(wrong)
    done = run("serve", "--storage", "grpc://127.0.0.1:1", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("sweep: grpc://127.0.0.1:1 is served already")


def test_port_in_use(tmp_path: Path, store: Callable[..., StoreServer]) -> None:
    server = store()
    done = run("serve", "--port", str(server.port), cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"cannot listen on 127.0.0.1:{server.port} (Address already in use)" in done.stderr


def test_read_only_client_changes_nothing(store: Callable[..., StoreServer]) -> None:
    reader = open_storage(place(store()), read_only=True)
    with pytest.raises(ProxyError, match="read only") as error:
        optuna.create_study(storage=reader, study_name="one")
    assert not is_transient(error.value)
    assert reader.get_all_studies() == []


# --- the store through the server ---------------------------------------------------------------


def test_lock_keeps_out_clients_and_the_processes_beside_the_server(
    tmp_path: Path, store: Callable[..., StoreServer]
) -> None:
    server = store()
    one, two = (open_storage(place(server)) for _ in range(2))
    beside = FileLock(f"{tmp_path / 'sweep.db'}.lock", timeout=0)
    with exclusive(one, place(server)):
        with pytest.raises(Timeout):
            beside.acquire()
        one.get_all_studies()
    with exclusive(two, place(server)):
        pass
    wait_until(lambda: _acquired(beside))


def _acquired(lock: FileLock) -> bool:
    try:
        lock.acquire()
    except Timeout:
        return False
    lock.release()
    return True


def test_lock_that_died_with_its_server_stops_its_holder(
    store: Callable[..., StoreServer],
) -> None:
    server = store()
    client = open_storage(place(server))
    with exclusive(client, place(server)):
        client.get_all_studies()
        server.stop(grace=0)
        store(server.port)
        with pytest.raises(ProxyError) as error:
            wait_until(lambda: client.get_all_studies() == ["never"])
        assert is_transient(error.value)
    with_retries(client.get_all_studies)


def test_trial_goes_on_when_its_server_has_restarted(store: Callable[..., StoreServer]) -> None:
    server = store()
    client = open_storage(place(server))
    study = optuna.create_study(storage=client, study_name="one")
    queue = TrialQueue(client, worker_id="w")
    claim = queue.claim([(study._study_id, 1)])
    assert claim is not None
    trial = with_retries(lambda: optuna.Trial(study, claim.trial_id))
    server.stop(grace=0)
    store(server.port)
    with_retries(client.get_all_studies)
    x = trial.suggest_float("x", 0.0, 1.0)
    trial.report(0.5, 1)
    assert queue.finish(claim, TrialState.COMPLETE, 0.5)
    (stored,) = study.trials
    assert (stored.params, stored.intermediate_values, stored.value) == ({"x": x}, {1: 0.5}, 0.5)


def test_answers_of_many_megabytes(store: Callable[..., StoreServer]) -> None:
    server = store()
    client = open_storage(place(server))
    study = optuna.create_study(storage=client, study_name="one")
    attrs = {"curve": "1" * 1_000_000}
    for _ in range(6):
        study.add_trial(optuna.trial.create_trial(value=0.5, user_attrs=attrs))
    study.set_user_attr("text", "1" * 6_000_000)
    reader = open_storage(place(server), read_only=True)
    assert len(reader.get_all_trials(study._study_id)) == 6
    assert len(reader.get_all_studies()[0].user_attrs["text"]) == 6_000_000


def test_changes_of_others_are_seen_by_a_client_that_has_read_before(
    tmp_path: Path, store: Callable[..., StoreServer]
) -> None:
    client = open_storage(place(store()))
    study = optuna.create_study(storage=client, study_name="one")
    queue = TrialQueue(client, worker_id="w")
    beside = TrialQueue(open_storage(url(tmp_path)), worker_id="beside")
    studies = [(study._study_id, 3)]
    ours, theirs = queue.claim(studies), beside.claim(studies)
    assert ours is not None
    assert theirs is not None
    states = [TrialState.RUNNING, TrialState.RUNNING]
    assert [t.state for t in study.get_trials(deepcopy=False)] == states
    assert beside.finish(theirs, TrialState.COMPLETE, 0.5)
    assert [t.value for t in study.get_trials(deepcopy=False)] == [None, 0.5]
    assert queue.release(ours)
    states = [TrialState.WAITING, TrialState.COMPLETE]
    assert [t.state for t in study.get_trials(deepcopy=False)] == states


def test_store_has_one_name_through_every_address(
    tmp_path: Path, store: Callable[..., StoreServer]
) -> None:
    one, two = store(), store()
    names = {own_url(open_storage(place(server)), place(server)) for server in (one, two)}
    assert len(names) == 1
    (name,) = names
    assert str(one.port) not in name
    assert own_url(open_storage(url(tmp_path)), url(tmp_path)) == url(tmp_path)
