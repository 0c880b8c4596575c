"""Why one-step training collapses: the loss on the way image -> start -> adversary -> neighbour, and how far gradients
within the ball agree, epoch by epoch, on the same training images with the same noise."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atlas_kernels import attack_cotangent, pgd_step, random_start
from atlas_kernels.outputs import logits_of
from atlas_train import checkpoint
from atlas_train.data import Batches, Images, held_out
from atlas_train.engine import train
from atlas_train.evaluate import evaluating
from atlas_train.machine import usable_device
from atlas_train.methods.grad_align import misalignment
from atlas_train.noise import noise_keys
from atlas_train.options import number
from atlas_train.writing import write_text
from studies.plan import Planned
from studies.work import Places
from worker import splits_of

IMAGES, QUARTERS = 256, 4
LEGS = ("image", "start", "adversary", "neighbour")
Row = dict[str, Any]


def look(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Row:
    """The loss and the accuracy in eval mode at quarters of each leg, and the mean cosine of the gradients at the image
    and at a uniform point of its ball (GradAlign's).

    The start is uniform in the ball, the adversary one step of 1.25 eps from there, projected; the neighbour is uniform
    in the ball of radius eps / 2 around it: the points of ATLAS with its defaults of old, whatever the run's method.
    """
    ids = torch.arange(len(y), device=x.device)
    keys = noise_keys(0, 0, 3).to(x.device)

    def gradient(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        logits = logits_of(model(at))
        return torch.autograd.grad(logits, at, attack_cotangent(logits.detach(), y).cotangent)[0]

    with evaluating(model):
        start = random_start(x, eps, key=keys[0], ids=ids)
        adv = pgd_step(start, gradient(start), x, eps, 1.25 * eps)
        points = [x, start, adv, random_start(adv, eps / 2, key=keys[1], ids=ids)]
        aligned = 1 - misalignment(gradient(x), gradient(random_start(x, eps, key=keys[2], ids=ids))).item()
        row: Row = {"alignment": aligned}
        with torch.no_grad():
            for name, at in _along(points):
                logits = logits_of(model(at))
                row[f"loss {name}"] = F.cross_entropy(logits, y).item()
                row[f"right {name}"] = (logits.argmax(1) == y).float().mean().item()
    return row


def _along(points: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield LEGS[0], points[0]
    for (begin, end), a, b in zip(zip(LEGS, LEGS[1:], strict=False), points, points[1:], strict=False):
        for quarter in range(1, QUARTERS):
            yield f"{begin}-{end} {quarter / QUARTERS:g}", a + quarter / QUARTERS * (b - a)
        yield end, b


def look_at(folder: Path, images: Images, eps: float, device: torch.device) -> Row:
    """``look`` at a run's checkpoint: at the weights in training, as an average lags behind a collapse. Beside it what
    the run said of its last epoch."""
    network, _ = checkpoint.load_network(folder)
    state = checkpoint.load(folder, ("epoch", "model", "history"))
    checkpoint.load_weights(network, state["model"], folder)
    x, y, _ = next(iter(Batches(images, len(images), shuffle=False, seed=0, device=device)))
    said = {name: state["history"][-1].get(name) for name in ("adv", "probe", "probe_10", "val_clean", "val_pgd")}
    return {"epoch": state["epoch"], **look(network.to(device).eval(), x, y, eps), **said}


def diagnose(planned: Planned, places: Places, path: Path) -> list[Row]:
    """Trains the run anew, past a collapse, and looks at its checkpoint after each epoch: a line each in ``path``. A
    diagnosis that was stopped goes on."""
    folder = places.runs / f"diagnosis-{planned.folder}"
    begun = (folder / checkpoint.LAST).exists()
    how = {"resume": str(folder)} if begun else {}
    config = planned.config(data_dir=places.data_dir, device=places.device, on_collapse="warn", **how)
    splits = splits_of(config.dataset, places.data_dir)
    images, _ = held_out.split(splits.train, config.train_size, config.val_size, config.seed)
    few = images.subset(min(IMAGES, len(images)), 0)
    device, found = usable_device(places.device), _read(path) if begun else []

    def after_epoch() -> None:
        own = look_at(folder, few, number(planned.eps), device)
        found[:] = [*(old for old in found if int(old["epoch"]) < own["epoch"]), own]
        write_text(path, _text(found))

    if begun and checkpoint.load(folder)["epoch"]:  # it may have been killed before it looked
        after_epoch()
    train(config, splits=splits, folder=folder, on_epoch=lambda row: after_epoch())
    return found


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _text(found: list[Row]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(found[-1]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return file.getvalue()
