"""The forms of ATLAS: their documented formulas, to 1e-9, and what the theory says of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atlas_kernels import noise_key, random_start, sample_neighbours
from atlas_kernels.attacks import PGD
from atlas_train import methods
from atlas_train.methods import ATLAS, AWP, FGSMPGI, LIET, Batch, Method, Mixing, State, atlas_local
from atlas_train.methods.double_backward import jacobian_penalty, unit_vectors
from atlas_train.noise import normal, uniform
from atlas_train.passes import count_passes
from beside_published import CLASSES, EPS, Case, Steps, assert_same, case, close, ours, theirs
from published import atlas as published

FORMS: dict[str, dict[str, Any]] = {
    "neighbours kl": {"local": "neighbours"},
    "neighbours ce 2": {"local": "neighbours", "local_objective": "ce", "count": 2},
    "neighbours logit": {"local": "neighbours", "local_objective": "logit"},
    "segment kl": {"local": "segment"},
    "segment ce 2": {"local": "segment", "local_objective": "ce", "count": 2},
    "segment logit": {"local": "segment", "local_objective": "logit"},
    "worst kl": {"local": "worst"},
    "worst ce": {"local": "worst", "local_objective": "ce", "project": True},
    "worst logit": {"local": "worst", "local_objective": "logit"},
    "jacobian": {"local": "jacobian"},
    "jacobian 3": {"local": "jacobian", "count": 3},
    "margin": {"local": "margin"},
    "radius": {"local": "radius"},
    "radius 3": {"local": "radius", "rivals": 3},
    "radius all": {"local": "radius", "rivals": CLASSES - 1},
}
WEIGHTS = {"eps": EPS, "local_weight": 0.7, "global_weight": 1.3, "radius": 0.06}


def directions(made: Case, count: int) -> Tensor:
    """As documented: draw 1 of the step's noise, [B, count, C], normalised; here [count, B, C]."""
    like = torch.empty(len(made.batch.y), count, CLASSES, dtype=made.batch.x.dtype)
    v = normal(like, made.key, made.batch.ids, 1)
    return (v / v.norm(dim=2, keepdim=True)).transpose(0, 1)


def around(made: Case, count: int) -> Tensor:
    """The noise of ``count`` neighbours, in [-1, 1], [count, B, ...]."""
    zero, noise = torch.zeros_like(made.batch.x), {"key": made.key, "ids": made.batch.ids}
    return sample_neighbours(zero, 1.0, count, clip_min=-1, **noise).view(count, *zero.shape)


def shares(made: Case, count: int) -> Tensor:
    """As documented: draw 1 of the step's noise, [B, count], in [0, 1); here [count, B]."""
    like = torch.empty(len(made.batch.y), count, dtype=made.batch.x.dtype)
    return (uniform(like, made.key, made.batch.ids, 1).T + 1) / 2


DRAWN = {"directions": directions, "noise": around, "shares": shares}


@pytest.mark.parametrize("bn", ["joint", "split"])
@pytest.mark.parametrize(("global_term", "steps"), [("kl", 1), ("ce", 2), ("logit", 1), ("none", 2)])
@pytest.mark.parametrize("form", FORMS)
def test_form_is_its_documented_formula(form: str, global_term: str, steps: int, bn: str) -> None:
    made = trained() if form.startswith("radius") else case()
    how = WEIGHTS | FORMS[form] | {"global_term": global_term, "bn": bn, "steps": steps, "step_size": 0.08}
    stated = {name: value for name, value in how.items() if name != "count"}
    drawn = {name: draw(made, how.get("count", 1)) for name, draw in DRAWN.items()}
    expected = theirs(published.atlas, made, made.start(), **stated, **drawn)
    assert_same(ours(ATLAS(**how), made), expected, statistics=True)


