"""FGSM and PGD: what they compute, cost and refuse. (What they leave alone is in test_attack_contract.py.)"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from atlas_kernels import noise_key, pgd_step, random_start
from atlas_kernels.attacks import FGSM, PGD
from atlas_kernels.attacks.objective import Objective
from atlas_kernels.outputs import predicted

EPS, CLASSES = 8 / 255, 4


def random(*shape: int, generator: torch.Generator, make: Callable[..., torch.Tensor] = torch.randn) -> torch.Tensor:
    """The same float64 numbers on every device."""
    numbers = make(*shape, generator=generator, dtype=torch.float64, device="cpu")
    return numbers.to(torch.get_default_device())


class Rowwise(nn.Module):
    """A small smooth net whose every row is computed alone, so that its bits do not depend on the batch."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(random(16, 48, generator=g).to(dtype) / 3)
        self.last = nn.Parameter(random(CLASSES, 16, generator=g).to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh((x.flatten(1)[:, None] * self.first).sum(-1))
        return (h[:, None] * self.last).sum(-1)


class Log:
    """Counts forwards and backwards and keeps every batch that the model sees, and its logits."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs: list[torch.Tensor] = []
        self.logits: list[torch.Tensor] = []
        self.backwards = 0
        model.register_forward_hook(self.note)

    def note(self, module: nn.Module, inputs: tuple[torch.Tensor], logits: torch.Tensor) -> None:
        self.inputs.append(inputs[0].detach())
        self.logits.append(logits.detach())
        if logits.requires_grad:
            logits.register_hook(self.count)

    def count(self, grad: torch.Tensor) -> None:
        self.backwards += 1


def images(batch: int = 8, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return random(batch, 3, 4, 4, generator=torch.Generator().manual_seed(1), make=torch.rand).to(dtype)


def labels(model: nn.Module, x: torch.Tensor, flipped: int = 0) -> torch.Tensor:
    """The model's own predictions, so that every sample starts out right, but for the first few."""
    y = model(x).argmax(1).detach()
    y[:flipped] = (y[:flipped] + 1) % CLASSES
    return y


def textbook(model, x, y, key, steps, step, *, draw=0, kind="ce", reference=None, start=True, active=None):
    """Iterates of PGD written the slow way: a loss graph, clamp and sign."""
    adv = random_start(x, EPS, key=key, draw=draw) if start else x.clone()
    iterates = [adv]
    for _ in range(steps):
        leaf = adv.clone().requires_grad_()
        z = model(leaf)
        if kind == "kl":
            loss = F.kl_div(F.log_softmax(z, 1), F.softmax(reference, 1), reduction="batchmean")
        else:
            loss = F.cross_entropy(z, y) * (-1 if kind == "targeted" else 1)
        grad = torch.autograd.grad(loss, leaf)[0]
        moved = (x + (adv + step * grad.sign() - x).clamp(-EPS, EPS)).clamp(0, 1)
        adv = moved if active is None else torch.where(active(z)[:, None, None, None], moved, adv)
        iterates.append(adv)
    return iterates


@pytest.fixture(autouse=True)
def default_device(device: torch.device) -> Iterator[None]:
    with device:
        yield


@pytest.fixture
def model(default_device: None) -> Rowwise:
    return Rowwise()


@pytest.fixture
def key(device: torch.device) -> torch.Tensor:
    return noise_key(device, generator=torch.Generator(device).manual_seed(3))


@pytest.mark.parametrize("kind", ["ce", "targeted", "kl"])
@pytest.mark.parametrize("start", [True, False])
def test_pgd_is_the_textbook_loop(model: Rowwise, key: torch.Tensor, kind: str, start: bool) -> None:
    x = images()
    y = labels(model, x)
    reference = random(8, CLASSES, generator=torch.Generator().manual_seed(5))
    target = (y + 1) % CLASSES
    attack = PGD(
        EPS, EPS / 3, 5, random_start=start, targeted=kind == "targeted", objective="kl" if kind == "kl" else "ce"
    )
    adv = attack(
        model, x, target if kind == "targeted" else y, key=key, reference_logits=reference if kind == "kl" else None
    )
    expected = textbook(
        model, x, target if kind == "targeted" else y, key, 5, EPS / 3, kind=kind, reference=reference, start=start
    )[-1]
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-12)


