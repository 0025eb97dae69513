"""Splits: every image where it should be, and the sizes and classes that were asked for."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow

from data import splits

seeds = st.integers(0, 2**32)
class_sizes = st.lists(st.integers(1, 60), min_size=1, max_size=8)


def labels_of(sizes: Sequence[int]) -> NDArray[np.int64]:
    """Shuffled labels with sizes[c] images of class c."""
    labels = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
    return np.random.default_rng(0).permutation(labels)


def counts(labels: NDArray[np.int64], shards: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Images of each class on each device, [D, C]."""
    num_classes = int(labels.max()) + 1
    return np.stack([np.bincount(labels[shard], minlength=num_classes) for shard in shards])


def assert_partition(shards: list[NDArray[np.int64]], num_images: int) -> None:
    assert all(shard.dtype == np.int64 for shard in shards)
    assert all((np.diff(shard) > 0).all() for shard in shards)
    np.testing.assert_array_equal(np.sort(np.concatenate(shards)), np.arange(num_images))


def assert_same(a: list[NDArray[np.int64]], b: list[NDArray[np.int64]]) -> None:
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left, right)


@given(sizes=class_sizes, share=st.floats(0, 1), seed=seeds)
def test_iid_is_a_partition_into_equal_sizes(sizes: list[int], share: float, seed: int) -> None:
    labels = labels_of(sizes)
    num_devices = max(1, round(share * len(labels)))
    shards = splits.iid(labels, num_devices, seed=seed)
    assert len(shards) == num_devices
    assert_partition(shards, len(labels))
    assert np.ptp([len(shard) for shard in shards]) <= 1
    assert_same(shards, splits.iid(labels, num_devices, seed=seed))


@st.composite
def class_splits(draw: st.DrawFn) -> tuple[NDArray[np.int64], int, int, str]:
    sizes = draw(class_sizes)
    assignment = draw(st.sampled_from(splits.ASSIGNMENTS))
    k = draw(st.integers(1, len(sizes)))
    if assignment == "pairs":
        step = len(sizes) // np.gcd(k, len(sizes))
        num_devices = int(step * draw(st.integers(1, 4)))
    else:
        num_devices = draw(st.integers(len(sizes) - k + 1, len(sizes) * 3))
    labels = labels_of([size + num_devices for size in sizes])
    return labels, num_devices, k, assignment


@settings(deadline=None)
@given(case=class_splits(), seed=seeds)
def test_devices_hold_exactly_their_classes(
    case: tuple[NDArray[np.int64], int, int, str], seed: int
) -> None:
    labels, num_devices, k, assignment = case
    shards = splits.classes_per_device(
        labels, num_devices, classes_per_device=k, assignment=assignment, seed=seed
    )
    assert len(shards) == num_devices
    assert_partition(shards, len(labels))
    num_classes = int(labels.max()) + 1
    step = k if assignment == "pairs" else 1
    held = [{int(c) for c in labels[shard]} for shard in shards]
    assert held == [{(d * step + j) % num_classes for j in range(k)} for d in range(num_devices)]
    if assignment == "pairs" and num_classes % k == 0:
        assert all(a == b or not a & b for a in held for b in held)


def equal_sizes_exist(sizes: NDArray[np.int64], held: NDArray[np.bool_]) -> bool:
    """Whether integers exist with one image per held class and device sizes equal to within one.

    By two maximum flows: sizes of at most the mean rounded up, and at least rounded down.
    """
    num_devices, num_classes = held.shape
    after = sizes - held.sum(axis=0)
    reserved = held.sum(axis=1)
    mean, extra = divmod(int(sizes.sum()), num_devices)
    high = mean + (extra > 0) - reserved
    low = mean - reserved
    if (low < 0).any():
        return False

    def flow(caps: NDArray[np.int64]) -> int:
        size = num_devices + num_classes + 2
        graph = np.zeros((size, size), dtype=np.int32)
        graph[0, 1 : num_classes + 1] = after
        graph[1 : num_classes + 1, num_classes + 1 : -1] = held.T * int(sizes.sum())
        graph[num_classes + 1 : -1, -1] = caps
        return int(maximum_flow(csr_matrix(graph), 0, size - 1).flow_value)

    return flow(high) == after.sum() and flow(low) == low.sum()


