"""Attacks: loops over the operators that leave the attacked network exactly as they found it."""

from __future__ import annotations

from .apgd import APGD
from .attack import Attack
from .batch import AttackResult, Batch, LastStep
from .contract import leave_no_trace
from .cw_pgd import CWPGD
from .execution import Execution, attacking
from .fgsm import FGSM
from .mifgsm import MIFGSM
from .minimum_norm import MinimumNorm, MinimumNormResult
from .objective import Model
from .pgd import PGD
from .search import Search
from .square import Square

__all__ = [
    "APGD", "CWPGD", "FGSM", "MIFGSM", "PGD", "Attack", "AttackResult", "Batch", "Execution", "LastStep", "MinimumNorm",
    "MinimumNormResult", "Model", "Search", "Square", "attacking", "leave_no_trace",
]  # fmt: skip
