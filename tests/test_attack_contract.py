"""An attack leaves no trace: whatever the model, the mode and the surroundings, all is as it was but one key draw."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atlas_kernels import noise_key
from atlas_kernels.attacks import FGSM, PGD

EPS = 8 / 255
ATTACKS = {
    "pgd": PGD(EPS, steps=3),
    "fgsm": FGSM(EPS),
    "kl": PGD(EPS, steps=2, objective="kl"),
    "search": PGD(EPS, steps=3, restarts=2, keep="best", compact=True),
    "train": PGD(EPS, steps=2, attack_mode="train"),
    "train search": PGD(EPS, steps=2, restarts=2, attack_mode="train", compact=True),
    "keep": PGD(EPS, steps=2, keep="best", attack_mode="keep"),
}


class Net(nn.Module):
    """Convolution, BatchNorm, dropout: everything that an attack can upset."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.frozen_bn = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(4 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn(self.conv(x)))
        return self.head(self.dropout(self.frozen_bn(h)).flatten(1))


class Snapshot:
    """Everything about a model that must not change, tensors by identity, version and value."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modes = [module.training for module in model.modules()]
        self.tensors = [*model.parameters(), *model.buffers()]
        self.values = [t.detach().clone() for t in self.tensors]
        self.versions = [t._version for t in self.tensors]
        self.needs = [t.requires_grad for t in self.tensors]
        self.grads = [(t.grad, None if t.grad is None else t.grad.clone()) for t in self.tensors]

    def check(self) -> None:
        assert [module.training for module in self.model.modules()] == self.modes
        now = [*self.model.parameters(), *self.model.buffers()]
        assert all(a is b for a, b in zip(now, self.tensors, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(now, self.values, strict=True))
        assert [t._version for t in now] == self.versions
        assert [t.requires_grad for t in now] == self.needs
        for t, (grad, value) in zip(now, self.grads, strict=True):
            assert t.grad is grad
            assert grad is None or torch.equal(grad, value)


@pytest.fixture
def model(device: torch.device) -> Net:
    torch.manual_seed(0)
    model = Net().to(device)
    model.conv.bias.requires_grad_(False)
    model.frozen_bn.eval().requires_grad_(False)
    return model


@pytest.fixture
def x(device: torch.device) -> Tensor:
    return torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(1)).to(device)


@pytest.fixture
def y(device: torch.device) -> Tensor:
    return torch.arange(6, device=device) % 5


@pytest.fixture(params=ATTACKS)
def attack(request: pytest.FixtureRequest) -> PGD:
    return ATTACKS[request.param]


def random_state() -> Tensor:
    """Of the CPU and, where there is one, of the GPU."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]
    return torch.cat(states)


def check_result(adv: Tensor, x: Tensor, slack: float = 1e-7) -> None:
    """Detached, like x, in the ball and in range, and not just x again."""
    assert not adv.requires_grad and adv.grad_fn is None and not adv.is_inference()
    assert adv.dtype == x.dtype and adv.shape == x.shape and adv.stride() == x.stride()
    delta = (adv.double() - x.double()).abs().max()
    assert EPS / 2 < delta <= EPS + slack
    assert adv.min() >= 0 and adv.max() <= 1


# The behaviour matrix that other attack libraries were put through, row by row: each cell must be clean.


def test_parameters_get_no_gradient(attack: PGD, model: Net, x: Tensor, y: Tensor) -> None:
    before = Snapshot(model)
    attack(model, x, y)
    before.check()
    assert all(p.grad is None for p in model.parameters())


def test_gradients_of_the_user_are_kept(attack: PGD, model: Net, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x), y).backward()
    before = Snapshot(model)
    assert sum(grad is not None for grad, _ in before.grads) == 5
    attack(model, x, y)
    before.check()


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_batchnorm_statistics_are_kept(attack: PGD, model: Net, x: Tensor, y: Tensor, training: bool) -> None:
    model.train(training)
    model.frozen_bn.train(not training)
    seen = []
    for module in (model.bn, model.frozen_bn):
        module.register_forward_hook(lambda m, i, o: seen.append(m.training))
    before = Snapshot(model)
    attack(model, x, y)
    before.check()
    expected = {"eval": {False}, "train": {True}, "keep": {True, False}}[attack.attack_mode]
    assert set(seen) == expected


