"""How a network of the study is judged: by verdicts on single images, made in parts, so that one killed goes on."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from atlas_kernels import noise_key
from atlas_kernels.attacks import PGD
from atlas_kernels.precision import taken
from atlas_train.autoattack import Version, verdicts
from atlas_train.data import Batches, DataSplits, Images, held_out
from atlas_train.data.images import stratified
from atlas_train.evaluate import SUBSET_SEED, evaluating, survivors
from atlas_train.writing import write_bytes
from studies.plan import BEDS, Judge, Planned

#: Right on the image itself, under PGD-20, and under AutoAttack or the part of it that screens.
MEASURES = ("clean", "pgd", "aa")
ATTACKS: dict[Judge, Version] = {"screen": "apgd", "test": "standard"}
PART, STEPS = 500, 20
BATCH = 128
_UNKNOWN = -1
Arrays = dict[str, np.ndarray]


def judging(planned: Planned, splits: DataSplits) -> tuple[np.ndarray, Images]:
    """The numbers of the images that judge the run, ascending, and the set that they are of.

    Screening takes training images that the run does not train on: those of its validation, and where the bed wants
    more, others. They go by bed and seed alone, so that the runs of a seed are judged by the same ones.
    """
    bed, settings = BEDS[planned.bed], planned.settings
    if planned.judge == "test":
        labels = splits.test.labels.cpu().numpy()
        few = bed.test < len(labels)
        return stratified(labels, bed.test, SUBSET_SEED) if few else np.arange(len(labels)), splits.test
    labels, seed = splits.train.labels.cpu().numpy(), planned.seed
    train, held = held_out.rows(labels, settings.get("train_size"), settings["val_size"], seed)
    left = np.setdiff1d(np.arange(len(labels)), np.concatenate([train, held]))
    if (more := min(bed.screen - len(held), len(left))) > 0:
        held = np.sort(np.concatenate([held, left[stratified(labels[left], more, seed)]]))
    return held, splits.train


def a_part(ids: np.ndarray) -> np.ndarray:
    """As many of the numbers as are attacked together, spread over all."""
    return ids[:: max(1, len(ids) // PART)][:PART]


def judge(
    model: nn.Module,
    images: Images,
    ids: np.ndarray,
    eps: float,
    version: Version,
    path: Path,
    until: float = math.inf,
) -> Arrays | None:
    """Which of the images with these numbers the network is right at, by ``MEASURES``; None where the time is too
    short for another part of them. What is known is kept in ``path``, and is not made again."""
    known, took = _kept(path, ids), 0.0
    for begin in range(0, len(ids), PART):
        part = slice(begin, begin + PART)
        if (known["aa"][part] != _UNKNOWN).all():
            continue
        if (now := time.time()) + took > until:
            return None
        for name, right in _verdicts(model, images, ids[part], eps, version).items():
            known[name][part] = right
        save(path, {"ids": ids, **known})
        took = time.time() - now
    return {name: values == 1 for name, values in known.items()}


def _verdicts(model: nn.Module, images: Images, ids: np.ndarray, eps: float, version: Version) -> Arrays:
    device, rows = next(model.parameters()).device, torch.from_numpy(ids)
    few = Images(images.images[rows], images.labels[rows])
    x, y, _ = next(iter(Batches(few, len(few), shuffle=False, seed=0, device=device)))
    key = noise_key(device, generator=torch.Generator(device).manual_seed(0))
    with evaluating(model):
        rights = survivors(model, {"pgd": PGD(eps, 2.5 * eps / STEPS, STEPS)}, x, y, rows.to(device), key)
    # What bfloat16 finds counts only where float32 confirms it.
    search = "bf16" if taken("auto", device) == "bf16" else "fp32"
    size = len(few) if device.type == "cuda" else BATCH
    right = verdicts(model, few, eps, version=version, batch_size=size, search_precision=search)[0]
    rights["aa"] = right & rights["clean"]
    return {name: right.cpu().numpy() for name, right in rights.items()}


def _kept(path: Path, ids: np.ndarray) -> Arrays:
    """What was judged before, of the same images; else nothing is known."""
    if path.exists() and np.array_equal((kept := load(path)).pop("ids"), ids):
        return kept
    return {name: np.full(len(ids), _UNKNOWN, dtype=np.int8) for name in MEASURES}


def save(path: Path, arrays: Mapping[str, Any]) -> None:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    write_bytes(path, file.getvalue())


def load(path: Path) -> Arrays:
    with np.load(path) as file:
        return dict(file)
