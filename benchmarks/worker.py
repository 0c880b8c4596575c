"""What a process that trains for a study does first, and what it loads once."""

from __future__ import annotations

import multiprocessing
import os
from functools import cache
from threading import Thread

import torch

from atlas_train import data
from atlas_train.results import commit


def set_up(threads: int) -> None:
    """What a process does first. It ends with its parent, should that be killed."""
    torch.set_num_threads(threads)
    commit_here()
    if parent := multiprocessing.parent_process():
        Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@cache
def commit_here() -> str | None:
    """The commit of the code that this process runs: the one that was checked out when it began."""
    return commit()


@cache
def splits_of(dataset: str, data_dir: str | None) -> data.DataSplits:
    return data.load(dataset, data_dir)
