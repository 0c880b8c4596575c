"""Attacks: loops over the operators that leave the attacked network exactly as they found it."""

from __future__ import annotations

from .attack import Attack
from .batch import AttackResult, Batch, LastStep
from .contract import leave_no_trace
from .execution import Execution, attacking
from .fab import FAB
from .fgsm import FGSM
from .mifgsm import MIFGSM
from .objective import Model
from .pgd import PGD
from .search import Search

__all__ = [
    "FAB", "FGSM", "MIFGSM", "PGD", "Attack", "AttackResult", "Batch", "Execution", "LastStep", "Model", "Search",
    "attacking", "leave_no_trace",
]  # fmt: skip
