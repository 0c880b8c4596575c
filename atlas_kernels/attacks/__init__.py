"""Attacks: loops over the operators that leave the attacked network exactly as they found it."""

from __future__ import annotations

from .apgd import APGD
from .attack import Attack
from .autoattack import AutoAttack, AutoAttackRecord, AutoAttackResult
from .batch import AttackResult, Batch, LastStep
from .contract import leave_no_trace
from .cw_pgd import CWPGD
from .execution import Execution, attacking
from .fab import FAB
from .fgsm import FGSM
from .mifgsm import MIFGSM
from .minimum_norm import MinimumNorm, MinimumNormResult
from .objective import Model
from .pgd import PGD
from .search import Search
from .sharded import LostProcesses, run_sharded
from .square import Square

__all__ = [
    "APGD", "CWPGD", "FAB", "FGSM", "MIFGSM", "PGD", "Attack", "AttackResult", "AutoAttack", "AutoAttackRecord",
    "AutoAttackResult", "Batch", "Execution", "LastStep", "LostProcesses", "MinimumNorm", "MinimumNormResult", "Model",
    "Search", "Square", "attacking", "leave_no_trace", "run_sharded",
]  # fmt: skip
