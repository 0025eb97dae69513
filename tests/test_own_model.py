"""A network of the user's own: every norm, every algorithm, and what is refused."""

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import command, environment
from helpers import write_spec
from torch import Tensor, nn

from models import build_model
from models.norms import DeviceBatchNorm2d
from storage.checkpoints import CheckpointStore
from sweeps.assembly import Assembly, open_dataset
from sweeps.config import TrialConfig
from sweeps.errors import SpecError
from sweeps.objective import Objective, Progress

MODULE = """
from torch import nn

def tiny(*, norm_layer, num_classes, in_channels, image_size):
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1, bias=False), norm_layer(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), norm_layer(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )

def forgetful(*, norm_layer, num_classes, in_channels, image_size):
    size = in_channels * image_size**2
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(size, num_classes))

def headless(*, norm_layer, num_classes, in_channels, image_size):
    return nn.Conv2d(in_channels, 8, 3)

def of_a_fixed_size(*, norm_layer, num_classes, in_channels, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(99, num_classes))

def hidden(*, norm_layer, num_classes, in_channels, image_size):
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(in_channels * image_size**2, num_classes)
        def forward(self, x):
            return self.fc(nn.functional.dropout(x.flatten(1), 0.5, self.training))
    return Hidden()

def frozen(**keywords):
    network = tiny(**keywords)
    network[0].weight.requires_grad_(False)
    return network

def unused(**keywords):
    network = tiny(**keywords)
    network.other = nn.Conv2d(1, 1, 1)
    network.forward = lambda x: nn.Sequential(*list(network)[:9])(x)
    return network

def lazy(*, norm_layer, num_classes, in_channels, image_size):
    return nn.Sequential(
        nn.LazyConv2d(4, 3), nn.Flatten(), nn.Linear(4 * (image_size - 2)**2, num_classes)
    )

def auxiliary(**keywords):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = tiny(**keywords)
        def forward(self, x):
            return (self.network(x),) * 2 if self.training else self.network(x)
    return Two()

def nothing(*, norm_layer, num_classes, in_channels, image_size):
    return None
"""


@pytest.fixture(autouse=True)
def own_nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "own_nets.py").write_text(MODULE)
    monkeypatch.syspath_prepend(folder)
    return folder


def config(**changes: Any) -> TrialConfig:
    values: dict[str, Any] = {
        "dataset": "digits", "augment": "none", "model": "own_nets:tiny", "norm": "group",
        "num_groups": 4, "num_devices": 5, "split": "classes", "classes_per_device": 2,
        "global_batch_size": 40, "epochs": 2, "peak_lr": 0.1, "schedule": "constant",
        "num_train_images": 400,
    }  # fmt: skip
    return TrialConfig.build({**values, **changes})


def train(made: TrialConfig, **options: Any) -> list[Progress]:
    torch.set_num_threads(1)
    heard: list[Progress] = []
    objective = Objective(Assembly(open_dataset(made, None), torch.device("cpu")))
    objective.run(made, seeds=1, **{"on_epoch": heard.append, **options})
    return heard


@pytest.mark.parametrize("norm", ["batch", "sync-batch", "group", "layer", "instance"])
def test_it_learns_with_every_norm(norm: str) -> None:
    split = "iid" if norm == "batch" else "classes"
    heard = train(config(norm=norm, split=split, epochs=6))
    least = 0.99 if norm == "instance" else 0.9
    assert heard[-1].result.train_loss < least * heard[0].result.train_loss


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "fedavg", "local_steps": 3, "norm": "batch"},
        {"algorithm": "scaffold", "local_steps": 3},
        {"algorithm": "fedavg", "local_steps": 3, "virtual_features": 1.0},
        {"agc_clip_factor": 0.1, "optimizer": "lars", "lars_trust_coefficient": 0.01},
        {"optimizer": "muon", "muon_lr_factor": 0.1},
    ],
    ids=str,
)
def test_it_goes_with_every_algorithm(changes: dict[str, Any]) -> None:
    heard = train(config(**changes))
    assert len(heard) == 2
    assert heard[-1].result.train_loss < 2.5


