"""Which code runs an operator.

CPU tensors: the native CPU kernels. CUDA tensors: the native CUDA kernels where they were built, else Triton. Any other
device, and an operator that Triton lacks: the plain PyTorch reference, with one warning. ``with backend("triton")`` or
the environment variable ``ATLAS_BACKEND`` force one; a forced backend that is missing raises and says why and what to
do.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

from ..core import plain_check
from ..environment import CHOICES, did_you_mean, setting
from ..schema import NAMESPACE, OPERATORS, arguments_of, define, require_given
from ..transforms import kernel_under_transforms, refuse_derivatives
from . import native as native
from .guard import require_plain

BACKENDS = CHOICES["ATLAS_BACKEND"]

_forced: ContextVar[str | None] = ContextVar("atlas_backend", default=None)


class BackendUnavailable(RuntimeError):
    """A backend was asked for that cannot run here; the message says why and what to do."""


def _known(name: str) -> str:
    if name not in BACKENDS:
        hint = did_you_mean(name, BACKENDS)
        raise ValueError(f"backend {name!r} is unknown: choose from {', '.join(BACKENDS)}{hint}")
    return name


@cache
def _from_environment() -> str | None:
    # Not at import, which would end in a traceback of its own, the doctor's too.
    return setting("ATLAS_BACKEND")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every operator inside the ``with`` block on the backend ``name``: "reference", "native" or "triton".

    Raises ``ValueError`` for an unknown name, and ``BackendUnavailable`` at the operator's call if the backend cannot
    run on the tensors' device.
    """
    token = _forced.set(_known(name))
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """The backend that is asked for here, or None where each device has its own."""
    return _forced.get() or _from_environment()


def unavailable_reason(name: str, device_type: str) -> str | None:
    """Why backend ``name`` cannot run on tensors of ``device_type`` ("cpu", "cuda"), or None if it can."""
    if _known(name) == "reference":
        return None
    module = importlib.import_module(f"{__name__}.{name}")
    reason: str | None = module.unavailable_reason(device_type)
    return reason


def default_for(device_type: str) -> str:
    """The backend that runs tensors of ``device_type`` when none is forced."""
    if device_type == "cpu":
        return "native"
    if device_type == "cuda":
        return "native" if unavailable_reason("native", "cuda") is None else "triton"
    return "reference"


def _choose(forced: str | None, stem: str, device_type: str) -> ModuleType:
    name = forced or default_for(device_type)
    known = name == "native" or importlib.util.find_spec(f"{__name__}.{name}.{stem}") is not None
    if forced and not known:
        raise BackendUnavailable(
            f'the {name} backend has no {stem} kernels: use backend("native") or backend("reference")'
        )
    name = name if known else "reference"
    reason = unavailable_reason(name, device_type)
    if reason is not None:
        raise BackendUnavailable(f"the {name} backend cannot run on {device_type} tensors: {reason}")
    if name == "reference" and forced is None:
        kernels = "kernels" if known else f"{stem} kernels"
        warnings.warn(f"no {kernels} for device {device_type!r}: using the plain PyTorch reference", stacklevel=4)
    if name == "triton" and device_type == "cpu":
        _warn_of_interpreter()
    return importlib.import_module(f"{__name__}.{name}")


@cache
def _warn_of_interpreter() -> None:
    warnings.warn(
        "Triton's interpreter runs the operators, far slower than the native kernels do: it is for "
        'tests; leave out ATLAS_BACKEND, or use backend("native")',
        stacklevel=5,
    )


def _differentiable(name: str) -> dict[int, str]:
    """The arguments by which the result may have a derivative; the gradient that a step goes along is a constant."""
    tensors = {i: a for i, a in enumerate(arguments_of(name)) if a.is_tensor and not a.written}
    return {i: a.name for i, a in tensors.items() if a.name != "grad"}


def _implementation(stem: str, name: str) -> Callable[[tuple[Any, ...]], None]:
    written = [i for i, argument in enumerate(arguments_of(name)) if argument.written]
    differentiable, bump_version = _differentiable(name), torch.autograd.graph.increment_version

    def run(args: tuple[Any, ...]) -> None:
        if forward_ad._current_level >= 0:
            by = {argument: args[i] for i, argument in differentiable.items()}
            refuse_derivatives(f"{NAMESPACE}::{name}", by, tangents_only=True)
        if args[0] is None:
            require_given(name, args)
        here = name, forced_backend(), args[0].device
        function = chosen.get(here)
        if function is None:
            require_plain(name, args)  # whether a backend is there is asked last
            function = chosen[here] = _choose(here[1], stem, here[2].type).implementation(stem, name)
        function(args)
        for i in written:
            out = args[i]
            if out is not None and not out.is_inference():
                bump_version(out)

    return run


# (operator, forced backend, device) -> what runs it
chosen: dict[tuple[str, str | None, torch.device], Callable[[tuple[Any, ...]], None]] = {}
_functorch_level = torch._C._functorch.maybe_current_level
_library = torch.library.Library(NAMESPACE, "DEF")  # the operators live as long as this does
_implementations: dict[str, Callable[[tuple[Any, ...]], None]] = {}


def _register() -> None:
    """Define every operator of the schema table and its implementations."""
    define(_library)
    for stem, operators in OPERATORS.items():
        for name in operators:
            _implementations[name] = run = _implementation(stem, name)
            for key in ("CPU", "CUDA", "CompositeExplicitAutograd"):
                _library.impl(name, lambda *args, run=run: run(args), key)
            transformed = kernel_under_transforms(f"{NAMESPACE}::{name}", _operator(name), _differentiable(name))
            _library.impl(name, transformed, "FuncTorchDynamicLayerFrontMode")


def _operator(name: str) -> Callable[..., None]:
    operator: Callable[..., None] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return operator


def caller(name: str) -> Callable[..., None]:
    """The operator ``name`` for a public function: through PyTorch's dispatcher where somebody listens there (tracing,
    dispatch modes, tensor subclasses), else straight to the implementation, which saves 3 us a call."""
    operator = _operator(name)
    implementation = _implementations[name]
    compiling, modes, level = torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack, _functorch_level
    plain: Callable[[tuple[Any, ...]], bool] | None = None

    def call(*args: Any) -> None:
        nonlocal plain
        if compiling() or modes() or level() is not None:
            operator(*args)
            return
        if plain is None:  # not at import, see _from_environment
            plain = plain_check()
        if plain(args):
            implementation(args)
        else:
            operator(*args)

    return call


_register()  # whoever imports this package finds the operators defined, in whatever order modules are imported
