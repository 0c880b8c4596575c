"""Forward-mode differentiation and torch.func: right values for whatever has a derivative, an error for the rest."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import atlas_kernels as ak
from atlas_kernels.attacks import PGD
from atlas_kernels.schema import OPERATORS
from test_losses import ATLAS, LOSSES, operator_calls, problem

DOUBLE = torch.float64
FORMS = {**LOSSES, **{name: ATLAS[name] for name in ("atlas ce logit 3", "atlas logit none 1", "atlas kl ce 0")}}
each_loss = pytest.mark.parametrize("name", FORMS)


def close(got, wanted) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


def like(inputs, seed: int = 1) -> tuple[Tensor, ...]:
    """Tangents."""
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(t.shape, generator=g, dtype=t.dtype) for t in inputs)


def tangent(f: Callable[..., Tensor], inputs, directions) -> Tensor:
    """By torch.autograd.forward_ad, without torch.func."""
    with forward_ad.dual_level():
        made = f(*map(forward_ad.make_dual, inputs, directions))
        found = forward_ad.unpack_dual(made).tangent
        assert found is not None
        return found


# --- losses ---


def ours_and_theirs(name: str):
    """The weighted mean of a loss in two forms, and its logits and weights in fp64."""
    loss = FORMS[name]
    z, y, t = problem(loss, 3, 5, dtype=DOUBLE, spread=1.0)
    weights = torch.tensor([0.5, 0.0, 2.0], dtype=DOUBLE)

    def ours(*v: Tensor) -> Tensor:
        return loss.ours(v[:-1], y, t, weights=v[-1])

    def theirs(*v: Tensor) -> Tensor:
        return (loss.theirs(v[:-1], y, t) * v[-1]).mean()

    return ours, theirs, (*(v.detach() for v in z), weights)


@each_loss
def test_losses(name):
    """Against the same transform of the published form, which is plain PyTorch."""
    ours, theirs, inputs = ours_and_theirs(name)
    every, directions = tuple(range(len(inputs))), like(inputs)
    close(jvp(ours, inputs, directions), jvp(theirs, inputs, directions))
    close(tangent(ours, inputs, directions), jvp(theirs, inputs, directions)[1])
    slopes = grad(theirs, every)
    close(grad(ours, every)(*inputs), slopes(*inputs))
    close(vjp(ours, *inputs)[1](torch.tensor(3.0, dtype=DOUBLE)), tuple(3 * g for g in slopes(*inputs)))
    close(jvp(grad(ours, every), inputs, directions), jvp(slopes, inputs, directions))  # forward over reverse
    close(hessian(ours)(*inputs), hessian(theirs)(*inputs))
    many = [torch.stack([v, 0.5 * v, -v]) for v in inputs]
    close(vmap(ours)(*many), vmap(theirs)(*many))
    close(vmap(grad(ours, every))(*many), vmap(slopes)(*many))


@each_loss
def test_jacobians_of_many_rows_at_once(name):
    """PyTorch's vectorised Jacobians: backward, and forward mode, over a mapped cotangent or tangent."""
    loss = FORMS[name]
    z, y, t = problem(loss, 3, 5, dtype=DOUBLE, spread=1.0)
    z = tuple(v.detach() for v in z)

    def rows(form):
        return lambda *v: form(v, y, t)

    wanted = torch.autograd.functional.jacobian(rows(loss.theirs), z)
    for how in ("reverse-mode", "forward-mode"):
        ours = rows(lambda *a: loss.ours(*a, reduction="none"))
        close(torch.autograd.functional.jacobian(ours, z, vectorize=True, strategy=how), wanted)
    leaf = z[0].clone().requires_grad_()
    total = loss.ours([leaf, *z[1:]], y, t)
    (scaled,) = torch.autograd.grad(total, leaf, torch.tensor([1.0, 2.0], dtype=DOUBLE), is_grads_batched=True)
    close(scaled[1], 2 * scaled[0])
    curved = torch.autograd.functional.hessian(lambda v: loss.ours([v, *z[1:]], y, t), z[0], vectorize=True)
    close(curved, torch.autograd.functional.hessian(lambda v: loss.theirs([v, *z[1:]], y, t).mean(), z[0]))


def test_per_sample_gradients_of_a_network():
    net = torch.nn.Linear(4, 5, dtype=DOUBLE)
    weights = {name: p.detach() for name, p in net.named_parameters()}
    x, y = torch.randn(6, 4, dtype=DOUBLE), torch.tensor([0, 1, 2, 3, 4, 0])

    def one(form, weights, x, y):
        return form(functional_call(net, weights, (x[None],)), y[None])

    found = vmap(grad(one, 1), (None, None, 0, 0))(ak.cross_entropy, weights, x, y)
    wanted = vmap(grad(one, 1), (None, None, 0, 0))(torch.nn.functional.cross_entropy, weights, x, y)
    close(found, wanted)
    # Parameters that the transform does not know of.
    shifts = vmap(lambda v: ak.cross_entropy(net(x + v), y))(torch.randn(3, 4, dtype=DOUBLE))
    assert shifts.requires_grad and shifts.shape == (3,)


