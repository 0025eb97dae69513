"""One trial: from its config to splits, model and training, epoch by epoch.

The objective knows no database. Its caller hands it the place of a checkpoint and a function
that hears of every epoch, and may end the trial by raising from it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.batches import DeviceBatches, channel_statistics, normalise, updates_per_epoch
from data.dataset import Dataset
from data.holdout import split_train
from data.sources import load_dataset
from data.splits import split_devices
from models import build_model, classifier_parameters, parameter_groups, stacked_forward
from storage.checkpoints import CheckpointStore, CheckpointWriter
from sweeps.config import TrialConfig, Value
from sweeps.machine import PROCESS_BYTES
from sweeps.process import return_freed_memory
from sweeps.training.federated import FederatedAveraging, FederatedSettings
from sweeps.training.loop import EpochResult, Training, evaluate
from sweeps.training.rounds import SGDSettings, SynchronousSGD
from sweeps.training.schedule import Schedule

logger = logging.getLogger(__name__)

EVALUATION_BATCH = 1000
"""Images scored at once: large enough to fill a GPU, small enough for a CPU's cache."""

CUDA_PROCESS_BYTES = 2 * 10**9
"""Memory of the machine that a process takes which uses a GPU, its data aside; assumed."""

COPIES_OF_WEIGHTS = 5
"""Weights, gradients and momentum, and a checkpoint on its way to the disk."""

CHECKPOINT_SECONDS = 1.0
"""From one checkpoint of a trial to the next, at the least: what a kill costs beside the running
epoch. To write those of all epochs would take a percent of the time where epochs are short."""

COUNTED_IMAGES = 8


@dataclass(frozen=True)
class Progress:
    """One epoch of a trial, as its caller hears of it.

    Attributes:
        step: completed epochs of the trial over all its seeds, from 1.
        score: what the pruner compares: validation accuracy (0 to 1), averaged with the final
            accuracies of the seeds before. Trials at the same step are averages of equally many.
        result: the epoch.
    """

    step: int
    score: float
    result: EpochResult


@dataclass(frozen=True)
class Sizes:
    """How much an epoch of a config is.

    Attributes:
        train_images: training images that are on any device, each counted once.
        val_images: images that score a trial.
        updates_per_epoch: as of `DeviceBatches`.
        images_per_epoch: images that all devices bring to the updates of an epoch, over all
            devices that take part.
    """

    train_images: int
    val_images: int
    updates_per_epoch: int
    images_per_epoch: int


@dataclass(frozen=True)
class _Prepared:
    """What trials with the same data settings share."""

    train_images: Tensor
    train_labels: Tensor
    shards: list[np.ndarray]
    mean: list[float]
    std: list[float]
    val_images: list[Tensor]
    val_labels: Tensor
    class_shares: list[float]


