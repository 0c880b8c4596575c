"""What a training method is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from ..data import Batch
from ..options import check, option

Metrics = dict[str, Tensor]
AttackMode = Literal["train", "eval", "keep"]


@dataclass(frozen=True)
class Method(ABC):
    """A way to make a training loss: its hyper-parameters, and ``loss``.

    A method carries nothing from one step to the next (scratch memory aside) and knows nothing of epochs, optimisers or
    devices. Hyper-parameters out of range raise ValueError at construction, with the allowed range.
    """

    name: ClassVar[str]
    #: Whether the method trains against an attack; the catastrophic-overfitting alarm watches only those.
    adversarial: ClassVar[bool] = True

    eps: float = option(
        help="l_inf radius, in the unit of images in [0, 1]",
        above=0,
        below=1,
        hint="images are in [0, 1], so write 8/255 instead of 8",
    )

    def __post_init__(self) -> None:
        check(self, self.name)

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, key: Tensor) -> tuple[Tensor, Metrics]:
        """The loss of one batch, with a graph to the parameters, and detached 0-dim tensors worth logging.

        Args:
            model: takes images [B, C, H, W] in [0, 1], gives logits; in the mode that the training forward needs.
            batch: x [B, C, H, W] float, y int64 [B], ids int64 [B] (the samples' numbers in the set).
            key: the noise key of this step, int64 [2]. Same key, weights and batch: same loss, bit for bit.

        Nothing waits for the device. Metrics "clean" and "adv" are accuracies in [0, 1] on forwards made anyway.
        """