def test_terms_and_weights_of_geometry():
    (z,), y, _ = problem(LOSSES["atlas"], 3, 5, dtype=DOUBLE)
    z = z.detach()
    wanted = ak.atlas_loss(z, y, return_terms=True)
    (loss, terms), (slope, flat) = jvp(lambda z: ak.atlas_loss(z, y, return_terms=True), (z,), like((z,)))
    close((loss, terms), wanted)
    assert slope != 0 and not flat.any()
    kappa = torch.tensor([[0, 3, 10], [1, 1, 2]])
    found = vmap(lambda k: ak.gairat_weights(k, 10))(kappa)
    torch.testing.assert_close(found, torch.stack([ak.gairat_weights(k, 10) for k in kappa]))


def test_infinite_losses_of_weight_zero_add_nothing():
    z = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, -1.0]], dtype=DOUBLE)
    q = torch.tensor([[0.0, -torch.inf, 1.0], [0.0, 1.0, 1.0]], dtype=DOUBLE)
    w = torch.tensor([0.0, 1.0], dtype=DOUBLE)
    one = grad(lambda z, q: ak.kl_div(z, q, weights=w, reduction="sum"), (0, 1))(z, q)
    other = grad(lambda z, q: ak.kl_div(z, q, reduction="sum"), (0, 1))(z[1:], q[1:])
    close([g[1:] for g in one], list(other))
    assert not any(g[0].any() for g in one)
    assert tangent(lambda z, q: ak.trades_loss(z, q, torch.tensor([0, 1]), beta=0.0), (z, q), (z, z)).isfinite()


# --- image operators and pairs ---


def images():
    g = torch.Generator().manual_seed(0)
    x = 0.2 + 0.6 * torch.rand(2, 2, 3, 3, generator=g, dtype=DOUBLE)
    adv = x + 0.1 * torch.randn(x.shape, generator=g, dtype=DOUBLE)
    x.flatten()[:6] = torch.tensor([0.01, 0.02, 0.03, 0.97, 0.98, 0.99])  # where the range clips
    return x, adv, torch.randn(x.shape, generator=g, dtype=DOUBLE)


X, ADV, GRAD = images()
EPS, STEP, RADIUS = (torch.tensor(v, dtype=DOUBLE) for v in ([0.08, 0.05], [0.03, 0.06], [0.02, 0.03]))
KEY, ACTIVE, CLASSES = torch.tensor([5, 0]), torch.tensor([True, False]), torch.tensor([0, 1, 0])
H, H_ADV = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
SIZE = {"linf": 1.0, "l2": 4.0, "l1": 12.0}


def operators() -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """f(*inputs), differentiable in all of the inputs, and the inputs."""
    found: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {}
    for n, size in SIZE.items():
        found[f"random_start {n}"] = (
            lambda x, eps, n=n, size=size: ak.random_start(x, eps * size, norm=n, key=KEY), (X, EPS)
        )  # fmt: skip
        found[f"pgd_step {n}"] = (
            lambda adv, x, eps, step, n=n, size=size: ak.pgd_step(adv, GRAD, x, eps * size, step * size, norm=n),
            (ADV, X, EPS, STEP),
        )
        found[f"apgd_step {n}"] = (
            lambda adv, x, eps, step, *rest, n=n, size=size: ak.apgd_step(
                adv, *(rest or (adv,)), GRAD, x, eps * size, step * size, 0.75, norm=n, largest=5
            ),
            (ADV, X, EPS, STEP, *([] if n == "l1" else [ADV.flip(0)])),
        )
        found[f"project {n}"] = (
            lambda v, x, eps, n=n, size=size: ak.project(v, x, eps * size, norm=n), (ADV, X, EPS)
        )  # fmt: skip
    found["pgd_step of some"] = lambda a, x: ak.pgd_step(a, GRAD, x, 0.08, 0.03, active=ACTIVE, descend=True), (ADV, X)
    found["momentum of APGD"] = lambda a, m: ak.apgd_step(a, X, GRAD, X, 0.08, 0.03, m), (ADV, 9 * STEP)
    found["one radius"] = lambda x, eps: ak.random_start(x, eps.sum(), key=KEY), (X, EPS)
    found["label_noise_start"] = (
        lambda x, eps, noise: ak.label_noise_start(x, torch.tensor([1, 0]), noise, eps, key=KEY), (X, EPS, 0.1 * ADV)
    )  # fmt: skip
    found["sample_neighbours"] = lambda a, r: ak.sample_neighbours(a, r, 2, key=KEY), (ADV, RADIUS)
    found["sample_neighbours in the ball"] = (
        lambda a, x, e, r: ak.sample_neighbours(a, r, 2, x=x, eps=e, key=KEY), (ADV, X, EPS, RADIUS)
    )  # fmt: skip
    found["pgd_step_neighbours"] = (
        lambda a, x, e, s, r: ak.pgd_step_neighbours(a, GRAD, x, e, s, r, 2, key=KEY, project=True),
        (ADV, X, EPS, STEP, RADIUS),
    )
    for d in ("l1", "squared"):
        found[f"compactness {d}"] = (
            lambda h, a, d=d: ak.compactness(h, a, CLASSES, distance=d, detach=False), (H, H_ADV)
        )  # fmt: skip
        found[f"compactness {d} of each"] = (
            lambda a, d=d: ak.compactness(H, a, CLASSES, distance=d, reduction="none"), (H_ADV,)
        )  # fmt: skip
    found["nuclear_norm"] = lambda h, a: ak.nuclear_norm((h - a).flatten(1)), (H, H_ADV)
    return found


