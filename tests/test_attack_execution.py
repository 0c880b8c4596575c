"""How attacks are run: whatever the execution, the same attack, in the ball, and no trace left."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
import warnings
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from atlas_kernels import PGD, Execution, noise_key
from atlas_kernels.attacks import attacking
from atlas_kernels.attacks.execution import current_execution
from atlas_kernels.compat.trades import trades_loss
from atlas_train.models import build

EPS = 8 / 255


class Seen(nn.Module):
    """A network that notes the dtype its convolution computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build("preact_resnet18", num_classes=5, in_channels=3, width=4, normalize=((0.5,) * 3, (0.25,) * 3))
        self.dtypes: list[torch.dtype] = []
        self.net.conv1.register_forward_hook(lambda module, args, out: self.dtypes.append(out.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.fixture
def case(device: torch.device) -> tuple[Seen, Tensor, Tensor]:
    torch.manual_seed(0)
    return Seen().to(device), torch.rand(6, 3, 8, 8, device=device), torch.randint(5, (6,), device=device)


@pytest.mark.parametrize("outside", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16), ("keep", None)]
)
def test_precision_is_the_attacks_alone(case, outside, precision, dtype) -> None:
    model, x, y = case
    with torch.autocast(x.device.type, outside, enabled=outside is not None):
        with Execution(precision):
            adv = PGD(EPS, steps=2)(model, x, y)
        expected = dtype or outside or torch.float32
        assert model.dtypes == [expected] * 2
        model(x)
        assert model.dtypes[-1] == (outside or torch.float32), "and the forward after it is as it was"
    assert adv.dtype == torch.float32
    assert (adv - x).abs().max() <= EPS + 1e-7 and adv.min() >= 0 and adv.max() <= 1


def test_precision_reaches_drop_ins(case) -> None:
    model, x, y = case
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Execution("bf16"):
        loss = trades_loss(model, x, y, optimizer, perturb_steps=3)
    attack, training = [torch.bfloat16, torch.float32]
    assert model.dtypes.count(attack) == 4 and model.dtypes[-3:] == [training] * 3
    assert loss.dtype == training


def test_the_inner_of_two_counts_and_the_outer_comes_back(case) -> None:
    model, x, y = case
    attack = PGD(EPS, steps=1)
    with Execution("bf16"):
        with pytest.raises(RuntimeError, match="inside"), Execution():
            attack(model, x, y)
            raise RuntimeError("inside")
        attack(model, x, y)
    attack(model, x, y)
    assert model.dtypes == [torch.float32, torch.bfloat16, torch.float32]


def test_a_function_runs_where_its_modules_are(monkeypatch: pytest.MonkeyPatch) -> None:
    net, seen = nn.Linear(2, 2, device="meta"), []
    monkeypatch.setattr(Execution, "around", lambda self, model, device: nullcontext(seen.append(device.type)))
    for device in (None, torch.device("cuda")):
        with attacking(lambda v: net(v), "keep", None, device=device):
            pass
    assert seen == ["meta", "cuda"]


def test_one_execution_serves_again_and_within_itself(case) -> None:
    model, x, y = case
    execution = Execution("bf16")
    for _ in range(2):
        with execution, execution:
            PGD(EPS, steps=1)(model, x, y)
    PGD(EPS, steps=1)(model, x, y)
    assert model.dtypes == [torch.bfloat16] * 2 + [torch.float32]


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="precision.*bf16.*int8|precision.*int8.*bf16"):
        Execution("int8")


def test_pickle_and_copy_take_the_settings_alone(case) -> None:
    model, x, y = case
    for execution in (Execution("bf16"), Execution(cuda_graphs=True)):
        with execution, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            PGD(EPS, steps=1)(model, x, y)
        for made in (pickle.loads(pickle.dumps(execution)), copy.deepcopy(execution), copy.copy(execution)):
            assert repr(made) == repr(execution) and made is not execution
            assert (made.graphs is None) == (execution.graphs is None)
            assert made.graphs is None or made.graphs is not execution.graphs


def test_threads_and_tasks_enter_one_execution_in_any_order() -> None:
    execution, default, seen = Execution("bf16"), current_execution(), []

    async def task(first: float, second: float) -> None:
        await asyncio.sleep(first)
        with execution:
            await asyncio.sleep(second)
            seen.append(current_execution() is execution)
        seen.append(current_execution() is default)

    async def tasks() -> None:
        await asyncio.gather(task(0, 0.02), task(0.01, 0.02))  # in first, out first

    threads = [threading.Thread(target=lambda: asyncio.run(tasks())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 8 and current_execution() is default

    def entering() -> Iterator[None]:
        with Execution() as inner:
            yield
            assert current_execution() is inner or current_execution() is execution

    generator = entering()
    next(generator)
    with execution:
        assert list(generator) == [], "it ends although another has been entered since"
        assert current_execution() is execution
    assert current_execution() is default


def test_an_execution_left_where_it_was_not_entered_is_refused() -> None:
    execution = Execution("bf16")
    thread = threading.Thread(target=execution.__enter__)
    thread.start()
    thread.join()
    with pytest.raises(RuntimeError, match="left in another thread or task than it was entered in"):
        execution.__exit__(None, None, None)


def test_threads_with_executions_of_their_own_on_one_model(case) -> None:
    model, x, y = case
    model.eval()
    attack, key, found = PGD(EPS, steps=2), noise_key(x.device), {}

    def run(precision: str) -> None:
        with Execution(precision):
            found[precision] = [attack(model, x, y, key=key) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(precision,)) for precision in ("fp32", "bf16")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for precision, advs in found.items():
        with Execution(precision):
            assert all(torch.equal(adv, attack(model, x, y, key=key)) for adv in advs)
    assert len(found) == 2 and not any("forward" in vars(module) for module in model.modules())
