"""The training methods: their losses against plain formulas, their identities, and what they leave alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from atlas_kernels import noise_key, sample_neighbours
from atlas_kernels.attacks import PGD
from atlas_train import methods
from atlas_train.methods import ADV, ATLAS, Batch, OneStepADV, Standard

EPS = 0.2
#: One training forward on one attack; the others have files of their own.
PLAIN = ("atlas", "one_step_adv", "n_fgsm", "adv", "gairat", "standard")


class Net(nn.Module):
    """Small, with BatchNorm; smooth, so that differently arranged float sums stay close."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.out = nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.softplus(self.bn(self.conv(x - 0.5))).flatten(1))


def make(channels: int = 1, size: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Net, Batch, Tensor]:
    torch.manual_seed(0)
    model = Net(channels).to(dtype)
    nn.init.uniform_(model.bn.weight, 0.5, 2.0)
    x = torch.rand(size, channels, 6, 6, dtype=dtype)
    batch = Batch(x, torch.randint(5, (size,)), torch.randperm(100)[:size])
    return model, batch, noise_key()


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def evaluated(method: methods.Method, **made: int) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    model, batch, key = make(**made)
    loss, metrics = method.loss(model, batch, key)
    return loss.detach(), gradients(model, loss), metrics


def assert_same_bits(a: Tensor | list[Tensor], b: Tensor | list[Tensor]) -> None:
    for left, right in zip([a] if isinstance(a, Tensor) else a, [b] if isinstance(b, Tensor) else b, strict=True):
        assert torch.equal(left, right)


def test_registry_knows_every_method_and_names_the_nearest() -> None:
    assert set(methods.names()) >= {"atlas", "adv", "one_step_adv", "standard"}
    assert all(methods.get(name).name == name for name in methods.names())
    with pytest.raises(ValueError, match="'atlsa'.*nearest is 'atlas'"):
        methods.get("atlsa")
    with pytest.raises(ValueError, match="atlas has no hyper-parameter 'raduis'.*nearest is 'radius'"):
        methods.build("atlas", EPS, {"raduis": 0.1})
    with pytest.raises(ValueError, match="standard has no hyper-parameter 'steps'"):
        methods.build("standard", EPS, {"steps": 3})


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        ("atlas", {"radius": 0}, r"atlas: radius must be a number > 0 and <= 1, got 0"),
        ("atlas", {"radius": float("nan")}, r"radius must be a number > 0 and <= 1, got nan"),
        ("atlas", {"steps": 0}, r"atlas: steps must be an integer >= 1, got 0"),
        ("atlas", {"steps": 2.5}, r"steps must be an integer >= 1, got 2.5"),
        ("atlas", {"count": True}, r"count must be an integer >= 1, got True"),
        ("atlas", {"count": 0}, r"count must be an integer >= 1"),
        ("atlas", {"local_weight": -1}, r"local_weight must be a number >= 0, got -1"),
        ("atlas", {"global_weight": "much"}, r"global_weight must be a number >= 0, got 'much'"),
        ("atlas", {"local": "ball"}, r"local must be one of 'neighbours', 'worst', .* 'none', got 'ball'"),
        ("atlas", {"local_objective": "mse"}, r"local_objective must be one of 'kl', 'ce', 'logit'"),
        ("atlas", {"local_objective": None}, r"local_objective must be one of 'kl', 'ce', .*, got None"),
        ("atlas", {"bn": "frozen"}, r"bn must be one of 'joint', 'split'"),
        ("atlas", {"project": 1}, r"project must be true or false, got 1"),
        ("adv", {"step_size": 0}, r"adv: step_size must be a number > 0, got 0"),
        ("one_step_adv", {"attack_mode": "evil"}, r"attack_mode must be one of 'train', 'eval', 'keep'"),
    ],
)
def test_wrong_hyper_parameters_are_refused_with_the_allowed_range(name: str, hyper: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        methods.build(name, EPS, hyper)


@pytest.mark.parametrize("eps", [8, 1.0, 0, -0.1, float("inf")])
def test_eps_outside_the_unit_range_is_refused_with_a_hint(eps: float) -> None:
    with pytest.raises(ValueError, match="eps must be a number > 0 and < 1.*write 8/255 instead of 8"):
        Standard(eps=eps)


def test_radii_may_be_written_as_fractions() -> None:
    assert ATLAS(eps="8/255", radius="4/255").radius == 4 / 255  # type: ignore[arg-type]
    assert ATLAS(eps=1 / 4).radius is None


def test_standard_is_cross_entropy_on_the_images() -> None:
    loss, grads, metrics = evaluated(Standard(EPS))
    model, batch, _ = make()
    logits = model(batch.x)
    expected = F.cross_entropy(logits, batch.y)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grads, gradients(model, expected))
    assert metrics["clean"] == (logits.argmax(1) == batch.y).float().mean()
    assert not Standard.adversarial and ADV.adversarial and OneStepADV.adversarial and ATLAS.adversarial