@settings(deadline=None, max_examples=200)
@given(sizes=st.lists(st.integers(12, 200), min_size=3, max_size=7), data=st.data())
def test_ring_sizes_are_equal_whenever_possible(sizes: list[int], data: st.DataObject) -> None:
    C = len(sizes)
    k = data.draw(st.integers(2, C - 1))
    D = data.draw(st.integers(C - k + 1, 12))
    shards = splits.classes_per_device(
        labels_of(sizes), D, classes_per_device=k, assignment="ring", seed=0
    )
    held = np.zeros((D, C), dtype=np.bool_)
    for d in range(D):
        held[d, (d + np.arange(k)) % C] = True
    if equal_sizes_exist(np.array(sizes), held):
        assert np.ptp([len(shard) for shard in shards]) <= 1


@pytest.mark.parametrize("num_classes", [10, 100])
@pytest.mark.parametrize("num_devices", [100, 1000])
def test_many_devices_share_equal_classes_equally(num_classes: int, num_devices: int) -> None:
    labels = labels_of([40_000 // num_classes] * num_classes)
    for assignment in splits.ASSIGNMENTS:
        shards = splits.classes_per_device(
            labels, num_devices, classes_per_device=2, assignment=assignment, seed=0
        )
        held = counts(labels, shards)
        assert np.ptp(held.sum(axis=1)) <= 1
        assert np.ptp(held[held > 0]) <= 1


def test_images_move_only_to_level_the_sizes() -> None:
    # An even split, 5 + 2 images on devices 0 and 2 and 2 + 2 on device 1, needs two moves.
    labels = labels_of([10, 4, 4])
    shards = splits.classes_per_device(labels, 3, classes_per_device=2, assignment="ring", seed=1)
    np.testing.assert_array_equal(counts(labels, shards), [[5, 1, 0], [0, 3, 3], [5, 0, 1]])


def test_a_class_too_big_to_level_leaves_sizes_as_equal_as_possible() -> None:
    labels = labels_of([100, 4, 4])
    shards = splits.classes_per_device(labels, 3, classes_per_device=2, assignment="ring", seed=1)
    np.testing.assert_array_equal(counts(labels, shards), [[50, 1, 0], [0, 3, 3], [50, 0, 1]])


def test_sizes_are_level_above_a_device_that_cannot_keep_up() -> None:
    labels = labels_of([300, 300, 10, 50])
    shards = splits.classes_per_device(labels, 4, classes_per_device=2, assignment="ring", seed=1)
    held = counts(labels, shards)
    # All that device 2 can have is classes 2 and 3 but for the one image left to each of its
    # neighbours; the others share the remaining 660 - 58.
    np.testing.assert_array_equal(held[2], [0, 0, 9, 49])
    assert sorted(held.sum(axis=1)) == [58, 200, 201, 201]


def test_ring_with_fewer_images_than_holders_still_divides_all() -> None:
    labels = labels_of([2, 50, 50])
    shards = splits.classes_per_device(labels, 9, classes_per_device=2, assignment="ring", seed=0)
    assert_partition(shards, len(labels))
    assert np.ptp([len(shard) for shard in shards]) <= 1


@pytest.mark.parametrize("assignment", splits.ASSIGNMENTS)
def test_real_digits_divide_evenly_despite_unequal_classes(assignment: str) -> None:
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    labels = sklearn_datasets.load_digits().target
    assert np.ptp(np.bincount(labels)) > 1
    shards = splits.classes_per_device(
        labels, 10, classes_per_device=2, assignment=assignment, seed=3
    )
    assert_partition(shards, len(labels))
    sizes = np.array([len(shard) for shard in shards])
    if assignment == "ring":
        assert np.ptp(sizes) <= 1
    else:
        assert all(abs(sizes[d] - sizes[d + 5]) <= 1 for d in range(5))


def test_classes_need_not_be_numbered_from_zero() -> None:
    labels = np.array([7, 3, 7, 3, 20, 20, 41, 41])
    shards = splits.classes_per_device(labels, 2, classes_per_device=2, assignment="pairs", seed=0)
    assert [sorted(set(labels[shard].tolist())) for shard in shards] == [[3, 7], [20, 41]]


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(20, 80), min_size=1, max_size=8),
    num_devices=st.integers(1, 5),
    alpha=st.floats(0.5, 1000),
    seed=seeds,
)
def test_dirichlet_is_a_partition_with_a_minimum(
    sizes: list[int], num_devices: int, alpha: float, seed: int
) -> None:
    labels = labels_of(sizes)
    shards = splits.dirichlet(labels, num_devices, alpha=alpha, min_images_per_device=2, seed=seed)
    assert len(shards) == num_devices
    assert_partition(shards, len(labels))
    assert min(len(shard) for shard in shards) >= 2
    assert_same(
        shards,
        splits.dirichlet(labels, num_devices, alpha=alpha, min_images_per_device=2, seed=seed),
    )


