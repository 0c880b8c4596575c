"""Evaluation: accuracy on clean images and under attacks."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from atlas_kernels import noise_key
from atlas_kernels.attacks import FGSM, PGD, Attack
from atlas_kernels.attacks.arguments import require_choice
from atlas_kernels.attacks.processes import LostProcesses, Processes, alone, together
from atlas_kernels.attacks.progress import counted
from atlas_kernels.attacks.saved import require_writable, weights_of
from atlas_kernels.checks import kind_of, whole
from atlas_kernels.outputs import logits_of, require_rows_of_logits
from atlas_kernels.schema import NORMS

from . import autoattack as ensembles
from .data import Split
from .inference import device_of
from .inference import eval_mode as eval_mode
from .inference import evaluating as evaluating
from .inference import predict as predict
from .models.classifier import Normalize
from .options import Norm, radius
from .processes import unsaid
from .robustness import signs
from .robustness.named import CLEAN, Named, default_step, named
from .robustness.outcome import Outcome
from .robustness.report import Report
from .robustness.samples import SUBSET_SEED as SUBSET_SEED
from .robustness.samples import Samples, gathered
from .robustness.tally import Progress, Tally, Verdict

Say = Callable[[str], None]
CPU_SIZE = 1000
#: The accuracies of an ``Evaluation``, and what tables call them.
ACCURACIES = {"clean": "clean", "fgsm": "FGSM", "pgd": "PGD-{pgd_steps}"}


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in [0, 1] over ``images`` test images, and how they were made (radii for images in [0, 1]).

    signs: what stands against trusting them, in words.
    """

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
    signs: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON; eps also in 1/255."""
        return asdict(self) | {"eps_255": f"{255 * self.eps:.4g}/255"}

    @property
    def error(self) -> float:
        """The largest standard error that an accuracy over so many images can have."""
        return 0.5 / math.sqrt(self.images)


@overload
def evaluate(model: nn.Module, data: Any, eps: float, *, attacks: None = None, **settings: Any) -> Evaluation: ...
@overload
def evaluate(
    model: nn.Module, data: Any, eps: float | Sequence[float] | None = None, *, attacks: Sequence[str] | str,
    **settings: Any,
) -> Report: ...  # fmt: skip
def evaluate(  # type: ignore[misc]  # of settings, which are those below
    model: nn.Module,
    data: Any,
    eps: float | Sequence[float] | None = None,
    *,
    attacks: Sequence[str] | str | None = None,
    norm: Norm = "linf",
    size: int | None = None,
    batch_size: int = 250,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    seed: int = 0,
    device: str | torch.device | None = None,
    channels_last: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    num_classes: int | None = None,
    autoattack_version: ensembles.Version = "standard",
    search_precision: ensembles.Precision = "fp32",
    state: str | os.PathLike[str] | None = None,
    say: Say | None = None,
    dealt: bool = False,
) -> Evaluation | Report:
    """Accuracy of ``model`` in eval mode, clean and under attacks; it, and the random state, are as before afterwards.

    Without ``attacks`` it is clean, FGSM and PGD accuracy at one eps. With their names, ``attacks=("fgsm",
    "pgd-50-10", "autoattack")``, it is a ``Report`` of all of them, at one eps or at several: accuracy by class and by
    image, tables, JSON, and the signs that a figure cannot be trusted (docs/evaluation.md).

    An image counts under an attack if it is classified correctly both clean and attacked (an image lies in its own
    ball), so attacks run only on images that are right clean. Noise goes by the image's number in the set, so the
    result does not depend on the batch size (rounding aside).

    Args:
        model: any module that gives logits, alone or in an object (``.logits``), a dict or a tuple.
        data: ``Images`` or ``Pictures``, usually the test split; a pair (images, labels) of tensors or arrays, images
            uint8 or float in [0, 1]; or a loader of such batches.
        eps, norm: radius of the ball for images in [0, 1].
        attacks: names; ``robustness.named.ABOUT`` says which there are.
        size: so many of the images: of a loader the first, else a stratified draw, always the same. Default: of
            ``Images`` 1000 on a CPU and all elsewhere; else all.
        steps, restarts: of PGD, where no attacks are named; from a uniform start.
        step_size: of PGD; default 2.5 * eps / steps, in l1 PGD's own.
        seed: of the noise.
        device: where to run; default: where the model is. The model must be there.
        mean, std: by which images are normalised before they reach the model, one number for each channel; default: the
            model normalises by itself, or not at all.
        num_classes: of the data; a model of another number is refused. Default: not known.
        autoattack_version, search_precision: as for ``autoattack``.
        state: a file from which an AutoAttack that was stopped goes on, in the middle of an attack, also in another
            number of processes; it is refused for another model, other data or settings. With several, each has a file
            of its own beside it.
        say: told what is evaluated, and how far it is; of several processes the first one's.
        dealt: all processes of ``torch.distributed`` make this call, with the same model and all of the data; each
            attacks some of the images, and all get the same result. Default: this process evaluates alone.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {kind_of(model)}: put what it does into one")
    require_choice("norm", norm, NORMS)
    where = torch.device(device) if device is not None else device_of(model)
    size = None if size is None else whole("size", size, 1)
    if size is None and isinstance(data, Split) and where.type == "cpu":
        size = CPU_SIZE
    samples, seed = gathered(data, size), whole("seed", seed, 0, 2**63 - 1)
    model = _normalising(model, mean, std, where, samples.channels)
    key = noise_key(where, generator=torch.Generator(where).manual_seed(seed))
    batch_size = whole("batch_size", batch_size, 1)
    chosen = None if attacks is None else named(attacks)
    if state is not None and not any(attack.searches for attack in chosen or ()):
        raise ValueError(
            f"state {os.fspath(state)!r} is where AutoAttack goes on, and nothing of it is run: name it "
            '(attacks=("autoattack",), or apgd, square, ...), or leave state out'
        )
    path = None if state is None else Path(state)
    if path is not None:
        require_writable(path)
    with together() if dealt else alone() as processes:
        if processes.count > 1:
            same = {"images or labels": samples.digest(), "weights": weights_of(model)}
            processes.require_same(same)
        told = say if say and not processes.rank else unsaid
        at = _Place(samples, where, batch_size, channels_last, norm, key, seed, told, processes)
        if chosen is not None:
            balls = _radii(eps, norm)
            how = {"version": autoattack_version, "batch_size": batch_size, "search_precision": search_precision}
            return _reported(model, at, chosen, balls, step_size, num_classes, path, how)
        if not isinstance(eps, Real):
            remedy = "write 8 / 255, say" if eps is None else "for several name the attacks too (attacks=...)"
            raise ValueError(f"eps must be a number, got {eps!r}: {remedy}")
        _require_smaller_than_all(eps, norm)
        steps, restarts = whole("steps", steps, 1), whole("restarts", restarts, 1)
        pgd = PGD(eps, default_step(eps, steps, norm, step_size), steps, norm=norm, restarts=restarts)
        names = ", ".join(ACCURACIES.values()).format(pgd_steps=steps)
        at.say(f"evaluating {at.images} at eps {radius(eps, norm)}: {names}")
        fgsm = Named("fgsm", "FGSM", "one step"), FGSM(eps, norm=norm)
        runs = {"fgsm": fgsm, "pgd": (Named("pgd", f"PGD-{steps}", "iterative", steps, restarts), pgd)}
        started = time.perf_counter()
        with evaluating(model):
            if not isinstance(data, Split):  # whose labels are the trainer's
                _require_labels(samples.y, _classes(model, at), num_classes)
            found = _attacked(model, at, runs)
    return Evaluation(
        **{name: outcome.accuracy for name, outcome in found.items()}, images=len(samples), eps=eps, pgd_steps=steps,
        pgd_restarts=restarts, seconds=time.perf_counter() - started, pgd_step_size=float(pgd.effective_step_size),
        device=str(where), seed=seed, norm=norm, signs=[sign.text for sign in signs.of_outcomes(list(found.values()))],
    )  # fmt: skip


