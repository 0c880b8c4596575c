"""A plain PyTorch training loop on the fused operators: standard training, then ATLAS, on scikit-learn's digits.

    python python/examples/plain_training.py --epochs 20

prints clean and robust accuracy of both.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import atlas_kernels as ak

EPS = 0.2  # images are in [0, 1]
ATTACK = ak.PGD(eps=EPS, steps=1)  # frozen settings; the model is given at the call and left as it was


def standard_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def robust_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    last = ATTACK.last_gradient(model, x, y)  # all of the attack but its last step
    # One kernel takes that step, projects, samples a neighbour and writes the batch [x; adversary; neighbour].
    images = ak.pgd_step_neighbours(
        last.adv, last.grad, x, EPS, ATTACK.effective_step_size, radius=EPS / 2, count=1, key=last.key
    )
    loss: Tensor = ak.atlas_loss(model(images), y)
    return loss


def accuracies(model: nn.Module, x: Tensor, y: Tensor) -> str:
    model.eval()
    attacked = ak.PGD(eps=EPS, steps=20)(model, x, y)
    with torch.no_grad():
        clean, robust = ((model(images).argmax(1) == y).float().mean() for images in (x, attacked))
    return f"clean {clean:.1%}, PGD-20 {robust:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    epochs = parser.parse_args().epochs

    digits = load_digits()
    x = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
    y = torch.from_numpy(digits.target)
    test, train = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).split([500, len(y) - 500])

    for name, loss_of in {"standard": standard_loss, "atlas": robust_loss}.items():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
            nn.Linear(32 * 16, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(epochs):
            model.train()
            for rows in train[torch.randperm(len(train))].split(64):
                loss = loss_of(model, x[rows], y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        print(f"{name}: {accuracies(model, x[test], y[test])}")


if __name__ == "__main__":
    main()
