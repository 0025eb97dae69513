"""The `sweep` command as people and programs meet it: real processes, real signals."""

import json
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import pytest
from commands import command, environment, run
from helpers import trials, url, write_spec
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from storage.engine import open_storage
from storage.errors import StorageError
from storage.leases import LEASE_ATTR

EPOCHS = 60
LONG: dict[str, Any] = {"train": {"epochs": EPOCHS}, "budget": {"trials": 3}}
"""Trials of some seconds, so that a signal arrives while they run."""
ENDLESS: dict[str, Any] = {"train": {"epochs": 100_000}, "budget": {"trials": 3}}
"""Trials that none can finish before the signal, however late one of two workers begins."""


def status(cwd: Path, name: str = "tiny") -> dict[str, Any]:
    done = run("status", name, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@contextmanager
def started(cwd: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command("start", *arguments),
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_epochs(cwd: Path, epochs: int, busy: int) -> list[optuna.trial.FrozenTrial]:
    """Wait until so many trials run and have completed so many epochs each."""
    store: BaseStorage | None = None
    polled = threading.Event()
    for _ in range(600):
        # The file, its tables and the study come one after the other.
        with suppress(StorageError, KeyError):
            store = store or open_storage(url(cwd), read_only=True)
            study = optuna.load_study(storage=store, study_name="tiny")
            running = [t for t in study.trials if t.state == TrialState.RUNNING]
            if sum((t.last_step or 0) >= epochs for t in running) >= busy:
                return running
        polled.wait(0.1)
    raise AssertionError("no trial ran within a minute")


def worker_pids(cwd: Path) -> list[int]:
    leases = [t.system_attrs[LEASE_ATTR] for t in trials(cwd) if t.state == TrialState.RUNNING]
    return [lease["pid"] for lease in leases if "pid" in lease]


def test_a_sweep_from_start_to_answer(tmp_path: Path) -> None:
    spec = write_spec(
        tmp_path / "tiny.toml",
        each={"norm": ["group", "fixup"]},
        train={"norm": None},
        **{"try": [{"label": "known", "peak_lr": 0.05}]},
    ).name  # fmt: skip
    done = run("start", spec, "--workers", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "known" in done.stdout
    assert "images held out of training" in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("[")]
    assert len(lines) == 6
    assert "[6/6]" in lines[-1]
    found = status(tmp_path)
    assert found["done"]
    assert [study["name"] for study in found["studies"]] == ["tiny/norm=group", "tiny/norm=fixup"]
    for study in found["studies"]:
        assert study["budget"] == 3
        assert study["counts"]["complete"] == 3
        assert set(study["best"]["params"]) == {"peak_lr"}
        assert study["best"]["accuracy"] > 0.05
        assert [t["label"] for t in study["tries"]] == ["known"]
    again = run("start", spec, "--workers", "1", cwd=tmp_path)
    assert again.returncode == 0
    assert status(tmp_path) == found
    # Each command that the answer names is one that runs.
    named = [line.partition("sweep ")[2] for line in done.stdout.splitlines() if ": " in line]
    offered = [line.split() for line in named if line.startswith(("status", "report", "dashboard"))]
    assert len(offered) == 3
    for line in offered[:2]:
        assert run(*line, cwd=tmp_path).returncode == 0
    # A larger budget goes on, by exactly the difference.
    more = run("start", spec, "--set", "trials=4", "--workers", "1", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    assert [s["counts"]["complete"] for s in status(tmp_path)["studies"]] == [4, 4]


def test_ctrl_c_leaves_the_store_clean_and_starting_again_goes_on(tmp_path: Path) -> None:
    write_spec(tmp_path / "tiny.toml", **LONG)
    with started(tmp_path, "tiny.toml", "--workers", "2") as process:
        running = wait_for_epochs(tmp_path, 3, busy=2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "go on:" in out
    assert "Traceback" not in err
    left = trials(tmp_path)
    # One worker may be done with its trial before the other has begun.
    assert {t.state for t in left} <= {TrialState.WAITING, TrialState.COMPLETE}
    assert TrialState.WAITING in {t.state for t in left}
    kept = {t.number: t.intermediate_values for t in left}
    assert all(len(kept[t.number]) >= 3 for t in running)
    done = run("start", "tiny.toml", "--workers", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    finished = trials(tmp_path)
    assert [t.state for t in finished] == [TrialState.COMPLETE] * 3
    for trial in finished:
        assert sorted(trial.intermediate_values) == list(range(1, EPOCHS + 1))
        for step, value in kept.get(trial.number, {}).items():
            assert trial.intermediate_values[step] == value
    assert [t.params for t in finished[:2]] == [t.params for t in left[:2]]


def test_a_second_ctrl_c_stops_at_once_and_loses_nothing(tmp_path: Path) -> None:
    write_spec(tmp_path / "tiny.toml", **ENDLESS)
    with started(tmp_path, "tiny.toml", "--workers", "2") as process:
        wait_for_epochs(tmp_path, 2, busy=2)
        for pid in worker_pids(tmp_path):
            os.kill(pid, signal.SIGSTOP)  # they cannot stop politely
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("stopping"):
                break
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    assert process.returncode == 130
    assert {t.state for t in trials(tmp_path)} == {TrialState.WAITING}
    assert all(len(t.intermediate_values) >= 2 for t in trials(tmp_path))


def test_a_killed_worker_costs_nothing_but_its_running_epoch(tmp_path: Path) -> None:
    write_spec(tmp_path / "tiny.toml", **LONG)
    with started(tmp_path, "tiny.toml", "--workers", "2") as process:
        wait_for_epochs(tmp_path, 2, busy=2)
        victim = worker_pids(tmp_path)[-1]  # the one furthest from its end
        os.kill(victim, signal.SIGKILL)
        out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    assert "SIGKILL" in err
    finished = trials(tmp_path)
    assert [t.state for t in finished] == [TrialState.COMPLETE] * 3
    assert sorted(t.system_attrs[LEASE_ATTR]["attempt"] for t in finished) == [1, 1, 2]
    for trial in finished:
        assert sorted(trial.intermediate_values) == list(range(1, EPOCHS + 1))
    assert "3 of 3 trials" in out


def test_workers_end_with_a_launcher_that_was_killed(tmp_path: Path) -> None:
    write_spec(tmp_path / "tiny.toml", **ENDLESS)
    with started(tmp_path, "tiny.toml", "--workers", "2") as process:
        wait_for_epochs(tmp_path, 2, busy=2)
        pids = worker_pids(tmp_path)
        process.kill()
        process.communicate()
    wait_for_epochs_end(pids)
    assert {t.state for t in trials(tmp_path)} == {TrialState.WAITING}


def wait_for_epochs_end(pids: list[int]) -> None:
    polled = threading.Event()
    for _ in range(600):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return
        polled.wait(0.05)
    raise AssertionError(f"{pids} still run")


def test_a_worker_may_join_from_elsewhere(tmp_path: Path) -> None:
    write_spec(tmp_path / "tiny.toml", **LONG)
    with started(tmp_path, "tiny.toml", "--workers", "1") as process:
        wait_for_epochs(tmp_path, 1, busy=1)
        joined = run("worker", "tiny", "--threads", "1", cwd=tmp_path)
        _, err = process.communicate(timeout=1200)
    assert joined.returncode == 0, joined.stderr
    assert process.returncode == 0, err
    first, *ended, last = joined.stderr.splitlines()
    assert first.endswith("has joined, on cpu, 1 thread")
    mine = [f"tiny #{t.number}  complete" for t in trials(tmp_path)
            if t.system_attrs[LEASE_ATTR]["worker"] in first]  # fmt: skip
    assert [line[: len(mine[0])] for line in ended] == mine
    assert last.startswith("tiny: nothing is left to run; ")
    assert len({t.system_attrs[LEASE_ATTR]["worker"] for t in trials(tmp_path)}) == 2


def test_a_sweep_may_be_left_to_workers_from_elsewhere(tmp_path: Path) -> None:
    write_spec(tmp_path / "tiny.toml", budget={"trials": 1}, train={"epochs": 1})
    created = run("start", "tiny.toml", "--workers", "0", cwd=tmp_path)
    assert created.returncode == 0, created.stderr
    assert "1 trial; 0 workers" in created.stderr
    assert trials(tmp_path) == []
    lines = [line.partition(": ")[2].strip() for line in created.stdout.splitlines()]
    join, follow, serve = (shlex.split(line)[1:] for line in lines)
    assert serve == ["serve", "--storage", url(tmp_path)]
    (tmp_path / "another").mkdir()
    joined = run(*join, cwd=tmp_path / "another")
    assert joined.returncode == 0, joined.stderr
    followed = run(*follow, cwd=tmp_path)
    assert "1 of 1 trials" in followed.stdout
    # Its confirmation, too.
    arguments = ("confirm", "tiny", "--seeds", "2", "--workers", "0", "--json")
    created = run(*arguments, cwd=tmp_path)
    assert created.returncode == 0, created.stderr
    assert json.loads(created.stdout)["done"] is False
    assert "join:       sweep worker tiny-confirm " in created.stderr
    assert {t.state for t in trials(tmp_path, "tiny-confirm")} == {TrialState.WAITING}


def test_sigterm_to_a_worker_is_polite(tmp_path: Path) -> None:
    write_spec(tmp_path / "tiny.toml", **ENDLESS)
    with started(tmp_path, "tiny.toml", "--workers", "1") as process:
        wait_for_epochs(tmp_path, 1, busy=1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    assert process.returncode == 130
    lone = subprocess.Popen(
        command("worker", "tiny"),
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_epochs(tmp_path, 2, busy=1)
    lone.send_signal(signal.SIGTERM)
    _, err = lone.communicate(timeout=120)
    assert lone.returncode == 130
    _, last = err.splitlines()
    assert last == "tiny: told to stop; 0 trials ended here"
    assert {t.state for t in trials(tmp_path)} == {TrialState.WAITING}


def mistake(result: subprocess.CompletedProcess[str], code: int, *said: str) -> None:
    """One line on stderr, nothing on stdout, the right status."""
    assert result.returncode == code, result
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for part in said:
        assert part in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["start", "fixup-largebtach"], 2, "did you mean 'fixup-largebatch'"),
        (["start", "none.toml"], 2, "cannot read none.toml"),
        (["start", "no\nne.toml"], 2, "cannot read no ne.toml"),
        (["start", "tiny.toml", "--set", "epcohs=3"], 2, "did you mean 'epochs'"),
        (["start", "tiny.toml", "--set", "sampler.type=TPE"], 2, "TPESampler"),
        (["start", "tiny.toml", "--set", "split=classes", "--set", "classes_per_device=3"], 2,
         "multiple"),
        (["start", "tiny.toml", "--set", "num_groups=3"], 2, "num_groups"),
        (["start", "tiny.toml", "--workers", "two"], 2, "accepted: auto, 0, 1, 2"),
        (["plan", "tiny.toml", "--workers", "0"], 2, "'0' is no number of workers; accepted: auto"),
        (["start", "tiny.toml", "--quick"], 2, "[quick]"),
        (["start", "tiny.toml", "--name", "tiny-confirm"], 2, "what sweep confirm writes"),
        (["start", "tiny.toml", "--set", "dataset=images", "--data-dir", "nowhere"], 1, "nowhere"),
        (["start", "tiny.toml", "--storage", "runs.db"], 2, "sqlite:///"),
        (["status", "--storage", "mongo://host/name"], 2, "no driver for mongo"),
        (["report", "tiny", "--format", "gif"], 2, "'--format': 'gif' is not one of 'png', 'svg'"),
        (["start", "tiny.toml", "--storage", "sqlite:///no/folder.db"], 1, "folder"),
        (["start"], 2, "Missing argument"),
        (["strat"], 2, "'status'? sweep --help"),
        (["status", "--jsno"], 2, "--jsno"),
        (["status", "tiny"], 1, "sweep.db does not exist"),
        (["worker", "tiny", "--device", "cuda:7"], 1, "cuda:7"),
        (["start", "tiny.toml", "--set", "lr=0.1"], 2, "did you mean 'peak_lr'?"),
        (["show", "nothing"], 2, "no preset 'nothing', and no sweep of this name in sqlite"),
        (["dashboard", "--storage", "sqlite:///none.db"], 1, "none.db"),
        (["worker", "tiny"], 1, "sweep.db does not exist"),
        (["plan", "tiny", "--storage", f"sqlite:///{'x' * 300}"], 2, "no preset 'tiny'"),
        (["status", "--storage", f"sqlite:///{'x' * 300}"], 1, "name too long"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_a_mistake_is_one_line_and_a_status(
    tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    write_spec(tmp_path / "tiny.toml")
    mistake(run(*arguments, cwd=tmp_path), code, said)
    assert not (tmp_path / "sweep.db").exists()


@pytest.mark.parametrize("name", ["models/__init__.py", "models.py"])
def test_a_module_in_front_of_ours_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    write_spec(tmp_path / "tiny.toml")
    # A process of its own: the others have the right one imported.
    done = subprocess.run(
        command("plan", "tiny.toml"), cwd=tmp_path, capture_output=True, text=True, check=False,
        env=environment() | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    mistake(done, 1, f"{tmp_path / name} stands in front of Sweep's own package 'models'")


def test_the_home_folder_is_known_by_its_sign_in_the_environment_too(tmp_path: Path) -> None:
    write_spec(tmp_path / "tiny.toml", train={"dataset": "images"})
    for given, taken in (("~/pictures", tmp_path / "pictures"), ("~no-such-user", "~no-such")):
        env = environment() | {"HOME": str(tmp_path), "SWEEP_DATA_DIR": given}
        mistake(run("plan", "tiny.toml", cwd=tmp_path, env=env), 1, str(taken))


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [(">&-", 0, ""), (">/dev/full", 1, "cannot write (No space left on device); free some")],
)
def test_an_output_that_takes_nothing(
    tmp_path: Path, redirection: str, code: int, said: str
) -> None:
    write_spec(tmp_path / "tiny.toml")
    shell = ["sh", "-c", f'exec "$@" {redirection}', "sh", *command("show", "tiny.toml")]
    result = subprocess.run(
        shell, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True, check=False
    )
    assert result.returncode == code, result.stderr
    assert result.stderr.count("\n") == code
    assert said in result.stderr


def test_changed_settings_are_refused_with_the_difference(tmp_path: Path) -> None:
    write_spec(tmp_path / "tiny.toml", budget={"trials": 1})
    assert run("start", "tiny.toml", cwd=tmp_path).returncode == 0
    changed = run("start", "tiny.toml", "--set", "epochs=4", cwd=tmp_path)
    mistake(changed, 2, "train.epochs: stored 3, now 4", "--name")
    other = run("start", "tiny.toml", "--set", "epochs=4", "--name", "longer", cwd=tmp_path)
    assert other.returncode == 0, other.stderr
    listed = json.loads(run("list", "--json", cwd=tmp_path).stdout)
    assert [kept["name"] for kept in listed["stored"]] == ["longer", "tiny"]
    # A stored sweep goes on by its name alone.
    assert run("start", "longer", cwd=tmp_path).returncode == 0
    unknown = run("status", "tinny", cwd=tmp_path)
    mistake(unknown, 1, "did you mean 'tiny'")


def test_list_names_the_presets_and_asks_nothing_of_a_store(tmp_path: Path) -> None:
    listed = run("list", cwd=tmp_path)
    assert listed.returncode == 0
    assert "fixup-largebatch" in listed.stdout
    assert "groupnorm-largebatch" in listed.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("preset", ["fixup-largebatch", "groupnorm-largebatch"])
def test_show_prints_a_file_to_start_from(tmp_path: Path, preset: str) -> None:
    shown = run("show", preset, "--quick", cwd=tmp_path)
    assert shown.returncode == 0
    (tmp_path / "mine.toml").write_text(shown.stdout)
    again = run("show", "mine.toml", cwd=tmp_path)
    assert again.stdout == shown.stdout
    as_json = json.loads(run("show", preset, "--json", cwd=tmp_path).stdout)
    assert as_json["train"]["dataset"] == "cifar10"


def test_show_keeps_the_comments_of_what_is_not_changed(tmp_path: Path) -> None:
    whole = run("show", "fixup-largebatch", cwd=tmp_path).stdout
    assert "#" in whole
    (tmp_path / "mine.toml").write_text(whole)
    assert run("show", "mine.toml", cwd=tmp_path).stdout == whole
    changed = run("show", "mine.toml", "--set", "epochs=300", cwd=tmp_path).stdout
    assert "#" not in changed
    assert "epochs = 300\n" in changed
    (tmp_path / "more.toml").write_text('extends = "mine.toml"  # and more\n')
    assert "[search" in run("show", "more.toml", cwd=tmp_path).stdout


def test_every_command_and_option_has_help() -> None:
    import typer

    from sweeps.cli import app

    group = typer.main.get_command(app)
    assert group.help
    for name, found in group.commands.items():  # type: ignore[attr-defined]
        assert found.help, name
        for parameter in found.params:
            assert getattr(parameter, "hidden", False) or parameter.help, (name, parameter.name)


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    shown = subprocess.run(
        command("show", "fixup-largebatch"),
        cwd=tmp_path,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert "Traceback" not in shown.stderr
