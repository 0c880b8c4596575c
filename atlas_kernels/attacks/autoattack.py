"""AutoAttack (Croce & Hein 2020, arXiv 2003.01690; l1: 2103.01208): several attacks, each at its published strength."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checks import kind_of, require_float_images, whole
from ..schema import L1, LINF, NORMS
from . import saved
from .apgd import APGD
from .arguments import require_choice, require_count, require_radius
from .ensemble import AutoAttackRecord as AutoAttackRecord
from .ensemble import AutoAttackResult as AutoAttackResult
from .ensemble import Evaluation, Say
from .fab import FAB
from .search import Search
from .square import Square

VERSIONS = ("standard", "plus", "rand", "apgd", "custom")
TARGETS, L1_TARGETS = 9, 5  # classes that APGD-T and FAB-T aim at; APGD-T in the standard version for l1
SAVE_EVERY = 60.0  # seconds


@dataclass(frozen=True)
class AutoAttack:
    """The worst case over several attacks, each run on the samples that still stand.

    Args:
        eps: radius, in the unit of the images, which are in [0, 1].
        norm: "linf", "l2" or "l1".
        version: "standard": APGD on the cross-entropy, APGD on the DLR loss towards 9 other classes, FAB towards 9, and
            Square with 5,000 queries; in l1 with the larger radii first, 5 restarts and 5 classes. "plus": also APGD on
            the DLR loss and FAB without a target, with 5 restarts each. "rand", for networks that draw random numbers:
            APGD on both losses, each gradient the mean of 20. "apgd": the first two of "standard", in a fraction of the
            time. "custom": ``parts``.
        parts: by name, attacks of this eps and norm, run in this order.
        seed: of the noise, which goes by the samples' numbers.

    The DLR loss takes three classes, towards a class four: for three classes the one without a target is run instead,
    for two neither is; a warning and the record say so.

    An adversary counts only if the network in its own precision, without autocast, misclassifies it as it is stored: in
    the images' dtype, with a norm of at most eps and values in [0, 1]. Every sample is checked once more at the end.
    """

    eps: float
    _: KW_ONLY
    norm: str = LINF
    version: str = "standard"
    parts: Mapping[str, Search] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_choice("norm", self.norm, NORMS)
        require_choice("version", self.version, VERSIONS)
        if isinstance(self.eps, Tensor):
            raise TypeError("eps of AutoAttack is one number for all samples: run it once for each radius")
        require_radius("eps", self.eps, **({"clip_min": 0, "clip_max": 1} if self.norm == LINF else {}))
        whole("seed", self.seed, 0, 2**63 - 1)
        if (self.parts is None) == (self.version == "custom"):
            told = (
                'name the attacks, as in parts={"apgd-ce": APGD(8 / 255)}' if self.parts is None else "leave them out"
            )
            raise ValueError(f'parts are for version="custom", got version={self.version!r}: {told}')
        for name, part in (self.parts or {}).items():
            if not isinstance(part, Search):
                raise TypeError(f"parts[{name!r}] must be a Search, such as APGD, got {kind_of(part)}")
            given = part.eps, part.norm, part.clip_min, part.clip_max
            if isinstance(part.eps, Tensor) or given != (self.eps, self.norm, 0, 1):
                raise ValueError(
                    f"parts[{name!r}] must have the ball of AutoAttack, eps={self.eps} and norm={self.norm!r}, and "
                    f"images in [0, 1], got {part}"
                )
        if self.parts is not None and (not self.parts or {"clean", "checks"} & self.parts.keys()):
            raise ValueError(f'parts are {list(self.parts)}: name one attack at least, and none "clean" or "checks"')

    def run(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        ids: Tensor | None = None,
        batch_size: int = 250,
        state_path: str | Path | None = None,
        save_every: float = SAVE_EVERY,
        search_precision: str = "fp32",
        say: Say | None = None,
    ) -> AutoAttackResult:
        """Attack the images x [N, ...] in [0, 1] with the labels y, integers [N]; they may lie on another device than
        the model. It runs in eval mode, and all is left as it was found, the random state too. The network sees the
        images in the memory format of x: on a CPU convolutions are faster in channels_last.

        Args:
            ids: int64[N], the samples' numbers in the noise; default 0 to N - 1. By them a sample's verdict is the same
                in whatever part of a data set, and for every batch_size, but for the rounding of the network.
            batch_size: samples that are attacked together.
            state_path: a file that says where the evaluation stands, written every ``save_every`` seconds; if it is
                there, the evaluation goes on from it, in the middle of an attack. It stays when all is done.
            search_precision: "bf16" lets the attacks run the network in bfloat16; what they find is judged in the
                network's own precision, and what that does not confirm goes on being attacked.
            say: told how it goes, a line each.

        Raises ValueError or TypeError for what makes no sense, before the attacks begin; for a file that is of another
        model, of other data or settings it says what differs.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {kind_of(model)}: put what it does into one")
        require_float_images("x", x)
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"x must be float32 or float64, in which adversaries are stored, got {x.dtype}: x.float()")
        if not len(x):
            raise ValueError("x has no images: give one at least")
        require_count("batch_size", batch_size, 1)
        require_choice("search_precision", search_precision, ("fp32", "bf16"))
        path = None if state_path is None else Path(state_path)
        if path is not None:
            saved.require_writable(path)
        with torch.inference_mode(False):  # what is made here is written to later
            ids = torch.arange(len(x), device=x.device) if ids is None else ids
            return Evaluation(self, model, x, y, ids, batch_size, path, save_every, search_precision, say).run()

    def searches(self, classes: int) -> tuple[dict[str, Search], tuple[str, ...]]:
        """The attacks for a network of so many classes, by name, and what differs from the version as published."""
        if self.parts is not None:
            return dict(self.parts), ()
        made = _VERSIONS[self.version](self)
        changes = []
        if classes < 4 and "apgd-t" in made:
            changes.append(f"no apgd-t, whose DLR loss takes four classes, as the model has {classes}")
            if classes == 3 and "apgd-dlr" not in made:
                changes[-1] += ": apgd-dlr in its place"
                ce = made["apgd-ce"]
                assert isinstance(ce, APGD)
                instead = "apgd-dlr", replace(ce, objective="dlr")
                made = dict(instead if name == "apgd-t" else (name, part) for name, part in made.items())
            made.pop("apgd-t", None)
        if classes < 3 and made.pop("apgd-dlr", None) is not None:
            changes.append(f"no apgd-dlr, whose DLR loss takes three classes, as the model has {classes}")
        return made, tuple(changes)

    def key(self, name: str) -> Tensor:
        """The noise key of a part, so that it finds the same whatever runs before it."""
        return torch.tensor([(self.seed * 0x9E3779B97F4A7C15 + zlib.crc32(name.encode())) % 2**63, 0])


