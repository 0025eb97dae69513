"""Batches: dealing, streams, augmentation, each against a slow and plain reference."""

import hashlib
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from data.batches import Batch, DeviceBatches, channel_statistics, normalise
from models.norms import DeviceBatchNorm2d

CPU = torch.device("cpu")
MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.2, 0.3]


def numbered(
    shard_sizes: list[int],
    batch_size: int,
    *,
    seed: int = 0,
    devices_per_round: int | None = None,
    steps_per_round: int = 1,
) -> tuple[DeviceBatches, list[NDArray[np.int64]]]:
    """Batches whose labels are the image numbers, so that they tell which image is where."""
    total = sum(shard_sizes)
    order = np.random.default_rng(7).permutation(total)
    shards = np.split(order, np.cumsum(shard_sizes)[:-1])
    batches = DeviceBatches(
        torch.zeros(total, 1, 2, 2, dtype=torch.uint8),
        torch.arange(total),
        shards,
        global_batch_size=batch_size,
        devices_per_round=devices_per_round,
        steps_per_round=steps_per_round,
        seed=seed,
        augment="none",
        device=CPU,
        mean=[0.5],
        std=[0.25],
    )
    return batches, shards


def by_device(batch: Batch, num_devices: int) -> dict[int, list[int]]:
    """Undo the documented layout, one sample after the other."""
    images: dict[int, list[int]] = defaultdict(list)
    start = 0
    for devices, each in batch.blocks:
        ids = list(range(num_devices)) if devices is None else devices.tolist()
        for i in range(each):
            for j, d in enumerate(ids):
                images[d].append(int(batch.labels[start + i * len(ids) + j]))
        start += each * len(ids)
    assert start == len(batch.labels)
    return images


shapes = st.tuples(
    st.lists(st.integers(1, 30), min_size=1, max_size=9),
    st.integers(1, 40),
    st.integers(0, 2**63 - 1),
)


@settings(deadline=None)
@given(shape=shapes)
def test_updates_are_dealt_like_cards(shape: tuple[list[int], int, int]) -> None:
    shard_sizes, B, seed = shape
    D = len(shard_sizes)
    q, r = divmod(B, D)
    batches, _ = numbered(shard_sizes, B, seed=seed)
    assert batches.updates_per_epoch == max(1, round(sum(shard_sizes) / B))
    assert batches.images_per_epoch == batches.updates_per_epoch * B
    u = 0
    for epoch in range(3):
        for batch in batches.epoch(epoch):
            extra = [(u * r + j) % D for j in range(r)]
            if r == 0:
                assert batch.blocks == ((None, q),)
            else:
                assert [each for _, each in batch.blocks] == ([q + 1, q] if q else [1])
                ids = [devices for devices, _ in batch.blocks]
                assert all(devices is not None and devices.dtype == torch.int64 for devices in ids)
                assert ids[0] is not None
                assert ids[0].tolist() == extra
                if q:
                    assert ids[1] is not None
                    assert sorted(ids[1].tolist()) == [d for d in range(D) if d not in extra]
            given_images = by_device(batch, D)
            assert {d: len(images) for d, images in given_images.items()} == {
                d: q + (d in extra) for d in range(D) if q + (d in extra) > 0
            }
            u += 1
    assert u == 3 * batches.updates_per_epoch


@settings(deadline=None)
@given(shape=shapes)
def test_no_image_repeats_before_its_shard_was_seen(shape: tuple[list[int], int, int]) -> None:
    shard_sizes, B, seed = shape
    batches, shards = numbered(shard_sizes, B, seed=seed)
    streams: dict[int, list[int]] = defaultdict(list)
    for epoch in range(4):
        for batch in batches.epoch(epoch):
            for d, images in by_device(batch, len(shards)).items():
                streams[d] += images
    for d, stream in streams.items():
        n = len(shards[d])
        for start in range(0, len(stream), n):
            images = stream[start : start + n]
            assert len(set(images)) == len(images)
            assert set(images) <= set(shards[d].tolist())
    lengths = [len(streams[d]) for d in range(len(shards))]
    assert max(lengths) - min(lengths) <= 1


def test_passes_and_devices_are_permuted_differently() -> None:
    batches, shards = numbered([50, 50], 100)
    orders = []
    for epoch in range(5):
        (batch,) = batches.epoch(epoch)
        for d, images in by_device(batch, 2).items():
            place = {image: i for i, image in enumerate(shards[d].tolist())}
            orders.append(tuple(place[image] for image in images))
    assert len(set(orders)) == 10


