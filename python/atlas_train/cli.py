"""The command line: ``atlas train``, ``atlas evaluate``, ``atlas methods``.

The flags are made from the declarations in ``TrainConfig`` and in the method, so a new setting or hyper-parameter is a
flag, checked and documented, without a line here.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import os
import re
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

import atlas_kernels
from atlas_kernels.attacks import LostProcesses

from . import commands, data, flags, methods, processes, protocols
from .config import (
    AUTOATTACK_VERSION,
    RETIRED,
    SECTIONS,
    TrainConfig,
    added,
    from_dict,
    from_file,
    without_retired,
)
from .imported import is_import_path, require_trusted, without_place
from .interrupts import Terminated, terminable
from .machine import MOST_THREADS, usable_device
from .options import Norm, allowed, fraction, hints, nearest, one_line, option, plain, shown
from .robustness import written
from .robustness.named import ABOUT, CLEAN, PARTS, named
from .robustness.named import AUTOATTACK as WHOLE
from .writing import require_writable, write_json, write_text

USAGE = """\
usage: atlas train [--method NAME] [--dataset NAME] [flags]     train, evaluate, and print a table
       atlas evaluate RUN [flags]                               accuracy of a trained network, clean and under attacks
       atlas compare RUN ... [--table FORM]                     one table of any runs, from what is stored
       atlas report RUN ... [flags]                             one HTML page of runs: curves, figures, adversaries
       atlas export RUN [--out DIR]                             a network as a folder for others, with a model card
       atlas push DIR ORG/NAME                                  such a folder on the Hugging Face Hub
       atlas methods                                            the methods and their hyper-parameters

