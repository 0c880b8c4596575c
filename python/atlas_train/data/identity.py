"""Which images a run is made on: a record for checkpoints and results, and what does not fit it is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from ..imported import is_import_path, require_trusted, without_place
from ..options import plain
from .dataset import DataSplits
from .images import Images
from .pictures import Pictures

SPLITS = ("train", "test", "extra")  # the last where there is one
_CHUNK = 2**24  # bytes that are hashed at a time, so that a set on a GPU or in another layout is never copied whole


def record(splits: DataSplits, parts: Sequence[str] = SPLITS) -> dict[str, Any]:
    """Name, loader, number of classes and, of each part, number, shape and fingerprint. It reads every byte once."""
    loader = splits.loader and without_place(splits.loader)
    own = {"name": splits.name, "loader": loader, "num_classes": splits.num_classes}
    return own | {part: facts(images) for part in parts if (images := getattr(splits, part)) is not None}


def facts(images: Images | Pictures) -> dict[str, Any]:
    """Number, shape and fingerprint: of images that were read from files, that of these files (`Pictures.files`), which
    is there by classes too."""
    known = {"images": len(images), "shape": list(images.shape)}
    files = images.files() if isinstance(images, Pictures) else images.files
    if isinstance(images, Images) and files is None:
        return known | {"sha256": fingerprint(images)}
    assert files is not None
    return known | {"sha256": of_files(files, images.shape), "files": dict(files)}


def agree(recorded: Mapping[str, Any] | None, given: Mapping[str, Any]) -> bool:
    """Whether nothing shows that two records are of other images: one by files and one by pixels cannot."""
    return not recorded or ("files" in recorded) != ("files" in given) or recorded == given


def of_files(files: Mapping[str, str], shape: Sequence[int]) -> str:
    """The sha256 of what tells some files from others, and of the shape in which they are read."""
    return hashlib.sha256(repr((list(shape), sorted(files.items()))).encode()).hexdigest()


def fingerprint(images: Images) -> str:
    """The sha256 of shape, pixels and labels, in hexadecimal: the same on every device and in every memory layout."""
    digest = hashlib.sha256(repr(list(images.images.shape)).encode())
    rows = max(1, _CHUNK // max(1, images.images[:1].numel()))
    for pixels in images.images.split(rows):
        digest.update(pixels.cpu().contiguous().reshape(-1).numpy().data)
    digest.update(images.labels.cpu().contiguous().numpy().astype("<i8").data)
    return digest.hexdigest()


def describe(recorded: Mapping[str, Any]) -> str:
    """A record in words: "digits: 10 classes, 1,297 train images of 1x8x8 (sha256 0123456789ab...), ..."."""
    parts = [
        f"{part['images']:,} {name} images of {'x'.join(map(str, part['shape']))} (sha256 {part['sha256'][:12]}...)"
        for name in SPLITS
        if (part := recorded.get(name))
    ]
    return f"{plain(recorded['name'])}: {recorded['num_classes']} classes, " + ", ".join(parts)


def loader(state: Mapping[str, Any], source: object, function: str) -> str:
    """The name by which `data.load` makes the data of a checkpoint. Raises ValueError for data of the user's own.

    An import path in a checkpoint is not followed, for a file must not say what code is run.
    """
    recorded = state.get("data") or {"loader": state["config"].get("dataset", "digits")}
    require_trusted("dataset", recorded["loader"], source)
    if recorded["loader"] is None:
        raise ValueError(
            f"{plain(source)} was made on data of your own, {describe(recorded)}, which no name stands for; "
            "give them by code, --dataset package.module:factory or path/to/file.py:factory, or from Python: "
            f"{_from_python(function, source)}"
        )
    return str(recorded["loader"])


def require_same(state: Mapping[str, Any], given: Mapping[str, Any], source: object, function: str) -> list[str]:
    """Raises ValueError if the data ``given`` are not the checkpoint's: by content, for a name is no more than a name.

    Returns what is to be said: a checkpoint of a version that recorded no data has their name alone.
    """
    if not (recorded := state.get("data")):
        name, arch = state["config"].get("dataset", "digits"), state["arch"]
        sizes = given["num_classes"], given["test"]["shape"][0]
        named = given["loader"] not in (None, name) and not is_import_path(given["loader"])
        if named or sizes != (arch["num_classes"], arch["in_channels"]):
            known = f"{plain(name)}: {arch['num_classes']} classes, {arch['in_channels']} channels"
            raise ValueError(f"{plain(source)} was made on {known}; you gave {describe(given)}: leave out the data set")
        return [
            f"note: {plain(source)} is of a version that kept no record of its images: it says {plain(name)}, and "
            f"nothing tells whether they are those of {describe(given)}"
        ]
    differ = [name for name in SPLITS if name in given and given[name] != recorded.get(name)]
    which = _differing(recorded, given)
    if "train" in given and "extra" in recorded and "extra" not in given:
        differ.append("extra")
    if differ == ["extra"]:
        raise ValueError(
            f"{plain(source)} was made with other extra images. It has {describe(recorded)}; you gave "
            f"{describe(given)}. Give those it was made with (--extra-data FILE), or none if it had none"
        )
    if differ or recorded["num_classes"] != given["num_classes"]:
        own, remedy = recorded["loader"], _from_python(function, source)
        if is_import_path(own):
            remedy = f"put the code at {plain(own)} back as it was, or {remedy}"
        elif own and own != given["loader"]:
            remedy = f"leave out the data set, or say {plain(own)}"
        elif "files" in given["test"]:
            remedy = f"put the files back as they were, or {remedy}"
        raise ValueError(
            f"{plain(source)} was made on other data. It has {describe(recorded)}; you gave {describe(given)}{which}. "
            f"Give those it was made on: {remedy}"
        )
    return []


def _from_python(function: str, source: object) -> str:
    folder = str(source).removesuffix("/last.pt")
    return f"atlas_train.stored.{function}({folder!r}, splits=...)"


def _differing(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Of data in files, the folders of which the files are others: "; train: cat has 99 files instead of 100"."""
    told = []
    for name in SPLITS:
        old, new = ((record.get(name) or {}).get("files") or {} for record in (recorded, given))
        for folder in sorted(old.keys() | new.keys()) if old and new else ():
            if old.get(folder) != new.get(folder):
                before, now = (files.get(folder, "0").partition(" ")[0] for files in (old, new))
                how = f"{now} files instead of {before}" if now != before else "files of other names or sizes"
                told.append(f"{name}: {plain(folder)} has {how}")
    return "".join(f"; {each}" for each in told[:3]) + (f"; and {len(told) - 3:,} more" if len(told) > 3 else "")
