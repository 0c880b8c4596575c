"""What all attacks share: calling, modes, normalisation, saving."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...attacks.execution import attacking
from ...attacks.held import modes_of, put_back
from ...attacks.objective import Objective
from ...checks import class_indices, flag, require_float_images, whole
from ...noise import noise_key
from ...outputs import logits_of
from . import _saving
from ._holding import Kin
from ._holding import wrapper_method as wrapper_method
from ._saving import File, Loader, Normalization

TargetMap = Callable[[Tensor, Tensor | None], Tensor]


class Attack(Kin):
    """The base of all attacks, also of one's own: those define ``forward(images, labels)``.

    Calling an attack runs ``forward`` with the model in the mode that is set, on images in [0, 1], and gives what it
    returns, normalised again after ``set_normalization_used``. All else that is public may be overridden too.
    """

    def __init__(self, name: str, model: nn.Module) -> None:
        self.attack = name
        self._attacks: dict[str, Any] = {}  # torchattacks' wrappers look for it
        self._device: torch.device | str | None = None
        self.set_model(model)
        self.attack_mode = "default"
        self.supported_mode = ["default"]
        self.targeted = False
        self._target_map_function: TargetMap | None = None
        self._kth_min = 1
        self.normalization_used: dict[str, Tensor] | None = None
        self._normalization_applied: bool | None = None  # to the inputs; False: get_logits does it
        self._as_module: Through | None = None
        self._model_training = self._batchnorm_training = self._dropout_training = False
        if type(model).__name__ == "RobModel":  # of the package MAIR
            self._set_rmodel_normalization_used(model)

    def __call__(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        with self._asked_mode():
            if self._normalization_applied is not True:
                return self.forward(inputs, labels, *args, **kwargs)
            inputs = self.inverse_normalize(inputs)
            self._set_normalization_applied(False)
            try:
                adv = self.forward(inputs, labels, *args, **kwargs)
            finally:
                self._set_normalization_applied(True)
            return self.normalize(adv)

    def forward(self, inputs: Tensor, labels: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """The adversaries of images in [0, 1], in the mode that the model is in: what one's own attacks define."""
        raise NotImplementedError(f"{type(self).__name__} has no forward(images, labels): define it in a subclass")

    @wrapper_method
    def set_model(self, model: nn.Module) -> None:
        """Attack ``model`` from now on."""
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module, got {type(model).__name__}: put what it does into the forward of a "
                "module that holds the network, or override get_logits"
            )
        self.model = model
        self.model_name = type(model).__name__

    def get_logits(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """What is attacked: ``model(inputs)``, of normalised inputs after ``set_normalization_used``."""
        return logits_of(self.model(self.normalize(inputs) if self._normalization_applied is False else inputs))

    @property
    def device(self) -> torch.device | str | None:
        """Where the attack runs: as set, else where the model is now; None for a model without parameters."""
        parameter = next(self.model.parameters(), None)
        return self._device if self._device or parameter is None else parameter.device

    @device.setter
    def device(self, device: torch.device | str | None) -> None:
        self._device = device

    @wrapper_method
    def set_device(self, device: torch.device | str | None) -> None:
        """Move inputs and labels to ``device``."""
        self.device = device

    @wrapper_method
    def set_model_training_mode(
        self, model_training: bool = False, batchnorm_training: bool = False, dropout_training: bool = False
    ) -> None:
        """Mode of the model during attacks: eval, or train with BatchNorm and Dropout as the other two say."""
        self._model_training = flag("model_training", model_training)
        self._batchnorm_training = flag("batchnorm_training", batchnorm_training)
        self._dropout_training = flag("dropout_training", dropout_training)

    @contextmanager
    def _asked_mode(self) -> Iterator[None]:
        frozen = [] if self._batchnorm_training else ["BatchNorm"]
        frozen += [] if self._dropout_training else ["Dropout"]
        modes = {}
        for module in modes_of(self.model.modules()):
            name = type(module).__name__  # by name, as torchattacks goes, so that layers of one's own count too
            modes[module] = self._model_training and not any(part in name for part in frozen)
        with put_back(self.model, modes, alone=False):
            yield

    def _change_model_mode(self, given_training: bool) -> None:
        """For torchattacks' wrappers, which ask before they call; a call itself sets the mode and puts it back."""

    _recover_model_mode = _change_model_mode

    @wrapper_method
    def set_normalization_used(self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> None:
        """Inputs and adversaries are ``(image - mean) / std``, per channel; eps and alpha stay those of [0, 1]."""
        with torch.inference_mode(False):  # for gradients later
            means, stds = (torch.as_tensor(value).detach().clone().reshape(1, -1, 1, 1) for value in (mean, std))
        if means.shape != stds.shape:
            raise ValueError(f"mean has {means.numel()} values and std {stds.numel()}: give one each per channel")
        if not bool((stds > 0).all()):
            raise ValueError(f"std must be positive, got {stds.flatten().tolist()}")
        self.normalization_used = {"mean": means, "std": stds}
        self._normalization_applied = True

    @wrapper_method
    def _set_normalization_applied(self, flag: bool) -> None:
        self._normalization_applied = flag

    @wrapper_method
    def _set_rmodel_normalization_used(self, model: Any) -> None:
        mean, std = (getattr(model, name, None) for name in ("mean", "std"))
        if mean is not None and std is not None:
            mean, std = torch.as_tensor(mean), torch.as_tensor(std)
            if bool((mean != 0).all()) or bool((std != 1).all()):
                self.set_normalization_used(mean, std)

    def normalize(self, inputs: Tensor) -> Tensor:
        """``(inputs - mean) / std`` of ``set_normalization_used``."""
        mean, std = self._mean_std(inputs)
        return (inputs - mean) / std

    def inverse_normalize(self, inputs: Tensor) -> Tensor:
        """``inputs * std + mean`` of ``set_normalization_used``."""
        mean, std = self._mean_std(inputs)
        return inputs * std + mean

    def _mean_std(self, like: Tensor) -> list[Tensor]:
        require_float_images("inputs", like)
        if self.normalization_used is None:
            raise ValueError("mean and std are not known: call set_normalization_used(mean, std) first")
        channels = self.normalization_used["mean"].numel()
        if like.ndim != 4 or channels not in (1, like.shape[1]):
            raise ValueError(
                f"inputs are {list(like.shape)}, expected [B, {channels}, H, W]: mean has {channels} values"
            )
        return [self.normalization_used[name].to(like) for name in ("mean", "std")]

    def get_mode(self) -> str:
        """The attack mode."""
        return self.attack_mode

    @wrapper_method
    def set_mode_default(self) -> None:
        """Away from the labels."""
        self.targeted = False
        self._announce("default", quiet=False)

    @wrapper_method
    def set_mode_targeted_by_function(self, target_map_function: TargetMap, quiet: bool = False) -> None:
        """Towards ``target_map_function(images, labels)``, images in [0, 1]."""
        if not callable(target_map_function):
            raise TypeError(
                f"target_map_function must be a function of images and labels, got {target_map_function!r}; "
                "set_mode_targeted_by_label takes the labels themselves as targets"
            )
        self._set_mode_targeted("targeted(custom)", quiet)
        self._target_map_function = target_map_function

    @wrapper_method
    def set_mode_targeted_random(self, quiet: bool = False) -> None:
        """Towards a random class other than the label's."""
        self._set_mode_targeted("targeted(random)", quiet)
        self._target_map_function = self.get_random_target_label

    @wrapper_method
    def set_mode_targeted_least_likely(self, kth_min: int = 1, quiet: bool = False) -> None:
        """Towards the class with the ``kth_min``-th smallest logit, the label's left out."""
        kth_min = whole("kth_min", kth_min, 1)
        self._set_mode_targeted("targeted(least-likely)", quiet)
        self._target_map_function = self.get_least_likely_label
        self._kth_min = kth_min

    @wrapper_method
    def set_mode_targeted_by_label(self, quiet: bool = False) -> None:
        """Towards the labels that are given."""
        self._set_mode_targeted("targeted(label)", quiet)
        self._target_map_function = _given

    def _set_mode_targeted(self, mode: str, quiet: bool) -> None:
        if "targeted" not in self.supported_mode:
            raise ValueError(f"{self.attack} has no targeted mode: supported_mode is {self.supported_mode}")
        self.targeted = True
        self._announce(mode, quiet)

    def _announce(self, mode: str, quiet: bool) -> None:
        self.attack_mode = mode
        if not quiet:
            print(f"Attack mode is changed to '{mode}'.")

    def get_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """The classes to reach, int64 [B], in a targeted mode."""
        if self._target_map_function is None:
            raise ValueError("no targets are known: call one of the set_mode_targeted_* methods first")
        return self._target_map_function(inputs, labels)

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
        logits = self.get_output_with_eval_nograd(inputs)
        if labels is None:
            return logits, logits.argmax(1)
        return logits, class_indices("labels", labels, inputs, logits.shape[1], attack=True)

    def get_output_with_eval_nograd(self, inputs: Tensor) -> Tensor:
        """``get_logits(inputs)`` in eval mode, without gradients."""
        return self._judge(inputs, "eval")

    def _judge(self, inputs: Tensor, mode: str) -> Tensor:
        """The logits without gradients, in ``mode`` of ``attacking``."""
        network = self._through()
        key = None if self._is_overridden() else next_key(inputs.device)
        with attacking(network, mode, key):
            return Objective().predict(network, inputs)

    def _is_overridden(self) -> bool:
        """Whether what is attacked is not what is defined here, by a class or by an attribute of this attack."""
        own = (getattr(method, "__func__", None) for method in (self.get_logits, self.normalize))
        return tuple(own) != _OWN

    def _through(self) -> Through:
        made = self._as_module
        if made is None or made.model is not self.model or made.get_logits != self.get_logits:
            made = self._as_module = Through(self)
        return made

    def save(
        self,
        data_loader: Loader,
        save_path: File | None = None,
        verbose: bool = True,
        return_verbose: bool = False,
        save_predictions: bool = False,
        save_clean_inputs: bool = False,
        save_type: str = "float",
    ) -> tuple[Any, ...] | None:
        """Attack every batch of the loader; write the adversaries, in [0, 1], and their labels to ``save_path``.

        save_type: "float", or "int", 0..255 rounded down. With ``return_verbose`` the result is the robust accuracy in
        percent, the mean l2 distance of the adversaries that are misclassified, and the seconds of the last batch.

        The file is that of torchattacks, and either's ``load`` reads it. It is written at the end, whole.
        """
        return _saving.save(
            self, data_loader, save_path, verbose, return_verbose, save_predictions, save_clean_inputs, save_type
        )

    def _save_print(self, progress: float, rob_acc: float, l2: float, elapsed_time: float, end: str) -> None:
        said = f"- Save progress: {progress:2.2f} % / Robust accuracy: {rob_acc:2.2f} % / L2: {l2:1.5f}"
        print(f"{said} ({elapsed_time:2.3f} s a batch) \t", end=end)

    @staticmethod
    def load(
        load_path: File,
        batch_size: int = 128,
        shuffle: bool = False,
        normalize: Normalization | None = None,
        load_predictions: bool = False,
        load_clean_inputs: bool = False,
    ) -> Any:
        """A DataLoader of what ``save`` wrote: adversaries, labels and, if asked for, predictions and clean images.

        normalize: {"mean": ..., "std": ...} per channel, for images as the model takes them.
        """
        keys = ["adv_inputs", "labels"] + ["preds"] * load_predictions + ["clean_inputs"] * load_clean_inputs
        return _saving.load(load_path, batch_size, shuffle, normalize, keys)

    @staticmethod
    def to_type(inputs: Tensor, type: str) -> Tensor:
        """Images as "int", 0..255 rounded down, or as "float"; those that are so already stay."""
        return _saving.to_type(inputs, type)

    def __repr__(self) -> str:
        hidden = ("attack", "model", "supported_mode")
        shown = {name: value for name, value in vars(self).items() if name[0] != "_" and name not in hidden}
        shown |= {"device": self.device, "normalization_used": self.normalization_used is not None}
        return f"{self.attack}({', '.join(f'{name}={value}' for name, value in shown.items())})"


_OWN = Attack.get_logits, Attack.normalize


class Through(nn.Module):
    """What an attack's ``get_logits`` computes, as a module around the model."""

    def __init__(self, attack: Attack) -> None:
        super().__init__()
        self.model = attack.model
        self.get_logits = attack.get_logits
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        return self.get_logits(x)


def next_key(device: torch.device) -> Tensor:
    """The noise key that the global generator would give next, which it still gives to whoever draws next."""
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    return noise_key(generator.device, generator=generator.clone_state()).to(device)


def _given(inputs: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError("labels is missing: set_mode_targeted_by_label takes them as the targets")
    return labels
