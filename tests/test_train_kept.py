"""Methods that keep the forward at the start of their attack for the loss: ``methods.kept``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atlas_kernels import pgd_step, random_start
from atlas_train.descent import OptimizerDescent
from atlas_train.methods import ADV, ATLAS, AWP, GAT, Batch, Curriculum, Method, Metrics, Mixing, State
from atlas_train.methods.kept import Given, KeptForward
from atlas_train.methods.terms import accuracy
from atlas_train.passes import count_passes
from atlas_train.recompute import Recomputed
from atlas_train.step_graph import StepGraph
from beside_published import CLASSES, EPS, Case, Steps, assert_same, case, close, ours, theirs
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


@dataclass(frozen=True)
class InTurns(Tied):
    """Every second step is of another kind."""

    def variant(self, state: State) -> int:
        return state.step % 2

    def parts(self, state: State) -> list[tuple[float, Method]]:
        return [(0.25, Tied(self.eps)), (0.75, ADV(self.eps))]


@pytest.mark.parametrize(
    ("around", "kinds"),
    [
        (lambda inner: AWP(inner, 0.01), [(0.25, AWP, Tied), (0.75, AWP, ADV)]),
        (lambda inner: Mixing(inner, "cutmix", 1.0), [(0.25, Mixing, Tied), (0.75, Mixing, ADV)]),
        (lambda inner: Curriculum(inner, eps_warmup=2), [(0.25, Tied, Tied), (0.75, ADV, ADV)]),
    ],
    ids=["awp", "mixing", "curriculum"],
)
def test_what_is_around_a_method_hands_on_what_it_says(around: Callable[[Method], Method], kinds: Any) -> None:
    made, method = case(), around(InTurns(EPS))
    state = State(step=3, epoch=1, epochs=4)
    assert method.changing(state) == (0.5,)
    assert method.variant(state) != method.variant(State(step=4, epoch=1, epochs=4))
    method.step(made.model.train(), made.batch, made.key, state, Steps(made.model))
    assert int(state.memory["steps"]) == 1
    found = [(share, type(part), type(getattr(part, "method", part))) for share, part in method.parts(state)]
    assert found == kinds
    assert all(part.eps == method.parts(state)[0][1].eps for _, part in method.parts(state))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "method", [Tied(EPS), Curriculum(Tied(EPS), eps_warmup=1), Mixing(Tied(EPS, label_smoothing=0.3), "mixup", 1.0)]
)
def test_the_kept_forward_is_that_of_the_parts(method: Method, mode: str) -> None:
    """``loss``, and ``objective`` on what ``prepare`` makes: in each wrapper and in the mode that the network is in."""
    made, outcomes = case(), []
    for parts in (False, True):
        model = copy.deepcopy(made.model).train(mode == "train")
        batch = method.mixed(made.batch, made.key) if isinstance(method, Mixing) else made.batch
        state = State(epoch=1, epochs=4)
        inner: Any = method.method if isinstance(method, Mixing) else method
        if parts:
            loss, _ = inner.objective(model, batch, inner.prepare(model, batch, made.key, state))
        else:
            loss, _ = method.loss(model, made.batch, made.key, state)
        loss.backward()
        outcomes.append([loss, *(p.grad for p in model.parameters()), *model.buffers()])
    for a, b in zip(*outcomes, strict=True):
        close(a.detach(), b.detach(), "part", 1e-12)


def test_mixed_images_have_two_labels_in_attack_and_loss() -> None:
    made = case()
    method = Mixing(Tied(EPS, label_smoothing=0.3), "mixup", 1.0)
    batch = method.mixed(made.batch, made.key)
    first, second = (F.one_hot(y, CLASSES).double() for y in (batch.y, batch.second))
    mixed = Case(made.model, batch, made.key)
    labels = batch.share * first + (1 - batch.share) * second
    expected = theirs(
        lambda model, x, y, start, steps: plain(model, x, labels, start, steps, weight=0.5, smooth=0.3),
        mixed,
        mixed.start(),
    )
    assert_same(ours(method, made, State(epoch=1, epochs=4)), expected, statistics=True)


def test_bf16_by_autocast() -> None:
    made = case()
    dtypes, losses = [], []
    batch = made.batch._replace(x=made.batch.x.float())
    for low in (False, True):
        model = copy.deepcopy(made.model).float().train()
        model.conv2.register_forward_hook(lambda *given: dtypes.append(given[2].dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss, _ = Tied(EPS).step(model, batch, made.key, State(), Steps(model))
        assert loss.dtype == torch.float32 and all(p.isfinite().all() for p in model.parameters())
        losses.append(float(loss))
    assert dtypes == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_recomputation_changes_nothing() -> None:
    """A backward for the attack and one for the loss each run the blocks again; statistics move once all the same."""
    made = case()
    layers = [made.model.conv1, made.model.bn1, nn.ReLU(), made.model.conv2, made.model.bn2, nn.Dropout(0.3)]
    made.model = nn.Sequential(
        nn.Sequential(*layers[:3]), nn.Sequential(*layers[3:]), nn.Flatten(), made.model.linear
    ).train()  # type: ignore[assignment]
    outcomes = []
    for again in (False, True):
        model = copy.deepcopy(made.model)
        forwards: list[int] = []
        model[1][0].register_forward_hook(lambda *given, forwards=forwards: forwards.append(1))
        torch.manual_seed(3)
        steps = Steps(model)
        with Recomputed(model) if again else nullcontext():
            loss, _ = Tied(EPS).step(model, made.batch, made.key, State(), steps)
        outcomes.append([loss, *(g for grads in steps.grads for g in grads), *model.buffers()])
        assert len(forwards) == (5 if again else 2)
    for a, b in zip(*outcomes, strict=True):
        close(a, b, "recomputed", 1e-12)


LIVING: list[nn.Module] = []


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "method",
    [
        Tied(EPS),
        AWP(Tied(EPS), 0.01),
        GAT(EPS),
        GAT(EPS, attack_mode="train", bn_compat=True),
        ATLAS(EPS, local="start", steps=2, iterates="all", keep="all"),
        ATLAS(EPS, local="start", steps=2, iterates="all"),
        ATLAS(EPS, local="start", keep="none"),
    ],
    ids=["kept", "awp", "clean kept", "clean kept, bn_compat", "two kept", "one of two kept", "none kept"],
)
def test_distributed_data_parallel(group: None, method: Method) -> None:
    """With its defaults it writes all buffers before a forward, which a second one of a step must not see."""
    made, outcomes, written = case(), [], []
    for wrapped in (False, True):
        inner = copy.deepcopy(made.model).train()
        model: Any = nn.parallel.DistributedDataParallel(inner) if wrapped else inner
        LIVING.append(model)  # its end could wait for gloo's thread for ever

        def as_on_other_ranks(inner: nn.Module = inner) -> None:
            written.append(1)
            for buffer in inner.buffers():
                buffer.add_(0)

        model._sync_buffers = as_on_other_ranks
        steps = Steps(inner)
        loss, _ = method.step(model, made.batch, made.key, State(), steps)
        outcomes.append([loss, *(g for grads in steps.grads for g in grads), *inner.buffers()])
        assert not wrapped or model.require_forward_param_sync
    assert len(written) == 1
    for a, b in zip(*outcomes, strict=True):
        close(a, b, "distributed", 1e-12)


@pytest.mark.parametrize("how", ["whole", "a part", "in place"])
def test_a_compiled_network(how: str) -> None:
    """Its backward makes all gradients and frees its buffers: there a second forward at the start costs less."""
    made, outcomes = case(), []
    torch._dynamo.reset()
    for compiled in (False, True):
        model: Any = copy.deepcopy(made.model).train()
        network = model
        if compiled and how == "whole":
            network = torch.compile(model, backend="aot_eager")
        elif compiled and how == "a part":
            model.conv2 = torch.compile(model.conv2, backend="aot_eager")
        elif compiled:
            model.compile(backend="aot_eager")
        steps, asked = Steps(model), []
        model.linear.weight.register_hook(lambda grad, asked=asked: asked.append(1))
        loss, _ = Tied(EPS).step(network, made.batch, made.key, State(), steps)
        outcomes.append([loss, *(g for grads in steps.grads for g in grads), *model.buffers()])
        assert len(asked) == 1
    torch._dynamo.reset()
    for a, b in zip(*outcomes, strict=True):
        close(a, b, "compiled", 1e-9)


def test_features_instead_of_logits_are_refused() -> None:
    made = case()
    made.model.forward = lambda x: made.model.conv1(x)  # type: ignore[method-assign]
    with pytest.raises(TypeError, match=r"must return logits \[8, classes\], got shape \[8, 6, 6, 6\]"):
        Tied(EPS).loss(made.model, made.batch, made.key)
