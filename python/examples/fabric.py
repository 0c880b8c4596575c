"""Adversarial training in a loop of Lightning Fabric, on scikit-learn's digits.

    pip install lightning
    python python/examples/fabric.py --epochs 10
    fabric run --devices 2 python/examples/fabric.py

Fabric wraps the network, and the wrapper casts images to the precision of training. The attack gets the network inside
(``.module``): its gradients go to images, and no process waits for another in it.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import atlas_kernels as ak

EPS = 0.2  # images are in [0, 1]
ATTACK = ak.PGD(eps=EPS, steps=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--precision", default="32-true", help="as Fabric calls it: bf16-mixed, 16-mixed")
    arguments = parser.parse_args()

    fabric: Any = importlib.import_module("lightning.fabric").Fabric(precision=arguments.precision)
    fabric.launch()
    fabric.seed_everything(0)

    digits = load_digits()
    x = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
    y = torch.from_numpy(digits.target)
    test, train = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).split([500, len(y) - 500])
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(x[train], y[train]), batch_size=64, shuffle=True))
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )  # fmt: skip
    model, optimizer = fabric.setup(network, torch.optim.Adam(network.parameters(), lr=5e-3))

    for _ in range(arguments.epochs):
        model.train()
        for images, labels in loader:
            with fabric.autocast():
                last = ATTACK.last_gradient(model.module, images, labels)  # the network itself
            batch = ak.pgd_step_neighbours(
                last.adv, last.grad, images, EPS, ATTACK.effective_step_size, radius=EPS / 2, count=1, key=last.key
            )
            loss = ak.atlas_loss(model(batch), labels)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()

    if fabric.is_global_zero:
        plain, device = model.module.eval(), fabric.device
        images, labels = x[test].to(device), y[test].to(device)
        attacked = ak.PGD(eps=EPS, steps=20)(plain, images, labels)
        with torch.no_grad():
            clean, robust = ((plain(each).argmax(1) == labels).float().mean() for each in (images, attacked))
        print(f"fabric: clean {clean:.1%}, PGD-20 {robust:.1%}")


if __name__ == "__main__":
    main()
