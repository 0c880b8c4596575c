"""Fused kernels for fast adversarial training: CUDA C++, Triton and CPU, with autograd, behind plain functions.

``import atlas_kernels as ak``; the operators are in ``ak.perturb``, the attacks in ``ak.attacks``, and
``python -m atlas_kernels`` says what was built and what can run on this machine.
"""

from __future__ import annotations

from .attacks import FGSM, PGD, AttackResult, LastStep
from .backends import BackendUnavailable, backend
from .losses import (
    atlas_loss,
    cross_entropy,
    dlr_loss,
    entropy,
    gairat_weights,
    kl_div,
    logit_pairing,
    margin_loss,
    mart_loss,
    trades_loss,
)
from .noise import noise_key
from .objectives import Cotangent, attack_cotangent
from .perturb import pgd_step, pgd_step_neighbours, random_start, sample_neighbours

__version__ = "0.1.0"

__all__ = [
    "FGSM",
    "PGD",
    "AttackResult",
    "BackendUnavailable",
    "Cotangent",
    "LastStep",
    "atlas_loss",
    "attack_cotangent",
    "backend",
    "cross_entropy",
    "dlr_loss",
    "entropy",
    "gairat_weights",
    "kl_div",
    "logit_pairing",
    "margin_loss",
    "mart_loss",
    "noise_key",
    "pgd_step",
    "pgd_step_neighbours",
    "random_start",
    "sample_neighbours",
    "trades_loss",
]