def test_the_attack_works(model: Rowwise) -> None:
    x = images()
    y = labels(model, x)
    clean, adv = (F.cross_entropy(model(v), y, reduction="none") for v in (x, PGD(EPS, steps=5)(model, x, y)))
    assert (adv > clean).all()
    target = (y + 1) % CLASSES
    away, towards = (
        F.cross_entropy(model(v), target, reduction="none") for v in (x, PGD(EPS, targeted=True)(model, x, target))
    )
    assert (towards < away).all()


@pytest.mark.parametrize(
    ("attack", "step"),
    [
        (PGD(0.1, steps=1), 0.125),
        (PGD(0.1, steps=1, random_start=False), 0.1),
        (PGD(0.1, steps=10), 0.025),
        (PGD(0.1, 0.3, 10), 0.3),
        (FGSM(0.1), 0.1),
        (FGSM(0.1, random_start=True), 0.125),
        (FGSM(0.1, step_size=0.07), 0.07),
    ],
)
def test_default_step_size(attack: PGD, step: float, model: Rowwise, key: torch.Tensor) -> None:
    assert attack.effective_step_size == pytest.approx(step)
    x = images() * 0.2 + 0.4  # no clip to [0, 1] in the way
    last = attack.last_gradient(model, x, labels(model, x), key=key)
    expected = (last.adv + step * last.grad.sign() - x).clamp(-0.1, 0.1) + x
    torch.testing.assert_close(attack(model, x, labels(model, x), key=key), expected)


def test_fgsm_is_one_step_of_pgd(model: Rowwise, key: torch.Tensor) -> None:
    x = images()
    y = labels(model, x)
    assert torch.equal(FGSM(EPS)(model, x, y), PGD(EPS, steps=1, random_start=False)(model, x, y))
    fast = FGSM(EPS, random_start=True, clip_max=2.0)
    assert torch.equal(fast(model, x, y, key=key), PGD(EPS, steps=1, clip_max=2.0)(model, x, y, key=key))
    with pytest.raises(TypeError):
        FGSM(EPS, steps=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("attack", "forwards", "backwards"),
    [
        (PGD(EPS, steps=4), 4, 4),
        (FGSM(EPS), 1, 1),
        (PGD(EPS, steps=0), 0, 0),
        (PGD(EPS, steps=4, objective="kl"), 5, 4),
        (PGD(EPS, steps=4, keep="best"), 5, 4),
        (PGD(EPS, steps=4, restarts=3), 15, 12),
        (PGD(EPS, steps=4, restarts=3, keep="best"), 15, 12),
        (PGD(EPS * 1e-6, steps=4, compact=True), 4, 4),  # nobody is fooled
        (PGD(EPS * 1e-6, steps=4, compact=True, restarts=2), 10, 8),
    ],
)
def test_cost(attack: PGD, forwards: int, backwards: int, model: Rowwise) -> None:
    x = images()
    y = labels(model, x)
    log = Log(model)
    result = attack.run(model, x, y)
    assert (len(log.inputs), log.backwards) == (forwards, backwards)
    known = attack.restarts > 1 or attack.keep == "best"
    assert (result.fooled is not None) == (result.objective is not None) == known


