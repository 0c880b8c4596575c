"""PGD on the margin loss, known as CW-PGD or PGD-CW: the loss is f_6 of Carlini & Wagner (2017, arXiv 1608.04644)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field

from .pgd import PGD


@dataclass(frozen=True)
class CWPGD(PGD):
    """``PGD`` that climbs the largest logit of the other classes minus that of y, ``PGD(objective="margin")``.

    Madry et al. (2018, arXiv 1706.06083) and GAIRAT stop a sample once its margin exceeds 50, where nothing is left to
    gain: until then their gradient is this one. Variants that go by ``relu(margin + 50)`` differ in that they leave
    samples alone whose label leads by more than 50; here those move too.

    Arguments, calls and errors as in ``PGD``.
    """

    _: KW_ONLY
    objective: str = field(default="margin", init=False, repr=False)
