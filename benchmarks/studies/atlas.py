"""The study of ATLAS: which instance of it does not collapse, and which is best at equal passes, beside honest rivals.

    python benchmarks/studies/atlas.py list                     the queue, and what of it has a row
    python benchmarks/studies/atlas.py run NAME... --data-dir DATA
    python benchmarks/studies/atlas.py report                   tables and verdicts; fills docs/atlas_study.md
    python benchmarks/studies/atlas.py add DIR...               rows that were made in another folder, by --results
    python benchmarks/studies/atlas.py diagnose NAME --data-dir DATA

A name is BED-EPOCHSe-EPS-RECIPE-sSEED, as in cpu-15e-16of255-start-s0. A run that was stopped or killed goes on with
the same words, and one that has a row is not made again. ``run_queue.py`` beside this runs the next part of the queue.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from studies import diagnosis, plan, report, rows
from studies.work import RESULTS, RUNS, Places, finish, is_done


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("list", "run", "add", "report", "diagnose"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="of run, add and diagnose")
    parser.add_argument("--judge", choices=plan.JUDGES, default="screen", help="default: %(default)s")
    parser.add_argument(
        "--parallel", type=int, default=1, metavar="N", help="how many runs share the machine, for the row of run"
    )
    parser.add_argument("--data-dir", help="folder with the data's files")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="rows and verdicts")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="checkpoints of runs")
    o = parser.parse_args(arguments)
    if (o.command in ("run", "add", "diagnose")) != bool(o.names):
        needed = "a folder" if o.command == "add" else "the name of a run: `list` prints them"
        parser.error(f"{o.command} takes {'no name' if o.names else needed}")
    try:
        planned = [plan.named(name, o.judge) for name in o.names] if o.command != "add" else []
    except ValueError as error:
        parser.error(str(error))
    places = Places(o.results, o.runs, o.data_dir, o.device)
    if o.command == "list":
        for each in plan.queue():
            print(f"{'done ' if is_done(each, o.results) else 'to do'} {each.judge:6} {each.name}")
    elif o.command == "run":
        for each in planned:
            finish(each, places, parallel=o.parallel)
    elif o.command == "add":
        for folder in map(Path, o.names):
            print(f"{folder}: {rows.merge(folder, o.results)} new rows")
    elif o.command == "diagnose":
        for each in planned:
            path = o.results / "diagnosis" / f"{each.name}.csv"
            diagnosis.diagnose(each, places, path)
            print(f"{each.name}: {path}")
    else:
        study = report.Study.read(o.results)
        print("\n\n".join(report.told(study)))
        if o.results == RESULTS:
            report.fill(study)


if __name__ == "__main__":
    main()
