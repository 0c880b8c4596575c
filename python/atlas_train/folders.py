"""Folders of runs: found or made, kept from a second run, and taken away again where nothing came of them."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

from .options import plain

LOCK = ".lock"
_held = threading.local()


@contextmanager
def made(folder: Path, *, exist_ok: bool = True) -> Iterator[Path]:
    """The folder is there; an exception takes away what was made for it, as far as it is empty then."""
    for path in (folder, *folder.parents) if exist_ok else folder.parents:
        if os.path.lexists(path) and not path.is_dir():
            what = "file" if path.exists() else "link to nothing"
            raise NotADirectoryError(f"{plain(path)} is a {what}, where a folder is needed: choose another folder")
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=exist_ok)
    try:
        yield folder
    except BaseException:
        for path in missing:
            try:
                path.rmdir()
            except OSError:
                break
        raise


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """An error of a folder that is only read says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise PermissionError(
            f"{plain(folder)} cannot be written to ({error.strerror}): choose another folder, or change its permissions"
        ) from error


@contextmanager
def numbered(parent: Path, name: str) -> Iterator[Path]:
    """``made``, of the first ``<name>-<number>`` in ``parent`` that is not there; two runs never get the same."""
    name = re.sub(r"[^\w.-]+", "_", name)
    with ExitStack() as stack:
        for number in count(1):
            try:
                folder = stack.enter_context(made(parent / f"{name}-{number}", exist_ok=False))
            except FileExistsError:
                continue
            break
        yield folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """No other run, of this process or another, is in the folder; the thread that is in it may enter again.

    The lock is the system's (flock), so that a run that was killed leaves none in force. Also removes what a killed run
    has left half written. Raises FileExistsError that names the process which is in the folder.
    """
    held: set[Path] = _held.__dict__.setdefault("folders", set())
    key = folder.resolve()
    if key in held:
        yield
        return
    descriptor = _lock(folder)
    held.add(key)
    try:
        _remove_leftovers(folder)
        yield
    finally:
        held.discard(key)
        (folder / LOCK).unlink(missing_ok=True)  # before the lock goes, so that nobody's is removed but this one
        os.close(descriptor)


def _lock(folder: Path) -> int:
    path = folder / LOCK
    while True:
        with _writable(folder):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = _owner(descriptor)
            os.close(descriptor)
            raise FileExistsError(
                f"another run is writing to {plain(folder)}: {who}. Wait until it ends, or end it, or choose another "
                "folder"
            ) from None
        except OSError as error:
            warnings.warn(
                f"{plain(folder)} lies where files cannot be locked ({error}): see to it that no two runs write there",
                stacklevel=2,
            )
        if os.fstat(descriptor).st_nlink:  # else its owner has just removed it: take the next
            with suppress(OSError):  # a full disk: the lock holds, and only its owner's name is not known
                os.truncate(descriptor, 0)
                os.write(descriptor, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode())
            return descriptor
        os.close(descriptor)


def _owner(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {owner['process']} on {owner['host']}"
    except (ValueError, KeyError, TypeError):
        return "it has not said which it is"


def _remove_leftovers(folder: Path) -> None:
    """The temporary files (``writing.write_atomically``) of processes that are no more."""
    for path in folder.glob(".*.tmp"):
        match = re.fullmatch(r"\..+\.(\d+)\.tmp", path.name)
        if match and not _runs(int(match[1])):
            path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
