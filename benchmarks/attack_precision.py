"""Are attacks in bf16 as strong as in fp32? On real test images, for a network that the trainer has trained.

    python benchmarks/attack_precision.py [--dataset mnist --data-dir DATA] [--results FILE.json]

Every attack is made twice, in fp32 and in bf16, from the same noise, and both sets of adversaries are judged by the
same float32 network in eval mode. What is compared is paired by image: robust accuracy (right clean and attacked) by
Bonett and Price's adjusted Wald interval and McNemar's exact test, the loss by the standard error of its differences.
One-step attacks are also made in train mode, as in training. The network comes from --checkpoint, or from a short
training in fp32 here. What bf16 saves comes out beside it: the median over batches of fp32's time over bf16's.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas_kernels import PGD, Execution, keep_memory, noise_key
from atlas_train import data
from atlas_train.config import TrainConfig
from atlas_train.data import Batch, Batches, DataSplits
from atlas_train.engine import train
from atlas_train.evaluate import SUBSET_SEED, eval_mode
from atlas_train.machine import usable_device
from atlas_train.options import fraction
from atlas_train.stored import opened
from harness import strict_fp32
from tables import Table, aligned, command_line, markdown, write

CONFIDENCE = 0.95
#: What the trainer trains where no checkpoint is given: a few minutes at most.
TRAINING: dict[str, dict[str, Any]] = {
    "digits": {"method": "adv", "epochs": 15},
    # At its paper's step, 1.25 eps, it is a matter of luck there whether training collapses.
    "mnist": {"method": "one_step_adv", "hyper": {"step_size": 0.2}, "train_size": 20000, "epochs": 3},
    "cifar10": {"method": "one_step_adv", "train_size": 10000, "epochs": 4, "width": 16},
}


class Interval(NamedTuple):
    """A difference of shares, its confidence limits, and the p of no difference."""

    difference: float
    low: float
    high: float
    p: float


def paired_interval(before: Tensor, after: Tensor, confidence: float = CONFIDENCE) -> Interval:
    """mean(after) - mean(before) of two bool[n] on the same samples.

    Limits: Bonett & Price 2012 (J. Educ. Behav. Stat. 37), Wald with one sample added to each way of differing, so that
    no differing sample does not mean no doubt. p: McNemar's test, exact: of the samples that differ, do half differ
    each way?
    """
    n, gained, lost = len(before), int((after & ~before).sum()), int((before & ~after).sum())
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = statistics.NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    differing = gained + lost
    tail = sum(math.comb(differing, k) for k in range(min(gained, lost) + 1)) / 2**differing
    return Interval((gained - lost) / n, up - down - half, up - down + half, min(1.0, 2 * tail))


@dataclass(frozen=True)
class Setting:
    objective: str
    attack_mode: str
    steps: int


@dataclass(frozen=True)
class Row:
    """What a setting came to on ``n`` images; shares in [0, 1], losses in nats.

    only_fp32, only_bf16: images that only the attack of that precision fools. signs: share of pixels whose first step
    goes another way in bf16. speedup: fp32's time over bf16's, the median over batches.
    """

    setting: Setting
    n: int
    robust_fp32: float
    robust_bf16: float
    only_fp32: int
    only_bf16: int
    difference: Interval
    loss_fp32: float
    loss_bf16: float
    loss_difference: float
    loss_error: float
    signs: float
    speedup: float


class Judged(NamedTuple):
    """Adversaries of one batch by the float32 network: per-sample loss, and whether they are classified correctly."""

    loss: Tensor
    right: Tensor
    seconds: float


# One setting


def compare(model: nn.Module, batches: Sequence[Batch], eps: float, setting: Setting, key: Tensor) -> Row:
    """Both attacks on every batch, in turn, each precision first in every other batch."""
    attack = PGD(eps, steps=setting.steps, objective=setting.objective, attack_mode=setting.attack_mode)
    made: dict[str, list[Judged]] = {"fp32": [], "bf16": []}
    for number, batch in enumerate(batches):
        for precision in sorted(made, reverse=number % 2 == 1):
            made[precision].append(judged(model, attack, batch, key, precision))
    clean = torch.cat([classified(model, batch.x, batch.y)[1] for batch in batches])
    loss = {name: torch.cat([one.loss for one in found]) for name, found in made.items()}
    right = {name: torch.cat([one.right for one in found]) & clean for name, found in made.items()}
    more = loss["bf16"] - loss["fp32"]
    return Row(
        setting,
        n=len(clean),
        robust_fp32=right["fp32"].double().mean().item(),
        robust_bf16=right["bf16"].double().mean().item(),
        only_fp32=int((right["bf16"] & ~right["fp32"]).sum()),
        only_bf16=int((right["fp32"] & ~right["bf16"]).sum()),
        difference=paired_interval(right["fp32"], right["bf16"]),
        loss_fp32=loss["fp32"].mean().item(),
        loss_bf16=loss["bf16"].mean().item(),
        loss_difference=more.mean().item(),
        loss_error=more.std().item() / math.sqrt(len(more)),
        signs=statistics.fmean(changed_signs(model, attack, batch, key) for batch in batches),
        speedup=statistics.median(a.seconds / b.seconds for a, b in zip(made["fp32"], made["bf16"], strict=True)),
    )


def judged(model: nn.Module, attack: PGD, batch: Batch, key: Tensor, precision: str) -> Judged:
    _synchronise(batch.x)
    started = time.perf_counter()
    with Execution(precision):
        adv = attack(model, batch.x, batch.y, key=key, ids=batch.ids)
    _synchronise(batch.x)
    seconds = time.perf_counter() - started
    return Judged(*classified(model, adv, batch.y), seconds)


@torch.no_grad()
def classified(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Per sample: cross-entropy (float64), and whether the class is right."""
    with eval_mode(model):
        z = model(x).double()
    return F.cross_entropy(z, y, reduction="none"), z.argmax(1) == y


