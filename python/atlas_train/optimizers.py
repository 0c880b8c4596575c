"""The optimiser of a run: made as the settings say, and given the memory that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainConfig
from .options import plain

#: What an optimiser keeps of each parameter.
_KEPT = {"SGD": {"momentum_buffer"}, "Adam": {"step", "exp_avg", "exp_avg_sq"}}


def make(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """SGD or Adam: on CUDA torch's fused kernels, which can read their learning rate on the device.

    Graphs of whole steps need such an optimiser; eager steps use it too, so that both make the same weights.
    """
    weights = list(model.parameters())
    groups, fused = _groups(config, weights), all(map(fusible, weights))
    if config.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=fused or None
        )
    else:
        optimizer = torch.optim.Adam(
            groups, config.lr, weight_decay=config.weight_decay, fused=fused or None, capturable=fused
        )
        vars(optimizer)["_warned_capturable_if_run_uncaptured"] = True  # torch would warn of every run without graphs
    if config.clip_norm:
        optimizer.register_step_pre_hook(lambda *_: _clip(weights, config.clip_norm))
    _complete(optimizer)
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate until the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def set_momentum(optimizer: torch.optim.Optimizer, momentum: float | None) -> None:
    """From the next step on; None: as it is."""
    for group in optimizer.param_groups if momentum is not None else ():
        group["momentum"] = momentum


def put_back_later(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Gives what puts memory and settings back as they are now, in the tensors that graphs of a step know."""
    before = {
        (weight, name): value.clone()
        for weight, state in optimizer.state.items()
        for name, value in state.items()
        if value is not None
    }
    settings = [{name: value for name, value in g.items() if name != "params"} for g in optimizer.param_groups]

    def put_back() -> None:
        for group, values in zip(optimizer.param_groups, settings, strict=True):
            group.update(values)
            for weight in group["params"]:
                for name, value in list(optimizer.state.get(weight, {}).items()):
                    if (old := before.get((weight, name))) is not None:
                        value.copy_(old)
                    elif group["fused"]:  # what a graph may move: from 0, as it began
                        value.zero_()
                    else:
                        del optimizer.state[weight][name]

    return put_back


def _groups(config: TrainConfig, weights: list[nn.Parameter]) -> list[dict[str, Any]]:
    """The weights, those apart that do not decay. A checkpoint numbers them in this order."""
    if config.decay_norms:
        return [{"params": weights}]
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in weights if weight.dim() > 1]},
        {"params": [weight for weight in weights if weight.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _clip(weights: list[nn.Parameter], norm: float) -> None:
    """In every step of the optimiser, so in graphs too: nothing waits for the device."""
    nn.utils.clip_grad_norm_(weights, norm)


def fusible(weight: Tensor) -> bool:
    """Whether the fused kernels take a weight: real numbers on CUDA, dense in memory."""
    dense = weight.is_contiguous() or (weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last))
    return weight.is_cuda and weight.is_floating_point() and dense


def _complete(optimizer: torch.optim.Optimizer) -> None:
    """Fused SGD takes momentum for all weights or for none, and some may get their first gradient later."""
    for group in optimizer.param_groups:
        for weight in group["params"] if group["fused"] and group.get("momentum") else ():
            if optimizer.state[weight].get("momentum_buffer") is None:
                optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)


def load(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], source: object) -> None:
    """The optimiser's memory (momentum and the like); its settings stay those that it was made with.

    Raises ValueError, naming ``source``, where it is not that of these parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = _KEPT[type(optimizer).__name__]
    for number, state in saved["state"].items():
        is_complex = number < len(parameters) and parameters[number].is_complex()
        fits = (
            number < len(parameters)
            and (not state or state.keys() == kept)
            and all(
                value.shape == (() if name == "step" else parameters[number].shape)
                and (value.is_complex() if is_complex and name != "step" else value.is_floating_point())
                if value is not None
                else name == "momentum_buffer"  # before the first step
                for name, value in state.items()
            )
        )
        if not fits:
            raise ValueError(f"{plain(source)}: the optimiser's state of parameter {number} does not fit the network")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if name != "step" and value is not None:  # the run may go on in another memory layout
                state[name] = torch.empty_like(weight).copy_(value)
    _complete(optimizer)