class Objective:
    """Trains configs on one device; loads its data set once.

    Args:
        dataset: decoded images.
        device: where to train.
    """

    def __init__(self, dataset: Dataset, device: torch.device) -> None:
        self._dataset = dataset
        self._device = device
        self._prepared: tuple[object, _Prepared] | None = None

    def run(
        self,
        config: TrialConfig,
        *,
        seeds: int,
        test: bool = False,
        on_epoch: Callable[[Progress], None],
        should_stop: Callable[[], bool] = lambda: False,
        checkpoints: CheckpointStore | None = None,
        key: str = "",
        may_replace: Callable[[], bool] = lambda: True,
    ) -> float:
        """Train a config to its end, once for each seed, one after the other.

        Epochs' checkpoints are written beside the training, at most one in `CHECKPOINT_SECONDS`.
        Whenever this returns or raises, that of the last completed epoch is on the disk.

        Args:
            config: what to train; its `seed` is the first.
            seeds: how many trainings.
            test: whether to score the test images, once, with the weights that the last epoch
                leaves; of one training only.
            on_epoch: hears of every epoch in order, of most before their checkpoint is on the
                disk. After a resume it hears again of those that earlier attempts completed. What
                it raises ends the trial.
            should_stop: asked between two updates.
            checkpoints: where each completed epoch is kept; None keeps nothing.
            key: the checkpoint's name.
            may_replace: as of `CheckpointStore.writer`.

        Returns:
            The final epoch's validation accuracy, 0 to 1, averaged over seeds; with `test`, the
            accuracy on the test images.

        Raises:
            Diverged: a seed's training did.
            Interrupted: `should_stop` said so; the checkpoint has all completed epochs.
            CheckpointError: an epoch's could not be saved; the one before is intact. Raised after
                the next epoch at the latest, or instead of what ends the trial.
            ValueError: `test` is asked of several trainings.
        """
        if test and seeds != 1:
            raise ValueError(f"seeds is {seeds}: the test images are scored for one training")
        return_freed_memory()
        state = self._load(config, checkpoints, key)
        with (
            contextlib.nullcontext()
            if checkpoints is None
            else checkpoints.writer(key, every=CHECKPOINT_SECONDS, may_replace=may_replace)
        ) as writer:
            return self._train(config, seeds, test, on_epoch, should_stop, state, writer)

    def _train(
        self,
        config: TrialConfig,
        seeds: int,
        test: bool,
        on_epoch: Callable[[Progress], None],
        should_stop: Callable[[], bool],
        state: dict[str, Any],
        writer: CheckpointWriter | None,
    ) -> float:
        finished: list[list[EpochResult]] = [
            [EpochResult(**r) for r in history] for history in state["finished"]
        ]
        for index, history in enumerate(finished):
            for result in history:
                on_epoch(self._progress(config, finished[:index], result))
        settings = json.dumps(config.as_dict())
        for index in range(len(finished), seeds):
            training = self._training(config, config.seed + index, should_stop)
            if state["training"] is not None:
                training.load_state_dict(state["training"])
                state["training"] = None
            before = json.dumps([[vars(r) for r in history] for history in finished])
            lines: list[str] = []
            for result in training.history:
                lines.append(json.dumps(vars(result)))
                on_epoch(self._progress(config, finished, result))
            for result in training.run():
                lines.append(json.dumps(vars(result)))
                if writer is not None:
                    # What is long and no tensor is text: to go through thousands of numbers takes
                    # milliseconds. JSON as Python writes it gives every float back as it was.
                    text = f"[{', '.join(lines)}]"
                    writer.save(
                        {
                            "config": settings,
                            "data_fingerprint": self._dataset.fingerprint,
                            "finished": before,
                            "training": {**training.state_dict(), "history": text},
                        }
                    )
                # Not once the checkpoint is on the disk: pruner and budgets are asked about every
                # epoch before the next begins. An epoch that was reported and not yet saved when
                # its worker was killed is forgotten, trained again and reported again, with the
                # same numbers.
                on_epoch(self._progress(config, finished, result))
            finished.append(training.history)
            if test:
                return self._test_accuracy(config, training)
        return sum(history[-1].val_accuracy for history in finished) / len(finished)

    def _test_accuracy(self, config: TrialConfig, training: Training) -> float:
        prepared, source = self._prepare(config), self._dataset
        channels_last = self._memory_format(config) is torch.channels_last
        batches = [
            normalise(
                batch.to(self._device), prepared.mean, prepared.std, channels_last=channels_last
            )
            for batch in source.test_images.split(EVALUATION_BATCH)
        ]
        return evaluate(
            training.global_model(),
            batches,
            source.test_labels.to(self._device),
            autocast_dtype=autocast_dtype(config, self._device),
        ).accuracy

    @property
    def chance(self) -> float:
        """The accuracy of a guess, 1 over the number of classes."""
        return 1 / len(self._dataset.classes)

    def _progress(
        self,
        config: TrialConfig,
        finished: list[list[EpochResult]],
        result: EpochResult,
    ) -> Progress:
        accuracies = [h[-1].val_accuracy for h in finished] + [result.val_accuracy]
        return Progress(
            step=len(finished) * config.epochs + result.epoch,
            score=sum(accuracies) / len(accuracies),
            result=result,
        )

    def completed_steps(self, config: TrialConfig, checkpoints: CheckpointStore, key: str) -> int:
        """How many epochs, over all seeds, `run` would not train again."""
        state = self._load(config, checkpoints, key)
        running = len(state["training"]["history"]) if state["training"] else 0
        return len(state["finished"]) * config.epochs + running

    def _load(
        self, config: TrialConfig, checkpoints: CheckpointStore | None, key: str
    ) -> dict[str, Any]:
        fresh: dict[str, Any] = {"finished": [], "training": None}
        state = checkpoints.load(key) if checkpoints is not None else None
        if state is None:
            return fresh
        state = _parsed(state)
        # An earlier version did not know all settings; it trained as their defaults do.
        of = {**TrialConfig.build({}).as_dict(), **state.get("config", {})}
        if (of, state.get("data_fingerprint")) != (config.as_dict(), self._dataset.fingerprint):
            logger.warning("the checkpoint of %s is of other settings; starting anew", key)
            return fresh
        return state

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the data set's images and labels."""
        return self._dataset.fingerprint

    def check(self, config: TrialConfig) -> None:
        """Divide the data and build the network of a config, as a trial of it would.

        Raises:
            ValueError: if the config asks for what the splits or the models cannot do.
        """
        self._model(config, config.seed)

    def sizes(self, config: TrialConfig) -> Sizes:
        """Count the images and updates of an epoch; nothing is trained."""
        prepared = self._prepare(config)
        held = len(np.unique(np.concatenate(prepared.shards)))
        updates = updates_per_epoch(held, config.global_batch_size)
        return Sizes(
            train_images=held,
            val_images=len(prepared.val_labels),
            updates_per_epoch=updates,
            images_per_epoch=updates * config.global_batch_size,
        )

    def worker_bytes(self, config: TrialConfig, *, cuda: bool) -> int:
        """Memory that a worker takes of the machine for trials of a config, about, in bytes.

        The process, the data set with what trials make of it, and, on a CPU, the weights with
        their gradients, momentum and checkpoint, and what the layers keep of a batch for the
        backward pass. The last is counted in forward passes of a few images, and grows evenly
        with the batch. 0 where the network cannot be asked.

        Args:
            config: with the largest batch.
            cuda: whether the worker trains on a GPU.
        """
        prepared, source = self._prepare(config), self._dataset
        resident = sum(
            images.nbytes
            for images in (
                source.train_images, source.test_images, prepared.train_images, *prepared.val_images
            )
        )  # fmt: skip
        if cuda:
            return CUDA_PROCESS_BYTES + resident
        few = prepared.val_images[0][:COUNTED_IMAGES].clone()
        try:
            model = self._model(config, config.seed)
            kept = saved_bytes(model.eval(), few)
            # What does not grow with the batch, as the product of a weight and Fixup's scale.
            of_batch = saved_bytes(model, torch.cat([few, few])) - kept
        except Exception:  # what is wrong with it, its first trial says
            return 0
        weights = sum(p.nbytes for p in model.parameters())
        copies = 1 if config.algorithm == "sync-sgd" else 1 + config.devices_per_round
        trained = COPIES_OF_WEIGHTS * copies * weights
        activations = kept + of_batch * (config.global_batch_size - len(few)) // len(few)
        return PROCESS_BYTES + resident + trained + activations

    def _model(self, config: TrialConfig, seed: int) -> nn.Module:
        prepared = self._prepare(config)
        memory_format = self._memory_format(config)
        channels, image_size = prepared.train_images.shape[1:3]
        model = build_model(
            config.model,
            norm=config.norm,
            num_classes=len(self._dataset.classes),
            in_channels=channels,
            image_size=image_size,
            num_devices=config.num_devices,
            width_factor=config.width_factor,
            num_groups=config.num_groups,
            batch_statistics=config.batch_statistics,
            feature_norm=config.feature_norm,
            seed=seed,
        )
        return model.to(self._device).to(memory_format=memory_format).train()

    def _memory_format(self, config: TrialConfig) -> torch.memory_format:
        return _memory_format(config, self._device, self._dataset.train_images.shape[2])

    def _batches(self, config: TrialConfig, seed: int) -> DeviceBatches:
        prepared = self._prepare(config)
        return DeviceBatches(
            prepared.train_images,
            prepared.train_labels,
            prepared.shards,
            global_batch_size=config.global_batch_size,
            devices_per_round=None if config.participation == 1 else config.devices_per_round,
            steps_per_round=config.local_steps,
            seed=seed,
            augment=config.augment,
            crop_padding=config.crop_padding,
            device=self._device,
            channels_last=self._memory_format(config) is torch.channels_last,
            mean=prepared.mean,
            std=prepared.std,
        )

    def _training(
        self, config: TrialConfig, seed: int, should_stop: Callable[[], bool]
    ) -> Training:
        model, batches = self._model(config, seed), self._batches(config, seed)
        prepared = self._prepare(config)
        clip, agc = config.clip_grad_norm, config.agc_clip_factor
        settings = SGDSettings(
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            decay_scalars=config.weight_decay_on == "all",
            scalar_lr_factor=_scalar_lr_factor(config),
            clip_grad_norm=None if isinstance(clip, str) else clip,
            nesterov=config.nesterov,
            lars_trust_coefficient=config.lars_trust_coefficient
            if config.optimizer == "lars"
            else None,
            muon_lr_factor=config.muon_lr_factor if config.optimizer == "muon" else None,
            agc_clip_factor=None if isinstance(agc, str) else agc,
            label_smoothing=config.label_smoothing,
        )
        dtype = autocast_dtype(config, self._device)
        groups, classifier = parameter_groups(model), classifier_parameters(model)
        algorithm: SynchronousSGD | FederatedAveraging
        if config.algorithm == "sync-sgd":
            algorithm = SynchronousSGD(
                model, groups, settings, classifier=classifier, autocast_dtype=dtype,
                compiled=compiles(config, self._device),
            )  # fmt: skip
        else:
            algorithm = FederatedAveraging(
                model,
                groups,
                settings,
                _federated_settings(config),
                num_devices=config.num_devices,
                devices_per_round=config.devices_per_round,
                image_counts=[len(shard) for shard in prepared.shards]
                if config.average_weights == "images"
                else None,
                class_counts=_class_counts(prepared, len(self._dataset.classes)),
                classifier=classifier,
                autocast_dtype=dtype,
                stacked_forward=stacked_forward(model),
            )
        updates = batches.updates_per_epoch
        schedule = Schedule(
            peak_lr=config.peak_lr,
            warmup_start_factor=config.warmup_start_factor,
            warmup_updates=round(config.warmup_epochs * updates),
            total_updates=config.epochs * updates,
            kind=config.schedule,
            plateau_factor=config.plateau_factor,
            plateau_patience=config.plateau_patience,
            plateau_threshold=config.plateau_threshold,
            warmup_shape=config.warmup_shape,
            exponential_gamma=config.exponential_gamma,
            updates_per_epoch=updates,
        )
        perfect = [1.0, *[0.0] * (len(self._dataset.classes) - 1)]
        return Training(
            algorithm=algorithm,
            batches=batches,
            evaluate=lambda: evaluate(
                algorithm.global_model(),
                prepared.val_images,
                prepared.val_labels,
                autocast_dtype=dtype,
            ),
            schedule=schedule,
            epochs=config.epochs,
            guess_loss=_smoothed_entropy(prepared.class_shares, config.label_smoothing),
            untrained_loss=math.log(len(self._dataset.classes)),
            least_loss=_smoothed_entropy(perfect, config.label_smoothing),
            should_stop=should_stop,
        )

    def _prepare(self, config: TrialConfig) -> _Prepared:
        identity = (
            config.num_train_images, config.validation, config.validation_fraction,
            config.split_seed, config.split, config.num_devices, config.classes_per_device,
            config.assignment, config.alpha, config.min_images_per_device, config.shared_images,
            self._memory_format(config),
        )  # fmt: skip
        if self._prepared is None or self._prepared[0] != identity:
            self._prepared = (identity, self._prepare_anew(config))
        return self._prepared[1]

    def _prepare_anew(self, config: TrialConfig) -> _Prepared:
        source = self._dataset
        labels = source.train_labels.numpy()
        train, held_out = split_train(
            labels,
            num_images=None
            if isinstance(config.num_train_images, str)
            else config.num_train_images,
            validation_fraction=config.validation_fraction
            if config.validation == "holdout"
            else 0.0,
            seed=config.split_seed,
        )
        shards = split_devices(
            config.split,
            labels[train],
            config.num_devices,
            seed=config.split_seed,
            classes_per_device=config.classes_per_device,
            assignment=config.assignment,
            alpha=config.alpha,
            min_images_per_device=config.min_images_per_device,
            shared_images=config.shared_images,
        )
        train_images = source.train_images[torch.from_numpy(train)]
        mean, std = channel_statistics(train_images)
        if config.validation == "holdout":
            kept = torch.from_numpy(held_out)
            val_images, val_labels = source.train_images[kept], source.train_labels[kept]
        else:
            val_images, val_labels = source.test_images, source.test_labels
        channels_last = self._memory_format(config) is torch.channels_last
        batches = [
            normalise(batch.to(self._device), mean, std, channels_last=channels_last)
            for batch in val_images.split(EVALUATION_BATCH)
        ]
        shares = np.bincount(labels[train], minlength=len(source.classes)) / len(train)
        return _Prepared(
            train_images=train_images.to(self._device),
            train_labels=source.train_labels[torch.from_numpy(train)].to(self._device),
            shards=shards,
            mean=mean,
            std=std,
            val_images=batches,
            val_labels=val_labels.to(self._device),
            class_shares=shares.tolist(),
        )