@pytest.mark.parametrize("objective", ["kl", "js", "logit", "prob"])
@pytest.mark.parametrize(("global_term", "steps", "smoothing"), [("none", 1, 0.4), ("kl", 2, 0.4), ("logit", 1, 0.0)])
def test_start_is_its_documented_formula(objective: str, global_term: str, steps: int, smoothing: float) -> None:
    made = case()
    stated = {"local_objective": objective, "local_weight": 0.7, "step_size": 0.08, "steps": steps, "eps": EPS}
    stated |= {"global_weight": 1.3} | ({"global_term": global_term} if global_term != "none" else {})
    expected = theirs(published.atlas_start, made, made.start(), smoothing=smoothing, **stated)
    mine = ours(ATLAS(local="start", label_smoothing=smoothing, **stated), made)
    assert_same(mine, expected, statistics=True)


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("iterates", "keep"), [("all", "first"), ("all", "all"), ("all", "none"), ("first", "none"), ("first", "all")]
)
def test_iterates_of_the_attack_that_the_loss_sees(iterates: Any, keep: Any, steps: int, parts: bool) -> None:
    """parts: by ``prepare`` and ``objective``, as a compiled network has it and AWP."""
    made = case()
    stated = {"local_objective": "logit", "local_weight": 0.3, "step_size": 0.04, "steps": steps, "eps": EPS}
    expected = theirs(published.atlas_start, made, made.start(), smoothing=0.4, iterates=iterates, keep=keep, **stated)
    method = ATLAS(local="start", iterates=iterates, keep=keep, label_smoothing=0.4, **stated)
    if parts:
        object.__setattr__(method, "loss", lambda *given: Method.loss(method, *given))
    assert_same(ours(method, made), expected, statistics=True)


