"""The commands on runs that are done: ``atlas compare``, ``report``, ``export``, ``push``."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from . import flags
from .machine import MOST_THREADS
from .options import option, plain
from .tables import Form
from .writing import write_bytes, write_text


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """The flags of ``atlas compare``."""

    table: Form = option("text", "form of the table")


def compare(argv: Sequence[str]) -> int:
    """``atlas compare``: one table of any runs, from what is stored; 1 where something had to be left out."""
    from .comparison import compared

    what = "folders of runs, or folders above them; files of `atlas evaluate --json`"
    wanted = [flags.texts_flag("runs", what), *flags.declared(CompareConfig, {})]
    args = flags.parse(wanted, "compare", "One table of any runs, from what is stored in their folders.", argv)
    found = compared(args.runs)
    print(found.table(args.table))
    folders = [str(record.path) for record in found.records.values() if record.path.is_dir()]
    if folders and args.table == "text":
        print(f"\nas a page with curves and images: atlas report {plain(shlex.join(folders))}")
    return 1 if found.left_out else 0


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """The flags of ``atlas report``."""

    out: str | None = option(None, "file of the page; default: report.html, in the run's folder if it is one run")
    pngs: str | None = option(None, "also write the plots as PNG files into this folder")
    images: int = option(
        200, "test images on which is measured what no folder holds: accuracy over eps, and by class; 0: none", low=0
    )
    gallery: int = option(6, "adversaries of each run that are shown; 0: none", low=0, high=100)
    seed: int = option(0, "of the draw of these images, and of the noise", low=0)
    model: str | None = option(None, "network of your own, by import path; default: the run's, if it is one of ours")
    dataset: str | None = option(None, "data of your own, by import path; default: the run's, if they are ours")
    data_dir: str | None = option(None, "folder with the data's files; default: $ATLAS_DATA, then the cache folder")
    download: bool = option(False, "download the data if they are found nowhere")
    device: str | None = option(None, "cpu, cuda, ...; default: cuda where there is one")
    threads: int | None = option(None, "CPU threads; default: the run's", low=1, high=MOST_THREADS)


def report(argv: Sequence[str]) -> int:
    """``atlas report``: a page of runs; 1 where something had to be left out."""
    from .page.build import page_of

    what = "folders of runs, or folders above them"
    wanted = [flags.texts_flag("runs", what), *flags.declared(ReportConfig, {})]
    about = "One HTML page of runs: curves, robust accuracy, adversaries, settings. It needs no other file."
    args = flags.parse(wanted, "report", about, argv)
    out = Path(args.out or _place(args.runs) / "report.html")
    if out.is_dir():
        raise IsADirectoryError(f"--out {plain(out)} is a folder: name a file")
    names = ("images", "gallery", "seed", "model", "dataset", "data_dir", "download", "device", "threads")
    page = page_of(args.runs, **{name: getattr(args, name) for name in names})
    write_text(out, page.html)
    for name, picture in page.pictures.items() if args.pngs else ():
        write_bytes(Path(args.pngs) / f"{name}.png", picture)
    for reason in page.left_out:
        print(f"! left out: {reason}")
    print(f"\n{plain(out)}: {out.stat().st_size / 1e6:.1f} MB, all in one file: open it in a browser, or send it")
    return 1 if page.left_out else 0


def _place(runs: Sequence[str]) -> Path:
    """Where a page goes that nobody named a file for."""
    return Path(runs[0]) if len(runs) == 1 and Path(runs[0]).is_dir() else Path()


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """The flags of ``atlas export``."""

    out: str | None = option(None, "folder to be made; default: export (export-best) in the run's folder")


def export(argv: Sequence[str]) -> int:
    """``atlas export``: a network as a folder for others."""
    from . import sharing

    what = "run folder (its last epoch), or one of its files: best.pt for its best epoch"
    wanted = [flags.text_flag("run", what, positional=True), *flags.declared(ExportConfig, {})]
    about = "A folder for others: safetensors, config.json, and a model card with the figures that are stored."
    args = flags.parse(wanted, "export", about, argv)
    folder = sharing.export(args.run, args.out)
    for path in sorted(folder.iterdir()):
        print(f"{plain(path)}  ({path.stat().st_size:,} bytes)")
    print(
        f"\nstate the licence in {plain(folder / sharing.CARD)}; then upload it, atlas push {plain(folder)} ORG/NAME, "
        f"or look at it, atlas evaluate {plain(folder)}"
    )
    return 0


@dataclasses.dataclass(frozen=True)
class PushConfig:
    """The flags of ``atlas push``."""

    private: bool = option(False, "a repository that only you see, if it is a new one")
    code: bool = option(False, "upload the .py files of the folder too, for a network of your own")


def push(argv: Sequence[str]) -> int:
    """``atlas push``: an exported folder on the Hugging Face Hub."""
    from . import sharing

    wanted = [
        flags.text_flag("folder", "what `atlas export` made", positional=True),
        flags.text_flag("name", "org/name on the Hub", positional=True),
        *flags.declared(PushConfig, {}),
    ]
    args = flags.parse(wanted, "push", "Uploads an exported network; needs huggingface_hub and its login.", argv)
    address = sharing.push(args.folder, args.name, private=args.private, code=args.code)
    if not sharing.states_licence(args.folder):
        print(f"note: {plain(Path(args.folder) / sharing.CARD)} states no licence (license: at its top)")
    print(f"{plain(address)}: others evaluate it by atlas evaluate hf:{plain(args.name)}")
    return 0
