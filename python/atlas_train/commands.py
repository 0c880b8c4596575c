"""The commands on runs that are done: ``atlas compare``."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence

from . import flags
from .options import option, plain
from .tables import Form


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
