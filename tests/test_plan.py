"""`sweep plan`, and what `sweep start` says and asks before it runs."""

import dataclasses
import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from commands import Command, environment, run
from helpers import begin, make_spec, trials, write_spec
from optuna.storages import BaseStorage
from optuna.trial import TrialState, create_trial
from rich.console import Console
from terminal import Terminal

from data.dataset import made_dataset
from data.errors import DataError
from data.sources import load_dataset, outline
from storage.trials import TrialQueue
from sweeps import search, specfiles
from sweeps.assembly import Assembly, Sizes
from sweeps.attributes import CURVES, OUTCOME
from sweeps.confirm import enqueue_runs
from sweeps.errors import SpecError, SweepError
from sweeps.machine import Slot
from sweeps.planning.measuring import unmeasured
from sweeps.planning.plan import Plan, count
from sweeps.planning.sampling import throwaway_folder
from sweeps.planning.shapes import key_of, shapes
from sweeps.planning.share import epoch_share
from sweeps.planning.speeds import Sample, keep_sample, kept_sample
from sweeps.planning.stopwatch import measure_here
from sweeps.planning.words import DAY, plan_line, plan_lines, plan_table, spoken
from sweeps.preflight import device_named
from sweeps.spec import SweepSpec
from sweeps.studies import stored_sweep

