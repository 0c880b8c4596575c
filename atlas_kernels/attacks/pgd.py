"""Projected gradient descent in the l_inf, l2 or l1 ball (Madry et al. 2018, arXiv 1706.06083): a frozen dataclass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from ..checks import (
    class_indices,
    flag,
    per_channel,
    per_sample,
    require_float_images,
    require_images,
    require_like,
    require_noise,
)
from ..layout import compute_dtype
from ..noise import noise_key
from ..perturb import SPARSITY, pgd_step, random_start, require_sparsity
from ..schema import L1, LINF, NORMS
from .arguments import require_choice, require_count, require_radius
from .contract import ATTACK_MODES, leave_no_trace
from .execution import current_execution
from .objective import Model, Objective, never_alone

if TYPE_CHECKING:
    from typing_extensions import Unpack


_L1_FIRST, _L1_LAST = 2.0, 0.05  # default steps in l1, times eps


class AttackResult(NamedTuple):
    """Adversaries [B, ...], the noise key that replays them and, where the attack had to know, how strong they are.

    fooled (bool[B]: misclassified, or the target reached) and objective (float[B], larger is stronger, so negated if
    targeted) are None where knowing them would cost a forward, so they are there with restarts > 1 or keep="best";
    fooled needs labels too. kappa (int64[B]) is there with ``count_correct``.
    """

    adv: Tensor
    key: Tensor
    fooled: Tensor | None = None
    objective: Tensor | None = None
    kappa: Tensor | None = None


class Options(TypedDict, total=False):
    """What an attack may be told besides the images and labels; explained in ``PGD.run``."""

    reference_logits: Tensor | None
    start: Tensor | None
    key: Tensor | None
    ids: Tensor | None
    generator: torch.Generator | None


class LastStep(NamedTuple):
    """Where an attack stands just before its last step: the iterate, the input gradient there, and the noise key. The
    gradient through a network in float16 is float32."""

    adv: Tensor
    grad: Tensor
    key: Tensor


@dataclass(frozen=True)
class PGD:
    """Signed gradient steps (in l2 of the gradient over its norm, in l1 of its largest entries) from a uniform random
    start, each projected onto the ball and clipped to the image range.

    ``attack(model, x, y)`` gives the adversaries, detached, in x's dtype and layout; ``attack.run`` gives them with
    their noise key. The model maps images [B, ...] to logits [B, C], alone or in an object, a dict or a tuple (see
    ``outputs.py``), and is left as it was found (see ``contract.py``); under DistributedDataParallel pass the inner
    module. An attack costs ``steps`` forwards and as many backwards to the input alone; whatever costs more says so
    below.

    Args:
        eps: radius, a number or a tensor [B], in the unit of the images (8/255 for images in [0, 1]; on CIFAR-10 the
            usual l2 radius is 128/255, the usual l1 radius 12).
        step_size: a number or a tensor [B]. Default: 2.5 eps / steps; for one step eps, or 1.25 eps after a random
            start (Wong et al. 2020, arXiv 2001.03994); for several l1 steps from 2 eps down to eps / 20, by half a
            cosine; long steps first and short ones last, as in APGD-L1 (Croce & Hein 2021, arXiv 2103.01208).
        norm: of the ball: "linf", "l2" or "l1"; steps, starts and projections as in ``atlas_kernels.perturb``.
        sparsity: of l1 steps, as in ``pgd_step``. None: dense steps along the gradient.
        steps: gradient steps; 0 leaves the random start.
        restarts: independent random starts, of which the strongest wins per sample: fooled beats not fooled, then the
            larger objective. Above 1, each restart costs one more forward.
        random_start: start uniformly in the ball instead of at x.
        targeted: y holds the classes to reach, whose objective is descended.
        objective: "ce", "margin" or "dlr", the loss of that name (``cross_entropy``, ``margin_loss``, ``dlr_loss``) of
            y; or "kl", KL(p_ref || p(x_adv)) with p_ref from ``reference_logits`` (a constant; if not given, one more
            forward of x makes them). At x itself that KL has no gradient, so it needs a random start or reference
            logits from elsewhere.
        keep: "last", the final iterate; or "best", per sample the iterate of the largest objective from the start to
            the final one, which costs one more forward per restart.
        compact: a sample stays at its first iterate that is misclassified (or reaches its target) and is left out of
            all further forwards; in eval mode the other samples go on as without it (a last one that BatchNorm in train
            mode would see alone is run beside two that are done). With ``keep="best"`` too, that
            iterate wins. Costs a device synchronisation per step.
        count_correct: also count, per sample, the iterates before a step at which the prediction is right: GAIRAT's
            kappa (Zhang et al. 2021, arXiv 2010.01736, algorithm 1); for objective "kl" too it needs y. Not with
            restarts > 1, keep="best" or compact.
        attack_mode: mode of the model's modules during the attack: "eval", "train" (all of them) or "keep" (as found).
        update_buffers: in train mode, let the running statistics of BatchNorm move with every forward of the attack,
            as some published training code does; else the model works on copies of them.
        clip_min, clip_max: image range, numbers or one value per channel.

    Raises ValueError or TypeError, here or before the first forward, for arguments that make no sense; labels that are
    not classes of the model are found right after the first forward.
    """

    eps: float | Tensor
    step_size: float | Tensor | None = None
    steps: int = 10
    _: KW_ONLY
    norm: str = LINF
    sparsity: float | None = SPARSITY
    restarts: int = 1
    random_start: bool = True
    targeted: bool = False
    objective: str = "ce"
    keep: str = "last"
    compact: bool = False
    count_correct: bool = False
    attack_mode: str = "eval"
    update_buffers: bool = False
    clip_min: float | Tensor | Sequence[float] = 0.0
    clip_max: float | Tensor | Sequence[float] = 1.0

    def __post_init__(self) -> None:
        require_count("steps", self.steps, 0)
        require_count("restarts", self.restarts, 1)
        require_choice("objective", self.objective, ("ce", "kl", "margin", "dlr"))
        require_choice("keep", self.keep, ("last", "best"))
        require_choice("attack_mode", self.attack_mode, ATTACK_MODES)
        require_choice("norm", self.norm, NORMS)
        for name in ("random_start", "targeted", "compact", "count_correct", "update_buffers"):
            flag(name, getattr(self, name))
        require_sparsity(self.sparsity)
        # In l2 and l1 a radius adds up over the pixels.
        box = {"clip_min": self.clip_min, "clip_max": self.clip_max} if self.norm == LINF else {}
        require_radius("eps", self.eps, **box)
        if self.step_size is not None:
            require_radius("step_size", self.step_size)
        if self.targeted and self.objective == "kl":
            raise ValueError('targeted=True descends towards y: use objective="ce", "margin" or "dlr"')
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"restarts={self.restarts} from x repeat one attack: set random_start=True, or restarts=1")
        if self.count_correct and (self._judged or self.compact):
            raise ValueError('count_correct counts along one attack: restarts=1, keep="last", compact=False')

    def __call__(self, model: Model, x: Tensor, y: Tensor | None = None, **options: Unpack[Options]) -> Tensor:
        """The adversaries alone; arguments as in ``run``."""
        return self.run(model, x, y, **options).adv

    def run(
        self,
        model: Model,
        x: Tensor,
        y: Tensor | None = None,
        *,
        reference_logits: Tensor | None = None,
        start: Tensor | None = None,
        key: Tensor | None = None,
        ids: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> AttackResult:
        """Attack the images x [B, ...] (float, in [clip_min, clip_max]) with the labels y (integers [B]).

        reference_logits: [B, C], for objective "kl". start: like x, the first iterate in place of a random one or x,
        taken as it is (every later iterate is in ball and range). key: the noise key of an earlier result, to replay
        it; by default one is drawn from ``generator`` (default: the global one of x's device). ids: int64[B], the
        samples' numbers in the noise instead of their rows, so that a sample gets the same noise in whatever batch.
        """
        batch = self._batch(x, y, reference_logits, start, key, ids, generator)
        return current_execution().run(self, PGD._to_the_end, model, batch)

    def last_gradient(self, model: Model, x: Tensor, y: Tensor | None = None, **options: Unpack[Options]) -> LastStep:
        """All of ``run`` but the last step, for a caller who fuses that with more work; same arguments.

        ``pgd_step(adv, grad, x, eps, effective_step_size, norm=norm, descend=targeted)`` then makes what ``run``
        returns, and in l_inf ``pgd_step_neighbours`` with the same key samples around it. Raises ValueError for
        steps=0, restarts > 1, compact and keep="best".
        """
        if self.steps == 0 or self._judged or self.compact:
            raise ValueError('last_gradient needs steps >= 1, restarts=1, keep="last" and compact=False; else use run')
        return current_execution().run(self, PGD._to_the_last_gradient, model, self._batch(x, y, **options))

    @property
    def effective_step_size(self) -> float | Tensor:
        """``step_size``, or its default; where steps become shorter, the last one."""
        if self.step_size is not None:
            return self.step_size
        if self.steps <= 1:
            return self.eps * 1.25 if self.random_start else self.eps
        if self.norm == L1:
            return self.eps * _L1_LAST
        return self.eps * 2.5 / self.steps

    @property
    def _judged(self) -> bool:
        """Whether final iterates are judged, which takes one forward per restart."""
        return self.restarts > 1 or self.keep == "best"

    def _batch(
        self,
        x: Tensor,
        y: Tensor | None,
        reference_logits: Tensor | None = None,
        start: Tensor | None = None,
        key: Tensor | None = None,
        ids: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Batch:
        """Check what can be checked before the first forward, and draw the key."""
        if y is None and (self.objective != "kl" or self.restarts > 1 or self.compact or self.count_correct):
            raise ValueError(
                'y is missing: only objective="kl" with restarts=1, compact=False and count_correct=False does without '
                "labels"
            )
        if reference_logits is not None and self.objective != "kl":
            raise ValueError(f'reference_logits play no part in objective="{self.objective}": use objective="kl"')
        if self.objective == "kl" and reference_logits is None and start is None and not self.random_start:
            raise ValueError('objective="kl" has no gradient at x: set random_start=True or give reference_logits')
        if start is not None and self.restarts > 1:
            raise ValueError(
                f"restarts={self.restarts} from one start repeat one attack: leave start out, or restarts=1"
            )
        if key is not None and generator is not None:
            raise ValueError("key and generator are both given: a key already fixes the noise, so leave one out")
        require_float_images("x", x)
        clips = _numbers(per_channel("clip_min", self.clip_min, x), per_channel("clip_max", self.clip_max, x))
        radii = _numbers(per_sample("eps", self.eps, x), per_sample("step_size", self.effective_step_size, x))
        require_images(x, *clips)
        if start is not None:
            require_like("start", start, "x", x, dtype=True)
            start = start.detach()
        reference = None if reference_logits is None else reference_logits.detach()
        labels = None if y is None else class_indices("y", y, x)
        with torch.inference_mode(False):
            key = noise_key(x.device, generator=generator) if key is None else key
        require_noise(key, ids, x)
        goal = Objective(labels, reference, targeted=self.targeted, kind=self.objective)
        first = _L1_FIRST / _L1_LAST if self.norm == L1 and self.step_size is None and self.steps > 1 else 1.0
        how = self.norm, self.sparsity, first, self.random_start
        return Batch(x.detach(), start, goal, key, ids, *how, *radii, *clips)

    @contextmanager
    def _contract(self, model: Model, batch: Batch) -> Iterator[None]:
        """Open the contract, with what the objective needs besides the batch."""
        with leave_no_trace(model, self.attack_mode, batch.key, update_buffers=self.update_buffers):
            if self.count_correct:
                batch.goal.kappa = torch.zeros(len(batch.x), dtype=torch.int64, device=batch.x.device)
            if self.objective == "kl" and batch.goal.reference is None:
                batch.goal.reference = batch.goal.predict(model, batch.x)
            yield

    def _to_the_end(self, model: Model, batch: Batch) -> AttackResult:
        with self._contract(model, batch):
            if self._judged or self.compact:
                return self._search(model, batch)
            adv, grad = self._until_last_step(model, batch, sized=False)
            adv = adv if grad is None else batch.step(adv, grad)
            return AttackResult(adv, batch.key, kappa=batch.goal.kappa)

    def _to_the_last_gradient(self, model: Model, batch: Batch) -> LastStep:
        with self._contract(model, batch):
            adv, grad = self._until_last_step(model, batch, sized=True)
            assert grad is not None
            return LastStep(adv, grad, batch.key)

    def _until_last_step(self, model: Model, batch: Batch, *, sized: bool) -> tuple[Tensor, Tensor | None]:
        adv, grad = batch.start(0), None
        for done in range(self.steps):
            if grad is not None:
                adv = batch.step(adv, grad, (self.steps - done) / (self.steps - 1))
            _, grad = batch.goal.gradient(model, adv, sized=sized)
        return adv, grad

    def _search(self, model: Model, batch: Batch) -> AttackResult:
        """All restarts, each for the samples that still need it; the strongest iterate per sample."""
        model = never_alone(model, batch.x) if self.compact else model
        best = self._climb(model, batch, 0)
        for draw in range(1, self.restarts):
            rows = (~best.fooled).nonzero()[:, 0] if self.compact else batch.every_row()
            found = self._climb(model, batch.rows(rows) if self.compact else batch, draw)
            held_fooled, held = best.fooled[rows], best.objective[rows]
            stronger = (found.fooled & ~held_fooled) | ((found.fooled == held_fooled) & (found.objective > held))
            best.put(rows, found, stronger)
        if not self._judged:
            return AttackResult(best.adv, batch.key)
        return AttackResult(best.adv, batch.key, None if batch.goal.labels is None else best.fooled, best.objective)

    def _climb(self, model: Model, batch: Batch, draw: int) -> _Found:
        """One restart: what it keeps of every sample."""
        adv, rows = batch.start(draw), batch.every_row()
        best = _Found.nothing(adv)
        for left in reversed(range(self.steps)):
            z, grad = batch.goal.gradient(model, adv, sized=False)
            if self.compact or self.keep == "best":
                found = _Found(adv, *batch.goal.judge(z))
                best.put(rows, found, self._keeps(found, best.objective[rows]))
                if self.compact:
                    going = (~found.fooled).nonzero()[:, 0]
                    batch, rows, adv, grad = batch.rows(going), rows[going], adv[going], grad[going]
            adv = batch.step(adv, grad, left / max(1, self.steps - 1))
        found = _Found(adv, best.objective[rows], best.fooled[rows])
        if self._judged:
            found = _Found(adv, *batch.goal.judge(batch.goal.predict(model, adv)))
        last = torch.ones_like(found.fooled) if self.keep == "last" else self._keeps(found, best.objective[rows])
        best.put(rows, found, last)
        return best

    def _keeps(self, found: _Found, objective: Tensor) -> Tensor:
        """Which iterates replace what is kept so far, before the final one."""
        better = found.objective > objective if self.keep == "best" else torch.zeros_like(found.fooled)
        return better | found.fooled if self.compact else better


@dataclass(frozen=True)
class Batch:
    """The samples of one attack, or those that are still in it."""

    x: Tensor
    given_start: Tensor | None
    goal: Objective
    key: Tensor
    ids: Tensor | None
    norm: str
    sparsity: float | None
    first_step: float  # over the last one
    random_start: bool
    eps: float | Tensor
    step_size: float | Tensor  # of the last step
    clip_min: float | Tensor
    clip_max: float | Tensor

    def values(self) -> tuple[Any, ...]:
        """All that an attack is given, tensors and numbers."""
        goal = self.goal
        return (
            self.x, self.given_start, goal.labels, goal.reference, self.key, self.ids, self.eps, self.step_size,
            self.clip_min, self.clip_max,
        )  # fmt: skip

    def holding(self, tensors: Iterable[Tensor]) -> Batch:
        """The same with ``tensors`` in place of those in ``values``."""
        given = iter(tensors)
        x, start, labels, reference, key, ids, *numbers = (
            next(given) if isinstance(value, Tensor) else value for value in self.values()
        )
        goal = replace(self.goal, labels=labels, reference=reference)
        how = self.norm, self.sparsity, self.first_step, self.random_start
        return Batch(x, start, goal, key, ids, *how, *numbers)

    def start(self, draw: int) -> Tensor:
        if self.given_start is not None:
            return self.given_start.clone()
        if not self.random_start:
            return self.x.clone()
        return random_start(
            self.x, self.eps, norm=self.norm, key=self.key, ids=self.ids, draw=draw, clip_min=self.clip_min,
            clip_max=self.clip_max,
        )  # fmt: skip

    def step(self, adv: Tensor, grad: Tensor, left: float = 0.0) -> Tensor:
        """``left``: how much of the attack is still to come, from 1 at the first step to 0 at the last."""
        size = self.step_size
        if self.first_step != 1.0:
            size = size * (1.0 + (self.first_step - 1.0) * (1.0 - math.cos(math.pi * left)) / 2.0)
        # Not in place: a hook of the user's may have kept the iterate.
        return pgd_step(
            adv, grad, self.x, self.eps, size, norm=self.norm, sparsity=self.sparsity, clip_min=self.clip_min,
            clip_max=self.clip_max, descend=self.goal.targeted,
        )  # fmt: skip

    def every_row(self) -> Tensor:
        return torch.arange(len(self.x), device=self.x.device)

    def rows(self, index: Tensor) -> Batch:
        # Of the numbers the low 32 bits count; the base's alone, so that the sum fits 64.
        ids = (self.key[1] & 0xFFFFFFFF) + self.every_row() if self.ids is None else self.ids
        eps, step = (v[index] if isinstance(v, Tensor) else v for v in (self.eps, self.step_size))
        start = None if self.given_start is None else self.given_start[index]
        return replace(
            self,
            x=self.x[index],
            given_start=start,
            goal=self.goal.rows(index),
            ids=ids[index],
            eps=eps,
            step_size=step,
        )


class _Found(NamedTuple):
    """Iterates and how strong they are, per sample."""

    adv: Tensor
    objective: Tensor
    fooled: Tensor

    @classmethod
    def nothing(cls, adv: Tensor) -> _Found:
        objective = torch.full((len(adv),), -torch.inf, dtype=compute_dtype(adv.dtype), device=adv.device)
        return cls(adv.clone(), objective, torch.zeros_like(objective, dtype=torch.bool))

    def put(self, rows: Tensor, found: _Found, where: Tensor) -> None:
        """Take over what was found for ``rows``, where that is wanted."""
        for mine, theirs in zip(self, found, strict=True):
            wanted = where.view(-1, *[1] * (mine.ndim - 1))
            mine[rows] = torch.where(wanted, theirs.to(mine.dtype), mine[rows])


def _numbers(*values: tuple[float, Tensor | None]) -> list[float | Tensor]:
    """Numbers, or tensors of numbers, that no graph hangs on."""
    return [number if rows is None else rows.detach() for number, rows in values]
