"""A plain training loop with what large runs need: DDP, gradient accumulation and GradScaler, around our attack.

    python python/examples/plain_ddp.py --epochs 10
    torchrun --nproc-per-node 2 python/examples/plain_ddp.py --epochs 10 --accumulate 2
    torchrun --nproc-per-node 8 python/examples/plain_ddp.py --precision fp16          on GPUs

Three things to know. The attack gets the module inside of DDP: its gradients go to images, so that processes have
nothing to exchange there. ``broadcast_buffers=False``: else DDP overwrites BatchNorm's statistics before the second
forward of a step, while the first one still needs them. GradScaler scales the loss of training alone: the attack makes
its own gradient, and uses its sign.
"""

from __future__ import annotations

import argparse
import contextlib
import os

import torch
from sklearn.datasets import load_digits
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import atlas_kernels as ak

EPS = 0.2  # images are in [0, 1]
ATTACK = ak.PGD(eps=EPS, steps=3)


def sets() -> tuple[TensorDataset, tuple[Tensor, Tensor]]:
    digits = load_digits()
    x = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
    y = torch.from_numpy(digits.target)
    test, train = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).split([500, len(y) - 500])
    return TensorDataset(x[train], y[train]), (x[test], y[test])


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--accumulate", type=int, default=1, help="batches for each update")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the network")
    arguments = parser.parse_args()

    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if processes > 1:
        distributed.init_process_group("nccl" if cuda else "gloo")

    torch.manual_seed(0)  # the same weights everywhere
    model = network().to(device)
    trained = DistributedDataParallel(model, broadcast_buffers=False) if processes > 1 else model
    train, (x_test, y_test) = sets()
    sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(train, processes, rank, drop_last=True)
    loader = DataLoader(train, batch_size=64 // processes, sampler=sampler, drop_last=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    scaler = torch.amp.GradScaler(device.type, enabled=arguments.precision == "fp16")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[arguments.precision]
    torch.manual_seed(rank)  # other noise in each process

    for epoch in range(arguments.epochs):
        sampler.set_epoch(epoch)
        trained.train()
        for number, batch in enumerate(loader, 1):
            x, y = (part.to(device) for part in batch)
            update = number % arguments.accumulate == 0 or number == len(loader)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                adversaries = ATTACK(model, x, y)  # the module itself, not its DDP
                # Gradients are exchanged with the last backward of an update alone.
                together: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
                if isinstance(trained, DistributedDataParallel) and not update:
                    together = trained.no_sync()
                with together:
                    loss = F.cross_entropy(trained(adversaries), y) / arguments.accumulate
                    scaler.scale(loss).backward()
            if update:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()

    if rank == 0:
        model.eval()
        x, y = x_test.to(device), y_test.to(device)
        attacked = ak.PGD(eps=EPS, steps=20)(model, x, y)
        with torch.no_grad():
            clean, robust = ((model(images).argmax(1) == y).float().mean() for images in (x, attacked))
        print(f"ddp: clean {clean:.1%}, PGD-20 {robust:.1%}")
    if processes > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
