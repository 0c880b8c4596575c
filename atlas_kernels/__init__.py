"""Fused kernels for fast adversarial training: CUDA C++, Triton and CPU, with autograd, behind plain functions.

``import atlas_kernels as ak``; the operators are in ``ak.perturb``, the attacks in ``ak.attacks``, and
``python -m atlas_kernels`` says what was built and what can run on this machine.
"""

from __future__ import annotations

from .attacks import (
    APGD,
    CWPGD,
    FAB,
    FGSM,
    MIFGSM,
    PGD,
    AttackResult,
    AutoAttack,
    Execution,
    LastStep,
    MinimumNorm,
    Square,
)
from .augment import augment
from .backends import BackendUnavailable, backend
from .batch_norm import batch_norm
from .double_backward import FastDoubleBackward
from .hyperplane import hyperplane_step
from .losses import (
    atlas_loss,
    consistency_loss,
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
from .memory import can_keep_memory, keep_memory
from .noise import noise_key
from .nuclear_norm import nuclear_norm
from .objectives import Cotangent, attack_cotangent
from .pairwise import compactness
from .perturb import (
    apgd_step,
    label_noise_start,
    pgd_step,
    pgd_step_neighbours,
    project,
    random_start,
    sample_neighbours,
)
from .stored import stored_start, stored_step

__version__ = "0.1.0"

__all__ = [
    "APGD",
    "CWPGD",
    "FAB",
    "FGSM",
    "MIFGSM",
    "PGD",
    "AttackResult",
    "AutoAttack",
    "BackendUnavailable",
    "Cotangent",
    "Execution",
    "FastDoubleBackward",
    "LastStep",
    "MinimumNorm",
    "Square",
    "apgd_step",
    "atlas_loss",
    "attack_cotangent",
    "augment",
    "backend",
    "batch_norm",
    "can_keep_memory",
    "compactness",
    "consistency_loss",
    "cross_entropy",
    "dlr_loss",
    "entropy",
    "gairat_weights",
    "hyperplane_step",
    "keep_memory",
    "kl_div",
    "label_noise_start",
    "logit_pairing",
    "margin_loss",
    "mart_loss",
    "noise_key",
    "nuclear_norm",
    "pgd_step",
    "pgd_step_neighbours",
    "project",
    "random_start",
    "sample_neighbours",
    "stored_start",
    "stored_step",
    "trades_loss",
]
