"""A batch dealt out to two processes: losses, steps and memory of every method are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas_train import methods
from atlas_train.data import Batches, Images
from atlas_train.descent import OptimizerDescent
from atlas_train.methods import AWP, Curriculum, Method, Mixing, State
from atlas_train.noise import noise_keys
from forked import in_processes

EPS, CLASSES = 0.1, 4
Outcome = dict[str, Tensor]


class Network(nn.Module):
    """Two convolutions, with frozen statistics between them or without any."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.scale, self.shift = (nn.Parameter(torch.rand(4)) for _ in range(2))
        self.register_buffer("mean", torch.randn(4) if frozen else None)
        self.register_buffer("var", torch.rand(4) + 0.5 if frozen else None)
        self.linear = nn.Linear(6, CLASSES)
        self.linear.weight.data *= 10  # so that it is sure of some images

    def features(self, x: Tensor) -> Tensor:
        h = self.conv1(x)
        h = h if self.mean is None else F.batch_norm(h, self.mean, self.var, self.scale, self.shift)
        return F.softplus(self.conv2(F.softplus(h))).mean((2, 3))

    def head(self, h: Tensor) -> Tensor:
        return self.linear(h)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def build(name: str, **hyper: Any) -> Method:
    return methods.build(name, EPS, hyper)


CASES: dict[str, Method] = {
    **{name: build(name) for name in methods.names()},
    "adr trades": build("adr", form="trades", gs=1.0),
    "atlas pgi": build("atlas", local="start", start_noise="pgi", local_objective="logit", keep="none"),
    "atlas radius": build("atlas", local="radius"),
    "fgsm_pgi bfloat16": build("fgsm_pgi", store="bfloat16"),
    "fgsm_uap per class": build("fgsm_uap", per_class=True),
    "gairat": build("gairat", burn_in=0.0),
    "gairat discrete": build("gairat", burn_in=0.0, weighting="discrete"),
    "grad_align": build("grad_align", start="random"),
    "nuat": build("nuat", alternate=False, growth_share=0.0),
    "stored_adv": build("stored_adv", replays=2, local_weight=0.01),
    "smoothed": methods.build("mart", EPS, label_smoothing=0.3),
    "mixup": Mixing(build("nuat", alternate=False, growth_share=0.0), kind="mixup"),
    "cutmix": Mixing(build("adv"), kind="cutmix"),
    "awp": AWP(build("trades"), gamma=0.05),
    "awp nuat": AWP(build("nuat", growth_share=0.0), gamma=0.05),
    "curriculum": Curriculum(build("adv"), eps_warmup=2, mix_share=0.5, mix_steps=3),
}


def trained(method: Method, frozen: bool, place: tuple[int, int] = (0, 1), repeats: bool = False) -> Outcome:
    """Two batches, of seven and of five images: the losses that are looked at, what comes of them, all that stays."""
    torch.manual_seed(0)
    images = Images(torch.randint(256, (12, 1, 8, 8), dtype=torch.uint8), torch.arange(12) % CLASSES)
    extra = Images(torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8), torch.arange(3) % CLASSES) if repeats else None
    model = Network(frozen).double()
    batches = Batches(images, 7, shuffle=True, seed=0, device="cpu", dtype=torch.float64, place=place, extra=extra)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    outcome, memory = dict[str, Tensor](), dict[str, Tensor]()

    def look(loss: Tensor, metrics: dict[str, Tensor]) -> None:
        outcome[f"look {len(outcome)}"] = loss

    for step, (batch, key) in enumerate(zip(batches, noise_keys(0, 5, 2), strict=True)):
        state = State(2 + step, 4, 1, 2, 12 if extra is None else 15, memory, repeats=repeats, augment=True)
        descent = OptimizerDescent(optimizer, lambda update: 0.1, look, batch.deal)
        loss, metrics = batch.deal.settled(*method.step(model, batch, key, state, descent), model)
        outcome |= {f"{step} loss": loss, **{f"{step} {name}": value for name, value in metrics.items()}}
    return outcome | memory | model.state_dict()


@pytest.fixture(scope="module")
def dealt(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    """What each of two processes comes to, for all cases in turn."""
    folder = tmp_path_factory.mktemp("dealt")

    def body(rank: int) -> None:
        made = {
            f"{case} {frozen}": trained(CASES[case], frozen, (rank, 2)) for case in CASES for frozen in (False, True)
        }
        for case in ("fgsm_pgi", "stored_adv"):
            made[f"{case} repeats"] = trained(CASES[case], False, (rank, 2), repeats=True)
        torch.save(made, folder / f"{rank}.pt")

    assert in_processes(2, folder, body) == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def agree(dealt: Outcome, whole: Outcome) -> None:
    """To 1e-9; accuracies are made in float32."""
    assert dealt.keys() == whole.keys()
    rough = {name for name in whole if name[2:] in ("clean", "adv")}
    for names, near in ((whole.keys() - rough, 1e-11), (rough, 1e-7)):
        made, wanted = ({name: outcome[name] for name in sorted(names)} for outcome in (dealt, whole))
        torch.testing.assert_close(made, wanted, rtol=1e-9, atol=near, equal_nan=True)


@pytest.mark.parametrize("case", ["fgsm_pgi", "stored_adv"])
def test_an_image_that_comes_twice(dealt: list[dict[str, Outcome]], case: str) -> None:
    whole = trained(CASES[case], False, repeats=True)
    for outcome in dealt:
        agree(outcome[f"{case} repeats"], whole)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(dealt: list[dict[str, Outcome]], case: str) -> None:
    for frozen in (False, True):
        whole = trained(CASES[case], frozen)
        for outcome in dealt:
            agree(outcome[f"{case} {frozen}"], whole)
