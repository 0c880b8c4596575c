"""TRADES as many scripts have it, on scikit-learn's digits.

    python python/examples/trades_before.py --epochs 10

prints accuracies and the time; trades_after.py is the same script with the fused ``trades_loss``.
"""

from __future__ import annotations

import argparse
import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 0.2  # images are in [0, 1]


def trades_loss(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer,
    step_size: float = 0.003,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    beta: float = 1.0,
) -> Tensor:
    """CE(z(x), y) + beta KL(p(x) || p(x')), x' from PGD on that KL (Zhang et al. 2019, arXiv 1901.08573)."""
    divergence = nn.KLDivLoss(reduction="sum")
    model.eval()
    x_adv = x_natural + 0.001 * torch.randn_like(x_natural)
    for _ in range(perturb_steps):
        x_adv = x_adv.detach().requires_grad_()
        kl = divergence(F.log_softmax(model(x_adv), dim=1), F.softmax(model(x_natural), dim=1))
        (grad,) = torch.autograd.grad(kl, [x_adv])
        x_adv = x_adv.detach() + step_size * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x_natural - epsilon), x_natural + epsilon)
        x_adv = x_adv.clamp(0.0, 1.0)
    model.train()
    optimizer.zero_grad()
    natural = F.cross_entropy(model(x_natural), y)
    kl = divergence(F.log_softmax(model(x_adv), dim=1), F.softmax(model(x_natural), dim=1))
    return natural + beta * kl / len(x_natural)


def robust_accuracy(model: nn.Module, x: Tensor, y: Tensor, steps: int = 20) -> float:
    x_adv = x
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), [x_adv])
        x_adv = torch.min(torch.max(x_adv + 2.5 * EPS / steps * grad.sign(), x - EPS), x + EPS).clamp(0.0, 1.0)
    return accuracy(model, x_adv.detach(), y)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args().epochs

    digits = load_digits()
    x = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
    y = torch.from_numpy(digits.target)
    test, train = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).split([500, len(y) - 500])

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    started = time.perf_counter()
    for _ in range(epochs):
        model.train()
        for rows in train[torch.randperm(len(train))].split(64):
            loss = trades_loss(
                model, x[rows], y[rows], optimizer, step_size=EPS / 4, epsilon=EPS, perturb_steps=10, beta=6.0
            )
            loss.backward()
            optimizer.step()
    seconds = time.perf_counter() - started
    model.eval()
    clean, robust = accuracy(model, x[test], y[test]), robust_accuracy(model, x[test], y[test])
    print(f"trades: clean {clean:.1%}, PGD-20 {robust:.1%}, trained in {seconds:.1f} s")


if __name__ == "__main__":
    main()
