"""What a training is made of: from a config and a data set to splits, network, batches, schedule.

An assembly knows no trial and no checkpoint. It puts trainings together; whoever asks for one runs
it.
"""

from __future__ import annotations

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
from sweeps.config import TrialConfig, Value
from sweeps.execution import autocast_dtype, compiles, memory_format
from sweeps.training.federated import FederatedAveraging, FederatedSettings
from sweeps.training.loop import Training, evaluate
from sweeps.training.rounds import SGDSettings, SynchronousSGD
from sweeps.training.schedule import Schedule

EVALUATION_BATCH = 1000
"""Images scored at once: large enough to fill a GPU, small enough for a CPU's cache."""


@dataclass(frozen=True)
class Sizes:
    """How much an epoch of a config is.

    Attributes:
        train_images: training images that are on any device, each counted once.
        val_images: images that score a trial.
        updates_per_epoch: as of `DeviceBatches`.
        images_per_epoch: images that all devices bring to the updates of an epoch, over all
            devices that take part.
        device_images: images of each device, those included that others hold too.
        device_classes: classes of each device, of which it holds one image at least.
    """

    train_images: int
    val_images: int
    updates_per_epoch: int
    images_per_epoch: int
    device_images: tuple[int, ...] = ()
    device_classes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """What trials with the same data settings share.

    Attributes:
        train_images: uint8 `[N, C, H, W]`, on the training device.
        train_labels: int64 `[N]`, there too.
        shards: for each simulated device, the indices of its images, int64.
        mean, std: per channel, of the training images, in units of 0..1.
        val_images: normalised batches of float32 `[N_i, C, H, W]`, on the training device.
        val_labels: int64 `[sum N_i]`, in the same order, there too.
        class_shares: of the training images, by class; they add up to 1.
    """

    train_images: Tensor
    train_labels: Tensor
    shards: list[np.ndarray]
    mean: list[float]
    std: list[float]
    val_images: list[Tensor]
    val_labels: Tensor
    class_shares: list[float]


