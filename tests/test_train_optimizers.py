"""The optimiser of a run: fused where the weights are on CUDA, and given back its memory in any layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from atlas_train import optimizers
from atlas_train.config import TrainConfig

OPTIMIZERS = [{"optimizer": "adam"}, {"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.0}]


def config(**changed: Any) -> TrainConfig:
    return TrainConfig(**{"lr": 0.1, "weight_decay": 1e-2} | changed)


def networks(count: int) -> list[nn.Module]:
    """Copies of one network of two layers."""
    made = []
    for _ in range(count):
        torch.manual_seed(0)
        made.append(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)))
    return made


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, layers: slice) -> None:
    """A step of the weights of these layers."""
    optimizer.zero_grad()
    x = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)
    for layer in model[layers]:
        layer(x if layer.in_channels == 3 else x[:, [0, 1, 2, 0]]).square().mean().backward()
    optimizer.step()


def assert_close(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_fused_kernels_are_for_dense_real_weights_on_cuda() -> None:
    def weight(strides: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cuda") -> Tensor:
        return torch.empty_strided((4, 3, 5, 5), strides, dtype=dtype, device=device)

    dense, channels_last, sliced = (75, 25, 5, 1), (75, 1, 15, 3), (150, 25, 5, 1)
    with FakeTensorMode():
        taken = [weight(dense), weight(channels_last), weight(dense, torch.bfloat16), torch.empty(0, device="cuda")]
        refused = [weight(sliced), weight(dense, torch.complex64), weight(dense, device="cpu")]
        assert [optimizers.fusible(weight) for weight in taken] == [True] * len(taken)
        assert [optimizers.fusible(weight) for weight in refused] == [False] * len(refused)


@pytest.mark.parametrize("how", OPTIMIZERS, ids=str)
def test_weights_that_get_their_first_gradient_later(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused = networks(2)
    for model, is_fused in ((plain, False), (fused, True)):
        monkeypatch.setattr(optimizers, "fusible", lambda weight, is_fused=is_fused: is_fused)
        optimizer = optimizers.make(config(**how), model)
        assert bool(optimizer.param_groups[0]["fused"]) == is_fused
        for layers in (slice(0, 1), slice(0, 2), slice(1, 2)):
            descend(model, optimizer, layers)
    assert_close(plain, fused)


@pytest.mark.parametrize("how", OPTIMIZERS, ids=str)
def test_memory_is_loaded_into_another_layout_and_another_kind(
    how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A contiguous run goes on in channels_last, one without fused kernels with them, and the other way round."""
    for fused in (False, True):
        monkeypatch.setattr(optimizers, "fusible", lambda weight, fused=fused: fused)
        whole, stopped = networks(2)
        optimizer, first = optimizers.make(config(**how), whole), optimizers.make(config(**how), stopped)
        for model, own in ((whole, optimizer), (stopped, first)):
            descend(model, own, slice(0, 1))
        monkeypatch.setattr(optimizers, "fusible", lambda weight, fused=fused: not fused)
        resumed = stopped.to(memory_format=torch.channels_last)
        second = optimizers.make(config(**how), resumed)
        optimizers.load(second, first.state_dict(), "last.pt")
        for model, own in ((whole, optimizer), (resumed, second)):
            descend(model, own, slice(0, 2))
        assert_close(whole, resumed)
        for weight, kept in second.state.items():
            tensors = [value for name, value in kept.items() if name != "step" and isinstance(value, Tensor)]
            assert all(value.stride() == weight.stride() for value in tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("how", OPTIMIZERS, ids=str)
@pytest.mark.filterwarnings("error")
def test_eager_steps_on_cuda_are_fused_and_warn_of_nothing(how: dict[str, Any]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    (model,) = networks(1)
    optimizer = optimizers.make(config(**how), model.cuda())
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer.param_groups[0]["fused"]
