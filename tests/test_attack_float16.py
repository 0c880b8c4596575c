"""An attack in float16 is about as strong as in float32: no image is lost to underflow or overflow."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atlas_kernels import PGD, Execution, noise_key
from atlas_kernels.attacks import float16
from atlas_kernels.attacks.graphs import Graphs
from atlas_kernels.capture import Capture, cuda_graph
from atlas_kernels.compat import fast_adversarial, gairat, robust_overfitting, torchattacks, trades
from atlas_kernels.compat.awp import AdvWeightPerturb
from atlas_train.methods import Batch, State, build
from atlas_train.methods.double_backward import loss_gradient
from fake_graph import recorded

B, EPS = 128, 0.2


class Scaled(nn.Module):
    """A network with larger logits: the same classes, surer of them."""

    def __init__(self, net: nn.Module, scale: float, *, wide: bool = False) -> None:
        super().__init__()
        self.net, self.scale, self.wide = net, scale, wide

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x) * self.scale
        return z.float() if self.wide else z


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    """Four classes of bright quadrants, in noise."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(B) % 4
    quadrant = torch.zeros(B, 2, 2).view(B, 4).scatter_(1, y[:, None], 0.3).view(B, 1, 2, 2)
    x = quadrant.repeat_interleave(4, 2).repeat_interleave(4, 3) + 0.7 * torch.rand(B, 1, 8, 8, generator=g)
    return x, y


@pytest.fixture(scope="module")
def trained(images) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16),
        nn.ReLU(), nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    x, y = images
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    with torch.no_grad():  # the surest is sure to 1e-2: times 4 beyond float16, times 16 not beyond float32
        top = net.eval()(x).topk(2).values
        net[-1].weight.mul_(5 / (top[:, 0] - top[:, 1]).max())
        net[-1].bias.mul_(5 / (top[:, 0] - top[:, 1]).max())
    return net


@pytest.fixture
def case(trained, images, device) -> tuple[nn.Module, Tensor, Tensor]:
    return copy.deepcopy(trained).to(device), *(t.clone().to(device) for t in images)


def accuracy(net: nn.Module, mode: str, adv: Tensor, y: Tensor) -> float:
    net = copy.deepcopy(net).float().train(mode == "train")
    with torch.no_grad():
        return float((net(adv.float()).argmax(1) == y).double().mean())


def still(adv: Tensor, x: Tensor) -> Tensor:
    return (adv == x).flatten(1).all(1)


