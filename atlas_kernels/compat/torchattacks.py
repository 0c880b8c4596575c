"""Attacks with the signatures of torchattacks 3.5.1: a script changes its import and nothing else.

    from atlas_kernels.compat import torchattacks

    attack = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=10)
    adv_images = attack(images, labels)

Starts and random targets are drawn as torchattacks draws them, from torch's global generators: with the same seed both
give the same adversaries, to rounding, and the same random numbers afterwards. Defaults, the order of arguments and
the modes of ``set_mode_*`` and ``set_model_training_mode`` are its own. What differs, on purpose:

- The model is left as it was found: each module's own mode (a frozen BatchNorm stays frozen), running statistics,
  gradients. Dropout that ``set_model_training_mode`` switches on draws other masks, and none from the global state.
- It works under ``no_grad`` and ``inference_mode``, for labels of any integer type, and for a model that is moved
  after the attack was made (``set_device`` fixes the device).
- Refused, with a reason: images outside [0, 1] or with NaN, also after ``set_normalization_used`` is undone (but for
  rounding), labels that are no classes, eps of 1 or more in l_inf, one eps per sample (``atlas_kernels.PGD`` takes it).
- A gradient that is NaN moves nothing, and MI-FGSM takes a gradient of zero as zero. Where float32 rounds the gradient
  of a nearly certain prediction to zero in torchattacks, it keeps its sign here.
- 16-bit images are computed with in float32 and rounded once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from .. import attacks
from ..attacks.arguments import class_indices, require_radius
from ..attacks.contract import leave_no_trace
from ..attacks.objective import Objective
from ..checks import require_float_images, require_images
from ..layout import compute_dtype
from ..noise import noise_key
from ..perturb import pgd_step

__all__ = ["FFGSM", "FGSM", "MIFGSM", "PGD", "PGDL2", "TPGD", "Attack"]

TargetMap = Callable[[Tensor, Tensor | None], Tensor]


class Attack:
    """What the attacks share: calling, modes, normalisation. Calling gives detached adversaries, like ``inputs``.

    inputs: float images [B, ...] in [0, 1], or normalised ones after ``set_normalization_used``; moved to ``device``.
    labels: class indices [B]; in targeted modes what they say goes through the mode's choice of targets first.
    """

    supported_mode: ClassVar[tuple[str, ...]] = ("default", "targeted")
    _needs_labels: ClassVar[bool] = True

    eps: float

    def __init__(self, name: str, model: nn.Module) -> None:
        self.attack = name
        self.set_model(model)
        self._device: torch.device | str | None = None
        self.attack_mode = "default"
        self.targeted = False
        self._targets: TargetMap | None = None
        self._kth_min = 1
        self.normalization_used: dict[str, Tensor] | None = None
        self.set_model_training_mode()

    def __call__(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        attack = self._attack()
        require_float_images("inputs", inputs)
        inputs = inputs.detach().to(self.device)
        x = self._unit(inputs)
        require_images(x)
        if labels is not None:
            labels = labels.detach().to(inputs.device)
        if self.targeted:
            labels = self.get_target_label(inputs, labels)
        if labels is None and self._needs_labels:
            raise ValueError(f"labels is missing: {self.attack} needs the class of every image")
        start = self._start(x)
        with self._asked_mode():
            adv = self._run(attack, self._network(x), x, labels, start)
        return adv if self.normalization_used is None else self.normalize(adv)

    def _attack(self) -> attacks.PGD:
        """The attack with the settings as they are now; checks them."""
        raise NotImplementedError

    def _pgd(self, step_size: float, steps: int, **options: Any) -> attacks.PGD:
        for name, value in {"eps": self.eps, "alpha": step_size}.items():
            if isinstance(value, Tensor):
                raise TypeError(f"{name} must be a number, got a tensor; atlas_kernels.PGD takes one value per sample")
            require_radius(name, value)
        mode = "keep" if self._model_training else "eval"
        return attacks.PGD(
            self.eps, step_size, steps, random_start=False, targeted=self.targeted, attack_mode=mode, **options
        )

    def _start(self, x: Tensor) -> Tensor | None:
        """The first iterate; None for x itself."""
        return None

    def _run(
        self, attack: attacks.PGD, network: nn.Module, x: Tensor, labels: Tensor | None, start: Tensor | None
    ) -> Tensor:
        return attack(network, x, labels, start=start, key=_key(x.device))

    def set_model(self, model: nn.Module) -> None:
        """Attack ``model`` from now on."""
        if not isinstance(model, nn.Module):
            raise TypeError(
                f'model must be a torch.nn.Module, got {type(model).__name__}; atlas_kernels.PGD(attack_mode="keep") '
                "attacks functions"
            )
        self.model = model
        self.model_name = type(model).__name__

    @property
    def device(self) -> torch.device | str | None:
        """Where the attack runs: as set, else where the model is now; None for a model without parameters."""
        parameter = next(self.model.parameters(), None)
        return self._device if self._device or parameter is None else parameter.device

    @device.setter
    def device(self, device: torch.device | str | None) -> None:
        self._device = device

    def set_device(self, device: torch.device | str | None) -> None:
        """Move inputs and labels to ``device``."""
        self.device = device

    def set_model_training_mode(
        self, model_training: bool = False, batchnorm_training: bool = False, dropout_training: bool = False
    ) -> None:
        """Mode of the model during attacks: eval, or train with BatchNorm and Dropout as the other two say."""
        self._model_training = model_training
        self._batchnorm_training = batchnorm_training
        self._dropout_training = dropout_training

    @contextmanager
    def _asked_mode(self) -> Iterator[None]:
        modules = list(self.model.modules()) if self._model_training else []
        flags = [module.training for module in modules]
        try:
            for module in modules:
                name = type(module).__name__  # by name, as torchattacks goes, so that layers of one's own count too
                frozen = ("BatchNorm" in name and not self._batchnorm_training) or (
                    "Dropout" in name and not self._dropout_training
                )
                module.training = not frozen
            yield
        finally:
            for module, flag in zip(modules, flags, strict=True):
                module.training = flag

    def set_normalization_used(self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> None:
        """Inputs and adversaries are ``(image - mean) / std``, per channel; eps and alpha stay those of [0, 1]."""
        means, stds = (torch.as_tensor(value).detach().reshape(1, -1, 1, 1) for value in (mean, std))
        if means.shape != stds.shape:
            raise ValueError(f"mean has {means.numel()} values and std {stds.numel()}: give one each per channel")
        if not bool((stds > 0).all()):
            raise ValueError(f"std must be positive, got {stds.flatten().tolist()}")
        self.normalization_used = {"mean": means, "std": stds}

    def normalize(self, inputs: Tensor) -> Tensor:
        """``(inputs - mean) / std`` of ``set_normalization_used``."""
        mean, std = self._mean_std(inputs)
        return (inputs - mean) / std

    def inverse_normalize(self, inputs: Tensor) -> Tensor:
        """``inputs * std + mean`` of ``set_normalization_used``."""
        mean, std = self._mean_std(inputs)
        return inputs * std + mean

    def _mean_std(self, like: Tensor) -> list[Tensor]:
        if self.normalization_used is None:
            raise ValueError("mean and std are not known: call set_normalization_used(mean, std) first")
        channels = self.normalization_used["mean"].numel()
        if like.ndim != 4 or channels not in (1, like.shape[1]):
            raise ValueError(
                f"inputs are {list(like.shape)}, expected [B, {channels}, H, W]: mean has {channels} values"
            )
        return [self.normalization_used[name].to(like) for name in ("mean", "std")]

    def _unit(self, inputs: Tensor) -> Tensor:
        """The images in [0, 1]; what normalising and back has rounded to just outside is brought in."""
        if self.normalization_used is None:
            return inputs
        x = self.inverse_normalize(inputs)
        inside = x.clamp(0, 1)
        return torch.where((x - inside).abs() <= max(1e-5, 4 * torch.finfo(x.dtype).eps), inside, x)

    def _network(self, x: Tensor) -> nn.Module:
        """From images like ``x``, in [0, 1], to logits."""
        return self.model if self.normalization_used is None else _Normalized(self.model, *self._mean_std(x))

    def get_mode(self) -> str:
        """The attack mode."""
        return self.attack_mode

    def set_mode_default(self) -> None:
        """Away from the labels."""
        self.targeted = False
        self._announce("default", quiet=False)

    def set_mode_targeted_by_function(self, target_map_function: TargetMap, quiet: bool = False) -> None:
        """Towards ``target_map_function(images, labels)``, images in [0, 1]."""
        if not callable(target_map_function):
            raise TypeError(
                f"target_map_function must be a function of images and labels, got {target_map_function!r}; "
                "set_mode_targeted_by_label takes the labels themselves as targets"
            )
        self._aim("targeted(custom)", lambda inputs, labels: target_map_function(self._unit(inputs), labels), quiet)

    def set_mode_targeted_random(self, quiet: bool = False) -> None:
        """Towards a random class other than the label's."""
        self._aim("targeted(random)", self.get_random_target_label, quiet)

    def set_mode_targeted_least_likely(self, kth_min: int = 1, quiet: bool = False) -> None:
        """Towards the class with the ``kth_min``-th smallest logit, the label's left out."""
        if isinstance(kth_min, bool) or not isinstance(kth_min, int) or kth_min < 1:
            raise ValueError(f"kth_min must be an integer of at least 1, got {kth_min!r}")
        self._aim("targeted(least-likely)", self.get_least_likely_label, quiet)
        self._kth_min = kth_min

    def set_mode_targeted_by_label(self, quiet: bool = False) -> None:
        """Towards the labels that are given."""
        self._aim("targeted(label)", _given, quiet)

    def _aim(self, mode: str, targets: TargetMap, quiet: bool) -> None:
        if "targeted" not in self.supported_mode:
            raise ValueError(f"{self.attack} has no targeted mode: it climbs a divergence and takes no labels")
        self.targeted, self._targets = True, targets
        self._announce(mode, quiet)

    def _announce(self, mode: str, quiet: bool) -> None:
        self.attack_mode = mode
        if not quiet:
            print(f"{self.attack}: attack mode {mode}")

    def get_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """The classes to reach, int64 [B], in a targeted mode."""
        if self._targets is None:
            raise ValueError("no targets are known: call one of the set_mode_targeted_* methods first")
        return self._targets(inputs, labels)

    def get_random_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Per image a random class, of equal chances, other than its label's (default: the predicted one)."""
        logits, labels = self._predicted(inputs, labels)
        others = logits.shape[1] - 1
        drawn = (others * torch.rand(len(labels))).long().clamp_max(others - 1).to(labels.device)
        return drawn + (drawn >= labels)

    def get_least_likely_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Per image the class with the k-th smallest logit, its label's (default: the predicted one) left out."""
        logits, labels = self._predicted(inputs, labels)
        if self._kth_min >= logits.shape[1]:
            raise ValueError(f"kth_min={self._kth_min} is too large: the model has {logits.shape[1]} classes")
        return logits.scatter(1, labels[:, None], torch.inf).kthvalue(self._kth_min, dim=1).indices

    def _predicted(self, inputs: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits in eval mode, and the labels, or what is predicted."""
        goal = Objective(None if labels is None else class_indices(labels, inputs))
        with leave_no_trace(self.model, "eval", _key(inputs.device)), torch.no_grad():
            logits = goal.logits(self.model, inputs)
        return logits, logits.argmax(1) if goal.labels is None else goal.labels

    def get_logits(self, inputs: Tensor) -> Tensor:
        """``model(inputs)``."""
        logits: Tensor = self.model(inputs)
        return logits

    def save(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("save: attack the batches of the loader in a loop and torch.save what you need")

    def load(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("load: torch.load the tensors and put them in a TensorDataset")

    def to_type(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("to_type: (255 * images).round().to(torch.uint8), or images.float() / 255")

    def __repr__(self) -> str:
        shared = ("attack", "model", "model_name", "attack_mode", "targeted", "normalization_used")
        own = {name: value for name, value in vars(self).items() if name[0] != "_" and name not in shared}
        shown = {
            "model_name": self.model_name,
            "device": self.device,
            "attack_mode": self.attack_mode,
            "targeted": self.targeted,
            "normalization_used": self.normalization_used is not None,
            **own,
        }
        return f"{self.attack}({', '.join(f'{name}={value}' for name, value in shown.items())})"


class FGSM(Attack):
    """One signed gradient step of eps (Goodfellow et al. 2015, arXiv 1412.6572)."""

    def __init__(self, model: nn.Module, eps: float = 8 / 255) -> None:
        super().__init__("FGSM", model)
        self.eps = eps
        self._attack()

    def _attack(self) -> attacks.PGD:
        return self._pgd(self.eps, 1)


class PGD(Attack):
    """Signed gradient steps in the l_inf ball, from a uniform start (Madry et al. 2018, arXiv 1706.06083)."""

    def __init__(
        self, model: nn.Module, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10, random_start: bool = True
    ) -> None:
        super().__init__("PGD", model)
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.random_start = random_start
        self._attack()

    def _attack(self) -> attacks.PGD:
        return self._pgd(self.alpha, self.steps)

    def _start(self, x: Tensor) -> Tensor | None:
        return _around(x, torch.empty_like(x).uniform_(-self.eps, self.eps)) if self.random_start else None


class FFGSM(Attack):
    """One signed step of alpha from a uniform start (Wong et al. 2020, arXiv 2001.03994)."""

    def __init__(self, model: nn.Module, eps: float = 8 / 255, alpha: float = 10 / 255) -> None:
        super().__init__("FFGSM", model)
        self.eps = eps
        self.alpha = alpha
        self._attack()

    def _attack(self) -> attacks.PGD:
        return self._pgd(self.alpha, 1)

    def _start(self, x: Tensor) -> Tensor:
        # torchattacks draws normal numbers first and overwrites them; they are drawn here for the same random state.
        return _around(x, torch.randn_like(x).uniform_(-self.eps, self.eps))


class TPGD(Attack):
    """PGD on KL(p(x) || p(x')) from x + 0.001 normal noise: the attack of TRADES (Zhang et al. 2019, arXiv 1901.08573).

    Labels are not needed and not looked at. The network runs on x once.
    """

    supported_mode = ("default",)
    _needs_labels = False

    def __init__(self, model: nn.Module, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10) -> None:
        super().__init__("TPGD", model)
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self._attack()

    def _attack(self) -> attacks.PGD:
        return self._pgd(self.alpha, self.steps, objective="kl")

    def _start(self, x: Tensor) -> Tensor:
        return _around(x, torch.randn_like(x).mul_(0.001))

    def _run(
        self, attack: attacks.PGD, network: nn.Module, x: Tensor, labels: Tensor | None, start: Tensor | None
    ) -> Tensor:
        return super()._run(attack, network, x, None, start)


class _Directed(Attack):
    """An attack whose step goes by more than the gradient."""

    def _direction(self, grad: Tensor, before: Tensor | None) -> tuple[Tensor, float | Tensor]:
        """Where to and how far, from the gradient of the sum of the losses and the direction before."""
        raise NotImplementedError

    def _run(
        self, attack: attacks.PGD, network: nn.Module, x: Tensor, labels: Tensor | None, start: Tensor | None
    ) -> Tensor:
        assert labels is not None
        goal = Objective(class_indices(labels, x))
        with leave_no_trace(network, attack.attack_mode, _key(x.device)):
            adv, direction = (x if start is None else start).clone(), None
            for _ in range(attack.steps):
                grad = goal.gradient(network, adv)[1]
                direction, step_size = self._direction(grad, direction)
                adv = pgd_step(adv, direction, x, attack.eps, step_size, norm=attack.norm, descend=attack.targeted)
            return adv


class PGDL2(_Directed):
    """Gradient steps in the l2 ball, from a random direction at a uniform radius (Madry et al. 2018, arXiv 1706.06083).

    A step has length ``alpha n / (n + eps_for_division)``, n the norm of a sample's gradient of the mean loss: where
    the prediction is nearly certain, or the batch large, it is shorter than alpha; 0 makes it alpha always.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 1.0,
        alpha: float = 0.2,
        steps: int = 10,
        random_start: bool = True,
        eps_for_division: float = 1e-10,
    ) -> None:
        super().__init__("PGDL2", model)
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.random_start = random_start
        self.eps_for_division = eps_for_division
        self._attack()

    def _attack(self) -> attacks.PGD:
        return self._pgd(self.alpha, self.steps, norm="l2")

    def _start(self, x: Tensor) -> Tensor | None:
        if not self.random_start:
            return None
        noise = torch.empty_like(x).normal_()
        length = torch.linalg.vector_norm(noise.flatten(1), dim=1)
        radius = torch.zeros_like(length).uniform_(0, 1)
        return _around(x, noise.mul_(_per_sample(radius / length * self.eps, x)))

    def _direction(self, grad: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        length = torch.linalg.vector_norm(grad.flatten(1), dim=1, dtype=compute_dtype(grad.dtype))
        share = length / (length + self.eps_for_division * len(grad))
        return grad, self.alpha * share.nan_to_num(0.0)


class MIFGSM(_Directed):
    """Signed steps along a sum of gradients, each over its mean absolute value, that forgets by the factor ``decay`` a
    step (Dong et al. 2018, arXiv 1710.06081)."""

    def __init__(
        self, model: nn.Module, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10, decay: float = 1.0
    ) -> None:
        super().__init__("MIFGSM", model)
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.decay = decay
        self._attack()

    def _attack(self) -> attacks.PGD:
        return self._pgd(self.alpha, self.steps)

    def _direction(self, grad: Tensor, before: Tensor | None) -> tuple[Tensor, float]:
        size = grad.abs().flatten(1).mean(1).clamp_min(torch.finfo(grad.dtype).tiny)
        grad = grad / _per_sample(size, grad)
        return grad if before is None else grad.add_(before, alpha=self.decay), self.alpha


class _Normalized(nn.Module):
    """A model behind the normalisation of its inputs."""

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.model, self.mean, self.std = model, mean, std

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model((x - self.mean) / self.std)
        return logits


def _around(x: Tensor, noise: Tensor) -> Tensor:
    """x + noise in the image range, in noise's memory."""
    return noise.add_(x).clamp_(0, 1)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _given(inputs: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError("labels is missing: set_mode_targeted_by_label takes them as the targets")
    return labels


def _key(device: torch.device) -> Tensor:
    """The noise key that the global generator would give next, which it still gives to whoever draws next."""
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    return noise_key(generator.device, generator=generator.clone_state()).to(device)


def __getattr__(name: str) -> NoReturn:
    known = ", ".join(sorted(set(__all__) - {"Attack"}))
    raise AttributeError(f"atlas_kernels.compat.torchattacks has no {name!r}; it has {known}")