`atlas train` alone trains ATLAS on scikit-learn's digits, beside standard training and one-step ADV, in about a minute.
`atlas COMMAND --help` lists the flags; `atlas train --method NAME --help` also those of the method.
An error is one line; with ATLAS_DEBUG=1 in the environment its traceback comes before it. A flag that is not known, or
has a value that it cannot have, is explained in a box.
"""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """The flags of ``atlas evaluate``."""

    attacks: tuple[str, ...] | None = option(None, f"by name: {ABOUT}. Default: clean, FGSM and PGD with --steps")
    model: str | None = option(
        None, "network, by name or import path; a state dict needs it; default: the run's, if it is one of ours"
    )
    width: int | None = option(None, "of a state dict's network, if it is one of ours; default: its own", low=1)
    activation: Literal["relu", "silu", "gelu"] = option("relu", "the same")
    mean: tuple[float, ...] | None = option(
        None,
        "mean by which images are normalised before a state dict's or a factory's network, a number for each channel; "
        "none, and std too: images go in as they are. Default: the file's own, or the network normalises itself",
    )
    std: tuple[float, ...] | None = option(None, "standard deviation, beside mean; default: the same", above=0)
    trust: bool = option(False, "the network's code that the folder, or hf:org/name, names may be run")
    dataset: str | None = option(None, "data set, by name or import path; default: the run's, if it is one of ours")
    data_dir: str | None = option(None, "folder with the data's files; default: $ATLAS_DATA, then the cache folder")
    download: bool = option(False, "download the data if they are found nowhere")
    image_size: int | None = option(
        None, "of the pictures of dataset folder, as for training; default: the run's", low=1
    )
    grey: bool = option(False, "the same")
    skip_unreadable: bool = option(False, "the same")
    stream: bool = option(None, "the same; default: those of the run, or where they take more than 2 GB")
    other_data: bool = option(False, "the data of your own may be others than the run's")
    eps: tuple[float, ...] | None = option(
        None,
        "radius of the ball, e.g. 8/255, or several; default: the run's, or of the data set in another norm",
        above=0,
        below=1,
        of_linf=True,
        hint="write 8/255 instead of 8",
    )
    norm: Norm | None = option(None, "of the ball; default: the run's")
    size: int | None = option(None, "test images; default: the run's, which is 1000 on a CPU, else all", low=1)
    batch_size: int = option(250, "images at a time", low=1)
    steps: int = option(20, "PGD steps, where no attacks are named", low=1)
    step_size: float | None = option(None, "PGD step; default: 2.5 eps / steps", above=0)
    restarts: int = option(1, "PGD restarts, where no attacks are named", low=1)
    autoattack: int = option(
        0,
        "where no attacks are named: AutoAttack too, on so many of the images; 0: none. Beside --attacks, name "
        "autoattack there: it has the images of --size",
        low=0,
    )
    autoattack_version: Literal["standard", "apgd", "plus", "rand"] = option("standard", AUTOATTACK_VERSION)
    search_precision: Literal["fp32", "bf16"] = option(
        "fp32", "of the network while AutoAttack searches; what it finds counts only if the network in fp32 says so too"
    )
    state: str | None = option(
        None,
        "file that is written while AutoAttack (or a part of it) runs, and from which the same command goes on after a "
        "stop; of another network, data or settings: refused",
    )
    seed: int = option(0, "of the noise", low=0)
    device: str | None = option(None, "cpu, cuda, ...; default: cuda where there is one")
    threads: int | None = option(None, "CPU threads; default: the run's", low=1, high=MOST_THREADS)
    json: str | None = option(
        None, "also write the result to this file; with --attacks in the form of RobustBench's records, and more"
    )
    table: Literal["text", "markdown", "latex"] = option("text", "form of the table of --attacks")
    per_class: bool = option(False, "also a table of the accuracies of each class")
    per_sample: str | None = option(None, "also write which image is right under which attack to this CSV file")
    curve: str | None = option(
        None, "also draw accuracy over eps into this file, a .png, .pdf or .svg; needs matplotlib"
    )
    export_state_dict: str | None = option(
        None, "also write the weights to this file, as RobustBench's loader reads them (mean and std as mu and sigma)"
    )


#: The commands whose work several processes share.
_DEALT = ("train", "evaluate")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status. What a user can put right is one line on stderr, without a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # what its encoding has no sign for: a run is not lost for that
        sys.stdout.reconfigure(errors="backslashreplace")
    known = {"train": train, "evaluate": evaluate, "methods": list_methods}
    known |= {name: getattr(commands, name) for name in ("compare", "report", "export", "push")}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    name, *rest = arguments
    if name not in known:
        return _complain(f"atlas: no command {shown(name)}; the nearest is {nearest(name, known)!r}\n\n{USAGE}")
    try:
        with terminable(), warnings.catch_warnings(), processes.joined() if name in _DEALT else nullcontext():
            warnings.showwarning = _warn
            return known[name](rest)
    except BrokenPipeError:  # `atlas methods | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _complain("\natlas: stopped", 130, processes.is_first())
    except Terminated as stop:
        return _complain("\natlas: told to end", int(str(stop.code)), processes.is_first())
    except processes.LostProcess as error:
        return _complain(f"atlas: {error}", said=processes.is_first() or processes.last_word(str(error)))
    except Exception as error:
        if os.environ.get("ATLAS_DEBUG"):
            traceback.print_exception(error)
        rank, text = processes.place()[0], _explained(error)
        return _complain(_prefixed(f"process {rank}: " * bool(rank) + text), said=processes.last_word(text))


def _complain(text: str, status: int = 2, said: bool = True) -> int:
    """``text`` on stderr, where a name with escapes in it cannot move the cursor, unless another process says it."""
    if not said:
        return status
    print("".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text), file=sys.stderr)
    return status


def _prefixed(message: str) -> str:
    """The message with "atlas: " before it, unless it begins so: a method has the name of the program."""
    return f"atlas: {message.removeprefix('atlas: ')}"


def _warn(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """A warning in one line; where it comes from, unless from us."""
    ours = Path(filename).parent == Path(__file__).parent
    text = _prefixed(str(message)) if ours else f"{plain(filename)}:{lineno}: {category.__name__}: {message}"
    _complain(text, said=processes.is_first())


def _explained(error: Exception) -> str:
    """What went wrong, in one line; only our lists of places that were looked at take more.

    Our own errors say it all. Others say of what type they are and, where it was not our code, which line raised them.
    """
    where = _foreign_line(error)
    if isinstance(error, (ValueError, OSError, ImportError, RuntimeError)) and not where and str(error):
        return str(error) if isinstance(error, OSError) else " ".join(str(error).split())
    return f"{one_line(error)}{where and f' ({where})'}; ATLAS_DEBUG=1 shows the traceback"


def _foreign_line(error: Exception) -> str:
    """The file and line of a network's own code that raised the error, or nothing: those of torch and Python count as
    their caller's."""
    installed, python = str(Path(torch.__file__).parent), str(Path(os.__file__).parent)
    own = tuple(str(Path(module.__file__ or "").parent) for module in (atlas_kernels, sys.modules[__package__]))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        of_python = frame.filename.startswith(python) and "-packages" not in frame.filename
        if not (of_python or frame.filename.startswith((installed, "<"))):
            return "" if frame.filename.startswith(own) else f"{plain(frame.filename)}:{frame.lineno} in {frame.name}"
    return ""