def test_permutations_are_uniform() -> None:
    # 6,000 passes over three images: each order is expected 1,000 times, deviation about 29.
    seen: dict[tuple[int, ...], int] = defaultdict(int)
    batches, _ = numbered([3], 3)
    for epoch in range(6000):
        (batch,) = batches.epoch(epoch)
        seen[tuple(batch.labels.tolist())] += 1
    assert len(seen) == 6
    assert all(850 < count < 1150 for count in seen.values())


def test_an_epoch_depends_on_nothing_but_arguments() -> None:
    torch.manual_seed(1)
    images = torch.randint(0, 256, (40, 3, 6, 6), dtype=torch.uint8)

    def make(seed: int = 3) -> DeviceBatches:
        return DeviceBatches(
            images,
            torch.arange(40),
            [np.arange(15), np.arange(15, 40), np.array([3])],
            global_batch_size=7,
            seed=seed,
            device=CPU,
            mean=MEAN,
            std=STD,
        )

    used = make()
    state = torch.get_rng_state()
    for epoch in range(3):
        list(used.epoch(epoch))
    for a, b in zip(used.epoch(5), make().epoch(5), strict=True):
        torch.testing.assert_close(a.images, b.images, rtol=0, atol=0)
        torch.testing.assert_close(a.labels, b.labels, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    for other in (make().epoch(6), make(seed=4).epoch(5)):
        assert any(
            not torch.equal(a.labels, b.labels) for a, b in zip(make().epoch(5), other, strict=True)
        )


def test_order_is_the_same_on_every_machine() -> None:
    batches, _ = numbered([4, 6, 5], 5, seed=42)
    labels = [batch.labels.tolist() for batch in batches.epoch(2)]
    assert labels == [[6, 1, 8, 7, 2], [11, 10, 14, 6, 7], [12, 9, 4, 5, 3]]


@pytest.mark.parametrize(
    ("batch_size", "expected"),
    [(3, "b6a67aea4aa59b61"), (20, "325e75bb13d67578"), (23, "321d2b84e207d7f2")],
)
@pytest.mark.parametrize("devices_per_round", [None, 5])
def test_batches_of_all_devices_stay_as_they_were(
    batch_size: int, expected: str, devices_per_round: int | None
) -> None:
    # What stored trials were trained on; a checkpoint of theirs goes on with the same batches.
    images = (torch.arange(60 * 3 * 5 * 5) * 37 % 256).to(torch.uint8).view(60, 3, 5, 5)
    batches = DeviceBatches(
        images,
        torch.arange(60),
        np.split(np.arange(60), [11, 40, 42, 47]),
        global_batch_size=batch_size,
        devices_per_round=devices_per_round,
        steps_per_round=3,
        seed=42,
        crop_padding=2,
        device=CPU,
        mean=[0.5] * 3,
        std=[0.25] * 3,
    )
    digest = hashlib.sha256()
    for epoch in (0, 1, 7):
        for batch in batches.epoch(epoch):
            digest.update(batch.images.contiguous().numpy().tobytes())
            digest.update(batch.labels.numpy().tobytes())
            for ids, each in batch.blocks:
                digest.update(f"{None if ids is None else ids.tolist()} {each};".encode())
    assert digest.hexdigest()[:16] == expected


def test_images_on_several_devices_make_no_epoch_longer() -> None:
    shards = [np.arange(20 * d, 20 * d + 20) for d in range(5)]
    shared = np.arange(100, 140)
    batches = DeviceBatches(
        torch.zeros(150, 1, 2, 2, dtype=torch.uint8),
        torch.arange(150),
        [np.concatenate([shard, shared]) for shard in shards],
        global_batch_size=10,
        seed=0,
        augment="none",
        device=CPU,
        mean=[0.5],
        std=[0.25],
    )
    assert batches.updates_per_epoch == 14
    streams: dict[int, list[int]] = defaultdict(list)
    for epoch in range(3):
        for batch in batches.epoch(epoch):
            for d, images in by_device(batch, 5).items():
                streams[d] += images
    for d, stream in streams.items():
        assert sorted(stream[:60]) == sorted([*shards[d].tolist(), *shared.tolist()])


# Rounds that some of the devices take part in


def participants(batch: Batch) -> list[int]:
    """Numbers of the devices that a batch is from, in the order of its blocks."""
    ids: list[int] = []
    for devices, _ in batch.blocks:
        assert devices is not None
        assert devices.dtype == torch.int64
        ids += devices.tolist()
    return ids


@st.composite
def partial_rounds(draw: st.DrawFn) -> tuple[list[int], int, int, int, int]:
    """Shard sizes, m, steps a round, B, seed."""
    sizes = draw(st.lists(st.integers(1, 20), min_size=2, max_size=9))
    m = draw(st.integers(1, len(sizes) - 1))
    return (
        sizes,
        m,
        draw(st.integers(1, 5)),
        draw(st.integers(m, 30)),
        draw(st.integers(0, 2**63 - 1)),
    )


@settings(deadline=None)
@given(case=partial_rounds())
def test_a_round_is_of_the_same_devices_and_dealt_like_cards(
    case: tuple[list[int], int, int, int, int],
) -> None:
    shard_sizes, m, steps, B, seed = case
    D = len(shard_sizes)
    q, r = divmod(B, m)
    batches, shards = numbered(
        shard_sizes, B, seed=seed, devices_per_round=m, steps_per_round=steps
    )
    assert batches.updates_per_epoch == max(1, round(sum(shard_sizes) / B))
    rounds: dict[int, list[int]] = {}
    streams: dict[int, list[int]] = defaultdict(list)
    u = 0
    for epoch in range(6):
        for batch in batches.epoch(epoch):
            ids = rounds.setdefault(u // steps, sorted(participants(batch)))
            assert len(set(ids)) == m
            assert set(ids) <= set(range(D))
            turn = [ids[(u * r + j) % m] for j in range(m)]
            if r == 0:
                assert participants(batch) == ids
                assert [each for _, each in batch.blocks] == [q]
            else:
                assert participants(batch) == turn
                assert [each for _, each in batch.blocks] == [q + 1, q]
                assert [len(ids) for ids, _ in batch.blocks if ids is not None] == [r, m - r]
            for d, images in by_device(batch, D).items():
                assert len(images) == q + (d in turn[:r])
                streams[d] += images
            u += 1
    for d, stream in streams.items():
        n = len(shards[d])
        for start in range(0, len(stream), n):
            images = stream[start : start + n]
            assert len(set(images)) == len(images)
            assert set(images) <= set(shards[d].tolist())


@settings(deadline=None)
@given(case=partial_rounds())
def test_an_epoch_of_rounds_depends_on_nothing_but_arguments(
    case: tuple[list[int], int, int, int, int],
) -> None:
    shard_sizes, m, steps, B, seed = case

    def make() -> DeviceBatches:
        options = {"seed": seed, "devices_per_round": m, "steps_per_round": steps}
        return numbered(shard_sizes, B, **options)[0]  # type: ignore[arg-type]

    used = make()
    for epoch in (0, 1, 2, 7, 3):
        for a, b in zip(used.epoch(epoch), make().epoch(epoch), strict=True):
            assert torch.equal(a.labels, b.labels)
            assert participants(a) == participants(b)
            assert [each for _, each in a.blocks] == [each for _, each in b.blocks]


def test_rounds_are_counted_in_pieces_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def labels() -> list[list[int]]:
        batches, _ = numbered([7, 9, 30, 4], 5, devices_per_round=3, steps_per_round=4)
        return [batch.labels.tolist() for batch in batches.epoch(20)]

    expected = labels()
    monkeypatch.setattr("data.batches._DRAWN_AT_ONCE", 12)
    assert labels() == expected


def test_every_set_of_devices_is_equally_likely() -> None:
    # 6,000 rounds of two in four: each of the six pairs is expected 1,000 times, deviation 29.
    batches, _ = numbered([3] * 4, 2, devices_per_round=2)
    seen: dict[tuple[int, ...], int] = defaultdict(int)
    follows: dict[bool, int] = defaultdict(int)
    before: tuple[int, ...] = ()
    for epoch in range(1000):
        for batch in batches.epoch(epoch):
            pair = tuple(participants(batch))
            seen[pair] += 1
            follows[pair == before] += 1
            before = pair
    assert len(seen) == 6
    assert sum(seen.values()) == 6000
    assert all(880 < count < 1120 for count in seen.values())
    assert 880 < follows[True] < 1120  # one in six is the same as in the round before
    others, _ = numbered([3] * 4, 2, devices_per_round=2, seed=1)
    sets = [[participants(b) for b in some.epoch(0)] for some in (batches, others)]
    assert sets[0] != sets[1]


def test_images_left_over_go_to_all_devices_alike() -> None:
    batches, _ = numbered([5] * 6, 7, devices_per_round=4)
    given_images = np.zeros(6, dtype=np.int64)
    rounds = np.zeros(6, dtype=np.int64)
    for epoch in range(1500):
        for batch in batches.epoch(epoch):
            for d, images in by_device(batch, 6).items():
                given_images[d] += len(images)
                rounds[d] += 1
    # Seven images of four devices: 1.75 each; 4,000 turns give a deviation of 0.007.
    assert rounds.min() > 3800
    np.testing.assert_allclose(given_images / rounds, 1.75, atol=0.03)


def test_ten_of_a_thousand_devices() -> None:
    batches, shards = numbered([9] * 1000, 320, devices_per_round=10, steps_per_round=5)
    assert batches.updates_per_epoch == 28
    sets = []
    for batch in batches.epoch(40):
        ((devices, each),) = batch.blocks
        assert devices is not None
        assert each == 32
        assert devices.tolist() == sorted(set(devices.tolist()))
        owners = batch.labels.view(32, 10)
        for j, d in enumerate(devices.tolist()):
            images = owners[:, j].tolist()
            assert set(images) <= set(shards[d].tolist())
            assert len(set(images)) == 9
        sets.append(devices.tolist())
    assert [sets[i] == sets[i + 1] for i in range(5)].count(False) == 1


def test_absent_devices_keep_their_batch_statistics() -> None:
    images = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8)
    batches = DeviceBatches(
        images,
        torch.arange(60) % 4,
        np.array_split(np.arange(60), 6),
        global_batch_size=12,
        devices_per_round=3,
        seed=0,
        augment="none",
        device=CPU,
        mean=[0.5],
        std=[0.25],
    )
    layer = DeviceBatchNorm2d(1, 6, momentum=1.0)
    for batch in batches.epoch(0):
        before = layer.running_mean.clone()
        ((devices, each),) = batch.blocks
        output = layer(batch.images, batch.blocks)
        assert devices is not None
        assert each == 4
        absent = [d for d in range(6) if d not in devices.tolist()]
        assert torch.equal(layer.running_mean[absent], before[absent])
        for j, d in enumerate(devices.tolist()):
            own = batch.images[j::3]
            torch.testing.assert_close(layer.running_mean[d], own.mean(dim=(0, 2, 3)))
            alone = torch.nn.functional.batch_norm(own, None, None, training=True)
            torch.testing.assert_close(output[j::3], alone)


def padded_crop(image: Tensor, row: int, column: int, flip: bool, padding: int) -> Tensor:
    """Pad with zeros, crop and mirror one uint8 image [C, H, W], pixel by pixel."""
    _, H, W = image.shape
    result = torch.zeros_like(image)
    for y in range(H):
        for x in range(W):
            from_y, from_x = y + row - padding, x + column - padding
            if 0 <= from_y < H and 0 <= from_x < W:
                result[:, y, W - 1 - x if flip else x] = image[:, from_y, from_x]
    return result


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("augment", "padding"), [("crop-flip", 2), ("crop", 1), ("none", 4)])
def test_augmentation_equals_one_image_at_a_time(
    augment: str, padding: int, channels_last: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (6, 3, 5, 7), dtype=torch.uint8, generator=generator)
    batches = DeviceBatches(
        images,
        torch.arange(6),
        [np.arange(6)],
        global_batch_size=300,
        seed=0,
        augment=augment,
        crop_padding=padding,
        device=CPU,
        channels_last=channels_last,
        mean=MEAN,
        std=STD,
    )
    offsets = range(2 * padding + 1) if augment != "none" else [padding]
    flips = [False, True] if augment == "crop-flip" else [False]
    mean, std = (torch.tensor([255 * v for v in values]).view(3, 1, 1) for values in (MEAN, STD))
    # The crops are random to this test: what it asks is that each result is exactly one of the
    # crops that the reference can make of that image, and that all of them come up.
    expected = {}
    for i in range(6):
        for row in offsets:
            for column in offsets:
                for flip in flips:
                    crop = padded_crop(images[i], row, column, flip, padding)
                    value = (crop.float() - mean) / std
                    expected[i, value.numpy().tobytes()] = (row, column, flip)
    assert len(expected) == 6 * len(offsets) ** 2 * len(flips)

    seen: dict[tuple[int, int, bool], int] = defaultdict(int)
    for epoch in range(2):
        for batch in batches.epoch(epoch):
            assert batch.images.dtype == torch.float32
            assert batch.images.shape == (300, 3, 5, 7)
            layout = torch.channels_last if channels_last else torch.contiguous_format
            assert batch.images.is_contiguous(memory_format=layout)
            for image, label in zip(batch.images, batch.labels.tolist(), strict=True):
                seen[expected[label, image.contiguous().numpy().tobytes()]] += 1
    assert len(seen) == len(offsets) ** 2 * len(flips)
    if augment == "crop-flip":
        assert 250 < sum(count for (_, _, flip), count in seen.items() if flip) < 350


