"""BatchNorm: PyTorch's bits once, its second derivatives to rounding, for layers as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import atlas_kernels as ak
from atlas_kernels.backends import BackendUnavailable, forced_backend, unavailable_reason
from atlas_kernels.backends.door import DoorError
from atlas_kernels.batch_norm import batch_norm
from atlas_kernels.core import available_isas, force_isa
from atlas_kernels.double_backward import FastDoubleBackward
from operator_cases import Dispatched, same_bits, to_layout


@pytest.fixture
def engine(engine):
    """But Triton, which has no kernels of this."""
    if forced_backend() == "triton":
        pytest.skip("Triton has no kernels of BatchNorm")
    return engine


FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(4, 3, 5, 5), (8, 64, 4, 4), (3, 70, 6, 6), (16, 33), (130, 8), (5, 7, 9), (2, 3, 2, 3, 4), (1, 2, 40, 50),
          (64, 12, 1, 1)]  # fmt: skip
OP = torch.ops.atlas_kernels.batch_norm_double_backward.default


def problem(shape, *, dtype=torch.float32, last=False, device="cpu", seed=0, mean=1.0, wide=None):
    """What batch_norm takes, and the cotangents: of its output, and of the gradients by x, weight and bias."""
    g = torch.Generator().manual_seed(seed)
    wide = wide or (torch.float64 if dtype == torch.float64 else torch.float32)
    x, cotangent, v = (torch.randn(shape, generator=g) for _ in range(3))
    images = [to_layout(t.to(device, dtype), last) for t in (x + mean, cotangent, v)]
    numbers = [torch.randn(shape[1], generator=g).to(device, wide) for _ in range(5)]
    return {
        "x": images[0], "weight": numbers[0], "bias": numbers[1], "running_mean": numbers[2] * 0.1 + mean,
        "running_var": 0.5 + numbers[2].square(), "cotangent": images[1], "v": images[2],
        "weight_cotangent": numbers[3], "bias_cotangent": numbers[4],
    }  # fmt: skip


def derivatives(function, p, *, training, eps=1e-5):
    """Output and running statistics, gradients, and second derivatives by cotangent, x and weight."""
    running = [None if t is None else t.clone() for t in (p["running_mean"], p["running_var"])]
    x, weight, bias, cotangent = (
        None if p[n] is None else p[n].detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for n in ("x", "weight", "bias", "cotangent")
    )
    out = function(x, *running, weight, bias, training, 0.1, eps)
    sources = [t for t in (x, weight, bias) if t is not None]
    first = torch.autograd.grad(out, sources, cotangent, create_graph=True)
    of = [p[n] for n in ("v", "weight_cotangent", "bias_cotangent")][: len(first)]
    used = [(t, u) for t, u in zip(first, of, strict=True) if u is not None]
    by = [t for t in (cotangent, x, weight) if t is not None]
    second = torch.autograd.grad([t for t, _ in used], by, [u for _, u in used], allow_unused=True)
    return [out.detach(), *running], [t.detach() for t in first], second


def check(p, **options):
    """PyTorch's bits but for the second derivatives. Those are not more than twice as far from float64 as PyTorch's, or
    a few roundings of the terms that they are sums of."""
    exact = derivatives(F.batch_norm, {n: None if t is None else t.double() for n, t in p.items()}, **options)[2]
    theirs = derivatives(F.batch_norm, p, **options)
    ours = derivatives(batch_norm, p, **options)
    assert all(a is b is None or same_bits(a, b) for a, b in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True))
    v = torch.zeros_like(p["x"]) if p["v"] is None else p["v"]
    terms = (v.double() * p["cotangent"].double()).abs().transpose(0, 1).flatten(1).sum(1)
    x, spread = p["x"].double().transpose(0, 1).flatten(1), p["running_var"]
    scale = ((x.var(1, correction=0) if options["training"] else spread.double()) + options.get("eps", 1e-5)).rsqrt()
    for what, a, b, c in zip(("cotangent", "x", "weight"), ours[2], theirs[2], exact, strict=False):
        if c is None:
            assert a is None or not a.any(), what
            continue
        source = p[what]
        assert a.dtype == source.dtype and a.shape == source.shape, what
        size = c.abs().max() if what != "weight" else (terms * scale).max()
        rounding = torch.finfo(a.dtype).eps * (16 if a.dtype != torch.float64 else 64)
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + rounding * size, what


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_dtypes(shape, dtype, training, engine):
    for last in (False, True) if len(shape) > 3 else (False,):
        check(problem(shape, dtype=dtype, last=last, device=engine), training=training)


def run_operator(p, laid=torch.clone, *, training, parameters=True):
    """What the operator itself is given, and what it makes of that."""
    if p["x"].ndim == 2:  # as the public function does
        p = p | {n: p[n].unsqueeze(2) for n in ("x", "cotangent", "v")}
    dims, wide = [0, *range(2, p["x"].ndim)], p["weight"].dtype
    var, mean = torch.var_mean(p["x"].double(), dims, correction=0)
    given = [laid(p[n]) for n in ("x", "cotangent", "v")] + [mean.to(wide), (var + 1e-5).rsqrt().to(wide)]
    given += [p[n] if parameters else None for n in ("weight", "weight_cotangent", "bias_cotangent")]
    outs = [laid(torch.full_like(p["x"], torch.nan)) for _ in range(2)] + [torch.full_like(p["weight"], torch.nan)]
    OP(*given, training, *outs)
    return given, outs


def check_operator(p, laid=torch.clone, *, training, parameters=True):
    """Against the reference in float64, which is given the same statistics."""
    inputs, outs = run_operator(p, laid, training=training, parameters=parameters)
    double = [None if t is None else t.double() for t in inputs]
    exact = [torch.empty_like(t, dtype=torch.float64) for t in outs]
    with ak.backend("reference"):
        OP(*double, training, *exact)
    terms = (double[1] * double[2]).abs().transpose(0, 1).flatten(1).sum(1) * double[4]
    for a, c, size in zip(outs, exact, (*(t.abs().max() for t in exact[:2]), terms.max()), strict=True):
        assert (a.double() - c).abs().max() <= torch.finfo(a.dtype).eps * 16 * size
    alone = torch.full_like(p["weight"], torch.nan)
    OP(*inputs, training, None, None, alone)
    assert same_bits(alone, outs[2])


@pytest.mark.parametrize("parameters", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_operator_itself_at_all_sizes(training, parameters, engine):
    for shape in SHAPES:
        for last in (False, True) if len(shape) == 4 else (False,):
            p = problem(shape, dtype=torch.float32, last=last, device=engine)
            check_operator(p, training=training, parameters=parameters)


@pytest.mark.parametrize("isa", ["baseline", "v3", "v4"])
def test_each_isa_and_the_same_results_for_any_number_of_threads(isa, restored_isa_and_threads):
    if isa not in available_isas():
        pytest.skip(f"this machine cannot run {isa}")
    force_isa(isa)
    for shape, last in (((9, 70, 40, 2), True), ((30, 5, 30, 41), False), ((9000, 3), False)):
        for dtype in (torch.float32, torch.bfloat16):
            p = problem(shape, dtype=dtype, last=last)
            torch.set_num_threads(1)
            alone = run_operator(p, training=True)[1]
            for threads in (2, 3, 8):
                torch.set_num_threads(threads)
                together = run_operator(p, training=True)[1]
                assert all(same_bits(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_what_may_be_missing(training, engine):
    """No weight, no running statistics, no cotangents of the parameters' gradients, none of the input's."""
    whole = problem((6, 5, 4, 3), device=engine)
    for without in (("weight", "bias"), ("weight_cotangent", "bias_cotangent"), ("bias_cotangent",), ("v",)):
        check(whole | dict.fromkeys(without), training=training)
    if training:
        check(whole | dict.fromkeys(("running_mean", "running_var")), training=True)


@pytest.mark.parametrize("mean", [1e3, -1e5])
def test_values_far_from_0(mean, engine):
    """Sums of products with x itself would have no digits left: x is centred first."""
    for last in (False, True):
        check(problem((16, 4, 8, 8), mean=mean, last=last, device=engine), training=True)


def test_a_channel_without_variance(engine):
    p = problem((4, 3, 5, 5), device=engine)
    p["x"][:, 1] = 2.5
    check(p, training=True)
    check(problem((1, 3, 2, 1), device=engine), training=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["x", "cotangent", "v"])
@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_special_values_stay_in_their_channel(special, name, training, engine):
    """Where PyTorch's are finite, ours are the same; where they are not, ours are not."""
    for last in (False, True):
        p = problem((3, 4, 4, 4), dtype=torch.float64, last=last, device=engine)
        p[name][1, 2, 3, 0] = special
        ours, theirs = (derivatives(f, p, training=training)[2] for f in (batch_norm, F.batch_norm))
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.isfinite(), b.isfinite())
            torch.testing.assert_close(a[a.isfinite()], b[b.isfinite()], rtol=1e-9, atol=1e-12)


