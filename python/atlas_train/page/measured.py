"""What a page needs and no folder holds: accuracies of few test images at several radii, and some adversaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atlas_kernels import noise_key
from atlas_kernels.attacks import PGD
from atlas_kernels.outputs import logits_of

from ..data import Pictures
from ..evaluate import Say, evaluate
from ..inference import evaluating
from ..machine import on_host, usable_device
from ..options import Norm, radius
from ..robustness.named import default_step
from ..targets import Target, opened

#: The attack, and the radii as shares of the run's eps.
STEPS, SHARES = 20, (0.25, 0.5, 1.0, 2.0)


@dataclass(frozen=True, eq=False)
class Attacked:
    """A test image [C, H, W] in [0, 1] and its adversary, with what the network says of both: class and probability."""

    number: int
    label: int
    image: Tensor
    adversary: Tensor
    clean: tuple[int, float]
    attacked: tuple[int, float]


@dataclass(frozen=True, eq=False)
class Measured:
    """evaluation: as `atlas evaluate --attacks --json` writes it, or empty; gallery: image by image."""

    evaluation: Mapping[str, Any]
    gallery: Sequence[Attacked]
    eps: float
    norm: Norm
    class_names: Sequence[str] | None


def measured(
    run: str, *, images: int, gallery: int, seed: int, device: str | None, threads: int | None, say: Say, **where: Any
) -> Measured:
    """The network of a run under PGD: accuracies of ``images`` test images, and ``gallery`` of them as adversaries.

    Which they are depends on their labels and the seed alone. where: as for ``targets.opened``. What that raises.
    """
    found = opened(run, say=say, **where)
    place = usable_device(device)
    norm: Norm = found.settings.get("norm") or "linf"
    (eps,) = found.radii((), norm)
    threads = found.settings.get("threads") if threads is None else threads
    with on_host(threads):
        found.network.to(place)
        evaluation = _evaluated(found, images, seed, eps, norm, say) if images else {}
        shown = _gallery(found, min(gallery, len(found.splits.test)), seed, eps, norm, place) if gallery else []
    return Measured(evaluation, shown, eps, norm, found.splits.class_names)


def _evaluated(found: Target, images: int, seed: int, eps: float, norm: Norm, say: Say) -> dict[str, Any]:
    radii = [share * eps for share in SHARES if norm != "linf" or share * eps < 1]
    report = evaluate(
        found.network, found.splits.test, radii, attacks=(f"pgd-{STEPS}",), norm=norm, seed=seed, say=say,
        size=min(images, len(found.splits.test)),
    )  # fmt: skip
    return report.evaluation()


def _gallery(found: Target, count: int, seed: int, eps: float, norm: Norm, place: torch.device) -> list[Attacked]:
    """Adversaries of images that the seed draws."""
    test, network = found.splits.test, found.network
    rows = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    few = [test.read(row) for row in rows.tolist()] if isinstance(test, Pictures) else test.images[rows].unbind()
    x, y = torch.stack([*few]).to(place).float() / 255, test.labels[rows].to(place)
    key = noise_key(place, generator=torch.Generator(place).manual_seed(seed))
    with evaluating(network):
        attack = PGD(eps, default_step(eps, STEPS, norm), STEPS, norm=norm)
        adversaries = attack(network, x, y, key=key, ids=rows.to(place))
        said = [_said(network, images) for images in (x, adversaries)]
    columns = (rows.tolist(), y.tolist(), x.cpu(), adversaries.cpu(), *said)
    return [Attacked(*row) for row in zip(*columns, strict=True)]


def _said(network: torch.nn.Module, images: Tensor) -> list[tuple[int, float]]:
    with torch.no_grad():
        share, classes = logits_of(network(images)).float().softmax(1).max(1)
    return list(zip(classes.tolist(), share.tolist(), strict=True))


def described(eps: float, norm: Norm, images: int, seed: int) -> str:
    """How the figures of ``measured`` were made."""
    return (
        f"PGD-{STEPS} on {images:,} test images, made for this page (seed {seed}); eps of the run {radius(eps, norm)}"
    )


def drawn(norm: Norm, seed: int) -> str:
    """How the images of a gallery were made."""
    scale = "eps is white or black, no change is grey" if norm == "linf" else "scaled to its largest change"
    return f"Test images drawn by seed {seed}, under PGD-{STEPS} with the run's eps. Perturbations: {scale}."