class Operators(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def syncs(attack: PGD, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> int:
    with Operators() as seen:
        attack(model, x, y)
    return sum("_local_scalar_dense" in name or "nonzero" in name or "equal" in name for name in seen.names)


@pytest.mark.parametrize("options", [{}, {"objective": "kl"}, {"keep": "best"}, {"restarts": 2}])
def test_no_host_sync(options: dict, model: Rowwise, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATLAS_CHECKS", "0")
    x = images()
    y = labels(model, x)
    short, long = (syncs(PGD(EPS, steps=steps, **options), model, x, y) for steps in (1, 6))
    assert short == long <= 1  # the one is the CPU's seed for random layers
    assert syncs(PGD(EPS, steps=6, compact=True), model, x, y) > 1  # the count can see one


@pytest.mark.gpu
def test_no_host_sync_says_cuda(model: Rowwise, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type != "cuda":
        pytest.skip("only CUDA can tell")
    monkeypatch.setenv("ATLAS_CHECKS", "0")
    x = images()
    y = labels(model, x)
    PGD(EPS)(model, x, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        PGD(EPS)(model, x, y)
        PGD(EPS, steps=3, restarts=2, keep="best")(model, x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_best_keeps_the_strongest_iterate(model: Rowwise, key: torch.Tensor) -> None:
    x = images(32)
    y = labels(model, x, flipped=4)
    log = Log(model)
    result = PGD(EPS, EPS * 1.9, 5, keep="best").run(model, x, y, key=key)  # so coarse a step overshoots
    seen = torch.stack([F.cross_entropy(z, y, reduction="none") for z in log.logits])
    strongest = seen.argmax(0)
    assert 0 < (strongest == 5).sum() < 32  # the final iterate wins for some
    torch.testing.assert_close(result.objective, seen.max(0).values)
    assert torch.equal(result.adv, torch.stack(log.inputs)[strongest, torch.arange(32)])
    assert torch.equal(result.fooled, model(result.adv).argmax(1) != y)


def test_best_by_kl_needs_no_labels(model: Rowwise, key: torch.Tensor) -> None:
    x = images()
    result = PGD(EPS, objective="kl", keep="best").run(model, x, key=key)
    assert result.fooled is None
    expected = F.kl_div(model(result.adv).log_softmax(1), model(x).log_softmax(1), reduction="none", log_target=True)
    torch.testing.assert_close(result.objective, expected.sum(1))
    with_labels = PGD(EPS, objective="kl", keep="best").run(model, x, labels(model, x), key=key)
    assert torch.equal(result.adv, with_labels.adv) and with_labels.fooled is not None


@pytest.mark.parametrize("targeted", [False, True])
def test_restarts_keep_the_strongest_end(model: Rowwise, key: torch.Tensor, targeted: bool) -> None:
    x = images(64)
    y = labels(model, x, flipped=4)
    y = (y + 1) % CLASSES if targeted else y
    kind = "targeted" if targeted else "ce"
    attack = PGD(EPS, EPS / 2, 2, restarts=3, targeted=targeted)
    ends = [textbook(model, x, y, key, 2, EPS / 2, draw=draw, kind=kind)[-1] for draw in range(3)]
    strength = torch.stack([F.cross_entropy(model(end), y, reduction="none") for end in ends])
    strength = -strength if targeted else strength
    fooled = torch.stack([(model(end).argmax(1) == y) == targeted for end in ends])
    winner = (strength + 1e3 * fooled).argmax(0)
    assert winner.unique().numel() == 3 and 0 < fooled.any(0).sum() < 64
    result = attack.run(model, x, y, key=key)
    torch.testing.assert_close(result.adv, torch.stack(ends)[winner, torch.arange(64)], rtol=0, atol=1e-12)
    assert torch.equal(result.fooled, fooled.any(0))
    torch.testing.assert_close(result.objective, strength.gather(0, winner[None])[0])


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("restarts", [1, 3])
def test_compact_is_an_attack_that_freezes_the_fooled(
    model: Rowwise, key: torch.Tensor, keep: str, restarts: int, with_ids: bool
) -> None:
    """Against the full batch, moved by ``pgd_step(active=...)``; the bits must be the same."""
    x = images(64)
    y = labels(model, x, flipped=5)
    ids = torch.arange(64).flip(0) * 7 if with_ids else None
    eps = torch.linspace(0.2, 1.2, 64, dtype=torch.float64) * EPS
    out, value, done = x.clone(), torch.full((64,), -torch.inf, dtype=torch.float64), torch.zeros(64, dtype=torch.bool)
    for draw in range(restarts):
        adv, best, best_value = random_start(x, eps, key=key, ids=ids, draw=draw), x.clone(), value.clone().fill_(-1)
        frozen = done.clone()
        for step in range(5):
            z, grad = Objective(y).gradient(model, adv)
            z = z.detach()
            ce = F.cross_entropy(z, y, reduction="none")
            better = ~frozen & ((ce > best_value) | (z.argmax(1) != y))
            best, best_value = torch.where(better[:, None, None, None], adv, best), torch.where(better, ce, best_value)
            frozen = frozen | (z.argmax(1) != y)
            if step < 4:
                adv = pgd_step(adv, grad, x, eps, eps / 3, active=~frozen)
        end, end_value = (adv, ce) if keep == "last" else (best, best_value)
        replace = ~done & ((frozen & ~done) | (end_value > value))
        out, value = torch.where(replace[:, None, None, None], end, out), torch.where(replace, end_value, value)
        done = done | frozen
    assert 5 < done.sum() < 64
    log = Log(model)
    attack = PGD(eps, eps / 3, 4, restarts=restarts, keep=keep, compact=True)
    result = attack.run(model, x, y, key=key, ids=ids)
    sizes = [len(batch) for batch in log.inputs]
    assert sizes[0] == 64 and sizes[1] <= 59 and sizes == sorted(sizes, reverse=True)
    assert torch.equal(result.adv, out)
    if attack.restarts > 1 or keep == "best":
        assert torch.equal(result.fooled, done)
        torch.testing.assert_close(result.objective, value)


def test_compact_stops_when_all_are_fooled(model: Rowwise) -> None:
    x = images()
    log = Log(model)
    start = PGD(EPS, steps=0).run(model, x, labels(model, x))
    y = (model(start.adv).argmax(1) + 1) % CLASSES
    log.inputs.clear()
    adv = PGD(EPS, compact=True, restarts=2)(model, x, y, key=start.key)
    assert torch.equal(adv, start.adv) and len(log.inputs) == 1


def test_per_sample_radii(model: Rowwise, key: torch.Tensor) -> None:
    x = images(4)
    y = labels(model, x)
    eps = torch.tensor([0.0, 0.01, 0.02, 0.1])
    step = torch.tensor([0.1, 0.002, 0.0, 0.05])
    adv = PGD(eps, step, 3)(model, x, y, key=key)
    assert torch.equal(adv[0], x[0])
    ids = torch.arange(4)
    for row in range(4):
        part = slice(row, row + 1)
        alone = PGD(float(eps[row]), float(step[row]), 3)(model, x[part], y[part], key=key, ids=ids[part])
        torch.testing.assert_close(alone[0], adv[row], rtol=0, atol=1e-8)  # eps was rounded to float32
    default = PGD(eps, steps=5)(model, x, y, key=key)
    assert ((default - x).abs().amax((1, 2, 3)) <= eps + 1e-12).all()


def test_replay_and_split(model: Rowwise, device: torch.device) -> None:
    x = images()
    y = labels(model, x)
    torch.manual_seed(0)
    attack = PGD(EPS, steps=3, restarts=2)
    whole, other = attack.run(model, x, y), attack.run(model, x, y)
    assert not torch.equal(whole.key, other.key) and not torch.equal(whole.adv, other.adv)
    assert torch.equal(attack.run(model, x, y, key=whole.key).adv, whole.adv)
    torch.manual_seed(0)
    assert torch.equal(attack(model, x, y), whole.adv)
    ids = torch.arange(8)
    halves = [attack(model, x[part], y[part], key=whole.key, ids=ids[part]) for part in (slice(0, 3), slice(3, 8))]
    assert torch.equal(torch.cat(halves), whole.adv)
    torch.manual_seed(0)
    own = [attack(model, x, y, generator=torch.Generator(device).manual_seed(9)) for _ in range(2)]
    assert torch.equal(*own)
    assert torch.equal(attack(model, x, y), whole.adv)  # the global generator did not move


@pytest.mark.parametrize("attack", [PGD(EPS, steps=3), FGSM(EPS), PGD(EPS, steps=2, targeted=True)])
def test_last_gradient_is_run_but_for_the_last_step(attack: PGD, model: Rowwise) -> None:
    x = images()
    y = labels(model, x)
    torch.manual_seed(0)
    adv, grad, key = attack.last_gradient(model, x, y)
    torch.manual_seed(0)
    result = attack.run(model, x, y)
    assert torch.equal(key, result.key) and not grad.requires_grad and not adv.requires_grad
    step = pgd_step(adv, grad, x, attack.eps, attack.effective_step_size, descend=attack.targeted)
    assert torch.equal(step, result.adv)
    torch.manual_seed(0)
    again = attack.before_last_step(model, attack.batch(x, y))
    assert all(map(torch.equal, again, (adv, grad, key)))


@pytest.mark.parametrize("options", [{"restarts": 2}, {"keep": "best"}, {"compact": True}, {"steps": 0}])
def test_last_gradient_refuses_what_has_no_single_last_step(options: dict, model: Rowwise) -> None:
    with pytest.raises(ValueError, match="use run"):
        PGD(EPS, **options).last_gradient(model, images(), labels(model, images()))
    with pytest.raises(ValueError, match="use run"):
        PGD(EPS, **options).before_last_step(model, PGD(EPS, **options).batch(images(), labels(model, images())))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_cotangent_is_the_gradient_of_the_loss(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    z = (random(6, CLASSES, generator=g) * 3).to(dtype)
    reference = (random(6, CLASSES, generator=g) * 3).to(dtype)
    y = torch.arange(6) % CLASSES
    wide = z.double().requires_grad_()
    ce = F.cross_entropy(wide, y, reduction="none")
    kl = F.kl_div(wide.log_softmax(1), reference.double().log_softmax(1), reduction="none", log_target=True).sum(1)
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 1e-6}
    for objective, loss in ((Objective(y), ce), (Objective(y, reference, kind="kl"), kl)):
        cotangent = objective.cotangent(z)
        assert cotangent.dtype == dtype
        expected = torch.autograd.grad(loss.sum(), wide, retain_graph=True)[0]
        torch.testing.assert_close(cotangent.double(), expected, **tolerance)
        value, fooled = objective.judge(z)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(value.double(), loss.detach(), rtol=1e-5, atol=1e-5)
        assert torch.equal(fooled, z.argmax(1) != y)
    value, fooled = Objective(y, targeted=True).judge(z)
    torch.testing.assert_close(value.double(), -ce.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(fooled, z.argmax(1) == y)


def test_confident_bfloat16_logits_still_have_a_direction() -> None:
    z = torch.tensor([[8.0, 0.0, 0.0, 0.0]], dtype=torch.bfloat16)
    cotangent = Objective(torch.tensor([0])).cotangent(z)
    assert cotangent[0, 0] < 0  # in bfloat16 the softmax is 1 and p - 1 is 0


def test_kl_reference_is_made_once_and_is_constant(model: Rowwise, key: torch.Tensor) -> None:
    x = images()
    attack = PGD(EPS, steps=3, objective="kl")
    z = model(x)
    log = Log(model)
    given = attack(model, x, key=key, reference_logits=z)  # with its graph: no gradient may reach it
    assert len(log.inputs) == 3 and not given.requires_grad
    assert torch.equal(attack(model, x, key=key), given)
    assert torch.equal(log.inputs[3], x) and len(log.inputs) == 7


def test_a_nan_gradient_does_not_move_its_pixel() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.register_hook(lambda g: g.index_fill(1, torch.tensor([1], device=g.device), torch.nan))
            return x.sum((2, 3))

    x, y = images() * 0.5 + 0.25, torch.zeros(8, dtype=torch.int64)
    adv = PGD(EPS, random_start=False)(Broken(), x, y)
    assert torch.equal(adv[:, 1], x[:, 1])
    assert (adv[:, 0] != x[:, 0]).all() and (adv[:, 2] != x[:, 2]).all()


def test_other_ranges(model: Rowwise, key: torch.Tensor) -> None:
    x = images() * 255
    adv = PGD(8, clip_max=255.0)(model, x, labels(model, x), key=key)
    assert adv.min() >= 0 and adv.max() <= 255 and 7.99 < (adv - x).abs().max() <= 8 + 1e-9
    low, high = [-2.0, -1.0, 0.0], torch.tensor([1.0, 2.0, 3.0])
    bounds = [torch.as_tensor(b).view(3, 1, 1) for b in (low, high)]
    x = bounds[0] + images() * (bounds[1] - bounds[0])
    adv = PGD(2.0, clip_min=low, clip_max=high)(model, x, labels(model, x), key=key)
    assert (adv >= bounds[0]).all() and (adv <= bounds[1]).all() and (adv == bounds[0]).any()


SWITCHES = ("random_start", "targeted", "compact", "count_correct", "update_buffers")


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
@pytest.mark.parametrize("options", [{}, {"restarts": 2, "compact": True, "keep": "best"}])
def test_any_integer_labels(dtype: torch.dtype, options: dict, model: Rowwise, key: torch.Tensor) -> None:
    x = images()
    y = labels(model, x)
    attack = PGD(EPS, steps=2, **options)
    assert torch.equal(attack(model, x, y.to(dtype), key=key), attack(model, x, y, key=key))


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (None, ValueError, "y is missing"),
        (torch.zeros(8), TypeError, "y .*float32"),
        (torch.zeros(7, dtype=torch.int64), ValueError, r"y .*\[7\].*\[8\]"),
        (torch.zeros(8, 4, dtype=torch.int64), ValueError, r"y .*\[8, 4\]"),
        (torch.tensor([0, 1, 2, 3, 4, 5, 0, 0]), ValueError, r"y\[4\] = 4"),
        (torch.tensor([0, -1, 2, 3, 0, 0, 0, 0]), ValueError, r"y\[1\] = -1"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"objective": "kl", "compact": True}])
def test_bad_labels(y, error, message: str, options: dict, model: Rowwise) -> None:  # type: ignore[no-untyped-def]
    log = Log(model)
    with pytest.raises(error, match=message):
        PGD(EPS, **options)(model, images(), y if y is None else y.to(torch.get_default_device()))
    assert len(log.inputs) == (1 if "=" in message else 0)


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (images() + 0.5, ValueError),
        (images() - 0.5, ValueError),
        (images() * torch.nan, ValueError),
        ((images() * 255).to(torch.uint8), TypeError),
        (images().numpy(), TypeError),
    ],
)
def test_bad_images(x, error, model: Rowwise) -> None:  # type: ignore[no-untyped-def]
    log = Log(model)
    with pytest.raises(error, match="^x "):
        PGD(EPS)(model, x, torch.zeros(8, dtype=torch.int64))
    assert not log.inputs


def test_the_error_says_how_far_images_lie_outside(model: Rowwise) -> None:
    x = images()
    for worst, message in (
        (1 + 1.2e-7, r", 1.00000012\], up to 1.2e-07 outside .*= \[0, 1\]; pass x.clamp\(0, 1\)$"),
        (-0.05, r"in \[-0.05, .*up to 0.05 outside .*; pass x.clamp\(0, 1\)$"),
        (-1.0, "up to 1 outside .*; normalisation belongs inside the model$"),
        (255.0, "up to 2.5e.02 outside .*; images in 0..255 must be divided by 255"),
    ):
        x.view(-1)[3] = worst
        with pytest.raises(ValueError, match=message):
            PGD(EPS)(model, x, torch.zeros(8, dtype=torch.int64))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": -0.1}, ValueError, "eps"),
        ({"eps": float("nan")}, ValueError, "eps"),
        ({"eps": float("inf"), "clip_max": 9}, ValueError, "eps"),
        ({"eps": 8}, ValueError, "8/255"),
        ({"eps": torch.tensor([0.1, 8.0])}, ValueError, "8/255"),
        ({"eps": torch.tensor([0.1, -1.0])}, ValueError, "eps"),
        ({"eps": "8/255"}, TypeError, "eps"),
        ({"eps": True}, TypeError, "eps"),
        ({"step_size": -0.1}, ValueError, "step_size"),
        ({"step_size": "2/255"}, TypeError, "step_size"),
        ({"steps": -1}, ValueError, "steps"),
        ({"steps": 2.0}, TypeError, "steps"),
        ({"restarts": 0}, ValueError, "restarts"),
        ({"restarts": 2, "random_start": False}, ValueError, "random_start"),
        ({"objective": "kld"}, ValueError, "did you mean 'kl'"),
        ({"keep": "Best"}, ValueError, "did you mean 'best'"),
        ({"attack_mode": "evaluate"}, ValueError, "did you mean 'eval'"),
        ({"objective": "kl", "targeted": True}, ValueError, "targeted"),
        ({"norm": "inf"}, ValueError, "did you mean 'linf'"),
        ({"steps": 2**70}, ValueError, "steps must be an integer of at most"),
        ({"steps": True}, TypeError, "steps must be an integer, got True"),
        ({"eps": torch.ones(8).to_sparse()}, TypeError, "eps must be a strided tensor"),
        *(({name: "no"}, TypeError, f"{name} must be True or False, got 'no'") for name in SWITCHES),
    ],
)
def test_bad_attacks(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PGD(**{"eps": EPS, **options})


@pytest.mark.parametrize(
    ("attack", "options", "error", "message"),
    [
        (PGD(torch.full((3,), EPS)), {}, ValueError, "eps"),
        (PGD(EPS, torch.full((3,), EPS)), {}, ValueError, "step_size"),
        (PGD(EPS, clip_min=[0.0, 0.0]), {}, ValueError, "clip_min"),
        (PGD(EPS), {"reference_logits": torch.zeros(8, CLASSES)}, ValueError, "reference_logits"),
        (PGD(EPS, objective="kl", random_start=False), {}, ValueError, "random_start"),
        (PGD(EPS), {"key": torch.zeros(2, dtype=torch.int64), "generator": torch.Generator()}, ValueError, "generator"),
        (PGD(EPS, random_start=False), {"key": torch.zeros(2)}, ValueError, "key"),
        (PGD(EPS, random_start=False), {"ids": torch.arange(3)}, ValueError, "ids"),
        (PGD(EPS), {"seed": 0}, TypeError, "seed"),
    ],
)
def test_bad_calls(attack: PGD, options: dict, error, message: str, model: Rowwise) -> None:  # type: ignore[no-untyped-def]
    x = images()
    y = labels(model, x)
    log = Log(model)
    with pytest.raises(error, match=message):
        attack(model, x, y, **options)
    assert not log.inputs


def test_bad_models(model: Rowwise) -> None:
    x = images()
    y = labels(model, x)
    for bad, error, message in (
        (lambda v: {"out": model(v)}, TypeError, r"\['out'\]"),
        (lambda v: model(v)[0], TypeError, r"\[4\]"),
        (lambda v: model(v.detach()).detach(), RuntimeError, "no gradient"),
    ):
        with pytest.raises(error, match=message):
            PGD(EPS, attack_mode="keep")(bad, x, y)
    with pytest.raises(ValueError, match="reference_logits"):
        PGD(EPS, objective="kl")(model, x, reference_logits=torch.zeros(8, CLASSES + 1))
    with pytest.raises(TypeError, match=r"put what the function does into the forward of a torch\.nn\.Module"):
        PGD(EPS)(lambda v: model(v), x, y)


def test_a_start_of_the_callers_own_is_taken_as_it_is_and_projected_after_the_first_step(model: Rowwise) -> None:
    x = images().to(next(model.parameters()).device)
    y = labels(model, x)
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    start = x + 0.5
    adv = PGD(EPS, EPS / 4, 2)(model, x, y, start=start)
    assert torch.equal(seen[0], start) and (seen[1] - x).abs().max() <= EPS + 1e-6
    with pytest.raises(ValueError, match="start has shape"):
        PGD(EPS)(model, x, y, start=start[:1])
    with pytest.raises(ValueError, match="restarts=2 from one start"):
        PGD(EPS, restarts=2)(model, x, y, start=start)
    assert (adv - x).abs().max() <= EPS + 1e-6


@pytest.mark.parametrize("objective", ["ce", "kl"])
def test_kappa_counts_the_iterates_before_a_step_that_are_right(model: Rowwise, objective: str) -> None:
    x = images().to(next(model.parameters()).device)
    y = labels(model, x, flipped=2)
    right: list[torch.Tensor] = []
    attack = PGD(EPS, EPS / 4, 5, objective=objective, count_correct=True)
    reference = {"reference_logits": model(x).detach()} if objective == "kl" else {}
    hook = model.register_forward_hook(lambda module, args, logits: right.append(logits.argmax(1) == y))
    result = attack.run(model, x, y, **reference)
    hook.remove()
    assert result.kappa is not None and len(right) == 5
    assert torch.equal(result.kappa, torch.stack(right).sum(0)) and 0 < result.kappa.sum() < 5 * len(x)
    with pytest.raises(ValueError, match="count_correct counts along one attack"):
        PGD(EPS, restarts=2, count_correct=True)
    with pytest.raises(ValueError, match="y is missing.*count_correct=False"):
        PGD(EPS, objective="kl", count_correct=True)(model, x)


@pytest.mark.parametrize("options", [{}, {"keep": "best"}, {"restarts": 3, "random_start": True}])
def test_compact_in_train_mode_down_to_one_sample(options: dict[str, Any]) -> None:
    """BatchNorm has no statistics of one, so it is run beside two of those that are done, which stay as they are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))
    x, sizes = torch.rand(6, 1, 8, 8), []
    y = (model(x).argmax(1) + 1) % CLASSES
    y[2] = (y[2] - 1) % CLASSES  # the only one that is right
    attack = PGD(1e-3, steps=4, compact=True, attack_mode="train", **{"random_start": False, **options})
    model[1].register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    moved = (attack(model, x, y) - x).abs().flatten(1).amax(1)
    assert sizes[:2] == [6, 3] and min(sizes) == 3
    assert 5e-4 < moved[2] <= 1e-3 + 1e-7
    assert attack.random_start or moved[[0, 1, 3, 4, 5]].max() == 0
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        attack(model, x[2:3], y[2:3])


@pytest.mark.parametrize("options", [{"keep": "best"}, {"restarts": 2}, {"keep": "best", "compact": True}], ids=str)
def test_where_the_logits_are_nan_a_sample_counts_as_fooled(options):
    x = random(8, 1, 4, 4, generator=torch.Generator().manual_seed(0), make=torch.rand).float()
    x[:, 0, 0, 0] = torch.tensor([0.9, 0.1]).repeat(4)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    y = linear(x).argmax(1)

    def model(v):
        return torch.where(v[:, 0, :1, 0] > 0.5, torch.nan, linear(v))

    result = PGD(0.01, steps=3, attack_mode="keep", **options).run(model, x, y)
    assert result.fooled.tolist()[::2] == [True] * 4
    assert torch.equal(result.fooled[1::2], linear(result.adv).argmax(1)[1::2] != y[1::2])


@pytest.mark.parametrize("kind", ["ce", "margin", "dlr", "ce_targeted"])
def test_who_is_fooled_is_what_is_predicted(kind: str) -> None:
    """Also where logits are equal, infinite or NaN: an infinite one of the label is right, and nothing is weaker."""
    g = torch.Generator().manual_seed(0)
    z = torch.randint(3, (4000, CLASSES), generator=g).float()
    y = torch.randint(CLASSES, (4000,), generator=g)
    for share, number in ((0.05, torch.inf), (0.05, -torch.inf), (0.02, torch.nan)):
        z[torch.rand(z.shape, generator=g) < share] = number
    value, fooled = Objective(y, kind=kind, targets=(y + 1) % CLASSES if kind == "ce_targeted" else None).judge(z)
    assert torch.equal(fooled, predicted(z) != y)
    infinite = ~fooled & z.gather(1, y[:, None])[:, 0].isposinf()
    assert infinite.any() and not value.isnan().any()
    assert kind == "ce_targeted" or value[infinite].isneginf().all()
    assert value[z.isnan().any(1)].isposinf().all()
