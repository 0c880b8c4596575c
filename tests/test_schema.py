"""The table of operators: what is made of a line."""

from __future__ import annotations

import pytest
import torch

from atlas_kernels.backends.door import plan_of
from atlas_kernels.core import core
from atlas_kernels.schema import OPERATORS, Argument, parse


def test_a_line_is_arguments_and_a_pair_is_two():
    assert parse("images[batch] x=adv, number[batch] eps=radius, int64[2]? key, int draw, wide[]!? total") == (
        Argument("x", "x", "adv", "images", ("batch",)),
        Argument("eps", "eps", "radius", "float", ()),
        Argument("eps_rows", "eps", "radius_rows", "wide", ("batch",), optional=True),
        Argument("key", "key", "key", "int64", ("2",), optional=True),
        Argument("draw", "draw", "draw", "int", ()),
        Argument("total", "total", "total", "wide", (), optional=True, written=True),
    )


def test_every_word_of_the_table_is_read():
    for operators in OPERATORS.values():
        for line in operators.values():
            found = [a.name for a in parse(line) if not a.name.endswith("_rows")]
            outside = "".join(part.partition("]")[2] if "]" in part else part for part in line.split("["))
            assert len(found) == outside.count(",") + 1


def test_the_schema_of_torch():
    schema = torch.ops.atlas_kernels.pgd_step.default._schema
    assert str(schema) == (
        "atlas_kernels::pgd_step(Tensor adv, Tensor grad, Tensor x, float eps, Tensor? eps_rows, float step_size, "
        "Tensor? step_size_rows, float clip_min, Tensor? clip_min_rows, float clip_max, Tensor? clip_max_rows, "
        "bool descend, Tensor? active, Tensor(a!) out, Tensor(b!)? cast) -> ()"
    )


def test_every_operator_has_a_plan_whose_fields_the_core_has():
    for stem, operators in OPERATORS.items():
        for operator in operators:
            plan_of(stem, operator)
    with pytest.raises(ValueError, match="what perturb takes has no field shove"):
        core().Plan("perturb", "pgd_step", [("shove", "float", None, False, False, False)], {})
    with pytest.raises(ValueError, match="field eps_rows is of another type"):
        core().Plan("perturb", "pgd_step", [("eps_rows", "images", ["batch"], False, False, False)], {})