def test_devices_keep_statistics_of_their_own() -> None:
    """As D copies of the network in PyTorch's own layers, each on its device's images."""
    arguments: dict[str, Any] = {"num_classes": 10, "in_channels": 1, "image_size": 8}
    fused = build_model("own_nets:tiny", norm="batch", num_devices=2, seed=3, **arguments).double()
    import own_nets  # type: ignore[import-not-found]

    copies = []
    for _ in range(2):
        copy = own_nets.tiny(norm_layer=nn.BatchNorm2d, **arguments).double()
        state = fused.get_submodule("network").state_dict()
        copy.load_state_dict({k: v for k, v in state.items() if "running" not in k}, strict=False)
        copies.append(copy)
    images = torch.randn(8, 1, 8, 8, dtype=torch.float64)
    logits = fused(images, ((None, 4),))
    for device, copy in enumerate(copies):
        torch.testing.assert_close(logits[device::2], copy(images[device::2]))
    layers = [m for m in fused.modules() if isinstance(m, DeviceBatchNorm2d)]
    norms = [[m for m in c.modules() if isinstance(m, nn.BatchNorm2d)] for c in copies]
    for index, layer in enumerate(layers):
        for device in range(2):
            mean = norms[device][index].running_mean
            assert isinstance(mean, Tensor)
            torch.testing.assert_close(layer.running_mean[device], mean)


def test_a_resumed_training_equals_one_never_stopped(tmp_path: Path) -> None:
    made = config(algorithm="fedavg", local_steps=2, epochs=3)
    whole = train(made)
    kept: dict[str, Any] = {"checkpoints": CheckpointStore(tmp_path / "kept"), "key": "a"}

    def stop_after_one(progress: Progress) -> None:
        if progress.step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(made, on_epoch=stop_after_one, **kept)
    resumed = train(made, **kept)

    def numbers(heard: list[Progress]) -> list[Any]:
        plain = [dataclasses.asdict(p.result) for p in heard]
        return [{k: v for k, v in r.items() if "second" not in k} for r in plain]

    assert numbers(resumed) == numbers(whole)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "own_nets:missing"}, "cannot be imported"),
        ({"model": "no_such_module:build"}, "put its folder on PYTHONPATH"),
        ({"model": "own_nets:MODULE_NAME"}, "cannot be imported"),
        ({"model": "own_nets:forgetful"}, "draws random numbers"),
        ({"model": "own_nets:hidden"}, "draws random numbers"),
        ({"model": "own_nets:frozen"}, "frozen"),
        ({"model": "own_nets:unused"}, "takes no part"),
        ({"model": "own_nets:lazy"}, "lazy layers"),
        ({"model": "own_nets:auxiliary"}, "returns tuple"),
        ({"model": "own_nets:headless"}, "no linear layer with a bias and num_classes=10"),
        ({"model": "own_nets:of_a_fixed_size"}, "cannot be used"),
        ({"model": "own_nets:nothing"}, "returned NoneType"),
        ({"norm": "fixup"}, "accepted with it: batch, sync-batch, group, layer, instance"),
        ({"num_groups": 3}, "cannot be used"),
        ({"width_factor": 0.5}, "leave width_factor"),
        ({"feature_norm": "rms"}, "leave width_factor"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused(changes: dict[str, Any], says: str) -> None:
    made = config(**changes)
    with pytest.raises(ValueError, match=says) as refusal:
        Assembly(open_dataset(made, None), torch.device("cpu")).check(made)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["resnet19", "own_nets", ":tiny", "own nets:tiny", "a:b:c"])
def test_what_is_no_import_path_is_a_misspelt_name(name: str) -> None:
    with pytest.raises(SpecError, match="model = "):
        config(model=name)


def test_workers_find_it_on_the_path(tmp_path: Path, own_nets: Path) -> None:
    write_spec(
        tmp_path / "tiny.toml", train={"model": "own_nets:tiny", "width_factor": None},
        budget={"trials": 1},
    )  # fmt: skip
    start = command("start", "tiny.toml", "--workers", "1")
    options: dict[str, Any] = {"cwd": tmp_path, "capture_output": True, "text": True}
    found = {**environment(), "PYTHONPATH": f"{own_nets}:{environment().get('PYTHONPATH', '')}"}
    done = subprocess.run(start, env=found, check=False, **options)
    assert done.returncode == 0, done.stderr
    lost = subprocess.run(
        command("start", "tiny.toml", "--name", "other"), env=environment(), check=False, **options
    )
    assert lost.returncode == 2, lost.stderr
    assert "cannot be imported" in lost.stderr
    assert "Traceback" not in lost.stderr
