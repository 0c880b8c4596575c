"""Attacks: loops over the operators that leave the attacked network exactly as they found it."""

from __future__ import annotations

from .contract import leave_no_trace
from .execution import Execution
from .fgsm import FGSM
from .objective import Model
from .pgd import PGD, AttackResult, LastStep

__all__ = ["FGSM", "PGD", "AttackResult", "Execution", "LastStep", "Model", "leave_no_trace"]
