"""A network's weights in a file that RobustBench's loader reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..options import plain
from ..writing import write_atomically

#: What its networks call the mean and std of a normalisation.
_NAMES = {"normalize.mean": "mu", "normalize.std": "sigma"}
#: Cut off by the loader from each name that holds one, wherever that stands in it.
_CUT = ("module.", "model.")


def export_state_dict(
    model: nn.Module, path: Path, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> None:
    """{"state_dict": tensors by name}, on the CPU, which torch.load reads with weights_only. Mean and std, those of the
    network or those given, are called mu and sigma, as in the networks there.

    Raises ValueError for a name that the loader would cut.
    """
    entries = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    weights = {_NAMES.get(name, name): value.detach().to("cpu", copy=True) for name, value in entries.items()}
    if mean is not None and std is not None:
        weights |= {name: torch.tensor(v).view(1, -1, 1, 1) for name, v in (("mu", mean), ("sigma", std))}
    if cut := next((name for name in weights if any(part in name for part in _CUT)), None):
        raise ValueError(
            f"{plain(cut)} of the network holds {' or '.join(_CUT)}, which RobustBench's loader cuts off: export the "
            "inner network, or rename its module"
        )
    write_atomically(path, lambda temporary: torch.save({"state_dict": weights}, temporary))