@pytest.mark.parametrize("update_buffers", [False, True])
def test_statistics_move_only_when_asked_to(model: Net, x: Tensor, y: Tensor, update_buffers: bool) -> None:
    attack = PGD(8 / 255, steps=3, attack_mode="train", update_buffers=update_buffers)
    counts = [m.num_batches_tracked for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [int(count) for count in counts]
    attack(model, x, y)
    after = [int(m.num_batches_tracked) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert after == [count + (3 if update_buffers else 0) for count in before] and after


@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode])
def test_inside_no_grad_and_inference_mode(
    attack: PGD, model: Net, x: Tensor, y: Tensor, surroundings: Callable[[], contextlib.AbstractContextManager]
) -> None:
    torch.manual_seed(5)
    expected = attack.run(model, x, y)
    torch.manual_seed(5)
    with surroundings():
        inside = attack.run(model, x.clone(), y.clone())  # in inference mode these are inference tensors
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (surroundings is torch.inference_mode)
    assert torch.equal(inside.adv, expected.adv)
    check_result(inside.adv, x)
    assert not inside.key.is_inference()
    if inside.objective is not None:
        assert not inside.objective.is_inference()
    model(inside.adv).sum().backward()  # and it is fit for training


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_result_is_like_the_images(
    attack: PGD, model: Net, x: Tensor, y: Tensor, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    x = x.to(dtype).contiguous(memory_format=memory_format)
    adv = attack(model.to(dtype), x, y)
    # A bfloat16 pixel is rounded to half a unit in its last place, and fp32 to that of 1.0.
    check_result(adv, x, slack=2**-9 if dtype == torch.bfloat16 else 1e-7)


@pytest.mark.parametrize("inside", [True, False])
def test_inside_autocast(attack: PGD, model: Net, x: Tensor, y: Tensor, inside: bool) -> None:
    """Also: the training forward that follows in the same region must find its weights' gradients."""
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        if inside:
            model(x).sum().backward()  # fills the weight cache
            model.zero_grad()
        before = Snapshot(model)
        adv = attack(model, x, y)
        before.check()
        z = model(adv)
        assert z.dtype == torch.bfloat16
    check_result(adv, x)
    F.cross_entropy(z.float(), y).backward()
    assert model.conv.weight.grad.abs().sum() > 0 and model.head.weight.grad.abs().sum() > 0


def test_a_bare_function_leaves_no_weights_in_the_autocast_cache(model: Net, x: Tensor, y: Tensor) -> None:
    """Its weights cannot be frozen, so autocast caches their casts, some of them without a graph."""
    attack = PGD(EPS, steps=1, attack_mode="keep", keep="best", objective="kl")
    model.eval()
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        attack(lambda v: model(v), x, y)
        with torch.no_grad():
            model.head.weight.mul_(2.0)  # an optimiser step: a stale cast would not know of it
        z = model(x)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        assert torch.equal(z, model(x))
    z.float().sum().backward()
    assert model.conv.weight.grad.abs().sum() > 0


def test_an_empty_batch_does_not_call_the_model(attack: PGD, model: Net, x: Tensor, y: Tensor) -> None:
    model.register_forward_hook(lambda *_: pytest.fail("called"))
    result = attack.run(model, x[:0], y[:0])
    assert result.adv.shape == (0, 3, 4, 4) and not result.adv.requires_grad
    judged = attack.restarts > 1 or attack.keep == "best"
    assert (result.fooled is not None) == judged
    if judged:
        assert result.fooled.shape == result.objective.shape == (0,)
    else:
        assert attack.compact or attack.last_gradient(model, x[:0], y[:0]).grad.shape == (0, 3, 4, 4)


def test_int32_labels(attack: PGD, model: Net, x: Tensor, y: Tensor) -> None:
    key = noise_key(x.device)
    assert torch.equal(attack(model, x, y.int(), key=key), attack(model, x, y, key=key))


# Beyond the matrix.


def test_the_users_tensors_are_untouched(attack: PGD, model: Net, x: Tensor, y: Tensor) -> None:
    x.requires_grad_()
    x.grad = torch.ones_like(x)
    reference = {"reference_logits": model(x)} if attack.objective == "kl" else {}
    kept = [(t, t.detach().clone(), t._version) for t in (x, y, x.grad, *reference.values())]
    adv = attack(model, x, y, **reference)
    assert all(torch.equal(t, value) and t._version == version for t, value, version in kept)
    assert x.requires_grad and x.is_leaf and x.grad is kept[2][0]
    check_result(adv, x)


def test_random_state_moves_by_one_key(attack: PGD, model: Net, x: Tensor, y: Tensor) -> None:
    """Dropout runs in the modes "train" and "keep"."""
    torch.manual_seed(7)
    noise_key(x.device)
    expected = random_state()
    torch.manual_seed(7)
    key = attack.run(model, x, y).key
    assert torch.equal(random_state(), expected)
    attack(model, x, y, key=key)
    assert torch.equal(random_state(), expected)


def test_a_replay_repeats_dropout(model: Net, x: Tensor, y: Tensor) -> None:
    attack = PGD(EPS, steps=2, attack_mode="train", random_start=False)
    first = attack.run(model, x, y)
    torch.rand(3)
    assert torch.equal(attack(model, x, y, key=first.key), first.adv)
    assert not torch.equal(attack(model, x, y), first.adv)


@pytest.mark.parametrize("calls", [0, 1])
def test_an_exception_leaves_no_trace(attack: PGD, model: Net, x: Tensor, y: Tensor, calls: int) -> None:
    count = [calls]

    def fail(*_: object) -> None:
        count[0] -= 1
        if count[0] < 0:
            raise KeyError("half-way")

    model.dropout.register_forward_hook(fail)
    before = Snapshot(model)
    torch.manual_seed(7)
    noise_key(x.device)
    state = random_state()
    torch.manual_seed(7)
    with torch.no_grad():
        with contextlib.suppress(KeyError):
            attack(model, x, y)
        assert not torch.is_grad_enabled()
    assert count[0] == -1 or attack.steps == calls == 1  # FGSM has no second forward
    before.check()
    assert torch.equal(random_state(), state)


@pytest.mark.parametrize("mode", ["train", "eval", "keep"])
def test_a_graph_recorded_before_stays_valid(model: Net, x: Tensor, y: Tensor, mode: str) -> None:
    """TRADES and others run the clean images first. Writing to the BatchNorm buffers would break that graph."""
    model.train()
    model.frozen_bn.eval()
    z = model(x)
    PGD(EPS, steps=2, attack_mode=mode)(model, x, y)
    z.sum().backward()
    assert model.conv.weight.grad is not None


def test_shared_buffers_stay_shared(model: Net, x: Tensor, y: Tensor) -> None:
    model.frozen_bn.running_mean = model.bn.running_mean
    same = []
    model.register_forward_hook(lambda m, i, o: same.append(m.frozen_bn.running_mean is m.bn.running_mean))
    before = Snapshot(model)
    PGD(EPS, steps=2, attack_mode="train")(model, x, y)
    before.check()
    assert same == [True, True]


class OwnLinear(torch.autograd.Function):
    """Computes its weight gradient only if asked, and says so."""

    asked: list[bool] = []

    @staticmethod
    def forward(ctx, x, weight):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        OwnLinear.asked.append(ctx.needs_input_grad[1])
        return g @ weight, g.T @ x if ctx.needs_input_grad[1] else None


def test_a_function_that_owns_weights_is_not_asked_for_their_gradient(x: Tensor, y: Tensor) -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return OwnLinear.apply(x.flatten(1), self.weight)

    model = Own(48, 5).to(x.device)
    OwnLinear.asked.clear()
    PGD(EPS, steps=2)(model, x, y)
    assert OwnLinear.asked == [False, False]
    model(x).sum().backward()
    assert OwnLinear.asked[-1] and model.weight.grad is not None


def test_hooks_fire_and_stay(attack: PGD, model: Net, x: Tensor, y: Tensor) -> None:
    """A hook may keep the iterates: nothing may be written into them later."""
    seen: list[tuple[Tensor, Tensor]] = []
    model.register_forward_pre_hook(lambda m, i: seen.append((i[0], i[0].detach().clone())))
    attack(model, x, y)
    assert len(seen) >= attack.steps and len(model._forward_pre_hooks) == 1
    assert all(torch.equal(kept, value) for kept, value in seen)


def test_overrides_of_train_are_not_called(x: Tensor, y: Tensor) -> None:
    class Merging(Net):
        def train(self, mode: bool = True) -> Merging:
            pytest.fail("train() was called")

    model = Merging().to(x.device)
    PGD(EPS, steps=1)(model, x, y)
    PGD(EPS, steps=1, attack_mode="train")(model, x, y)


def test_a_compiled_model(model: Net, x: Tensor, y: Tensor) -> None:
    compiled = torch.compile(model, backend="eager")
    key = noise_key(x.device)
    for attack in (PGD(EPS, steps=2), PGD(EPS, steps=2, attack_mode="train")):
        before = Snapshot(model)
        adv = attack(compiled, x, y, key=key)
        before.check()
        assert torch.equal(adv, attack(model, x, y, key=key))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model(model: Net, x: Tensor, y: Tensor) -> None:
    scripted = torch.jit.script(model)
    values = [t.clone() for t in scripted.state_dict().values()]
    modes = [module.training for module in scripted.modules()]
    check_result(PGD(EPS, steps=2, attack_mode="train")(scripted, x, y), x)
    assert all(torch.equal(a, b) for a, b in zip(values, scripted.state_dict().values(), strict=True))
    assert [module.training for module in scripted.modules()] == modes