def _standard(of: AutoAttack) -> dict[str, Search]:
    l1 = of.norm == L1
    return {
        "apgd-ce": APGD(of.eps, norm=of.norm, restarts=5 if l1 else 1, large_radii=l1),
        "apgd-t": APGD(
            of.eps, norm=of.norm, objective="dlr_targeted", target_classes=L1_TARGETS if l1 else TARGETS, large_radii=l1
        ),
        "fab-t": FAB(of.eps, norm=of.norm, target_classes=TARGETS),
        "square": Square(of.eps, norm=of.norm, stretched=False),
    }


def _plus(of: AutoAttack) -> dict[str, Search]:
    eps, norm = of.eps, of.norm
    return {
        "apgd-ce": APGD(eps, norm=norm, restarts=5),
        "apgd-dlr": APGD(eps, norm=norm, objective="dlr", restarts=5),
        "fab": FAB(eps, norm=norm, targeted=False, restarts=5),
        "square": Square(eps, norm=norm, stretched=False),
        "apgd-t": APGD(eps, norm=norm, objective="dlr_targeted", target_classes=TARGETS),
        "fab-t": FAB(eps, norm=norm, target_classes=TARGETS),
    }


def _rand(of: AutoAttack) -> dict[str, Search]:
    return {
        "apgd-ce": APGD(of.eps, norm=of.norm, eot_iter=20),
        "apgd-dlr": APGD(of.eps, norm=of.norm, objective="dlr", eot_iter=20),
    }


def _apgd(of: AutoAttack) -> dict[str, Search]:
    return {name: part for name, part in _standard(of).items() if name.startswith("apgd")}


_VERSIONS = {"standard": _standard, "plus": _plus, "rand": _rand, "apgd": _apgd}
