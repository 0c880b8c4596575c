"""The definition of every operator in plain PyTorch: slow, short, and what the kernels are checked against."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from ..guard import require_plain


def implementation(stem: str, operator: str) -> Callable[[tuple[Any, ...]], None]:
    """What runs the operator, of its arguments as one tuple."""
    function = getattr(importlib.import_module(f"{__name__}.{stem}"), operator)

    def run(args: tuple[Any, ...]) -> None:
        function(*require_plain(operator, args))

    return run