def test_images_and_labels_stay_together() -> None:
    images = torch.arange(30, dtype=torch.uint8).view(30, 1, 1, 1).expand(30, 1, 4, 4)
    batches = DeviceBatches(
        images,
        torch.arange(30),
        [np.arange(0, 20), np.arange(20, 30)],
        global_batch_size=8,
        seed=0,
        augment="none",
        device=CPU,
        mean=[0.0],
        std=[1 / 255],
    )
    for batch in batches.epoch(0):
        assert batch.images[:, 0, 0, 0].round().long().tolist() == batch.labels.tolist()


def test_a_thousand_devices_with_few_images_each() -> None:
    batches, shards = numbered([9] * 1000, 320)
    seen: set[int] = set()
    for batch in batches.epoch(0):
        assert len(batch.blocks) == 1
        seen |= set(batch.labels.tolist())
    assert batches.updates_per_epoch == 28
    assert len(seen) == 28 * 320
    assert len(shards) == 1000


def test_normalise_and_statistics() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2500, 3, 4, 4), dtype=torch.uint8, generator=generator)
    images[:, 2] = 9
    mean, std = channel_statistics(images)
    pixels = images.double() / 255
    np.testing.assert_allclose(mean, pixels.mean(dim=(0, 2, 3)).numpy(), rtol=1e-12)
    np.testing.assert_allclose(
        std[:2], pixels.std(dim=(0, 2, 3), correction=0).numpy()[:2], rtol=1e-12
    )
    assert std[2] == 1 / 255
    plain = normalise(images, mean, std, channels_last=False)
    interleaved = normalise(images, mean, std, channels_last=True)
    assert torch.equal(plain, interleaved)
    assert interleaved.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        plain.std(dim=(0, 2, 3), correction=0), torch.tensor([1.0, 1.0, 0.0]), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(4, 3, 2, 2)}, "images have shape .* they must be uint8"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels have shape \(3,\)"),
        ({"labels": torch.zeros(4)}, r"they must be int64 of shape \(4,\)"),
        ({"shards": []}, "shards is empty"),
        ({"shards": [np.arange(2), np.arange(0)]}, "the shard of device 1 has shape"),
        ({"shards": [np.array([0, 4])]}, "device 0 has indices from 0 to 4.* from 0 to 3"),
        ({"global_batch_size": 0}, "global_batch_size is 0: it must be at least 1"),
        ({"devices_per_round": 0}, "devices_per_round is 0: it must be from 1 to 1"),
        ({"devices_per_round": 2}, "devices_per_round is 2: it must be from 1 to 1"),
        ({"steps_per_round": 0}, "steps_per_round is 0: it must be at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"augment": "mixup"}, "augment is 'mixup': it must be one of 'crop-flip', 'crop', 'none'"),
        ({"crop_padding": -1}, "crop_padding is -1"),
        ({"mean": [0.5]}, "they need 3 numbers each"),
        ({"std": [0.5, 0.5, 0.0]}, "std must be above 0"),
    ],
)
def test_errors_say_what_is_accepted(changes: dict[str, object], message: str) -> None:
    arguments = {
        "images": torch.zeros(4, 3, 2, 2, dtype=torch.uint8),
        "labels": torch.zeros(4, dtype=torch.int64),
        "shards": [np.arange(4)],
        "global_batch_size": 2,
        "seed": 0,
        "device": CPU,
        "mean": MEAN,
        "std": STD,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        DeviceBatches(**arguments)  # type: ignore[arg-type]


def test_negative_epochs_and_empty_statistics_are_refused() -> None:
    batches, _ = numbered([4], 2)
    with pytest.raises(ValueError, match="epoch is -1"):
        batches.epoch(-1)
    with pytest.raises(ValueError, match="there must be at least one"):
        channel_statistics(torch.zeros(0, 3, 2, 2, dtype=torch.uint8))
