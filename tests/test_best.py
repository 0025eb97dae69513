"""What `sweep best` writes: weights that score as their trial did, settings that can be started."""

from __future__ import annotations

import resource
import tomllib
from pathlib import Path

import pytest
import torch
from commands import run
from helpers import begin, make_spec, make_worker, save_checkpoint, trials, url, write_spec

from data.batches import normalise
from data.holdout import split_train
from data.sources import load_dataset
from models import build_model
from storage.checkpoints import CheckpointStore
from sweeps.best import write_best
from sweeps.errors import SweepError
from sweeps.specfiles import load

FEDERATED = {
    "algorithm": "fedavg", "local_steps": 2, "participation": 0.5, "num_devices": 4,
    "server_momentum": 0.5,
}  # fmt: skip


def written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, list[str], list[str], Path]:
    monkeypatch.setenv("SWEEP_CHECKPOINT_DIR", str(tmp_path / "checkpoints"))
    said: list[str] = []
    warned: list[str] = []
    folder = tmp_path / "out"
    code = write_best(
        "tiny", url(tmp_path), folder=folder, data_dir=None, say=said.append, warn=warned.append
    )
    return code, said, warned, folder


@pytest.mark.parametrize("train", [{}, FEDERATED, {"norm": "fixup"}, {"norm": "batch"}])
def test_the_weights_score_as_their_trial_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: dict[str, object]
) -> None:
    begin(tmp_path, make_spec(train=train, budget={"trials": 2, "seeds": 2}))
    make_worker(tmp_path).run()
    code, said, warned, folder = written(tmp_path, monkeypatch)
    assert (code, warned) == (0, [])
    assert said == [str(folder / "tiny.toml"), str(folder / "tiny.pt")]

    saved = torch.load(folder / "tiny.pt", weights_only=True)
    model = build_model(**saved["network"])
    model.load_state_dict(saved["weights"])
    model.eval()
    digits = load_dataset("digits")
    _, held_out = split_train(
        digits.train_labels.numpy(), num_images=None, validation_fraction=0.2, seed=0
    )
    images = digits.train_images[torch.from_numpy(held_out)]
    with torch.inference_mode():
        logits = model(normalise(images, saved["mean"], saved["std"], channels_last=False))
    labels = digits.train_labels[torch.from_numpy(held_out)]
    accuracy = (logits.argmax(1) == labels).double().mean().item()

    best = max(trials(tmp_path), key=lambda t: (t.value, -t.number))
    assert (saved["trial"], saved["accuracy"]) == (best.number, best.value)
    assert saved["seed"] == 1  # of the two, the last
    last = best.system_attrs["sweep:curves"]["val_accuracy"][-1]
    assert accuracy == pytest.approx(last, abs=1e-5)
    assert saved["config"]["peak_lr"] == best.params["peak_lr"]
    assert saved["classes"] == [str(digit) for digit in range(10)]


def test_the_settings_are_a_sweep_of_that_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWEEP_CHECKPOINT_DIR", str(tmp_path / "checkpoints"))
    each = {"each": {"norm": ["group", "layer"]}, "train": {"norm": None}}
    spec = make_spec(**each, budget={"trials": 1})
    begin(tmp_path, spec)
    make_worker(tmp_path).run()
    code, said, _, folder = written(tmp_path, monkeypatch)
    assert code == 0
    assert len(said) == 4
    file = folder / "tiny-norm-layer.toml"
    again = load(str(file))
    assert (again.name, again.budget.trials, again.search) == ("tiny-norm-layer", 1, {})
    (trial,) = trials(tmp_path, "tiny/norm=layer")
    expected = spec.config({"norm": "layer"}, trial.params)
    assert again.config(again.cells[0], {}) == expected
    assert tomllib.loads(file.read_text("utf-8"))["train"] == expected.as_dict()


def test_without_checkpoints_the_settings_are_written_and_said_to_be_all(tmp_path: Path) -> None:
    file = write_spec(tmp_path / "tiny.toml", budget={"trials": 1, "keep_checkpoints": "none"})
    arguments = ["start", str(file), "--workers", "1", "--data-dir", "my images"]
    ended = run(*arguments, cwd=tmp_path)
    assert ended.returncode == 0
    what_next = ended.stdout.splitlines()[-2:]
    assert what_next == [
        f"{command} tiny --storage sqlite:///sweep.db --data-dir 'my images'"
        for command in ("confirm:    sweep confirm", "take along: sweep best")
    ]
    done = run("best", "tiny", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == "tiny-best/tiny.toml\n"
    assert done.stderr.startswith("sweep: tiny #0: no weights")
    assert "keep_checkpoints is 'none'" in done.stderr


def test_a_sweep_without_a_best_trial_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path, make_spec())
    with pytest.raises(SweepError, match="no trial has completed yet"):
        written(tmp_path, monkeypatch)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_a_seed_before_the_last_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a trial was begun on this machine and ended on another."""
    begin(tmp_path, make_spec(budget={"trials": 1, "seeds": 2}))
    make_worker(tmp_path).run()
    assert written(tmp_path, monkeypatch)[0] == 0
    checkpoints = CheckpointStore(tmp_path / "checkpoints")
    state = checkpoints.load("tiny/0")
    assert state is not None
    save_checkpoint(checkpoints, "tiny/0", {**state, "finished": "[]"})
    code, said, (line,), folder = written(tmp_path, monkeypatch)
    assert (code, said) == (1, [str(folder / "tiny.toml")])
    assert line.startswith("tiny #0: no weights")
    assert line.endswith(f"; {folder / 'tiny.pt'}, of an earlier call, stays as it is")


def test_a_full_disk_is_said_and_leaves_no_half_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path, make_spec(budget={"trials": 1}))
    make_worker(tmp_path).run()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(SweepError, match=r"tiny\.pt \(File too large\); name another folder"):
            written(tmp_path, monkeypatch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["tiny.toml"]
