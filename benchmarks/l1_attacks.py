"""Is PGD in l1 at its defaults as strong as the published l1 attacks of as many steps?

    pip install --no-deps -r tests/peers.txt
    python benchmarks/l1_attacks.py [--datasets digits mnist cifar10 --data-dir DATA] [--results FILE.json]

The networks are trained here, by the trainer. Beside PGD: SLIDE (Tramer & Boneh 2019, arXiv 1904.13000) with the
defaults of foolbox' SparseL1DescentAttack, APGD-L1 (Croce & Hein 2021, arXiv 2103.01208) of pyautoattack, and PGD with
dense steps of 2.5 eps / steps. Robust accuracy counts the images that are classified correctly at x and at what the
attack returns; for "any step", at every iterate. All but SLIDE start at random: the table has the mean over `--starts`
random starts, since from one start to another APGD-L1 differs by up to five points.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

import atlas_kernels as ak
from atlas_train import data
from atlas_train.config import TrainConfig
from atlas_train.engine import train
from atlas_train.evaluate import SUBSET_SEED, eval_mode
from tables import Table, aligned, command_line, markdown, write

#: What is trained, and the radii.
TRAINING: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "digits": ({"method": "adv", "epochs": 15}, (1.0, 2.0, 3.0)),
    "mnist": ({"method": "one_step_adv", "hyper": {"step_size": 0.2}, "train_size": 10000, "epochs": 2}, (10.0, 20.0)),
    "cifar10": ({"method": "one_step_adv", "train_size": 5000, "epochs": 4, "width": 8}, (6.0, 12.0)),
}
Attack = Callable[[nn.Module, Tensor, Tensor, float, int, int], Tensor]  # the last: number of the random start


def slide(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, start: int, q: float = 0.99) -> Tensor:
    """SLIDE as in foolbox: from x; entries that the range blocks are left out, those at the quantile or above it move
    by equal shares, 0.2 eps in all; onto the ball, then into the range. The first iterate that is misclassified, else
    the last one."""
    adv, found = x.clone(), x.clone()
    held = torch.ones_like(y, dtype=torch.bool)
    for number in range(steps + 1):
        adv.requires_grad_()
        logits = model(adv)
        found = torch.where(held.view(-1, 1, 1, 1), adv.detach(), found)
        held &= logits.argmax(1) == y
        if number == steps:
            break
        (grad,) = torch.autograd.grad(nn.functional.cross_entropy(logits, y, reduction="sum"), adv)
        adv = adv.detach()
        grad = grad.masked_fill(((adv <= 0) & (grad < 0)) | ((adv >= 1) & (grad > 0)), 0)
        threshold = torch.quantile(grad.abs().flatten(1), q, dim=1).view(-1, 1, 1, 1)
        moved = torch.where(grad.abs() >= threshold, grad.sign(), 0)
        moved = moved / moved.abs().flatten(1).sum(1).clamp(min=1).view(-1, 1, 1, 1)
        adv = (x + _in_ball(adv + 0.2 * eps * moved - x, eps)).clamp(0, 1)
    return found


def _in_ball(d: Tensor, eps: float) -> Tensor:
    """The nearest point of the l1 ball (Duchi et al. 2008)."""
    size = d.abs().flatten(1)
    sorted_ = size.sort(1, descending=True).values
    over = (sorted_.cumsum(1) - eps) / torch.arange(1, size.shape[1] + 1, device=d.device)
    threshold = over.gather(1, (sorted_ > over).sum(1, keepdim=True).clamp(min=1) - 1).clamp(min=0)
    return d.sign() * (size - threshold).clamp(min=0).view_as(d)


def apgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, start: int) -> Tensor:
    from pyautoattack.autopgd_base import APGDAttack  # type: ignore[import-untyped]

    attack = APGDAttack(model, n_iter=steps, norm="L1", eps=eps, seed=start, device=x.device)
    found: Tensor = attack.perturb(x, y)
    return found


def pgd(step: float | None = None, **options: Any) -> Attack:
    """``step``: times eps / steps, as in l_inf and l2; None: the default of l1."""

    def attack(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, start: int) -> Tensor:
        size = None if step is None else step * eps / steps
        found = ak.PGD(eps, size, steps, norm="l1", **options)
        return found(model, x, y, key=torch.tensor([start, 0], device=x.device))

    return attack


ATTACKS: dict[str, Attack] = {
    "PGD": pgd(),
    "PGD, any step": pgd(compact=True),
    "SLIDE, any step": slide,
    "APGD-L1, any step": apgd,
    "PGD, dense": pgd(2.5, sparsity=None),
}


@dataclass(frozen=True)
class Row:
    """Robust accuracy in percent by attack and start, on ``n`` images."""

    dataset: str
    eps: float
    steps: int
    n: int
    clean: float
    robust: dict[str, list[float]]


@torch.no_grad()
def right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x).argmax(1) == y


def compare(model: nn.Module, x: Tensor, y: Tensor, dataset: str, eps: float, steps: int, starts: int) -> Row:
    with eval_mode(model):
        clean = right(model, x, y)
        robust: dict[str, list[float]] = {name: [] for name in ATTACKS}
        for name, attack in ATTACKS.items():
            for start in range(1 if attack is slide else starts):
                adv = attack(model, x, y, eps, steps, start)
                length = (adv - x).abs().flatten(1).sum(1).max()
                if length > eps * 1.0001 or adv.min() < 0 or adv.max() > 1:
                    raise RuntimeError(f"{name} left the ball or the range: length {length}, eps {eps}")
                robust[name].append(100 * (clean & right(model, adv, y)).float().mean().item())
    return Row(dataset, eps, steps, len(x), 100 * clean.float().mean().item(), robust)


def table(rows: Sequence[Row]) -> Table:
    header = ["data, eps, steps", "clean", *ATTACKS, "PGD - best peer", "any step - best peer"]
    made = [header]
    for row in rows:
        robust = {name: mean(values) for name, values in row.robust.items()}
        best = min(robust["SLIDE, any step"], robust["APGD-L1, any step"])
        behind = [robust[name] - best for name in ("PGD", "PGD, any step")]
        values = [f"{value:.1f} %" for value in (row.clean, *robust.values())]
        made.append([f"{row.dataset}, {row.eps:g}, {row.steps}", *values, *(f"{points:+.1f}" for points in behind)])
    return made


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", choices=TRAINING, default=["digits"])
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--steps", type=int, nargs="+", default=[20])
    parser.add_argument("--starts", type=int, default=3, help="random starts, whose mean is shown")
    parser.add_argument("--size", type=int, default=500, help="test images")
    parser.add_argument("--results", type=Path, default=None)
    o = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message="there are .* points with zero gradient")
    rows, networks = [], []
    for name in o.datasets:
        settings, radii = TRAINING[name]
        splits = data.load(name, o.data_dir)
        run = train(TrainConfig(dataset=name, beside=(), val_size=0, probe_size=0, **settings), splits=splits)
        model = run.final_model.requires_grad_(False)
        test = splits.test.subset(o.size, SUBSET_SEED) if len(splits.test) > o.size else splits.test
        x, y = test.images.float() / 255, test.labels
        networks.append(f"{name}: {run.arch['name']}, {run.config.method}, epochs {run.config.epochs}")
        for eps in radii:
            for steps in o.steps:
                rows.append(compare(model, x, y, name, eps, steps, o.starts))
                print(aligned(table(rows[-1:])), flush=True)
    print(aligned(table(rows)))
    if o.results:
        values = {"networks": networks, "rows": [vars(row) for row in rows]}
        notes = f"Robust accuracy at equal steps, mean of {o.starts} random starts; any step: the first iterate that"
        notes += " is misclassified counts."
        write(o.results, "l1 attacks", command_line(__file__, arguments), values, ["; ".join(networks) + ".",
              markdown(table(rows)), notes])  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
