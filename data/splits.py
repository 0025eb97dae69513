"""Divide training images over simulated devices: IID, or skewed in classes or in quantity.

Every function is pure: labels and a seed in, one int64 index array per device out. Each index
appears on exactly one device, but for those of a slice that all devices share, which appear on
every one. Arrays are sorted, and no global random state is read or changed.

Sources:

- a few classes per device: Hsieh et al., "The Non-IID Data Quagmire of Decentralized Machine
  Learning", ICML 2020 (arXiv 1910.00189), section 3. Which classes go together is not fixed
  there; `ASSIGNMENTS` names the two choices offered here.
- Dirichlet: Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated
  Visual Classification", 2019 (arXiv 1909.06335), section 3, in the form of Yurochkin et al.,
  "Bayesian Nonparametric Federated Learning of Neural Networks", ICML 2019 (arXiv 1905.12022),
  section 4: proportions over devices are drawn per class, so device sizes differ.
- quantity: Li et al., "Federated Learning on Non-IID Data Silos: An Experimental Study", ICDE
  2022 (arXiv 2102.02079), section IV, "quantity skew".
- shared images: Zhao et al., "Federated Learning with Non-IID Data", 2018 (arXiv 1806.00582),
  section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

SPLITS = ("iid", "classes", "dirichlet", "quantity")
ASSIGNMENTS = ("pairs", "ring")

DIRICHLET_ATTEMPTS = 100

_TOLERANCE = 1e-5  # images; well above the solver's 1e-7, well below 1 / (number of devices)

Indices = NDArray[np.int64]

# One stream per scheme, so that equal seeds do not make two schemes share their shuffles.
_STREAM_IID, _STREAM_CLASSES, _STREAM_DIRICHLET, _STREAM_QUANTITY, _STREAM_SHARED = range(5)


def iid(labels: ArrayLike, num_devices: int, *, seed: int) -> list[Indices]:
    """Deal the shuffled images out to the devices, whatever their class.

    Args:
        labels: integer class of each image, shape [N]. Only N matters.
        num_devices: D, from 1 to N.
        seed: non-negative integer.

    Returns:
        D sorted int64 arrays of sizes equal to within one.

    Raises:
        ValueError: labels, num_devices or seed is outside what is accepted.
    """
    classes = _check(labels, num_devices, seed)
    order = np.random.default_rng((seed, _STREAM_IID)).permutation(len(classes))
    return [np.sort(part).astype(np.int64) for part in np.array_split(order, num_devices)]


def classes_per_device(
    labels: ArrayLike,
    num_devices: int,
    *,
    classes_per_device: int,
    assignment: str,
    seed: int,
) -> list[Indices]:
    """Give every device images of k classes only.

    With C classes in the labels, numbered in sorted order, device d holds

    - "pairs": classes (d*k + j) mod C for j < k. D*k must be a multiple of C. Where k divides C,
      the class sets of two devices are equal or disjoint.
    - "ring": classes d, d+1, ..., d+k-1 (mod C), so neighbours share k-1 classes. Every class
      needs a holder: D >= C - k + 1.

    The images of a class are divided evenly among its holders, then as few as possible are moved
    so that devices connected by shared classes have sizes equal to within one. Where no division
    achieves that, sizes are as equal as the classes allow: the largest is as small as possible,
    then the next largest, and so on. A device keeps images of each of its k classes unless a
    class has fewer images than holders.

    Args:
        labels: integer class of each image, shape [N].
        num_devices: D, from 1 to N.
        classes_per_device: k, from 1 to C.
        assignment: one of `ASSIGNMENTS`.
        seed: non-negative integer; decides which images of a class go where.

    Returns:
        D sorted int64 arrays.

    Raises:
        ValueError: an argument is outside what is accepted, or classes would be left out.
    """
    values = _check(labels, num_devices, seed)
    names, ranks = np.unique(values, return_inverse=True)
    num_classes, k = len(names), classes_per_device
    if not 1 <= k <= num_classes:
        raise ValueError(
            f"classes_per_device is {k}: it must be from 1 to {num_classes}, "
            "the number of classes in the labels"
        )
    if assignment not in ASSIGNMENTS:
        raise ValueError(f"assignment is {assignment!r}: it must be one of {_listed(ASSIGNMENTS)}")
    if assignment == "pairs" and num_devices * k % num_classes:
        raise ValueError(_pairs_refused(num_devices, k, num_classes))
    if assignment == "ring" and num_devices + k - 1 < num_classes:
        raise ValueError(
            f"num_devices is {num_devices} with classes_per_device {k}: with assignment 'ring' "
            f"the {num_classes} classes need at least {num_classes - k + 1} devices "
            "for each class to have one"
        )

    first = np.arange(num_devices) * (k if assignment == "pairs" else 1)
    held = np.zeros((num_devices, num_classes), dtype=np.bool_)
    np.put_along_axis(held, (first[:, None] + np.arange(k)) % num_classes, True, axis=1)
    class_sizes = np.bincount(ranks, minlength=num_classes).astype(np.int64)
    return _deal_classes(
        ranks,
        _balanced_counts(class_sizes, held),
        np.random.default_rng((seed, _STREAM_CLASSES)),
    )


def dirichlet(
    labels: ArrayLike,
    num_devices: int,
    *,
    alpha: float,
    min_images_per_device: int = 10,
    seed: int,
) -> list[Indices]:
    """Draw each class's proportions over the devices from a symmetric Dirichlet distribution.

    A small alpha concentrates a class on few devices, a large one approaches IID. Draws that
    leave a device with too few images are repeated, at most `DIRICHLET_ATTEMPTS` times.

    Args:
        labels: integer class of each image, shape [N].
        num_devices: D, from 1 to N.
        alpha: concentration, above 0. Hsu et al. use 0.05 to 100.
        min_images_per_device: smallest number of images accepted on a device, at least 1.
        seed: non-negative integer.

    Returns:
        D sorted int64 arrays of at least min_images_per_device indices each.

    Raises:
        ValueError: an argument is outside what is accepted, or no draw satisfied the minimum.
    """
    values = _check(labels, num_devices, seed)
    _check_draws(len(values), num_devices, alpha, min_images_per_device)
    names, ranks = np.unique(values, return_inverse=True)
    class_sizes = np.bincount(ranks, minlength=len(names)).astype(np.int64)
    fewest = -1
    for attempt in range(DIRICHLET_ATTEMPTS):
        rng = np.random.default_rng((seed, _STREAM_DIRICHLET, attempt))
        shares = rng.dirichlet(np.full(num_devices, alpha), size=len(names))  # [C, D]
        cuts = np.rint(np.cumsum(shares, axis=1) * class_sizes[:, None]).astype(np.int64)
        cuts[:, -1] = class_sizes  # the shares add up to 1 only up to rounding
        counts = np.diff(cuts, axis=1, prepend=0).T  # [D, C]
        smallest = int(counts.sum(axis=1).min())
        if smallest >= min_images_per_device:
            return _deal_classes(ranks, counts, rng)
        fewest = max(fewest, smallest)
    raise ValueError(_draws_failed(num_devices, alpha, min_images_per_device, fewest))


def quantity(
    labels: ArrayLike,
    num_devices: int,
    *,
    alpha: float,
    min_images_per_device: int = 10,
    seed: int,
) -> list[Indices]:
    """Draw the devices' sizes from a symmetric Dirichlet distribution; deal whatever the class.

    Every device's images are a uniform sample: devices differ in how many they hold, and in
    classes only by chance. Draws that leave a device with too few are repeated, at most
    `DIRICHLET_ATTEMPTS` times.

    Args:
        labels: integer class of each image, shape [N]. Only N matters.
        num_devices: D, from 1 to N.
        alpha: concentration, above 0; a small one makes sizes more unequal. Li et al. use 0.5.
        min_images_per_device: smallest number of images accepted on a device, at least 1.
        seed: non-negative integer.

    Returns:
        D sorted int64 arrays of at least min_images_per_device indices each.

    Raises:
        ValueError: an argument is outside what is accepted, or no draw satisfied the minimum.
    """
    values = _check(labels, num_devices, seed)
    _check_draws(len(values), num_devices, alpha, min_images_per_device)
    fewest = -1
    for attempt in range(DIRICHLET_ATTEMPTS):
        rng = np.random.default_rng((seed, _STREAM_QUANTITY, attempt))
        shares = rng.dirichlet(np.full(num_devices, alpha))
        # The last cut is not taken from the shares, which add up to 1 only up to rounding.
        cuts = np.rint(np.cumsum(shares[:-1]) * len(values)).astype(np.int64)
        smallest = int(np.diff(cuts, prepend=0, append=len(values)).min())
        if smallest >= min_images_per_device:
            order = rng.permutation(len(values)).astype(np.int64)
            return [np.sort(part) for part in np.split(order, cuts)]
        fewest = max(fewest, smallest)
    raise ValueError(_draws_failed(num_devices, alpha, min_images_per_device, fewest))


def shared_slice(labels: ArrayLike, num_images: int, *, seed: int) -> Indices:
    """Sample images that every device is to hold, as many of each class as of any other.

    Numbers per class are equal to within one, the first classes having one more. A class that is
    too small for that gives all of its images but one, so that no class is left without a device
    of its own, and the others make up for it.

    Args:
        labels: integer class of each image, shape [N], of C classes.
        num_images: from 0 to N - C.
        seed: non-negative integer.

    Returns:
        num_images sorted indices.

    Raises:
        ValueError: an argument is outside what is accepted.
    """
    values = _check(labels, 1, seed)
    _, ranks = np.unique(values, return_inverse=True)
    spare = np.bincount(ranks).astype(np.int64) - 1
    if not 0 <= num_images <= spare.sum():
        raise ValueError(
            f"shared_images is {num_images}: it must be from 0 to {spare.sum()}, since of the "
            f"{len(values)} training images one of each of the {len(spare)} classes must be left "
            "to a device"
        )
    counts = np.zeros_like(spare)
    missing = num_images
    while missing:
        open_classes = np.flatnonzero(counts < spare)
        each = missing // len(open_classes)
        if each == 0:
            counts[open_classes[:missing]] += 1
            break
        added = np.minimum(each, (spare - counts)[open_classes])
        counts[open_classes] += added
        missing -= int(added.sum())
    rng = np.random.default_rng((seed, _STREAM_SHARED))
    parts = [rng.permutation(np.flatnonzero(ranks == c))[:n] for c, n in enumerate(counts)]
    return np.sort(np.concatenate(parts)).astype(np.int64)


def split_devices(
    scheme: str,
    labels: ArrayLike,
    num_devices: int,
    *,
    seed: int,
    classes_per_device: int = 2,
    assignment: str = "pairs",
    alpha: float = 0.5,
    min_images_per_device: int = 10,
    shared_images: int = 0,
) -> list[Indices]:
    """Split by the scheme's name, one of `SPLITS`; arguments of other schemes are ignored.

    With shared_images, `shared_slice` sets that many images aside first, the scheme divides the
    others, and then every device gets those set aside beside its own. The scheme's promises,
    min_images_per_device among them, are about a device's own images.

    Zhao et al. go about it otherwise in three ways: their shared images come from a part of the
    training set that no client ever has, so that more of them take nothing from the clients; each
    client gets a random portion of them; and a model trained on them is where federated training
    starts. Here all devices get all of them, and training starts as without.

    Returns:
        D sorted int64 arrays without repeats; see `iid`, `classes_per_device`, `dirichlet` and
        `quantity`. Two devices have the shared images in common and no others.

    Raises:
        ValueError: scheme is unknown, the scheme rejects its arguments, or shared_images leaves
            too few images to divide.
    """
    sizes: dict[str, Any] = {"alpha": alpha, "min_images_per_device": min_images_per_device}
    schemes: dict[str, Callable[..., list[Indices]]] = {
        "iid": iid,
        "classes": partial(
            _split_by_classes, classes_per_device=classes_per_device, assignment=assignment
        ),
        "dirichlet": partial(dirichlet, **sizes),
        "quantity": partial(quantity, **sizes),
    }
    if scheme not in schemes:
        raise ValueError(f"split is {scheme!r}: it must be one of {_listed(SPLITS)}")
    divide = schemes[scheme]
    if not shared_images:
        return divide(labels, num_devices, seed=seed)
    values = _check(labels, num_devices, seed)
    shared = shared_slice(values, shared_images, seed=seed)
    others = np.delete(np.arange(len(values)), shared)
    if num_devices > len(others):
        raise ValueError(
            f"shared_images is {shared_images}: of {len(values)} training images it leaves "
            f"{len(others)} for {num_devices} devices to hold one each, so it must be at most "
            f"{len(values) - num_devices}"
        )
    try:
        own = divide(values[others], num_devices, seed=seed)
    except ValueError as error:
        if scheme == "classes":
            raise  # speaks of classes alone, and none has gone
        raise ValueError(
            f"{error} (of {len(values)} training images, shared_images = {shared_images} are "
            "set aside)"
        ) from error
    return [np.sort(np.concatenate([others[shard], shared])) for shard in own]


_split_by_classes = classes_per_device  # split_devices has a parameter of that name


def _check(labels: ArrayLike, num_devices: int, seed: int) -> NDArray[np.int64]:
    """Return the labels as an int64 array, or raise ValueError."""
    values = np.asarray(labels)
    if values.ndim != 1 or values.size == 0 or values.dtype.kind not in "iu":
        raise ValueError(
            f"labels have shape {values.shape} and dtype {values.dtype}: "
            "they must be a non-empty list of integers"
        )
    if not 1 <= num_devices <= len(values):
        raise ValueError(
            f"num_devices is {num_devices}: it must be from 1 to {len(values)}, "
            "the number of images"
        )
    if seed < 0:
        raise ValueError(f"seed is {seed}: it must be 0 or more")
    return values.astype(np.int64)


def _check_draws(
    num_images: int, num_devices: int, alpha: float, min_images_per_device: int
) -> None:
    """Check what `dirichlet` and `quantity` draw with, or raise ValueError."""
    if not (alpha > 0 and np.isfinite(alpha)):
        raise ValueError(f"alpha is {alpha}: it must be a finite number above 0")
    if min_images_per_device < 1:
        raise ValueError(f"min_images_per_device is {min_images_per_device}: it must be at least 1")
    if num_devices * min_images_per_device > num_images:
        raise ValueError(
            f"min_images_per_device is {min_images_per_device}: {num_devices} devices would need "
            f"{num_devices * min_images_per_device} images and there are {num_images}, "
            "so lower it or num_devices"
        )


def _draws_failed(num_devices: int, alpha: float, min_images_per_device: int, fewest: int) -> str:
    lower = "min_images_per_device or " if min_images_per_device > 1 else ""
    return (
        f"min_images_per_device is {min_images_per_device}: in {DIRICHLET_ATTEMPTS} draws with "
        f"alpha {alpha} over {num_devices} devices the smallest device never had more than "
        f"{fewest} images, so lower {lower}num_devices, or raise alpha"
    )


def _pairs_refused(num_devices: int, k: int, num_classes: int) -> str:
    """Say which neighbouring choices "pairs" takes, those that exist."""
    ways = []
    step = num_classes // math.gcd(num_classes, num_devices)
    for_devices = [str(accepted) for accepted in range(step, num_classes + 1, step)]
    if len(for_devices) > 4:
        for_devices[3:-1] = ["..."]
    ways.append(f"for {num_devices} devices, classes_per_device {', '.join(for_devices)}")
    step = num_classes // math.gcd(num_classes, k)
    ways.append(f"for {k} classes a device, num_devices {step}, {2 * step}, {3 * step}, ...")
    if num_devices + k - 1 >= num_classes:
        ways.append("or assignment 'ring'")
    return (
        f"num_devices x classes_per_device is {num_devices} x {k} = {num_devices * k}: with "
        f"assignment 'pairs' it must be a multiple of the {num_classes} classes; accepted: "
        + "; ".join(ways)
    )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in names)


def _deal_classes(
    ranks: NDArray[np.intp], counts: NDArray[np.int64], rng: np.random.Generator
) -> list[Indices]:
    """Hand counts[d, c] shuffled images of class c to device d."""
    owner = np.empty(len(ranks), dtype=np.int64)
    devices = np.arange(len(counts))
    for c in range(counts.shape[1]):
        members = rng.permutation(np.flatnonzero(ranks == c))
        owner[members] = np.repeat(devices, counts[:, c])
    by_device = np.argsort(owner, kind="stable").astype(np.int64)
    return np.split(by_device, np.cumsum(counts.sum(axis=1))[:-1])


def _balanced_counts(class_sizes: NDArray[np.int64], held: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Number of images of each class on each device, [D, C], sizes as equal as possible.

    Args:
        class_sizes: images per class, [C].
        held: which device holds which class, [D, C].
    """
    even = _even_counts(class_sizes, held)
    sizes = even.sum(axis=1)
    if np.ptp(sizes) <= 1:
        return even
    component = _components(held)
    if all(np.ptp(sizes[component == i]) <= 1 for i in range(component.max() + 1)):
        return even

    # Devices with the same classes are interchangeable, and there are at most C kinds of them:
    # the transport problem is solved for kinds, then each kind's share is dealt to its devices.
    kinds, kind_of = np.unique(held, axis=0, return_inverse=True)  # [K, C], [D]
    kind_of = kind_of.reshape(-1)
    devices_of = np.bincount(kind_of)
    base = np.stack([even[kind_of == i].sum(axis=0) for i in range(len(kinds))])
    enough = class_sizes >= held.sum(axis=0)
    lowest = np.where(kinds & enough, devices_of[:, None], 0)

    mean = np.empty(len(kinds))
    for i in range(len(kinds)):
        peers = component == component[kind_of == i][0]
        mean[i] = sizes[peers].sum() / peers.sum()
    moved = _fewest_moves(base, kinds, lowest, devices_of, mean)
    if moved is None:
        fairest = _fairest_sizes(class_sizes, kinds, lowest, devices_of)
        moved = _fewest_moves(base, kinds, lowest, devices_of, fairest)
    if moved is None:
        return even

    counts = np.zeros_like(even)
    for i in range(len(kinds)):
        members = np.flatnonzero(kind_of == i)
        turn = 0
        for c in np.flatnonzero(kinds[i]):
            each, extra = divmod(int(moved[i, c]), len(members))
            counts[members, c] = each
            # Extras continue where the class before stopped, as cards are dealt.
            counts[members[(turn + np.arange(extra)) % len(members)], c] += 1
            turn += extra
    return counts