class _Rounded(torch.autograd.Function):
    """Off by a random share of at most ``size``, and so is the gradient."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, size: float, generator: torch.Generator) -> Tensor:
        ctx.how = size, generator
        return h * (1 + size * torch.empty_like(h).uniform_(-1, 1, generator=generator))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Rounded.forward(ctx, grad, *ctx.how), None, None


def close(mode: str, adv: Tensor, wide: Tensor, y: Tensor, slack: float, model: Scaled, attack: Any, bits: int) -> bool:
    """Whether the accuracies are as near as ``slack``; or as near, but for that, as those of float32 attacks of which
    each layer is rounded at random to so many bits, in the farthest of 24. Where samples are coupled, or a gradient
    is hardly there, rounding alone decides a few of the images: which, depends on the order of sums."""
    found, expected = (accuracy(model.net, mode, images, y) for images in (adv, wide))
    if abs(found - expected) <= slack:
        return True
    rounded, generator = copy.deepcopy(model), torch.Generator(y.device).manual_seed(0)
    for layer in rounded.net:
        layer.register_forward_hook(lambda module, args, out: _Rounded.apply(out, 2.0**-bits, generator))
    others = [accuracy(model.net, mode, attack(rounded), y) for _ in range(24)]
    return abs(found - expected) <= slack + max(abs(other - expected) for other in others)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
def test_16_bit_attacks_are_as_strong_as_in_float32(case, mode, scale) -> None:
    net, x, y = case
    model, attack = Scaled(net, scale), PGD(EPS, steps=5, random_start=False, attack_mode=mode)
    with Execution("fp32"):
        wide = attack(model, x, y)
    for precision, slack, bits in (("fp16", 2, 11), ("bf16", 4, 8)):
        with Execution(precision):
            adv = attack(model, x, y)
        assert not (still(adv, x) & ~still(wide, x)).any()
        assert close(mode, adv, wide, y, slack / B, model, lambda rounded: attack(rounded, x, y), bits)
    assert accuracy(net, mode, x, y) > 0.9 > accuracy(net, mode, wide, y) + 0.2, "an attack worth the name"


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("objective", ["ce", "margin", "dlr"])
def test_gradients_are_the_exact_ones_but_for_16_bits(case, mode, objective) -> None:
    net, x, y = case
    attack = PGD(EPS, steps=1, random_start=False, attack_mode=mode, objective=objective)
    model = Scaled(net, 8.0, wide=objective == "margin")
    exact = attack.last_gradient(copy.deepcopy(model).double(), x.double(), y).grad.flatten(1)
    with torch.autocast(x.device.type, torch.float16):
        grad = attack.last_gradient(model, x, y).grad
    assert grad.dtype == torch.float32
    error, size = (t.norm(dim=1) for t in (grad.double().flatten(1) - exact, exact))
    # A pixel changes by a rounding, and a row by a ReLU that is on in float16 and off in float64. In train mode a row
    # has terms of all others, which are rounded too.
    relative = error / (size if mode == "eval" else size.max())
    assert relative.median() < 0.01 and relative.max() < 0.5
    assert size.median() < 1e-6 or objective != "ce", "which float16 would not hold"


def test_each_power_of_two_is_undone(device) -> None:
    """Margins from 0 to 80 in one batch, through a linear model: no row is rounded more than another."""
    g = torch.Generator().manual_seed(0)
    net = nn.Linear(32, 3, device=device)
    x, y = torch.rand(64, 32, generator=g).to(device), torch.zeros(64, dtype=torch.int64, device=device)
    with torch.no_grad():
        net.weight.copy_(torch.randn(3, 32, generator=g))
        net.weight[0] += 8 * torch.rand(32, generator=g).to(device)
        x *= torch.linspace(0, 1, 64, device=device)[:, None]
    attack = PGD(EPS, steps=1, random_start=False)
    with torch.autocast(device.type, torch.float16):
        grad = attack.last_gradient(net, x, y).grad.double()
        z = net(x).double()
        p = z.softmax(1)
        exact = torch.cat([-p[:, 1:].sum(1, keepdim=True), p[:, 1:]], 1) @ net.weight.double()
    assert exact.abs().amax(1).min() < 1e-20
    assert ((grad - exact).norm(dim=1) / exact.norm(dim=1)).max() < 2e-3


def test_bfloat16_moves_what_float32_moves_by_denormal_numbers(device) -> None:
    """A margin of 86, and in between a derivative of 1e-4, which takes the gradient to 4e-42 before it rises again."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False, device=device), nn.Linear(2, 2, bias=False, device=device))
    with torch.no_grad():
        net[0].weight.copy_(1e6 * torch.eye(2))
        net[1].weight.copy_(torch.tensor([[86 / 750_000, 0.0], [0.0, 0.0]]))
    x, y = torch.tensor([[0.75, 0.5]], device=device), torch.tensor([0], device=device)
    attack = PGD(EPS, steps=1, random_start=False)
    if still(attack(net, x, y), x).any():
        pytest.skip("here float32 has no denormal numbers")
    for precision in ("bf16", "fp16"):
        with Execution(precision):
            adv, grad = attack(net, x, y), attack.last_gradient(net, x, y).grad
        assert not still(adv, x).any() and -1e-35 < grad[0, 0] < 0, precision