SIZES = Sizes(train_images=1000, val_images=100, updates_per_epoch=10, images_per_epoch=1280)
SAMPLE = Sample(
    epoch_seconds=2.0, begin_seconds=1.0, startup_seconds=5.0, checkpoint_bytes=100, updates=10,
    batch=128, measured="epochs",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No measurement of another test's, and no data set that somebody downloaded."""
    monkeypatch.setenv("SWEEP_CACHE_DIR", str(tmp_path / "cache"))


def plan_of(
    spec: SweepSpec,
    *,
    workers: int = 1,
    sample: Sample | None = SAMPLE,
    store: BaseStorage | None = None,
) -> Plan:
    planned = count(
        spec, [SIZES] * len(spec.cells), store, slots=lambda left: [Slot("cpu", 1)] * workers
    )
    if sample is None:
        return planned
    samples = {shape.key: sample for study in planned.studies for _, shape in study.shapes}
    return dataclasses.replace(planned, samples=samples, startup_seconds=sample.startup_seconds)


def planned(cwd: Path, *arguments: str) -> dict[str, Any]:
    done = run_here("plan", *arguments, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run_here(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """With the cache of this test, which `commands.run` takes away by itself."""
    return run(*arguments, cwd=cwd, env=environment() | {"SWEEP_CACHE_DIR": str(cwd / "cache")})


# Counting


def test_trials_epochs_and_images_multiply() -> None:
    spec = make_spec(
        each={"norm": ["group", "fixup"]}, train={"norm": None}, budget={"trials": 5, "seeds": 2}
    )
    found = plan_of(spec, workers=1).as_dict()
    # 2 studies, 5 trials, 2 seeds, 3 epochs, 1280 images.
    assert found["total"] == {
        "studies": 2, "trials": 10, "epochs": 60, "images": 60 * 1280,
    }  # fmt: skip
    assert found["remaining"] == {"trials": 10, "epochs": 60, "images": 60 * 1280}
    # Each trial begins once and runs 6 epochs of 2 s; startup comes once.
    assert found["seconds"] == found["seconds_without_pruning"] == 10 * (1 + 6 * 2) + 5
    assert found["disk"]["checkpoint_bytes"] == 2 * 100


def test_workers_share_the_trials_and_the_last_one_is_waited_for() -> None:
    one, two, four = (
        plan_of(make_spec(budget={"trials": 3}), workers=workers).seconds(pruning=True)
        for workers in (1, 2, 4)
    )
    assert (one, two, four) == (3 * 7 + 5, 2 * 7 + 5, 7 + 5)


def test_studies_that_carry_are_dealt_one_after_another() -> None:
    axis = {"each": {"norm": ["group", "fixup"]}, "train": {"norm": None}}
    found = []
    for carry in (0, 1):
        plan = plan_of(make_spec(**axis, budget={"trials": 3, "carry": carry}), workers=2)
        first = plan.studies[0]
        # A trial takes 21 s in the first study, 7 s in the second.
        samples = {
            **plan.samples,
            **{s.key: dataclasses.replace(SAMPLE, begin_seconds=15.0) for _, s in first.shapes},
        }
        found.append(dataclasses.replace(plan, samples=samples).seconds(pruning=True))
    # In turns: 21 + 7 + 21 beside 7 + 21 + 7. One study first: 21 + 21 beside 21 + 7 + 7 + 7.
    assert found == [49 + 5, 42 + 5]


@pytest.mark.parametrize(
    ("train", "images"),
    [
        ({"global_batch_size": 100}, 1100),
        # Those that take part bring the whole batch.
        ({"global_batch_size": 100, "participation": 0.5}, 1100),
        # A local step is an update.
        ({"global_batch_size": 100, "algorithm": "fedavg", "local_steps": 7}, 1100),
        ({"global_batch_size": 100, "num_train_images": 500}, 400),
    ],
)
def test_images_are_those_that_a_trial_trains_on(train: dict[str, Any], images: int) -> None:
    spec = make_spec(train={**train, "epochs": 1}, search={}, budget={"trials": 1})
    config = spec.config({}, {})
    assembly = Assembly(load_dataset("digits"), torch.device("cpu"))
    sizes = assembly.sizes(config)
    assert sizes.images_per_epoch == images
    batches = assembly.batches(config, 0)
    assert batches.updates_per_epoch == sizes.updates_per_epoch
    assert sum(len(batch.labels) for batch in batches.epoch(0)) == images


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"split": "classes", "classes_per_device": 5}, r"4 devices with 269 to 270 images and 5 "),
        ({"split": "dirichlet", "alpha": 0.1}, r"4 devices with \d+ to \d+ images and \d to \d+ "),
        # Of the 1,078 training images, 278 are divided.
        ({"shared_images": 800}, r"4 devices with 869 to 870 images and 10 "),
    ],
)
def test_the_split_is_counted_as_the_devices_hold_it(train: dict[str, Any], said: str) -> None:
    spec = make_spec(train=train, search={}, budget={"trials": 1})
    config = spec.config({}, {})
    assembly = Assembly(load_dataset("digits"), torch.device("cpu"))
    sizes = assembly.sizes(config)
    prepared = assembly.prepared(config)
    held = [prepared.train_labels[torch.from_numpy(shard)] for shard in prepared.shards]
    assert sizes.device_images == tuple(len(labels) for labels in held)
    assert sizes.device_classes == tuple(len(set(labels.tolist())) for labels in held)
    found = count(spec, [sizes], None, slots=lambda left: [Slot("cpu", 1)])
    (line,) = (line for line in plan_lines(found) if line.startswith("split:"))
    assert re.fullmatch(rf"split:      {said}classes each", line)


def test_splits_that_differ_have_a_line_each() -> None:
    spec = make_spec(each={"norm": ["group", "layer", "fixup"]}, train={"norm": None})
    ways = [dataclasses.replace(SIZES, device_images=(5, n), device_classes=(2, 2)) for n in (5, 9)]
    found = count(spec, [ways[0], ways[1], ways[0]], None, slots=lambda left: [Slot("cpu", 1)])
    assert [line for line in plan_lines(found) if line.startswith("split:")] == [
        "split:      2 devices with 5 images and 2 classes each (norm=group; norm=fixup)",
        "split:      2 devices with 5 to 9 images and 2 classes each (norm=layer)",
    ]