def test_adv_is_cross_entropy_on_pgd_adversaries() -> None:
    loss, grads, metrics = evaluated(ADV(EPS, steps=3))
    model, batch, key = make()
    adv = PGD(EPS, steps=3, attack_mode="train")(model, batch.x, batch.y, key=key, ids=batch.ids)
    logits = model(adv)
    expected = F.cross_entropy(logits, batch.y)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grads, gradients(model, expected))
    assert metrics["adv"] == (logits.argmax(1) == batch.y).float().mean()


def test_one_step_adv_takes_one_step_of_1_25_eps_from_a_random_start() -> None:
    wanted = evaluated(ADV(EPS, steps=1, step_size=1.25 * EPS))
    assert_same_bits(evaluated(OneStepADV(EPS))[0], wanted[0])
    assert_same_bits(evaluated(OneStepADV(EPS))[1], wanted[1])
    assert not torch.equal(evaluated(OneStepADV(EPS, step_size=0.5 * EPS))[0], wanted[0])


@pytest.mark.parametrize("bn", ["joint", "split"])
@pytest.mark.parametrize(("steps", "step_size"), [(1, None), (1, 0.1), (3, None)])
def test_atlas_without_terms_is_adv_bit_for_bit(steps: int, step_size: float | None, bn: str) -> None:
    atlas = ATLAS(EPS, steps=steps, step_size=step_size, local="none", global_term="none", bn=bn)  # type: ignore[arg-type]
    loss, grads, metrics = evaluated(atlas, channels=3)
    expected, expected_grads, expected_metrics = evaluated(ADV(EPS, steps=steps, step_size=step_size), channels=3)
    assert_same_bits(loss, expected)
    assert_same_bits(grads, expected_grads)
    assert metrics == expected_metrics


def plain_atlas(m: ATLAS, model: nn.Module, batch: Batch, key: Tensor) -> Tensor:
    """The documented loss, with PyTorch's own losses and the operators one by one."""
    x, y, ids = batch
    adv = PGD(m.eps, m.step_size, m.steps, attack_mode=m.attack_mode)(model, x, y, key=key, ids=ids)
    around = {"x": x, "eps": m.eps} if m.project else {}
    z = sample_neighbours(adv, m.radius or m.eps / 2, m.count, key=key, ids=ids, **around)  # type: ignore[arg-type]
    parts = [x, adv, *z.split(len(x))]
    used = [
        i for i in range(len(parts)) if not (i == 0 and m.global_term == "none") and not (i > 1 and m.local == "none")
    ]
    if m.bn == "joint":
        logits = dict(zip(used, model(torch.cat([parts[i] for i in used])).split(len(x)), strict=True))
    else:
        logits = {i: model(parts[i]) for i in used}

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return F.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="batchmean", log_target=True)

    local = {
        "kl": lambda z: kl(logits[1].detach(), z),
        "ce": lambda z: F.cross_entropy(z, y),
        "logit": lambda z: F.mse_loss(z, logits[1], reduction="sum") / len(y),
    }[m.local_objective]
    loss = F.cross_entropy(logits[1], y)
    if m.local != "none":
        loss = loss + m.local_weight * sum(local(logits[2 + k]) for k in range(m.count)) / m.count
    if m.global_term == "kl":
        loss = loss + m.global_weight * kl(logits[0], logits[1])
    elif m.global_term == "ce":
        loss = loss + m.global_weight * F.cross_entropy(logits[0], y)
    elif m.global_term == "logit":
        loss = loss + m.global_weight * F.mse_loss(logits[0], logits[1], reduction="sum") / len(y)
    return loss


@pytest.mark.parametrize("bn", ["joint", "split"])
@pytest.mark.parametrize("global_term", ["kl", "ce", "logit", "none"])
@pytest.mark.parametrize("local", ["kl", "ce", "logit", "none"])
def test_atlas_is_the_documented_formula(local: str, global_term: str, bn: str) -> None:
    wanted = {"local": "none"} if local == "none" else {"local_objective": local}
    weights = {"local_weight": 0.7, "global_weight": 1.3, "radius": 0.15, "count": 2, "steps": 2}
    method = ATLAS(EPS, **wanted, **weights, global_term=global_term, bn=bn, project=local == "ce")  # type: ignore[arg-type]
    model, batch, key = make(channels=3, dtype=torch.float64)
    expected = plain_atlas(method, model, batch, key)
    expected_grads = gradients(model, expected)
    model, batch, key = make(channels=3, dtype=torch.float64)
    loss, metrics = method.loss(model, batch, key)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(model, loss), expected_grads)
    assert set(metrics) == {"adv"} | ({"local"} if local != "none" else set()) | (
        {"clean", "global"} if global_term != "none" else set()
    )
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())


