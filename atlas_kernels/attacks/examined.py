"""Checks of a network before it is evaluated, as an evaluation takes long and its figure may mean nothing."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import class_indices
from .batch import Batch
from .objective import Model, Objective

#: Two forwards that differ by more, over the length of the logits, are no rounding: as in AutoAttack.
_SAME = 1e-4
_PROBABILITY = 1e-5
#: Images whose gradients are looked at.
_FEW = 64


class Examined(NamedTuple):
    """classes: of the network. differentiable: whether its logits have a gradient. randomised: whether two forwards
    differ. notes: what a reader of the figures must know, as warnings have said it."""

    classes: int
    differentiable: bool
    randomised: bool
    notes: tuple[str, ...]


def examine(model: Model, batch: Batch, labels: Tensor, training: bool, version: str) -> Examined:
    """Looks at the network on the first images. labels: all of them. training: how it was
    found. version: of AutoAttack.

    Raises ValueError for a network of one class, and for labels that are not classes of it.
    """
    logits = Objective().predict(model, batch.x)
    classes = logits.shape[1]
    if classes < 2:
        raise ValueError(
            f"the model has {classes} class, so there is no other to reach: for two classes stack its logit z as "
            "[-z/2, z/2]"
        )
    class_indices("y", labels, labels, classes, attack=True, of="the model has")
    notes = []
    if training:
        notes.append("the model was in train mode: it is attacked in eval mode, and left as it was")
    if _is_distribution(logits):
        notes.append(
            "the model gives probabilities, not logits: its gradients vanish where it is confident, and the figures "
            "may be far too good; leave its softmax out"
        )
    randomised = _differ(logits, Objective().predict(model, batch.x))
    if randomised and version != "rand":
        notes.append(
            'two forwards of the model differ: it draws random numbers in eval mode. Use version="rand", whose attacks '
            "climb the mean of 20 gradients"
        )
    reason, zero = _gradients(model, batch.rows(batch.every_row()[:_FEW]))
    if reason:
        notes.append(f"the model has no gradient ({reason}): only attacks that need none are run, and it may be weaker")
    elif zero:
        notes.append(
            f"the gradient of {zero} of the first {min(len(batch.x), _FEW)} images is 0, or not finite: attacks that "
            "follow it may fail there, and the figures may be far too good"
        )
    for note in notes:
        warnings.warn(note, stacklevel=4)
    return Examined(classes, not reason, randomised, tuple(notes))


def _is_distribution(logits: Tensor) -> bool:
    """Whether every row has numbers in [0, 1] that add up to 1."""
    logits = logits.double()
    inside = (logits > -_PROBABILITY) & (logits < 1 + _PROBABILITY)
    return bool(inside.all() and ((logits.sum(1) - 1).abs() < _PROBABILITY * logits.shape[1]).all())


def _differ(first: Tensor, second: Tensor) -> bool:
    first, second = (nn.functional.normalize(logits.double().nan_to_num(), dim=1) for logits in (first, second))
    return bool(((first - second).norm(dim=1) > _SAME).any())


def _gradients(model: Model, batch: Batch) -> tuple[str, int]:
    """Why there is no gradient, and else for how many images it is 0, or holds NaN or infinity."""
    try:
        _, grad = batch.goal.gradient(model, batch.x, sized=False)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # the forward has run already
        return str(error).strip().split("\n")[0].split(":")[0], 0
    return "", int(leads_nowhere(grad).sum())


def leads_nowhere(grad: Tensor) -> Tensor:
    """Which rows of a gradient are 0, or hold NaN or infinity; bool [B]."""
    rows = grad.flatten(1)
    return (rows == 0).all(1) | ~rows.isfinite().all(1)
