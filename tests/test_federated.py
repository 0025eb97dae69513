"""Federated algorithms against D models, D optimizers and a loop; what is refused."""

import copy
import io
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import TRAIN
from slow_federated import (
    ALL,
    CLASSES,
    COUNTS,
    LOCAL,
    RULES,
    D,
    assert_equal_weights,
    learning_rate,
    make_algorithm,
    make_batches,
    make_model,
    make_partial_batches,
    slow_reference,
)
from torch import Tensor
from torch.nn import functional as F

from models import (
    FEATURE_NORMS,
    build_model,
    classifier_parameters,
    parameter_groups,
    stacked_forward,
)
from sweeps import config
from sweeps.assembly import Assembly, open_dataset
from sweeps.config import TrialConfig
from sweeps.errors import SpecError
from sweeps.objective import Objective
from sweeps.training import federated
from sweeps.training.federated import FederatedAveraging, FederatedSettings
from sweeps.training.loop import evaluate
from sweeps.training.rounds import SGDSettings, SynchronousSGD
from sweeps.training.server import SERVER_OPTIMIZERS


@pytest.mark.parametrize("norm", ["group", "fixup"])
@pytest.mark.parametrize("name", RULES)
def test_it_equals_separate_devices(norm: str, name: str) -> None:
    """Three rounds of three local steps and one more step, with momentum and a moving rate."""
    rules = replace(RULES[name], local_steps=3)
    settings = replace(LOCAL, scalar_lr_factor=0.1)
    batches = make_batches(10)
    algorithm = make_algorithm(norm, settings, rules)
    losses = [algorithm.round(b, learning_rate(u)).item() for u, b in enumerate(batches)]
    wanted, wanted_losses = slow_reference(norm, batches, settings, rules)
    assert_equal_weights(algorithm.global_model(), wanted)
    assert losses == pytest.approx(wanted_losses, rel=1e-10)


@pytest.mark.parametrize(
    ("norm", "name", "image_counts"),
    [
        ("batch", "fedavg", None),
        ("batch", "fedavg", COUNTS),
        ("batch", "scaffold", COUNTS),
        ("fixup", "fedavg", COUNTS),
        ("fixup", "fedavg, momentum reset", COUNTS),
        ("fixup", "fedprox", None),
        ("fixup", "fedavgm", COUNTS),
        ("fixup", "fedadam", COUNTS),
        ("fixup", "scaffold", None),
        ("batch", "virtual features", COUNTS),
        ("fixup", "all at once", COUNTS),
    ],
)
def test_it_equals_separate_devices_of_which_some_take_part(
    norm: str, name: str, image_counts: list[int] | None
) -> None:
    """Four rounds of two local steps, and evaluation one step into the last."""
    rules = replace(RULES[name], local_steps=2)
    settings = replace(LOCAL, scalar_lr_factor=0.1)
    batches = make_partial_batches(4, 2)[:-1]
    algorithm = make_algorithm(norm, settings, rules, ALL, image_counts)
    losses = [algorithm.round(b, learning_rate(u)).item() for u, b in enumerate(batches)]
    wanted, wanted_losses = slow_reference(
        norm, batches, settings, rules, num_devices=ALL, image_counts=image_counts
    )
    assert_equal_weights(algorithm.global_model(), wanted)
    assert losses == pytest.approx(wanted_losses, rel=1e-10)


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam", "scaffold"])
def test_all_devices_weighed_by_their_images(name: str) -> None:
    rules = replace(RULES[name], local_steps=3)
    batches = make_batches(7)
    counts = [3, 50, 20]
    algorithm = make_algorithm("group", LOCAL, rules, image_counts=counts)
    for u, b in enumerate(batches):
        algorithm.round(b, learning_rate(u))
    wanted, _ = slow_reference("group", batches, LOCAL, rules, image_counts=counts)
    alike, _ = slow_reference("group", batches, LOCAL, rules)
    assert_equal_weights(algorithm.global_model(), wanted)
    assert not torch.allclose(wanted["fc.weight"], alike["fc.weight"], rtol=1e-3)


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_batch_normalization_keeps_each_devices_statistics(norm: str, name: str) -> None:
    """Averaging the buffers with the weights, as the reference does, changes no mean of them."""
    rules = replace(RULES[name], local_steps=2)
    batches = make_batches(7)
    algorithm = make_algorithm(norm, LOCAL, rules)
    for u, b in enumerate(batches):
        algorithm.round(b, learning_rate(u))
    assert_equal_weights(algorithm.global_model(), slow_reference(norm, batches, LOCAL, rules)[0])