def test_alpha_sets_how_unequal_the_classes_are() -> None:
    labels = labels_of([500] * 10)

    def mean_share_of_largest_class(alpha: float) -> float:
        held = counts(labels, splits.dirichlet(labels, 10, alpha=alpha, seed=0))
        return float((held.max(axis=1) / held.sum(axis=1)).mean())

    skewed, middle, even = (mean_share_of_largest_class(alpha) for alpha in (0.1, 1.0, 1000.0))
    assert skewed > 0.5 > middle > even
    assert even < 0.15


def test_dirichlet_gives_up_with_advice() -> None:
    with pytest.raises(ValueError, match=r"min_images_per_device is 90: in 100 draws .* or raise"):
        splits.dirichlet(labels_of([100] * 10), 10, alpha=0.05, min_images_per_device=90, seed=0)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(20, 80), min_size=1, max_size=8),
    num_devices=st.integers(1, 5),
    alpha=st.floats(1, 1e6),
    seed=seeds,
)
def test_quantity_is_a_partition_with_a_minimum(
    sizes: list[int], num_devices: int, alpha: float, seed: int
) -> None:
    labels = labels_of(sizes)
    shards = splits.quantity(labels, num_devices, alpha=alpha, min_images_per_device=1, seed=seed)
    assert len(shards) == num_devices
    assert_partition(shards, len(labels))
    assert_same(
        shards,
        splits.quantity(labels, num_devices, alpha=alpha, min_images_per_device=1, seed=seed),
    )


def test_quantity_sizes_follow_the_dirichlet_distribution() -> None:
    # A symmetric Dirichlet's share has the variance (1/D)(1 - 1/D) / (D alpha + 1).
    labels = labels_of([2000] * 5)
    for alpha in (0.5, 5.0):
        shares = [
            len(shard) / len(labels)
            for seed in range(400)
            for shard in splits.quantity(labels, 5, alpha=alpha, min_images_per_device=1, seed=seed)
        ]
        assert np.var(shares) == pytest.approx(0.2 * 0.8 / (5 * alpha + 1), rel=0.1)


def test_quantity_skews_sizes_and_not_classes() -> None:
    labels = labels_of([3000] * 10)
    shards = splits.quantity(labels, 10, alpha=0.5, min_images_per_device=300, seed=0)
    held = counts(labels, shards)
    total = held.sum(axis=1)
    assert total.max() > 4 * total.min() >= 4 * 300
    expected = total / 10
    assert (abs(held - expected[:, None]) < 5 * np.sqrt(expected)[:, None]).all()


def test_quantity_gives_a_thousand_devices_their_minimum() -> None:
    labels = labels_of([4500] * 10)
    shards = splits.quantity(labels, 1000, alpha=10.0, min_images_per_device=10, seed=0)
    assert_partition(shards, len(labels))
    assert min(len(shard) for shard in shards) >= 10
    with pytest.raises(ValueError, match=r"is 10: in 100 draws with alpha 0.5 .* raise alpha"):
        splits.quantity(labels, 1000, alpha=0.5, min_images_per_device=10, seed=0)
    with pytest.raises(ValueError, match=r"images, so lower num_devices, or raise alpha"):
        splits.quantity(labels, 1000, alpha=0.1, min_images_per_device=1, seed=0)


