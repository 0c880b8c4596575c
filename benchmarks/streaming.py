"""Pictures that stream: `python benchmarks/streaming.py --data-dir DATA` prints how fast, and what training waits for.

A folder of JPEGs of 64x64, made of CIFAR-10's training images, is decoded by 0, 1 and 2 workers: pictures a second by
the clock, and milliseconds of a CPU core for each picture, of all processes together, which other programs on the
machine hardly change. Then PreActResNet-18 of width 16 is trained on it with one thread and one worker: "data wait" is
the share of the time in which the loop has no batch, as log.csv has it.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import tables
from atlas_train import data, engine
from atlas_train.config import TrainConfig
from atlas_train.data import Pictures, Streamed, folder
from harness import environment

SIDE, QUALITY, BATCH, WIDTH = 64, 90, 128, 16
#: Methods whose wait is measured: the cheapest step that there is, and a usual one.
METHODS = ("standard", "one_step_adv")


def make(root: Path, data_dir: str | None, pictures: int) -> None:
    """The folder: so many training pictures, and a tenth as many for the test."""
    splits = data.load("cifar10", data_dir)
    for name, images, count in (("train", splits.train, pictures), ("test", splits.test, pictures // 10)):
        for number, (pixels, label) in enumerate(zip(images.first(count), images.labels, strict=False)):
            path = root / name / str(int(label)) / f"{number:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
            picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR).save(path, quality=QUALITY)


def rate(pictures: Pictures, crop: str, workers: int, batches: int) -> tuple[float, float]:
    """Pictures a second, and milliseconds of a core for each."""
    loader = Streamed(pictures, BATCH, crop=crop, workers=workers, shuffle=True, seed=0, device="cpu", augment=True)  # type: ignore[arg-type]
    found = iter(loader)
    ready = 2 * workers  # when the clock starts, and when it stops
    for _ in range(ready + 1):
        next(found)
    own, others, clock = time.process_time(), _of_children(), time.perf_counter()
    for _ in range(batches):
        next(found)
    seconds = time.perf_counter() - clock
    own = time.process_time() - own
    found.close()  # type: ignore[attr-defined]
    loader.close()
    core = own / batches + (_of_children() - others) / (ready + 1 + batches + ready)
    return batches * BATCH / seconds, 1000 * core / BATCH


def _of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def waits(root: Path, method: str, batches: int) -> tuple[float, float]:
    """The share of a training that waits for data, and its pictures a second."""
    config = TrainConfig(
        method, dataset="folder", data_dir=str(root), stream=True, workers=1, train_size=batches * BATCH, epochs=1,
        batch_size=BATCH, width=WIDTH, val_size=0, probe_size=0, threads=1, device="cpu", beside=(),
    )  # fmt: skip
    (row,) = engine.train(config).history
    return row["data_wait"], row["images_per_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="where CIFAR-10 is")
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--batches", type=int, default=40, help=f"of {BATCH} pictures, for each number")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="write the numbers to FILE (JSON), and the table beside it"
    )
    o = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder_:
        root = Path(folder_)
        make(root, o.data_dir, o.pictures)
        pictures = folder.find(root).train
        rates = {
            (crop, workers): rate(pictures, crop, workers, o.batches)
            for crop in ("shift", "resized")
            for workers in (0, 1, 2)
        }
        waited = {method: waits(root, method, o.batches) for method in METHODS}
    loading = [["crop", "workers", "pictures/s", "CPU ms a picture"]]
    loading += [[crop, str(n), f"{fast:,.0f}", f"{cpu:.2f}"] for (crop, n), (fast, cpu) in rates.items()]
    training = [["method", "data wait", "pictures/s"]]
    training += [[method, f"{100 * wait:.1f} %", f"{fast:,.0f}"] for method, (wait, fast) in waited.items()]
    title = f"{o.pictures:,} JPEGs of {SIDE}x{SIDE}, batches of {BATCH}"
    print(title, *(f"  {name}: {value}" for name, value in environment().items()), sep="\n")
    print(
        "",
        tables.aligned(loading),
        "",
        f"PreActResNet-18, width {WIDTH}, one thread and one worker",
        tables.aligned(training),
        sep="\n",
    )
    if o.results:
        values = {"rates": [[*key, *value] for key, value in rates.items()], "waits": waited}
        command = tables.command_line(__file__, sys.argv[1:])
        tables.write(o.results, title, command, values, [tables.markdown(loading), tables.markdown(training)])


if __name__ == "__main__":
    main()