def changed_signs(model: nn.Module, attack: PGD, batch: Batch, key: Tensor) -> float:
    """The share of pixels whose first step goes another way in bf16: both start at the same point."""
    signs = []
    for precision in ("fp32", "bf16"):
        with Execution(precision):
            first = replace(attack, steps=1).last_gradient(model, batch.x, batch.y, key=key, ids=batch.ids)
        signs.append(first.grad.sign())
    return (signs[0] != signs[1]).double().mean().item()


def _synchronise(like: Tensor) -> None:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)


# The study


def settings(steps: Sequence[int], other_steps: Sequence[int]) -> Iterator[Setting]:
    """Cross-entropy at all steps, the other objectives at some; one step in train mode too."""
    for objective in ("ce", "kl", "margin"):
        yield from (Setting(objective, "eval", n) for n in (steps if objective == "ce" else other_steps))
        yield Setting(objective, "train", 1)


def network(o: argparse.Namespace) -> tuple[nn.Module, DataSplits, float, str]:
    """The network, its data and radius, and a line about where it comes from."""
    if o.checkpoint:
        model, description, splits, _ = opened(o.checkpoint, data_dir=o.data_dir)
        config = description["config"]
        return model, splits, config["eps"], f"{config['method']}, {config['epochs']} epochs, from a checkpoint"
    own = TRAINING[o.dataset]
    given = {name: getattr(o, name) for name in ("train_size", "epochs", "width", "threads", "device")}
    chosen = {**own, **{name: value for name, value in given.items() if value is not None}}
    splits = data.load(o.dataset, o.data_dir)
    run = train(
        TrainConfig(dataset=o.dataset, beside=(), val_size=0, probe_size=0, channels_last=True, **chosen), splits=splits
    )
    size, width = len(run.splits.train), f" width {run.arch['width']}" if run.arch["width"] else ""
    where = f"{run.arch['name']}{width}, {run.config.method}, {size:,} images, epochs {run.config.epochs}"
    return run.final_model, splits, run.config.eps, f"{where}, trained in {run.seconds:.0f} s"


def study(o: argparse.Namespace) -> Iterator[tuple[list[Row], dict[str, Any]]]:
    """The rows so far, after each, and what they are rows of; prints each row's progress."""
    model, splits, eps, origin = network(o)
    device = usable_device(o.device)
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = splits.test.subset(min(o.size, len(splits.test)), SUBSET_SEED)
    batches = list(Batches(images, o.batch_size, shuffle=False, seed=0, device=device, channels_last=True))
    key = noise_key(device, generator=torch.Generator(device).manual_seed(o.seed))
    rows: list[Row] = []
    print(f"{splits.name}: {origin}; {len(images):,} test images, eps {fraction(eps)}", flush=True)
    with eval_mode(model), keep_memory(), strict_fp32():
        clean = statistics.fmean(
            right for batch in batches for right in classified(model, batch.x, batch.y)[1].double().tolist()
        )
        facts = {"dataset": splits.name, "network": origin, "images": len(images), "clean": clean, "eps": fraction(eps)}
        changed_signs(model, PGD(eps), batches[0], key)  # warm-up
        for setting in settings(o.steps, o.other_steps):
            rows.append(compare(model, batches, eps, setting, key))
            print(f"  {setting.objective}, {setting.attack_mode}, {setting.steps} steps", flush=True)
            yield rows, facts


HEADER = [
    "objective", "mode", "steps", "robust fp32", "bf16", "difference (points)", "p", "fooled by one only", "loss fp32",
    "difference", "signs", "time",
]  # fmt: skip