def train(argv: Sequence[str]) -> int:
    """``atlas train``: the settings from --config or --resume, then the flags over them."""
    from .compare import compare, is_comparison, settings_of
    from .seeds import compare_seeds

    names = ("config", "resume", "method", "dataset", "model", "protocol")  # on which the defaults of the others depend
    first = flags.parse([flags.text_flag(name, "") for name in names], "train", "", argv, all_known=False)
    if first.config and first.resume:
        raise ValueError("give --config or --resume, not both: a resumed run has its settings already")
    chosen = {"protocol": first.protocol} if first.protocol not in (None, flags.AUTO) else {}
    base, kept = TrainConfig(**chosen), None
    if first.config:
        base = from_file(first.config, lambda values, source: from_dict({**values, **chosen}, source))
    elif first.resume:
        base = settings_of(first.resume)
        kept = base.beside if is_comparison(first.resume) else None
        if not first.dataset:
            require_trusted("dataset", base.dataset, first.resume)
        if not first.model:
            require_trusted("model", base.model, first.resume)
    name = methods.get(first.method or base.method).name
    base = dataclasses.replace(base, **protocols.beside(base.protocol, vars(base), name))
    config, command = parse_train(name, base, argv, kept), ("atlas", "train", *argv)
    if config.seeds:
        compare_seeds(config, command=command)
    else:
        compare(config, command=command)
    return 0


def parse_train(name: str, base: TrainConfig, argv: Sequence[str], kept: tuple[str, ...] | None = None) -> TrainConfig:
    """The configuration that the flags make of ``base``, with the hyper-parameters of the method ``name``.

    kept: methods of a comparison that goes on, to which --beside adds.
    """
    method, own, argv = methods.get(name), base.hyper_of(name), _without_retired(argv)
    known = methods.hyper_parameters(method)
    what = f"The hyper-parameters of {name} come last." if known else f"{name} has no hyper-parameters."
    text = f"Train an image classifier, evaluate it, and print a table. {what}"
    sections = [*_sections(base), (name, f"hyper-parameters of {name}", flags.declared(method, own, group=name))]
    parsed = flags.parse_sections(sections, "train", text, argv)
    settings = {f.name: getattr(parsed, f.name) for f in dataclasses.fields(TrainConfig) if f.name != "hyper"}
    if kept:
        settings["beside"] = added(kept, settings["beside"], name)
    chosen = {key: getattr(parsed, key) for key in known if key in own or flags.is_given(key, argv)}
    given = {key: value for key, value in chosen.items() if value is not None}  # auto: as if it were not given
    beside = {key: value for key, value in base.hyper.items() if "." in key and not key.startswith(f"{name}.")}
    return TrainConfig(**settings, hyper=beside | given)


def _sections(base: TrainConfig) -> list[flags.Section]:
    """The flags of all settings, in the sections of the help."""
    settings = flags.declared(TrainConfig, vars(base))
    settings += [flags.text_flag("config", "JSON file with settings, by the names of the flags; flags override it")]
    names = [flag[0] for flag in settings]
    firsts = [names.index(first) for _, first in SECTIONS.values()]
    ends = zip(firsts, [*firsts[1:], len(names)], strict=True)
    return [(name, about, settings[i:j]) for (name, (about, _)), (i, j) in zip(SECTIONS.items(), ends, strict=True)]


def _without_retired(argv: Sequence[str]) -> list[str]:
    """The words without the flags of retired settings and what follows these."""
    kept: list[str] = []
    retired = False
    for word in argv:
        if word.startswith("--") or word == "-h":
            name = word.partition("=")[0].strip("-").replace("-", "_").removeprefix("no_")
            retired = name in RETIRED
            without_retired({name: None})
        if not retired:
            kept.append(word)
    return kept


