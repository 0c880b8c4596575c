"""The kit that attacks are written with: this class has arguments, checks and the loop, and an attack adds its step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

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
from ..layout import column, compute_dtype
from ..noise import noise_key
from ..schema import LINF, NORMS
from .arguments import numbers, require_choice, require_count, require_radius
from .batch import AttackResult, Batch
from .contract import ATTACK_MODES
from .execution import run
from .objective import Model, Objective, never_alone

if TYPE_CHECKING:
    from typing_extensions import Unpack

Result = TypeVar("Result")


class Options(TypedDict, total=False):
    """What an attack may be told besides the images and labels; explained in ``Attack.run``."""

    reference_logits: Tensor | None
    start: Tensor | None
    key: Tensor | None
    ids: Tensor | None
    generator: torch.Generator | None


@dataclass(frozen=True)
class Attack:
    """An attack that takes steps along the input gradient: a frozen dataclass, of which ``step`` says what a step is.

    ``attack(model, x, y)`` gives the adversaries, detached, in x's dtype and layout; ``attack.run`` gives them with
    their noise key. The model maps images [B, ...] to logits [B, C], alone or in an object, a dict or a tuple (see
    ``outputs.py``), and is left as it was found (see ``contract.py``); under DistributedDataParallel pass the inner
    module. An attack costs ``steps`` forwards and as many backwards to the input alone; whatever costs more says so
    below.

    Args:
        eps: radius, a number or a tensor [B], in the unit of the images (8/255 for images in [0, 1]; on CIFAR-10 the
            usual l2 radius is 128/255, the usual l1 radius 12).
        step_size: a number or a tensor [B]. Default: 2.5 eps / steps, or what the attack says.
        norm: of the ball: "linf", "l2" or "l1"; steps, starts and projections as in ``atlas_kernels.perturb``.
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
            On CUDA an RNN of cuDNN has no backward in eval mode: set ``torch.backends.cudnn.enabled = False`` for it.
        update_buffers: in train mode, let the running statistics of BatchNorm move with every forward of the attack,
            as some published training code does; else the model works on copies of them.
        clip_min, clip_max: image range, numbers or one value per channel.

    Raises ValueError or TypeError, here or before the first forward, for arguments that make no sense; labels that are
    not classes of the model are found right after the first forward.

    A subclass defines ``step`` and, where they are not these, ``start`` and ``effective_step_size``. Its own fields are
    constants (numbers, names, switches). sized: whether its steps go by the size of a gradient, and not by its
    direction alone (see ``Objective.gradient``).
    """

    eps: float | Tensor
    step_size: float | Tensor | None = None
    steps: int = 10
    _: KW_ONLY
    norm: str = LINF
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

    sized: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_count("steps", self.steps, 0)
        require_count("restarts", self.restarts, 1)
        require_choice("objective", self.objective, ("ce", "kl", "margin", "dlr"))
        require_choice("keep", self.keep, ("last", "best"))
        require_choice("attack_mode", self.attack_mode, ATTACK_MODES)
        require_choice("norm", self.norm, NORMS)
        for name in ("random_start", "targeted", "compact", "count_correct", "update_buffers"):
            flag(name, getattr(self, name))
        # In l2 and l1 a radius adds up over the pixels.
        box = {"clip_min": self.clip_min, "clip_max": self.clip_max} if self.norm == LINF else {}
        require_radius("eps", self.eps, **box)
        if self.step_size is not None:
            require_radius("step_size", self.step_size)
        if self.targeted and self.objective == "kl":
            raise ValueError('targeted=True descends towards y: use objective="ce", "margin" or "dlr"')
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"restarts={self.restarts} from x repeat one attack: set random_start=True, or restarts=1")
        if self.count_correct and (self.judged or self.compact):
            raise ValueError('count_correct counts along one attack: restarts=1, keep="last", compact=False')

    def step(self, batch: Batch, adv: Tensor, grad: Tensor, carried: Any, left: float) -> tuple[Tensor, Any]:
        """The next iterate, in a tensor of its own, and what the loop carries to the next step.

        carried: what the step before gave as such, None at the first one of every restart: None, a tensor [B, ...], or
        a tuple or dict of such; it has the rows of ``batch``, whose samples grow fewer with ``compact``. left: how much
        of the attack is still to come, from 1 at the first step to 0 at the last.
        """
        raise NotImplementedError(f"{type(self).__name__} has no step(batch, adv, grad, carried, left): define it")

    def start(self, batch: Batch, draw: int) -> Tensor:
        """The first iterate of a restart, numbered from 0, in a tensor of its own."""
        return batch.start(draw)

    @property
    def effective_step_size(self) -> float | Tensor:
        """``step_size``, or its default; where steps become shorter, the last one."""
        return self.eps * 2.5 / max(1, self.steps) if self.step_size is None else self.step_size

    @property
    def judged(self) -> bool:
        """Whether final iterates are judged, which takes one forward per restart."""
        return self.restarts > 1 or self.keep == "best"

    def __call__(self, model: Model, x: Tensor, y: Tensor | None = None, **options: Unpack[Options]) -> Tensor:
        """The adversaries alone; arguments as in ``run``."""
        return self.run(model, x, y, **options).adv

    def run(self, model: Model, x: Tensor, y: Tensor | None = None, **options: Unpack[Options]) -> AttackResult:
        """Attack the images x [B, ...] (float, in [clip_min, clip_max]) with the labels y (integers [B]).

        reference_logits: [B, C], for objective "kl". start: like x, the first iterate in place of a random one or x,
        taken as it is (every later iterate is in ball and range). key: the noise key of an earlier result, to replay
        it; by default one is drawn from ``generator`` (default: the global one of x's device). ids: int64[B], the
        samples' numbers in the noise instead of their rows, so that a sample gets the same noise in whatever batch.
        """
        return self.on(model, self.batch(x, y, **options))

    def batch(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        reference_logits: Tensor | None = None,
        start: Tensor | None = None,
        key: Tensor | None = None,
        ids: Tensor | None = None,
        generator: torch.Generator | None = None,
        seeded: bool = True,
    ) -> Batch:
        """Check what can be checked before the first forward, and draw the key. A batch serves one attack.

        seeded: False for drop-ins that bring their start: random layers draw from the global state itself, and no key
        is drawn from it.
        """
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
        clips = numbers(per_channel("clip_min", self.clip_min, x), per_channel("clip_max", self.clip_max, x))
        radii = numbers(per_sample("eps", self.eps, x), per_sample("step_size", self.effective_step_size, x))
        require_images(x, *clips)
        if start is not None:
            require_like("start", start, "x", x, dtype=True)
            start = start.detach()
        reference = None if reference_logits is None else reference_logits.detach()
        labels = None if y is None else class_indices("y", y, x)
        with torch.inference_mode(False):
            if key is None and not seeded:
                key = torch.zeros(2, dtype=torch.int64, device=x.device)
            key = noise_key(x.device, generator=generator) if key is None else key
        require_noise(key, ids, x)
        goal = Objective(labels, reference, targeted=self.targeted, kind=self.objective)
        return Batch(x.detach(), start, goal, key, ids, seeded, self.norm, self.random_start, *radii, *clips)

    def on(self, model: Model, batch: Batch) -> AttackResult:
        """``run`` on a batch that ``batch`` has made, and that the caller may have changed."""
        return self.loop(Attack._to_the_end, model, batch)

    def loop(self, body: Callable[[Any, Model, Batch], Result], model: Model, batch: Batch) -> Result:
        """``body(self, model, batch)``, as the ``Execution`` around says, and with no trace left."""

        def whole(model: Model, batch: Batch) -> Result:
            goal = batch.goal
            if self.count_correct:
                goal.kappa = torch.zeros(len(batch.x), dtype=torch.int64, device=batch.x.device)
            if self.objective == "kl" and goal.reference is None:
                goal.reference = goal.predict(model, batch.x)
            return body(self, model, batch)

        def constant() -> Hashable:
            own = (getattr(self, f.name) for f in fields(self) if f.name not in _IN_BATCH)
            return type(self), body, self.step_size is None, *own

        no_graph = "compact=True waits for the device at every step; set compact=False" if self.compact else None
        return run(whole, model, batch, self.attack_mode, self.update_buffers, constant=constant, no_graph=no_graph)

    def begin(self, batch: Batch, draw: int = 0) -> Standing:
        """Where a restart begins."""
        return Standing(batch, self._iterate("start", self.start(batch, draw), batch))

    def climb(self, model: Model, at: Standing, *, sized: bool = False) -> Iterator[int]:
        """Takes all steps; ``at`` is where it stands. Before a step it says how many are left after that one; whoever
        looks on may then take samples out, or stop."""
        for left in reversed(range(self.steps)):
            at.logits, at.grad = at.batch.goal.gradient(model, at.adv, sized=sized or self.sized)
            yield left
            made = self.step(at.batch, at.adv, at.grad, at.carried, left / max(1, self.steps - 1))
            if not isinstance(made, tuple) or len(made) != 2:
                shown = "a tensor" if isinstance(made, Tensor) else f"{made!r:.40}"
                raise TypeError(f"{type(self).__name__}.step must give (iterate, carried), a tuple of two, got {shown}")
            at.adv, at.carried = self._iterate("step", made[0], at.batch), made[1]

    def _iterate(self, made_by: str, adv: Tensor, batch: Batch) -> Tensor:
        """What a subclass has made, without a graph. Raises TypeError or ValueError where it is no iterate."""
        if not isinstance(adv, Tensor):
            raise TypeError(f"{type(self).__name__}.{made_by} must give a tensor as iterate, got {type(adv).__name__}")
        x = batch.x
        if adv.shape != x.shape or adv.dtype != x.dtype:
            raise ValueError(
                f"{type(self).__name__}.{made_by} gave an iterate {list(adv.shape)} of {adv.dtype}, expected "
                f"{list(x.shape)} of {x.dtype}, as batch.x: batch.step and batch.inside make such"
            )
        return adv.detach() if adv.requires_grad else adv

    def _to_the_end(self, model: Model, batch: Batch) -> AttackResult:
        if self.judged or self.compact:
            return self._search(model, batch)
        at = self.begin(batch)
        for _ in self.climb(model, at):
            pass
        return AttackResult(at.adv, batch.key, kappa=batch.goal.kappa)

    def _search(self, model: Model, batch: Batch) -> AttackResult:
        """All restarts, each for the samples that still need it; the strongest iterate per sample."""
        model = never_alone(model, batch.x) if self.compact else model
        best = self._restart(model, batch, 0)
        for draw in range(1, self.restarts):
            rows = (~best.fooled).nonzero()[:, 0] if self.compact else batch.every_row()
            found = self._restart(model, batch.rows(rows) if self.compact else batch, draw)
            held_fooled, held = best.fooled[rows], best.objective[rows]
            stronger = (found.fooled & ~held_fooled) | ((found.fooled == held_fooled) & (found.objective > held))
            best.put(rows, found, stronger)
        if not self.judged:
            return AttackResult(best.adv, batch.key)
        return AttackResult(best.adv, batch.key, None if batch.goal.labels is None else best.fooled, best.objective)

    def _restart(self, model: Model, batch: Batch, draw: int) -> _Found:
        """What one restart keeps of every sample."""
        at, rows = self.begin(batch, draw), batch.every_row()
        best = _Found.nothing(at.adv)
        for _ in self.climb(model, at):
            if self.compact or self.keep == "best":
                found = _Found(at.adv, *at.batch.goal.judge(at.logits))
                best.put(rows, found, self._keeps(found, best.objective[rows]))
                if self.compact:
                    going = (~found.fooled).nonzero()[:, 0]
                    rows = rows[going]
                    at.keep_only(going)
        found = _Found(at.adv, best.objective[rows], best.fooled[rows])
        if self.judged:
            found = _Found(at.adv, *at.batch.goal.judge(at.batch.goal.predict(model, at.adv)))
        last = torch.ones_like(found.fooled) if self.keep == "last" else self._keeps(found, best.objective[rows])
        best.put(rows, found, last)
        return best

    def _keeps(self, found: _Found, objective: Tensor) -> Tensor:
        """Which iterates replace what is kept so far, before the final one."""
        better = found.objective > objective if self.keep == "best" else torch.zeros_like(found.fooled)
        return better | found.fooled if self.compact else better


@dataclass
class Standing:
    """Where an attack stands: the samples still in it, their iterates, the logits and gradients before a step, and what
    its steps carry."""

    batch: Batch
    adv: Tensor
    logits: Tensor = field(init=False)
    grad: Tensor = field(init=False)
    carried: Any = None

    def keep_only(self, rows: Tensor) -> None:
        """Take all other samples out of the attack."""
        self.batch, self.adv, self.grad = self.batch.rows(rows), self.adv[rows], self.grad[rows]
        if self.carried is not None:
            self.carried = tree_map_only(Tensor, lambda t: t[rows], self.carried)


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
            mine[rows] = torch.where(column(where, mine), theirs.to(mine.dtype), mine[rows])


#: Fields that the batch holds, checked.
_IN_BATCH = {"eps", "step_size", "clip_min", "clip_max"}