@pytest.mark.parametrize("objective", ["ce", "kl", "logit"])
@pytest.mark.parametrize("global_term", ["none", "ce"])
def test_a_further_point_on_the_segment_beside_the_start(objective: str, global_term: Any) -> None:
    made = case()
    stated = {"local_objective": "logit", "local_weight": 0.3, "step_size": 0.08, "eps": EPS, "global_weight": 1.3}
    stated |= {"segment_weight": 0.7, "segment_objective": objective, "global_term": global_term}
    expected = theirs(published.atlas_start, made, made.start(), smoothing=0.4, shares=shares(made, 1), **stated)
    mine = ours(ATLAS(local="start", label_smoothing=0.4, **stated), made)
    assert_same(mine, expected, statistics=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_points_on_the_segment_lie_between_image_and_adversary(dtype: torch.dtype) -> None:
    made, method = case(size=64), ATLAS(EPS, local="segment", count=3, start_noise="wide")
    made.model.to(dtype)
    made.batch = made.batch._replace(x=made.batch.x.to(dtype).contiguous(memory_format=torch.channels_last))
    x, adv, *points = method.prepare(made.model.train(), made.batch, made.key, State()).images.chunk(5)
    assert len(points) == 3 and torch.equal(x, made.batch.x)
    for z in points:
        assert (z >= torch.minimum(x, adv)).all() and (z <= torch.maximum(x, adv)).all()
    way = [((z - x).double().flatten(1).norm(dim=1) / (adv - x).double().flatten(1).norm(dim=1)) for z in points]
    assert min(map(float, map(torch.min, way))) < 0.1 and max(map(float, map(torch.max, way))) > 0.9
    assert not torch.equal(way[0], way[1])


@pytest.mark.parametrize(("how", "radius"), [({"start_noise": "wide"}, 2.0), ({"wide_start": 3.0}, 3.0)])
def test_start_may_leave_the_ball(how: dict[str, Any], radius: float) -> None:
    made = case()
    stated = {"local_objective": "logit", "local_weight": 0.5}
    expected = theirs(published.atlas_start, made, made.start(radius * EPS), eps=EPS, step_size=EPS, ball=1.0, **stated)
    mine = ours(ATLAS(EPS, local="start", **how, **stated), made)
    assert_same(mine, expected, statistics=True)
    assert (mine.images[-1] - made.batch.x).abs().max() > 1.5 * EPS


def test_start_may_be_that_of_liet() -> None:
    """Its start and step: with Jensen-Shannon that grows, and whole labels, it is LIET itself."""
    made, method = (
        case(),
        ATLAS(EPS, local="start", start_noise="liet", local_objective="js", local_weight=20.0, local_ramp=1.0),
    )
    state = State(epoch=1, epochs=2, total_steps=8, step=4)
    mine = ours(method, made, state)
    assert set(state.memory) == {"label_noise"}
    theirs_ = LIET(EPS, smoothing=0.0, weight=20.0)
    steps = Steps(copy.deepcopy(made.model).train())
    loss, _ = theirs_.train_step(steps.model, made.batch, made.key, state, steps)
    close(mine.loss, loss, "loss")
    for a, b in zip(mine.grads[0], steps.grads[0], strict=True):
        close(a, b, "gradient")


def test_start_may_be_that_of_fgsm_pgi() -> None:
    """With squared logits, whose mean over the classes is 1 / C of ours, it is FGSM-PGI itself."""
    made, outcomes, memories = case(), [], []
    how: dict[str, Any] = {"local": "start", "start_noise": "pgi", "local_objective": "logit"}
    for method in (
        ATLAS(EPS, **how, local_weight=10 / CLASSES, label_smoothing=0.4),
        FGSMPGI(EPS, label_smoothing=0.4),
    ):
        state = State(epochs=2, total_steps=4, size=100)
        steps = Steps(copy.deepcopy(made.model).train())
        for state.step in range(4):
            state.epoch = state.step // 2
            method.step(steps.model, made.batch, made.key + state.step, state, steps)
        outcomes.append([g for grads in steps.grads for g in grads] + list(steps.model.buffers()))
        memories.append(state.memory)
    assert len(outcomes[0]) > 4 * 8 and all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
    assert set(memories[0]) == {"perturbations", "momentum"} and memories[0].keys() == memories[1].keys()
    assert all(torch.equal(value, memories[1][name]) for name, value in memories[0].items())
    assert method.stores and ATLAS(EPS, **how).stores == method.stores and ATLAS(EPS).stores == ()
    assert AWP(ATLAS(EPS, **how), 0.01).stores == ATLAS(EPS, **how).scaled(0.5).stores == method.stores
    assert ATLAS(EPS, **how).store_bytes([50_000, 3, 32, 32]) == method.store_bytes([50_000, 3, 32, 32]) > 1e9
    assert ATLAS(EPS, **ATLAS(EPS, **how).in_use()).in_use() == ATLAS(EPS, **how).in_use()
    assert ATLAS(8 / 255, **how, step_size=float(f"{8 / 255:g}"))._origin
    longer = ATLAS(EPS, **how, steps=2, step_size=0.625 * EPS)  # as a rollback makes it
    assert ours(longer, made, State(size=100)).loss.isfinite()


def test_what_starts_as_a_method_does_keeps_to_it() -> None:
    method = ATLAS(EPS, local="start", start_noise="liet", label_smoothing=0.2)
    small = method.scaled(0.1)
    assert isinstance(small, ATLAS) and small._origin is not None
    assert small._origin.in_use()["noise_magnitude"] == 2.0, "of the whole radius, which is above 8/255"
    assert small.eps == small._origin.eps == small._attack.effective_step_size == 0.1 * EPS
    with pytest.raises(ValueError, match="atlas with start_noise='liet', which starts from the noise of an image's"):
        Mixing(method, "mixup", 1.0)
    with pytest.raises(ValueError, match="memory label_noise is"):
        method.require_memory({"label_noise": torch.zeros(4)}, [10, 3, 6, 6])
    longer = method.with_steps(2)
    assert passes_of(longer) == passes_of(method) + 2


def passes_of(method: Method) -> float:
    """Passes, of a network without a cheap layer's share."""
    made, model = (
        case(),
        nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(1024, CLASSES)),
    )
    batch, state = made.batch._replace(x=made.batch.x.float()), State(size=8)
    method.before_step(model.train(), batch, made.key, state)
    return round(count_passes(model, batch.x, lambda: method.train_step(model, batch, made.key, state, Steps(model))))


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("steps", [1, 3])
def test_start_in_other_norms(norm: Any, steps: int) -> None:
    made, eps = case(), {"l2": 0.5, "l1": 3.0}[norm]
    method = ATLAS(eps, local="start", norm=norm, steps=steps)
    outcome = ours(method, made)
    start = random_start(made.batch.x, eps, norm=norm, key=made.key, ids=made.batch.ids)
    attack = PGD(eps, steps=steps, norm=norm, attack_mode="train")
    adv = attack(made.model, made.batch.x, made.batch.y, start=start, key=made.key, ids=made.batch.ids)
    close(outcome.images[-1], adv, "adversary", 1e-9)
    assert outcome.loss.isfinite()


def test_the_weight_of_start_grows_by_epochs() -> None:
    made = case()
    losses = {}
    for ramp, epoch in [(0.0, 0), (0.5, 0), (0.5, 1), (0.5, 3), (1.0, 0)]:
        method = ATLAS(EPS, local="start", local_weight=2.0, local_ramp=ramp)
        losses[ramp, epoch] = float(ours(method, made, State(epoch=epoch, epochs=4)).loss)
    none, full = float(ours(ATLAS(EPS, local="start", local_weight=0.0), made).loss), losses[0.0, 0]
    assert losses[0.5, 1] == losses[0.5, 3] == pytest.approx(full, rel=1e-7)
    assert losses[0.5, 0] == pytest.approx((none + full) / 2, rel=1e-6)
    assert losses[1.0, 0] == pytest.approx(none + (full - none) / 4, rel=1e-6)


