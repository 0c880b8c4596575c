"""Gradients along a cotangent: those of torch, and without a word where a matrix product is the first of a backward."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from atlas_kernels.vjp import vjp

FIRST = """
import torch
from atlas_kernels import PGD
net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 4)).cuda()
PGD(0.1, steps=1)(net, torch.rand(2, 3, 4, 4, device="cuda"), torch.tensor([0, 1], device="cuda"))
"""


def test_it_is_the_gradient(device: torch.device) -> None:
    x, v = torch.rand(3, 4, device=device, requires_grad=True), torch.rand(3, 4, device=device, dtype=torch.float64)
    with torch.inference_mode(), torch.inference_mode(False), torch.no_grad():
        with torch.enable_grad():
            z = x * x
        assert torch.equal(vjp(z, x, v, retain_graph=True), 2 * (v.float() * x))
    assert vjp(z, x, v, retain_graph=True).grad_fn is None and vjp(x * x, x, v, create_graph=True).requires_grad


@pytest.mark.gpu
def test_an_attack_in_a_new_process_is_quiet() -> None:
    """Its first backward begins with the product of a linear layer, in a thread that has no CUDA context yet."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    command = [sys.executable, "-W", "error:Attempting to run cuBLAS", "-c", FIRST]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0 and "cuBLAS" not in made.stderr, made.stderr
