"""The trial engine against plain PyTorch: images, epochs, convolutions, federated rounds, a GPU.

    python tests/benchmarks/engine.py [--rows data epoch convolutions fedavg bfloat16 gpu]
        [--rounds 5] [--fast] [--only TEXT] [--json FILE]

Plain PyTorch is what its users write: a `torchvision` data set of PIL images behind a
`DataLoader` with `transforms`, an eager loop in the default layout that makes one pass for each
device and asks for the loss in every step. Ours is what a worker runs. Both have the same
networks, sizes, rates and, but for `data` and `gpu`, one thread.

The two take turns. A round's ratio is of the two that stand next to each other; the table has the
medians over the rounds and, in brackets, the least and the largest ratio. Rows on one thread are
timed by the process's CPU time, which other processes on the machine disturb less than the
clock; the GPU's by the clock. `DataLoader` workers count half of the CPU time that both take: what
the clock would show at the least, on two cores that have nothing else to do.

- data: crop, flip and normalise 10,000 made-up 32x32 images in batches of 320; against a
  `DataLoader` with 2 workers. Target 20.
- epoch: one synchronous epoch of the noisy digits, 10 devices with 8 images each, ResNet-18 of
  width 0.125; against one pass per device. `ready` is the same with the baseline's batches made
  beforehand. Target 4.
- convolutions: a step of ResNet-18 on 128 images of 32x32, as a share of what its convolutions
  take alone, each in its best layout, forward and backward. One step a round after one that does
  not count. Target 0.85.
- fedavg: a round of 10 devices and 5 local steps; against a loop over D networks with an optimizer
  each. Target 4 on the smallest network, and nowhere below 0.95.
- bfloat16: a step as a worker takes it on a CPU that multiplies in bfloat16, against ours in
  float32, which all rows above are in. Target 1.
- gpu: ResNet-18 at 32x32 on a GPU: images/s and peak memory, against the plain loop on that GPU,
  with 2 loading workers and the same deterministic cuDNN. Target 10, and 40,000 images/s.
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision import transforms

from data.batches import DeviceBatches, channel_statistics
from data.dataset import Dataset
from models import build_model
from sweeps.assembly import Assembly, open_dataset
from sweeps.config import TrialConfig
from sweeps.execution import has_matrix_units
from sweeps.process import prepare_process
from sweeps.training.loop import Evaluation

D = 10
SEED = 0
CPU = torch.device("cpu")

Row = dict[str, Any]
Clock = Callable[[], float]


# What both are given


def made_up(count: int, side: int, *, channels: int = 3, classes: int = 10) -> Dataset:
    """Random images under the name of a data set that augments as CIFAR-10 does."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (count, channels, side, side)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % classes
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    few = slice(0, min(count, 1000))
    names = tuple(map(str, range(classes)))
    return Dataset("cifar10", images, labels, images[few], labels[few], names, digest)


def trial(**settings: Any) -> TrialConfig:
    """A config of one epoch at a constant rate."""
    fixed = {
        "num_devices": D, "split": "iid", "epochs": 10**6, "schedule": "constant",
        "peak_lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "validation": "test",
    }  # fmt: skip
    return TrialConfig.build({**fixed, **settings})


class Ours:
    """Epochs as a worker trains them, one after the other, without their validation."""

    def __init__(self, config: TrialConfig, dataset: Dataset, device: torch.device) -> None:
        self.training = Assembly(dataset, device).training(config, SEED)
        self.training._evaluate = lambda: Evaluation(1.0, 0.5, 10, 1.0)
        self.images = self.training._batches.images_per_epoch
        self._epochs = self.training.run()

    def __call__(self) -> None:
        """Train one epoch."""
        next(self._epochs)


# The plain baseline


