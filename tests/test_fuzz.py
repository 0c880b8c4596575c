"""The fuzzer: two thousand calls are right, and a fault that is planted is found."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import atlas_kernels as ak
from atlas_kernels import backends
from atlas_kernels.schema import OPERATORS, arguments_of
from fuzz.draws import Draw
from fuzz.plays import PLAYS, into_outputs, into_overlap, legal

TESTS = Path(__file__).parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=TESTS, capture_output=True, text=True)


def test_calls_are_right():
    done = run("-m", "fuzz", "--calls", "2000")
    assert done.returncode == 0 and done.stdout.startswith("2000 calls, 0 wrong"), done.stdout + done.stderr[-4000:]


def test_every_operator_is_called(monkeypatch):
    monkeypatch.setattr(backends, "chosen", {})
    for i in range(600):
        legal(Draw(f"every/{i}"))
    called = {operator for operator, _, _ in backends.chosen}
    assert called == {operator for operators in OPERATORS.values() for operator in operators}


def finds(play: Callable[[Draw], str | None], what: str) -> bool:
    """Whether one of the first calls of a play goes wrong in this way."""
    return any(what in (play(Draw(f"planted/{i}")) or "") for i in range(1000))


def plant(monkeypatch: pytest.MonkeyPatch, fault: Callable[..., None]) -> None:
    """After each native l_inf step, what ``fault(adv, out)`` does."""
    ak.pgd_step(*[torch.rand(2, 2)] * 3, 0.1, 0.1)
    here = "pgd_step", None, torch.device("cpu")
    right, names = backends.chosen[here], [a.name for a in arguments_of("pgd_step")]

    def faulty(args: tuple[Any, ...]) -> None:
        right(args)
        fault(args[names.index("adv")], args[names.index("out")])

    monkeypatch.setitem(backends.chosen, here, faulty)


def test_wrong_values_are_found(monkeypatch):
    plant(monkeypatch, lambda adv, out: out.copy_(torch.where(out > 0.5, out * (1 + 2**-20), out)))
    assert finds(legal, "the reference's bits")


def test_writes_outside_an_output_are_found(monkeypatch):
    def one_byte_more(adv: Tensor, out: Tensor) -> None:
        memory = torch.empty(0, dtype=torch.uint8).set_(out.untyped_storage())
        end = out.storage_offset() * out.element_size() + out.nbytes
        memory[end : end + 1] = 0

    plant(monkeypatch, one_byte_more)
    assert finds(into_outputs, "memory outside out")


def test_writes_to_an_input_are_found(monkeypatch):
    plant(monkeypatch, lambda adv, out: adv.add_(1))
    assert finds(legal, "adv was written to")


def test_overlaps_that_are_not_refused_are_found(monkeypatch):
    guard = importlib.import_module("atlas_kernels.backends.guard")  # a function has that name too
    monkeypatch.setattr(guard, "_require_in_place", lambda *args: None)
    assert finds(into_overlap, "out overlaps")


def test_crashes_are_found():
    """The process that makes the calls dies; the rest of the calls is made all the same."""
    program = (
        "import os, sys; import fuzz.__main__ as main\n"
        "right, sys.argv = main.play, ['fuzz', '--calls', '20']\n"
        "main.play = lambda seed, number: os.abort() if number == 7 else right(seed, number)\n"
        "sys.exit(main.main())"
    )
    done = run("-c", program)
    assert done.returncode == 1 and "--only 7: crash" in done.stdout and "20 calls, 1 wrong" in done.stdout, done


@pytest.mark.parametrize("play", PLAYS, ids=lambda play: play.__name__)
def test_a_call_is_a_function_of_its_number(play):
    draws = [Draw("same"), Draw("same")]
    for draw in draws:
        play(draw)
    assert draws[0].random.getstate() == draws[1].random.getstate()