@pytest.mark.parametrize(
    ("ramp", "shares_of_weight"),
    [
        ({"local_ramp": 0.5}, [0.5, 1, 1, 1]),
        ({"local_ramp": 0.5, "local_ramp_start": 0.5}, [0, 0, 0.5, 1]),
        ({"local_ramp": 0.75, "local_ramp_start": 0.25, "local_ramp_low": 0.4}, [0.4, 0.6, 0.8, 1]),
        ({"local_ramp": 0.5, "local_ramp_start": 0.25, "local_ramp_low": 2.0}, [2, 1.5, 1, 1]),
        ({"local_ramp_start": 0.5}, [0, 0, 1, 1]),
    ],
)
@pytest.mark.parametrize(
    "form",
    [
        {"local": "neighbours"}, {"local": "segment", "local_objective": "ce"}, {"local": "worst"}, {"local": "margin"},
        {"local": "start"},
    ],
    ids=lambda form: form["local"],
)  # fmt: skip
def test_the_weight_of_every_form_may_grow(
    form: dict[str, Any], ramp: dict[str, float], shares_of_weight: list[float]
) -> None:
    made = case()

    def loss(epoch: int = 0, weight: float = 0.7, **how: float) -> float:
        method = ATLAS(EPS, **form, local_weight=weight, label_smoothing=0.2, **how)
        return float(ours(method, made, State(epoch=epoch, epochs=4)).loss)

    none, full = loss(weight=0.0), loss()
    for epoch, share in enumerate(shares_of_weight):
        assert loss(epoch, **ramp) == pytest.approx(none + share * (full - none), rel=1e-6)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"local": "start", "bn": "joint"}, "bn='joint' has no meaning with local='start'"),
        ({"local": "start", "local_objective": "ce"}, "local_objective='ce' cannot be had with local='start'.*'js'"),
        ({"local_objective": "js"}, "local_objective='js' cannot be had with local='neighbours'.*'kl' or 'ce'"),
        ({"local_ramp": 0.6, "local_ramp_start": 0.5}, "local_ramp_start=0.5 and local_ramp=0.6 end after the train"),
        ({"local_ramp_low": 0.5}, "local_ramp_low=0.5 has no meaning where the weight does not grow.*set local_ramp"),
        ({"local": "start", "attack_mode": "eval"}, "attack_mode='eval' has no meaning with local='start'"),
        ({"local": "start", "project": True}, "project=True has no meaning with local='start'"),
        ({"local": "segment", "project": True}, "project=True has no meaning with local='segment'"),
        ({"local": "segment", "local_objective": "js"}, "local_objective='js' cannot be had with local='segment'"),
        ({"local": "segment", "segment_weight": 1.0}, "segment_weight=1.0 has no meaning with local='segment'.*start"),
        ({"iterates": "all"}, "iterates='all' has no meaning with local='neighbours'.*local='start'"),
        ({"keep": "none"}, "keep='none' has no meaning with local='neighbours'.*local='start'"),
        ({"segment_objective": "kl"}, "segment_objective='kl' has no meaning with local='neighbours'.*local='start'"),
        ({"local": "start", "start_noise": "pgi", "step_size": 0.05}, "step_size=0.05 with start_noise='pgi', whose"),
        ({"start_noise": "liet"}, "start_noise='liet' is for local='start', got 'neighbours'"),
        ({"local": "start", "start_noise": "liet", "norm": "l2"}, "start_noise='liet' is for norm='linf', got 'l2'"),
        ({"local": "start", "start_noise": "liet", "wide_start": 2}, "wide_start is another start than"),
        ({"local": "start", "start_noise": "wide", "steps": 2}, "wide_start is of one step in l_inf, got steps=2"),
    ],
)
def test_what_has_no_meaning_with_a_form_is_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"atlas: {message}"):
        ATLAS(EPS, **how)


def trained() -> Case:
    """A case whose images are classified right, so that not every adversary has the radius 0."""
    made = case()
    y = copy.deepcopy(made.model)(made.batch.x).argmax(1)
    made.batch = made.batch._replace(y=y)
    return made


