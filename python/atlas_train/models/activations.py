"""The activations that our networks can have."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]
#: ReLU is the published one of every network here. Smooth ones, whose gradient has no jump, gain robustness (Xie et al.
#: 2020, arXiv 2006.14536): SiLU, also called Swish (Gowal et al. 2020, arXiv 2010.03593), and GELU (Hendrycks & Gimpel
#: 2016, arXiv 1606.08415).
ACTIVATIONS: dict[str, Activation] = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}
