"""What several processes gain: training steps of one process, and of all of them on the same batches.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/many_processes.py [--methods NAME ...] [--rounds N]

For each method a step of one process alone, while the others wait, and a step of all, in turn; the shortest of each. A
step is what the trainer makes of a batch: attack, loss, backward, exchange of gradients and statistics, update. Beside
them the exchange of gradients alone, and what an ideal machine would give: as many times the images as processes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from atlas_kernels import keep_memory
from atlas_train import methods, models, processes
from atlas_train.data import Batch, Batches, Images
from atlas_train.descent import OptimizerDescent
from atlas_train.methods import Method, State
from atlas_train.noise import noise_keys
from tables import aligned

EPS, LR = 8 / 255, 1e-20  # below the last place of every weight: the work is done, and the weights stay


def made(width: int, batch_size: int, device: torch.device) -> tuple[nn.Module, Batch, Batch]:
    """A network, and a batch for one process and for all of them."""
    torch.manual_seed(0)
    size = {"num_classes": 10, "in_channels": 3, "width": width}
    model = models.build("preact_resnet18", normalize=False, **size).to(device).train()
    images = Images(torch.randint(256, (batch_size, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (batch_size,)))
    batches = [
        next(iter(Batches(images, batch_size, shuffle=False, seed=0, device=device, place=place)))
        for place in ((0, 1), processes.place())
    ]
    return model, batches[0], batches[1]


def step_of(method: Method, model: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    """A training step on a batch."""
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    key, state = noise_keys(0, 0, 1)[0].to(batch.x.device), State(3, 40, 1, 4, batch.deal.total(batch.y))

    def step() -> Tensor:
        descent = OptimizerDescent(optimizer, lambda update: LR, deal=batch.deal)
        return batch.deal.settled(*method.step(model, batch, key, state, descent), model)[0]

    return step


def seconds(call: Callable[[], object], device: torch.device, among_all: bool) -> float:
    """Of one call, which all processes make together, or the first one alone."""
    dist.barrier()
    started = time.perf_counter()
    if among_all or processes.is_first():
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    took = time.perf_counter() - started
    dist.barrier()
    return took


def exchange_of(model: nn.Module, batch: Batch) -> Callable[[], None]:
    """The exchange of gradients."""
    weights = list(model.parameters())

    def exchange() -> None:
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        batch.deal.average_gradients(weights)

    return exchange


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["standard", "one_step_adv", "atlas", "trades"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    with processes.joined(), keep_memory():
        if (count := processes.count()) == 1:
            raise SystemExit("one process has nothing to compare: start this by torchrun --nproc-per-node 2")
        device = processes.own_device(torch.device(args.device))
        model, whole, part = made(args.width, args.batch_size, device)
        rows = [["method", "one process", f"{count} processes", "times faster", "exchange of gradients"]]
        for name in args.methods:
            method = methods.build(name, EPS)
            calls = step_of(method, model, whole), step_of(method, model, part), exchange_of(model, part)
            times = [[seconds(call, device, n > 0) for n, call in enumerate(calls)] for _ in range(args.rounds + 1)]
            one, many, exchange = (min(column) for column in zip(*times[1:], strict=True))
            shown = [f"{1000 * each:,.1f} ms" for each in (one, many)]
            rows.append([name, *shown, f"{one / many:.2f}", f"{100 * exchange / many:.1f} % of a step"])
        if processes.is_first():
            print(f"PreActResNet-18 of width {args.width}, batches of {args.batch_size}; the shortest of {args.rounds}")
            print(f"{device.type}, {torch.get_num_threads()} threads a process, torch {torch.__version__}\n")
            print(aligned(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
