"""The environment variables that the library reads, and what they may be."""

from __future__ import annotations

import difflib
import os

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
        near = difflib.get_close_matches(value.lower(), CHOICES[name], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}={value!r} is unknown: choose from {', '.join(CHOICES[name])}{hint}")
    return value


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
