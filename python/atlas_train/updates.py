"""Steps of an optimiser that read their numbers on the device, so that a CUDA graph of a step can be given new ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atlas_kernels.capture import CaptureFailed


class Updates:
    """The steps of torch's SGD and Adam, on the state that these keep: what a run goes on with, eager or resumed.

    torch's own ways to read a learning rate on the device are fused kernels and ``capturable`` Adam, which round
    otherwise than the steps that they would stand in for. These make the same bits on a CPU; on CUDA the order of
    operations is that of torch's too, but for the last product of Adam.

    Raises ValueError for another optimiser than the two, and for options and parameter groups that the trainer's have
    not.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._adam = type(optimizer) is torch.optim.Adam
        groups = optimizer.param_groups
        refused = ("nesterov", "maximize", "dampening", "amsgrad", "capturable", "fused", "decoupled_weight_decay")
        extra = [name for name in refused if groups[0].get(name)]
        if type(optimizer) not in (torch.optim.SGD, torch.optim.Adam) or len(groups) > 1 or extra:
            raise ValueError(
                f"a graph of whole steps knows plain SGD and Adam with one parameter group, got "
                f"{type(optimizer).__name__} with {len(groups)} groups{''.join(f', {name}' for name in extra)}; set "
                "cuda_graphs='attack'"
            )
        self._group, self._state = groups[0], optimizer.state

    @property
    def state(self) -> list[Tensor]:
        """What ``step`` writes beside the weights."""
        kept = [value for state in self._state.values() for name, value in state.items() if name != "step"]
        return [value for value in kept if value is not None]

    def numbers(self, rates: Sequence[float]) -> Tensor:
        """What the next steps read, one row for each of these learning rates: on the host, pinned for CUDA.

        Raises CaptureFailed where Adam has made more steps with some weights than with others.
        """
        weight: Tensor = self._group["params"][0]
        rows = [[-lr, 1.0] for lr in rates]
        if self._adam:
            beta1, beta2 = self._group["betas"]
            done = {count.item() for count in self._counts()}  # they lie on the host
            if len(done) > 1:
                raise CaptureFailed("Adam has made more steps with some weights than with others")
            first = int(done.pop()) + 1
            rows = [[-(lr / (1 - beta1**n)), (1 - beta2**n) ** 0.5] for n, lr in enumerate(rates, first)]
        return torch.tensor(rows, dtype=weight.dtype, pin_memory=weight.is_cuda)

    def count(self, steps: int) -> None:
        """So many steps were made by a graph: Adam counts them on the host."""
        if self._adam:
            torch._foreach_add_(self._counts(), steps)

    def _counts(self) -> list[Tensor]:
        return [state["step"] for state in self._state.values()]

    @torch.no_grad()
    def step(self, numbers: Tensor) -> None:
        """One step with the gradients there are, which are then gone, and a row of ``numbers`` on the device."""
        group = self._group
        weights: list[Tensor] = [weight for weight in group["params"] if weight.grad is not None]
        grads = [weight.grad for weight in weights if weight.grad is not None]
        if group["weight_decay"]:
            grads = list(torch._foreach_add(grads, weights, alpha=group["weight_decay"]))
        (self._adam_step if self._adam else self._sgd_step)(weights, grads, *numbers.unbind())
        for weight in weights:
            weight.grad = None

    def _sgd_step(self, weights: list[Tensor], grads: list[Tensor], scale: Tensor, _: Tensor) -> None:
        if self._group["momentum"]:
            buffers = [self._state[weight]["momentum_buffer"] for weight in weights]
            torch._foreach_mul_(buffers, self._group["momentum"])
            torch._foreach_add_(buffers, grads)
            grads = buffers
        torch._foreach_addcmul_(weights, grads, [scale] * len(weights))

    def _adam_step(self, weights: list[Tensor], grads: list[Tensor], scale: Tensor, root: Tensor) -> None:
        if len(weights) != len(self._state):
            raise CaptureFailed("Adam has moved weights that get no gradient in this step, or the other way round")
        (beta1, beta2), state = self._group["betas"], [self._state[weight] for weight in weights]
        means, squares = ([kept[name] for kept in state] for name in ("exp_avg", "exp_avg_sq"))
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        spread = torch._foreach_sqrt(squares)
        torch._foreach_div_(spread, root)
        torch._foreach_add_(spread, self._group["eps"])
        torch._foreach_addcdiv_(weights, torch._foreach_mul(means, scale), spread)