@settings(deadline=None)
@given(sizes=class_sizes, share=st.floats(0, 1), seed=seeds)
def test_shared_slice_is_balanced_as_far_as_classes_go(
    sizes: list[int], share: float, seed: int
) -> None:
    labels = labels_of(sizes)
    num_images = int(share * (len(labels) - len(sizes)))
    shared = splits.shared_slice(labels, num_images, seed=seed)
    assert shared.dtype == np.int64
    assert len(shared) == num_images
    assert (np.diff(shared) > 0).all()
    held = np.bincount(labels[shared], minlength=len(sizes))
    spare = np.array(sizes) - 1
    assert (held <= spare).all()
    # A class has fewer than the largest, but for the one that is left over, only if it is empty.
    assert (held[held < spare] >= held.max() - 1).all()
    np.testing.assert_array_equal(shared, splits.shared_slice(labels, num_images, seed=seed))


def test_shared_slice_takes_equally_many_of_each_class() -> None:
    labels = labels_of([100] * 10)
    shared = splits.shared_slice(labels, 200, seed=0)
    assert np.bincount(labels[shared]).tolist() == [20] * 10
    assert not np.array_equal(shared, splits.shared_slice(labels, 200, seed=1))
    shared = splits.shared_slice(labels, 203, seed=0)
    assert np.bincount(labels[shared]).tolist() == [21] * 3 + [20] * 7
    labels = labels_of([3, 100, 1, 100])
    shared = splits.shared_slice(labels, 22, seed=0)
    assert np.bincount(labels[shared], minlength=4).tolist() == [2, 10, 0, 10]


@pytest.mark.parametrize("scheme", splits.SPLITS)
def test_shared_images_are_everyones_and_the_others_one_devices(scheme: str) -> None:
    labels = labels_of([60, 50, 40, 50])
    shards = splits.split_devices(
        scheme, labels, 4, seed=3, min_images_per_device=2, shared_images=20
    )
    shared = splits.shared_slice(labels, 20, seed=3)
    assert all(shard.dtype == np.int64 for shard in shards)
    assert all((np.diff(shard) > 0).all() for shard in shards)
    assert all(np.isin(shared, shard).all() for shard in shards)
    own = [np.setdiff1d(shard, shared) for shard in shards]
    assert min(len(shard) for shard in own) >= 2
    np.testing.assert_array_equal(np.sort(np.concatenate([*own, shared])), np.arange(len(labels)))
    if scheme == "classes":
        assert [sorted(set(labels[shard].tolist())) for shard in own] == [[0, 1], [2, 3]] * 2
    assert_same(
        splits.split_devices(scheme, labels, 4, seed=3, min_images_per_device=2),
        splits.split_devices(scheme, labels, 4, seed=3, min_images_per_device=2, shared_images=0),
    )


def test_pairs_name_the_choices_that_would_do() -> None:
    def message(num_devices: int, k: int, num_classes: int) -> str:
        with pytest.raises(ValueError, match="num_devices x classes_per_device is") as caught:
            splits.split_devices(
                "classes", labels_of([50] * num_classes), num_devices, seed=0, classes_per_device=k
            )
        return str(caught.value)

    found = message(10, 2, 100)
    assert "is 10 x 2 = 20: with assignment 'pairs' it must be a multiple of the 100" in found
    assert "for 10 devices, classes_per_device 10, 20, 30, ..., 100;" in found
    assert "for 2 classes a device, num_devices 50, 100, 150, ..." in found
    assert "ring" not in found
    found = message(9, 2, 10)
    assert "for 9 devices, classes_per_device 10;" in found
    assert "num_devices 5, 10, 15, ...; or assignment 'ring'" in found
    for k in (10, 20, 100):
        shards = splits.split_devices(
            "classes", labels_of([50] * 100), 10, seed=0, classes_per_device=k
        )
        assert [len(shard) for shard in shards] == [500] * 10


