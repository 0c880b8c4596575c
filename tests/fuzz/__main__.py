"""Random calls, and which go wrong: in the folder tests, ``python -m fuzz --calls 1000000 --processes 2``.

Each call is a function of ``--seed`` and its number alone; ``--only NUMBER`` makes that one again, in this process.
Calls are made in processes of their own, so that a crash is a finding too, and the rest goes on.
"""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import sys
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fuzz.attacks import attacked
from fuzz.draws import Draw
from fuzz.plays import PLAYS

CHUNK = 2000


def play(seed: int, number: int) -> tuple[str, str | None]:
    """Makes one call: what kind it was, and what is wrong."""
    draw = Draw(f"{seed}/{number}")
    threads = draw.one_of([1, 1, 2])
    torch.set_num_threads(threads)
    chosen = attacked if draw.chance(0.03) else draw.random.choices(list(PLAYS), list(PLAYS.values()))[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return chosen.__name__, chosen(draw)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return chosen.__name__, f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"


def _work(seed: int, numbers: range, at: Any, findings: Any) -> None:
    faulthandler.enable()
    for number in numbers:
        at.value = number
        kind, wrong = play(seed, number)
        if wrong:
            findings.put((number, kind, wrong))
    at.value = numbers.stop
    findings.put(None)


def _chunk(seed: int, numbers: range) -> list[tuple[int, str, str]]:
    """What is wrong with some calls; where the process dies, a new one goes on behind the call that did it."""
    found: list[tuple[int, str, str]] = []
    context = multiprocessing.get_context("fork")
    while len(numbers):
        at, queue = context.Value("q", numbers.start), context.SimpleQueue()
        process = context.Process(target=_work, args=(seed, numbers, at, queue))
        process.start()
        while process.is_alive() or not queue.empty():
            if queue.empty():
                time.sleep(0.01)
            elif (finding := queue.get()) is not None:
                found.append(finding)
        process.join()
        if at.value < numbers.stop:
            found.append((at.value, "crash", f"the process ended with status {process.exitcode}"))
        numbers = range(at.value + 1, numbers.stop)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", type=int, help="make this call alone")
    asked = parser.parse_args()
    if asked.only is not None:
        kind, wrong = play(asked.seed, asked.only)
        print(f"{kind}: {wrong or 'right'}")
        return 1 if wrong else 0
    began = time.perf_counter()
    chunks = [range(i, min(i + CHUNK, asked.calls)) for i in range(0, asked.calls, CHUNK)]
    wrong = 0
    with ThreadPoolExecutor(asked.processes) as pool:
        for found in pool.map(lambda numbers: _chunk(asked.seed, numbers), chunks):
            wrong += len(found)
            for number, kind, what in found:
                print(f"--seed {asked.seed} --only {number}: {kind}: {what}", flush=True)
    print(f"{asked.calls} calls, {wrong} wrong, {time.perf_counter() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
