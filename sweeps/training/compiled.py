"""A network's training pass, compiled once for each shape and reused from trial to trial.

`torch.compile` keeps what it compiled with the network's code, not with one network: a trial whose
network has the same structure, and whose batches the same shape, dtype and layout, finds it there,
whatever its weights, rates and seed. Only the forward pass and its gradient are compiled. What
settings change, as the loss with its smoothing, clipping and the optimizer, stays outside.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sweeps.training.gpu_errors import gpu_is_full

logger = logging.getLogger(__name__)

SHAPES = 64
"""Compiled passes that a process keeps for one network's code; PyTorch's own limit of 8 would
leave the ninth shape of a search uncompiled."""


_refused: set[tuple[type[nn.Module], str]] = set()
"""Networks that a backend could not compile, in this process."""


class CompiledNetwork:
    """Calls a network as it is called, `network(images, blocks)`, in training.

    The first call compiles, which may take a minute, and tries both directions. Where that fails
    (no compiler, an operation that it does not know) one line is logged and the network is called
    as it is from then on.

    Args:
        network: in training mode; its weights and buffers are shared, not copied.
        backend: of `torch.compile`.
    """

    def __init__(self, network: nn.Module, *, backend: str = "inductor") -> None:
        self._network = network
        self._backend = backend
        self._pass: Callable[..., Tensor] | None = None

    def __call__(self, images: Tensor, blocks: Any) -> Tensor:
        """Logits of a batch, as of `network(images, blocks)`."""
        if self._pass is None:
            self._pass = self._tried(images, blocks)
        return self._pass(images, blocks)

    def _tried(self, images: Tensor, blocks: Any) -> Callable[..., Tensor]:
        network = self._network
        what = (type(network), self._backend)
        if what in _refused:
            return network
        statistics = {name: buffer.clone() for name, buffer in network.named_buffers()}
        try:
            _prepare_compiler()
            compiled = torch.compile(network, dynamic=False, backend=self._backend)
            # The gradient is compiled when it is first asked for.
            compiled(images, blocks).sum().backward()
        except Exception as error:
            inner: BaseException = getattr(error, "inner_exception", error)
            cause = error.__cause__ or inner
            if isinstance(cause, torch.OutOfMemoryError) or gpu_is_full(cause):
                raise cause from None  # The caller's matter; it says nothing of the network.
            lines = str(cause).strip().splitlines() or [type(cause).__name__]
            logger.warning("the network is not compiled (%s); it trains uncompiled", lines[0])
            _refused.add(what)
            return network
        finally:
            for parameter in network.parameters():
                parameter.grad = None
            with torch.no_grad():
                for name, buffer in network.named_buffers():
                    buffer.copy_(statistics[name])
            gc.collect()  # what was compiled first holds its network in a cycle
        return compiled


def _prepare_compiler() -> None:
    """Have the same network compiled to the same kernels each time, by as many threads as asked."""
    import torch._dynamo
    import torch._inductor.config as inductor

    torch._dynamo.config.recompile_limit = SHAPES
    inductor.compile_threads = torch.get_num_threads()  # each worker has a share of the cores
    if hasattr(inductor, "deterministic"):  # else the fastest kernel of a race is taken
        inductor.deterministic = True