def _even_counts(class_sizes: NDArray[np.int64], held: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Divide every class evenly; images left over go to the devices shortest so far."""
    counts = np.zeros(held.shape, dtype=np.int64)
    surplus = np.zeros(len(held))
    for c, size in enumerate(class_sizes.tolist()):
        holders = np.flatnonzero(held[:, c])
        each, extra = divmod(size, len(holders))
        counts[holders, c] = each
        shortest = holders[np.argsort(surplus[holders].round(6), kind="stable")[:extra]]
        counts[shortest, c] += 1
        surplus[holders] -= extra / len(holders)
        surplus[shortest] += 1
    return counts


def _components(held: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Number the groups of devices connected by shared classes, one number per device."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    num_devices, num_classes = held.shape
    device, c = np.nonzero(held)
    nodes = num_devices + num_classes
    graph = csr_matrix((np.ones(len(device)), (device, num_devices + c)), shape=(nodes, nodes))
    numbers: NDArray[np.int64] = connected_components(graph, directed=False)[1][:num_devices]
    return numbers


def _fewest_moves(
    base: NDArray[np.int64],
    kinds: NDArray[np.bool_],
    lowest: NDArray[np.int64],
    devices_of: NDArray[np.intp],
    size: NDArray[np.float64],
) -> NDArray[np.int64] | None:
    """Change base, [K, C], as little as possible so that every device has about its given size.

    A kind's images may number from floor(size) to ceil(size) per device. This is a transport
    problem, whose constraint matrix is totally unimodular: the vertex that the simplex method
    ends on is integral.

    Returns:
        Images per kind and class, or None where the sizes cannot be had.
    """
    from scipy.optimize import linprog

    kind, c = np.nonzero(kinds)
    per_kind, per_class = _incidence(kinds)
    low = devices_of * np.floor(size + _TOLERANCE) - base.sum(axis=1)
    high = devices_of * np.ceil(size - _TOLERANCE) - base.sum(axis=1)
    # Variables: images added to an edge, then images taken from an edge.
    result = linprog(
        np.ones(2 * len(kind)),
        A_ub=np.block([[per_kind, -per_kind], [-per_kind, per_kind]]),
        b_ub=np.concatenate([high, -low]),
        A_eq=np.hstack([per_class, -per_class]),
        b_eq=np.zeros(len(per_class)),
        bounds=[(0, None)] * len(kind) + [(0, most) for most in (base - lowest)[kind, c].tolist()],
        method="highs-ds",
    )
    if result.status != 0:
        return None
    moved = base.copy()
    moved[kind, c] += np.rint(result.x[: len(kind)] - result.x[len(kind) :]).astype(np.int64)
    return moved


def _fairest_sizes(
    class_sizes: NDArray[np.int64],
    kinds: NDArray[np.bool_],
    lowest: NDArray[np.int64],
    devices_of: NDArray[np.intp],
) -> NDArray[np.float64]:
    """Fractional device sizes per kind, [K], whose largest is least, then the next, and so on.

    Each linear program lowers the largest size of the kinds still open; a kind whose constraint
    has a non-zero dual is at that size in every solution and is closed. At least one closes each
    time, so there are at most K programs.
    """
    from scipy.optimize import linprog

    kind, c = np.nonzero(kinds)
    per_kind, per_class = _incidence(kinds)
    cost = np.append(np.zeros(len(kind)), 1.0)
    bounds = [(least, None) for least in lowest[kind, c].tolist()] + [(0, None)]
    size = np.full(len(kinds), np.nan)
    while np.isnan(size).any():
        is_open = np.isnan(size)
        result = linprog(
            cost,
            A_ub=np.hstack([per_kind, -np.where(is_open, devices_of, 0)[:, None]]),
            b_ub=np.where(is_open, 0.0, devices_of * np.nan_to_num(size)),
            A_eq=np.hstack([per_class, np.zeros((len(per_class), 1))]),
            b_eq=class_sizes,
            bounds=bounds,
            method="highs-ds",
        )
        if result.status != 0:
            raise RuntimeError(f"no fair division of the classes was found: {result.message}")
        tight = is_open & (result.ineqlin.marginals < -1e-9)
        size[tight if tight.any() else is_open] = result.x[-1]
    return size


def _incidence(kinds: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Matrices that sum edge values per kind, [K, E], and per class, [C, E]."""
    kind, c = np.nonzero(kinds)
    per_kind = (np.arange(len(kinds))[:, None] == kind).astype(np.float64)
    per_class = (np.arange(kinds.shape[1])[:, None] == c).astype(np.float64)
    return per_kind, per_class
