"""What holds for every training method, whatever it does."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atlas_kernels import noise_key
from atlas_train import data, methods, models
from atlas_train.methods import Batch, Method, State
from atlas_train.options import hints
from beside_published import Steps

EPS = 0.2


def made(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Batch, Tensor]:
    torch.manual_seed(0)
    model = models.build("digits_net", num_classes=4, in_channels=1, width=4).to(dtype)
    batch = Batch(torch.rand(6, 1, 8, 8, dtype=dtype), torch.randint(4, (6,)), torch.randperm(50)[:6])
    return model, batch, noise_key()


def step(method: Method, model: nn.Module, batch: Batch, key: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """One training step; fails if it changes the random state."""
    before = torch.get_rng_state()
    loss, metrics = method.step(model, batch, key, State(epoch=1, epochs=2, size=50), Steps(model))
    assert torch.equal(torch.get_rng_state(), before)
    return loss, metrics


@pytest.mark.parametrize("name", methods.names())
def test_a_step_moves_the_weights_and_leaves_the_rest(name: str) -> None:
    model, batch, key = made()
    before, x = copy.deepcopy(model.state_dict()), batch.x.clone()
    method = methods.build(name, EPS)
    loss, metrics = step(method, model, batch, key)
    assert loss.isfinite() and loss.ndim == 0 and not loss.requires_grad
    assert {"clean", "adv"} & set(metrics) and all(v.ndim == 0 and not v.requires_grad for v in metrics.values())
    after = model.state_dict()
    assert any(not torch.equal(after[n], before[n]) for n, _ in model.named_parameters())
    assert all(module.training for module in model.modules()) and torch.equal(batch.x, x) and not batch.x.requires_grad
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("name", methods.names())
def test_the_key_alone_rules_the_noise(name: str) -> None:
    outcomes = []
    for seed in (1, 2):
        model, batch, key = made()
        torch.manual_seed(seed)
        loss, _ = step(methods.build(name, EPS), model, batch, key)
        outcomes.append([loss, *model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.parametrize("name", methods.names())
def test_bf16_and_channels_last(name: str) -> None:
    model, batch, key = made()
    dtypes = []
    model.conv2.register_forward_hook(lambda *made: dtypes.append(made[2].dtype))  # type: ignore[operator, union-attr]
    batch = batch._replace(x=batch.x.to(memory_format=torch.channels_last))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = methods.build(name, EPS).step(model, batch, key, State(epoch=1, epochs=2, size=50), Steps(model))
    assert set(dtypes) == {torch.bfloat16} and loss.dtype == torch.float32 and loss.isfinite()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", [n for n in methods.names() if methods.get(n).train_step is Method.train_step])
def test_the_loss_is_the_objective_of_what_was_prepared(name: str) -> None:
    model, batch, key = made(torch.float64)
    method, state = methods.build(name, EPS), State(epoch=1, epochs=2, size=50)
    method.before_step(model, batch, key, state)
    whole, _ = copy.deepcopy(method).loss(copy.deepcopy(model), batch, key, copy.deepcopy(state))
    parts, _ = method.objective(model, batch, method.prepare(model, batch, key, state))
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)


LIMITED = [
    (name, field.name, limit, field.metadata[limit])
    for name in methods.names()
    for field in methods.hyper_parameters(methods.get(name)).values()
    for limit in ("low", "above", "high", "below")
    if field.metadata[limit] is not None
]


@pytest.mark.parametrize(("name", "option", "limit", "value"), LIMITED)
def test_hyper_parameters_out_of_range_are_refused_with_the_range(
    name: str, option: str, limit: str, value: float
) -> None:
    wrong = {"low": value - 1, "above": value, "high": value + 1, "below": value}[limit]
    sign = {"low": ">=", "above": ">", "high": "<=", "below": "<"}[limit]
    with pytest.raises(ValueError, match=f"{name}: {option} must be .*{sign} {value:g}.*got {wrong}"):
        methods.build(name, EPS, {option: wrong})


@pytest.mark.parametrize("name", methods.names())
def test_choices_are_refused_with_the_choices(name: str) -> None:
    method = methods.get(name)
    for field in methods.hyper_parameters(method).values():
        if isinstance(field.default, str):
            with pytest.raises(ValueError, match=f"{name}: {field.name} must be one of '.*', got 'nothing of these'"):
                methods.build(name, EPS, {field.name: "nothing of these"})
        assert field.metadata["help"], f"{field.name} has no help"
    with pytest.raises(ValueError, match=f"{name} has no hyper-parameter 'epss'"):
        methods.build(name, EPS, {"epss": 1})


@pytest.mark.parametrize("name", methods.names())
def test_the_defaults_of_each_data_set_can_be_built(name: str) -> None:
    method: Any = methods.get(name)
    for dataset in map(data.get, data.names()):
        values = methods.defaults_on(dataset, name)
        lengths = {key: v * dataset.eps if isinstance(v, methods.OfEps) else v for key, v in values.items()}
        built = methods.build(name, dataset.eps, lengths)
        assert {key: getattr(built, key) for key in values} == pytest.approx(lengths)
        assert set(values) <= set(hints(method))


_FORMS = [("atlas", {"local": form}) for form in ("worst", "jacobian", "radius", "start")]
_FORMS += [("atlas", {"local": "start", "start_noise": noise}) for noise in ("wide", "liet")]


@pytest.mark.parametrize(("name", "hyper"), [*((name, {}) for name in methods.names()), *_FORMS])
def test_hyper_parameters_as_used_are_those_that_are_used(name: str, hyper: dict[str, Any]) -> None:
    """What a default of None stands for, given as a number, is the same step bit for bit."""
    default = methods.build(name, EPS, hyper)
    used = default.in_use()
    assert set(used) == set(methods.hyper_parameters(type(default)))
    assert [key for key, value in used.items() if value is None] == (["first_layer"] if name == "yopo" else [])
    assert json.loads(json.dumps(used)) == used
    outcomes = []
    for method in (default, methods.build(name, EPS, used)):
        model, batch, key = made()
        loss, _ = step(method, model, batch, key)
        outcomes.append([loss, *model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
    for key, value in used.items():
        if getattr(default, key) is None and isinstance(value, float):
            other = methods.build(name, EPS, {**hyper, key: value / 2})
            assert other.in_use()[key] == value / 2
