"""The augmentation of a training batch from a resident uint8 set against the forms people write, eager and compiled.

Bytes by the model: every pixel of the batch is read once as a byte and written once. Each call gathers other rows, as
in training. Plain forms: "gather" picks padded pixels by index tensors; "masks" crops all samples of one offset at once
(as CIFAR speedruns do); "loop" pads, slices and flips one sample after the other, as a data loader does.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import atlas_kernels as ak
from harness import Call, measure

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [(128, 1, 28, 28), (128, 3, 32, 32), (256, 3, 32, 32), (1024, 3, 32, 32), (32, 3, 224, 224)]
if DEVICE.type == "cuda":
    SIZES.append((512, 3, 224, 224))
PADDING, SET_BYTES = 4, 150_000_000  # CIFAR-10's training set

pytestmark = pytest.mark.parametrize("size", SIZES, ids=str)


def scaled(pixels: torch.Tensor, channels_last: bool = False) -> torch.Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return pixels.to(torch.float32, memory_format=layout).div_(255.0)


def gather(images, index):  # type: ignore[no-untyped-def]
    batch, (height, width) = len(index), images.shape[2:]
    top, left = torch.randint(0, 2 * PADDING + 1, (2, batch, 1), device=images.device)
    flip = torch.rand(batch, 1, device=images.device) < 0.5
    across = torch.arange(width, device=images.device)
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.where(flip, width - 1 - across, across)
    padded = F.pad(images[index], (PADDING,) * 4)
    sample = torch.arange(batch, device=images.device)[:, None, None]
    return scaled(padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2))


def masks(images, index):  # type: ignore[no-untyped-def]
    chosen = images[index]
    flip = torch.rand(len(index), 1, 1, 1, device=images.device) < 0.5
    padded = F.pad(torch.where(flip, chosen.flip(3), chosen), (PADDING,) * 4)
    height, width = images.shape[2:]
    top, left = torch.randint(0, 2 * PADDING + 1, (2, len(index)), device=images.device)
    rows, out = torch.empty_like(padded[:, :, :height]), torch.empty_like(chosen)
    for offset in range(2 * PADDING + 1):
        rows[top == offset] = padded[top == offset, :, offset : offset + height]
    for offset in range(2 * PADDING + 1):
        out[left == offset] = rows[left == offset, :, :, offset : offset + width]
    return scaled(out)


def loop(images, index):  # type: ignore[no-untyped-def]
    height, width = images.shape[2:]
    draws = torch.randint(0, 2 * PADDING + 1, (2, len(index))).tolist()
    flips, crops = (torch.rand(len(index)) < 0.5).tolist(), []
    for row, top, left, flip in zip(index.tolist(), *draws, flips, strict=True):
        crop = F.pad(images[row], (PADDING,) * 4)[:, top : top + height, left : left + width]
        crops.append(crop.flip(2) if flip else crop)
    return scaled(torch.stack(crops))


def resident(size: tuple[int, ...], channels_last: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """A set, and the rows of many batches."""
    pixels = size[1] * size[2] * size[3]
    count = max(2 * size[0], SET_BYTES // pixels)
    images = torch.randint(0, 256, (count, *size[1:]), dtype=torch.uint8, device=DEVICE)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    rows = torch.randperm(count, device=DEVICE)
    return images.contiguous(memory_format=layout), rows[: count // size[0] * size[0]].view(-1, size[0])


def each_batch(form, images, batches) -> Call:  # type: ignore[no-untyped-def]
    upcoming = itertools.cycle(batches.unbind())
    return lambda: form(images, next(upcoming))


def run(report, op, size, forms, *, channels_last=False, **options):  # type: ignore[no-untyped-def]
    """Check ours against the reference, then measure it beside its contenders, eager and (gather) compiled."""
    torch._dynamo.reset()
    images, batches = resident(size, channels_last)
    options = {"key": ak.noise_key(DEVICE), "channels_last": channels_last, **options}
    calls = {"ours": each_batch(lambda images, index: ak.augment(images, index, **options), images, batches)}
    for name, form in forms.items():
        calls[f"plain {name}"] = each_batch(form, images, batches)
    if "gather" in forms:
        calls["compile gather"] = each_batch(torch.compile(forms["gather"], dynamic=False), images, batches)
    with ak.backend("reference"):
        expected = ak.augment(images, batches[0], **options)
    got = ak.augment(images, batches[0], **options)
    bytes_moved = got.numel() * (1 + got.element_size())
    report(measure(op, size, bytes_moved, calls, torch.equal(got, expected), DEVICE), calls["ours"])


def test_augment(size, report):
    run(report, "augment", size, {"gather": gather, "masks": masks, "loop": loop})


def test_augment_channels_last(size, report):
    def gather_last(images, index):  # type: ignore[no-untyped-def]
        return gather(images, index).contiguous(memory_format=torch.channels_last)

    run(report, "augment channels_last", size, {"gather": gather_last}, channels_last=True)


def test_augment_bfloat16(size, report):
    def gather_bfloat16(images, index):  # type: ignore[no-untyped-def]
        return gather(images, index).bfloat16()

    run(report, "augment bf16", size, {"gather": gather_bfloat16}, dtype=torch.bfloat16)


def test_augment_normalised(size, report):
    mean, std = (torch.full((size[1],), v, device=DEVICE) for v in (0.47, 0.25))

    def gather_normalised(images, index):  # type: ignore[no-untyped-def]
        return gather(images, index).sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))

    run(report, "augment normalised", size, {"gather": gather_normalised}, mean=mean, std=std)


def test_gather_only(size, report):
    """As in evaluation: no crop, no flip."""
    forms = {"gather": lambda images, index: scaled(images[index])}
    run(report, "augment padding=0 flip=False", size, forms, padding=0, flip=False)