IMAGES = operators()


@pytest.mark.parametrize("name", IMAGES)
def test_image_operators(name):
    f, inputs = IMAGES[name]
    directions = like(inputs)
    value, slope = jvp(f, inputs, directions)
    torch.testing.assert_close(value, f(*inputs), rtol=0, atol=1e-15 if "linf" in name else 1e-13)
    step = 1e-7
    moved = [[v + sign * step * d for v, d in zip(inputs, directions, strict=True)] for sign in (1, -1)]
    torch.testing.assert_close(slope, (f(*moved[0]) - f(*moved[1])) / (2 * step), rtol=1e-5, atol=1e-5)
    assert slope.abs().max() > 1e-3
    close(tangent(f, inputs, directions), slope)
    # Reverse mode, of the kernels and of the plain formula, is the transpose of forward mode.
    (cotangent,) = like((value,), seed=2)
    leaves = [v.clone().requires_grad_() for v in inputs]
    by_kernel = torch.autograd.grad(f(*leaves), leaves, cotangent)
    close(sum((g * d).sum() for g, d in zip(by_kernel, directions, strict=True)), (slope * cotangent).sum())
    close(vjp(f, *inputs)[1](cotangent), by_kernel)
    close(jacfwd(f)(*inputs), jacrev(f)(*inputs))
    many = [torch.stack([v, 0.9 * v]) for v in inputs]
    close(vmap(f)(*many), torch.stack([f(*(v[i] for v in many)) for i in range(2)]))
    close(vmap(grad(lambda *v: (f(*v) * cotangent).sum()))(*many)[0], by_kernel[0])


def test_noise_follows_the_rules_of_vmap():
    start = vmap(lambda x: ak.random_start(x, 0.1), randomness="different")
    made = start(torch.stack([X, X]))
    assert not torch.equal(made[0], made[1]) and ((made - X).abs() <= 0.1 + 1e-12).all()
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: ak.random_start(x, 0.1))(torch.stack([X, X]))


# --- what has no derivative says so ---


