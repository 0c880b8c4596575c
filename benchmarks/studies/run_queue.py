"""Runs the next part of the study's queue in so many seconds, several runs beside each other, most wanted first.

    python benchmarks/studies/run_queue.py SECONDS --data-dir DATA [--parallel 4] [--beds cpu half]

Rows are added as runs end (benchmarks/results/atlas-study/rows.csv). When the time is over, each
run that has not ended stops after its epoch, or after the part of the images that is attacked; the same command
continues it. Their checkpoints lie in
runs/atlas-study: keep that folder. Runs that need a GPU are left out where there is none.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from studies import plan
from studies.plan import BEDS, Planned
from studies.work import RESULTS, RUNS, Places, finish, is_done
from worker import set_up

#: Of the time, what is kept for an epoch or a part of the images that takes longer than was thought; and in seconds.
RESERVE, MOST_RESERVED = 0.1, 30.0
Work = Callable[[Planned, float], object]


def run_all(waiting: Iterable[Planned], work: Work, seconds: float, parallel: int, how: str = "spawn") -> list[str]:
    """Does ``work(planned, until)`` of each in a process of its own, ``parallel`` at a time, in their order, until the
    time is over. What is under way then is told to end by itself, and ended after ``seconds``. Returns what failed."""
    end = time.time() + seconds
    until = end - min(RESERVE * seconds, MOST_RESERVED)
    context: Any = multiprocessing.get_context(how)
    runs, going, failed = iter(waiting), dict[int, tuple[Any, str]](), list[str]()
    try:
        while True:
            while len(going) < parallel and time.time() < until and (planned := next(runs, None)):
                process = context.Process(target=work, args=(planned, until), daemon=True)
                process.start()
                going[process.sentinel] = process, planned.name
            if not going:
                return failed
            ended = connection.wait(list(going), timeout=max(0.0, end - time.time()))
            if not ended:
                for _, name in going.values():
                    print(f"{name}: ended with the time; it goes on after its last whole epoch", flush=True)
                return failed
            for sentinel in ended:
                process, name = going.pop(sentinel)  # type: ignore[index]
                process.join()
                if process.exitcode:
                    failed.append(f"{name} ended with status {process.exitcode}")
    finally:
        for process, _ in going.values():
            process.terminate()
        for process, _ in going.values():
            process.join(10)
            process.kill()


class Worker:
    """What a process does: one run, to its row or as far as the time goes."""

    def __init__(self, places: Places, parallel: int, threads: int) -> None:
        self.places, self.parallel, self.threads = places, parallel, threads

    def __call__(self, planned: Planned, until: float) -> None:
        set_up(self.threads)
        finish(planned, self.places, until, self.parallel, lambda text: print(text, flush=True))


def next_runs(planned: Iterable[Planned], places: Places, beds: Sequence[str], gpu: bool) -> Iterable[Planned]:
    """The runs in turn that have no row by then, of the beds and of what the machine can do."""
    for each in planned:
        if each.bed in beds and (gpu or not BEDS[each.bed].needs_gpu) and not is_done(each, places.results):
            yield each


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The next part of the study's queue, in so many seconds.")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--parallel", type=int, default=1, help="runs beside each other; default: %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads of a run; default: an equal share")
    parser.add_argument("--data-dir", help="folder with the data's files")
    parser.add_argument("--beds", nargs="+", choices=BEDS, default=list(BEDS), help="these alone")
    parser.add_argument("--queue", type=Path, default=plan.QUEUE, metavar="FILE.json")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="rows and verdicts")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="checkpoints of runs under way")
    parser.add_argument("--device", help="default: cuda where there is one")
    o = parser.parse_args(arguments)
    if o.seconds <= 0 or o.parallel < 1:
        parser.error(f"seconds must be above 0 and --parallel at least 1, got {o.seconds:g} and {o.parallel}")
    gpu = torch.cuda.is_available() if o.device is None else o.device.startswith("cuda")
    places = Places(o.results, o.runs, o.data_dir, o.device)
    threads = o.threads or max(1, (os.cpu_count() or 1) // o.parallel)
    waiting = next_runs(plan.queue(o.queue), places, o.beds, gpu)
    failed = run_all(waiting, Worker(places, o.parallel, threads), o.seconds, o.parallel)
    left = list(next_runs(plan.queue(o.queue), places, o.beds, gpu))
    print(f"{len(left)} runs of the queue have no row yet" + (f"; next: {left[0].name}" if left else ""))
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
