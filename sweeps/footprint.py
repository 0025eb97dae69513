"""What memory of its machine a worker takes, counted before there is one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sweeps.assembly import Assembly
from sweeps.config import TrialConfig
from sweeps.machine import PROCESS_BYTES

CUDA_PROCESS_BYTES = 2 * 10**9
"""Memory of the machine that a process takes which uses a GPU, its data aside; assumed."""

COPIES_OF_WEIGHTS = 5
"""Weights, gradients and momentum, and a checkpoint on its way to the disk."""

MUON_COPIES = 4
"""What Muon's step takes beside them while it orthogonalises: of four layers alike, 3.5 copies."""

ACTIVATIONS_SHARE = 2
"""What a step takes at its peak for each byte that the layers keep: gradients of maps, what kernels
take, and holes, as a worker keeps what it frees. Measured: ResNet-18 on 320 and 640 images of 32x32
1.6 in float32 and 2.0 in bfloat16; ResNet-8 on 2,048 of 16x16 2.4 and 2.7, of 0.3 and 0.15 GB."""

COUNTED_IMAGES = 8


def worker_bytes(assembly: Assembly, config: TrialConfig, *, cuda: bool) -> int:
    """Memory that a worker takes of the machine for trials of a config, about, in bytes.

    The process, the data set with what trials make of it, and, on a CPU, the weights with
    their gradients, momentum and checkpoint, and what the layers keep of a batch for the
    backward pass. The last is counted in forward passes of a few images, and grows evenly
    with the batch. 0 where the network cannot be asked.

    Args:
        assembly: of the trials' data set, on a CPU.
        config: with the largest batch.
        cuda: whether the worker trains on a GPU.

    Raises:
        ValueError: if the config asks for what the splits cannot do.
    """
    prepared, source = assembly.prepared(config), assembly.dataset
    resident = sum(
        images.nbytes
        for images in (
            source.train_images, source.test_images, prepared.train_images, *prepared.val_images
        )
    )  # fmt: skip
    if cuda:
        return CUDA_PROCESS_BYTES + resident
    few = prepared.val_images[0][:COUNTED_IMAGES].clone()
    dtype = assembly.autocast_dtype(config)
    try:
        model = assembly.model(config, config.seed)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            kept = saved_bytes(model.eval(), few)
            # What does not grow with the batch, as the product of a weight and Fixup's scale.
            of_batch = saved_bytes(model, torch.cat([few, few])) - kept
    except Exception:  # what is wrong with it, its first trial says
        return 0
    weights = sum(p.nbytes for p in model.parameters())
    copies = 1 if config.algorithm == "sync-sgd" else 1 + config.devices_per_round
    of_each = COPIES_OF_WEIGHTS + (MUON_COPIES if config.optimizer == "muon" else 0)
    trained = of_each * copies * weights
    if config.algorithm == "scaffold":  # control variates, absent devices' too
        trained += 2 * config.num_devices * weights
    activations = kept + of_batch * (config.global_batch_size - len(few)) // len(few)
    return PROCESS_BYTES + resident + trained + ACTIVATIONS_SHARE * activations


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
