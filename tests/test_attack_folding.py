"""BatchNorm folded into the layer before it, and weights cast once: the same attack, and no trace left."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atlas_kernels import PGD, Execution
from atlas_kernels.attacks import leave_no_trace
from atlas_kernels.compat.awp import AdvWeightPerturb
from atlas_train.models import build
from test_attack_contract import Snapshot, random_state

EPS = 8 / 255


class Then(nn.Module):
    """Parts, and what is done with them."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.head = nn.LazyLinear(5)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self._forward(self, x).flatten(1))


def then(forward: Callable[..., Tensor], **parts: nn.Module) -> Callable[[], nn.Module]:
    """Makes a network of copies of the parts."""
    return lambda: Then(forward, **{name: copy.deepcopy(part) for name, part in parts.items()})


def conv_bn(layer: nn.Module, norm: nn.Module | None = None) -> Callable[[], nn.Module]:
    norm = norm or nn.BatchNorm2d(6)
    return then(lambda net, x: F.elu(net.bn(net.conv(x))), conv=layer, bn=norm)


def ready(make: Callable[[], nn.Module], x: Tensor, dtype: torch.dtype = torch.float64) -> nn.Module:
    """In train mode, with BatchNorms that have seen and learnt something."""
    torch.manual_seed(0)
    model = make().to(x.device, dtype)
    model.eval()(x.to(dtype))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    nn.init.uniform_(tensor, 0.5, 2.0)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p)  # SmallCNN's head
    return model.train()


class Calls(TorchDispatchMode):
    """Counts forwards of BatchNorm, and casts of parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.norms, self.casts = 0, 0
        self._parameters = {id(p) for p in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        self.norms += "batch_norm" in name and "backward" not in name
        self.casts += "_to_copy" in name and any(id(leaf) in self._parameters for leaf in tree_leaves(args))
        return func(*args, **(kwargs or {}))


def norms_run(execution: Execution, model: nn.Module, x: Tensor, mode: str = "eval") -> int:
    """BatchNorm calls of a forward of an attack on a network that has been seen before."""
    with execution, leave_no_trace(model, mode, None):
        model(x)
        with Calls(model) as calls:
            model(x)
    return calls.norms


def passes(execution: Execution, model: nn.Module, x: Tensor, mode: str = "eval") -> tuple[Tensor, Tensor]:
    """Logits and an input gradient."""
    with execution, leave_no_trace(model, mode, None):
        leaf = x.clone().requires_grad_()
        z = model(leaf)
        return z.detach(), torch.autograd.grad(z.square().sum(), leaf)[0]


def check_equal(execution: Execution, model: nn.Module, x: Tensor, mode: str = "eval") -> None:
    """Twice: what folds is known from the first attack on."""
    for _ in range(2):
        before, state = Snapshot(model), {module: dict(vars(module)) for module in model.modules()}
        expected, got = passes(Execution(), model, x, mode), passes(execution, model, x, mode)
        before.check()
        assert all(vars(module) == was and list(vars(module)) == list(was) for module, was in state.items())
        for a, b in zip(got, expected, strict=True):
            assert (a - b).abs().max() <= 1e-12 * b.abs().max() and b.abs().max() > 1e-3


class Basic(nn.Module):
    """A block of ResNet with a shortcut that has its own BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.shortcut = nn.Sequential(nn.Conv2d(3, 6, 1, stride=2, bias=False), nn.BatchNorm2d(6))
        self.head = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(6 * 16, 5))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 3:
            raise ValueError("3 channels")
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.head(self.bn2(self.conv2(out)) + self.shortcut(x))