class _Passing(torch.autograd.Function):
    """The identity, whose derivative is said to be ``factor``, for the rows of which the first pixel is large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = torch.where(x.flatten(1)[:, 0] > 0.5, factor, 1.0).to(torch.float32)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (grad.float() * ctx.factor.view(-1, *[1] * (grad.ndim - 1))).to(grad.dtype), None


class Losing(nn.Module):
    """In float16 it loses some rows' gradients, or logits."""

    def __init__(self, net: nn.Module, how: str) -> None:
        super().__init__()
        self.net, self.how, self.passes = net, how, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        h = self.net[0](x)
        if self.how == "activations":
            top = torch.where(x.flatten(1)[:, 0] > 0.5, 1e5, 1.0).to(h.dtype).view(-1, 1, 1, 1)
            h = h * top * 100 / top / 100
        else:
            mark = torch.cat([x.flatten(1)[:, :1].to(h.dtype), h.flatten(1)], 1)
            mark = _Passing.apply(mark, {"vanishes": 1e-9, "overflows": 1e7}[self.how])
            h = mark[:, 1:].view_as(h)
        return self.net[1:](h)


LOSSES = ["vanishes", "overflows", "activations"]


@pytest.mark.parametrize("how", LOSSES)
def test_a_row_that_is_lost_is_computed_in_float32(case, how) -> None:
    net, x, y = case
    model, attack, lost = Losing(net, how), PGD(EPS, steps=3, random_start=False, norm="l2"), x[:, 0, 0, 0] > 0.5
    assert 0 < lost.sum() < B
    x[lost, 0, 0, 0] = 1 - 1e-6 * torch.arange(int(lost.sum()), device=x.device)
    x[~lost, 0, 0, 0] = 0
    with Execution("fp32"):
        wide = attack.run(model, x, y)
    model.passes = 0
    with Execution("fp16"):
        adv = attack(model, x, y)
    assert model.passes == 6
    torch.testing.assert_close(adv[lost], wide.adv[lost], rtol=0, atol=1e-6)
    assert not torch.equal(adv[~lost], wide.adv[~lost]) and not still(adv, x).any()
    with Execution("fp16"):
        counted = PGD(EPS, steps=3, random_start=False, count_correct=True).run(model, x, y).kappa
        judged = PGD(EPS, steps=3, random_start=False, keep="best").run(model, x, y)
    with Execution("fp32"):
        wanted = PGD(EPS, steps=3, random_start=False, count_correct=True).run(model, x, y).kappa
        best = PGD(EPS, steps=3, random_start=False, keep="best").run(model, x, y)
    assert torch.equal(counted[lost], wanted[lost]) and torch.equal(judged.fooled[lost], best.fooled[lost])
    # Logits that are not lost are those of float16: each of three layers rounds weights, inputs and outputs to 11 bits,
    # and the objective moves by at most twice as much as a logit.
    rounding = 0 if how == "activations" else 2 * 9 * 2**-11 * model(judged.adv).abs().max().item()
    torch.testing.assert_close(judged.objective[lost], best.objective[lost], rtol=1e-3, atol=1e-6 + rounding)


@pytest.mark.parametrize("how", LOSSES)
def test_references_and_judgements_are_finite(case, how) -> None:
    net, x, y = case
    model, attack = Losing(net, how), PGD(EPS, steps=2, restarts=2, objective="kl")
    x[::2, 0, 0, 0], x[1::2, 0, 0, 0] = 0.9, 0.1
    key = noise_key(x.device)
    with Execution("fp16"):
        found = attack.run(model, x, y, key=key)
    with Execution("fp32"):
        wide = attack.run(model, x, y, key=key)
    assert found.objective.isfinite().all()
    assert abs((found.fooled != wide.fooled).double().mean()) <= 0.05