def test_a_study_that_is_done_needs_no_measurement() -> None:
    spec = make_spec(each={"norm": ["group", "fixup"]}, train={"norm": None})
    whole = plan_of(spec)
    group, fixup = whole.studies
    group = dataclasses.replace(group, finished=3, open=[], fresh=range(3, 3))
    ((_, shape),) = fixup.shapes
    one = dataclasses.replace(whole, studies=[group, fixup], samples={shape.key: SAMPLE})
    assert not unmeasured(one)
    assert one.as_dict()["seconds"] == 3 * 7 + 5
    assert one.as_dict()["disk"]["checkpoint_bytes"] == 100
    assert [study["epoch_seconds"] for study in one.as_dict()["studies"]] == [None, 2.0]
    assert any("time:" in line and "about 26 s" in line for line in plan_lines(one))
    console = Console(width=160)
    with console.capture() as shown:
        console.print(plan_table(one))
    assert "–" in shown.get()
    none = dataclasses.replace(one, studies=[group], samples={})
    assert none.as_dict()["seconds"] == 0
    assert plan_line(none) == "nothing is left to run"


def test_a_huge_budget_is_counted_without_being_listed() -> None:
    found = plan_of(make_spec(budget={"trials": 10**12}), workers=2)
    assert found.as_dict()["total"]["epochs"] == 3 * 10**12
    assert found.seconds(pruning=True) == pytest.approx(10**12 * 7 / 2)


def test_budgets_of_epochs_and_hours_end_it_earlier() -> None:
    whole = plan_of(make_spec(budget={"trials": 10})).seconds(pruning=True)
    half = plan_of(make_spec(budget={"trials": 10, "epochs_total": 15})).seconds(pruning=True)
    assert half - 5 == pytest.approx((whole - 5) / 2)
    hours = plan_of(make_spec(budget={"trials": 10, "hours": 0.005})).seconds(pruning=True)
    assert hours == 18 + 5


def test_the_pruner_is_expected_to_save_what_it_may() -> None:
    pruner = {"type": "MedianPruner", "n_startup_trials": 2, "n_warmup_steps": 10}
    known = [{"label": "known", "peak_lr": 0.1}]
    spec = make_spec(
        train={"epochs": 20}, pruner=pruner, budget={"trials": 6}, **{"try": known}
    )  # fmt: skip
    found = plan_of(spec)
    share = (10 + 0.45 * 10) / 20
    assert found.share.value == pytest.approx(share)
    # Trials 0 (known) and 1 run to their end whatever the others do.
    assert found.seconds(pruning=True) == pytest.approx(6 + 2 * 40 + 4 * 40 * share + 5)
    assert found.seconds(pruning=False) == 6 * 41 + 5
    assert "saved by pruning" in plan_line(found)
    assert epoch_share(make_spec(), None, None).value == 1


def test_successive_halving_leaves_what_its_rungs_leave() -> None:
    pruner = {"type": "SuccessiveHalvingPruner", "min_resource": 1, "reduction_factor": 2}
    share = epoch_share(make_spec(train={"epochs": 4}, pruner=pruner), None, None)
    # All run 1 epoch, a half a second one, a quarter the last two.
    assert share.value == pytest.approx((1 + 0.5 * 1 + 0.25 * 2) / 4)
    ours = {"type": "WarmupHalvingPruner", "first_rung": 0.25, "tolerance": 0.0}
    same = epoch_share(make_spec(train={"epochs": 4}, pruner=ours), None, None)
    assert same.value == share.value
    assert "WarmupHalvingPruner lets 50% of the trials pass" in same.whence
    # Those near the best pass too.
    usual = {"type": "WarmupHalvingPruner"}
    near = epoch_share(make_spec(train={"epochs": 60}, pruner=usual), None, None)
    assert near.value == pytest.approx(0.3 + 0.75 * 0.3 + 0.75**2 * 0.4)
    everyone = epoch_share(make_spec(pruner={**usual, "tolerance": 1.0}), None, None)
    assert everyone.value == 1


