"""What a drop-in says of the names that its original has and it has not."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import NoReturn


def refuse(module: str, has: Iterable[str], names: Iterable[str], instead: str) -> Callable[[str], NoReturn]:
    """A module's ``__getattr__``: the module has ``has``; of the original's other ``names`` it says what to do."""
    offered, known = ", ".join(sorted(has)), frozenset(names)

    def __getattr__(name: str) -> NoReturn:
        said = f"{module} has no {name!r}; it has {offered}"
        if name not in known:
            raise AttributeError(said)
        # In `from module import name` Python would drop the text of an AttributeError.
        kind = ImportError if _imports(sys._getframe(1)) else AttributeError
        raise kind(f"{said}. {instead}")

    return __getattr__


def _imports(frame: FrameType) -> bool:
    """Whether a frame is in a ``from ... import``, of a module or, by importlib, of a package."""
    code = frame.f_code
    return code.co_name == "_handle_fromlist" or dis.opname[code.co_code[frame.f_lasti]] == "IMPORT_FROM"