def open_dataset(
    config: TrialConfig, data_dir: Path | None, progress: Callable[[str], None] | None = None
) -> Dataset:
    """Load the data set that a config names.

    Raises:
        DataError: if it is missing or broken, saying what to do.
    """
    return load_dataset(
        config.dataset,
        data_dir=data_dir,
        image_size=config.image_size,
        noise_std=config.noise_std,
        progress=progress,
    )


def dataset_identity(config: TrialConfig) -> tuple[Value, ...]:
    """What `open_dataset` depends on: equal identities are equal data sets."""
    return (config.dataset, config.image_size, config.noise_std)


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """What a forward pass keeps for the backward pass, beside the weights, in bytes.

    Args:
        model: gives logits.
        images: float `[N, C, H, W]`.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}
    kept: list[Tensor] = []  # alive, so that no storage's address is given out twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(images, None)
    return sum(found.values())


def _parsed(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint with the values that stand in it as texts; earlier versions kept these."""
    parsed = {**state}
    for name in ("config", "finished"):
        if isinstance(state.get(name), str):
            parsed[name] = json.loads(state[name])
    training = state.get("training")
    if training is not None and isinstance(training["history"], str):
        parsed["training"] = {**training, "history": json.loads(training["history"])}
    return parsed


def _class_counts(prepared: _Prepared, num_classes: int) -> list[list[int]]:
    """Images of each class on each device."""
    labels = prepared.train_labels.cpu().numpy()
    return [np.bincount(labels[s], minlength=num_classes).tolist() for s in prepared.shards]


