"""Networks as they are in ``FastDoubleBackward``: PyTorch's bits once, its second derivatives to rounding."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError, checkpoint

from atlas_kernels.attacks import float16
from atlas_kernels.double_backward import FastDoubleBackward
from operator_cases import same_bits, to_layout

#: Shapes of images and filters, and how they meet.
CONVOLUTIONS = {
    "plain": ((3, 4, 7, 6), (5, 4, 3, 3), {}),
    "padded": ((3, 4, 7, 6), (5, 4, 3, 3), {"padding": 1}),
    "strided": ((3, 4, 7, 6), (5, 4, 3, 2), {"stride": (2, 3), "padding": (1, 0)}),
    "dilated": ((2, 3, 9, 8), (2, 3, 3, 3), {"dilation": 2, "padding": [2, 1]}),
    "grouped": ((3, 6, 5, 5), (4, 3, 3, 3), {"groups": 2, "stride": 2}),
    "depthwise": ((3, 6, 5, 5), (12, 1, 3, 3), {"groups": 6, "padding": 1}),
    "pointwise": ((3, 6, 5, 5), (4, 6, 1, 1), {"stride": (2,)}),
    "one side": ((3, 4, 9), (5, 4, 3), {"stride": 2, "padding": 1}),
    "three sides": ((2, 3, 4, 5, 4), (4, 3, 2, 3, 2), {"padding": (0, 1, 0)}),
    "same": ((3, 4, 7, 6), (5, 4, 3, 3), {"padding": "same"}),  # left to PyTorch
    "no batch": ((4, 7, 6), (5, 4, 3, 3), {}),
}
PLAIN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def problem(name, *, bias=True, device="cpu"):
    shape, filters, how = CONVOLUTIONS[name]
    g = torch.Generator().manual_seed(0)
    sizes = [shape, filters, *([filters[:1]] if bias else [])]
    leaves = [torch.randn(s, generator=g, dtype=torch.float64).to(device).requires_grad_() for s in sizes]

    def function(x, weight, bias=None):
        return PLAIN[len(filters) - 2](x, weight, bias, **how)

    def fast(*inputs):
        with FastDoubleBackward():
            return function(*inputs)

    return fast, function, leaves


def second(function, leaves, seed=1):
    """Output, gradients, and second derivatives by the cotangent and all inputs, of everything and of parts."""
    g = torch.Generator().manual_seed(seed)

    def like(t):
        return torch.randn(t.shape, generator=g, dtype=t.dtype).to(t.device)

    out = function(*leaves)
    cotangent = like(out).requires_grad_()
    first = torch.autograd.grad(out, leaves, cotangent, create_graph=True)
    over = [like(t) for t in first]
    found = [out, *first, *torch.autograd.grad(first, [cotangent, *leaves], over, retain_graph=True, allow_unused=True)]
    for part, v in zip(first, over, strict=True):
        found += torch.autograd.grad(part, [cotangent, *leaves], v, retain_graph=True, allow_unused=True)
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, bias, device):
    fast, plain, leaves = problem(name, bias=bias, device=device)
    ours, theirs = second(fast, leaves), second(plain, leaves)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if i < 1 + len(leaves):
            assert same_bits(a, b)
        elif a is None or b is None:
            assert all(t is None or not t.any() for t in (a, b))
        else:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["strided", "grouped", "one side"])
def test_gradients_once_twice_and_three_times(name):
    fast, _, leaves = problem(name)
    leaves = [t[:2, :, :5].detach().requires_grad_() if t is leaves[0] else t for t in leaves]

    def first(*inputs):
        return torch.autograd.grad(fast(*inputs).square().sum(), inputs, create_graph=True)

    assert gradcheck(fast, leaves, fast_mode=True) and gradgradcheck(fast, leaves, fast_mode=True)
    assert gradgradcheck(first, leaves, fast_mode=True)


class Counted(TorchDispatchMode):
    """Which gradients convolutions and BatchNorm are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("convolution_backward", "native_batch_norm_backward"):
            self.asked[f"{name} {''.join('xwb'[i] for i, wanted in enumerate(args[-1]) if wanted)}"] += 1
        elif name == "convolution":
            self.asked[name] += 1
        return func(*args, **(kwargs or {}))