def point(made: Case) -> tuple[Tensor, Tensor]:
    """In eval mode, where rows are apart: the adversaries as a leaf, and their logits."""
    made.model.eval().requires_grad_(False)
    x = made.start().requires_grad_()
    return made.model(x), x


def exact_jacobian(made: Case, x: Tensor) -> Tensor:
    return torch.stack([torch.autograd.functional.jacobian(made.model, row[None])[0, :, 0] for row in x.detach()])


def test_the_projections_estimate_half_the_squared_norm_of_the_jacobian_without_bias() -> None:
    made = case(size=4)
    logits, x = point(made)
    exact = exact_jacobian(made, x).square().sum((1, 2, 3, 4)) / 2
    basis = torch.eye(CLASSES, dtype=torch.float64).expand(4, -1, -1)
    close(jacobian_penalty(logits, x, basis).detach(), exact, "the basis instead of random vectors")
    v = unit_vectors(logits, made.key, made.batch.ids, 400)
    assert v.shape == (4, 400, CLASSES)
    torch.testing.assert_close(v.norm(dim=2), torch.ones(4, 400, dtype=torch.float64))
    close(jacobian_penalty(logits, x, v).detach(), exact, "400 random vectors", tolerance=0.1)
    assert not torch.equal(v[0], v[1])
    other = unit_vectors(logits[:1], made.key, made.batch.ids[:1], 400)
    assert torch.equal(other[0], v[0]), "a sample's directions go by its number"


def test_neighbours_with_logits_are_the_jacobian_norm_at_a_small_radius() -> None:
    """E ||z(x' + xi) - z(x')||^2 -> r^2/3 ||J||_F^2."""
    made = case(size=3)
    made.batch = made.batch._replace(x=made.batch.x.clamp(0.2, 0.8))
    logits, x = point(made)
    r, count = 1e-4, 4000
    z = sample_neighbours(x.detach(), r, count, key=made.key, ids=made.batch.ids)
    moved = (made.model(z).view(count, 3, CLASSES) - logits).square().sum(2).mean(0).detach()
    close(moved, r**2 / 3 * exact_jacobian(made, x).square().sum((1, 2, 3, 4)), "neighbours", tolerance=0.05)


def linear(classes: int = CLASSES) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(27, classes)).double()
    x = torch.rand(12, 3, 3, 3, dtype=torch.float64)
    return model, x, model(x).argmax(1)


def test_radius_is_the_true_one_of_a_linear_network() -> None:
    model, x, y = linear()
    leaf = x.clone().requires_grad_()
    rho = atlas_local.first_order_radius(model(leaf), leaf, y, CLASSES - 1).detach()
    w = model[1].weight
    for share, wrong in ((0.999, False), (1.001, True)):
        found = torch.zeros(len(x), dtype=torch.bool)
        for j in range(CLASSES):  # the worst point of the ball for each rival, in closed form
            direction = (w[j] - w[y]).sign().view_as(x)
            found |= model(x + share * rho[:, None, None, None] * direction).argmax(1) != y
        assert (found == wrong).all()
    one = atlas_local.first_order_radius(model(leaf), leaf, y, 1).detach()
    assert (one >= rho).all() and (one > rho).any(), "the runner-up by logits need not be the nearest"
    assert torch.equal(atlas_local.first_order_radius(model(leaf), leaf, y, 99).detach(), rho)
    y[0] = (y[0] + 1) % CLASSES
    assert atlas_local.first_order_radius(model(leaf), leaf, y, 1)[0] == 0


def test_margin_is_what_the_ball_takes_off_the_margin_of_a_linear_network() -> None:
    model, x, y = linear(classes=2)
    leaf = x.clone().requires_grad_()
    loss = atlas_local.margin_penalty(model(leaf), leaf, y, 0.07).detach()
    w = model[1].weight
    worst = x + 0.07 * (w[1 - y] - w[y]).sign().view_as(x)
    margins = [model(at).gather(1, y[:, None]) - model(at).gather(1, 1 - y[:, None]) for at in (x, worst)]
    close(loss, (margins[0] - margins[1])[:, 0].detach(), "margin lost")