def refused(match: str, f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    for transformed in (
        lambda: jvp(f, (x,), (torch.ones_like(x),)),
        lambda: tangent(f, (x,), (torch.ones_like(x),)),
        lambda: grad(lambda x: f(x).sum())(x),
        lambda: hessian(lambda x: f(x).sum())(x),
    ):
        with pytest.raises((NotImplementedError, ValueError), match=match):
            transformed()


def test_no_result_into_a_given_tensor():
    out = torch.empty_like(X)
    match = "out= and cast= do not work"
    refused(match, lambda x: ak.random_start(x, 0.1, key=KEY, out=out), X)
    refused(match, lambda x: ak.label_noise_start(x, CLASSES[:2], x, 0.1, key=KEY, out=out), X)
    refused(match, lambda x: ak.pgd_step(x, GRAD, x, 0.1, 0.1, out=out), X)
    refused(match, lambda x: ak.pgd_step(x, GRAD, x, 0.1, 0.1, norm="l2", cast=out), X)
    refused(match, lambda x: ak.apgd_step(X, x, GRAD, X, 0.1, 0.1, 0.75, out=out), X)
    refused(match, lambda x: ak.project(x, x, 0.1, out=out), X)


def test_cotangents_and_batches_have_no_derivative():
    z, y = torch.randn(3, 5), torch.tensor([0, 1, 2])
    refused(r"attack_cotangent has no derivative.*logits.detach\(\)", lambda z: ak.attack_cotangent(z, y).cotangent, z)
    kl = {"objective": "kl", "return_value": True}
    refused("reference is being", lambda r: ak.attack_cotangent(z, reference=r, **kl).value, z)
    made = grad(lambda v: (ak.attack_cotangent(v.detach(), y).cotangent * v).sum())(z)
    torch.testing.assert_close(made, ak.attack_cotangent(z, y).cotangent)
    with pytest.raises(NotImplementedError, match="attack_cotangent cannot be mapped by torch.vmap.*whole batch"):
        vmap(lambda z: ak.attack_cotangent(z, y).cotangent)(torch.stack([z, z]))
    bytes_ = torch.randint(256, (4, 1, 5, 5), dtype=torch.uint8)
    with pytest.raises(NotImplementedError, match="augment cannot be mapped by torch.vmap"):
        vmap(lambda index: ak.augment(bytes_, index, key=KEY))(torch.tensor([[0, 1], [2, 3]]))
    mean = torch.tensor([0.5])
    refused("mean_rows is being", lambda mean: ak.augment(bytes_, torch.tensor([0]), key=KEY, mean=mean), mean)


def test_raw_operators_never_lose_a_derivative():
    """Every operator, by every tensor that it has a derivative by; on constants it does its usual work."""
    names = set()
    for operator, arguments in operator_calls("cpu"):
        schema = operator.default._schema
        names.add(schema.name.split("::")[1])
        for i, argument in enumerate(schema.arguments):
            t, written = arguments[i], argument.alias_info is not None
            if written or not isinstance(t, Tensor) or not t.is_floating_point():
                continue

            def call(t, i=i, operator=operator, arguments=arguments):
                operator(*arguments[:i], t, *arguments[i + 1 :])
                return t.sum()

            refused(f"{argument.name} is being differentiated", call, t)
            close(grad(lambda t, call=call: call(t.detach()) + t.sum())(t), torch.ones_like(t))
            with pytest.raises(NotImplementedError, match="cannot be mapped by torch.vmap"):
                vmap(call)(torch.stack([t, t]))
    assert names == set(OPERATORS["losses"])
    out, total = torch.empty_like(X), torch.empty((), dtype=DOUBLE)
    rest = 0.1, None, 0.0, None, 1.0, None, KEY, None, 0, out
    refused("x is being", lambda x: torch.ops.atlas_kernels.random_start(x, *rest), X)
    store, rows = X.clone(), torch.arange(len(X))
    begin = torch.ops.atlas_kernels.stored_start
    refused("x is being", lambda x: begin(x, store, rows, 0.0, None, 1.0, None, out), X)
    pairs = CLASSES, 0.99, False, 1.0, None, total, None, None
    refused("h is being", lambda h: torch.ops.atlas_kernels.compactness(h, H_ADV, *pairs), H)
    refused("d is being", lambda d: torch.ops.atlas_kernels.nuclear_norm(d, total, None), H.flatten(1))
    images, numbers = [torch.rand(2, 3, 2, dtype=DOUBLE) for _ in range(4)], [torch.rand(3, dtype=DOUBLE) for _ in "12"]
    again = torch.ops.atlas_kernels.batch_norm_double_backward
    rest = *images[:2], *numbers, None, None, None, True, None, images[3], None
    refused("x is being", lambda x: again(x, *rest), images[2])


def test_an_attack_on_a_network_in_forward_mode():
    """Adversaries are constants, also where the weights have tangents."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(18, 3, dtype=DOUBLE)).requires_grad_(False)
    y = torch.tensor([0, 1])
    attack = PGD(0.1, 0.03, 2, random_start=False, attack_mode="keep")
    adv = attack(net, X, y)
    weight = net[1].weight
    (direction,) = like((weight,))
    expected = tangent(lambda w: ak.cross_entropy(adv.flatten(1) @ w.T + net[1].bias, y), (weight,), (direction,))

    class Moving(torch.nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) @ self.weight.T + net[1].bias

    def robust_loss(weight: Tensor) -> Tensor:
        model = Moving(weight)
        return ak.cross_entropy(model(attack(model, X, y)), y)

    close(tangent(robust_loss, (weight,), (direction,)), expected)


def test_compiled():
    z, other, y = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([0, 1, 2, 5])
    loss = lambda z: ak.kl_div(z, other) + ak.cross_entropy(z, y)  # noqa: E731
    image = lambda x: ak.pgd_step(x, x - 0.5, x, 0.1, 0.03).square().sum()  # noqa: E731

    def everything(z, x):
        each = vmap(grad(lambda v: loss(v[None].expand(4, 6))))(z)
        return grad(loss)(z), jvp(loss, (z,), (other,)), each, grad(image)(x)

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    x = torch.rand(2, 1, 3, 3)
    torch.testing.assert_close(compiled(z, x), everything(z, x))
