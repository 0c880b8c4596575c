"""In which precision a network runs fast on a device, and a warning, once, of one that costs many times the time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

#: By precision, the instructions of x86 that multiply in it; torch's convolutions use them through oneDNN.
_INSTRUCTIONS = {
    "bf16": {"avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX BF16"},
    "fp16": {"avx512_fp16": "AVX-512 FP16", "amx_fp16": "AMX FP16"},
}
#: What of the rest of a CPU is told, in this order.
_VECTORS = {"avx2": "AVX2", "avx512_f": "AVX-512", "neon": "NEON", "sve": "SVE"}
#: Values of ONEDNN_MAX_CPU_ISA that keep oneDNN from instructions of 16 bits which the CPU has.
_WITHOUT = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}


def taken(precision: str, device: torch.device) -> str:
    """What "auto" comes to on a device: "bf16" where it is known to be faster than "fp32", which it is elsewhere.

    Another precision is what it is.
    """
    return precision if precision != "auto" else "bf16" if is_native("bf16", device) else "fp32"


def is_native(precision: str, device: torch.device) -> bool:
    """Whether the device multiplies in "bf16" or "fp16" faster than in float32.

    CUDA: bf16 from compute capability 8.0 on. CPUs: those of x86 with instructions for it, as long as
    ONEDNN_MAX_CPU_ISA lets them be used. Elsewhere nobody has measured it, and it is False.
    """
    if device.type == "cuda":
        old = torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)
        return precision == "fp16" or not old
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and bool(_products(precision))


@cache
def warn_if_slow(precision: str, device: torch.device) -> None:
    """Warns, once per process, of a precision that is far slower on the device than float32."""
    if precision not in _INSTRUCTIONS or is_native(precision, device):
        return
    remedy = 'fp32 is faster here, and "auto" takes bf16 only where it is known to be faster'
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        warnings.warn(f"{precision} is slow on {name}, which has no instructions for it: {remedy}", stacklevel=2)
    elif device.type == "cpu" and _is_known():
        missing = " or ".join(_INSTRUCTIONS[precision].values())
        warnings.warn(
            f"{precision} is slow on this CPU, which has no instructions for it ({missing}): a network takes "
            f"several times as long as in fp32; {remedy}",
            stacklevel=2,
        )


def cpu_report() -> str:
    """What this CPU has, and which precision of a network that speaks for, in one line."""
    has = [name for flag, name in _VECTORS.items() if _capabilities().get(flag)]
    has += [name for precision in _INSTRUCTIONS for name in _products(precision)]
    limit = f" (ONEDNN_MAX_CPU_ISA={_limit()})" if _limit() else ""
    told = f"{', '.join(has) or 'nothing that torch knows of'}{limit}"
    if is_native("bf16", torch.device("cpu")):
        return f'{told}: bf16 pays here, Execution("bf16") and --train-precision bf16'
    if _is_known():
        return f"{told}: keep to fp32, a network takes several times as long in bf16"
    return f"{told}: keep to fp32 unless you have measured bf16"


def _is_known() -> bool:
    """Whether the CPU is of a kind on which 16 bits without instructions for them were measured, and were slow."""
    return bool(_capabilities().get("avx2"))


def _products(precision: str) -> list[str]:
    """The instructions for products of that precision that torch can use here."""
    has, held_back = _capabilities(), _limit() in _WITHOUT
    return [name for flag, name in _INSTRUCTIONS[precision].items() if has.get(flag) and not held_back]


def _limit() -> str:
    """What oneDNN is told by the environment to use at most."""
    return (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()


@cache
def _capabilities() -> Mapping[str, Any]:
    """What the CPU has, by torch's names."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else _asked_singly()


def _asked_singly() -> dict[str, bool]:
    """The same of x86, for torch 2.10."""
    avx512, amx = torch.cpu._is_avx512_supported(), torch.cpu._is_amx_tile_supported()
    return {
        "avx2": torch.cpu._is_avx2_supported(),
        "avx512_f": avx512,
        "avx512_bw": avx512,
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "avx512_fp16": torch.ops.mkldnn._is_mkldnn_fp16_supported(),
        "amx_bf16": amx,
        "amx_fp16": torch.cpu._is_amx_fp16_supported(),
    }
