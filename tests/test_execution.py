"""Number format, layout and compiler of a trial, by the device at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sweeps import execution
from sweeps.assembly import Assembly, open_dataset
from sweeps.config import TrialConfig
from sweeps.errors import SpecError
from sweeps.execution import autocast_dtype, compiles, memory_format

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_networks_are_compiled_on_gpus_alone_unless_asked_for() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert compiles(TrialConfig.build({}), gpu)
    assert not compiles(TrialConfig.build({}), cpu)
    assert not compiles(TrialConfig.build({"compile": "off"}), gpu)
    assert compiles(TrialConfig.build({"compile": "on"}), cpu)
    assert not compiles(TrialConfig.build({"model": "mine:network"}), gpu)
    assert not compiles(TrialConfig.build({"algorithm": "fedavg"}), gpu)
    with pytest.raises(SpecError, match="it belongs to 'sync-sgd'"):
        TrialConfig.build({"algorithm": "fedavg", "compile": "on"})


@pytest.mark.parametrize("has_units", [False, True])
def test_cpus_compute_in_bfloat16_where_they_have_units_for_it_and_images_are_large_enough(
    has_units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "has_matrix_units", lambda: has_units)
    auto = TrialConfig.build({})
    assert autocast_dtype(auto, CPU, 8) is None
    assert autocast_dtype(auto, CPU, 16) is (torch.bfloat16 if has_units else None)
    assert autocast_dtype(TrialConfig.build({"precision": "float32"}), CPU, 32) is None
    assert autocast_dtype(TrialConfig.build({"precision": "bfloat16"}), CPU, 8) is torch.bfloat16


def test_networks_of_users_stay_in_float32_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast on CPUs knows fewer operations than on GPUs."""
    monkeypatch.setattr(execution, "has_matrix_units", lambda: True)
    assert autocast_dtype(TrialConfig.build({"model": "mine:network"}), CPU, 32) is None


@pytest.mark.parametrize(
    ("text", "has_units"),
    [
        ("processor\t: 0\nflags\t\t: fpu amx_bf16 avx512_bf16 amx_tile amx_int8\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx512_bf16\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", False),
        (None, False),
    ],
    ids=["AMX", "AVX-512", "ARM", "no Linux"],
)
def test_units_are_those_that_linux_offers(
    text: str | None, has_units: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(execution, "CPUINFO", tmp_path / "cpuinfo")
    assert execution.has_matrix_units.__wrapped__() is has_units


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_layouts_are_for_synchronous_trainings_of_our_own_networks(precision: str) -> None:
    def layout(**settings: Any) -> torch.memory_format:
        return memory_format(TrialConfig.build({"precision": precision, **settings}), CPU, 32)

    assert layout(norm="fixup") is torch.channels_last
    assert layout(norm="fixup", algorithm="fedavg") is torch.contiguous_format
    assert layout(norm="instance", width_factor=0.5) is torch.contiguous_format
    own = {"model": "mine:network"}
    assert layout(**own) is torch.contiguous_format


@pytest.mark.parametrize(
    ("norm", "settings"),
    [
        *((n, {}) for n in ("batch", "sync-batch", "group", "layer", "instance", "fixup")),
        ("batch", {"model": "resnet20"}),  # channels-last: runs of a device's images
        ("fixup", {"optimizer": "muon"}),
        ("batch", {"algorithm": "fedavg", "local_steps": 5}),
        ("group", {"algorithm": "fedavg", "local_steps": 5, "virtual_features": 0.1}),
        ("fixup", {"algorithm": "scaffold", "local_steps": 5}),
    ],
    ids=str,
)
def test_a_training_in_bfloat16_learns_what_one_in_float32_does(
    norm: str, settings: dict[str, Any]
) -> None:
    """On any CPU, though most emulate it; resumed, it goes on bit for bit."""

    def build(precision: str) -> TrialConfig:
        return TrialConfig.build(
            {
                "dataset": "digits", "model": "resnet8", "width_factor": 0.25, "norm": norm,
                "num_groups": 2, "num_devices": 4, "split": "iid", "global_batch_size": 32,
                "num_train_images": 200, "validation_fraction": 0.2, "augment": "none",
                "epochs": 2, "peak_lr": 0.02, "schedule": "constant", "precision": precision,
                **settings,
            }
        )  # fmt: skip

    assembly = Assembly(open_dataset(build("auto"), None), CPU)
    exact = [r.train_loss for r in assembly.training(build("float32"), 0).run()]
    config = build("bfloat16")
    whole = assembly.training(config, 0)
    rounded = [r.train_loss for r in whole.run()]
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.03)

    first, second = assembly.training(config, 0), assembly.training(config, 0)
    next(first.run())
    second.load_state_dict(first.state_dict())
    assert [r.train_loss for r in second.run()] == rounded[1:]
    ends = [t.global_model().state_dict() for t in (whole, second)]
    assert all(torch.equal(a, b) for a, b in zip(*(e.values() for e in ends), strict=True))
