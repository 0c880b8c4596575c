"""Many samples on their way through an attack: some are attacked together, the others wait for a place."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..layout import column
from .batch import Batch
from .objective import Model, never_alone

#: An attack's own numbers and tensors, each with a row for every sample of the batch.
State = dict[str, Tensor]
#: Asked about points that a search has found for a batch: (the points as they are to be kept, whether each fools).
Confirm = Callable[[Batch, Tensor], tuple[Tensor, Tensor]]

LOOK_EVERY = 4  # iterations on a GPU from one look at what is fooled, which waits for the device, to the next


class Machine(Protocol):
    """What a pool drives; see ``Search``."""

    @property
    def length(self) -> int: ...
    @property
    def passes(self) -> int: ...
    def rounds(self, classes: int) -> int: ...
    def begin(self, model: Model, batch: Batch, draw: Tensor) -> State: ...
    def advance(self, model: Model, batch: Batch, state: State) -> State: ...


class Pool:
    """The samples of ``batch``, whose clean logits it has: at most ``size`` are attacked together, and as some leave,
    others take their places.

    A sample leaves when it is fooled, or when a round is over; then it waits for its next round behind all others. So
    what it meets depends on its own rounds and iterations alone, and neither on ``size`` nor on who is beside it.

    adv, fooled, objective: what is known of every sample: where it is not fooled, the strongest point so far.

    Args:
        fooled: who need not be attacked.
        device: of the model; default: that of the images. Only the samples that are attacked lie there.
        confirm: asked about each sample that a search calls fooled; where it says no, the sample goes on.
        doubtful: it is asked about the strongest point of each round too, as the search may not see all that fools.
    """

    def __init__(
        self,
        search: Machine,
        batch: Batch,
        size: int,
        fooled: Tensor,
        *,
        device: torch.device | None = None,
        confirm: Confirm | None = None,
        doubtful: bool = False,
    ) -> None:
        assert batch.clean is not None
        self.search, self.batch, self.size = search, batch, max(1, size)
        self.confirm, self.doubtful = confirm, doubtful
        self.device = device or batch.x.device
        self.rounds = search.rounds(batch.clean.shape[1])
        self.adv, self.fooled = batch.x.clone(), fooled.clone()
        self.given = fooled
        self.objective = torch.where(fooled, torch.inf, -torch.inf).double()
        standing = (~fooled).nonzero()[:, 0].tolist()
        self.waiting = deque((row, 0) for row in standing if self.rounds)
        self.rows: list[int] = []  # in flight: which they are, their rounds and iterations, as the host knows them
        self.draws: list[int] = []
        self.numbers: list[int] = []
        self.state: State = {}
        self.here: Batch | None = None
        self.every = LOOK_EVERY if self.device.type == "cuda" else 1
        self.unseen = 0  # iterations since the last look
        self.before: dict[str, Any] | None = None  # where it stood when the turn that is under way began
        self.others = batch.x[:2].to(self.device)

    def run(self, model: Model) -> None:
        """Until no sample waits and none is attacked."""
        while self.turn(model):
            pass

    def turn(self, model: Model) -> bool:
        """One iteration of all that are in flight; False when all is done. If it is stopped half-way, ``saved`` still
        gives where the pool stood before it."""
        self.before = self._standing()
        going = self._turn(model)
        self.before = None
        return going

    def _turn(self, model: Model) -> bool:
        self._refill(model)
        if self.here is None:
            return bool(self.waiting)  # every sample that entered was fooled by its start
        before = self.state
        self.state = self.search.advance(never_alone(model, self.others), self.here, before)
        self.numbers = [number + 1 for number in self.numbers]
        if self.every > 1:  # a sample that has been fooled since the last look stays where it was
            was = before["fooled"]
            for name in {"adv", "objective"} & self.state.keys():
                old = before[name]
                self.state[name] = torch.where(column(was, old), old, self.state[name])
            self.state["fooled"] = was | self.state["fooled"]
        self.unseen += 1
        if self.unseen >= self.every or max(self.numbers) >= self.search.length:
            self._look()
        return True

    def _refill(self, model: Model) -> None:
        """Takes in samples that wait; while others are in flight, not before an eighth of the places is free."""
        free = self.size - len(self.rows)
        if not self.waiting or (self.rows and free * 8 < self.size):
            return
        entering = [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
        rows, draws = ([entry[i] for entry in entering] for i in (0, 1))
        new = self._gather(rows)
        draw = torch.tensor(draws, device=self.device)
        begun = self.search.begin(never_alone(model, self.others), new, draw)
        self.state = {name: torch.cat([self.state[name], begun[name]]) for name in begun} if self.rows else begun
        self.rows, self.draws, self.numbers = self.rows + rows, self.draws + draws, self.numbers + [0] * len(rows)
        self.batch.goal.learn(new.goal)
        self.here = self._gather(self.rows)
        self._look()  # a start may be an adversary

    def _gather(self, rows: Sequence[int]) -> Batch:
        return self.batch.rows(torch.tensor(rows, device=self.batch.x.device)).to(self.device)

    def _look(self) -> None:
        """Lets those go that are fooled or at the end of a round."""
        self.unseen = 0
        ended = [number >= self.search.length for number in self.numbers]
        fooled = self.state["fooled"].tolist()
        if self.confirm is not None:
            asked = [i for i, found in enumerate(fooled) if found or (ended[i] and self.doubtful)]
            if asked:
                self._ask(asked)
                fooled = self.state["fooled"].tolist()
        over = [found or end for found, end in zip(fooled, ended, strict=True)]
        if not any(over):
            return
        leaving, staying = ([i for i, out in enumerate(over) if out == which] for which in (True, False))
        self._keep(leaving)
        for i in leaving:
            if not fooled[i] and self.draws[i] + 1 < self.rounds:
                self.waiting.append((self.rows[i], self.draws[i] + 1))
        index = torch.tensor(staying, device=self.device, dtype=torch.int64)
        assert self.here is not None
        self.batch.goal.learn(self.here.goal)
        self.here = self.here.rows(index) if staying else None
        self.state = {name: held[index] for name, held in self.state.items()} if staying else {}
        self.rows, self.draws, self.numbers = (
            [held[i] for i in staying] for held in (self.rows, self.draws, self.numbers)
        )

    def _ask(self, asked: Sequence[int]) -> None:
        """Which of these are fooled indeed, and what is to be kept of them."""
        assert self.confirm is not None and self.here is not None
        which, adv = torch.tensor(asked, device=self.device), self.state["adv"]
        kept, fools = self.confirm(self.here.rows(which), adv[which])
        # Clones keep the layout of the images, which index_copy does not.
        self.state["adv"], self.state["fooled"] = adv.clone(), self.state["fooled"].clone()
        self.state["adv"][which] = torch.where(column(fools, kept), kept, adv[which])
        self.state["fooled"][which] = fools

    def _keep(self, leaving: Sequence[int]) -> None:
        """Notes what was found of these: what fools, else the strongest."""
        index, rows = torch.tensor(leaving, device=self.device), torch.tensor([self.rows[i] for i in leaving])
        rows = rows.to(self.fooled.device)
        adv, fooled = (self.state[name][index].to(rows.device) for name in ("adv", "fooled"))
        held = self.objective[rows]
        objective = self.state["objective"][index].to(held) if "objective" in self.state else held
        stronger = fooled | (objective >= held)
        self.adv[rows] = torch.where(column(stronger, adv), adv, self.adv[rows])
        self.objective[rows] = torch.where(stronger, objective, held)
        self.fooled[rows] |= fooled

    def left(self) -> int:
        """How many passes are left for all samples together, if no more of them are fooled."""
        waiting = sum(self.rounds - draw for _, draw in self.waiting)
        flying = sum(self.rounds - draw for draw in self.draws)
        return ((waiting + flying) * self.search.length - sum(self.numbers)) * self.search.passes

    def _standing(self) -> dict[str, Any]:
        """Where it stands; what it holds is not written to later."""
        return {
            "waiting": list(self.waiting), "rows": self.rows, "draws": self.draws, "numbers": self.numbers,
            "unseen": self.unseen, "state": dict(self.state), "fooled": self.fooled.clone(),
        }  # fmt: skip

    def saved(self) -> dict[str, Any]:
        """Where it stands, for ``restore``; of samples that are not fooled without their strongest points."""
        at = self.before or self._standing()
        state = {name: held.cpu() for name, held in at["state"].items()}
        adv = self.adv[at["fooled"] & ~self.given].cpu()
        return {**at, "state": state, "fooled": at["fooled"].cpu(), "adv": adv}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on where another pool of the same batch and search stood."""
        self.waiting = deque((row, draw) for row, draw in saved["waiting"])
        names = ("rows", "draws", "numbers", "unseen")
        self.rows, self.draws, self.numbers, self.unseen = (saved[name] for name in names)
        self.state = {name: held.to(self.device) for name, held in saved["state"].items()}
        self.fooled.copy_(saved["fooled"])
        self.adv[self.fooled & ~self.given] = saved["adv"].to(self.adv.device)
        self.here = self._gather(self.rows) if self.rows else None