def test_an_empty_batch_and_one_value_are_pytorchs(device):
    for shape in ((0, 3, 4, 4), (2, 3, 0), (2, 0, 4)):
        found = []
        for function in (batch_norm, F.batch_norm):
            x = torch.empty(shape, device=device, requires_grad=True)
            out = function(x, None, None, None, None, True)
            (grad,) = torch.autograd.grad(out.sum(), x)
            found.append((out.shape, grad.shape))
        assert found[0] == found[1]
    for function in (batch_norm, F.batch_norm):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got input size"):
            function(torch.ones(1, 3, 1, 1, device=device, requires_grad=True), None, None, training=True)


@pytest.mark.parametrize("layout", ["as x", "other", "expanded", "strided"])
@pytest.mark.parametrize("last", [False, True])
def test_cotangents_of_any_layout(last, layout, device):
    p = problem((4, 6, 5, 3), last=last, device=device)
    for name in ("cotangent", "v"):
        t = p[name]
        if layout == "other":
            p[name] = to_layout(t, not last)
        elif layout == "expanded":
            p[name] = t[:1, :, :1].expand_as(t)
        elif layout == "strided":
            p[name] = torch.stack([t, t], -1)[..., 0]
    check(p, training=True)
    p["x"] = torch.stack([p["x"], p["x"]], -1)[..., 0]
    check(p, training=True)