IMAGES, GREY, SIGNAL, VOLUME = (4, 3, 8, 8), (2, 1, 28, 28), (4, 3, 9), (4, 3, 4, 4, 4)
CONV = nn.Conv2d(3, 6, 3)
COLOUR = {"num_classes": 5, "in_channels": 3, "width": 4, "normalize": ((0.5,) * 3, (0.25,) * 3)}
#: Network, shape of its images, BatchNorms that run before and after folding.
FOLDING = {
    "preact_resnet18": (lambda: build("preact_resnet18", **COLOUR), IMAGES, 17, 9),
    "digits_net": (lambda: build("digits_net", **COLOUR), IMAGES, 2, 0),
    "basic": (Basic, IMAGES, 3, 0),
    "bias": (conv_bn(CONV), IMAGES, 1, 0),
    "no bias": (conv_bn(nn.Conv2d(3, 6, 3, bias=False)), IMAGES, 1, 0),
    "groups": (conv_bn(nn.Conv2d(3, 6, 3, groups=3)), IMAGES, 1, 0),
    "dilation": (conv_bn(nn.Conv2d(3, 6, 3, dilation=2, padding=2)), IMAGES, 1, 0),
    "1x1": (conv_bn(nn.Conv2d(3, 6, 1, stride=2)), IMAGES, 1, 0),
    "circular": (conv_bn(nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular")), IMAGES, 1, 0),
    "same": (conv_bn(nn.Conv2d(3, 6, 4, padding="same")), IMAGES, 1, 0),
    "1d": (conv_bn(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)), SIGNAL, 1, 0),
    "3d": (conv_bn(nn.Conv3d(3, 6, 3), nn.BatchNorm3d(6)), VOLUME, 1, 0),
    "no affine": (conv_bn(CONV, nn.BatchNorm2d(6, affine=False)), IMAGES, 1, 0),
    "eps": (conv_bn(CONV, nn.BatchNorm2d(6, eps=0.5)), IMAGES, 1, 0),
    "linear": (
        then(lambda net, x: net.bn(net.fc(x.flatten(1))), fc=nn.Linear(192, 6), bn=nn.BatchNorm1d(6)), IMAGES, 1, 0
    ),
    "by keyword": (then(lambda net, x: net.bn(input=net.conv(input=x)), conv=CONV, bn=nn.BatchNorm2d(6)), IMAGES, 1, 0),
    "its shape is asked for": (
        then(lambda net, x: (h := net.conv(x), net.bn(h).view(h.shape[0], h.size(1), -1))[1], conv=CONV,
             bn=nn.BatchNorm2d(6)), IMAGES, 1, 0,
    ),
}  # fmt: skip


class Twice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Shifted(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def hooked(register: str) -> Callable[[], nn.Module]:
    """Either module with a hook that changes what it can."""

    def make() -> nn.Module:
        net = conv_bn(CONV)()
        module, kind = register.split(".")
        noted = {"pre": lambda m, i: (i[0] * 1.5,), "forward": lambda m, i, o: o * 1.5, "backward": lambda *_: None}
        at = {"pre": "register_forward_pre_hook", "forward": "register_forward_hook",
              "backward": "register_full_backward_hook"}  # fmt: skip
        getattr(getattr(net, module), at[kind])(noted[kind])
        return net

    return make


def patched() -> nn.Module:
    net = conv_bn(CONV)()
    net.conv.forward = lambda x: 2 * nn.Conv2d.forward(net.conv, x)
    return net


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


BN = nn.BatchNorm2d(6)
#: Network, shape, BatchNorms that run, folded or not.
NOT_FOLDING = {
    "transposed": (conv_bn(nn.ConvTranspose2d(3, 6, 3)), IMAGES, 1),
    "before": (then(lambda net, x: net.conv(net.bn(x)), conv=CONV, bn=nn.BatchNorm2d(3)), IMAGES, 1),
    "relu between": (then(lambda net, x: net.bn(F.relu(net.conv(x))), conv=CONV, bn=BN), IMAGES, 1),
    "relu in place": (then(lambda net, x: net.bn(F.relu_(net.conv(x))), conv=CONV, bn=BN), IMAGES, 1),
    "shared layer": (
        then(lambda net, x: net.bn(net.conv(x)) + net.bn2(net.conv(x.flip(3))), conv=CONV, bn=BN, bn2=BN), IMAGES, 2
    ),
    "shared norm": (
        then(lambda net, x: net.bn(net.conv(x)) + net.bn(net.conv2(x)), conv=CONV, conv2=CONV, bn=BN), IMAGES, 2
    ),
    "two norms": (then(lambda net, x: net.bn(h := net.conv(x)) + net.bn2(h), conv=CONV, bn=BN, bn2=BN), IMAGES, 2),
    "norm of a norm": (then(lambda net, x: net.bn(net.bn(net.conv(x))), conv=CONV, bn=BN), IMAGES, 2),
    "residual": (then(lambda net, x: net.bn(h := net.conv(x)) + h, conv=CONV, bn=BN), IMAGES, 1),
    "detached": (then(lambda net, x: net.bn(h := net.conv(x)) * h.detach().mean(), conv=CONV, bn=BN), IMAGES, 1),
    "viewed before": (then(lambda net, x: net.bn(net.conv(x).view(4, 6, 6, 6)), conv=CONV, bn=BN), IMAGES, 1),
    "a function of one's own": (
        then(lambda net, x: net.bn(h := net.conv(x)) + Double.apply(h), conv=CONV, bn=BN), IMAGES, 1
    ),
    "a scripted function": (
        then(lambda net, x: net.bn(h := net.conv(x)) + torch.jit.script(F.softsign)(h), conv=CONV, bn=BN), IMAGES, 1
    ),
    "steered by it": (
        then(lambda net, x: net.bn(h) if (h := net.conv(x)).mean() < 9 else -net.bn(h), conv=CONV, bn=BN), IMAGES, 1
    ),
    "no statistics": (conv_bn(CONV, nn.BatchNorm2d(6, track_running_stats=False)), IMAGES, 1),
    "a conv of one's own": (conv_bn(Twice(3, 6, 3)), IMAGES, 1),
    "a norm of one's own": (conv_bn(CONV, Shifted(6)), IMAGES, 1),
    "a forward of one's own": (patched, IMAGES, 1),
    "weight norm": (conv_bn(parametrizations.weight_norm(nn.Conv2d(3, 6, 3))), IMAGES, 1),
    "spectral norm": (conv_bn(nn.utils.spectral_norm(nn.Conv2d(3, 6, 3))), IMAGES, 1),
    "instance norm": (conv_bn(CONV, nn.InstanceNorm2d(6, track_running_stats=True)), IMAGES, 1),
    "linear over a sequence": (
        then(lambda net, x: net.bn(net.fc(x)), fc=nn.Linear(9, 3), bn=nn.BatchNorm1d(3)), SIGNAL, 1
    ),
    **{f"hook {kind}": (hooked(kind), IMAGES, 1) for kind in
       ("conv.pre", "conv.forward", "conv.backward", "bn.pre", "bn.forward", "bn.backward")},
    "small_cnn": (lambda: build("small_cnn", num_classes=5, in_channels=1, width=4), GREY, 0),
}  # fmt: skip


def images(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)


@pytest.fixture
def x(device: torch.device) -> Tensor:
    return images(IMAGES, device)


@pytest.fixture
def y(device: torch.device) -> Tensor:
    return torch.arange(4, device=device)


@pytest.fixture
def folding() -> Execution:
    return Execution(fold_batchnorm=True)


@pytest.mark.parametrize("name", FOLDING)
def test_what_folds_is_equal_to_rounding(name: str, folding: Execution, device: torch.device) -> None:
    make, shape, before, after = FOLDING[name]
    x = images(shape, device)
    model = ready(make, x)
    check_equal(folding, model, x)
    assert (norms_run(Execution(), model, x), norms_run(folding, model, x)) == (before, after)


@pytest.mark.parametrize("name", NOT_FOLDING)
@pytest.mark.filterwarnings("ignore:.*nothing folds")
def test_what_does_not_fold_is_left_alone(name: str, folding: Execution, device: torch.device) -> None:
    make, shape, norms = NOT_FOLDING[name]
    x = images(shape, device)
    model = ready(make, x)
    assert norms_run(folding, model, x) == norms_run(Execution(), model, x) == norms
    expected, got = passes(Execution(), model, x), passes(folding, model, x)
    assert all(map(torch.equal, got, expected))


def test_adversaries(folding: Execution, x: Tensor, y: Tensor) -> None:
    """From the first attack on, so that a run that is taken up again goes on to the same bits."""
    model, key = ready(FOLDING["preact_resnet18"][0], x), torch.tensor([3, 4], device=x.device)
    attack = PGD(EPS, steps=3, keep="best", restarts=2)
    expected = attack(model, x, y, key=key)
    with folding:
        first, second = attack(model, x, y, key=key), attack(model, x, y, key=key)
    assert torch.equal(first, second)
    assert (first - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_in_16_bits_is_folded_in_32(dtype: torch.dtype, folding: Execution, x: Tensor) -> None:
    model = ready(FOLDING["bias"][0], x, torch.float64)
    expected, _ = passes(Execution(), model, x)
    model, x = model.to(dtype), x.to(dtype)
    got, _ = passes(folding, model, x)
    plain, _ = passes(Execution(), model, x)
    assert got.dtype == dtype and norms_run(folding, model, x) == 0
    error, usual = ((z.double() - expected).square().mean().sqrt() for z in (got, plain))
    assert error <= 2 * usual, "no worse than unfolded"


def test_weights_keep_their_layout(folding: Execution, x: Tensor) -> None:
    model = ready(FOLDING["basic"][0], x)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=memory_format)
        passes(folding, model, x)
        layers = folding._preparations._networks[model]._layers
        found = {layer: prepared.weight for layer, prepared in layers.items() if prepared.norm}
        assert len(found) == 3
        assert all(weight.stride() == layer.weight.stride() for layer, weight in found.items())


# What changes is seen.


def by_the_optimizer(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()


def behind_the_version(model: nn.Module) -> None:
    for t in (*model.parameters(), *model.buffers()):
        t.data.mul_(2)


def by_another_parameter(model: nn.Module) -> None:
    model.conv.weight = nn.Parameter(model.conv.weight.detach() * 2)


def by_another_module(model: nn.Module) -> None:
    model.bn = copy.deepcopy(model.bn)
    model.bn.weight.data.mul_(3)


def by_another_layout(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)


def by_another_dtype(model: nn.Module) -> None:
    model.float().double()


CHANGES = (by_the_optimizer, behind_the_version, by_another_parameter, by_another_module, by_another_layout,
           by_another_dtype)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_attacks_are_seen(change: Callable[..., None], folding: Execution, x: Tensor) -> None:
    model = ready(FOLDING["bias"][0], x)
    check_equal(folding, model, x)
    change(model)
    check_equal(folding, model, x)
    assert norms_run(folding, model, x) == 0


def in_place(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        model.conv.weight.mul_(2)
    return model(x)


def statistics(model: nn.Module, x: Tensor) -> Tensor:
    model.bn.running_var.mul_(2)
    return model(x)


def a_functional_call(model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.functional_call(model, {"conv.weight": model.conv.weight * 2}, (x,))


def a_train_mode_attack(model: nn.Module, x: Tensor) -> Tensor:
    with leave_no_trace(model, "train", None):
        return model(x)


def a_train_mode_attack_that_moves_statistics(model: nn.Module, x: Tensor) -> Tensor:
    with leave_no_trace(model, "train", None, update_buffers=True):
        return model(x)


def an_attack_within(model: nn.Module, x: Tensor) -> Tensor:
    with leave_no_trace(model, "eval", None):
        return model(x)


def a_copy(model: nn.Module, x: Tensor) -> Tensor:
    other = copy.deepcopy(model)
    other.conv.weight.mul_(2)
    return other(x)


MEANWHILE = (in_place, statistics, a_functional_call, a_train_mode_attack, a_train_mode_attack_that_moves_statistics,
             an_attack_within, a_copy)  # fmt: skip


@pytest.mark.parametrize("meanwhile", MEANWHILE)
@pytest.mark.filterwarnings("error")
def test_changes_within_an_attack_are_seen(meanwhile: Callable[..., Tensor], folding: Execution, x: Tensor) -> None:
    found = []
    for execution in (folding, Execution()):
        model = ready(FOLDING["bias"][0], x)
        with execution, leave_no_trace(model, "eval", None):
            model(x)
            found.append(meanwhile(model, x))
    assert (found[0] - found[1]).abs().max() <= 1e-12 * found[1].abs().max()


def test_weights_that_are_attacked_themselves_get_their_gradient(x: Tensor, y: Tensor) -> None:
    """AWP frees the weights within the contract; a prepared copy would be all that is differentiated."""
    model = ready(FOLDING["bias"][0], x).float()
    with Execution("bf16"):
        directions = AdvWeightPerturb(model, None, None, 0.1).calc_awp(x.float(), y)
    assert set(directions) == {"conv.weight", "head.weight"}


def test_a_hook_that_comes_and_goes(folding: Execution, x: Tensor) -> None:
    model = ready(FOLDING["basic"][0], x)
    assert norms_run(folding, model, x) == 0
    handle = model.bn1.register_forward_hook(lambda m, i, o: o * 2)
    assert norms_run(folding, model, x) == 1
    check_equal(folding, model, x)
    handle.remove()
    assert norms_run(folding, model, x) == 0


# Modes.


def test_train_mode_is_unaffected(folding: Execution, x: Tensor) -> None:
    model = ready(FOLDING["preact_resnet18"][0], x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert norms_run(folding, model, x, "train") == 17
    assert norms_run(folding, model, x, "eval") == 9
    assert norms_run(folding, model, x, "train") == 17
    assert all(map(torch.equal, passes(folding, model, x, "train"), passes(Execution(), model, x, "train")))


def test_only_frozen_norms_fold_in_the_modes_as_found(folding: Execution, x: Tensor) -> None:
    model = ready(FOLDING["basic"][0], x)
    model.bn1.eval()
    check_equal(folding, model, x, "keep")
    assert norms_run(folding, model, x, "keep") == 2
    model.bn1.train(), model.bn2.eval()
    check_equal(folding, model, x, "keep")
    assert norms_run(folding, model, x, "keep") == 2


# A network that runs another way than it was seen to.


def other_ways() -> dict[str, Callable[[nn.Module, Tensor], Tensor]]:
    def residual(net: nn.Module, x: Tensor) -> Tensor:
        h = net.conv(x)
        return net.bn(h) + h

    def skipped(net: nn.Module, x: Tensor) -> Tensor:
        return F.relu(net.conv(x))

    def elsewhere(net: nn.Module, x: Tensor) -> Tensor:
        net.conv(x)
        return net.bn(x.repeat(1, 2, 1, 1))

    def between(net: nn.Module, x: Tensor) -> Tensor:
        return net.bn(net.conv(x).detach())

    def hooked_tensor(net: nn.Module, x: Tensor) -> Tensor:
        h = net.conv(x)
        h.register_hook(lambda g: 2 * g)
        return net.bn(h)

    def through_a_function(net: nn.Module, x: Tensor) -> Tensor:
        h = net.conv(x)
        return net.bn(h) + Double.apply(h)

    def the_other_norm(net: nn.Module, x: Tensor) -> Tensor:
        return net.bn2(net.conv(x)) + net.bn(net.conv2(x))

    ways = (residual, skipped, elsewhere, between, hooked_tensor, through_a_function, the_other_norm)
    return {way.__name__: way for way in ways}


@pytest.mark.parametrize("way", other_ways())
def test_another_control_flow_raises(way: str, folding: Execution, x: Tensor, y: Tensor) -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        if len(x) < 4:
            return other_ways()[way](net, x)
        return net.bn(net.conv(x)) + net.bn2(net.conv2(x))

    parts = {"conv": nn.Conv2d(3, 6, 3, padding=1), "conv2": nn.Conv2d(3, 6, 3, padding=1), "bn": BN, "bn2": BN}
    model = ready(then(forward, **parts), x)
    check_equal(folding, model, x)
    before, state = Snapshot(model), {module: dict(vars(module)) for module in model.modules()}
    with pytest.raises(RuntimeError, match="Execution\\(fold_batchnorm=False\\)"), folding:
        PGD(EPS, steps=1)(model, x[:2], y[:2])
    before.check()
    assert all(vars(module) == was for module, was in state.items())
    check_equal(folding, model, x)


def test_an_exception_in_the_first_forward_leaves_no_trace(folding: Execution, x: Tensor, y: Tensor) -> None:
    model = ready(FOLDING["basic"][0], x)
    before, state = Snapshot(model), {module: dict(vars(module)) for module in model.modules()}
    with pytest.raises(ValueError, match="3 channels"), folding:
        PGD(EPS, steps=1)(model, x[:, :1], y)
    before.check()
    assert all(vars(module) == was for module, was in state.items())
    check_equal(folding, model, x)
    assert norms_run(folding, model, x) == 0


def test_the_forward_that_looks_leaves_no_trace(folding: Execution, x: Tensor, y: Tensor) -> None:
    """Even where something is random, or counts, in eval mode."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return x + torch.randn_like(x)

    model = ready(then(lambda net, x: net.noise(net.bn(net.conv(x))), conv=CONV, bn=BN, noise=Noisy()), x)
    model.noise.seen.zero_()
    found = []
    for execution in (folding, Execution()):
        torch.manual_seed(3)
        with execution:
            adv = PGD(EPS, steps=2)(model, x, y)
        found.append((adv, random_state(), int(model.noise.seen)))
    assert (found[0][0] - found[1][0]).abs().max() <= 1e-12 and torch.equal(found[0][1], found[1][1])
    assert [count for *_, count in found] == [0, 0]


def test_one_forward_more_and_only_once(folding: Execution, x: Tensor, y: Tensor) -> None:
    model = ready(FOLDING["basic"][0], x)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    with folding:
        for mode, expected in (("train", 2), ("eval", 5), ("eval", 7)):
            PGD(EPS, steps=2, attack_mode=mode)(model, x, y)
            assert len(seen) == expected


# Warnings.


@pytest.mark.parametrize("name", ["small_cnn", "residual", "before", "linear over a sequence"])
def test_nothing_to_fold_is_said_once_a_network(name: str, folding: Execution, device: torch.device) -> None:
    make, shape, _ = NOT_FOLDING[name]
    x = images(shape, device)
    model = ready(make, x)
    with pytest.warns(UserWarning, match=f"nothing folds in {type(model).__name__}"):
        passes(folding, model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        passes(folding, model, x)


def test_a_compiled_network_is_left_to_the_compiler(folding: Execution, x: Tensor) -> None:
    model = ready(FOLDING["basic"][0], x)
    compiled = torch.compile(model, backend="eager")
    with pytest.warns(UserWarning, match="nothing folds in OptimizedModule: it is compiled"):
        got = passes(folding, compiled, x)
    assert all(map(torch.equal, got, passes(Execution(), model, x)))


def test_a_network_that_compiles_a_part_by_itself(folding: Execution, x: Tensor) -> None:
    """Nobody sees that from outside; within a trace the layers are as they are."""
    part = torch.compile(lambda net, x: net.bn(net.conv(x)), backend="eager")
    model = ready(then(lambda net, x: part(net, x), conv=CONV, bn=BN), x)
    check_equal(folding, model, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_network(folding: Execution, x: Tensor) -> None:
    model = ready(FOLDING["basic"][0], x)
    with pytest.warns(UserWarning, match="nothing folds"):
        got = passes(folding, torch.jit.script(model), x)
    assert all(map(torch.equal, got, passes(Execution(), model, x)))


def test_a_bare_function(folding: Execution, x: Tensor) -> None:
    model = ready(FOLDING["basic"][0], x).eval()
    with pytest.warns(UserWarning, match="nothing folds in function"):
        got = passes(folding, lambda v: model(v), x, "keep")
    assert all(map(torch.equal, got, passes(Execution(), model, x, "keep")))


@pytest.mark.parametrize("make", [lambda: Basic(), lambda: nn.Linear(192, 5)])
@pytest.mark.filterwarnings("ignore:.*nothing folds")
def test_the_network_is_not_kept_alive(make: Callable[[], nn.Module]) -> None:
    folding, model, x = Execution("bf16", fold_batchnorm=True), make(), torch.rand(IMAGES)
    with folding, leave_no_trace(model, "eval", None):
        model(x.flatten(1) if isinstance(model, nn.Linear) else x)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and not folding._preparations._networks


# 16 bits.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("outside", [True, False])
def test_weights_cast_once_are_the_bits_of_autocast(dtype, mode, outside, x: Tensor, y: Tensor) -> None:
    """Of a bare function the weights are unknown, so autocast is left to itself there."""
    model, x = ready(FOLDING["preact_resnet18"][0], x, torch.float32).requires_grad_(False), x.float()
    model.train(mode == "train")
    key, attack = torch.tensor([5, 6], device=x.device), PGD(EPS, steps=3, attack_mode="keep")
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    found = []
    for network in (model, lambda v: model(v)):
        execution = Execution("keep" if outside else name)
        with torch.autocast(x.device.type, dtype, enabled=outside), execution, Calls(model) as calls:
            adv, grad, _ = attack.last_gradient(network, x, y, key=key)
        found.append((adv, grad, calls.casts))
        model.load_state_dict(copy.deepcopy(model.state_dict()))
    (adv, grad, casts), (expected, expected_grad, usual) = found
    assert torch.equal(grad, expected_grad) and torch.equal(adv, expected) and grad.any()
    assert casts == 0 and usual == 3 * 22, "21 layers, one of them with a bias"


def test_a_hook_that_makes_the_weights_is_heeded(x: Tensor) -> None:
    model, x = ready(FOLDING["bias"][0], x, torch.float32).requires_grad_(False).eval(), x.float()

    def turn(module: nn.Module, _: Any) -> None:
        module.weight.data.neg_()

    model.conv.register_forward_pre_hook(turn)
    found = []
    for network in (model, lambda v: model(v)):
        with Execution("bf16"), leave_no_trace(network, "keep", None):
            found.append(torch.stack([network(x), network(x)]))
    assert torch.equal(*found) and not torch.equal(*found[0])


def test_autocast_that_is_switched_within_the_network(x: Tensor) -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            h = net.conv(x.float())
        assert h.dtype == torch.float32
        return net.bn2(net.conv2(net.bn(h)))

    parts = {"conv": CONV, "bn": BN, "conv2": nn.Conv2d(6, 6, 1), "bn2": BN}
    model, x = ready(then(forward, **parts), x, torch.float32), x.float()
    exact, plain, cast, folded = (
        passes(execution, model, x)[0].double()
        for execution in (Execution(), Execution("bf16"), Execution("bf16"), Execution("bf16", fold_batchnorm=True))
    )
    assert torch.equal(plain, cast)
    assert (folded - exact).abs().max() <= 0.02 * exact.abs().max()


def test_folded_and_cast(x: Tensor) -> None:
    model, x = ready(FOLDING["preact_resnet18"][0], x, torch.float32), x.float()
    execution = Execution("bf16", fold_batchnorm=True)
    exact, usual, folded = (passes(e, model, x) for e in (Execution(), Execution("bf16"), execution))
    assert norms_run(execution, model, x) == 9
    for i in range(2):
        error, plain = ((got[i].double() - exact[i]).norm() for got in (folded, usual))
        assert 0 < error <= 2 * plain
    with execution, leave_no_trace(model, "eval", None), Calls(model) as calls:
        model(x)
    assert calls.casts == 0