class Pictures(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """PIL images and their transforms, as `torchvision.datasets.CIFAR10` has them."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self.data = images.permute(0, 2, 3, 1).squeeze(3).contiguous().numpy()
        self.targets = labels.tolist()
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]

    def __len__(self) -> int:
        return len(self.data)


def pictures(dataset: Dataset, *, augment: bool) -> Pictures:
    """The training images with the usual transforms."""
    mean, std = channel_statistics(dataset.train_images)
    side = dataset.train_images.shape[-1]
    crop = [transforms.RandomCrop(side, padding=4), transforms.RandomHorizontalFlip()]
    steps = [*(crop if augment else []), transforms.ToTensor(), transforms.Normalize(mean, std)]
    return Pictures(dataset.train_images, dataset.train_labels, transforms.Compose(steps))


def network(model: str, norm: str, width: float, dataset: Dataset, num_groups: int) -> nn.Module:
    """One device's network. Its Batch Normalization is PyTorch's own."""
    return build_model(
        model, norm="sync-batch" if norm == "batch" else norm, width_factor=width,
        num_groups=num_groups, num_classes=len(dataset.classes),
        in_channels=dataset.train_images.shape[1], image_size=dataset.train_images.shape[2],
        seed=SEED,
    ).train()  # fmt: skip


def optimizer_of(model: nn.Module) -> torch.optim.SGD:
    """SGD as `trial` sets it."""
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def pass_per_device(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[tuple[Tensor, Tensor]]
) -> float:
    """One synchronous step: a pass for each device, whose gradients add up to the average."""
    optimizer.zero_grad()
    total = 0.0
    for images, labels in batches:
        loss = F.cross_entropy(model(images), labels) / len(batches)
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


def local_steps(
    devices: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Sequence[Sequence[tuple[Tensor, Tensor]]],
) -> None:
    """One federated round: each device takes its steps, then all meet at their average."""
    for model, optimizer, own in zip(devices, optimizers, batches, strict=True):
        for images, labels in own:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            loss.item()
    states = [model.state_dict() for model in devices]
    mean = {
        name: torch.stack([s[name].float() for s in states]).mean(0).to(value.dtype)
        for name, value in states[0].items()
    }
    for model in devices:
        model.load_state_dict(mean)


# Turns


def take_turns(
    ours: Callable[[], object],
    others: Sequence[Callable[[], object]],
    *,
    rounds: int,
    clock: Clock = time.process_time,
    each: int = 1,
) -> tuple[list[float], list[list[float]]]:
    """Seconds of ours and of each of the others in every round, after one that does not count.

    Ours runs `each` times a round, of which the median counts. What returns a float has timed
    itself.
    """
    own: list[float] = []
    theirs: list[list[float]] = [[] for _ in others]

    def seconds(run: Callable[[], object]) -> float:
        started = clock()
        itself = run()
        return itself if isinstance(itself, float) else clock() - started

    gc.collect()
    for number in range(rounds + 1):
        here = [seconds(run) for run in others]
        mine = statistics.median(seconds(ours) for _ in range(each))
        if number:
            own.append(mine)
            for seen, value in zip(theirs, here, strict=True):
                seen.append(value)
    return own, theirs


def row(name: str, case: str, unit: str, work: float, own: list[float], other: list[float],
        target: float | None) -> Row:  # fmt: skip
    """A line of the table: how much of `work` each does in a second, and their ratio."""
    ratios = [theirs / ours for ours, theirs in zip(own, other, strict=True)]
    made = {
        "row": name, "case": case, "unit": unit, "ours": work / statistics.median(own),
        "baseline": work / statistics.median(other), "ratio": statistics.median(ratios),
        "lowest": min(ratios), "highest": max(ratios), "target": target, "rounds": len(own),
    }  # fmt: skip
    met = (
        ""
        if target is None
        else f"  target {target:g}" + ("" if made["ratio"] >= target else ", missed")
    )
    print(
        f"{name:<13}{case:<44}{made['ours']:>10,.4g} {unit} against {made['baseline']:>8,.4g}: "
        f"{made['ratio']:6.2f} ({made['lowest']:.2f}-{made['highest']:.2f}){met}",
        flush=True,
    )
    return made


# The rows


def data_row(args: argparse.Namespace) -> Iterator[Row]:
    """Batches of augmented images a second."""
    dataset = made_up(10_000, 32)
    mean, std = channel_statistics(dataset.train_images)
    loader = DataLoader(
        pictures(dataset, augment=True), batch_size=320, shuffle=True, num_workers=2
    )

    def loaded() -> float:
        def children() -> float:
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            return used.ru_utime + used.ru_stime

        before = children()
        for _ in loader:
            pass
        return (children() - before) / loader.num_workers

    for channels_last in (False, True):
        batches = DeviceBatches(
            dataset.train_images, dataset.train_labels,
            [np.arange(d, 10_000, D) for d in range(D)], global_batch_size=320, seed=SEED,
            device=CPU, channels_last=channels_last, mean=mean, std=std,
        )  # fmt: skip
        epoch = iter(range(10**9))
        own, (other,) = take_turns(
            lambda batches=batches, epoch=epoch: sum(1 for _ in batches.epoch(next(epoch))),
            [loaded], rounds=args.rounds, each=25,
        )  # fmt: skip
        # Images that do not fill a batch are in the loader's epoch alone.
        other = [seconds * batches.images_per_epoch / 10_000 for seconds in other]
        case = f"32x32, batch 320, {'NHWC' if channels_last else 'NCHW'}, 1 thread"
        yield row("data", case, "images/s", batches.images_per_epoch, own, other, 20)


def epoch_row(args: argparse.Namespace) -> Iterator[Row]:
    """A synchronous epoch of ten devices."""
    per_device = 8
    for norm in ("group", "fixup", "batch"):
        config = trial(
            dataset="digits", noise_std=1.0, augment="none", model="resnet18", width_factor=0.125,
            num_groups=2, norm=norm, global_batch_size=D * per_device,
        )  # fmt: skip
        dataset = open_dataset(config, None)
        ours = Ours(config, dataset, CPU)
        updates = ours.training._batches.updates_per_epoch
        images = pictures(dataset, augment=False)
        model = network("resnet18", norm, 0.125, dataset, 2)
        optimizer = optimizer_of(model)
        loaders = [
            DataLoader(
                Subset(images, range(d, len(images), D)), batch_size=per_device, shuffle=True,
                drop_last=True,
            )
            for d in range(D)
        ]  # fmt: skip
        ready = [list(loader) for loader in loaders]

        def plain(loaders=loaders, model=model, optimizer=optimizer) -> None:
            for batches in zip(*loaders, strict=False):
                pass_per_device(model, optimizer, batches)

        def passes(ready=ready, model=model, optimizer=optimizer) -> None:
            for batches in zip(*ready, strict=False):
                pass_per_device(model, optimizer, batches)

        own, (whole, alone) = take_turns(ours, [plain, passes], rounds=args.rounds, each=3)
        steps = min(map(len, loaders))
        # Epochs of the two differ by an update where images do not divide: compare updates.
        own = [seconds / updates for seconds in own]
        for case, other in ((norm, whole), (f"{norm}, ready", alone)):
            yield row("epoch", f"digits, resnet18 x0.125, 10x8, {case}", "updates/s", 1, own,
                      [seconds / steps for seconds in other], 4)  # fmt: skip


def convolution_shapes(model: nn.Module, images: Tensor) -> list[tuple[nn.Conv2d, torch.Size]]:
    """Each convolution of a network and the shape of its input."""
    seen: list[tuple[nn.Conv2d, torch.Size]] = []
    hooks = [
        m.register_forward_hook(lambda m, args, _: seen.append((m, args[0].shape)))
        for m in model.modules()
        if isinstance(m, nn.Conv2d)
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return seen


class Convolution:
    """One convolution, forward and backward, alone; the first of a network needs no more."""

    def __init__(self, like: nn.Conv2d, shape: torch.Size, *, first: bool, layout: Any) -> None:
        self.conv = copy.deepcopy(like).to(memory_format=layout)
        self.images = torch.randn(shape).to(memory_format=layout).requires_grad_(not first)
        with torch.no_grad():
            self.gradient = torch.randn_like(self.conv(self.images)).to(memory_format=layout)

    def __call__(self) -> None:
        """Both ways."""
        self.conv.weight.grad = self.images.grad = None
        self.conv(self.images).backward(self.gradient)


def convolutions_row(args: argparse.Namespace) -> Iterator[Row]:
    """What norms, residuals, loss and optimizer leave of the convolutions' speed."""
    batch = 32 if args.fast else 128
    dataset = made_up(batch, 32)
    for norm in ("group", "fixup", "batch"):
        config = trial(
            model="resnet18", norm=norm, global_batch_size=batch, num_devices=4,
            precision="float32",
        )  # fmt: skip
        ours = Ours(config, dataset, CPU)
        # Fixup's are the same ones, but not called as modules.
        layers = convolution_shapes(
            network("resnet18", "group", 1.0, dataset, 32), torch.zeros(batch, 3, 32, 32)
        )
        layouts = (torch.contiguous_format, torch.channels_last)
        alone = [0.0] * args.rounds
        unique: dict[tuple[Any, ...], int] = {}
        for place, (conv, shape) in enumerate(layers):
            kind = (conv.out_channels, conv.kernel_size, conv.stride, shape, place == 0)
            unique[kind] = unique.get(kind, 0) + 1
        own, _ = take_turns(ours, [], rounds=args.rounds)
        for kind, times in unique.items():
            conv, shape = next(
                (c, s) for p, (c, s) in enumerate(layers)
                if (c.out_channels, c.kernel_size, c.stride, s, p == 0) == kind
            )  # fmt: skip
            tried = [Convolution(conv, shape, first=kind[-1], layout=way) for way in layouts]
            _, seen = take_turns(ours=lambda: None, others=tried, rounds=args.rounds)
            best = min(seen, key=statistics.median)
            alone = [total + times * value for total, value in zip(alone, best, strict=True)]
        more, _ = take_turns(ours, [], rounds=args.rounds)
        own = [statistics.median((a, b)) for a, b in zip(own, more, strict=True)]
        yield row(
            "convolutions", f"resnet18, 32x32, batch {batch}, {norm}", "images/s", batch, own,
            alone, 0.85,
        )  # fmt: skip


def fedavg_row(args: argparse.Namespace) -> Iterator[Row]:
    """A round of ten devices, over what is offered."""
    small = [("resnet18", 0.125, 8, 8, "group"), ("resnet18", 0.125, 8, 8, "fixup"),
             ("resnet18", 0.125, 8, 8, "batch"), ("resnet8", 0.5, 8, 8, "group")]  # fmt: skip
    others = [
        (model, width, side, per_device, norm)
        for model, width in (("resnet8", 0.5), ("resnet8", 1.0), ("resnet20", 1.0),
                             ("resnet18", 0.125), ("resnet18", 0.25), ("resnet18", 0.5),
                             ("resnet18", 1.0))
        for side in (8, 16, 32)
        for per_device in (8, 32)
        for norm in ("group", "fixup", "batch")
        if (model, width, side, per_device, norm) not in small
    ]  # fmt: skip
    for model, width, side, per_device, norm in small + ([] if args.fast else others):
        case = f"{model} x{width:g}, {side}x{side}, 10x{per_device}, {norm}"
        if args.only not in case:
            continue
        steps = 5
        groups = 2
        dataset = made_up(D * per_device * steps, side)
        config = trial(
            model=model, width_factor=width, norm=norm, num_groups=groups, augment="none",
            algorithm="fedavg", local_steps=steps, global_batch_size=D * per_device,
            precision="float32",
        )  # fmt: skip
        ours = Ours(config, dataset, CPU)
        devices = [network(model, norm, width, dataset, groups) for _ in range(D)]
        optimizers = [optimizer_of(m) for m in devices]
        mean, std = (torch.tensor(s).view(3, 1, 1) for s in channel_statistics(
            dataset.train_images))  # fmt: skip
        images = (dataset.train_images / 255 - mean) / std
        batches = [
            [*zip(images[d::D].split(per_device), dataset.train_labels[d::D].split(per_device),
                  strict=True)]
            for d in range(D)
        ]  # fmt: skip
        own, (other,) = take_turns(
            ours,
            [lambda d=devices, o=optimizers, b=batches: local_steps(d, o, b)],
            rounds=args.rounds,
        )
        tiny = (model, width, side, per_device, norm) in small
        yield row("fedavg", case, "rounds/s", 1, own, other, 4 if tiny else 0.95)


def bfloat16_row(args: argparse.Namespace) -> Iterator[Row]:
    """What a CPU gains by its bfloat16 units."""
    if not has_matrix_units():
        print("bfloat16     not run: no AMX", flush=True)
        return
    cases = [("resnet18", 1.0, 32, 80, {}), ("resnet18", 0.25, 16, 160, {}),
             ("resnet8", 1.0, 16, 320, {}), ("resnet8", 0.5, 16, 80, {}),
             ("resnet8", 1.0, 16, 160, {"algorithm": "fedavg", "local_steps": 3}),
             ("resnet18", 0.125, 16, 160, {"algorithm": "fedavg", "local_steps": 3})]  # fmt: skip
    for model, width, side, batch, more in cases[2:] if args.fast else cases:
        dataset = made_up(3 * batch, side)
        for norm in ("group", "fixup", "batch"):
            ours, other = (
                Ours(
                    trial(
                        model=model, width_factor=width, norm=norm, num_groups=4,
                        global_batch_size=batch, precision=precision, **more,
                    ),
                    dataset,
                    CPU,
                )
                for precision in ("auto", "float32")
            )  # fmt: skip
            own, (whole,) = take_turns(ours, [other], rounds=args.rounds)
            case = f"{model} x{width:g}, {side}x{side}, {more.get('algorithm', batch)}, {norm}"
            yield row("bfloat16", case, "images/s", 3 * batch, own, whole, 1)


def weights_of(model: nn.Module) -> int:
    """Bytes of a network's parameters."""
    return sum(p.nbytes for p in model.parameters())


def plain_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
    """The eager loop of the tutorials, on a GPU."""
    for images, labels in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images.to("cuda")), labels.to("cuda"))
        loss.backward()
        optimizer.step()
        loss.item()


