"""AutoAttack (Croce & Hein 2020) on the images of a run, by ``atlas_kernels.attacks.AutoAttack``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from atlas_kernels.attacks import AutoAttack, AutoAttackRecord, run_sharded
from atlas_kernels.attacks.processes import alone, together
from atlas_kernels.attacks.progress import counted

from .data import Split
from .inference import device_of, eval_mode
from .options import Norm, radius
from .robustness.named import AUTOATTACK, PARTS, Named
from .robustness.outcome import Outcome
from .robustness.samples import SUBSET_SEED, Samples, gathered

Version = Literal["standard", "apgd", "plus", "rand"]
Precision = Literal["fp32", "bf16"]
Say = Callable[[str], None]
MANY = 10  # classes, of which every part can be had
#: What an outcome or its report says by other names.
_OUTSIDE = ("norm", "eps", "seed", "accuracy", "seconds", "largest_norm", "least", "most", "nan_logits")


@dataclass(frozen=True)
class AutoAttacked:
    """Accuracy in [0, 1] over ``images`` test images under AutoAttack: each counts only if every attack fails.

    instead: what differs from ``version`` where there are too few classes for it.
    """

    accuracy: float
    images: int
    version: str
    seconds: float
    seed: int = 0
    instead: str | None = None


def autoattack(
    model: nn.Module,
    images: Split,
    eps: float,
    size: int,
    *,
    norm: Norm = "linf",
    version: Version = "standard",
    batch_size: int = 250,
    seed: int = 0,
    search_precision: Precision = "fp32",
    state: str | os.PathLike[str] | None = None,
    say: Say | None = None,
    dealt: bool = False,
) -> AutoAttacked:
    """AutoAttack in the ball of ``norm`` (arXiv 2003.01690, l1: 2103.01208) on ``size`` images, the model in eval mode.

    version: standard (APGD-CE, APGD-T, FAB-T, Square), apgd, the first two alone in a fraction of the time, plus or
    rand. size: a stratified draw of so many images, the one that ``evaluate`` makes of that size. search_precision,
    state: as ``search_precision`` and ``state_path`` of ``AutoAttack.run``. All of the model, and the random state, are
    as before afterwards.

    The targeted DLR loss of APGD-T takes four classes: for three the untargeted one is run instead, for two neither;
    a warning says so. Raises ValueError for a model of one class.

    dealt: all processes of ``torch.distributed`` make this call and share the images (``run_sharded``); each gets the
    result.
    """
    images = images.subset(size, SUBSET_SEED) if size < len(images) else images
    if say:
        say(f"AutoAttack ({version}) on {counted(len(images), 'image')} at eps {radius(eps, norm)}")
    attack = AutoAttack(eps, norm=norm, version=version, seed=seed)
    how = {"batch_size": batch_size, "search_precision": search_precision, "state_path": state}
    with together() if dealt else alone() as processes:
        correct, record = _run(attack, model, gathered(images), say=None if processes.rank else say, **how)
    accuracy = correct.double().mean().item()
    return AutoAttacked(accuracy, len(images), version, record.seconds, seed, _joined(record.instead))


def verdicts(
    model: nn.Module,
    images: Split,
    eps: float,
    *,
    norm: Norm = "linf",
    version: Version = "standard",
    batch_size: int = 250,
    seed: int = 0,
    search_precision: Precision = "fp32",
) -> tuple[Tensor, str | None]:
    """As ``autoattack``, on all images: whether each is right whatever the attacks do, bool [N] on the model's device;
    and what stands in for a part of ``version`` that cannot be had."""
    attack = AutoAttack(eps, norm=norm, version=version, seed=seed)
    how: dict[str, Any] = {"batch_size": batch_size, "search_precision": search_precision}
    with alone():
        correct, record = _run(attack, model, gathered(images), **how)
    return correct, _joined(record.instead)


def outcome(
    model: nn.Module,
    samples: Samples,
    attack: Named,
    eps: float,
    norm: Norm,
    seed: int,
    say: Say,
    *,
    version: Version,
    **how: Any,
) -> Outcome:
    """What AutoAttack, or a part of it, leaves; ``how``: of ``AutoAttack.run``. Its warnings about the network are in
    the record, and signs say the same."""
    plan = AutoAttack(eps, norm=norm, version=version if attack.name == AUTOATTACK else "apgd", seed=seed)
    if attack.name in PARTS:
        parts, _ = AutoAttack(eps, norm=norm, version="standard").searches(MANY)
        plan = AutoAttack(eps, norm=norm, version="custom", parts={attack.name: parts[attack.name]}, seed=seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        correct, record = _run(plan, model, samples, say=say, **how)
    for warning in caught:
        if str(warning.message) not in record.notes:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    known = {name: value for name, value in record.to_dict().items() if name not in _OUTSIDE}
    return Outcome(
        attack, eps, norm, correct.cpu(), record.nan_logits, record.largest_norm, record.least, record.most,
        record.seconds, record.accuracy, known,
    )  # fmt: skip


def _run(attack: AutoAttack, model: nn.Module, samples: Samples, **how: Any) -> tuple[Tensor, AutoAttackRecord]:
    """Which are right whatever the attacks do, on the model's device, and the record; the same in all processes."""
    x, y, ids = samples.everything(model, device_of(model))
    with eval_mode(model), together() as processes:  # a note that it was in train mode would be one about the trainer
        result = run_sharded(attack, model, x, y, ids=ids, **how)
        found = None if result is None else (result.correct, result.record)
        correct, record = processes.share(found)
    return correct.to(x.device), record


def _joined(changes: tuple[str, ...]) -> str | None:
    return "; ".join(changes) or None
