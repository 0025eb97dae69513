"""`TrialConfig`: everything that decides what one training is.

Each setting carries its description, its range and its unit, so that one place serves the
parser, the error messages and the documentation. The names of data sets, models, norms and
splits are repeated here because this module must answer in milliseconds; a test holds them
equal to those of `data` and `models`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sweeps.errors import SpecError, nearest

Value = bool | int | float | str


def written(value: Value) -> str:
    """A value as a sweep's file has it, names without their quotation marks."""
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Setting:
    """What one field of `TrialConfig` accepts.

    Attributes:
        doc: one sentence for people.
        kind: `int`, `float`, `str` or `bool`.
        choices: the accepted names of a `str`.
        importable: a `str` may also be "module:function", a function of the user's.
        low, high: the accepted range of a number, ends included.
        above: the number must be greater than this.
        word: a word accepted in place of a number ("off", "all").
        searchable: whether a sampler may suggest it. What decides how accuracy is measured
            (the data set, the validation split, the number of epochs) may not differ between
            the trials of a study.
    """

    doc: str
    kind: type
    choices: tuple[str, ...] = ()
    importable: bool = False
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    word: str | None = None
    searchable: bool = True

    def accepted(self) -> str:
        """Say in words what is accepted."""
        if self.choices:
            own = " | 'module:function'" if self.importable else ""
            return " | ".join(repr(choice) for choice in self.choices) + own
        if self.kind is bool:
            return "true | false"
        number = "a whole number" if self.kind is int else "a number"
        limits = []
        if self.above > -math.inf:
            limits.append(f"above {self.above:g}")
        if self.low > -math.inf:
            limits.append(f"from {self.low:g}")
        if self.high < math.inf:
            limits.append(f"to {self.high:g}")
        word = f", or {self.word!r}" if self.word else ""
        return " ".join([number, *limits]) + word

    def check(self, name: str, value: object) -> Value:
        """Return `value` in the setting's own type.

        Raises:
            SpecError: if it is of another type or outside the range.
        """
        problem = SpecError(f"{name} = {value!r} is not accepted; accepted: {self.accepted()}")
        if self.word is not None and value == self.word:
            return self.word
        if self.kind is bool:
            if not isinstance(value, bool):
                raise problem
            return value
        if self.importable and isinstance(value, str) and _IMPORT_PATH.fullmatch(value):
            return value
        if self.kind is str:
            if not isinstance(value, str) or (self.choices and value not in self.choices):
                if isinstance(value, str):
                    hint = nearest(value, self.choices)
                    raise SpecError(f"{name} = {value!r} is not accepted; {hint}")
                raise problem
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise problem
        # The bound keeps whole numbers of any length out of floating point's way.
        if value > 1e18 and self.high == math.inf:
            raise SpecError(f"{problem}, and no more than 1e18")
        if not -1e18 <= value <= 1e18 or not self.low <= value <= self.high or value <= self.above:
            raise problem
        if self.kind is int and value != int(value):
            raise problem
        return int(value) if self.kind is int else float(value)


_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def _setting(default: Value, doc: str, kind: type, **limits: Any) -> Any:
    return field(default=default, metadata={"setting": Setting(doc, kind, **limits)})


DATASETS = ("cifar10", "cifar100", "digits", "images")
MODELS = ("resnet8", "resnet18", "resnet20")
FEATURE_NORMS = ("none", "rms")
NORMS = ("batch", "sync-batch", "group", "layer", "instance", "fixup")
SPLITS = ("iid", "classes", "dirichlet", "quantity")
ASSIGNMENTS = ("pairs", "ring")
AUGMENTS = ("none", "crop", "crop-flip")
ALGORITHMS = ("sync-sgd", "fedavg", "scaffold")
LOCAL_MOMENTA = ("average", "keep", "reset")
SERVER_OPTIMIZERS = ("sgd", "adam")
AVERAGE_WEIGHTS = ("uniform", "images")
OPTIMIZERS = ("sgd", "lars", "muon")
WARMUP_SHAPES = ("linear", "cosine", "exponential")
SCHEDULES = ("plateau", "cosine", "exponential", "constant")