# --- gradients ---


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3, 2, 2, 2), (5, 2)])
def test_gradients_once_twice_and_three_times(shape, training, device):
    p = problem(shape, dtype=torch.float64, device=device)
    leaves = [p[n].clone().requires_grad_() for n in ("x", "weight", "bias")]

    def function(x, weight, bias):
        return batch_norm(x, p["running_mean"].clone(), p["running_var"].clone(), weight, bias, training)

    def first(x, weight, bias):
        out = function(x, weight, bias)
        return torch.autograd.grad(out, (x, weight, bias), p["cotangent"], create_graph=True)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(first, leaves)


def test_the_graph_can_be_walked_again(device):
    p = problem((3, 2, 4, 4), device=device)
    x = p["x"].requires_grad_()
    (grad,) = torch.autograd.grad(batch_norm(x, None, None, training=True).square().sum(), x, create_graph=True)
    first = torch.autograd.grad(grad, x, p["v"], retain_graph=True)[0]
    assert same_bits(torch.autograd.grad(grad, x, p["v"])[0], first)


# --- networks as they are ---


class Net(nn.Module):
    """Every kind of BatchNorm layer that a network may have."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Softplus(),
            nn.Conv2d(6, 6, 3, groups=2), nn.BatchNorm2d(6, affine=False), nn.Softplus(),
            nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5, momentum=None), nn.Softplus(),
            nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5, track_running_stats=False, eps=0.1), nn.Flatten(),
            nn.Linear(20, 7), nn.BatchNorm1d(7), nn.Softplus(), nn.Linear(7, 4),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


def trained(net, x, fused, **options):
    """Loss with a penalty on its gradient at x, the gradients of all parameters, and every buffer afterwards."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with FastDoubleBackward() if fused else torch.enable_grad():
        logits = net(x)
    (grad,) = torch.autograd.grad(logits.square().sum(), x, create_graph=True)
    loss = logits.logsumexp(1).sum() + grad.square().sum()
    return loss.detach(), torch.autograd.grad(loss, [p for p in net.parameters()]), list(net.buffers())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("last", [False, True])