def gpu_row(args: argparse.Namespace) -> Iterator[Row]:
    """ResNet-18 on a GPU."""
    if not torch.cuda.is_available():
        print("gpu          not run: no CUDA device", flush=True)
        return
    device = torch.device("cuda:0")  # `torch.cuda.set_device` wants the number
    prepare_process(device, torch.get_num_threads())

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    for norm in ("group", "fixup"):
        for batch in (128, 320, 2048):
            updates = 8 if args.fast else 40
            dataset = made_up(max(batch * updates, 10_000), 32)
            config = trial(model="resnet18", norm=norm, global_batch_size=batch)
            memory = {}
            model = network("resnet18", norm, 1.0, dataset, 32).to(device)
            # A whole epoch of PIL images would outlast what is measured.
            few = Subset(pictures(dataset, augment=True), range(batch * max(2, 4096 // batch)))
            loader = DataLoader(few, batch_size=batch, shuffle=True, num_workers=2)
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            optimizer = optimizer_of(model)
            # Its loop alone, on a batch that is there: how much of the ratio is the pipeline's.
            ready = [(torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10)] * 4
            plain_epoch(model, optimizer, ready[:1])
            memory["baseline"] = torch.cuda.max_memory_allocated() - held + weights_of(model)
            torch.cuda.empty_cache()
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            ours = Ours(config, dataset, device)
            started = clock()
            ours()
            first = clock() - started
            memory["ours"] = torch.cuda.max_memory_allocated() - held
            own, (whole, alone) = take_turns(
                ours,
                [lambda m=model, o=optimizer, b=loader: plain_epoch(m, o, b),
                 lambda m=model, o=optimizer, b=ready: plain_epoch(m, o, b)],
                rounds=args.rounds, clock=clock,
            )  # fmt: skip
            own = [seconds / ours.images for seconds in own]
            whole = [seconds / len(few) for seconds in whole]
            alone = [seconds / (4 * batch) for seconds in alone]
            for case, other, target in ((norm, whole, 10), (f"{norm}, ready", alone, None)):
                made = row(
                    "gpu", f"resnet18, 32x32, batch {batch}, {case}", "images/s", 1, own, other,
                    target,
                )  # fmt: skip
                yield {**made, "first_epoch_seconds": first, "peak_bytes": memory}
            print(
                f"{'':<13}first epoch {first:.1f} s, peak memory "
                f"{memory['ours'] / 2**30:.2f} GiB against {memory['baseline'] / 2**30:.2f} GiB",
                flush=True,
            )
            del model, optimizer, ours
            gc.collect()
            torch.cuda.empty_cache()


ROWS = {
    "data": data_row, "epoch": epoch_row, "convolutions": convolutions_row,
    "fedavg": fedavg_row, "bfloat16": bfloat16_row, "gpu": gpu_row,
}  # fmt: skip


def machine() -> dict[str, Any]:
    """What the figures are of."""
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), name)
    import torchvision

    return {
        "cpu": name, "cores": os.cpu_count(), "load": os.getloadavg()[0],
        "vector": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(), "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }  # fmt: skip


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fast", action="store_true", help="Fewer cases, smaller batches.")
    parser.add_argument(
        "--only", default="", metavar="TEXT",
        help="Cases of fedavg that have this in their name, such as 'x0.25, 16x16'.",
    )  # fmt: skip
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items() if value is not None))
    prepare_process(CPU, 1)
    rows = [made for name in args.rows for made in ROWS[name](args)]
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
