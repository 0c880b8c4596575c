"""What a method remembers (``State.memory``): put back after a step that is not to count, kept out of best.pt, and
asked for its room. Of what has a row for each training image (``Method.stores``) a step touches the rows of its batch
alone; these are copied, never the whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .methods import Batch, Method, State


def put_back_later(method: Method, memory: dict[str, Tensor], ids: Tensor) -> Callable[[], None]:
    """Gives what puts the memory back as it is now, after a ``train_step`` on the images ``ids``: in the tensors that
    hold it now, so that graphs of a step stay valid."""
    rows = {name: value[ids] for name, value in memory.items() if name in method.stores}
    before = {name: (value, rows[name] if name in rows else value.clone()) for name, value in memory.items()}

    def put_back() -> None:
        memory.clear()
        with torch.no_grad():
            for name, (value, kept) in before.items():
                if name in rows:
                    value[ids] = kept
                else:
                    value.copy_(kept)
                memory[name] = value

    return put_back


@contextmanager
def unchanged(method: Method, memory: dict[str, Tensor], ids: Tensor) -> Iterator[None]:
    """The memory is afterwards as before, but for what ``before_step`` does."""
    put_back = put_back_later(method, memory, ids)
    try:
        yield
    finally:
        put_back()


def set_apart(method: Method, state: State, batch: Batch) -> tuple[State, Batch]:
    """State and batch for steps, ``before_step`` too, of which nothing lasts: with a memory of their own, in which the
    images of the batch are all that there are."""
    if not method.stores:
        return replace(state, memory={name: value.clone() for name, value in state.memory.items()}), batch
    memory = {
        name: value[batch.ids] if name in method.stores else value.clone() for name, value in state.memory.items()
    }
    numbers = torch.arange(len(batch.ids), device=batch.ids.device)
    return replace(state, memory=memory, size=len(numbers)), Batch(batch.x, batch.y, numbers)


def without_stores(method: Method, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What best.pt keeps of the memory: nothing that has a row for each image."""
    return {name: value for name, value in memory.items() if name not in method.stores}


def begins_anew(method: Method, memory: Mapping[str, Tensor]) -> str:
    """That a checkpoint had none of the method's stores, in words; or nothing."""
    lost = [name for name in method.stores if name not in memory]
    return f"{' and '.join(lost)} of the images begin anew, as the checkpoint does not hold them" if lost else ""


def require_room(method: Method, shape: Sequence[int], device: torch.device) -> str:
    """What the method keeps for the training images [N, C, H, W], in words, or nothing. Raises ValueError if that is
    more than the device has free."""
    needed = method.store_bytes(shape)
    if not needed:
        return ""
    size = f"{method.name} keeps {_gigabytes(needed)} on {device}: {' and '.join(method.stores)} of {shape[0]:,} images"
    if (free := _free(device)) is not None and needed > free:
        raise ValueError(
            f"{size}; {_gigabytes(free)} are free there: take half by {method.name}.store='bfloat16', fewer images "
            "(train_size), or another method"
        )
    return size


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def _free(device: torch.device) -> int | None:
    """Bytes of memory that nobody uses; None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # no Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