@dataclass(frozen=True)
class _Place:
    """Which images are attacked, where, with what noise, and by how many processes."""

    samples: Samples
    device: torch.device
    batch_size: int
    channels_last: bool
    norm: Norm
    key: Tensor
    seed: int
    say: Say
    processes: Processes

    @property
    def images(self) -> str:
        """How many, in words, and what is unusual about it."""
        several = f", dealt out to {self.processes.count} processes," if self.processes.count > 1 else ""
        return f"{counted(len(self.samples), 'image')}{several}"

    def batches(self, model: nn.Module, size: int | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return self.samples.batches(model, size or self.batch_size, self.device, self.channels_last)


def _reported(
    model: nn.Module,
    at: _Place,
    attacks: Sequence[Named],
    radii: Sequence[float],
    step_size: float | None,
    num_classes: int | None,
    path: Path | None,
    how: Mapping[str, Any],
) -> Report:
    """``evaluate`` with attacks by name. path: where AutoAttack keeps its state; how: more of its arguments."""
    started, state, earlier = time.perf_counter(), path, 0.0
    told = ", ".join(radius(eps, at.norm) for eps in radii)
    at.say(f"evaluating {at.images} at eps {told}: {', '.join(a.label for a in attacks)}")
    if model.training:
        at.say("the model is in train mode: it is evaluated in eval mode, and then as it was")
    with evaluating(model):
        x, y, ids = next(at.batches(model, max(at.batch_size, signs.PROBED)))
        probe = signs.probe(model, x, y, radii[0], at.norm, at.key, ids)
        _require_labels(at.samples.y, probe.classes, num_classes)
        if probe.classes < 4 and any(attack.name == "apgd-t" for attack in attacks):
            raise ValueError(
                f"attacks: the DLR loss of apgd-t takes four classes, and the model has {probe.classes}: name apgd, "
                "which runs what such a model allows"
            )
        able = [a for a in attacks[1:] if probe.differentiable or a.kind not in ("one step", "iterative")]
        if not probe.differentiable and not any(a.searches for a in able):
            able += named("square")[1:]
        balls = [(attack, eps) for eps in radii for attack in able]
        runs = {(a.name, eps): (a, a.attack(eps, at.norm, step_size)) for a, eps in balls if not a.searches}
        searched = [(attack, eps) for attack, eps in balls if attack.searches]
        outcomes: dict[Any, Outcome] = {}
        for attack, eps in searched:  # before the others, which a resumed evaluation makes again
            if path and len(searched) > 1:
                state = path.with_name(f"{path.name}.{attack.name}-{eps:.6g}")
            before = time.perf_counter()
            outcomes[attack.name, eps] = ensembles.outcome(
                model, at.samples, attack, eps, at.norm, at.seed, at.say, state_path=state, **how
            )
            earlier += max(0.0, outcomes[attack.name, eps].seconds - (time.perf_counter() - before))
        outcomes |= _attacked(model, at, runs)
    found = (outcomes[CLEAN], *(outcomes[attack.name, eps] for attack, eps in balls))
    seconds = earlier + time.perf_counter() - started
    return Report(
        at.samples.y.cpu(), at.samples.numbers, found, at.norm, at.seed, str(at.device), seconds,
        (*signs.of_probe(probe, at.norm), *signs.of_outcomes(found)), probe,
    )  # fmt: skip


def _attacked(model: nn.Module, at: _Place, runs: Mapping[Any, tuple[Named, Attack]]) -> dict[Any, Outcome]:
    """What attacks on gradients leave, by their keys, CLEAN first, in all processes; the model is in eval mode."""
    processes, count = at.processes, at.processes.count
    mine = at.samples.part(processes.rank, count) if count > 1 else at.samples
    given = processes.gather(_tallied(model, replace(at, samples=mine), runs) if len(mine) else {})
    if processes.lost:
        raise LostProcesses(f"{processes.about_lost()}: their part of {counted(len(at.samples), 'image')} is missing")
    found: dict[Any, Outcome] | None = None
    if not processes.rank:
        rows = [torch.arange(rank, len(at.samples), count) for rank, tallies in given.items() if tallies]
        whole = {key: Tally.joined([tallies[key] for tallies in given.values() if tallies], rows) for key in given[0]}
        found = {CLEAN: whole[CLEAN].outcome(named(CLEAN)[0], None, at.norm, {})}
        for name, (how, attack) in runs.items():
            found[name] = whole[name].outcome(how, float(attack.eps), at.norm, _settings(attack))
    return processes.share(found)


def _tallied(model: nn.Module, at: _Place, runs: Mapping[Any, tuple[Named, Attack]]) -> dict[Any, Tally]:
    """The verdicts of this process's images."""
    say = at.say if at.processes.count == 1 else partial(_tell, at)
    tallies = {CLEAN: Tally(), **{name: Tally() for name in runs}}
    attacks = {name: attack for name, (_, attack) in runs.items()}
    progress = Progress(len(at.samples), at.device.type == "cpu", say)
    for x, y, ids in at.batches(model):
        before = time.perf_counter()
        for name, verdict in judged(model, attacks, x, y, ids, at.key, at.norm):
            tallies[name].add(verdict, -before + (before := time.perf_counter()))
        progress.after(len(y), {how.label: tallies[name].share for name, (how, _) in runs.items()})
    return tallies


def _tell(at: _Place, line: str) -> None:
    """Progress of one process of several."""
    at.say(f"  process {at.processes.rank + 1} of {at.processes.count}, its images alone: {line.strip()}")


def judged(
    model: nn.Module, attacks: Mapping[Any, Attack], x: Tensor, y: Tensor, ids: Tensor, key: Tensor, norm: Norm
) -> Iterator[tuple[Any, Verdict]]:
    """The verdict on each row: clean, and then under each attack, for rows that are right clean."""
    clean = predict(model, x)
    yield CLEAN, Verdict.of(clean, y, x, x, norm)
    rows = (clean == y).nonzero().squeeze(1)
    for name, attack in attacks.items():
        classes, adv = clean.clone(), x[rows]
        if len(rows):
            adv = attack(model, x[rows], y[rows], key=key, ids=ids[rows])
            classes[rows] = predict(model, adv)
        yield name, Verdict.of(classes, y, adv, x[rows], norm)


def survivors(
    model: nn.Module, attacks: Mapping[str, Attack], x: Tensor, y: Tensor, ids: Tensor, key: Tensor
) -> dict[str, Tensor]:
    """Which rows are right: clean, and then under each attack. bool [B] each."""
    return {name: verdict.right for name, verdict in judged(model, attacks, x, y, ids, key, "linf")}


def _radii(eps: float | Sequence[float] | None, norm: Norm) -> tuple[float, ...]:
    """Each radius once, in the order given. Raises ValueError for none, or what is no number."""
    given: Any = eps.tolist() if isinstance(eps, (Tensor, np.ndarray)) else eps
    radii: tuple[Any, ...] = (given,) if isinstance(given, Real) else tuple(given or ())
    if not radii or not all(isinstance(each, Real) and 0 < float(each) < math.inf for each in radii):
        raise ValueError(f"eps must be a number > 0 or several, got {eps!r}: write 8 / 255 for images in [0, 1]")
    _require_smaller_than_all(max(radii), norm)
    return tuple(dict.fromkeys(float(each) for each in radii))


def _require_smaller_than_all(eps: float, norm: Norm) -> None:
    """Raises ValueError for an l_inf ball that holds all of [0, 1]: it is usually meant in grey levels."""
    if norm == "linf" and eps >= 1:
        raise ValueError(
            f"eps must be < 1 in l_inf, got {eps:g}, which covers all of [0, 1]: it has the unit of the images, so "
            "write 8/255 for 8 grey levels"
        )


def _normalising(
    model: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None, device: torch.device, channels: int
) -> nn.Module:
    """The model behind a normalisation that is given apart from it."""
    require_normalisation(mean, std, channels)
    if mean is None or std is None:
        return model
    whole_model = nn.Sequential(Normalize(mean, std).to(device), model)
    whole_model.training = model.training
    return whole_model


def require_normalisation(mean: Sequence[float] | None, std: Sequence[float] | None, channels: int) -> None:
    """Raises ValueError where one is missing, or they are of another number of channels."""
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std go together, got mean {mean} and std {std}: give both, or neither")
    if mean is None or std is None or len(mean) == len(std) == 0:
        return
    if len(mean) != len(std) or len(mean) not in (1, channels):
        lengths = len(mean) if len(mean) == len(std) else f"{len(mean)} and {len(std)}"
        raise ValueError(
            f"mean and std must have a number for each of {channels} channels, got {lengths}: mean {mean}, std {std}"
        )


@torch.no_grad()
def _classes(model: nn.Module, at: _Place) -> int:
    """How many logits the model gives."""
    x, _, _ = next(at.batches(model))
    logits = logits_of(model(x))
    require_rows_of_logits(logits, x)
    return logits.shape[1]


def _require_labels(labels: Tensor, classes: int, known: int | None) -> None:
    """Raises ValueError for labels or data that are of other classes than the network's outputs."""
    if known is not None and known != classes:
        raise ValueError(
            f"the model gives {classes} logits, and the data have {known} classes: give the model whose last layer has "
            f"{known} outputs"
        )
    low, high = (int(value) for value in torch.aminmax(labels))
    if low < 0 or high >= classes:
        raise ValueError(
            f"labels must be in 0..{classes - 1}, for the model gives {classes} logits, got labels from {low} to "
            f"{high}: number the classes from 0, or give the model that knows them all"
        )


def _settings(attack: Attack) -> dict[str, Any]:
    """What a record says of an attack on gradients."""
    known = {"steps": attack.steps, "step_size": float(attack.effective_step_size), "restarts": attack.restarts}
    return known | {"objective": attack.objective}