def test_seeds_change_the_images_and_leave_global_state_alone() -> None:
    labels = labels_of([50] * 4)
    before = np.random.get_state()[1].tobytes()
    for scheme in splits.SPLITS:
        a, b = (splits.split_devices(scheme, labels, 4, seed=seed) for seed in (0, 1))
        assert any(not np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert np.random.get_state()[1].tobytes() == before


def test_split_devices_passes_its_arguments_on() -> None:
    labels = labels_of([50] * 4)
    assert_same(
        splits.split_devices("iid", labels, 4, seed=5),
        splits.iid(labels, 4, seed=5),
    )
    assert_same(
        splits.split_devices("classes", labels, 4, seed=5, classes_per_device=3, assignment="ring"),
        splits.classes_per_device(labels, 4, classes_per_device=3, assignment="ring", seed=5),
    )
    assert_same(
        splits.split_devices("dirichlet", labels, 4, seed=5, alpha=2.0, min_images_per_device=20),
        splits.dirichlet(labels, 4, alpha=2.0, min_images_per_device=20, seed=5),
    )
    assert_same(
        splits.split_devices("quantity", labels, 4, seed=5, alpha=2.0, min_images_per_device=20),
        splits.quantity(labels, 4, alpha=2.0, min_images_per_device=20, seed=5),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "random"}, r"split is 'random': it must be one of 'iid', 'classes', 'dir"),
        ({"num_devices": 0}, r"num_devices is 0: it must be from 1 to 40"),
        ({"num_devices": 41}, r"num_devices is 41: it must be from 1 to 40"),
        ({"seed": -1}, r"seed is -1: it must be 0 or more"),
        ({"labels": []}, r"labels have shape \(0,\)"),
        ({"labels": [0.5, 1.5]}, r"labels have shape \(2,\) and dtype float64"),
        ({"labels": [[0, 1]]}, r"labels have shape \(1, 2\)"),
        ({"classes_per_device": 0}, r"classes_per_device is 0: it must be from 1 to 4"),
        ({"classes_per_device": 5}, r"classes_per_device is 5: it must be from 1 to 4"),
        ({"assignment": "triples"}, r"assignment is 'triples': it must be one of 'pairs', 'ring'"),
        ({"num_devices": 5}, r"5 x 2 = 10: with assignment 'pairs' .* multiple of the 4 classes"),
        ({"num_devices": 2, "assignment": "ring"}, r"num_devices is 2 .* at least 3 devices"),
        ({"scheme": "dirichlet", "alpha": 0.0}, r"alpha is 0.0: it must be .* above 0"),
        ({"scheme": "dirichlet", "alpha": float("nan")}, r"alpha is nan"),
        ({"scheme": "dirichlet", "min_images_per_device": 0}, r"min_images_per_device is 0"),
        (
            {"scheme": "dirichlet", "min_images_per_device": 11},
            r"4 devices would need 44 images and there are 40",
        ),
        ({"scheme": "quantity", "alpha": 0.0}, r"alpha is 0.0: it must be .* above 0"),
        ({"scheme": "quantity", "min_images_per_device": 0}, r"min_images_per_device is 0"),
        (
            {"scheme": "quantity", "min_images_per_device": 11},
            r"4 devices would need 44 images and there are 40",
        ),
        ({"shared_images": -1}, r"shared_images is -1: it must be from 0 to 36"),
        ({"shared_images": 37}, r"shared_images is 37: it must be from 0 to 36, .* 4 classes"),
        (
            {"shared_images": 36, "num_devices": 8},
            r"shared_images is 36: of 40 .* leaves 4 for 8 devices .* at most 32",
        ),
        (
            {"scheme": "dirichlet", "shared_images": 20, "min_images_per_device": 6},
            r"would need 24 images and there are 20.*\(of 40 .* shared_images = 20 are set aside",
        ),
    ],
)
def test_errors_say_what_is_accepted(arguments: dict[str, object], message: str) -> None:
    given_arguments = {
        "scheme": "classes",
        "labels": labels_of([10] * 4),
        "num_devices": 4,
        "seed": 0,
        **arguments,
    }
    with pytest.raises(ValueError, match=message):
        splits.split_devices(**given_arguments)  # type: ignore[arg-type]