@pytest.mark.parametrize("large", ["LARGE_MAPS", "LARGE_PRODUCTS"])
@pytest.mark.parametrize(
    ("norm", "partial"), [("batch", False), ("batch", True), ("group", False), ("fixup", False)]
)
def test_large_steps_take_the_devices_one_by_one(
    norm: str, partial: bool, large: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same numbers, and so does the map over devices that users' networks go through."""
    rules = replace(RULES["all at once"], local_steps=3)
    batches = make_partial_batches(2, 3) if partial else make_batches(7)
    all_devices = ALL if partial else D
    stacked, single = (make_algorithm(norm, LOCAL, rules, all_devices) for _ in range(2))
    mapped = make_algorithm(norm, LOCAL, rules, all_devices, stacked=False)
    passes: list[int] = []
    single._model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    for u, batch in enumerate(batches):
        monkeypatch.setattr(federated, large, 10**9)
        losses = [way.round(batch, learning_rate(u)) for way in (stacked, mapped)]
        monkeypatch.setattr(federated, large, 0)
        passes.clear()
        wanted = single.round(batch, learning_rate(u))
        taking_part = single._devices_per_round
        assert passes.count(len(batch.labels) // taking_part) == taking_part
        for loss in losses:
            torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-10)
    for name, value in single.global_model().state_dict().items():
        for way in (stacked, mapped):
            other = way.global_model().state_dict()[name]
            torch.testing.assert_close(other, value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("feature_norm", FEATURE_NORMS)
@pytest.mark.parametrize("norm", ["batch", "group", "layer", "instance", "fixup"])
@pytest.mark.parametrize("name", ["resnet8", "resnet18"])
def test_a_stacked_pass_equals_a_pass_for_each_network(
    name: str, norm: str, feature_norm: str
) -> None:
    """Logits, gradients and statistics, of networks that are not alike."""
    side = 16 if norm == "instance" else 8
    models = [
        build_model(
            name, norm=norm, num_classes=CLASSES, image_size=side, width_factor=0.125,
            num_groups=2, feature_norm=feature_norm, seed=seed,
        ).double().train()
        for seed in range(D)
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    for parameter in (p for model in models for p in model.parameters()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.1 * noise  # weights and scales that start at zero hide the others
    images = torch.randn(2 * D, 3, side, side, generator=generator, dtype=torch.float64)
    parameters = {
        n: torch.stack([m.get_parameter(n).detach() for m in models]).requires_grad_()
        for n, _ in models[0].named_parameters()
    }
    buffers = {
        n: torch.stack([m.get_buffer(n).clone() for m in models])
        for n, _ in models[0].named_buffers()
    }
    forward = stacked_forward(models[0])
    assert forward is not None
    logits = forward(parameters, buffers, images)
    logits.square().sum().backward()
    for d, model in enumerate(models):
        own = model(images[d::D], ((None, 2),))
        torch.testing.assert_close(logits[d::D], own, rtol=1e-10, atol=1e-10)
        own.square().sum().backward()
        for n, p in model.named_parameters():
            stacked = parameters[n].grad
            assert stacked is not None
            torch.testing.assert_close(stacked[d], p.grad, rtol=1e-9, atol=1e-9, msg=n)
        for n, b in model.named_buffers():
            torch.testing.assert_close(buffers[n][d], b, rtol=1e-10, atol=1e-10, msg=n)


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "all at once"])
def test_each_devices_gradient_is_clipped_by_its_own_norm(name: str) -> None:
    rules = replace(RULES[name], local_steps=2)
    settings = replace(LOCAL, clip_grad_norm=0.8, decay_scalars=False)
    batches = make_batches(5)
    algorithm = make_algorithm("group", settings, rules)
    for u, b in enumerate(batches):
        algorithm.round(b, learning_rate(u))
    wanted, _ = slow_reference("group", batches, settings, rules)
    unclipped, _ = slow_reference("group", batches, replace(settings, clip_grad_norm=None), rules)
    assert_equal_weights(algorithm.global_model(), wanted)
    assert not torch.allclose(wanted["fc.weight"], unclipped["fc.weight"], rtol=1e-3)


@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
@pytest.mark.parametrize(
    "levers",
    [
        {"agc_clip_factor": 0.02},
        {"label_smoothing": 0.1},
        {"nesterov": True},
        {"agc_clip_factor": 0.05, "label_smoothing": 0.2, "nesterov": True, "clip_grad_norm": 0.3},
    ],
    ids=lambda levers: "+".join(levers),
)
@pytest.mark.parametrize("norm", ["group", "fixup"])
def test_levers_work_on_every_device_by_itself(
    norm: str, levers: dict[str, Any], name: str
) -> None:
    rules = replace(RULES[name], local_steps=2)
    settings = replace(LOCAL, **levers)
    batches = make_batches(5)
    algorithm = make_algorithm(norm, settings, rules)
    losses = [algorithm.round(b, learning_rate(u)).item() for u, b in enumerate(batches)]
    wanted, wanted_losses = slow_reference(norm, batches, settings, rules)
    plain, _ = slow_reference(norm, batches, LOCAL, rules)
    assert_equal_weights(algorithm.global_model(), wanted)
    assert losses == pytest.approx(wanted_losses, rel=1e-10)
    assert not torch.allclose(wanted["conv.weight"], plain["conv.weight"], rtol=1e-3)


def test_lars_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be LARS"):
        make_algorithm("group", replace(LOCAL, lars_trust_coefficient=0.01), FederatedSettings())


@pytest.mark.parametrize("norm", ["group", "fixup"])
@pytest.mark.parametrize("name", ["fedavg", "fedavg, momentum kept", "scaffold", "all at once"])
def test_each_device_takes_steps_of_its_own_muon(norm: str, name: str) -> None:
    rules = replace(RULES[name], local_steps=3)
    settings = replace(
        LOCAL, muon_lr_factor=0.3, muon_weight_decay=0.2, nesterov=True, scalar_lr_factor=0.1
    )
    batches = make_batches(7)
    algorithm = make_algorithm(norm, settings, rules)
    losses = [algorithm.round(b, learning_rate(u)).item() for u, b in enumerate(batches)]
    wanted, wanted_losses = slow_reference(norm, batches, settings, rules)
    assert_equal_weights(algorithm.global_model(), wanted, tolerance=1e-8)
    assert losses == pytest.approx(wanted_losses, rel=1e-8)


@pytest.mark.parametrize("norm", ["group", "fixup"])
def test_scaffold_is_the_papers_option_two(norm: str) -> None:
    """With plain SGD, (x - y) / (H η) is the mean gradient that is kept here."""
    rules = FederatedSettings(local_steps=4, control_variates=True, server_lr=0.8)
    settings = SGDSettings(momentum=0.0, weight_decay=5e-3)
    batches = make_batches(13)
    algorithm = make_algorithm(norm, settings, rules)
    for b in batches:
        algorithm.round(b, 0.05)
    wanted, _ = slow_reference(
        norm, batches, settings, rules, literal_option_two=True, constant_lr=0.05
    )
    assert_equal_weights(algorithm.global_model(), wanted)


@pytest.mark.parametrize("norm", ["batch", "group", "fixup"])
@pytest.mark.parametrize(
    ("momentum", "local_momentum"), [(0.0, "reset"), (0.9, "average"), (0.9, "keep")]
)
def test_averaging_in_every_step_is_synchronous_sgd(
    norm: str, momentum: float, local_momentum: str
) -> None:
    settings = SGDSettings(momentum=momentum, weight_decay=5e-4, scalar_lr_factor=0.1)
    rules = FederatedSettings(local_steps=1, local_momentum=local_momentum)
    algorithm = make_algorithm(norm, settings, rules)
    model = make_model(norm)
    synchronous = SynchronousSGD(model, parameter_groups(model), settings)
    for u, batch in enumerate(make_batches(6)):
        ours = algorithm.round(batch, learning_rate(u))
        theirs = synchronous.round(batch, learning_rate(u))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert_equal_weights(algorithm.global_model(), synchronous.global_model().state_dict())


def test_devices_that_hold_all_classes_alike_need_no_virtual_features() -> None:
    batches = make_batches(5)
    algorithms = []
    for factor in (0.0, 1.0):
        model = make_model("group")
        algorithms.append(
            FederatedAveraging(
                model, parameter_groups(model), LOCAL,
                FederatedSettings(local_steps=2, virtual_features=factor), num_devices=D,
                class_counts=[[4, 2, 2, 2, 6]] * D, classifier=classifier_parameters(model),
            )
        )  # fmt: skip
    for u, batch in enumerate(batches):
        plain, virtual = (a.round(batch, learning_rate(u)) for a in algorithms)
        torch.testing.assert_close(plain, virtual, rtol=1e-12, atol=1e-12)
    assert_equal_weights(algorithms[1].global_model(), algorithms[0].global_model().state_dict())


@pytest.mark.parametrize(
    "counts", [None, [[1, 2, 3, 4, 5]], [[1] * 4] * 3, [[1] * 5, [0] * 5, [1] * 5]]
)
def test_virtual_features_need_every_devices_classes(counts: list[list[int]] | None) -> None:
    model = make_model("group")
    with pytest.raises(ValueError, match="accepted: numbers of images of 3 devices by 5 classes"):
        FederatedAveraging(
            model, parameter_groups(model), LOCAL, FederatedSettings(virtual_features=1.0),
            num_devices=D, class_counts=counts,
            classifier=classifier_parameters(model),
        )  # fmt: skip


@pytest.mark.parametrize(
    "name", ["fedavg", "fedprox", "fedavgm", "fedadam", "scaffold", "virtual features"]
)
@pytest.mark.parametrize(("norm", "partial"), [("batch", True), ("batch", False), ("fixup", False)])
def test_it_goes_on_from_any_step(norm: str, partial: bool, name: str) -> None:
    rules = replace(RULES[name], local_steps=3)
    batches = make_partial_batches(3, 3)[:8] if partial else make_batches(8)
    devices: tuple[int, list[int] | None] = (ALL, COUNTS) if partial else (D, None)
    whole = make_algorithm(norm, LOCAL, rules, *devices)
    files, losses, evaluated = [], [], {}
    for u, batch in enumerate(batches):
        evaluated[u] = copy.deepcopy(whole.global_model().state_dict())
        file = io.BytesIO()
        torch.save(whole.state_dict(), file)
        files.append(file)
        losses.append(whole.round(batch, learning_rate(u)))
    for cut in (1, 3, 4, 5):
        resumed = make_algorithm(norm, LOCAL, rules, *devices)
        # What was trained before a resume must leave no trace.
        resumed.round(batches[-1], 0.1)
        files[cut].seek(0)
        resumed.load_state_dict(torch.load(files[cut], weights_only=True))
        for n, value in resumed.global_model().state_dict().items():
            assert torch.equal(value, evaluated[cut][n]), n
        for u, batch in enumerate(batches[cut:], start=cut):
            assert torch.equal(resumed.round(batch, learning_rate(u)), losses[u])
        for n, value in whole.global_model().state_dict().items():
            assert torch.equal(value, resumed.global_model().state_dict()[n]), n


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_evaluation_leaves_the_training_alone(norm: str) -> None:
    rules = replace(RULES["all at once"], local_steps=3)
    watched, alone = (make_algorithm(norm, LOCAL, rules) for _ in range(2))
    images, labels = make_batches(1, seed=9)[0].images, make_batches(1, seed=9)[0].labels
    for u, batch in enumerate(make_batches(5)):
        ours = watched.round(batch, learning_rate(u))
        evaluate(watched.global_model(), [images], labels)
        assert torch.equal(ours, alone.round(batch, learning_rate(u)))
    before, after = alone.state_dict(), watched.state_dict()
    for part in ("global", "local", "buffers"):
        for name, value in before[part].items():
            assert torch.equal(value, after[part][name]), (part, name)


def test_the_global_model_is_the_mean_of_the_devices() -> None:
    algorithm = make_algorithm("group", LOCAL, FederatedSettings(local_steps=5))
    for u, batch in enumerate(make_batches(3)):
        algorithm.round(batch, learning_rate(u))
    local = algorithm.state_dict()["local"]
    assert not torch.equal(local["fc.weight"][0], local["fc.weight"][1])
    for name, parameter in algorithm.global_model().named_parameters():
        torch.testing.assert_close(parameter.detach(), local[name].mean(dim=0))


def test_unequal_local_batches_are_refused() -> None:
    algorithm = make_algorithm("group", LOCAL, FederatedSettings())
    batch = make_batches(1)[0]
    blocks = ((torch.tensor([0]), 6), (torch.tensor([1, 2]), 3))
    with pytest.raises(ValueError, match="multiple of num_devices = 3"):
        algorithm.round(replace(batch, blocks=blocks), 0.1)


@pytest.mark.parametrize(
    "blocks", [((None, 4),), ((torch.arange(4), 3),), ((torch.arange(2), 4), (torch.arange(2), 2))]
)
def test_another_number_of_participants_is_refused(blocks: Any) -> None:
    algorithm = make_algorithm("group", LOCAL, FederatedSettings(), ALL)
    with pytest.raises(ValueError, match="multiple of the 3 devices of a round"):
        algorithm.round(replace(make_batches(1)[0], blocks=blocks), 0.1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"devices_per_round": 4}, "devices_per_round = 4 is out of range; accepted: 1 to"),
        ({"devices_per_round": 0}, "devices_per_round = 0 is out of range"),
        ({"devices_per_round": 2, "local_momentum": "keep"}, "accepted: average, reset"),
        ({"image_counts": [5, 5]}, "a number from 1 for each of the 3 devices"),
        ({"image_counts": [5, 0, 5]}, "a number from 1 for each of the 3 devices"),
    ],
)
def test_participants_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    model = make_model("group")
    rules = FederatedSettings(local_momentum=options.pop("local_momentum", "average"))
    with pytest.raises(ValueError, match=said):
        FederatedAveraging(model, parameter_groups(model), LOCAL, rules, num_devices=D, **options)