def test_no_gradient_is_made_that_nobody_asked_for():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 3), nn.Flatten()
    )
    x = torch.rand(2, 3, 6, 6)

    def asked(frozen, images):
        net.requires_grad_(not frozen)
        leaf = x.clone().requires_grad_(images)
        with Counted() as counted:
            with FastDoubleBackward():
                z = net(leaf)
            counted.asked.clear()
            if not images:
                z.sum().backward()
            else:
                (grad,) = torch.autograd.grad(z.square().sum(), leaf, create_graph=True)
                yield dict(counted.asked)
                counted.asked.clear()
                if not frozen:
                    torch.autograd.grad(grad.square().sum(), list(net.parameters()))
        yield dict(counted.asked)

    images_alone = {"convolution_backward x": 2, "native_batch_norm_backward x": 1}
    assert next(asked(True, True)) == images_alone
    first, twice = asked(False, True)
    assert first == images_alone  # weights could have a gradient, but it was not asked for
    # Of the first backward: a convolution and a gradient of the weight each. Of the forward: what is usual.
    assert twice == {"convolution": 2, "convolution_backward w": 3, "convolution_backward xwb": 1,
                     "native_batch_norm_backward x": 1}  # fmt: skip
    (plain,) = asked(False, False)
    assert plain == {"convolution_backward xwb": 1, "native_batch_norm_backward x": 1, "convolution_backward w": 1}


def test_leaves_are_told_apart_by_what_is_asked_for():
    """Of a gradient at a leaf and at what was made of one; by backward() and by grad()."""
    x, weight = torch.rand(2, 3, 6, 6), torch.rand(2, 3, 3, 3)
    for made in (False, True):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        images, filters = (t * 1 for t in leaves) if made else leaves
        found = []
        for mode in (FastDoubleBackward(), torch.enable_grad()):
            with mode:
                out = F.conv2d(images, filters).square().sum()
            for wanted in ([leaves[0]], [leaves[1]], leaves, [filters], [images, filters]):
                found.append(torch.autograd.grad(out, wanted, retain_graph=True))
            out.backward(inputs=[leaves[1]], retain_graph=True)
            assert leaves[0].grad is None
            out.backward(retain_graph=True)
            found.append([t.grad.clone() for t in leaves])
            leaves[0].grad = leaves[1].grad = None
        half = len(found) // 2
        for ours, theirs in zip(found[:half], found[half:], strict=True):
            assert all(map(same_bits, ours, theirs))


def trained(net, x, fast):
    """Loss with a penalty on its gradient at x, and the gradients of all parameters."""
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with FastDoubleBackward() if fast else torch.enable_grad():
        logits = net(leaf)
    (grad,) = torch.autograd.grad(logits.square().sum(), leaf, create_graph=True)
    loss = logits.logsumexp(1).sum() + grad.float().square().sum()
    return loss.detach(), torch.autograd.grad(loss, list(net.parameters()))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(8), nn.SiLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=4, bias=False), nn.BatchNorm2d(8), nn.SiLU(),
        nn.Conv2d(8, 6, 1, padding="same"), nn.ConvTranspose2d(6, 4, 2), nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, last, device):
    """The same bits of the loss, and weights' gradients no further from float64 than PyTorch's."""
    net, x = network().to(device), torch.rand(4, 3, 8, 8, device=device)
    net(x)
    exact = trained(copy.deepcopy(net).double(), x.double(), False)
    if last:
        net, x = net.to(memory_format=torch.channels_last), to_layout(x, True)
    with torch.autocast(device.type, dtype):
        ours, theirs = trained(copy.deepcopy(net), x, True), trained(copy.deepcopy(net), x, False)
    assert same_bits(ours[0], theirs[0])
    a, b, c = (torch.cat([g.double().flatten() for g in found[1]]) for found in (ours, theirs, exact))
    assert (a - c).norm() <= 1.5 * (b - c).norm() + 1e-3 * c.norm()


def test_float16_is_seen_and_nothing_is_hidden_in_the_graph():
    """Attacks look through the graph of the logits for float16: these functions show what they compute in."""
    net, x = network(), torch.rand(4, 3, 8, 8)
    for dtype in (None, torch.bfloat16, torch.float16):
        with FastDoubleBackward(), torch.autocast("cpu", dtype, enabled=dtype is not None):
            z = net(x).float()
        assert float16.is_in_graph(z) == (dtype == torch.float16, set())


