"""Where data files lie, whether they are the right ones, and how to get them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

REMEDY = "delete it and load again with --download (download=True), or copy it anew from where you got it"


def default_dir() -> Path:
    """The cache folder: $XDG_CACHE_HOME/atlas_kernels, or ~/.cache/atlas_kernels."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "atlas_kernels"


def roots(data_dir: str | os.PathLike[str] | None) -> list[Path]:
    """The folders that may hold data, in search order: data_dir, $ATLAS_DATA, the cache folder.

    Falling through to the next is safe, since a set counts only when its checksums are right.
    """
    given = [data_dir, os.environ.get("ATLAS_DATA") or None]
    return [Path(p).expanduser() for p in given if p is not None] + [default_dir()]


def find(
    name: str,
    data_dir: str | os.PathLike[str] | None,
    subfolders: Sequence[str],
    missing_in: Callable[[Path], list[str]],
    download: Callable[[Path], None] | None,
) -> Path:
    """The first folder in which `missing_in(folder)` misses no file.

    Looks in every subfolder of every root. With none complete: calls `download(first root)` and returns its first
    subfolder, or, if `download` is None, raises FileNotFoundError that says where it looked and how to get the files.
    """
    looked = []
    for folder in (root / sub for root in roots(data_dir) for sub in subfolders):
        missing = missing_in(folder)
        if not missing:
            return folder
        what = "not there" if not folder.is_dir() else f"lacks {', '.join(missing)}"
        looked.append(f"  {folder}: {what}")
    if download is None:
        raise FileNotFoundError(
            f"no {name} files; looked in\n" + "\n".join(looked) + "\nGet them with --download (download=True), or "
            "point --data-dir (data_dir) or the environment variable ATLAS_DATA at a folder that has them."
        )
    folder = roots(data_dir)[0] / subfolders[0]
    download(folder)
    return folder


def read_checked(path: Path, md5: str | None) -> bytes:
    """The bytes of a file. Raises ValueError when their md5 is not `md5` (None: any)."""
    data = path.read_bytes()
    if md5 is not None:
        check_md5(data, md5, path)
    return data


def check_md5(data: bytes, md5: str, path: Path) -> None:
    """Raises ValueError, naming `path`, when the md5 of `data` is not `md5`."""
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(f"{path} ({len(data)} bytes) is damaged: md5 found {found}, expected {md5}; {REMEDY}")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes under a temporary name, then renames, so that a file under its own name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def fetch(urls: Sequence[str], md5: str, path: Path) -> None:
    """Downloads a file from the first of `urls` that answers with the right bytes. Raises OSError if none does."""
    try:
        import pooch  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise ImportError("downloading data needs pooch: pip install 'atlas-kernels[train]'") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot download into {path.parent} ({error}); give a writable --data-dir (data_dir)") from error
    failures = []
    for url in urls:
        try:
            # pooch checks the md5 of a temporary file and renames it only then
            pooch.retrieve(url, known_hash=f"md5:{md5}", fname=path.name, path=path.parent)
            return
        except (OSError, ValueError) as error:  # no connection; wrong bytes
            failures.append(f"  {url}: {error}")
    tried = "\n".join(failures)
    raise OSError(f"could not download {path.name}:\n{tried}\nTry again later, or put the files in {path.parent}.")


def absent(folder: Path, alternatives: Mapping[str, Sequence[str]]) -> list[str]:
    """The keys for which `folder` holds none of the alternative file names."""
    return [name for name, names in alternatives.items() if not any((folder / n).is_file() for n in names)]
