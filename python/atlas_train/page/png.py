"""Images as PNG files, without a library."""

from __future__ import annotations

import struct
import zlib

import torch
from torch import Tensor

_GREY, _RGB = 0, 2


def png(image: Tensor) -> bytes:
    """A PNG of an image [C, H, W] in [0, 1]: grey, or RGB if it has three channels; of others their mean."""
    pixels = image.detach().cpu().float().clamp(0, 1)
    pixels = pixels if len(pixels) == 3 else pixels.mean(0, keepdim=True)
    rows = (255 * pixels).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    height, width, channels = rows.shape
    data = b"".join(b"\0" + row.numpy().tobytes() for row in rows)  # each row after the number of its filter, none
    head = struct.pack(">IIBBBBB", width, height, 8, _RGB if channels == 3 else _GREY, 0, 0, 0)
    chunks = {b"IHDR": head, b"IDAT": zlib.compress(data, 9), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in chunks.items())


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
