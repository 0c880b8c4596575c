"""The logits in what a network returns: alone, or with more in an object, a dict or a tuple."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

#: Images to logits, or to what ``logits_of`` finds them in.
Model = Callable[[Tensor], Any]

_told: set[tuple[type, int]] = set()


def require_rows_of_logits(logits: Tensor, x: Tensor) -> None:
    """Raises TypeError unless the logits are [B, classes], those of the B images ``x``."""
    if logits.ndim != 2 or len(logits) != len(x):
        raise TypeError(
            f"model must return logits [{len(x)}, classes], got shape {list(logits.shape)}: put the network into a "
            "torch.nn.Module whose forward returns them"
        )


def predicted(logits: Tensor) -> Tensor:
    """The classes of the largest logits, int64 [B]; -1, which is none, for a row with NaN, which says nothing."""
    largest, classes = logits.max(1)
    return classes.masked_fill(largest.isnan(), -1)


def logits_of(output: Any) -> Tensor:
    """``output`` itself if it is a tensor; else its ``.logits``, its item "logits" or, with a warning, the first of a
    tuple or list. Raises TypeError for anything else."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    elif logits is None and isinstance(output, (tuple, list)) and output:
        logits = output[0]
        kind = type(output), len(output)
        if isinstance(logits, Tensor) and kind not in _told:
            _told.add(kind)
            warnings.warn(
                f"the model returns a {kind[0].__name__} of {kind[1]}: its first is taken as the logits", stacklevel=3
            )
    if isinstance(logits, Tensor):
        return logits
    keys = f" with the keys {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
    raise TypeError(
        "model must return logits [B, classes], an object with .logits, a dict with 'logits', or a tuple in which they "
        f"are first, got a {type(output).__name__}{keys}: put the network into a torch.nn.Module whose forward returns "
        "its logits"
    )
