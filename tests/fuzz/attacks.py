"""Attacks with random settings on small networks: adversaries in ball and range, a network as it was, and replays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import atlas_kernels as ak

from .draws import Draw

SHAPE, CLASSES = (2, 5, 5), 4


def _network(draw: Draw) -> nn.Module:
    channels, size = SHAPE[0], 50
    torch.manual_seed(draw.integer(0, 2**31))
    head = nn.Sequential(nn.Flatten(), nn.Linear(size, CLASSES))
    made: nn.Module = draw.one_of(
        [
            head,
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), head),
            nn.Sequential(nn.Flatten(), nn.Linear(size, 20), nn.Dropout(0.5), nn.GELU(), nn.Linear(20, CLASSES)),
        ]
    )
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(draw.one_of([1.0, 1.0, 30.0]))
            weight.requires_grad_(draw.chance(0.8))
    for module in made.modules():
        module.training = draw.chance(0.3)
    return made


def _settings(draw: Draw, batch: int) -> dict[str, Any]:
    norm, most = draw.one_of([("linf", 0.3), ("linf", 0.3), ("l2", 2.0), ("l1", 6.0)])
    found: dict[str, Any] = {"norm": norm, "eps": draw.per_sample(draw.uniform((batch,), 0.0, most))}
    found |= {
        "steps": draw.integer(0, 4),
        "random_start": draw.chance(0.7),
        "attack_mode": draw.one_of(["eval", "train", "keep"]),
    }
    found |= {
        "objective": draw.one_of(["ce", "ce", "kl", "margin", "dlr"]),
        "keep": draw.one_of(["last", "last", "best"]),
    }
    found["restarts"] = draw.integer(1, 3) if found["random_start"] else 1
    found["targeted"] = found["objective"] != "kl" and draw.chance(0.3)
    found["compact"] = draw.chance(0.3)
    if draw.chance(0.3):
        found["step_size"] = draw.per_sample(draw.uniform((batch,), 0.0, most))
    if not found["compact"] and found["restarts"] == 1 and found["keep"] == "last":
        found["count_correct"] = draw.chance(0.3)
    return found


def attacked(draw: Draw) -> str | None:
    """One attack: what it promises, and that it leaves no trace."""
    batch = draw.integer(1, 6)
    x = draw.laid_out(draw.uniform((batch, *SHAPE)).to(draw.one_of([torch.float32, torch.float32, torch.float64])))
    y, network, settings = draw.integers(CLASSES, (batch,)), _network(draw), _settings(draw, batch)
    network.to(x.dtype)
    if settings["objective"] == "kl" and not settings["random_start"]:
        settings["objective"] = "ce"
    precision = draw.one_of(["keep", "keep", "fp32", "bf16", "fp16"]) if x.dtype == torch.float32 else "keep"
    attack = ak.PGD(**settings)
    before = [(t, t.clone(), t.requires_grad, t._version) for t in (*network.parameters(), *network.buffers())]
    modes = [module.training for module in network.modules()]
    torch.manual_seed(1)
    with ak.Execution(precision):
        result = attack.run(network, x, y)
        state = torch.random.get_rng_state()
        again = attack.run(network, x, y, key=result.key)
    wrong = []
    if not torch.equal(result.adv, again.adv):
        wrong.append("the key does not replay the attack")
    if not torch.equal(state, torch.random.get_rng_state()):
        wrong.append("a replay moved the global random state")
    if modes != [module.training for module in network.modules()]:
        wrong.append("a module's mode changed")
    for t, values, wanted, version in before:
        if t.requires_grad != wanted or t.grad is not None or t._version != version or not torch.equal(t, values):
            wrong.append("a parameter or buffer changed")
    wrong += _outside(result.adv, x, settings)
    if result.fooled is not None and settings["attack_mode"] == "eval" and precision == "keep":
        network.eval()
        with torch.no_grad():
            predicted = network(result.adv).argmax(1)
        right = (predicted == y) if settings["targeted"] else (predicted != y)
        if network is not None and not torch.equal(result.fooled, right):
            wrong.append("fooled is not what the network says")
    return "; ".join(wrong) or None


def _outside(adv: Tensor, x: Tensor, settings: dict[str, Any]) -> list[str]:
    eps = settings["eps"]
    eps = torch.as_tensor(eps).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) if isinstance(eps, Tensor) else eps
    if adv.isnan().any() or bool((adv < 0).any()) or bool((adv > 1).any()):
        return ["adversaries are outside [0, 1]"]
    if settings["norm"] == "linf":
        inside = (adv >= x - eps) & (adv <= x + eps)
    else:
        distance = torch.linalg.vector_norm(
            (adv.double() - x.double()).flatten(1), 2 if settings["norm"] == "l2" else 1, 1
        )
        reach = eps.double().reshape(-1) if isinstance(eps, Tensor) else eps
        inside = distance <= reach * (1 + 1e-5) + 1e-5
    return [] if bool(inside.all()) else [f"adversaries are outside the {settings['norm']} ball"]
