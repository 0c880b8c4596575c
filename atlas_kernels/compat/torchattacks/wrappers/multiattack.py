"""Several attacks on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....checks import require_float_images
from ....outputs import predicted
from .._saving import File, Loader
from ..attack import Attack


class MultiAttack(Attack):
    """Attacks one after the other, each on the images that those before it left classified right.

    attacks: two or more on one model, torchattacks' own too; what is set here is set on all of them.
    """

    def __init__(self, attacks: Sequence[Any], verbose: bool = False) -> None:
        if not attacks:
            raise ValueError("attacks is empty: give two or more")
        super().__init__("MultiAttack", attacks[0].model)
        self.attacks = attacks
        self.verbose = verbose
        self.check_validity()
        self._records: list[int] | None = None

    def check_validity(self) -> None:
        """Raises ValueError for a single attack, or attacks on several models."""
        if len(self.attacks) < 2:
            raise ValueError(f"attacks has {len(self.attacks)} attack: give two or more")
        if any(attack.model is not self.attacks[0].model for attack in self.attacks):
            raise ValueError("attacks are on different models: give all of them the same one")

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        require_float_images("inputs", images)
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels must be a tensor of class indices, got {type(labels).__name__}")
        images, labels = images.detach().to(self.device), labels.detach().to(self.device)
        final, left = images.clone(), torch.arange(len(images), device=images.device)
        records = [len(images)]
        for attack in self.attacks:
            adv = attack(images[left], labels[left])
            right = predicted(self._judge(adv, "keep")) == labels[left]
            final[left[~right]] = adv[~right]
            left = left[right]
            records.append(len(left))
            if not len(left):
                break
        if self.verbose:
            print(_success_rates(records))
        if self._records is not None:
            records += [0] * (len(self._records) - len(records))
            self._records = [sum(pair) for pair in zip(self._records, records, strict=True)]
        return final

    def save(  # type: ignore[override]
        self,
        data_loader: Loader,
        save_path: File | None = None,
        verbose: bool = True,
        return_verbose: bool = False,
        save_predictions: bool = False,
        save_clean_images: bool = False,
    ) -> tuple[Any, ...] | None:
        """As ``Attack.save``; ``return_verbose`` also tells the success rates in percent, after the robust accuracy."""
        said, self.verbose = self.verbose, False
        self._records = [0] * (len(self.attacks) + 1)
        try:
            report = super().save(data_loader, save_path, verbose, return_verbose, save_predictions, save_clean_images)
            rates = _rates(self._records)
        finally:
            self.verbose, self._records = said, None
        return None if report is None else (report[0], rates, *report[1:])

    def _save_print(self, progress: float, rob_acc: float, l2: float, elapsed_time: float, end: str) -> None:
        assert self._records is not None
        print(_success_rates(self._records), end=" ")
        super()._save_print(progress, rob_acc, l2, elapsed_time, end)


def _rates(records: list[int]) -> list[float]:
    return [100 * (1 - left / records[0]) if records[0] else 0.0 for left in records[1:]]


def _success_rates(records: list[int]) -> str:
    return "Attack success rate: " + " | ".join(f"{rate:2.2f} %" for rate in _rates(records))
