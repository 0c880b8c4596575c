"""Evaluation: accuracy on clean images, under FGSM and under PGD."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from atlas_kernels import noise_key
from atlas_kernels.attacks import FGSM, PGD, Attack
from atlas_kernels.attacks.held import generators, put_back
from atlas_kernels.checks import whole
from atlas_kernels.outputs import logits_of, predicted, require_rows_of_logits

from .data import Batches, Images
from .options import Norm, fraction, radius

Say = Callable[[str], None]
CPU_SIZE = 1000
SUBSET_SEED = 0  # one fixed draw, so that every model sees the same images
#: The accuracies of an ``Evaluation``, and what tables call them.
ACCURACIES = {"clean": "clean", "fgsm": "FGSM", "pgd": "PGD-{pgd_steps}"}


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in [0, 1] over ``images`` test images, and how they were made (radii for images in [0, 1])."""

    clean: float
    fgsm: float
    pgd: float
    images: int
    eps: float
    pgd_steps: int
    pgd_step_size: float
    pgd_restarts: int
    seconds: float
    device: str
    seed: int = 0
    norm: Norm = "linf"

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON; eps also as everyone writes it."""
        return asdict(self) | {"eps_255": fraction(self.eps)}

    @property
    def error(self) -> float:
        """The largest standard error that an accuracy over so many images can have."""
        return 0.5 / math.sqrt(self.images)


def evaluate(
    model: nn.Module,
    images: Images,
    eps: float,
    *,
    norm: Norm = "linf",
    size: int | None = None,
    batch_size: int = 250,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    seed: int = 0,
    device: str | torch.device | None = None,
    channels_last: bool = False,
    say: Say | None = None,
) -> Evaluation:
    """Clean, FGSM and PGD accuracy of ``model`` in eval mode; it, and the random state, are as before afterwards.

    An image counts under an attack if it is classified correctly both clean and attacked (an image lies in its own
    ball), so attacks run only on images that are right clean. Noise goes by the image's number in the set, so the
    result does not depend on the batch size (rounding aside).

    Args:
        images: labelled uint8 images, usually the test split.
        eps, norm: radius of the ball for images in [0, 1].
        size: a stratified draw of so many images, always the same; default: 1000 on a CPU, all elsewhere.
        steps, step_size, restarts: of PGD, from a uniform start; step_size default 2.5 * eps / steps, in l1 PGD's own.
        seed: of the noise.
        device: where to run; default: where the model is. The model must be there.
        say: told what is evaluated, and after the first batch for how long.
    """
    where = torch.device(device) if device is not None else next(model.parameters()).device
    size = (CPU_SIZE if where.type == "cpu" else len(images)) if size is None else whole("size", size, 1)
    if size < len(images):
        images = images.subset(size, SUBSET_SEED)
    steps, seed = whole("steps", steps, 1), whole("seed", seed, 0, 2**63 - 1)
    attacks: dict[str, PGD] = {"fgsm": FGSM(eps, norm=norm)}
    step_size = 2.5 * eps / steps if step_size is None and norm != "l1" else step_size
    attacks["pgd"] = pgd = PGD(eps, step_size, steps, norm=norm, restarts=restarts)
    batches = Batches(images, batch_size, shuffle=False, seed=0, device=where, channels_last=channels_last)
    key = noise_key(where, generator=torch.Generator(where).manual_seed(seed))
    if say:
        names = ", ".join(ACCURACIES.values()).format(pgd_steps=steps)
        say(f"evaluating {len(images):,} images at eps {radius(eps, norm)}: {names}")

    started = time.perf_counter()
    correct = torch.zeros(len(ACCURACIES), dtype=torch.int64, device=where)
    with evaluating(model):
        for number, (x, y, ids) in enumerate(batches):
            rights = survivors(model, attacks, x, y, ids, key)
            correct += torch.stack([rights[name].sum() for name in ACCURACIES])
            if number == 0 and len(batches) > 1 and say:
                _synchronize(where)
                say(f"  about {(time.perf_counter() - started) * len(batches):.0f} s in all")
    shares = dict(zip(ACCURACIES, (correct.double() / len(images)).tolist(), strict=True))
    seconds = time.perf_counter() - started
    return Evaluation(
        **shares, images=len(images), eps=eps, pgd_steps=steps, pgd_restarts=restarts, seconds=seconds,
        pgd_step_size=float(pgd.effective_step_size), device=str(where), seed=seed, norm=norm,
    )  # fmt: skip


def survivors(
    model: nn.Module, attacks: Mapping[str, Attack], x: Tensor, y: Tensor, ids: Tensor, key: Tensor
) -> dict[str, Tensor]:
    """Which rows are right: clean, and then under each attack. bool [B] each."""
    clean = predict(model, x) == y
    rights = {"clean": clean}
    rows = clean.nonzero().squeeze(1)
    for name, attack in attacks.items():
        right = torch.zeros_like(clean)
        if len(rows):
            adv = attack(model, x[rows], y[rows], key=key, ids=ids[rows])
            right[rows] = predict(model, adv) == y[rows]
        rights[name] = right
    return rights


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    """The classes with the largest logits, int64 [B]; -1 where one is NaN, which is wrong whatever the label."""
    logits = logits_of(model(x))
    require_rows_of_logits(logits, x)
    return predicted(logits)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and at the end all is as before: buffers that move in eval mode too (scales of quantisation, say) and
    the random state."""
    indices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with put_back(model, False, copy_buffers=True, seeds=dict.fromkeys(generators(indices)), alone=False):
        yield


def eval_mode(model: nn.Module) -> AbstractContextManager[None]:
    """The modules' flags alone; ``train()`` and ``eval()``, which a network may override, are not called."""
    return put_back(model, False)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
