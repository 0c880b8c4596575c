"""Weights cast once an attack: the bits of autocast, whatever happens meanwhile, and no trace left."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atlas_kernels import PGD, Execution
from atlas_kernels.attacks import attacking
from atlas_kernels.compat.awp import AdvWeightPerturb
from atlas_train.models import build
from test_attack_contract import Snapshot

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


def ready(make: Callable[[], nn.Module], x: Tensor) -> nn.Module:
    """In eval mode and frozen, with BatchNorms that have seen and learnt something."""
    torch.manual_seed(0)
    model = make().to(x.device)
    model.eval()(x)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    nn.init.uniform_(tensor, 0.5, 2.0)
    return model.requires_grad_(False)


class Calls(TorchDispatchMode):
    """Counts casts of parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.casts = 0
        self._parameters = {id(p) for p in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.casts += "_to_copy" in func.__name__ and any(id(leaf) in self._parameters for leaf in tree_leaves(args))
        return func(*args, **(kwargs or {}))


def passes(model: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and an input gradient, in an attack in bfloat16."""
    with Execution("bf16"), attacking(model, "keep", None):
        leaf = x.clone().requires_grad_()
        z = model(leaf)
        return z.detach(), torch.autograd.grad(z.square().sum(), leaf)[0]


def check_equal(model: nn.Module, x: Tensor) -> None:
    """Of a bare function the weights are unknown, so autocast is left to itself there."""
    before, state = Snapshot(model), {module: dict(vars(module)) for module in model.modules()}
    got, expected = passes(model, x), passes(lambda v: model(v), x)
    before.check()
    assert all(vars(module) == was and list(vars(module)) == list(was) for module, was in state.items())
    assert all(map(torch.equal, got, expected)) and expected[1].any()


class Twice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def patched() -> nn.Module:
    net = conv_bn(CONV)()
    net.conv.forward = lambda x: 2 * nn.Conv2d.forward(net.conv, x)
    return net


def hooked(register: str, hook: Callable[..., Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        net = conv_bn(CONV)()
        getattr(net.conv, register)(hook)
        return net

    return make


IMAGES, SIGNAL, VOLUME = (4, 3, 8, 8), (4, 3, 9), (4, 3, 4, 4, 4)
CONV, BN = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
COLOUR = {"num_classes": 5, "in_channels": 3, "width": 4, "normalize": ((0.5,) * 3, (0.25,) * 3)}
#: A network, the shape of its images, and how many weights one forward casts.
NETWORKS = {
    "preact_resnet18": (lambda: build("preact_resnet18", **COLOUR), IMAGES, 0),
    "bias": (conv_bn(CONV), IMAGES, 0),
    "no bias": (conv_bn(nn.Conv2d(3, 6, 3, bias=False)), IMAGES, 0),
    "groups": (conv_bn(nn.Conv2d(3, 6, 3, groups=3)), IMAGES, 0),
    "circular": (conv_bn(nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular")), IMAGES, 0),
    "same": (conv_bn(nn.Conv2d(3, 6, 4, padding="same")), IMAGES, 0),
    "1d": (conv_bn(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)), SIGNAL, 0),
    "3d": (conv_bn(nn.Conv3d(3, 6, 3), nn.BatchNorm3d(6)), VOLUME, 0),
    "shared layer": (then(lambda net, x: net.conv(x) + net.conv(x.flip(3)), conv=CONV), IMAGES, 0),
    "by keyword": (then(lambda net, x: net.conv(input=x), conv=CONV), IMAGES, 0),
    "hook on the output": (hooked("register_forward_hook", lambda m, i, o: 2 * o), IMAGES, 0),
    "hook on the input": (hooked("register_forward_pre_hook", lambda m, i: (2 * i[0],)), IMAGES, 2),
    "transposed": (conv_bn(nn.ConvTranspose2d(3, 6, 3)), IMAGES, 2),
    "a conv of one's own": (conv_bn(Twice(3, 6, 3)), IMAGES, 2),
    "a forward of one's own": (patched, IMAGES, 2),
    "weight norm": (conv_bn(parametrizations.weight_norm(nn.Conv2d(3, 6, 3))), IMAGES, 1),
    "spectral norm": (conv_bn(nn.utils.spectral_norm(nn.Conv2d(3, 6, 3))), IMAGES, 1),
}


def images(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(device)


@pytest.fixture
def x(device: torch.device) -> Tensor:
    return images(IMAGES, device)


@pytest.fixture
def y(device: torch.device) -> Tensor:
    return torch.arange(4, device=device)


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_and_gradients_are_the_bits_of_autocast(name: str, device: torch.device) -> None:
    make, shape, casts = NETWORKS[name]
    x = images(shape, device)
    model = ready(make, x)
    check_equal(model, x)
    with Execution("bf16"), attacking(model, "keep", None), Calls(model) as calls:
        model(x)
    assert calls.casts == casts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("outside", [True, False])
def test_attacks_are_the_bits_of_autocast(dtype, mode, outside, x: Tensor, y: Tensor) -> None:
    model = ready(NETWORKS["preact_resnet18"][0], x).train(mode == "train")
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_that_need_no_cast_are_run_as_they_are(dtype: torch.dtype, x: Tensor) -> None:
    model = ready(NETWORKS["by keyword"][0], x).to(dtype)
    x = x.to(dtype)
    check_equal(model, x)
    with Execution("bf16"), attacking(model, "keep", None):
        assert ("forward" in vars(model.conv)) == (dtype == torch.float16)


def test_weights_keep_their_layout(x: Tensor) -> None:
    model = ready(NETWORKS["bias"][0], x)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=memory_format)
        with Execution("bf16"), attacking(model, "eval", None):
            assert vars(model.conv)["forward"].args[0].weight.stride() == model.conv.weight.stride()


# What changes within an attack is seen.


def in_place(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        model.conv.weight.mul_(2)
    return model(x)


def by_another_parameter(model: nn.Module, x: Tensor) -> Tensor:
    model.conv.weight = nn.Parameter(model.conv.weight.detach() * 2)
    return model(x)


def a_functional_call(model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.functional_call(model, {"conv.weight": model.conv.weight * 2}, (x,))


def another_autocast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return model(x)


def an_attack_within(model: nn.Module, x: Tensor) -> Tensor:
    with attacking(model, "eval", None):
        model(x)
    return model(x)


def a_train_mode_attack(model: nn.Module, x: Tensor) -> Tensor:
    with attacking(model, "train", None, update_buffers=True):
        return model(x)


def a_copy(model: nn.Module, x: Tensor) -> Tensor:
    other = copy.deepcopy(model)
    other.conv.weight.mul_(2)
    return other(x)


def compiled(model: nn.Module, x: Tensor) -> Tensor:
    return torch.compile(model, backend="eager")(x)


MEANWHILE = (in_place, by_another_parameter, a_functional_call, another_autocast, an_attack_within, a_train_mode_attack,
             a_copy, compiled)  # fmt: skip


@pytest.mark.parametrize("meanwhile", MEANWHILE)
@pytest.mark.filterwarnings("error")
def test_changes_within_an_attack_are_seen(meanwhile: Callable[..., Tensor], x: Tensor) -> None:
    found = []
    for bare in (False, True):
        model = ready(NETWORKS["bias"][0], x)
        with Execution("bf16"), attacking((lambda v: model(v)) if bare else model, "keep", None):  # noqa: B023
            model(x)
            found.append(meanwhile(model, x))
        assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(*found)


@pytest.mark.parametrize("compile", [False, True])
def test_weights_that_are_attacked_themselves_get_their_gradient(compile: bool, x: Tensor, y: Tensor) -> None:
    """AWP frees the weights within the contract; a prepared copy would be all that is differentiated."""
    model = ready(NETWORKS["bias"][0], x).requires_grad_(True)
    network: Any = torch.compile(model, backend="eager") if compile else model
    with Execution("bf16"):
        PGD(EPS, steps=1)(network, x, y)
        directions = AdvWeightPerturb(network, None, None, 0.1).calc_awp(x, y)
    assert {name.removeprefix("_orig_mod.") for name in directions} == {"conv.weight", "head.weight"}


def test_a_hook_that_makes_the_weights_is_heeded(x: Tensor) -> None:
    model = ready(NETWORKS["bias"][0], x)

    def turn(module: nn.Module, _: Any) -> None:
        module.weight.data.neg_()

    model.conv.register_forward_pre_hook(turn)
    found = []
    for network in (model, lambda v: model(v)):
        with Execution("bf16"), attacking(network, "keep", None):
            found.append(torch.stack([network(x), network(x)]))
    assert torch.equal(*found) and not torch.equal(*found[0])


def test_autocast_that_is_switched_within_the_network(x: Tensor) -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            h = net.conv(x.float())
        assert h.dtype == torch.float32
        return net.bn2(net.conv2(net.bn(h)))

    check_equal(ready(then(forward, conv=CONV, bn=BN, conv2=nn.Conv2d(6, 6, 1), bn2=BN), x), x)


def in_part(net: nn.Module) -> nn.Module:
    return nn.Sequential(torch.compile(net[0], backend="eager"), *net[1:])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [in_part, torch.jit.script])
def test_scripts_and_networks_compiled_in_part_are_left_alone(
    make: Callable[[nn.Module], nn.Module], x: Tensor
) -> None:
    model = ready(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(216, 5)), x)
    made = make(model)
    with Execution("bf16"), attacking(made, "keep", None):
        assert not any("forward" in vars(module) for module in model)
    assert all(map(torch.equal, passes(made, x), passes(model, x)))


class Compiler:
    """Runs graphs as they are, and notes how many inputs in 16 bits each has."""

    def __init__(self) -> None:
        self.graphs: list[int] = []

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs.append(sum(isinstance(t, Tensor) and t.dtype == torch.bfloat16 for t in inputs))
        return graph.forward  # type: ignore[no-any-return]


@pytest.fixture
def compiler() -> Iterator[Compiler]:
    torch._dynamo.reset()
    yield Compiler()
    torch._dynamo.reset()


def test_a_compiled_network_is_cast_once_and_compiled_once(compiler: Compiler, x: Tensor, y: Tensor) -> None:
    """Attack after attack, with training in between that writes the weights; the plain network beside it."""
    model = ready(NETWORKS["preact_resnet18"][0], x)
    compiled = torch.compile(model, backend=compiler, dynamic=False)
    key, attack = torch.tensor([5, 6], device=x.device), PGD(EPS, steps=3)
    for _ in range(3):
        with Execution("bf16"):
            a, b = (attack(network, x, y, key=key) for network in (compiled, model))
        assert torch.equal(a, b) and not torch.equal(a, x)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(0.9)
    assert compiler.graphs == [22], "21 layers, one of them with a bias"
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("meanwhile", [by_another_parameter, a_functional_call, another_autocast, a_copy])
def test_changes_within_an_attack_on_a_compiled_network(
    meanwhile: Callable[..., Tensor], compiler: Compiler, x: Tensor
) -> None:
    found = []
    for compile in (True, False):
        model = ready(NETWORKS["bias"][0], x)
        network: Any = torch.compile(model, backend=compiler) if compile else model
        with Execution("bf16"), attacking(network, "keep", None):
            network(x)
            found.append(meanwhile(network if meanwhile is another_autocast else Names(network), x))
    assert torch.equal(*found)


def compiled_linear() -> nn.Module:
    return torch.compile(nn.Linear(192, 5), backend="eager")


class Names(nn.Module):
    """A network under the names of its parts, whether compiled or not."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.conv = network.conv

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def test_what_compiled_code_and_graphs_read_stays_where_it_is(compiler: Compiler, x: Tensor) -> None:
    """One place for each 16-bit type, also where a parameter is replaced by another."""
    model = ready(NETWORKS["bias"][0], x)
    network = torch.compile(model, backend=compiler)
    where: dict[str, set[int]] = {"bf16": set(), "fp16": set()}
    for name in ("bf16", "fp16", "bf16", "fp16"):
        with Execution(name), attacking(network, "keep", None):
            where[name].add(vars(model.conv)["forward"].args[0].weight.data_ptr())
        model.conv.weight = nn.Parameter(model.conv.weight.detach() * 2, requires_grad=False)
    assert all(len(places) == 1 for places in where.values()) and where["bf16"] != where["fp16"]


@pytest.mark.parametrize("make", [NETWORKS["bias"][0], lambda: nn.Linear(192, 5), compiled_linear])
def test_the_network_is_not_kept_alive(make: Callable[[], nn.Module]) -> None:
    execution, model, x = Execution("bf16"), make(), torch.rand(IMAGES)
    x = x if isinstance(model, Then) else x.flatten(1)
    model(x)
    with execution, attacking(model, "eval", None):
        model(x)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_an_exception_leaves_no_trace(x: Tensor, y: Tensor) -> None:
    model = ready(NETWORKS["bias"][0], x)
    before, state = Snapshot(model), {module: dict(vars(module)) for module in model.modules()}
    with pytest.raises(RuntimeError, match="channels"), Execution("bf16"):
        PGD(EPS, steps=1)(model, x[:, :1], y)
    before.check()
    assert all(vars(module) == was for module, was in state.items())
