"""A lean trainer for adversarial training: ATLAS and its baselines, on the operators of atlas_kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .sharing import load_model as load_model
    from .trainer import Callback as Callback
    from .trainer import Trainer as Trainer

#: What is most used from Python, and where it lies; it is imported when it is asked for.
_LIES_IN = {"load_model": "sharing", "Callback": "trainer", "Trainer": "trainer"}


def __getattr__(name: str) -> Any:
    if name not in _LIES_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LIES_IN[name]}"), name)