def evaluate(argv: Sequence[str]) -> int:
    """``atlas evaluate``: the accuracies of a run's network on its test images, or a report on any network."""
    wanted = [
        flags.text_flag(
            "checkpoint", "run or exported folder, hf:org/name, last.pt; state dict; or package.module:factory",
            positional=True,
        ),
        *flags.declared(EvaluateConfig, {}),
    ]  # fmt: skip
    args = flags.parse(wanted, "evaluate", "Accuracy of a trained network, clean and under attacks.", argv)
    for name in ("json", *_REPORTED):
        if isinstance(path := getattr(args, name), str) and name != "table":
            require_writable(Path(path), f"--{name.replace('_', '-')}")
    _require_used(args, argv)
    if args.trust and not args.model:
        from .sharing import trusted

        folder, args.model = trusted(args.checkpoint)
        args.checkpoint = str(folder)
    with _told_how_to_go_on(args), _in_words_of_flags():
        device = str(processes.own_device(usable_device(args.device)))
        say = print if processes.is_first() else processes.unsaid
        place = {"device": device, "threads": args.threads, "say": say}
        if processes.count() > 1 and not args.threads:
            place["threads"] = torch.get_num_threads()  # the run's are those of one process
        lines = (_report if _is_report(args, argv) else _accuracies)(args, place)
        say("\n".join(["", *lines]))
    return 0


def _accuracies(args: Any, place: dict[str, Any]) -> list[str]:
    """Clean, FGSM and PGD accuracy of a run, and AutoAttack's of --autoattack; what to say at the end."""
    from .results import table
    from .stored import evaluate_checkpoint

    own = {"json", "trust", "attacks", "width", "activation", "mean", "std", "eps", *data.READING, *_REPORTED}
    asked = {f.name: getattr(args, f.name) for f in dataclasses.fields(EvaluateConfig) if f.name not in own} | place
    eps = args.eps[0] if args.eps else None
    results = evaluate_checkpoint(args.checkpoint, eps=eps, reading=_reading(args), **asked, dealt=True)
    if not processes.is_first():
        return []
    print(table(results))
    (result,) = results.values()
    found = result.to_dict() | {"checkpoint": without_place(args.checkpoint)}
    lines = written.write([(args.json, "the figures", lambda path: write_json(path, found))])
    return lines + written.next_steps(lines, bool(args.autoattack), args.state)


#: Flags that only a report knows.
_REPORTED = ("table", "per_class", "per_sample", "curve", "export_state_dict")


def _is_report(args: Any, argv: Sequence[str]) -> bool:
    """Whether a report is asked for: attacks by name, several radii, what only a report has, or no run."""
    from . import checkpoint

    several = len(args.eps or ()) > 1
    path = Path(args.checkpoint)
    foreign = path.is_file() and not checkpoint.is_own(path) or (is_import_path(args.checkpoint) and not path.exists())
    return bool(args.attacks) or several or foreign or any(flags.is_given(name, argv) for name in _REPORTED)


def _require_used(args: Any, argv: Sequence[str]) -> None:
    """Raises ValueError for a flag that nothing in this evaluation looks at."""
    attacks = named(args.attacks) if args.attacks else ()
    whole = any(attack.name == WHOLE for attack in attacks) or (not attacks and bool(args.autoattack))
    searched = whole or any(attack.searches for attack in attacks)
    drawn = not attacks or any(attack.name != CLEAN for attack in attacks)
    stepped = not attacks or any(attack.name.startswith(("pgd", "cw")) for attack in attacks)
    part = f"{WHOLE}, apgd, {', '.join(PARTS)}"
    looked_at = {
        "state": (searched, part), "search_precision": (searched, part), "autoattack_version": (whole, WHOLE),
        "step_size": (stepped, "pgd-20, cw-20"), "curve": (drawn, "attacks"),
    }  # fmt: skip
    for name, (used, by) in looked_at.items():
        if not used and flags.is_given(name, argv):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} is looked at by {by} alone, and none of them is run: add one to --attacks, or leave {flag} out"
            )
    told = ("steps", "restarts", "autoattack") if attacks else ()
    if given := [name for name in told if flags.is_given(name, argv)]:
        raise ValueError(
            f"--{given[0]} is for evaluations without --attacks, whose names say it: pgd-50-10 is 50 steps and 10 "
            "restarts, and autoattack has the images of --size. Write --attacks fgsm pgd-20 autoattack --size 1000, say"
        )


def _reading(args: Any) -> dict[str, Any]:
    return {name: getattr(args, name) for name in data.READING}


