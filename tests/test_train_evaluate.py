"""Looking at a model changes nothing of it: a run that is looked at ends with the same bits."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atlas_kernels import PGD
from atlas_train import engine, segment
from atlas_train.config import TrainConfig
from atlas_train.evaluate import eval_mode, evaluate
from tiny_runs import EPS, TINY, same, splits, weights


class Restless(nn.Module):
    """In eval mode too it counts, averages and draws; and it does not like to be told its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.Linear(64, 8), nn.Linear(8, 4)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.flatten(1))
        self.count += 1
        self.mean.lerp_(h.detach().mean(0), 0.1)
        return self.last((h - self.mean + 0.01 * torch.randn_like(h)).relu())

    def eval(self) -> Restless:
        return pytest.fail("eval() was called")


def model() -> Restless:
    torch.manual_seed(0)
    return Restless()


def test_evaluation_leaves_no_trace() -> None:
    net = model()
    net.last.eval()
    before, random, modes = weights(net), torch.get_rng_state(), [module.training for module in net.modules()]
    found = [evaluate(net, splits().test, EPS, steps=2) for _ in range(2)]
    assert found[0].pgd == found[1].pgd, "and draws the same again"
    assert same(weights(net), before) and torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in net.modules()] == modes
    with eval_mode(net):
        assert not any(module.training for module in net.modules())
    assert [module.training for module in net.modules()] == modes


@pytest.mark.parametrize("shape", ["[B]", "[2, B, C]", "loss first"])
def test_logits_of_a_wrong_shape_are_refused(shape: str) -> None:
    class Wrong(Restless):
        def forward(self, x: Tensor) -> Any:
            z = super().forward(x)
            return {"[B]": z[:, 0], "[2, B, C]": torch.stack([z, z]), "loss first": (z.sum(), z)}[shape]

    with pytest.raises(TypeError, match=r"model must return logits \[40, classes\], got shape"):
        evaluate(Wrong(), splits().test, EPS, steps=2)


def test_a_run_that_is_looked_at_is_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(**looks: int) -> dict[str, Tensor]:
        settings = TINY | {"method": "adv", "epochs": 2, "hyper": {"steps": 2}, "train_size": 32, **looks}
        return weights(engine.train(TrainConfig(**settings), splits=splits(40, 8), model=model()).model)

    monkeypatch.setattr(segment, "EVERY", 1)
    looked = trained(val_size=8, probe_size=8)
    monkeypatch.setattr(segment, "EVERY", 1000)
    assert same(looked, trained(val_size=0, probe_size=0))


def test_evaluation_beside_an_attack_in_another_mode_is_refused() -> None:
    net, inside, done = model(), threading.Event(), threading.Event()

    def stay(*_: object) -> None:
        inside.set()
        done.wait(5)

    hook = net.register_forward_pre_hook(stay)
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    thread = threading.Thread(target=lambda: PGD(EPS, steps=1, attack_mode="train")(net, x, y))
    thread.start()
    assert inside.wait(5)
    with pytest.raises(RuntimeError, match="another thread attacks this Restless"):
        evaluate(net, splits().test, EPS)
    done.set()
    thread.join()
    hook.remove()
