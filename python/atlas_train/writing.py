"""Files that are written whole or not at all, and values in the plain types that they hold."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import stat
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from atlas_kernels.environment import is_stream

from .options import one_line, plain


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """``write`` to a temporary file beside ``path``, then rename it: the file is the old or the new one, whole.

    Its mode is the usual one, whatever ``write`` gives it. A device or a pipe is written into and stays what it is.
    Raises OSError that names the file where the disk is full.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{plain(path)} is a folder, where a file is to be written: name a file")
    if is_stream(path):
        write(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode
        write(temporary)
        os.chmod(temporary, stat.S_IMODE(mode))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        if not _is_full(error):
            raise
        if _is_too_large(error, temporary):
            raise OSError(
                f"{plain(path)} could not be written: it is larger than this process may write (ulimit -f). What lay "
                "there before is as it was. Raise that limit and try again"
            ) from error
        free = shutil.disk_usage(path.parent).free + 512 * temporary.stat().st_blocks  # the half of it will go
        raise OSError(
            f"{plain(path)} could not be written: its disk takes no more ({free / 1e6:,.1f} MB free). What lay there "
            "before is as it was. Make room and try again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _is_full(error: Exception) -> bool:
    """Whether a file could not grow. torch and safetensors say so in words alone."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    codes = [f"os error {code}" for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
    return any(words in str(error) for words in ("inline_container", "iostream error", *codes))


def _is_too_large(error: Exception, path: Path) -> bool:
    """Whether ``path`` came to the process's limit on the size of a file. torch does not say so, the others do."""
    if isinstance(error, OSError) or "os error" in str(error):
        return getattr(error, "errno", None) == errno.EFBIG or f"os error {errno.EFBIG}" in str(error)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return limit != resource.RLIM_INFINITY and path.stat().st_size >= limit


def require_writable(path: Path, name: str) -> None:
    """Raises OSError where a file could not be written there, before the work whose result it is to hold. name: who
    wants it, a flag, say."""
    if path.is_dir():
        raise IsADirectoryError(f"{name} {plain(path)} is a folder: name a file")
    if is_stream(path):
        return
    folder = next(parent for parent in path.absolute().parents if parent.exists())  # the others will be made
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise OSError(
            f"{name} {plain(path)} cannot be written, as no file can be in {plain(folder)} ({reason}): name another"
        ) from error


def write_link(path: Path, source: Path) -> None:
    """``path`` is from now on what ``source`` is now, atomically: a second name of its file, which takes no room, or a
    copy where the disk knows no such names. For a source that is never written into, but replaced as a whole."""

    def write(temporary: Path) -> None:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)

    write_atomically(path, write)


def write_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(builtin(value), indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """UTF-8, with the line ends of ``text``, atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """``data``, atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def builtin(value: Any) -> Any:
    """``value`` in plain types, which are read without running code: NumPy's numbers and kinds of str become such."""
    if isinstance(value, np.generic):
        return value.item()
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, (list, tuple)):
        return (tuple if isinstance(value, tuple) else list)(map(builtin, value))
    if isinstance(value, Mapping) and not isinstance(value, OrderedDict):  # that one is a module's state_dict
        return {builtin(key): builtin(item) for key, item in value.items()}
    return value