@pytest.mark.parametrize(
    ("norm", "rules", "said"),
    [
        ("sync-batch", {}, "norm = 'sync-batch'"),
        ("group", {"local_momentum": "mean"}, "accepted: average, keep, reset"),
        ("group", {"server_optimizer": "yogi"}, "accepted: sgd, adam"),
        ("group", {"local_steps": 0}, "accepted: from 1"),
    ],
)
def test_what_it_cannot_do_is_refused(norm: str, rules: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_algorithm(norm, LOCAL, FederatedSettings(**rules))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"algorithm": "sync-sgd", "local_steps": 10}, "local_steps = 10 has no meaning"),
        ({"algorithm": "sync-sgd", "virtual_features": 1}, "virtual_features = 1 has no meaning"),
        ({"algorithm": "fedavg", "global_batch_size": 322}, "equal local batches"),
        ({"algorithm": "scaffold", "norm": "sync-batch"}, "norm = 'sync-batch'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        TrialConfig.build(values)


def test_names_are_those_of_the_algorithms() -> None:
    assert config.LOCAL_MOMENTA == federated.LOCAL_MOMENTA
    assert config.SERVER_OPTIMIZERS == SERVER_OPTIMIZERS
    assert config.FEATURE_NORMS == FEATURE_NORMS


@pytest.mark.parametrize(
    ("norm", "algorithm"), [("batch", "scaffold"), ("group", "fedavg"), ("fixup", "scaffold")]
)
def test_a_trial_trains(norm: str, algorithm: str) -> None:
    """From the config on: rounds run on across epochs, whose ends fall within them."""
    made = TrialConfig.build(
        {**TRAIN, "norm": norm, "algorithm": algorithm, "local_steps": 7, "peak_lr": 0.05,
         "epochs": 4, "global_batch_size": 32},
    )  # fmt: skip
    losses: list[float] = []
    run = Objective(Assembly(open_dataset(made, None), torch.device("cpu")))
    accuracy = run.run(made, seeds=1, on_epoch=lambda p: losses.append(p.result.train_loss))
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert accuracy > 0.3


def test_a_trial_trains_some_devices_at_a_time() -> None:
    """Of different sizes, which speak to each other of the classes that they lack."""
    made = TrialConfig.build(
        {**TRAIN, "norm": "batch", "algorithm": "scaffold", "local_steps": 7, "peak_lr": 0.05,
         "epochs": 4, "global_batch_size": 32, "num_devices": 8, "participation": 0.5,
         "split": "dirichlet", "average_weights": "images", "virtual_features": 1.0,
         "shared_images": 20},
    )  # fmt: skip
    runs: list[list[float]] = []
    for _ in range(2):
        losses: list[float] = []
        runs.append(losses)
        run = Objective(Assembly(open_dataset(made, None), torch.device("cpu")))
        run.run(made, seeds=1, on_epoch=lambda p: losses.append(p.result.val_loss))  # noqa: B023
    assert runs[0] == runs[1]
    assert runs[0][-1] < min(runs[0][0], math.log(10))


@pytest.mark.parametrize("norm", ["group", "fixup"])
def test_normalised_features_have_a_root_mean_square_of_one(norm: str) -> None:
    options: dict[str, Any] = {
        "norm": norm, "num_classes": 5, "image_size": 8, "num_groups": 2, "seed": 0
    }  # fmt: skip
    model = build_model("resnet8", feature_norm="rms", **options)
    plain = build_model("resnet8", **options)
    seen: list[Tensor] = []
    for network in (model, plain):
        network.get_submodule("fc").register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        network(torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    normalised, features = seen
    torch.testing.assert_close(normalised.square().mean(dim=1), torch.ones(6))
    torch.testing.assert_close(F.cosine_similarity(normalised, features), torch.ones(6))
