"""What every operator refuses, whatever backend would run it: missing tensors, memory that is freed or shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import atlas_kernels as ak
from atlas_kernels.backends import BACKENDS
from atlas_kernels.backends.door import plan_of
from atlas_kernels.backends.guard import _IN_PLACE
from atlas_kernels.core import core
from atlas_kernels.schema import OPERATORS, arguments_of

OPS = torch.ops.atlas_kernels
NAMES = [name for operators in OPERATORS.values() for name in operators]
IMAGES = (4, 3, 4, 4)


def valid_call(operator: str) -> dict[str, Any]:
    """Arguments that the operator takes, every optional tensor among them."""
    batch, classes = 4, 5
    images, logits = torch.rand(IMAGES), torch.randn(batch, classes)
    labels, per_sample, per_channel = torch.arange(batch), torch.rand(batch), torch.rand(3)
    given: dict[str, Any] = {
        "count": 1, "project": True, "include_x": True, "descend": False, "norm": 1, "largest": 0, "draw": 0,
        "objective": 4, "share_low": 400, "share_high": 2000,
        "steps": 10, "local": 0, "global_term": 0, "distance": 0, "squared": False, "padding": 1, "flip": True,
        "training": True,
        "key": torch.tensor([1, 2]), "ids": labels, "active": labels > 1, "labels": labels, "index": labels,
        "targets": (labels + 1) % batch, "kappa": torch.zeros_like(labels), "correct": labels > 1,
        "images": torch.zeros(IMAGES, dtype=torch.uint8), "reference": logits, "terms": torch.empty(3, batch),
        "total": torch.empty(()), "cast": images.half(), "std": 1.0,
    }  # fmt: skip
    found: dict[str, Any] = {}
    for a in arguments_of(operator):
        if a.name in given:
            value = given[a.name]
        elif not a.is_tensor:
            value = 0.5
        elif a.name.endswith("_rows"):
            value = per_channel if a.told in ("clip_min", "clip_max", "mean", "std") else per_sample
        elif a.name in ("weights", "value"):
            value = per_sample
        else:
            value = images if a.type == "images" or operator == "augment" else logits
        found[a.name] = value.clone() if isinstance(value, Tensor) else value
    if operator == "pgd_step_neighbours":
        found["out"] = torch.empty(3 * batch, *IMAGES[1:])
    if operator == "apgd_step_norm":
        found["largest"] = 1 + labels
    if operator == "gairat_weights":
        found["out"] = torch.empty(batch)
    if operator == "consistency_loss":
        found |= {"distance_weight_rows": torch.ones(()), "terms": torch.empty(2, batch)}
    if operator == "atlas_loss":
        found["logits"], found["grad"] = torch.randn(3 * batch, classes), torch.empty(3 * batch, classes)
    if operator == "batch_norm_double_backward":
        found |= {a.name: torch.rand(3) for a in arguments_of(operator) if a.sides == ("channels",)}
    if operator == "nuclear_norm":
        found["value"] = torch.empty(())
    if operator == "compactness":
        found["grad"], found["adv_grad"] = torch.empty(batch, classes), torch.empty(batch, classes)
    return found


@pytest.mark.parametrize("operator", NAMES)
def test_valid_calls_are_valid(operator):
    for backend in ("native", "reference"):
        with ak.backend(backend):
            getattr(OPS, operator)(*valid_call(operator).values())


@pytest.mark.parametrize("operator", NAMES)
def test_none_is_refused_where_a_tensor_is_needed(operator):
    needed = [a for a in arguments_of(operator) if a.is_tensor and not a.optional]
    assert needed
    for backend in BACKENDS:
        for argument in needed:
            given = valid_call(operator) | {argument.name: None}
            with ak.backend(backend), pytest.raises(TypeError, match=f"{argument.told} must be given to {operator}"):
                getattr(OPS, operator)(*given.values())


def sharing(first: Tensor, second: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor]:
    """A piece of memory, and the same two tensors in it, the second ``offset`` bytes after the first."""
    memory = torch.zeros(offset + first.nbytes + second.nbytes, dtype=torch.uint8)

    def there(t: Tensor, start: int) -> Tensor:
        return memory[start : start + t.nbytes].view(t.dtype).view(t.shape).copy_(t)

    return memory, there(first, 0), there(second, offset)


@pytest.mark.parametrize("operator", NAMES)
def test_what_is_written_shares_memory_with_no_other_argument(operator):
    tensors = [a for a in arguments_of(operator) if a.is_tensor]
    for out in (a for a in tensors if a.written):
        for other in tensors:
            if other == out:
                continue
            given = valid_call(operator)
            for offset in (0, 8) if given[out.name].nbytes > 8 else (0,):
                if offset == 0 and other.name in _IN_PLACE.get(operator, ()):
                    continue
                memory, given[out.name], given[other.name] = sharing(given[out.name], given[other.name], offset)
                before = memory.clone()
                for backend in BACKENDS:
                    with ak.backend(backend), pytest.raises(ValueError, match="shares memory with .*of its own"):
                        getattr(OPS, operator)(*given.values())
                assert torch.equal(memory, before)


def test_public_calls_refuse_shared_memory_and_name_it():
    x, g = torch.full((64, 1, 4, 4), 0.5), torch.ones(64, 1, 4, 4)
    memory = torch.zeros(64 * 16)
    out, eps, active, ids = memory.view_as(x), memory[1:65], memory.view(torch.bool)[:64], memory.view(torch.int64)[:64]
    for name, call in {
        "out shares memory with eps": lambda: ak.pgd_step(x, g, x, eps, 0.3, out=out),
        "out shares memory with step_size": lambda: ak.pgd_step(x, g, x, 0.3, eps, out=out),
        "cast shares memory with eps": lambda: ak.pgd_step(x, g, x, eps, 0.3, cast=out),
        "cast shares memory with out": lambda: ak.pgd_step(x, g, x, 0.3, 0.3, out=out, cast=out),
        "out shares memory with active": lambda: ak.pgd_step(x, g, x, 0.1, 0.3, active=active, out=out),
        "out shares memory with ids": lambda: ak.random_start(x, 0.1, ids=ids, out=out),
        "out shares memory with key": lambda: ak.random_start(x, 0.1, key=ids[:2], out=out),
        "out shares memory with clip_max": lambda: ak.project(x, x, 1.0, norm="l1", clip_max=memory[3:4], out=out),
        "out shares memory with radius": lambda: ak.sample_neighbours(x, eps, 1, out=out),
        "kappa shares memory with labels": lambda: ak.attack_cotangent(g.view(64, 16), ids, kappa=ids),
    }.items():
        with pytest.raises(ValueError, match=f"{name}: pass a tensor of its own"):
            call()
    two = torch.cat([x, x])
    with pytest.raises(ValueError, match="out shares memory with adv: pass out=adv itself, or a tensor of its own"):
        ak.pgd_step(two[:64], g, x, 0.1, 0.1, out=two[1:65])


def test_freed_memory_is_refused():
    x = torch.rand(2, 3)
    for offset in (0, 3):
        freed = torch.rand(3, 3).view(-1)[offset : offset + 6].view(2, 3)
        freed.untyped_storage().resize_(0)
        for backend in BACKENDS:
            with ak.backend(backend), pytest.raises(ValueError, match="v needs .* its memory was freed"):
                ak.project(freed, x, 0.1)
    labels = torch.tensor([0, 1])
    labels.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="labels needs 16 bytes, but its storage has 0"):
        ak.cross_entropy(x, labels)
    eps = torch.rand(2)
    eps.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="eps needs 8 bytes, but its storage has 0"):
        ak.random_start(x, eps)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_lazy_tensors_are_what_they_stand_for(backend):
    """Zeros without memory, and views whose negation is yet to be done (the imaginary part of a conjugate is one)."""
    x, g = torch.rand(4, 3), torch.randn(4, 3)
    zero, labels = torch._efficientzerotensor((4, 3)), torch._efficientzerotensor((4,), dtype=torch.int64)
    negated = torch.complex(g, g).conj().imag
    assert zero.data_ptr() == 0 and negated.is_neg()
    with ak.backend(backend):
        assert torch.equal(ak.project(zero, x, 0.1), ak.project(torch.zeros(4, 3), x, 0.1))
        assert torch.equal(ak.pgd_step(x, negated, x, 0.1, 0.1), ak.pgd_step(x, -g, x, 0.1, 0.1))
        assert torch.equal(ak.cross_entropy(negated, labels), ak.cross_entropy(-g, torch.zeros(4, dtype=torch.int64)))
        rows, key = torch.arange(4) % 3, torch.tensor([1, 2])
        rows_negated, key_negated = torch._neg_view(-rows), torch._neg_view(-key)
        assert torch.equal(ak.cross_entropy(g, rows_negated), ak.cross_entropy(g, rows))
        drawn = ak.random_start(g.abs(), 0.1, key=key, ids=rows, clip_max=100.0)
        assert torch.equal(ak.random_start(g.abs(), 0.1, key=key_negated, ids=rows_negated, clip_max=100.0), drawn)
        out = torch.empty(4, 3)
        OPS.pgd_step(x, negated, x, 0.1, None, 0.1, None, 0.0, None, 1.0, None, False, None, out, None)
        assert torch.equal(out, ak.pgd_step(x, -g, x, 0.1, 0.1))
        with pytest.raises(ValueError, match="out is a lazy view, which cannot be written"):
            ak.project(x, x, 0.1, out=torch._neg_view(torch.empty(4, 3)))


def test_tensors_without_values_share_nothing():
    x, rows = torch.empty(4, 3, device="meta"), torch.empty(4, device="meta")
    with ak.backend("reference"):
        assert ak.pgd_step(x, x, x, rows, rows, cast=x.half()).shape == (4, 3)


def test_an_objective_has_what_it_looks_at():
    z, y = torch.randn(4, 5), torch.arange(4)
    for backend in BACKENDS:
        with ak.backend(backend):
            for needed, given in {
                "labels": (None, y, z, 0), "targets": (y, None, None, 4), "reference": (y, None, None, 1),
                "objective is 7": (y, y, z, 7), "objective is -1": (y, y, z, -1),
            }.items():  # fmt: skip
                with pytest.raises(RuntimeError, match=needed):
                    OPS.attack_cotangent(z, *given, False, torch.empty_like(z), None, None, None)
            with pytest.raises(RuntimeError, match="objective 1 needs labels"):
                OPS.attack_cotangent(z, None, None, z, 1, False, None, None, y.clone(), None)


def test_a_key_is_two_numbers_on_every_backend():
    """Of another shape it would be other noise on one backend than on another."""
    x = torch.rand(2, 3)
    for backend in BACKENDS:
        with ak.backend(backend), pytest.raises(RuntimeError, match=r"key is \[1, 2\], expected \[2\]"):
            OPS.random_start(x, 0.1, None, 0.0, None, 1.0, None, torch.tensor([[1, 0]]), None, 0, torch.empty_like(x))


def test_the_core_refuses_what_is_no_address():
    with pytest.raises(ValueError, match="no memory at address 8"):
        core().first_outside(8, 1, 1)
    with pytest.raises(ValueError, match="the address of indices is null"):
        core().first_outside(0, 1, 1)
    with pytest.raises(ValueError, match="count is negative"):
        core().first_outside(0, -1, 1)


@pytest.mark.parametrize("stem", OPERATORS)
def test_a_plan_of_the_core_takes_no_tensor_that_has_no_memory(stem):
    """Even where the caller says that the arguments were looked at."""
    for operator in OPERATORS[stem]:
        plan, extra = plan_of(stem, operator), []
        workspaces = {
            "compactness": (1, 4), "batch_norm_double_backward": (1, 8, 3), "stored_step": (1,),
            "nuclear_norm": (4 * 33,),
        }  # fmt: skip
        if shape := workspaces.get(operator):
            extra = [torch.empty(shape, dtype=torch.float64)]
        given = valid_call(operator)
        assert plan((*given.values(), *extra), 1, True) == core().DONE
        for i, a in enumerate(arguments_of(operator)):
            if not a.is_tensor or given[a.name] is None:
                continue
            t = given[a.name]
            for none in (torch._efficientzerotensor(t.shape, dtype=t.dtype), t.to("meta"), t.to_sparse(), "a tensor"):
                told = plan((*(given | {a.name: none}).values(), *extra), 1, True)
                assert told == i, a.name
