"""The share of a training step's time that its attack takes, by looks at where the training thread is."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import FrameType

import torch

import atlas_kernels.attacks

from . import methods

_METHODS, _ATTACKS = (str(Path(str(package.__file__)).parent) for package in (methods, atlas_kernels.attacks))
#: What methods call the part of a step that makes adversaries.
_MAKES_ADVERSARIES = ("prepare", "_attacked")
#: Fewer looks say nothing.
_LEAST = 40


class AttackShare:
    """Looks at the thread that made it twenty times a second, from another one: a look takes some microseconds, and
    training itself does nothing for it. On CUDA, where the host runs ahead of the device, nothing is known."""

    every = 0.05

    def __init__(self) -> None:
        self._watched = threading.get_ident()
        self._ended = threading.Event()
        self._looks = self._in_attack = 0
        self._thread = threading.Thread(target=self._watch, name="atlas-attack-share", daemon=True)

    def start(self) -> AttackShare:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def share(self) -> float | None:
        """Of the time in training steps; None before enough looks, on CUDA, and where there is no attack of its own: a
        method that trains by the passes of its attack has none."""
        share = self._in_attack / max(1, self._looks)
        return None if self._looks < _LEAST or share < 0.01 or torch.cuda.is_initialized() else share

    def _watch(self) -> None:
        while not self._ended.wait(self.every):
            where = part_of(sys._current_frames().get(self._watched))
            self._looks += where is not None
            self._in_attack += where == "attack"


def part_of(frame: FrameType | None) -> str | None:
    """What a thread does whose innermost frame this is: the "attack" of a training step, the "rest" of one, or None."""
    attacks = in_step = False
    while frame is not None:
        code = frame.f_code
        own = code.co_filename.startswith(_METHODS)
        in_step |= own
        attacks |= code.co_filename.startswith(_ATTACKS) or (own and code.co_name in _MAKES_ADVERSARIES)
        frame = frame.f_back
    return ("attack" if attacks else "rest") if in_step else None