def test_only_inside_and_only_where_something_is_differentiated():
    x, layer = torch.rand(4, 3, 8, 8), nn.Conv2d(3, 2, 3)

    def kind(z):
        return type(z.grad_fn).__name__

    assert not FastDoubleBackward.is_entered()
    with FastDoubleBackward():
        assert FastDoubleBackward.is_entered() and kind(layer(x)) == "_ConvolutionBackward"
        assert kind(F.conv2d(x, weight=layer.weight, stride=2)) == "_ConvolutionBackward"
        with torch.no_grad():
            assert layer(x).grad_fn is None
        assert kind(layer.requires_grad_(False)(x)) == "NoneType"
        with pytest.raises(RuntimeError, match="expected input.* to have 3 channels"):
            layer.requires_grad_()(x[:, :2])
        assert kind(torch.func.functional_call(layer, {"weight": layer.weight * 2}, (x,))) == "_ConvolutionBackward"
        torch.testing.assert_close(torch.func.jvp(layer, (x,), (x,))[1], F.conv2d(x, layer.weight))
    assert not FastDoubleBackward.is_entered() and kind(layer(x)) == "ConvolutionBackward0"


#: What PyTorch takes in other forms than the usual, and what it refuses; x: images, w: filters, one: of each channel.
ODD_CALLS = {
    "stride of NumPy": lambda x, w, one: F.conv2d(x, w, stride=np.int64(2)),
    "padding is a tensor": lambda x, w, one: F.conv2d(x, w, padding=torch.tensor(1)),
    "bias of another dtype": lambda x, w, one: F.conv2d(x, w, one.float()),
    "stride below 1": lambda x, w, one: F.conv2d(x, w, stride=0),
    "statistics with a gradient": lambda x, w, one: F.batch_norm(x, one.requires_grad_(), one),
    "eps of 0": lambda x, w, one: F.batch_norm(x, None, None, training=True, eps=0.0),
    "eps below 0": lambda x, w, one: F.batch_norm(x, None, None, training=True, eps=-1.0),
    "one value": lambda x, w, one: F.batch_norm(x[:1, :, :1, :1], None, None, training=True),
    "no channels": lambda x, w, one: F.batch_norm(x[0, 0, 0], one, one, training=True),
}


@pytest.mark.parametrize("name", ODD_CALLS)
def test_what_pytorch_takes_and_refuses(name):
    def outcome(mode):
        g = torch.Generator().manual_seed(0)
        x, w = (torch.rand(s, generator=g).double().requires_grad_() for s in ((2, 3, 6, 6), (3, 3, 2, 2)))
        try:
            with mode:
                return ODD_CALLS[name](x, w, torch.ones(3).double()).detach()
        except (RuntimeError, ValueError) as error:
            return f"{type(error)} {error}"

    ours, theirs = outcome(FastDoubleBackward()), outcome(torch.enable_grad())
    assert ours == theirs if isinstance(theirs, str) else same_bits(ours, theirs)


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_along_many_cotangents_at_once(training, device):
    """As torch.autograd.functional.hessian(vectorize=True) asks for them."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.BatchNorm2d(4)).double()
    net, x = net.to(device).train(training), torch.rand(3, 3, 4, 4, dtype=torch.float64, device=device)
    many = torch.randn(2, *x.shape, dtype=x.dtype, device=device)

    def second(mode):
        leaf = x.clone().requires_grad_()
        with mode:
            z = copy.deepcopy(net)(leaf)
        (grad,) = torch.autograd.grad(z.sin().sum(), leaf, create_graph=True)
        return torch.autograd.grad(grad, leaf, many, is_grads_batched=True)[0]

    torch.testing.assert_close(second(FastDoubleBackward()), second(torch.enable_grad()), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_traced_networks_are_pytorchs():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    x = torch.rand(2, 3, 6, 6)
    with FastDoubleBackward():
        traced = torch.jit.trace(net, x)
    assert same_bits(traced(x), net(x)) and "PythonOp" not in str(traced.inlined_graph)


def test_checkpoints_have_it_from_their_contexts():
    net, x = network().double(), torch.rand(4, 3, 8, 8, dtype=torch.float64)
    net(x)

    def found(**how):
        leaf = x.clone().requires_grad_()
        z = checkpoint(copy.deepcopy(net), leaf, use_reentrant=False, **how)
        (grad,) = torch.autograd.grad(z.square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaf)[0]

    both = found(context_fn=lambda: (FastDoubleBackward(), FastDoubleBackward()))
    torch.testing.assert_close(both, found(), rtol=1e-9, atol=1e-9)
    with pytest.raises(CheckpointError), FastDoubleBackward():
        checkpoint(net, x.requires_grad_(), use_reentrant=False).sum().backward()