def _smoothed_entropy(shares: Sequence[float], smoothing: float) -> float:
    """Entropy of a distribution over classes once labels are smoothed, in nats."""
    smoothed = [(1 - smoothing) * p + smoothing / len(shares) for p in shares]
    return -sum(q * math.log(q) for q in smoothed if q > 0)


def _scalar_lr_factor(config: TrialConfig) -> float:
    """The learning rate of scalars as a share of the weights'.

    Fixup's authors train its biases and multipliers at a tenth of the base rate
    (`cifar/cifar_train.py` of theirs). At the whole rate two of three seeds ended ten points lower
    on CIFAR-10 images in ten epochs.
    """
    if not isinstance(config.scalar_lr_factor, str):
        return config.scalar_lr_factor
    return 0.1 if config.norm == "fixup" else 1.0


def _federated_settings(config: TrialConfig) -> FederatedSettings:
    return FederatedSettings(
        local_steps=config.local_steps,
        local_momentum=config.local_momentum,
        proximal_mu=config.proximal_mu,
        control_variates=config.algorithm == "scaffold",
        server_optimizer=config.server_optimizer,
        server_lr=config.server_lr,
        server_momentum=config.server_momentum,
        server_beta2=config.server_beta2,
        server_epsilon=config.server_epsilon,
        virtual_features=config.virtual_features,
    )


