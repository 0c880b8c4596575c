"""What the methods that differentiate a gradient share: bfloat16, compiled networks, replays, channels_last,
attention."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atlas_train import methods
from atlas_train.methods import Batch, State
from atlas_train.recompute import Recomputed
from beside_published import CLASSES, EPS, Net

NAMES = ("llr", "cure", "jacobian", "grad_align")
STATE = State(step=5, total_steps=10)
KEY = torch.tensor([12345, 0])


class Compiled(nn.Module):
    """As ``torch.compile`` wraps a network: what it compiled has no double backward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self._orig_mod(x)
        logits.register_hook(self._refuse) if logits.requires_grad else None
        return logits

    @staticmethod
    def _refuse(grad: Tensor) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError("torch.compile with aot_autograd does not currently support double backward")


def make() -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    x, y = torch.rand(8, 3, 6, 6), torch.randint(CLASSES, (8,))
    return Net().train(), Batch(x, y, torch.arange(8))


def trained(name: str, model: nn.Module, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    loss, _ = methods.build(name, EPS).loss(model, batch, KEY, STATE)
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name: str) -> None:
    model, batch = make()
    expected, expected_grads = trained(name, copy.deepcopy(model), batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = methods.build(name, EPS).loss(model, batch, KEY, STATE)
    assert loss.dtype == torch.float32
    grads = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(loss.detach(), expected, rtol=0.1, atol=0)
    a, b = (torch.cat([g.flatten() for g in some]) for some in (grads, expected_grads))
    assert torch.cosine_similarity(a, b, 0) > 0.9


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_network(name: str) -> None:
    model, batch = make()
    expected, expected_grads = trained(name, copy.deepcopy(model), batch)
    found, grads = trained(name, Compiled(model), batch)
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_same_key_same_bits_whatever_the_global_generator(name: str) -> None:
    model, batch = make()
    first = trained(name, copy.deepcopy(model), batch)
    torch.manual_seed(17)
    again = trained(name, model, batch)
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_channels_last(name: str) -> None:
    model, batch = make()
    expected, expected_grads = trained(name, copy.deepcopy(model), batch)
    batch = batch._replace(x=batch.x.contiguous(memory_format=torch.channels_last))
    found, grads = trained(name, model.to(memory_format=torch.channels_last), batch)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert all(g.isfinite().all() for g in grads) and len(grads) == len(expected_grads)


class Attends(nn.Module):
    """A block of attention, as torch fuses it or in plain operations."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.blocks = nn.Sequential(Attention(self), nn.Linear(18, 18))
        self.head = nn.Linear(18, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(x.flatten(2).unflatten(2, (2, 18))).mean((1, 2)))
        return logits


class Attention(nn.Module):
    def __init__(self, whole: Attends) -> None:
        super().__init__()
        self.mix, self.whole = nn.Linear(18, 54), [whole]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).chunk(3, -1)
        if self.whole[0].fused:
            return F.scaled_dot_product_attention(q, k, v)
        return (q @ k.mT / 18**0.5).softmax(-1) @ v


LOCAL = [{"local": form, "bn": bn} for form, bn in (("jacobian", "joint"), ("margin", "split"), ("radius", "joint"))]


@pytest.mark.parametrize("name, hyper", [*((name, {}) for name in NAMES), *(("atlas", hyper) for hyper in LOCAL)])
@pytest.mark.parametrize("recompute", [False, True])
def test_fused_attention_has_no_second_derivative_so_the_plain_one_runs(
    name: str, hyper: dict[str, Any], recompute: bool
) -> None:
    _, batch = make()
    batch = Batch(batch.x.double(), batch.y, batch.ids)
    method, found = methods.build(name, EPS, hyper), []
    for fused in (True, False):
        torch.manual_seed(0)
        model = Attends(fused).double()
        with Recomputed(model) if recompute and method.recomputable else nullcontext():
            loss, _ = method.loss(model, batch, KEY, STATE)
            found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-12)
    x = batch.x.clone().requires_grad_()
    assert "FlashAttention" in Attention(Attends(True)).double()(x.flatten(2).unflatten(2, (2, 18))).grad_fn.name()


class Blocks(nn.Module):
    """Convolutions and BatchNorm in blocks that can be computed again."""

    def __init__(self) -> None:
        super().__init__()
        wide = [nn.Sequential(nn.Conv2d(n, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Softplus()) for n in (3, 6)]
        self.blocks, self.head = nn.Sequential(*wide), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return logits


@pytest.mark.parametrize("name, hyper", [("jacobian", {}), ("grad_align", {}), ("cure", {}), ("atlas", LOCAL[0])])
def test_second_derivatives_are_pytorchs_also_of_what_is_computed_again(
    name: str, hyper: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, batch = make()
    batch = Batch(batch.x.double(), batch.y, batch.ids)
    torch.manual_seed(0)
    model = Blocks().double().train()
    method, found = methods.build(name, EPS, hyper), []
    for how in ("fast", "recomputed", "plain"):
        if how == "plain":
            monkeypatch.setattr("atlas_kernels.double_backward._FASTER", {})
        copied = copy.deepcopy(model)
        with Recomputed(copied) if how == "recomputed" else nullcontext():
            loss, _ = method.loss(copied, batch, KEY, STATE)
            grads = torch.autograd.grad(loss, list(copied.parameters()))
        found.append([loss.detach(), *grads, *copied.buffers()])
    for fast, recomputed, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-12)
        assert torch.equal(fast, recomputed)
