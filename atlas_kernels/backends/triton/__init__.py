"""The Triton kernels: for CUDA (or ROCm) tensors where there is no native CUDA library, and for tests on any machine.

Triton is imported only once this backend is asked for. ``Launch`` and ``compile_ahead`` compile what an operator would
launch without running it, so that every kernel is built and inspected on machines without a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...schema import FIXED, arguments_of
from .. import BackendUnavailable
from ..door import plan_of, require_declared
from ..guard import require_plain

TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.float16: "*fp16", torch.bfloat16: "*bf16",
         torch.int64: "*i64", torch.bool: "*i1"}  # fmt: skip
# Contraction would change bits: a product and a sum are rounded one after the other, as in every backend.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


class Launch(NamedTuple):
    """One kernel, how many programs of it, and its arguments in order (None: absent)."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]


def unavailable_reason(device_type: str) -> str | None:
    """Why Triton cannot run on ``device_type``, or None if it can."""
    if device_type not in ("cpu", "cuda"):
        return f"there are Triton kernels for cuda (and for cpu in Triton's interpreter), not for {device_type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; run `pip install triton` (Linux)"
    try:
        import triton
        import triton.language
    except (ImportError, OSError) as error:
        return f"Triton cannot be imported ({error}); run `pip install --force-reinstall triton`"
    # TRITON_INTERPRET counts as it was when Triton was imported: its own functions were decorated then.
    if not isinstance(triton.language.philox, triton.JITFunction):
        return None
    if device_type == "cpu":
        return (
            "Triton compiles for GPUs only and runs CPU tensors in its interpreter, which is slow and meant for tests: "
            'start Python with TRITON_INTERPRET=1, or use backend("native")'
        )
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device; install a driver and a CUDA (or ROCm) build of PyTorch"
    return None


def bound(kernel: Any, programs: int, values: dict[str, Any]) -> Launch:
    """A launch with the arguments that the kernel has, by their names in lower case; None for what has no value."""
    return Launch(kernel, programs, tuple(values.get(name.lower()) for name in kernel.arg_names))


def require_single(what: str, t: Tensor) -> None:
    """Triton computes in 32 bits."""
    if t.dtype == torch.float64:
        raise BackendUnavailable(
            f"the triton backend computes float32, float16 and bfloat16 {what}, got float64: convert them with "
            '.float(), or use backend("native") or backend("reference")'
        )


def implementation(stem: str, operator: str) -> Callable[[tuple[Any, ...]], None]:
    """What runs the operator, of its arguments as one tuple: what its stem's ``launches`` makes of them."""
    launches = importlib.import_module(f"{__name__}.{stem}").launches
    declared, fields = plan_of(stem, operator, workspace=False), [a.field for a in arguments_of(operator)]

    def run(args: tuple[Any, ...]) -> None:
        args = require_plain(operator, args)
        require_declared(operator, args, declared.check(args, True))
        given = dict(zip(fields, args, strict=True), **FIXED.get(operator, {}))
        for what in launches(operator, given):
            launch(what, args[0].device)

    return run


def launch(what: Launch, device: torch.device) -> None:
    """Run it on the current stream of ``device``."""
    kernel = what.kernel[(what.programs,)]
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel(*what.arguments, **OPTIONS)
        return
    with torch.cuda.device(device):
        kernel(*what.arguments, **OPTIONS)


def compile_ahead(what: Launch, capability: int) -> Any:
    """The compiled kernel (``.asm["ptx"]``, ``.asm["cubin"]``) that ``what`` would run on compute ``capability`` (90 is
    9.0). The arguments are specialised as at a launch: tensors may lie on the meta device, and count as aligned."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(what.kernel.params, what.arguments, strict=True)):
        kind = _type_of(value, parameter)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(i,)] = value
        elif not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment) and (
            kind[0] == "*" or (kind[0] == "i" and value % 16 == 0)
        ):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(what.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(OPTIONS))


def _type_of(value: Any, parameter: Any) -> str:
    if parameter.is_constexpr or value is None:
        return "constexpr"
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value == 1 and not parameter.do_not_specialize:
        return "constexpr"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