def test_layers_of_every_kind(last, training, device):
    torch.manual_seed(0)
    net = Net().double().to(device).train(training)
    x = to_layout(torch.rand(5, 3, 8, 8, dtype=torch.float64, device=device), last)
    if last:
        net = net.to(memory_format=torch.channels_last)
    for _ in range(2):
        other = copy.deepcopy(net)
        ours, theirs = trained(net, x, True), trained(other, x, False)
        assert same_bits(ours[0], theirs[0])
        assert all(same_bits(a, b) for a, b in zip(ours[2], theirs[2], strict=True))
        for a, b in zip(ours[1], theirs[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_the_context_begins_and_ends():
    x, net = torch.rand(4, 3, 8, 8).requires_grad_(), Net()
    assert not FastDoubleBackward.is_entered()
    with FastDoubleBackward():
        assert FastDoubleBackward.is_entered() and "_BatchNorm" in net.layers[1](net.layers[0](x)).grad_fn.name()
        with torch.no_grad():
            assert net(x).grad_fn is None
        with pytest.raises(ValueError, match="expected 4D input"):
            net.layers[1](x[0])
    assert not FastDoubleBackward.is_entered() and "NativeBatchNorm" in net.layers[1](net.layers[0](x)).grad_fn.name()


class Doubled(nn.BatchNorm2d):
    """A subclass that computes on its own."""

    def forward(self, x):
        return 2 * super().forward(x) + F.batch_norm(x, None, None, self.weight, self.bias, True)


def test_subclasses_and_calls_of_the_function():
    net = nn.Sequential(Doubled(3), nn.Softplus(), nn.Flatten(), nn.Linear(75, 2)).double()
    x = torch.rand(4, 3, 5, 5, dtype=torch.float64)
    ours, theirs = trained(net, x, True), trained(copy.deepcopy(net), x, False)
    assert same_bits(ours[0], theirs[0])
    for a, b in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_autocast(device):
    torch.manual_seed(0)
    net, x = Net().to(device), torch.rand(5, 3, 8, 8, device=device)
    exact = trained(copy.deepcopy(net).double(), x.double(), False)
    with torch.autocast(device.type, torch.bfloat16):
        ours, theirs = trained(copy.deepcopy(net), x, True), trained(copy.deepcopy(net), x, False)
    flat = [torch.cat([g.double().flatten() for g in found[1]]) for found in (ours, theirs, exact)]
    errors = [float((t - flat[2]).norm()) for t in flat[:2]]
    assert same_bits(ours[0], theirs[0]) or torch.allclose(ours[0], theirs[0], rtol=1e-2)
    assert errors[0] <= 1.5 * errors[1] + 1e-3 * float(flat[2].norm())


# --- what PyTorch asks of an operator ---


def test_opcheck(device):
    p = problem((4, 3, 2, 2), device=device)
    images, outs = [p[n] for n in ("x", "cotangent", "v")], [torch.empty_like(p["x"]) for _ in range(2)]
    numbers = [p[n] for n in ("running_mean", "running_var", "weight", "weight_cotangent", "bias_cotangent")]
    torch.library.opcheck(OP, (*images, *numbers, True, *outs, torch.empty_like(p["weight"])))
    torch.library.opcheck(OP, (*images, *numbers[:2], None, None, None, False, outs[0], None, None))


def test_compile_fullgraph(device):
    p = problem((4, 3, 5, 5), device=device)
    x, running = p["x"].requires_grad_(), [p[n] for n in ("running_mean", "running_var")]

    def loss(x, *running):
        return batch_norm(x * 2, *running, p["weight"], p["bias"], True).square().sum()

    grads = []
    for f in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss):
        moved = [t.clone() for t in running]
        grads.append((*torch.autograd.grad(f(x, *moved), x), *moved))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_transforms_see_pytorchs_function():
    p = problem((4, 3, 2, 2), dtype=torch.float64)

    def ours(x):
        return batch_norm(x, None, None, p["weight"], p["bias"], True)

    def theirs(x):
        return F.batch_norm(x, None, None, p["weight"], p["bias"], True)

    for transform in (
        lambda f: torch.func.jvp(f, (p["x"],), (p["v"],))[1],
        lambda f: torch.func.grad(lambda x: f(x).square().sum())(p["x"]),
        lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).square().sum()))(torch.stack([p["x"], p["v"]])),
    ):
        torch.testing.assert_close(transform(ours), transform(theirs), rtol=1e-9, atol=1e-12)


