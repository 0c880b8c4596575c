"""Methods that keep the forward at the start of their attack for the loss: ``methods.kept``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atlas_kernels import pgd_step, random_start
from atlas_train.descent import OptimizerDescent
from atlas_train.methods import AWP, Batch, Method, Metrics, State
from atlas_train.methods.kept import Given, KeptForward
from atlas_train.methods.terms import accuracy
from atlas_train.passes import count_passes
from atlas_train.step_graph import StepGraph
from beside_published import CLASSES, EPS, Steps, assert_same, case, ours, theirs
from fake_graph import recorded


@dataclass(frozen=True)
class Tied(KeptForward):
    """CE at x' plus a weight, which grows by epochs, times the squared distance of the two logits."""

    name: ClassVar[str] = "tied"

    def changing(self, state: State) -> tuple[float, ...]:
        return ((state.epoch + 1) / state.epochs,)

    def before_step(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> None:
        state.memory.setdefault("steps", torch.zeros(())).add_(1)

    def start(self, batch: Batch, key: Tensor, state: State) -> tuple[Tensor, Any]:
        return random_start(batch.x, self.eps, key=key, ids=batch.ids), None

    def adversary(self, batch: Batch, start: Tensor, known: Any, grad: Tensor, key: Tensor, state: State) -> Tensor:
        return pgd_step(start, grad, batch.x, self.eps, self.eps)

    def combine(self, start_logits: Tensor, adv_logits: Tensor, batch: Batch, given: Given) -> tuple[Tensor, Metrics]:
        apart = (adv_logits - start_logits).square().sum(1).mean()
        loss = self.ce(adv_logits, batch) + given.numbers[0] * apart
        return loss, {"clean": accuracy(start_logits, batch), "adv": accuracy(adv_logits, batch)}


def plain(
    model: nn.Module, x: Tensor, y: Tensor, start: Tensor, optimizer: Steps, *, weight: float = 1.0, smooth: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, with every gradient where it falls."""
    start = start.clone().requires_grad_()
    kept = model(start)
    grad = torch.autograd.grad(F.cross_entropy(kept, y, label_smoothing=smooth), start, retain_graph=True)[0]
    adv = (start + EPS * grad.sign()).detach()
    adv = torch.minimum(torch.maximum(adv, x - EPS), x + EPS).clamp(0, 1)
    logits = model(adv)
    loss = F.cross_entropy(logits, y, label_smoothing=smooth) + weight * ((logits - kept) ** 2).sum(1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return adv, loss.detach()


@pytest.mark.parametrize("smooth", [0.0, 0.4])
def test_loss_gradients_and_statistics_are_those_of_the_plain_formula(smooth: float) -> None:
    made = case()
    expected = theirs(plain, made, made.start(), weight=0.5, smooth=smooth)
    mine = ours(Tied(EPS, label_smoothing=smooth), made, State(epoch=1, epochs=4))
    assert_same(mine, expected, statistics=True)
    assert int(mine.model.bn1.num_batches_tracked) == 2


def test_the_attack_alone_makes_no_gradient_of_a_weight() -> None:
    made = case()
    model, asked = made.model.train(), []
    for weight in model.parameters():
        weight.register_hook(lambda grad: asked.append(grad))
    Tied(EPS).loss(model, made.batch, made.key)
    assert not asked and all(weight.grad is None for weight in model.parameters())


class Wide(nn.Sequential):
    """A first layer that costs next to nothing."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 1), nn.Conv2d(8, 64, 3), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(256, CLASSES)
        )


@pytest.mark.parametrize(
    ("method", "passes"), [(Tied(EPS), 7), (AWP(Tied(EPS), 0.01), 2 + 2 * 6), (AWP(Tied(EPS), 0.01, warmup=1), 7)]
)
def test_passes(method: Method, passes: int) -> None:
    """AWP takes the loss twice on one attack: one forward more, and the loss again."""
    made, model = case(), Wide().train()
    batch = made.batch._replace(x=made.batch.x.float())
    counted = count_passes(model, batch.x, lambda: method.step(model, batch, made.key, State(), Steps(model)))
    assert counted == pytest.approx(passes, abs=0.1)


def test_a_graph_reads_what_changes_and_what_is_made_before_a_step() -> None:
    """A weight that grows in every step makes no new graph, and ``before_step`` runs outside of it."""

    def trained(step: Callable[[Method, nn.Module], Any]) -> tuple[nn.Module, State]:
        made = case()
        model, state, method = made.model.train(), State(epochs=6), Tied(EPS)
        run = step(method, model)
        for epoch in range(6):
            state.epoch = epoch
            run(model, made.batch, made.key + epoch, state)
        return model, state

    def descent(model: nn.Module) -> OptimizerDescent:
        return OptimizerDescent(torch.optim.SGD(model.parameters(), 0.1, fused=True), lambda update: 0.125)

    def eager(method: Method, model: nn.Module) -> Any:
        made = descent(model)
        return lambda *given: method.step(*given, made)

    recordings: list[int] = []

    def graphs(method: Method, model: nn.Module) -> Any:
        def record(*args: Any, **how: Any) -> Any:
            recordings.append(1)
            return recorded(*args, **how)

        made = descent(model)
        step = StepGraph(method, made._optimizer, pytest.fail, record)
        return lambda *given: step(*given, made)

    (mine, state), (theirs_, other) = trained(graphs), trained(eager)
    assert len(recordings) == 1 and int(state.memory["steps"]) == int(other.memory["steps"]) == 6
    for name, value in theirs_.state_dict().items():
        assert torch.equal(mine.state_dict()[name], value), name
