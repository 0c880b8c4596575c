"""Several processes of one group, forked from the test's."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def in_processes(count: int, folder: Path, body: Callable[[int], None]) -> list[int]:
    """``body(rank)`` in so many processes of one group; their exit codes."""
    meeting, children = folder / "meeting", []
    meeting.unlink(missing_ok=True)
    for rank in range(count):
        child = os.fork()
        if not child:
            code = 1
            try:
                torch.set_num_threads(1)
                how = {"init_method": f"file://{meeting}", "timeout": timedelta(minutes=2)}
                dist.init_process_group("gloo", rank=rank, world_size=count, **how)
                body(rank)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
