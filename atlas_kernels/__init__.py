"""Fused kernels for fast adversarial training: CUDA C++, Triton and CPU, with autograd, behind plain functions.

``import atlas_kernels as ak``; the operators are in ``ak.perturb``, the attacks in ``ak.attacks``, and
``python -m atlas_kernels`` says what was built and what can run on this machine.
"""

from __future__ import annotations

from .attacks import FGSM, PGD, AttackResult, LastStep
from .augment import augment
from .backends import BackendUnavailable, backend
from .noise import noise_key
from .pairwise import compactness
from .perturb import pgd_step, pgd_step_neighbours, project, random_start, sample_neighbours

__version__ = "0.1.0"

__all__ = [
    "FGSM",
    "PGD",
    "AttackResult",
    "BackendUnavailable",
    "LastStep",
    "augment",
    "backend",
    "compactness",
    "noise_key",
    "pgd_step",
    "pgd_step_neighbours",
    "project",
    "random_start",
    "sample_neighbours",
]