def test_a_dead_network_has_a_finite_loss_and_finite_gradients() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(27, CLASSES))
    nn.init.zeros_(model[1].weight)
    batch = Batch(torch.rand(4, 3, 3, 3), torch.arange(4) % 2, torch.arange(4))
    model[1].bias.data[0] = 1.0  # right on some
    for form in ("jacobian", "margin", "radius"):
        loss, _ = ATLAS(EPS, local=form).loss(model, batch, noise_key())
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("project", [False, True])
def test_worst_lies_in_the_local_ball_and_is_worse(project: bool) -> None:
    made = case(size=32)
    method = ATLAS(EPS, local="worst", radius=0.04, project=project, attack_mode="keep")
    made.model.eval()
    x, adv, worst = method.prepare(made.model, made.batch, made.key, methods.State()).images.split(32)
    assert torch.equal(x, made.batch.x)
    assert (worst - adv).abs().max() <= 0.04 + 1e-12 and worst.min() >= 0 and worst.max() <= 1
    assert ((worst - x).abs().max() <= EPS + 1e-12) == project
    losses = [nn.functional.cross_entropy(made.model(at), made.batch.y) for at in (adv, worst)]
    assert losses[1] > losses[0]


@pytest.mark.parametrize("local", ["worst", "jacobian", "margin", "radius"])
@pytest.mark.parametrize("bn", ["joint", "split"])
def test_without_weight_a_term_changes_nothing_and_batchnorm_sees_one_forward(local: str, bn: str) -> None:
    plain = ours(ATLAS(EPS, local="none", bn=bn), case())
    mine = ours(ATLAS(EPS, local=local, local_weight=0, bn=bn), case())
    if local != "worst" or bn == "split":  # the worst neighbours are part of the joint statistics
        assert_same(mine, plain, statistics=local != "worst")
    assert mine.model.bn1.num_batches_tracked == (1 if bn == "joint" else 3 if local == "worst" else 2)


@pytest.mark.parametrize("local", ["worst", "segment", "jacobian", "margin", "radius"])
def test_forms_replay_and_can_be_taken_twice_on_one_attack(local: str) -> None:
    made, method = case(), ATLAS(EPS, local=local)
    given = method.prepare(made.model, made.batch, made.key, methods.State())
    first, metrics = method.objective(made.model, made.batch, given)
    again, _ = method.objective(made.model, made.batch, given)
    torch.manual_seed(99)
    assert torch.equal(first, again) and torch.equal(first, method.loss(case().model, made.batch, made.key)[0])
    assert set(metrics) == {"adv", "clean", "local", "global"} and not any(m.requires_grad for m in metrics.values())


@pytest.mark.parametrize("local", ["worst", "segment", "jacobian", "margin", "radius"])
def test_forms_under_autocast_are_computed_in_float32_and_close(local: str) -> None:
    losses = []
    for enabled in (False, True):
        made = case()
        made.model.float()
        batch = made.batch._replace(x=made.batch.x.float())
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, metrics = ATLAS(EPS, local=local).loss(made.model, batch, made.key)
        loss.backward()
        assert loss.dtype == metrics["local"].dtype == torch.float32
        assert all(p.grad.isfinite().all() for p in made.model.parameters())
        losses.append(float(metrics["local"]))
    assert losses[1] == pytest.approx(losses[0], rel=0.2)


def test_second_order_forms_run_a_compiled_network_uncompiled_in_the_training_forward() -> None:
    made = case()
    compiled = torch.compile(made.model, backend="eager")
    seen = []
    compiled.register_forward_pre_hook(lambda *_: seen.append(True))
    ATLAS(EPS, local="margin").loss(compiled, made.batch, made.key)[0].backward()
    assert len(seen) == 1  # the attack's gradient


def test_forms_refuse_options_that_mean_nothing_to_them() -> None:
    for form, option in (
        ("worst", {"count": 4}), ("margin", {"count": 2}), ("jacobian", {"project": True}),
        ("radius", {"local_objective": "ce"}), ("worst", {"rivals": 2}), ("neighbours", {"rivals": 2}),
    ):  # fmt: skip
        (name,) = option
        with pytest.raises(ValueError, match=f"atlas: {name}=.* has no meaning with local='{form}'.*choose local='"):
            methods.build("atlas", EPS, {"local": form, **option})
    methods.build("atlas", EPS, {"local": "none", "count": 3, "project": True})


def test_each_form_has_its_own_default_weight() -> None:
    ones = dict.fromkeys(("neighbours", "worst", "segment", "radius"), 1.0)
    for form, weight in {**ones, "jacobian": 0.01, "margin": 0.2}.items():
        assert torch.equal(
            ours(ATLAS(EPS, local=form), case()).loss, ours(ATLAS(EPS, local=form, local_weight=weight), case()).loss
        )
