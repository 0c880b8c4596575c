"""Networks that return more than a tensor of logits are attacked, trained and judged as those that return it alone."""

from __future__ import annotations

import math
import warnings
from collections import namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atlas_kernels import PGD, noise_key, outputs
from atlas_kernels.compat import awp, fast_adversarial, gairat, jacobian, mart, torchattacks, trades
from atlas_kernels.outputs import logits_of
from atlas_train import engine, methods
from atlas_train.config import TrainConfig
from atlas_train.data import Images
from atlas_train.evaluate import evaluate
from tiny_runs import EPS, TINY, splits

Named = namedtuple("Named", ["loss", "logits"])
#: As libraries return them: objects (transformers, timm), named tuples (torchvision), dicts, tuples.
FORMS: dict[str, Callable[[Tensor], Any]] = {
    "object": lambda z: SimpleNamespace(loss=None, logits=z),
    "named": lambda z: Named(None, z),
    "dict": lambda z: {"features": z[:, :1], "logits": z},
    "tuple": lambda z: (z, z[:, :1]),
    "list": lambda z: [z],
}


class Net(nn.Module):
    """In two parts, with BatchNorm, for 8x8 images."""

    def __init__(self, form: Callable[[Tensor], Any] = lambda z: z) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Softplus())
        self.last, self.form = nn.Linear(8, 4), form

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def head(self, h: Tensor) -> Tensor:
        return self.last(h)

    def forward(self, x: Tensor) -> Any:
        return self.form(self.head(self.features(x)))


def net(form: Callable[[Tensor], Any] = lambda z: z) -> Net:
    torch.manual_seed(0)
    return Net(form)


X, Y = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
pytestmark = pytest.mark.filterwarnings("ignore:the model returns a:UserWarning")


@pytest.mark.parametrize("form", FORMS)
def test_logits_of(form: str) -> None:
    z = torch.rand(3, 4)
    assert logits_of(FORMS[form](z)) is z and logits_of(z) is z


def test_the_first_of_a_tuple_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_told", set())
    with pytest.warns(UserWarning, match="returns a tuple of 2: its first is taken as the logits"):
        logits_of((X, Y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits_of((Y, X))
        logits_of({"logits": X})


@pytest.mark.parametrize(
    "output, got",
    [({"out": X}, r"a dict with the keys \['out'\]"), ((), "a tuple"), ((3, X), "a tuple"), ("z", "a str")],
)
def test_anything_else_is_refused_with_what_to_do(output: Any, got: str) -> None:
    with pytest.raises(TypeError, match=f"got {got}: put the network into a torch.nn.Module whose forward"):
        logits_of(output)


@pytest.mark.parametrize("form", FORMS)
def test_attacks_and_drop_ins_take_them(form: str) -> None:
    def adversaries(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        key = noise_key()
        weights = awp.TradesAWP(model, None, None, 0.01).calc_awp(X, X, Y, 1.0) | awp.AdvWeightPerturb(
            model, None, None, 0.01
        ).calc_awp(X, Y)
        x = X.clone().requires_grad_()
        return [
            PGD(EPS, steps=2, restarts=2, keep="best")(model, X, Y, key=key),
            PGD(EPS, steps=2, objective="kl", attack_mode="train")(model, X, key=key),
            torchattacks.PGD(model, EPS, EPS / 4, 2)(X, Y),
            trades.trades_loss(model, X, Y, optimizer, perturb_steps=2),
            mart.mart_loss(model, X, Y, optimizer, perturb_steps=2),
            gairat.GA_PGD(model, X, Y, EPS, EPS / 4, 2, "cent", "Madry", False)[0],
            jacobian.JacobianReg(-1)(x, model(x)),
            torch.tensor(fast_adversarial.evaluate_standard([(X, Y)], model)),
            *weights.values(),
        ]

    for found, wanted in zip(adversaries(net(FORMS[form])), adversaries(net()), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", methods.names())
def test_every_method_trains_on_them(name: str) -> None:
    def trained(form: Callable[[Tensor], Any]) -> nn.Module:
        settings = TINY | {"method": name, "epochs": 1, "val_size": 16}
        return engine.train(TrainConfig(**settings), splits=splits(32, 8), model=net(form)).model

    found, wanted = trained(FORMS["object"]), trained(lambda z: z)
    assert all(
        torch.equal(a, b) for a, b in zip(found.state_dict().values(), wanted.state_dict().values(), strict=True)
    )
    if name == "standard":
        results = [evaluate(model, splits().test, EPS, steps=2).to_dict() | {"seconds": 0} for model in (found, wanted)]
        assert results[0] == results[1]


def test_a_row_with_nan_has_no_class() -> None:
    z = torch.tensor([[1.0, 3.0, 3.0], [math.nan, 0, 0], [0, math.nan, 0], [math.inf, 0, math.inf]])
    assert outputs.predicted(z).tolist() == [1, -1, -1, 0]


def test_what_says_nothing_is_right_for_no_label() -> None:
    """NaN is the largest of its row to torch, so that a network of nothing but NaN looked right on the first class."""
    nothing, x, y = net(lambda z: z * math.nan).eval(), X, torch.zeros(8, dtype=torch.int64)
    found = evaluate(nothing, Images((X * 255).to(torch.uint8), y), EPS, steps=1)
    assert (found.clean, found.fgsm, found.pgd) == (0, 0, 0)
    assert gairat.eval_clean(nothing, [(x, y)])[1] == fast_adversarial.evaluate_standard([(x, y)], nothing)[1] == 0
    attacks = [torchattacks.FGSM(nothing), torchattacks.PGD(nothing, steps=1)]
    assert attacks[1].save([(x, y)], verbose=False, return_verbose=True)[0] == 0  # type: ignore[index]
    many = torchattacks.MultiAttack(attacks)
    many._records = [0, 0, 0]
    many(x, y)
    assert many._records == [8, 0, 0], "all fooled by the first"