def table(rows: Sequence[Row]) -> Table:
    return [HEADER, *(_line(row) for row in rows)]


def _line(row: Row) -> list[str]:
    s, d = row.setting, row.difference
    difference = f"{100 * d.difference:+.1f} [{100 * d.low:+.2f}, {100 * d.high:+.2f}]"
    robust = [f"{100 * share:.1f} %" for share in (row.robust_fp32, row.robust_bf16)]
    loss = [f"{row.loss_fp32:.4f}", f"{row.loss_difference:+.5f} ({row.loss_error:.5f})"]
    only = f"{row.only_fp32} / {row.only_bf16}"
    shares = [f"{row.signs:.2%}", f"{row.speedup:.2f}x"]
    return [s.objective, s.attack_mode, str(s.steps), *robust, difference, f"{d.p:.2f}", only, *loss, *shares]


def conclusion(rows: Sequence[Row]) -> str:
    """What the rows say, in a sentence made of their numbers."""
    points = [100 * row.difference.difference for row in rows]
    highest = 100 * max(row.difference.high for row in rows)
    weaker = sum(row.difference.low > 0 for row in rows)
    stronger = sum(row.difference.high < 0 for row in rows)
    chance = (1 - CONFIDENCE) / 2 * len(rows)
    loss = min(row.loss_difference / row.loss_fp32 for row in rows)
    return (
        f"In {len(rows)} comparisons on {rows[0].n:,} images each, robust accuracy under bf16 attacks differs "
        f"from that under fp32 attacks by {min(points):+.1f} to {max(points):+.1f} points, and no {CONFIDENCE:.0%} "
        f"interval reaches beyond {highest:+.2f}; bf16 is weaker by more than its interval in {weaker} of them and "
        f"stronger in {stronger} (chance alone: {chance:.1f} each); the loss it reaches is at least {1 + loss:.2%} of "
        "fp32's."
    )


NOTE = (
    "difference: robust accuracy under bf16 attacks less that under fp32 attacks (positive: bf16 is weaker), with its "
    f"{CONFIDENCE:.0%} interval, paired by image; p: McNemar, exact. fooled by one only: images that only the fp32 / "
    "only the bf16 attack fools. loss: mean cross-entropy, and bf16's less fp32's with its standard error. signs: "
    "pixels whose first step goes another way in bf16. time: fp32's over bf16's, the median over batches. fp32 is "
    "without TF32, on a GPU too. Adversaries are judged by the network in float32 and in eval mode, whatever the "
    "attack."
)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    o = _parser().parse_args(arguments)
    if o.threads:
        torch.set_num_threads(o.threads)
    asked = {name: value for name, value in vars(o).items() if name not in ("data_dir", "results", "checkpoint")}
    for rows, facts in study(o):
        lines, said = table(rows), conclusion(rows)
        title = f"{facts['dataset']}: attacks in bf16 against fp32"
        about = f"{facts['network']}; clean {facts['clean']:.1%}; {facts['images']:,} test images, eps {facts['eps']}."
        if o.results:
            values = {"settings": asked, **facts, "confidence": CONFIDENCE, "conclusion": said}
            found = [asdict(row) | {"difference": row.difference._asdict()} for row in rows]
            parts = [said, about, markdown(lines), NOTE]
            write(Path(o.results), title, command_line(__file__, arguments), {**values, "rows": found}, parts)
    print("\n".join(["", title, "", about, "", aligned(lines), "", NOTE, "", said]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Attacks in bf16 against fp32: the same noise, paired by image.")
    add = parser.add_argument
    add("--dataset", default="digits", choices=tuple(TRAINING), help="default: digits")
    add("--data-dir", help="folder with the data's files")
    add("--checkpoint", help="run folder or weights of the trainer, in place of a training here; rules the data set")
    add("--train-size", type=int, help="training images; default: by data set")
    add("--epochs", type=int, help="default: by data set")
    add("--width", type=int, help="width of the network; default: by data set")
    add("--size", type=int, default=1000, help="test images, a stratified draw; default: 1000, or all")
    add("--batch-size", type=int, default=100)
    add("--steps", type=int, nargs="+", default=[1, 2, 5, 10, 20, 50], help="of attacks on cross-entropy")
    add("--other-steps", type=int, nargs="+", default=[1, 10], help="of attacks on KL and the margin")
    add("--seed", type=int, default=0, help="of the attacks' noise")
    add("--device", help="default: cuda where there is one")
    add("--threads", type=int, help="CPU threads; default: torch's")
    add("--results", metavar="FILE.json", help="write the numbers there, and the table beside as .md")
    return parser


if __name__ == "__main__":
    sys.exit(main())
