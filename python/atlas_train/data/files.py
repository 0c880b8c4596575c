"""Where data files lie, whether they are the right ones, and how to get them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..options import plain, shown
from ..terminal_line import Line

REMEDY = (
    "get it anew, with --download (download=True) and a folder without it, or, if it is another data set's, point "
    "--data-dir (data_dir) elsewhere"
)
_CHUNK = 2**18  # bytes of a download that are written at a time
#: The md5 of files of other data sets that bear the names of ours.
OTHERS = {
    "MNIST": {
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    },
    "Fashion-MNIST": {
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    },
    "KMNIST": {
        "bdb82020997e1d708af4cf47b453dcf7",
        "e144d726b3acfaa3e44228e80efcd344",
        "5c965bf0a639b31b8f53240b1b52f4d7",
        "7320c461ea6c1c855c0b718fb2a4b134",
    },
}


def default_dir() -> Path:
    """The cache folder: $XDG_CACHE_HOME/atlas_kernels, or ~/.cache/atlas_kernels."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "atlas_kernels"


def roots(data_dir: str | os.PathLike[str] | None) -> list[Path]:
    """The folders that may hold data, in search order: data_dir, $ATLAS_DATA, the cache folder.

    Falling through to the next is safe, since a set counts only when its checksums are right.
    """
    given = {"data_dir": data_dir, "ATLAS_DATA": os.environ.get("ATLAS_DATA") or None}
    folders = []
    for name, path in given.items():
        try:
            folders += [] if path is None else [Path(path).expanduser()]
        except (RuntimeError, TypeError) as error:  # ~somebody
            raise ValueError(f"{name} must name a folder, got {shown(path)} ({error})") from error
    return [*folders, default_dir()]


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
        what = f"lacks {', '.join(missing)}" if os.path.isdir(folder) else "not there"
        looked.append(f"  {plain(folder)}: {what}")
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
    given = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if given != md5:
        name = f"{plain(path)} ({len(data)} bytes)"
        if other := next((other for other, sums in OTHERS.items() if given in sums), None):
            raise ValueError(
                f"{name} belongs to {other}, whose files have the same names: point --data-dir (data_dir) at a folder "
                "of the data set that you asked for"
            )
        raise ValueError(
            f"{name} is damaged, or is no such file but another data set's: md5 found {given}, expected {md5}; {REMEDY}"
        )


def fetch(urls: Sequence[str], md5: str, path: Path) -> None:
    """Downloads a file from the first of `urls` that answers with the right bytes. Raises OSError if none does."""
    try:
        import pooch  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise ImportError("downloading data needs pooch: pip install 'atlas-kernels[train]'") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"cannot download into {plain(path.parent)} ({error}); give a writable --data-dir (data_dir)"
        ) from error
    failures = []
    for url in urls:
        try:
            # pooch checks the md5 of a temporary file and renames it only then
            load = pooch.HTTPDownloader(progressbar=_Progress(path.name), chunk_size=_CHUNK)
            pooch.retrieve(url, known_hash=f"md5:{md5}", fname=path.name, path=path.parent, downloader=load)
            return
        except (OSError, ValueError) as error:  # no connection; wrong bytes
            failures.append(f"  {url}: {error}")
    tried = "\n".join(failures)
    raise OSError(
        f"could not download {path.name}:\n{tried}\nTry again later, or put the files in {plain(path.parent)}."
    )


class _Progress:
    """What pooch tells of a download, for a terminal."""

    total = 0

    def __init__(self, name: str) -> None:
        self._line, self._done = Line(name, 0, " KiB"), 0

    def update(self, size: int) -> None:
        self._done += size
        self._line.total = self.total // 1024
        self._line.show(min(self._done, self.total) // 1024)

    def reset(self) -> None:
        self._done = 0

    def close(self) -> None:
        self._line.end()


def absent(folder: Path, alternatives: Mapping[str, Sequence[str]]) -> list[str]:
    """The keys for which `folder` holds none of the alternative file names."""
    return [name for name, names in alternatives.items() if not any(os.path.isfile(folder / n) for n in names)]