def test_the_default_radius_is_half_of_eps() -> None:
    assert_same_bits(evaluated(ATLAS(EPS))[0], evaluated(ATLAS(EPS, radius=EPS / 2))[0])
    assert not torch.equal(evaluated(ATLAS(EPS))[0], evaluated(ATLAS(EPS, radius=EPS))[0])


class Recorder(TorchDispatchMode):
    """Every operator that runs, by name, and marks in between."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.events.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("hyper", [{}, {"local": "none"}, {"global_term": "none", "count": 3, "project": True}])
def test_one_operator_lies_between_last_gradient_and_training_forward(
    monkeypatch: pytest.MonkeyPatch, hyper: dict, steps: int
) -> None:
    method = ATLAS(EPS, steps=steps, **hyper)
    model, batch, key = make(channels=3)
    method.loss(model, batch, key)  # the buffer is made by the first step
    recorder = Recorder()
    grad = torch.autograd.grad

    def marked(*args, **kwargs):  # type: ignore[no-untyped-def]
        result = grad(*args, **kwargs)
        recorder.events.append("gradient")
        return result

    monkeypatch.setattr(torch.autograd, "grad", marked)
    model.register_forward_pre_hook(lambda *_: recorder.events.append("forward"))
    with recorder:
        method.loss(model, batch, key)
    last = len(recorder.events) - 1 - recorder.events[::-1].index("gradient")
    assert recorder.events.count("gradient") == steps and recorder.events.count("forward") == steps + 1
    between = recorder.events[last + 1 : recorder.events.index("forward", last)]
    assert between == ["atlas_kernels.pgd_step_neighbours.default"]


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_batch_is_one_buffer_in_the_layout_of_the_images(channels_last: bool) -> None:
    model, batch, key = make(channels=3)
    if channels_last:
        batch = batch._replace(x=batch.x.to(memory_format=torch.channels_last))
    seen: list[Tensor] = []
    model.register_forward_hook(
        lambda module, inputs, _: seen.append(inputs[0]) if not inputs[0].requires_grad else None
    )
    method = ATLAS(EPS, count=2)
    for _ in range(2):
        method.loss(model, batch, key)[0].backward()
    assert seen[0].data_ptr() == seen[1].data_ptr() and seen[0].shape == (4 * len(batch.x), 3, 6, 6)
    assert seen[0].is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert torch.equal(seen[0][: len(batch.x)], batch.x)
    delta = (seen[0][len(batch.x) : 2 * len(batch.x)] - batch.x).abs()
    assert EPS / 2 < delta.max() <= EPS + 1e-6


def test_a_second_loss_before_backward_is_an_error_and_not_a_wrong_gradient() -> None:
    _, batch, key = make()
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 5))  # saves its input, which is the buffer
    method = ATLAS(EPS)
    first, _ = method.loss(model, batch, key)
    method.loss(model, batch, key)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()


@pytest.mark.parametrize("name", PLAIN)
def test_a_loss_leaves_gradients_alone_and_batchnorm_sees_only_the_training_forward(name: str) -> None:
    model, batch, key = make()
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    methods.build(name, EPS).loss(model, batch, key)
    assert all((p.grad == 3.0).all() and p.requires_grad for p in model.parameters())
    assert model.bn.num_batches_tracked == 1 and model.training
    model, batch, key = make()
    ATLAS(EPS, bn="split", count=2).loss(model, batch, key)
    assert model.bn.num_batches_tracked == 4  # x, x', z_1, z_2


@pytest.mark.parametrize("name", PLAIN)
def test_key_and_ids_alone_rule_the_noise(name: str) -> None:
    method = methods.build(name, EPS)
    model, batch, key = make()
    model.eval()  # train mode would couple the rows
    torch.manual_seed(1)
    loss = method.loss(model, batch, key)[0].detach()
    torch.manual_seed(2)
    assert_same_bits(method.loss(model, batch, key)[0].detach(), loss)
    order = torch.randperm(len(batch.y))
    eval_mode = method if name == "standard" else dataclasses.replace(method, attack_mode="eval")  # type: ignore[call-arg]
    torch.testing.assert_close(
        eval_mode.loss(model, Batch(*(part[order] for part in batch)), key)[0], eval_mode.loss(model, batch, key)[0]
    )
    other = method.loss(model, batch, key + torch.tensor([1, 0]))[0].detach()
    assert torch.equal(other, loss) == (name == "standard")


@pytest.mark.parametrize("name", PLAIN)
def test_autocast_reaches_the_network_but_not_the_loss(name: str) -> None:
    model, batch, key = make(channels=3)
    dtypes = []
    model.out.register_forward_hook(lambda module, _, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = methods.build(name, EPS).loss(model, batch, key)
    loss.backward()
    assert set(dtypes) == {torch.bfloat16} and loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())