@pytest.mark.parametrize("how", LOSSES)
def test_where_rows_are_coupled_the_batch_is_computed_anew_and_leaves_no_trace(case, how) -> None:
    net, x, y = case
    net.insert(6, nn.Dropout(0.2))
    model, attack = (
        Losing(net, how).train(),
        PGD(EPS, steps=2, random_start=False, attack_mode="train", update_buffers=True),
    )
    key, before = noise_key(x.device), copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    with Execution("fp16"):
        adv = attack(model, x, y, key=key)
    assert model.passes == 4 and not still(adv, x).any()
    assert torch.equal(torch.get_rng_state(), state)
    moved = copy.deepcopy(net.state_dict())
    assert moved["1.num_batches_tracked"] == before["1.num_batches_tracked"] + 2
    if how == "activations":
        return  # those that are infinite are in the running statistics, as without an attack
    net.load_state_dict(before)
    with Execution("fp32"):
        attack(model, x, y, key=key)
    torch.testing.assert_close(moved["1.running_mean"], net.state_dict()["1.running_mean"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_models_and_images_in_half_precision(case, mode) -> None:
    net, x, y = case
    attack = PGD(EPS, steps=3, random_start=False, attack_mode=mode)
    for model in (Scaled(net, 8.0), Losing(net, "vanishes")):
        wide = attack(model, x.half().float(), y)
        adv = attack(copy.deepcopy(model).half(), x.half(), y)
        assert adv.dtype == torch.float16 and not (still(adv, x.half()) & ~still(wide, x.half().float())).any()
        assert abs(accuracy(net, mode, adv, y) - accuracy(net, mode, wide, y)) <= 0.024


class Stubborn(Losing):
    """It has no kernel but for float16."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float16:
            raise RuntimeError(f"not implemented for {x.dtype}")
        return super().forward(x)


def test_a_model_that_cannot_run_in_float32_is_told_of(case) -> None:
    net, x, y = case
    with pytest.warns(UserWarning, match="the model does not run in float32"):
        PGD(EPS, steps=1)(Stubborn(net.half(), "vanishes"), x.half(), y)


def test_nothing_is_computed_again_for_nothing(case) -> None:
    """Where the objective is flat, as KL is at the image itself, float32 has no gradient either."""
    net, x, y = case
    model, attack = Losing(net, "overflows"), PGD(EPS, steps=1, objective="kl")
    model.how = "vanishes"
    with Execution("fp16"):
        attack(model, x * 0.4, start=x * 0.4)
    assert model.passes == 2


def dropped_in(name: str, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """x after a step of a drop-in's attack."""
    if name == "fast_adversarial":
        return x + fast_adversarial.attack_pgd(model, x, y, EPS, EPS, 1, 1)
    if name == "fast_adversarial fgsm":
        return x + fast_adversarial.attack_fgsm(model, x, y, EPS)
    if name.startswith("robust_overfitting"):
        return x + robust_overfitting.attack_pgd(model, x, y, 1.0, 1.0, 2, 1, name.split()[1], early_stop=True)
    if name == "gairat":
        return gairat.GA_PGD(model, x, y, EPS, EPS, 1, "cent", "Madry", False)[0]
    if name == "trades l_2":
        return trades.kl_adversary(model, x, trades.noise_near(x), EPS, 0.5, 2, "l_2")
    return getattr(torchattacks, name)(model, steps=2)(x, y)


@pytest.mark.parametrize("half", [False, True], ids=["autocast", "half"])
@pytest.mark.parametrize(
    "name",
    ["fast_adversarial", "fast_adversarial fgsm", "robust_overfitting l_2", "gairat", "trades l_2", "PGDL2", "MIFGSM"],
)
def test_drop_ins_go_where_they_go_in_float32(case, monkeypatch, name, half) -> None:
    net, x, y = case
    monkeypatch.setattr(robust_overfitting, "normalize", lambda images: images)
    x = x.half().float()
    model = Scaled(net, 4.0)
    torch.manual_seed(1)
    wide = dropped_in(name, model, x, y)
    torch.manual_seed(1)
    if half:
        adv = dropped_in(name, copy.deepcopy(model).half(), x.half(), y)
        assert adv.dtype == torch.float16
    else:
        with torch.autocast(x.device.type, torch.float16):
            adv = dropped_in(name, model, x, y)
    assert not (still(adv.float(), x) & ~still(wide, x)).any()
    along = nn.functional.cosine_similarity((adv.float() - x).flatten(1), (wide - x).flatten(1))
    assert along.median() > 0.9

    def again(rounded: nn.Module) -> Tensor:
        torch.manual_seed(1)
        return dropped_in(name, rounded, x, y)

    assert close("eval", adv, wide, y, 0.03, model, again, 11)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gradients_that_are_differentiated_again_are_as_exact_as_in_float32(case, mode) -> None:
    net, x, y = case
    model = Scaled(net, 6.0).train(mode == "train")
    for parameter in net.parameters():
        parameter.requires_grad_()
    labelled = Batch(x, y, torch.arange(len(y)))
    exact = loss_gradient(copy.deepcopy(model).double(), x.double(), labelled)[2].detach()
    wide = loss_gradient(copy.deepcopy(model), x, labelled)[2]
    with torch.autocast(x.device.type, torch.float16):
        grad = loss_gradient(model, x, labelled)[2]
    size = exact.flatten(1).norm(dim=1)
    errors = [(g - exact).flatten(1).norm(dim=1) / (size if mode == "eval" else size.max()) for g in (grad, wide)]
    assert errors[0].median() < errors[1].median() + 0.02
    (second,) = torch.autograd.grad(grad.flatten(1).norm(dim=1).sum(), net[0].weight)
    assert second.isfinite().all() and second.abs().max() > 0


@pytest.mark.parametrize("name", ["backward_smoothing", "llr"])
def test_training_methods_prepare_as_in_float32(case, name) -> None:
    net, x, y = case
    if name == "llr":  # whose step grows with the gradient, up to 1e-9 times the batch
        x, y = x[:4], y[:4]
    options = {"steps": 1, "step_size": 1.0} if name == "llr" else {"gamma": 0.01}
    method, model, key = build(name, EPS, options), Scaled(net, 8.0), noise_key(x.device)
    batch = Batch(x, y, torch.arange(len(x), device=x.device))
    wide = method.prepare(model, batch, key, State())
    with torch.autocast(x.device.type, torch.float16):
        found = method.prepare(model, batch, key, State())
    moved = [t if name == "llr" else t - x for t in (found, wide)]
    along = nn.functional.cosine_similarity(*(t.flatten(1) for t in moved))
    assert (along > 0.9).double().mean() > 0.95


@pytest.fixture
def graphs(device: torch.device) -> Execution:
    made = Execution("fp16", cuda_graphs=True)
    if device.type == "cpu":
        made.graphs = Graphs(recorded, "cpu")
    return made


@pytest.mark.parametrize("how", ["vanishes", "overflows"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_replay_that_loses_a_row_is_made_up_for(case, graphs, how, mode) -> None:
    net, x, y = case
    model = Losing(net, how)
    attack = PGD(EPS, steps=2, random_start=False, attack_mode=mode, update_buffers=mode == "train")
    dark = x.clone()
    dark[:, :, 0, 0] = 0  # of which nothing is lost
    for given in (dark, x, dark):
        before, model.passes = copy.deepcopy(net.state_dict()), 0
        with graphs:
            got = attack(model, given, y)
        count = net.state_dict()["1.num_batches_tracked"] - before["1.num_batches_tracked"]
        assert count == (2 if mode == "train" else 0)
        assert model.passes in ((4,) if given is x else (6, 0)), (
            "recorded once, then replayed, or replayed and repeated"
        )
        net.load_state_dict(before)
        with Execution("fp16"):
            torch.testing.assert_close(got, attack(model, given, y), rtol=0, atol=1e-6)
    assert graphs.graphs.recordings == 1


@pytest.mark.parametrize("half", [False, True])
def test_within_a_graph_of_others_it_is_float32(case, half) -> None:
    net, x, y = case
    model, attack = Scaled(net, 4.0), PGD(EPS, steps=2)
    wide, low = (x.half().float(), x.half()) if half else (x, x)
    key = noise_key(x.device)
    expected = attack(copy.deepcopy(model), wide, y, key=key)
    model = model.half() if half else model
    recorder: Callable[..., Any] = cuda_graph if x.is_cuda else recorded
    with Execution("keep" if half else "fp16"):
        graph = Capture(lambda *given: attack(model, *given[:2], key=given[2]), [low, y, key], recorder=recorder)
    # Iterates in float16 are rounded, and now and then a sign changes.
    different = (graph(low, y, key).float() - expected).abs() > (2e-3 if half else 1e-6)
    assert different.double().mean() <= (0.005 if half else 0)


class Far(nn.Module):
    """A body in float16, under an autocast of its own or by its weights, and a head in float32."""

    def __init__(self, net: nn.Module, how: str) -> None:
        super().__init__()
        self.body, self.how = copy.deepcopy(net[:7]), how
        torch.manual_seed(0)
        hidden, norm, last = nn.Linear(64, 64), nn.BatchNorm1d(64) if how == "half" else nn.LayerNorm(64), net[7]
        self.head = nn.Sequential(hidden, norm, nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        self.head.to(last.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "half":
            h = self.body(x.to(self.body[0].weight.dtype)).float()
        else:
            with torch.autocast(x.device.type, torch.float16, enabled=self.how == "autocast"):
                h = self.body(x)
            h = h.float()
        return self.head(h) * 40

    def fitted(self, x: Tensor, y: Tensor) -> Far:
        optimizer = torch.optim.Adam(self.parameters(), 3e-3)
        for _ in range(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(self(x) / 40, y).backward()
            optimizer.step()
        return self.eval()

    def made(self, how: str) -> nn.Module:
        """The same network, run as ``how`` says."""
        net = copy.deepcopy(self)
        net.how = how.split()[-1]
        if net.how == "half":
            net.body.half()
        return torch.compile(net, backend="aot_eager") if how.startswith("compiled") else net


FAR = ["autocast", "half", "compiled autocast", "compiled half"]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("how", FAR)
def test_float16_far_from_the_logits_is_attacked_as_strongly(case, how, norm) -> None:
    net, x, y = case
    wide = Far(net, "half" if how.endswith("half") else "fp32").fitted(x, y)
    wide, low = wide.made("fp32"), wide.made(how)
    attack = PGD(EPS if norm == "linf" else 1.0, steps=5, random_start=False, norm=norm)
    expected, adv = attack(wide, x, y), attack(low, x, y)
    assert not (still(adv, x) & ~still(expected, x)).any()
    assert abs(accuracy(wide, "eval", adv, y) - accuracy(wide, "eval", expected, y)) <= 0.024
    assert accuracy(wide, "eval", x, y) > 0.9 > accuracy(wide, "eval", expected, y) + 0.2


@pytest.mark.parametrize("how", FAR)
def test_within_a_graph_of_others_far_float16_is_float32_once_it_was_seen(case, how) -> None:
    net, x, y = case
    wide = Far(net, "half" if how.endswith("half") else "fp32").fitted(x, y)
    wide, low, attack = wide.made("fp32"), wide.made(how), PGD(EPS, steps=2, random_start=False)
    if how.endswith("half"):
        wide.body = copy.deepcopy(low.body).float()  # of weights rounded
    attack(low, x, y)
    assert float16.is_asked_for(low, x) and not float16.is_asked_for(wide, x)
    recorder: Callable[..., Any] = cuda_graph if x.is_cuda else recorded
    graph = Capture(lambda *given: attack(low, *given), [x, y], recorder=recorder)
    torch.testing.assert_close(graph(x, y), attack(wide, x, y), rtol=0, atol=1e-6)


def test_compiled_code_is_looked_into_once_and_leaves_no_trace(case) -> None:
    net, x, y = case
    model = Losing(nn.Sequential(*net[:6], nn.Dropout(0.2), *net[6:]), "activations").train()
    compiled = torch.compile(model, backend="aot_eager")
    leaf, buffers = x.requires_grad_(), copy.deepcopy(dict(model.named_buffers()))
    z = compiled(leaf)
    moved, passes = copy.deepcopy(dict(model.named_buffers())), model.passes
    assert not torch.equal(moved["net.1.running_mean"], buffers["net.1.running_mean"])
    state = torch.get_rng_state()
    assert not any(float16.is_used(compiled, leaf, z) for _ in range(3))
    assert model.passes == passes + 1 and torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(dict(model.named_buffers()), moved, rtol=0, atol=0)


class Own(nn.Module):
    """It runs in float16 whatever autocast is outside."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.float16):
            z = self.net(x)
        return torch.sigmoid(z.float()) * 8


@pytest.mark.parametrize("how", LOSSES)
def test_a_row_that_is_lost_under_an_autocast_within_is_computed_in_float32(case, how) -> None:
    net, x, y = case
    x[::2, 0, 0, 0], x[1::2, 0, 0, 0] = 0.9, 0.1
    model, attack = Own(Losing(net, how)), PGD(EPS, steps=3, random_start=False, norm="l2")
    adv = attack(model, x, y)
    wide = attack(nn.Sequential(net, nn.Sigmoid(), Scaled(nn.Identity(), 8.0)).eval(), x, y)
    torch.testing.assert_close(adv[::2], wide[::2], rtol=0, atol=1e-5)
    assert not still(adv, x).any() and not torch.equal(adv[1::2], wide[1::2])


def test_float16_is_seen_within_torchscript(device) -> None:
    x, y = torch.rand(4, 8, device=device), torch.arange(4, device=device)
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        low, wide = (torch.jit.trace(m.eval(), x) for m in (Own(plain), nn.Sequential(plain, nn.Sigmoid())))
    for model in (low, wide):
        for _ in range(3):  # the profiling of its executor
            leaf = x.clone().requires_grad_()
            z = model(leaf)
        assert float16.is_used(model, leaf, z) == (model is low)
    assert not still(PGD(EPS, steps=1, random_start=False)(low, x, y), x).any()


def test_float16_is_seen_where_it_is(case) -> None:
    net, x, y = case
    leaf = x.requires_grad_()
    assert not float16.is_used(net, leaf, net(leaf))
    with torch.autocast(x.device.type, torch.float16):
        z = net(leaf)
        assert float16.is_used(net, leaf, net(leaf).float())
    assert all(float16.is_used(net, leaf, made) for made in (z, z.float(), z.float().softmax(1).log() / 2))
    with torch.autocast(x.device.type, torch.bfloat16):
        assert not float16.is_used(net, leaf, net(leaf))
    loose = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, track_running_stats=False)).eval()
    assert float16.are_coupled(loose) and float16.are_coupled(net.train()) and not float16.are_coupled(net.eval())


def test_it_warns_of_nothing(case) -> None:
    net, x, y = case
    with warnings.catch_warnings(), Execution("fp16"):
        warnings.simplefilter("error")
        PGD(EPS, steps=2, restarts=2, compact=True)(Losing(net, "vanishes"), x, y)


def test_weights_are_perturbed_where_they_are_in_float32(case) -> None:
    net, x, y = case
    awp = AdvWeightPerturb(Scaled(net, 4.0), None, None, 0.01)
    wide = awp.calc_awp(x, y)
    with torch.autocast(x.device.type, torch.float16):
        found = awp.calc_awp(x, y)
    assert found.keys() == wide.keys()
    assert all(nn.functional.cosine_similarity(found[k].flatten(), wide[k].flatten(), 0) > 0.99 for k in wide)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_predictions_surer_than_float32_are_attacked_as_strongly(images, trained, precision):
    """Where a margin is above 104, 1 - p_y is 0 in float32."""
    x, y = images
    sure = Scaled(trained, 64.0, wide=True).eval()
    margin = sure(x).topk(2, dim=1).values
    assert (margin[:, 0] - margin[:, 1]).median() > 104
    attack = PGD(EPS, steps=10, random_start=False)
    with Execution(precision):
        adv = attack(sure, x, y)
    wide = copy.deepcopy(sure).double()
    found, exact = (wide(v.double()).argmax(1) != y for v in (adv, attack(wide, x.double(), y)))
    assert not (adv == x).flatten(1).all(1).any()
    assert abs(found.double().mean() - exact.double().mean()) <= 0.02