@dataclass(frozen=True)
class TrialConfig:
    """One training, fully described. Equal configs on equal hardware give equal numbers."""

    dataset: str = _setting(
        "cifar10", "Where the images come from.", str, choices=DATASETS, searchable=False
    )
    image_size: int = _setting(
        32, "Pixels a side that `images` are brought to.", int, low=4, high=512, searchable=False
    )
    noise_std: float = _setting(
        0.0,
        "Fixed noise on `digits`, in standard deviations of their pixels: makes them hard "
        "enough to tell configurations apart.",
        float,
        low=0.0,
        high=1.5,
        searchable=False,
    )
    num_train_images: int | str = _setting(
        "all",
        "Images of the training set that are used, a stratified subset, before some are held out.",
        int,
        low=20,
        word="all",
        searchable=False,
    )
    validation: str = _setting(
        "holdout",
        "What scores a trial: `holdout`, images held out of training, or `test`, the test "
        "images, as the post does: a search that selects on them reports a biased accuracy.",
        str,
        choices=("holdout", "test"),
        searchable=False,
    )
    validation_fraction: float = _setting(
        0.1, "Share of the training images that is held out.", float, above=0, high=0.5,
        searchable=False,
    )  # fmt: skip
    split_seed: int = _setting(
        0, "Seed of the held-out split and of the devices' shares.", int, low=0, searchable=False
    )
    augment: str = _setting(
        "crop-flip", "Random crop of the padded image, random horizontal flip.", str,
        choices=AUGMENTS,
    )  # fmt: skip
    crop_padding: int = _setting(4, "Zero pixels a side before the crop.", int, low=1, high=64)

    model: str = _setting(
        "resnet18",
        "The network: one of Sweep's, or a function of your own that builds one.",
        str,
        choices=MODELS,
        importable=True,
    )
    width_factor: float = _setting(
        1.0, "Scales every layer's channels (ResNet-18 has 64 to 512).", float, above=0, high=8
    )
    norm: str = _setting(
        "group",
        "Normalization: `batch` has statistics of each device's own, `sync-batch` one over "
        "all devices; `fixup` has none.",
        str,
        choices=NORMS,
    )
    num_groups: int = _setting(
        32,
        "Groups of Group Normalization; they divide every layer's channels, at full width up to 64 "
        "for `resnet18`, 16 for `resnet8` and `resnet20`.",
        int,
        low=1,
    )
    batch_statistics: str = _setting(
        "mean",
        "How the devices' running variances become one for evaluation: their mean, or the "
        "total, which adds the variance between the devices' means.",
        str,
        choices=("mean", "total"),
    )

    feature_norm: str = _setting(
        "none",
        "What the classifier sees: `none`, the pooled features as they are, or `rms`, each "
        "image's brought to one length, which keeps devices with few classes closer together.",
        str,
        choices=FEATURE_NORMS,
    )

    num_devices: int = _setting(10, "Simulated devices (D).", int, low=1, high=1000)
    split: str = _setting("classes", "How the images are divided.", str, choices=SPLITS)
    classes_per_device: int = _setting(2, "Classes that a device holds (`classes`).", int, low=1)
    assignment: str = _setting(
        "pairs",
        "Which classes (`classes`): `pairs`, each device the next ones, in sets that are equal or "
        "disjoint where `classes_per_device` divides the classes; `ring`, device d holds the "
        "classes d, d+1 and so on.",
        str,
        choices=ASSIGNMENTS,
    )
    alpha: float = _setting(
        0.5,
        "Concentration of the Dirichlet distribution that `dirichlet` draws each class's shares "
        "from, and `quantity` the devices' sizes; smaller is more skewed.",
        float,
        above=0,
    )
    min_images_per_device: int = _setting(
        10, "Fewest images of a device (`dirichlet` and `quantity`).", int, low=1
    )
    shared_images: int = _setting(
        0,
        "Training images, equally many of each class as far as they go, that every device holds "
        "beside its own.",
        int,
        low=0,
    )
    participation: float = _setting(
        1.0,
        "Share of the devices that take part in a round, drawn anew for each; they bring the "
        "whole `global_batch_size`.",
        float,
        above=0,
        high=1,
    )

    algorithm: str = _setting(
        "sync-sgd",
        "What the devices do together: `sync-sgd`, one step on the averaged gradient; `fedavg`, "
        "`local_steps` on weights of their own, which are then averaged; `scaffold`, the same "
        "with control variates against their drift.",
        str,
        choices=ALGORITHMS,
    )
    local_steps: int = _setting(
        1,
        "Updates that each device takes on its own weights between two averages (H of `fedavg` "
        "and `scaffold`).",
        int,
        low=1,
    )
    local_momentum: str = _setting(
        "average",
        "What an average does to the devices' momentum: averages it as well, leaves each device "
        "its own, or sets it to zero.",
        str,
        choices=LOCAL_MOMENTA,
    )
    proximal_mu: float = _setting(
        0.0, "FedProx: pull of the last average on the local weights (μ); 0 is none.", float, low=0
    )
    virtual_features: float = _setting(
        0.0,
        "Weight (λ) of a loss by which the classifier learns, from the features' statistics by "
        "class that devices share, of classes that its device holds few images of: 0 is none, 1 "
        "makes up for what the device lacks.",
        float,
        low=0,
    )
    average_weights: str = _setting(
        "uniform",
        "What a device's weights count in the average: all the same, or in proportion to the "
        "`images` that it holds.",
        str,
        choices=AVERAGE_WEIGHTS,
    )
    server_optimizer: str = _setting(
        "sgd",
        "What the server does with the mean change of the devices' weights: `sgd` takes it as a "
        "step (FedAvg; FedAvgM with `server_momentum`), `adam` adapts it (FedAdam).",
        str,
        choices=SERVER_OPTIMIZERS,
    )
    server_lr: float = _setting(
        1.0, "Learning rate of the server; FedAvg has 1, FedAdam needs about 0.01.", float, above=0
    )
    server_momentum: float = _setting(
        0.0,
        "Momentum of the server: β of FedAvgM, β₁ of FedAdam (its authors use 0.9).",
        float,
        low=0,
        high=0.9999,
    )
    server_beta2: float = _setting(
        0.99, "FedAdam's decay of the squared changes (β₂).", float, low=0, high=0.9999
    )
    server_epsilon: float = _setting(
        1e-3, "FedAdam's adaptivity (τ): smaller adapts more.", float, above=0
    )
    global_batch_size: int = _setting(
        320, "Images of one update, over all devices that take part (B).", int, low=1
    )
    epochs: int = _setting(100, "Passes over the training images.", int, low=1, searchable=False)
    peak_lr: float = _setting(0.1, "Learning rate after the warmup.", float, above=0)
    warmup_start_factor: float = _setting(
        0.1, "Learning rate of the first update, as a share of `peak_lr`.", float, above=0, high=1
    )
    warmup_epochs: float = _setting(0.0, "Length of the warmup; 0 is none.", float, low=0)
    warmup_shape: str = _setting(
        "linear",
        "How the learning rate rises: by equal steps (`linear`), slowly at both ends (`cosine`), "
        "or by equal factors (`exponential`).",
        str,
        choices=WARMUP_SHAPES,
    )
    schedule: str = _setting("plateau", "What follows the warmup.", str, choices=SCHEDULES)
    plateau_factor: float = _setting(
        0.1, "The learning rate is multiplied by this on a plateau.", float, above=0, high=0.99
    )
    plateau_patience: int = _setting(
        10, "Epochs without a better validation accuracy that make a plateau.", int, low=0
    )
    plateau_threshold: float = _setting(
        1e-4, "Relative gain in validation accuracy that counts as better.", float, low=0
    )
    exponential_gamma: float = _setting(
        0.97,
        "The learning rate is multiplied by this in every epoch after the warmup (`exponential`).",
        float,
        above=0,
        high=1,
    )
    optimizer: str = _setting(
        "sgd",
        "`lars` scales each layer's step by its weights' norm over its gradient's; `muon` makes "
        "each layer's step equally long in all directions, and trains the classifier, biases and "
        "scales by SGD.",
        str,
        choices=OPTIMIZERS,
    )
    lars_trust_coefficient: float = _setting(
        0.001, "Size of a layer's step under LARS, as a share of its weights.", float, above=0
    )
    muon_lr_factor: float = _setting(
        0.2,
        "Learning rate of the layers under Muon, as a share of `peak_lr`, at which it trains the "
        "classifier by SGD.",
        float,
        above=0,
    )
    muon_weight_decay: float = _setting(
        0.1,
        "Share of their learning rate by which the layers' weights shrink in a step under Muon, in "
        "place of the L2 penalty.",
        float,
        low=0,
    )
    momentum: float = _setting(0.9, "Momentum of the optimizer.", float, low=0, high=0.9999)
    nesterov: bool = _setting(False, "Nesterov's form of the momentum.", bool)
    weight_decay: float = _setting(
        5e-4, "L2 penalty; under Muon, of what SGD trains.", float, low=0
    )
    weight_decay_on: str = _setting(
        "all",
        "`weights` spares Fixup's scalars, the norms' scales and biases and the classifier's bias.",
        str,
        choices=("all", "weights"),
    )
    scalar_lr_factor: float | str = _setting(
        "auto",
        "Learning rate of Fixup's scalars (of norms: scales and biases), as a share of the "
        "weights'; `auto` is 0.1 for `fixup`, as its authors train it, and 1 for norms.",
        float,
        above=0,
        word="auto",
    )
    clip_grad_norm: float | str = _setting(
        "off", "Largest norm of the whole gradient; a longer one is scaled down.", float, above=0,
        word="off",
    )  # fmt: skip
    agc_clip_factor: float | str = _setting(
        "off",
        "Adaptive gradient clipping: the largest norm of a unit's gradient, as a share of the "
        "norm of its weights; a longer one is scaled down.",
        float,
        above=0,
        word="off",
    )
    label_smoothing: float = _setting(
        0.0, "Share of each training label that is spread over all classes.", float, low=0,
        high=0.9999,
    )  # fmt: skip
    precision: str = _setting(
        "auto",
        "`auto` is bfloat16 autocast where a GPU has it, and where a CPU has AMX and images are of "
        "16x16 or more, and float32 elsewhere: name one where workers of several machines share a "
        "sweep. `float32` leaves convolutions on a GPU PyTorch's default, TF32.",
        str,
        choices=("auto", "float32", "bfloat16"),
    )
    compile: str = _setting(
        "auto",
        "Whether `torch.compile` compiles the network, once for each structure and batch: `auto` "
        "does on a GPU, for `sync-sgd` and the networks that come with Sweep. What cannot be "
        "compiled trains uncompiled.",
        str,
        choices=("auto", "on", "off"),
        searchable=False,
    )
    seed: int = _setting(
        0, "Seed of the weights, the order of the images and their augmentation.", int, low=0,
        searchable=False,
    )  # fmt: skip

    @classmethod
    def settings(cls) -> dict[str, Setting]:
        """Every field's `Setting`, in the order of declaration."""
        return {f.name: f.metadata["setting"] for f in dataclasses.fields(cls)}

    @classmethod
    def setting(cls, name: str, where: str) -> Setting:
        """The `Setting` of one field.

        Args:
            name: of the field.
            where: what to call the place it stands in.

        Raises:
            SpecError: if there is no such field.
        """
        settings = cls.settings()
        if name not in settings:
            offered = [n for n, s in settings.items() if s.searchable or where != "[search]"]
            raise SpecError(f"{where} has no key {name!r}; {nearest(name, offered)}")
        return settings[name]

    @classmethod
    def build(cls, values: Mapping[str, object]) -> TrialConfig:
        """Check `values` one by one and together, and make a config of them.

        Args:
            values: fields by name; those left out keep their defaults.

        Raises:
            SpecError: for an unknown name, a value out of range, or values that contradict
                each other.
        """
        checked: dict[str, Any] = {
            name: cls.setting(name, "[train]").check(name, value) for name, value in values.items()
        }
        config = cls(**checked)
        config._check_together()
        return config

    def _check_together(self) -> None:
        if self.warmup_epochs > self.epochs:
            raise SpecError(
                f"warmup_epochs = {self.warmup_epochs:g} is longer than the training; accepted: "
                f"up to epochs = {self.epochs}, for a searched range as well "
                f"(search.warmup_epochs.high={self.epochs})"
            )
        devices = self.devices_per_round
        fewest = 2 * devices if self.norm == "batch" else devices
        if self.global_batch_size < fewest:
            why = (
                "two images a device, since each takes statistics of its own (norm = 'batch')"
                if self.norm == "batch"
                else "one image a device"
            )
            raise SpecError(
                f"global_batch_size = {self.global_batch_size} is too small for {self._devices()}; "
                f"accepted: from {fewest}, {why}, or a smaller participation"
            )
        if self.nesterov and not self.momentum:
            raise SpecError("nesterov = true has no meaning for momentum = 0")
        self._check_algorithm()
        if self.noise_std and self.dataset != "digits":
            raise SpecError(
                f"noise_std = {self.noise_std:g} has no meaning for dataset = {self.dataset!r}; "
                "it belongs to dataset = 'digits'"
            )

    def _check_algorithm(self) -> None:
        if self.algorithm == "sync-sgd":
            if self.local_steps != 1:
                raise SpecError(
                    f"local_steps = {self.local_steps} has no meaning for algorithm = 'sync-sgd', "
                    "whose devices average in every step; it belongs to 'fedavg' and 'scaffold'"
                )
            if self.average_weights != "uniform":
                raise SpecError(
                    f"average_weights = {self.average_weights!r} has no meaning for algorithm = "
                    "'sync-sgd', which averages over images; it belongs to 'fedavg' and 'scaffold'"
                )
            if self.virtual_features:
                raise SpecError(
                    f"virtual_features = {self.virtual_features:g} has no meaning for algorithm = "
                    "'sync-sgd', whose every step sees all devices' images; it belongs to "
                    "'fedavg' and 'scaffold'"
                )
            return
        if self.compile == "on":
            raise SpecError(
                f"compile = 'on' has no meaning for algorithm = {self.algorithm!r}, whose devices "
                "have weights of their own; it belongs to 'sync-sgd'"
            )
        if self.global_batch_size % self.devices_per_round:
            raise SpecError(
                f"global_batch_size = {self.global_batch_size} does not give {self._devices()} "
                f"equal local batches; accepted with algorithm = {self.algorithm!r}: multiples of "
                f"{self.devices_per_round}"
            )
        if self.local_momentum == "keep" and self.participation < 1:
            raise SpecError(
                f"local_momentum = 'keep' has no meaning for participation = "
                f"{self.participation:g}, where a device's momentum is old when its turn comes "
                "again; accepted: 'average', 'reset'"
            )
        if self.optimizer == "lars":
            raise SpecError(
                f"optimizer = 'lars' belongs to algorithm = 'sync-sgd'; accepted with "
                f"{self.algorithm!r}: 'sgd', 'muon'"
            )
        if self.norm == "sync-batch":
            raise SpecError(
                f"norm = 'sync-batch' has no meaning for algorithm = {self.algorithm!r}: devices "
                "that average their weights now and then share no statistics in between; "
                "accepted: the other norms"
            )

    @property
    def devices_per_round(self) -> int:
        """How many devices take part in a round."""
        return max(1, round(self.participation * self.num_devices))

    def _devices(self) -> str:
        if self.participation == 1:
            return f"num_devices = {self.num_devices}"
        return (
            f"the {self.devices_per_round} devices of a round (num_devices = {self.num_devices}, "
            f"participation = {self.participation:g})"
        )

    def as_dict(self) -> dict[str, Value]:
        """The fields as a plain dictionary that JSON can hold."""
        return dict(vars(self))