def test_searched_settings_that_change_the_speed_are_shapes_of_their_own() -> None:
    spec = make_spec(
        search={
            "peak_lr": {"low": 0.01, "high": 0.1},
            "clip_grad_norm": {"choices": ["off", 0.5, 1.0, 2.0]},
            "model": {"choices": ["resnet8", "resnet20"]},
        },
        train={"model": None},
    )
    found = shapes(spec, {})
    assert sorted(weight for weight, _ in found) == [0.125, 0.125, 0.375, 0.375]
    assert {shape.config.model for _, shape in found} == {"resnet8", "resnet20"}
    assert len({shape.key for _, shape in found}) == 4
    # Of a learning rate there is nothing to measure.
    (only,) = shapes(make_spec(), {})
    assert only[0] == 1
    assert only[1].pinned == {}


def test_every_presets_shapes_can_be_listed() -> None:
    for name in specfiles.presets():
        spec = specfiles.load(name)
        for cell in spec.cells:
            assert sum(weight for weight, _ in shapes(spec, cell)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.352, "0.35 s"), (62.4, "62 s"), (100, "1.7 min"), (1500, "25 min"), (27000, "7.5 h"),
     (3.24 * DAY, "3.2 days"), (129 * DAY, "129 days")],
)  # fmt: skip
def test_times_are_spoken(seconds: float, words: str) -> None:
    assert spoken(seconds) == words


# Data sets that are not there


def test_a_missing_data_set_is_outlined_and_made_not_downloaded(tmp_path: Path) -> None:
    found = outline("cifar100", data_dir=tmp_path)
    assert not found.present
    assert found.download_bytes > 1e8
    assert (sum(found.train_counts), sum(found.test_counts)) == (50_000, 10_000)
    assert list(tmp_path.glob("cifar*")) == []
    with pytest.raises(DataError, match="nowhere"):
        outline("images", data_dir=tmp_path / "nowhere")


def test_a_made_data_set_is_of_the_same_sizes() -> None:
    found, real = outline("digits"), load_dataset("digits")
    made = made_dataset(found)
    assert made.train_images.shape == real.train_images.shape
    assert made.test_images.shape == real.test_images.shape
    assert (made.train_labels.bincount() == real.train_labels.bincount()).all()
    assert made.fingerprint != real.fingerprint
    assert found.present


# Measuring


def test_a_shape_is_measured_with_the_engine_of_a_trial() -> None:
    config = make_spec(train={"epochs": 50}).config({}, {"peak_lr": 0.1})
    found = measure_here(load_dataset("digits"), torch.device("cpu"), config, 0.3)
    assert found.epoch_seconds > 0
    assert found.begin_seconds > 0
    assert found.updates == 8
    assert 32 <= found.batch <= 128


def test_a_training_that_diverges_at_once_is_measured_all_the_same() -> None:
    config = make_spec(train={"epochs": 50}).config({}, {"peak_lr": 0.1})
    config = dataclasses.replace(config, peak_lr=1e9)
    found = measure_here(load_dataset("digits"), torch.device("cpu"), config, 0.1)
    assert found.epoch_seconds > 0


def test_measurements_are_kept_by_what_they_depend_on() -> None:
    config = make_spec().config({}, {"peak_lr": 0.1})
    slots = [Slot("cpu", 1)] * 2
    assert kept_sample(config, 1347, slots) is None
    keep_sample(config, 1347, slots, SAMPLE)
    assert kept_sample(config, 1347, slots) == SAMPLE
    assert kept_sample(dataclasses.replace(config, peak_lr=0.2, seed=3), 1347, slots) == SAMPLE
    for other in ({"global_batch_size": 64}, {"clip_grad_norm": 1.0}, {"norm": "layer"}):
        assert kept_sample(dataclasses.replace(config, **other), 1347, slots) is None
    assert kept_sample(config, 1347, slots[:1]) is None
    assert kept_sample(config, 40, slots) is None
    assert key_of(config) != key_of(dataclasses.replace(config, local_steps=2))


# The command