def test_dispatch_modes_see_the_operator():
    p = problem((4, 3, 2, 2))
    with Dispatched() as seen:
        derivatives(batch_norm, p, training=True)
    assert "atlas_kernels.batch_norm_double_backward.default" in seen.names


# --- what must not pass ---


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_nothing_wrong_passes_the_door(data):
    """One argument of a valid call is spoilt: the operator itself must refuse."""
    p = problem((4, 3, 2, 2))
    args = {n: p[n] for n in ("x", "cotangent", "v", "running_mean", "running_var", "weight", "weight_cotangent",
                              "bias_cotangent")}  # fmt: skip
    outs = {"a": torch.full((4, 3, 2, 2), 7.0), "b": torch.full((4, 3, 2, 2), 7.0), "c": torch.full((3,), 7.0)}
    args |= {"training": True, **outs}
    name = data.draw(st.sampled_from([n for n, a in args.items() if isinstance(a, torch.Tensor)]))
    good = args[name]
    spoils = {
        "dtype": lambda: good.to(torch.complex64),
        "integers": lambda: good.to(torch.int32),
        "double": lambda: good.double(),
        "more rows": lambda: torch.cat([good, good]),
        "strides": lambda: torch.stack([good, good], -1)[..., 0],
        "device": lambda: good.to("meta"),
        "an input": lambda: args["v" if name == "x" else "x"] if good.ndim == 4 else args["x"][0, :, 0, 0],
    }
    if good.ndim == 4:
        spoils["order"] = lambda: good.contiguous(memory_format=torch.channels_last)
        spoils["half"] = lambda: good.half()
        if name not in outs:
            del spoils["an input"]
    elif name not in outs:
        del spoils["an input"]
    args[name] = spoils[data.draw(st.sampled_from(sorted(spoils)))]()
    with pytest.raises((DoorError, ValueError, RuntimeError, NotImplementedError)):
        OP(*args.values())
    assert all((t == 7.0).all() for t in outs.values())


def test_triton_has_no_kernels_and_says_so(monkeypatch):
    if reason := unavailable_reason("triton", "cpu"):
        assert "TRITON_INTERPRET" in reason or "not installed" in reason
        monkeypatch.setattr("atlas_kernels.backends.triton.unavailable_reason", lambda _: None)
    with ak.backend("triton"):
        x = torch.rand(4, 3).requires_grad_()
        (grad,) = torch.autograd.grad(batch_norm(x, None, None, training=True).square().sum(), x, create_graph=True)
    with pytest.raises(BackendUnavailable, match="triton backend has no batch_norm kernels: use"):
        grad.square().sum().backward()
