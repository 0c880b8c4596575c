"""What the library finds around it: its environment variables and what they may be, and paths that are no files."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence

CHOICES = {
    "ATLAS_BACKEND": ("reference", "native", "triton"),
    "ATLAS_ISA": ("baseline", "v3", "v4"),
    "ATLAS_CHECKS": ("0", "1"),
}
#: Read elsewhere: by the build, and by the trainer.
OTHERS = ("ATLAS_CUDA", "ATLAS_CUDA_ARCHS", "ATLAS_DATA", "ATLAS_DEBUG")


def setting(name: str) -> str | None:
    """The value of a variable; None where it is unset or empty.

    Raises ``ValueError`` that names the variable, the value and the choices.
    """
    value = os.environ.get(name) or None
    if value is not None and value not in CHOICES[name]:
        known = CHOICES[name]
        raise ValueError(f"{name}={value!r} is unknown: choose from {', '.join(known)}{did_you_mean(value, known)}")
    return value


def did_you_mean(name: object, known: Sequence[str]) -> str:
    """ "; did you mean 'linf'?" for the error about an unknown name, or nothing where no known one is near."""
    near = difflib.get_close_matches(str(name)[:100].lower(), known, n=1, cutoff=0.3)
    return f"; did you mean {near[0]!r}?" if near else ""


def problems() -> list[str]:
    """What is wrong with the variables as they are set, a line each."""
    found = []
    for name in sorted(n for n in os.environ if n.startswith("ATLAS_")):
        if name in CHOICES:
            try:
                setting(name)
            except ValueError as error:
                found.append(str(error))
        elif name not in OTHERS:
            known = ", ".join((*CHOICES, *OTHERS))
            found.append(f"{name} is no variable of atlas-kernels, which are {known}")
    return found


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether that is a device, a pipe or standard output, which a file must not be renamed over: /dev/null would be
    gone for all."""
    return os.path.exists(path) and (not os.path.isfile(path) or os.path.dirname(path) in ("/dev", "/dev/fd"))