def test_plan_measures_and_leaves_nothing_behind(tmp_path: Path) -> None:
    write_spec(tmp_path / "tiny.toml", each={"norm": ["group", "fixup"]}, train={"norm": None})
    found = planned(tmp_path, "tiny.toml", "--workers", "2", "--seconds", "3")
    assert found["problems"] == []
    assert (found["workers"], found["device"], found["threads"]) == (2, "cpu", 1)
    assert found["total"] == {
        "studies": 2, "trials": 6, "epochs": 18, "images": 18 * 8 * 128,
    }  # fmt: skip
    assert found["seconds"] > found["startup_seconds"] > 0
    assert found["disk"]["checkpoint_bytes"] > 1000
    for study in found["studies"]:
        assert study["epoch_seconds"] > 0
        assert study["trial_seconds"] > 3 * study["epoch_seconds"]
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.toml", "cache"}
    assert {path.name for path in (tmp_path / "cache").iterdir()} <= {"decoded", "speeds"}


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder", encoding="utf-8")
    write_spec(tmp_path / "tiny.toml")
    found = planned(tmp_path, "tiny.toml", "--workers", "1", "--seconds", "0.2")
    assert found["problems"] == []
    assert found["seconds"] > 0


def test_what_a_killed_plan_has_left_is_swept_away(tmp_path: Path) -> None:
    old, new = (tmp_path / "cache" / name for name in ("plan-old", "plan-new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "sweep.db").touch()
    os.utime(old, (0, 0))
    with throwaway_folder() as folder:
        assert Path(folder).parent == tmp_path / "cache"
        assert not old.exists()
        assert new.exists()


def test_what_the_store_holds_is_subtracted(tmp_path: Path) -> None:
    write_spec(tmp_path / "tiny.toml", budget={"trials": 2}, pruner={"type": "MedianPruner"})
    assert run_here("start", "tiny.toml", "--workers", "1", cwd=tmp_path).returncode == 0
    before = (tmp_path / "sweep.db").read_bytes()
    found = planned(tmp_path, "tiny.toml", "--set", "trials=7", "--seconds", "0")
    assert found["total"]["trials"] == 7
    assert found["remaining"] == {"trials": 5, "epochs": 15, "images": 15 * 8 * 128}
    assert found["seconds"] is None
    done = run_here("plan", "tiny", cwd=tmp_path)
    assert done.returncode == 0
    assert "nothing is left to run" in done.stdout
    assert len(trials(tmp_path)) == 2
    assert (tmp_path / "sweep.db").read_bytes() == before
    refused = run_here("plan", "tiny.toml", "--set", "epochs=4", "--seconds", "0", cwd=tmp_path)
    assert refused.returncode == 2
    assert "train.epochs: stored 3, now 4" in refused.stderr


def test_pruning_is_taken_from_the_stores_own_trials(tmp_path: Path) -> None:
    pruner = {"type": "ThresholdPruner", "lower": 2.0, "n_warmup_steps": 1}
    write_spec(tmp_path / "tiny.toml", budget={"trials": 5}, pruner=pruner, train={"epochs": 4})
    assert run_here("start", "tiny.toml", "--workers", "1", cwd=tmp_path).returncode == 0
    steps = [trial.last_step or 0 for trial in trials(tmp_path)]
    found = planned(tmp_path, "tiny.toml", "--set", "trials=9", "--seconds", "0")
    assert found["epoch_share"] == pytest.approx(sum(steps) / 20)
    assert found["epoch_share"] < 1
    assert "this sweep" in found["epoch_share_from"]
    alike = planned(tmp_path, "tiny.toml", "--name", "other", "--seconds", "0")
    assert alike["epoch_share"] == found["epoch_share"]
    assert "like it" in alike["epoch_share_from"]


def test_a_sweep_of_another_version_does_not_stand_in_the_way_of_others(tmp_path: Path) -> None:
    pruner = {"type": "MedianPruner"}
    store = begin(tmp_path, make_spec("newer", pruner=pruner))
    (study,) = stored_sweep(store, "newer").studies
    unknown = {**make_spec("newer").as_dict(), "train": {"of_another_version": 1}}
    store.set_study_user_attr(study.study_id, "sweep_spec", unknown)
    with pytest.raises(SpecError, match="of_another_version"):
        stored_sweep(store, "newer")
    found = plan_of(make_spec(pruner=pruner), store=store)
    assert found.share.whence.startswith("assumed")


def test_a_confirmation_is_planned_with_the_runs_of_each_study(tmp_path: Path) -> None:
    spec = make_spec(train={"norm": None, "epochs": 1}, each={"norm": ["group", "layer"]})
    store = begin(tmp_path, spec)
    for norm, found in (("group", [0.1, 0.2]), ("layer", [0.1])):
        study = optuna.load_study(storage=store, study_name=f"tiny/norm={norm}")
        for lr in found:
            study.add_trial(
                create_trial(
                    value=lr,
                    params={"peak_lr": lr},
                    distributions=search.distributions(spec.search),
                    intermediate_values={1: lr},
                    user_attrs={OUTCOME: "complete"},
                )
            )
    fingerprints = [study.fingerprint for study in stored_sweep(store, "tiny").studies]
    enqueue_runs(store, "tiny", fingerprints, top=2, seeds=2)
    found = planned(tmp_path, "tiny-confirm", "--seconds", "0.5", "--workers", "1")
    assert found["problems"] == []
    assert found["seconds"] > 0
    assert [study["trials"] for study in found["studies"]] == [4, 2]
    assert found["remaining"]["trials"] == 6


def test_plan_says_what_would_be_downloaded(tmp_path: Path) -> None:
    done = run_here(
        "plan", "norms-noniid", "--seconds", "0", "--data-dir", str(tmp_path / "data"), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "cifar10 is not in" in done.stdout
    assert "start downloads 170 MB" in done.stdout
    assert "7 trials, 2,100 epochs" in done.stdout
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "sweep.db").exists()


def test_devices_are_named_as_they_can_be_used() -> None:
    assert device_named("cpu") == torch.device("cpu")
    for name in ("meta", "mps", "nonsense"):
        with pytest.raises(SweepError, match=f"device '{name}' cannot be used"):
            device_named(name)
    if torch.cuda.is_available():
        assert device_named("cuda") == torch.device("cuda:0")


def test_a_device_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    write_spec(tmp_path / "tiny.toml")
    done = run_here("plan", "tiny.toml", "--device", "cuda:7", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "cuda:7" in done.stderr


def test_start_says_how_long_it_will_take_and_learns_from_it(tmp_path: Path) -> None:
    write_spec(tmp_path / "tiny.toml", budget={"trials": 2})
    done = run_here("start", "tiny.toml", "--workers", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    (said,) = [n for n, line in enumerate(lines) if line.startswith("about ")]
    assert "2 trials x 3 epochs in 1 study, 1 worker, " in lines[said]
    seeds = ("--set", "seeds=2", "--name", "other", "--seconds", "0")
    assert "3 x 2 seeds" in run_here("plan", "tiny.toml", *seeds, cwd=tmp_path).stdout
    assert said < next(n for n, line in enumerate(lines) if line.startswith("[1/2]"))
    kept = [json.loads(f.read_text()) for f in (tmp_path / "cache" / "speeds").glob("*.json")]
    assert [sample["measured"] for sample in kept] == ["run"]


# The question


def write_long(tmp_path: Path) -> None:
    """A sweep that would take more than a day."""
    write_spec(tmp_path / "tiny.toml", budget={"trials": 10_000_000})


@pytest.mark.parametrize(("answer", "code"), [("n\n", 1), (None, 130)])
def test_a_long_run_is_asked_about_and_no_leaves_nothing(
    tmp_path: Path, answer: str | None, code: int
) -> None:
    write_long(tmp_path)
    with Terminal("start", "tiny.toml", "--workers", "1", cwd=tmp_path) as terminal:
        terminal.wait_for(lambda output: "[y/N]" in output)
        if answer is None:
            terminal.process.send_signal(signal.SIGINT)
        else:
            terminal.type(answer)
        assert terminal.end() == code
        assert "Traceback" not in terminal.output
        assert re.search(r"about [\d.,]+ days: 10000000 trials", terminal.output)
    assert not (tmp_path / "sweep.db").exists()


@pytest.mark.parametrize("options", [["--yes"], []], ids=["--yes", "y"])
def test_yes_starts_it(tmp_path: Path, options: list[str]) -> None:
    write_long(tmp_path)
    with Terminal("start", "tiny.toml", "--workers", "1", *options, cwd=tmp_path) as terminal:
        if not options:
            terminal.wait_for(lambda output: "[y/N]" in output)
            terminal.type("y\n")
        terminal.wait_for(lambda output: "running" in output)
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == 130
        assert ("[y/N]" in terminal.output) == (not options)
        assert "go on:" in terminal.output


def test_nobody_is_asked_where_there_is_no_terminal(tmp_path: Path) -> None:
    write_long(tmp_path)
    with Command("start", "tiny.toml", "--workers", "1", cwd=tmp_path) as started:
        assert "10000000 trials" in started.line("about ")
        started.line("[1/10000000]")
        started.process.send_signal(signal.SIGINT)
        assert started.end() == 130
        assert "[y/N]" not in started.output


# Following a sweep


class Held:
    """A sweep of one trial of 150 epochs, which this process holds as a worker does."""

    def __init__(self, tmp_path: Path) -> None:
        store = begin(tmp_path, make_spec(budget={"trials": 1}, train={"epochs": 150}))
        (study,) = stored_sweep(store, "tiny").studies
        self._queue = TrialQueue(store, worker_id="w")
        claim = self._queue.claim([(study.study_id, 1)])
        assert claim is not None
        self._claim = claim

    def report(self, step: int, score: float) -> None:
        curves = {CURVES: {"images_per_second": [1234.0]}}
        assert self._queue.report(self._claim, step, score, system_attrs=curves)

    def finish(self) -> None:
        outcome = {OUTCOME: "complete"}
        assert self._queue.finish(self._claim, TrialState.COMPLETE, 0.75, user_attrs=outcome)


def test_watch_on_a_terminal_ends_with_the_sweep_or_before(tmp_path: Path) -> None:
    held = Held(tmp_path)
    held.report(7, 0.5)
    with (
        Terminal("status", "tiny", "--watch", cwd=tmp_path) as stopped,
        Terminal("status", "tiny", "--watch", cwd=tmp_path) as watching,
    ):
        stopped.wait_for(lambda output: "Ctrl-C ends the view" in output)
        stopped.process.send_signal(signal.SIGINT)
        assert stopped.end() == 130
        assert "Traceback" not in stopped.output
        watching.wait_for(lambda output: "7/150" in output and "1,234" in output)
        held.report(8, 0.625)
        watching.wait_for(lambda output: "8/150" in output and "0.6250" in output)
        held.finish()
        assert watching.end() == 0
        assert "Traceback" not in watching.output
        # The view goes, the answer stays.
        assert "1 of 1 trials; 1 complete" in watching.output


def test_watch_off_a_terminal_is_a_line_for_each_change(tmp_path: Path) -> None:
    held = Held(tmp_path)
    with (
        Command("status", "tiny", "--watch", cwd=tmp_path) as lines,
        Command("status", "tiny", "--watch", "--json", cwd=tmp_path) as objects,
    ):
        objects.line('"running": 1')
        held.report(7, 0.5)
        objects.line('"accuracy": 0.5')
        held.finish()
        assert (lines.end(), objects.end()) == (0, 0)
        assert "1 of 1 trials; 1 complete" in lines.output
        states = [json.loads(line) for line in objects.output.splitlines()]
        assert [state["done"] for state in states] == [False, False, True]
        assert states[-1]["studies"][0]["counts"]["complete"] == 1
        assert states[1]["studies"][0]["running"][0]["step"] == 7


def test_watch_follows_one_sweep(tmp_path: Path) -> None:
    done = run("status", "--watch", cwd=tmp_path)
    assert done.returncode == 2
    assert "give its name" in done.stderr
