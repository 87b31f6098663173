"""Two measures that make a CPU faster; `python -m benchmarks.cpu` measures each against doing
without it.

Not needed to follow the course.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD = -1  # options of glibc's mallopt, from malloc.h
M_MMAP_MAX = -4
MOST_UNPACKED = 150_000_000  # parameters: an unpacked copy is full size


def keep_memory() -> bool:
    """On Linux, let glibc keep freed blocks. Returns whether it took effect.

    Training on a CPU otherwise hands its large tensors back to the kernel at every step and has
    each page zeroed again: a third of the time of a tiny model.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False  # another system or another libc
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def unpack_once(model: torch.nn.Module) -> int:
    """On a CPU, let 4-bit layers keep their unpacked weights for generation; returns how many
    layers do.

    bitsandbytes unpacks them anew for each token, which is most of a token's time, and frozen
    weights come out the same each time. Passes with gradient go through bitsandbytes as ever. A
    model above MOST_UNPACKED parameters stays as it is.
    """
    import bitsandbytes as bnb
    import torch

    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    size = sum(layer.in_features * layer.out_features for layer in layers)
    if torch.cuda.is_available() or size > MOST_UNPACKED:
        return 0
    for layer in layers:
        layer.forward = _Unpacked(layer)
    return len(layers)


class _Unpacked:
    """The forward pass of a 4-bit layer; without gradient it multiplies by weights that it unpacked
    once."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.packed = layer.forward
        self.weights: dict[torch.dtype, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        import torch
        from bitsandbytes.functional import dequantize_4bit

        if torch.is_grad_enabled():
            return self.packed(x)
        if x.dtype not in self.weights:
            packed = self.layer.weight
            self.weights[x.dtype] = dequantize_4bit(packed.data, packed.quant_state).to(x.dtype)
        return torch.nn.functional.linear(x, self.weights[x.dtype], self.layer.bias)