def _memory_format(config: TrialConfig, device: torch.device, side: int) -> torch.memory_format:
    """The layout of a trial's images, of `side` pixels, and of its network."""
    if config.algorithm != "sync-sgd":
        return torch.contiguous_format  # torch.func.vmap handles no other throughout
    if ":" in config.model:
        return torch.contiguous_format  # a user's own code may view a tensor as another shape
    if device.type != "cpu":
        return torch.channels_last
    narrow = config.model != "resnet18" or config.width_factor < 1
    # On CPUs PyTorch's Group Normalization is slower on channels-last tensors, which narrow
    # networks do not win back in their convolutions.
    if config.norm in ("group", "layer", "instance") and narrow:
        return torch.contiguous_format
    # Each device's own Batch Normalization is a call for each of them there, and small maps take
    # longer. A contiguous step of ResNet-18 against a channels-last one, as devices x images: 1.05
    # (10x8) and 1.22 (100x2) with images of 32x32, 0.86 (10x8) of 16x16, 0.83 and 0.75 of 8x8; of
    # width 0.25 1.10 with 32x32, of 0.5 0.83 with 8x8; ResNet-20 with 32x32 0.99.
    if config.norm == "batch" and (narrow or side < 32):
        return torch.contiguous_format
    return torch.channels_last


def compiles(config: TrialConfig, device: torch.device) -> bool:
    """Whether a trial's network is compiled."""
    if config.compile != "auto":
        return config.compile == "on"
    # On CPUs it takes as long as a short trial, and Fixup is slower with it.
    return device.type == "cuda" and config.algorithm == "sync-sgd" and ":" not in config.model


def autocast_dtype(config: TrialConfig, device: torch.device) -> torch.dtype | None:
    """What a config's forward passes are computed in; None for the parameters' own."""
    if config.precision == "float32":
        return None
    if config.precision == "bfloat16":
        return torch.bfloat16
    # CPUs without bfloat16 units emulate it, tens of times slower.
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