@contextmanager
def _told_how_to_go_on(args: Any) -> Iterator[None]:
    """After a stop that is no fault of the evaluation."""
    try:
        yield
    except (KeyboardInterrupt, Terminated, LostProcesses):
        searched = bool(args.autoattack) or any(attack.searches for attack in named(args.attacks or WHOLE))
        if processes.is_first() and (how := written.how_to_go_on(args.state, searched)):
            _complain(f"\n{how}")
        raise


@contextmanager
def _in_words_of_flags() -> Iterator[None]:
    """An error about ``state_path`` is one about --state."""
    try:
        yield
    except (ValueError, OSError, LostProcesses) as error:
        error.args = tuple(
            re.sub(r"\bstate_path (?=\S)", "--state ", said) if isinstance(said, str) else said for said in error.args
        )
        raise


def _report(args: Any, place: dict[str, Any]) -> list[str]:
    """The report of ``--attacks``, and the files that were asked for; what to say at the end."""
    from .report import picture_form, require_matplotlib, write_robustness
    from .robustness.export import export_state_dict
    from .targets import evaluate_target

    attacks = args.attacks
    if args.autoattack:
        raise ValueError(
            "--autoattack is for evaluations without a report, and this is one (of several eps, of a state dict or a "
            "factory, or with files of its own): write --attacks fgsm pgd-20 autoattack --size "
            f"{args.autoattack} instead"
        )
    if not attacks:
        restarts = f"-{args.restarts}" if args.restarts > 1 else ""
        attacks = (CLEAN, "fgsm", f"pgd-{args.steps}{restarts}")
    if args.curve:
        require_matplotlib()
        picture_form(Path(args.curve))
    asked = ("batch_size", "step_size", "seed", "autoattack_version", "search_precision", "state")
    how = {name: getattr(args, name) for name in asked} | {"dealt": True}
    names = ("model", "width", "activation", "mean", "std", "dataset", "data_dir", "download", "other_data")
    where = {name: getattr(args, name) for name in names} | {"reading": _reading(args)}
    report, found = evaluate_target(
        args.checkpoint, attacks, eps=args.eps or (), norm=args.norm, size=args.size, how=how, **where, **place
    )
    if not processes.is_first():
        return []
    print(report.table(args.table))
    if args.per_class:
        print(f"\n{report.class_table(args.table)}")
    lines = written.write(
        [
            (args.json, "the record and all figures", lambda path: write_json(path, report.to_dict())),
            (args.per_sample, "right or wrong, image by image", lambda path: write_text(path, report.samples_csv())),
            (args.curve, "accuracy over eps", lambda path: write_robustness(path, report.curves(), report.norm)),
            (args.export_state_dict, "the weights, as RobustBench's loader reads them",
             lambda path: export_state_dict(found.network, path, found.mean, found.std)),
        ]
    )  # fmt: skip
    return lines + written.next_steps(lines, WHOLE in attacks, args.state)


def list_methods(argv: Sequence[str]) -> int:
    """``atlas methods``: what each one is, and its hyper-parameters with defaults and ranges."""
    if argv and argv[0] not in ("-h", "--help"):
        return _complain("atlas methods: takes no arguments")
    for name in methods.names():
        method = methods.get(name)
        print(f"{name}: {inspect.getdoc(method)}\n")
        for key, field in methods.hyper_parameters(method).items():
            default, range_ = default_text(field.default), allowed(field, hints(method)[key])
            print(f"    --{key.replace('_', '-')} {default}   ({range_})")
            print(textwrap.fill(field.metadata["help"], 110, initial_indent=" " * 8, subsequent_indent=" " * 8))
        for where, values in defaults_by_data_set(name):
            print(f"    on {where}: {values}")
        print()
    return 0


def defaults_by_data_set(name: str) -> list[tuple[str, str]]:
    """The data sets on which a method has other defaults, and these; not those that are like another (`Dataset.like`)
    and have the same."""
    told = []
    for dataset in map(data.get, data.names()):
        values = methods.defaults_on(dataset, name)
        if values and not (dataset.like and values == methods.defaults_on(data.get(dataset.like), name)):
            told.append((dataset.name, ", ".join(f"{key} {default_text(value)}" for key, value in values.items())))
    return told


def default_text(value: Any) -> str:
    if isinstance(value, data.OfEps):
        return f"{float(value):.4g} eps"
    if isinstance(value, data.UpTo):
        small, large = value.numbers
        return f"{small:g} (above eps {fraction(value.eps)}: {large:g})"
    return "auto" if value is None else str(value).lower()
