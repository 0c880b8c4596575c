"""YOPO: you only propagate once (Zhang et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from atlas_kernels import pgd_step, random_start
from atlas_kernels.attacks import attacking
from atlas_kernels.outputs import logits_of
from atlas_kernels.vjp import vjp

from ..data import Batch, OfEps
from ..options import option, suggestion
from .base import Descent, Method, Metrics, State
from .terms import accuracy, uncompiled, update_statistics


@dataclass(frozen=True)
class YOPO(Method):
    """YOPO-m-n (Zhang et al. 2019, arXiv 1905.00877): m full passes a batch, n steps on the first layer after each.

    With f = g o f1, f1 up to and including the first layer, a full pass on CE(f(x + eta), y) gives the weights their
    gradients and p = -dCE/df1. While p stays fixed, H(eta) = <f1(clip(x + eta)), p> is cheap: eta takes n sign steps
    down H, and f1 gets the gradient of -H at the last eta on top of its own. The gradients of the m rounds are summed
    for one update (so published learning rates are divided by m: 0.2/m for PreActResNet-18, 0.4/m for WRN-34, 0.01/m on
    MNIST). 3m passes and 2m of the first layer.

    Where f1 is affine, as in both published CIFAR-10 networks, dH/deta has one sign in all n steps: that of the image
    gradient which the full backward gives anyway. One step of n sigma is then the same, but that a pixel which starts
    out of [0, 1] gets no gradient through the clip, and moves n - 1 sigma; so it is done here. Else f1 runs n times.

    It follows the published pre-res18 code. That of WRN-34 and MNIST means to leave the full pass out of f1's gradient,
    but restores a tensor which autograd has added to in place: what it does depends on how gradients were zeroed. The
    published MNIST network has a ReLU inside f1 (see ``first_layer``). Hooks find f1, in a compiled network too.
    """

    name: ClassVar[str] = "yopo"
    no_compile: ClassVar[str] = "yopo, which finds its first layer by hooks inside the network"
    lengths: ClassVar[tuple[str, ...]] = ("sigma",)
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mnist": {"outer": 5, "inner": 10, "sigma": OfEps(1 / 30)},
        "cifar10": {"outer": 5, "inner": 3, "sigma": OfEps(1 / 4)},
    }

    outer: int = option(5, "full passes per batch, m in the paper", low=1)
    inner: int = option(3, "steps on the first layer after each, n in the paper", low=1)
    sigma: float | None = option(None, "step of eta; default: eps/4", above=0)
    first_layer: str | None = option(
        None,
        "name of the module with which f1 ends, e.g. conv1; default: the convolution or linear layer that runs first. "
        "BatchNorm must not run before it or in it",
    )
    bn_compat: bool = option(
        False,
        "BatchNorm's running statistics as in the published code, which also runs the last adversary, for its log "
        "(1 pass more)",
    )

    def require(self, model: nn.Module) -> None:
        FirstLayer(uncompiled(model), self.first_layer)

    def prepare(self, model: nn.Module, batch: Batch, key: Tensor, state: State) -> Tensor:
        """The start, which the published code does not clip to the image range."""
        return random_start(batch.x, self.eps, key=key, ids=batch.ids, clip_min=-torch.inf, clip_max=torch.inf)

    def objective(self, model: nn.Module, batch: Batch, given: Tensor) -> tuple[Tensor, Metrics]:
        logits = logits_of(model(given))
        return self.ce(logits, batch), {"adv": accuracy(logits, batch)}

    def train_step(
        self, model: nn.Module, batch: Batch, key: Tensor, state: State, descent: Descent
    ) -> tuple[Tensor, Metrics]:
        """The loss is the mean over the m full passes, "adv" the accuracy in the last one."""
        model = uncompiled(model)
        first = FirstLayer(model, self.first_layer)
        adv, losses = self.prepare(model, batch, key, state), []
        for number in range(self.outer):
            leaf = adv.requires_grad_()
            with first:
                loss, metrics = self.objective(model, batch, leaf)
            descent.backward(loss, metrics)
            cotangent = first.cotangent  # -p
            if first.affine:
                adv = self._one_step(leaf.detach(), leaf.grad, batch.x, number == 0)
            else:
                adv = self._inner_steps(first, leaf.detach(), cotangent, batch.x, key)
            descent.backward((first(adv) * cotangent).sum())  # -H
            losses.append(loss.detach())
        if self.bn_compat:
            update_statistics(model, adv)
        descent.step()
        return torch.stack(losses).mean(), metrics

    @property
    def _sigma(self) -> float:
        return self.eps / 4 if self.sigma is None else self.sigma

    def _one_step(self, adv: Tensor, grad: Tensor | None, x: Tensor, from_start: bool) -> Tensor:
        """All n steps; of those from the start the first apart, in which clipped pixels only come back into range."""
        assert grad is not None
        if from_start:
            adv = pgd_step(adv, grad.masked_fill((adv < 0) | (adv > 1), 0), x, self.eps, self._sigma)
        return pgd_step(adv, grad, x, self.eps, (self.inner - from_start) * self._sigma)

    def _inner_steps(self, first: FirstLayer, adv: Tensor, cotangent: Tensor, x: Tensor, key: Tensor) -> Tensor:
        with attacking(first.model, "keep", key):
            for _ in range(self.inner):
                leaf = adv.requires_grad_()
                grad = vjp(first(leaf.clamp(0, 1)), leaf, cotangent)
                adv = pgd_step(leaf.detach(), grad, x, self.eps, self._sigma)
        return adv


_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: What may lie between the image and a layer of these: normalisation by constants, other shapes, dtypes and layouts.
_AFFINE = {"Sub", "Add", "Mul", "Div", "View", "UnsafeView", "ReshapeAlias", "Permute", "Clone", "ToCopy"}


class FirstLayer:
    """f1: a network up to and including its first layer; ``first(x)`` runs f1 alone.

    While it is entered it watches a forward of the network. Afterwards ``affine`` says whether f1 is known to be, and
    after the backward ``cotangent`` is the gradient at what f1 gave.
    """

    def __init__(self, model: nn.Module, name: str | None) -> None:
        self.model, self.name = model, name
        modules = dict(model.named_modules())
        if name is not None and name not in modules:
            raise ValueError(f"yopo: first_layer {name!r} is no module{suggestion(name, modules)}")
        layers = [m for m in modules.values() if isinstance(m, _LAYERS)] if name is None else [modules[name]]
        if not layers:
            raise ValueError(
                f"yopo: {type(model).__name__} has no convolution or linear layer; set first_layer to the name of the "
                "module with which its first layer ends"
            )
        self._watched = layers + [m for m in modules.values() if isinstance(m, _BatchNorm)]
        self._alone = False

    def __enter__(self) -> None:
        self._output: Tensor | None = None
        self._hooks = [module.register_forward_hook(self._see) for module in self._watched]

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for hook in self._hooks:
            hook.remove()
        if kind is None and self._output is None:
            raise ValueError(f"yopo: first_layer {self.name or 'of any kind'} did not run in the network's forward")

    def __call__(self, x: Tensor) -> Tensor:
        self._alone = True
        try:
            with self:
                self.model(x)
        except _Reached:
            pass
        finally:
            self._alone = False
        assert self._output is not None
        return self._output

    def _see(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if self._output is not None:
            return
        if isinstance(module, _BatchNorm):
            raise ValueError(
                "yopo: BatchNorm runs before the first layer ends, and the steps on that layer would move its "
                "statistics; set first_layer to a module that ends before it"
            )
        self._output = output
        if self._alone:
            raise _Reached
        self.affine = type(module) in _LAYERS and _affine(args[0])
        output.register_hook(self._keep)  # at once: the network may go on in place

    def _keep(self, grad: Tensor) -> None:
        self.cotangent = grad


class _Reached(Exception):
    """The first layer has run: the rest of the network need not."""


def _affine(x: Tensor) -> bool:
    """Whether ``x`` is known to be an affine function of the image, a leaf of the graph."""
    node = x.grad_fn
    while node is not None and node.name() != "torch::autograd::AccumulateGrad":
        before = [function for function, _ in node.next_functions]
        if node.name().removesuffix("Backward0") not in _AFFINE or before[0] is None or any(before[1:]):
            return False
        node = before[0]
    return True