class Assembly:
    """Makes trainings from a data set on one device, and the parts of which they are made.

    The data is divided once for all trials in a row with the same data settings.

    Args:
        dataset: decoded images.
        device: where to train.

    Attributes:
        dataset, device: as given.
    """

    def __init__(self, dataset: Dataset, device: torch.device) -> None:
        self.dataset = dataset
        self.device = device
        self._prepared: tuple[object, Prepared] | None = None

    def check(self, config: TrialConfig) -> None:
        """Divide the data and build the network of a config, as a trial of it would.

        Raises:
            ValueError: if the config asks for what the splits or the models cannot do.
        """
        self.model(config, config.seed)

    def sizes(self, config: TrialConfig) -> Sizes:
        """Count the images and updates of an epoch; nothing is trained.

        Raises:
            ValueError: if the config asks for what the splits cannot do.
        """
        prepared = self.prepared(config)
        held = len(np.unique(np.concatenate(prepared.shards)))
        updates = updates_per_epoch(held, config.global_batch_size)
        return Sizes(
            train_images=held,
            val_images=len(prepared.val_labels),
            updates_per_epoch=updates,
            images_per_epoch=updates * config.global_batch_size,
            device_images=tuple(len(shard) for shard in prepared.shards),
            device_classes=tuple(
                sum(count > 0 for count in counts)
                for counts in _class_counts(prepared, len(self.dataset.classes))
            ),
        )

    def prepared(self, config: TrialConfig) -> Prepared:
        """The data set as a config divides it, on the training device.

        Raises:
            ValueError: if the config asks for what the splits cannot do.
        """
        identity = (
            config.num_train_images, config.validation, config.validation_fraction,
            config.split_seed, config.split, config.num_devices, config.classes_per_device,
            config.assignment, config.alpha, config.min_images_per_device, config.shared_images,
            self._memory_format(config),
        )  # fmt: skip
        if self._prepared is None or self._prepared[0] != identity:
            self._prepared = (identity, self._prepare_anew(config))
        return self._prepared[1]

    def model(self, config: TrialConfig, seed: int) -> nn.Module:
        """A config's untrained network on the training device, in training mode.

        Args:
            config: its own `seed` is not looked at.
            seed: of the initial weights.

        Returns:
            As of `build_model`: float32 logits `[N, classes]` from normalised images, float32
            `[N, C, H, W]`.

        Raises:
            ValueError: if the config asks for what the splits or the models cannot do.
        """
        self.prepared(config)  # refuses what the splits cannot do
        model = build_model(**self.network(config, seed))
        return model.to(self.device).to(memory_format=self._memory_format(config)).train()

    def autocast_dtype(self, config: TrialConfig) -> torch.dtype | None:
        """What a config's forward passes are computed in; None for the parameters' own."""
        return autocast_dtype(config, self.device, self._image_side)

    def network(self, config: TrialConfig, seed: int) -> dict[str, Any]:
        """The arguments of `build_model` that make a config's network, plain values.

        Args:
            config, seed: as of `model`.
        """
        channels, image_size = self.dataset.train_images.shape[1:3]
        return {
            "name": config.model,
            "norm": config.norm,
            "num_classes": len(self.dataset.classes),
            "in_channels": channels,
            "image_size": image_size,
            "num_devices": config.num_devices,
            "width_factor": config.width_factor,
            "num_groups": config.num_groups,
            "batch_statistics": config.batch_statistics,
            "feature_norm": config.feature_norm,
            "seed": seed,
        }

    def batches(self, config: TrialConfig, seed: int) -> DeviceBatches:
        """What a training of a config takes in, epoch by epoch; shapes and dtypes as in `Batch`.

        Args:
            config: its own `seed` is not looked at.
            seed: of the order of the images, their augmentation, and who takes part.

        Raises:
            ValueError: if the config asks for what the splits cannot do.
        """
        prepared = self.prepared(config)
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
            device=self.device,
            channels_last=self._memory_format(config) is torch.channels_last,
            mean=prepared.mean,
            std=prepared.std,
        )

    def training(
        self, config: TrialConfig, seed: int, should_stop: Callable[[], bool] = lambda: False
    ) -> Training:
        """One training of a config, before its first epoch.

        Args:
            config: what to train; its own `seed` is not looked at.
            seed: as of `model` and `batches`.
            should_stop: as of `Training`.

        Raises:
            ValueError: if the config asks for what the splits or the models cannot do.
        """
        model, batches = self.model(config, seed), self.batches(config, seed)
        prepared = self.prepared(config)
        dtype = self.autocast_dtype(config)
        groups, classifier = parameter_groups(model), classifier_parameters(model)
        algorithm: SynchronousSGD | FederatedAveraging
        if config.algorithm == "sync-sgd":
            algorithm = SynchronousSGD(
                model, groups, _sgd_settings(config), classifier=classifier, autocast_dtype=dtype,
                compiled=compiles(config, self.device),
            )  # fmt: skip
        else:
            algorithm = FederatedAveraging(
                model,
                groups,
                _sgd_settings(config),
                _federated_settings(config),
                num_devices=config.num_devices,
                devices_per_round=config.devices_per_round,
                image_counts=[len(shard) for shard in prepared.shards]
                if config.average_weights == "images"
                else None,
                class_counts=_class_counts(prepared, len(self.dataset.classes)),
                classifier=classifier,
                autocast_dtype=dtype,
                stacked_forward=stacked_forward(model),
            )
        perfect = [1.0, *[0.0] * (len(self.dataset.classes) - 1)]
        return Training(
            algorithm=algorithm,
            batches=batches,
            evaluate=lambda: evaluate(
                algorithm.global_model(),
                prepared.val_images,
                prepared.val_labels,
                autocast_dtype=dtype,
            ),
            schedule=_schedule(config, batches.updates_per_epoch),
            epochs=config.epochs,
            guess_loss=_smoothed_entropy(prepared.class_shares, config.label_smoothing),
            untrained_loss=math.log(len(self.dataset.classes)),
            least_loss=_smoothed_entropy(perfect, config.label_smoothing),
            should_stop=should_stop,
        )

    def test_accuracy(self, config: TrialConfig, model: nn.Module) -> float:
        """The accuracy of a trained network on the test images, 0 to 1.

        Args:
            config: what it was trained by.
            model: as `Training.global_model` gives it.
        """
        prepared, source = self.prepared(config), self.dataset
        channels_last = self._memory_format(config) is torch.channels_last
        batches = [
            normalise(
                batch.to(self.device), prepared.mean, prepared.std, channels_last=channels_last
            )
            for batch in source.test_images.split(EVALUATION_BATCH)
        ]
        return evaluate(
            model,
            batches,
            source.test_labels.to(self.device),
            autocast_dtype=self.autocast_dtype(config),
        ).accuracy

    def device_accuracies(
        self, config: TrialConfig, class_correct: Sequence[int]
    ) -> list[float | None]:
        """What a trained network is worth to each device, whose images are of its own classes.

        Args:
            config: what it was trained by.
            class_correct: as of `EpochResult`.

        Returns:
            Of each device the validation accuracies of the classes, 0 to 1, averaged with their
            shares in its training images; None where no class of it has validation images.
        """
        prepared, num_classes = self.prepared(config), len(self.dataset.classes)
        counts = np.bincount(prepared.val_labels.cpu().numpy(), minlength=num_classes)
        accuracies = np.asarray(class_correct) / np.maximum(counts, 1)
        shares = np.array(_class_counts(prepared, num_classes)) * (counts > 0)
        return [
            float(of_device @ accuracies / of_device.sum()) if of_device.any() else None
            for of_device in shares
        ]

    def _prepare_anew(self, config: TrialConfig) -> Prepared:
        source = self.dataset
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
            normalise(batch.to(self.device), mean, std, channels_last=channels_last)
            for batch in val_images.split(EVALUATION_BATCH)
        ]
        shares = np.bincount(labels[train], minlength=len(source.classes)) / len(train)
        return Prepared(
            train_images=train_images.to(self.device),
            train_labels=source.train_labels[torch.from_numpy(train)].to(self.device),
            shards=shards,
            mean=mean,
            std=std,
            val_images=batches,
            val_labels=val_labels.to(self.device),
            class_shares=shares.tolist(),
        )

    def _memory_format(self, config: TrialConfig) -> torch.memory_format:
        return memory_format(config, self.device, self._image_side)

    @property
    def _image_side(self) -> int:
        return self.dataset.train_images.shape[2]


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


def _class_counts(prepared: Prepared, num_classes: int) -> list[list[int]]:
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


def _sgd_settings(config: TrialConfig) -> SGDSettings:
    clip, agc = config.clip_grad_norm, config.agc_clip_factor
    return SGDSettings(
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
        muon_weight_decay=config.muon_weight_decay,
        agc_clip_factor=None if isinstance(agc, str) else agc,
        label_smoothing=config.label_smoothing,
    )


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


def _schedule(config: TrialConfig, updates: int) -> Schedule:
    """The learning rate of a training that has so many updates an epoch."""
    return Schedule(
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
