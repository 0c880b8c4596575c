"""Noise keys: the whole random state of an operator is an int64[2] tensor ``(seed, base)`` on its device.

Noise is counter-based (Philox4x32-10): what a pixel draws depends on the seed, its sample's number, its channel and its
place in the channel plane, and on nothing else. So it is recomputed, never stored, and does not change with the batch
size, the position in the batch, the rank, the memory format, the thread count or the backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import whole


def noise_key(device: torch.device | str = "cpu", *, generator: torch.Generator | None = None, base: int = 0) -> Tensor:
    """Draw a fresh noise key: int64 ``[2]`` tensor ``(seed, base)`` on ``device``.

    The seed is one ``torch.randint`` draw from ``generator`` (default: the device's global generator), so
    ``torch.manual_seed`` rules it, CUDA graphs capture it and ``torch.compile`` sees through it. ``base`` is the number
    of the first sample, a 64-bit integer: row ``i`` of a batch draws as sample ``base + i``, of which the low 32 bits
    count. Pass the same key to draw the same noise.
    """
    base = whole("base", base, -(2**63), 2**63 - 1)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device, generator=generator)
    return torch.cat((seed, torch.full_like(seed, base)))
