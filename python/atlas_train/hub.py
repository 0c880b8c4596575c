"""Networks on the Hugging Face Hub: "hf:org/name" wherever a run's folder is taken, and what uploads one."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from .options import one_line, plain

PREFIX = "hf:"
#: The files of an exported network; nothing else is downloaded or uploaded.
FILES = ("*.json", "*.safetensors", "README.md")
#: Code of one's own, downloaded only where it is trusted.
CODE = ("*.py",)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_on_hub(path: str | os.PathLike[str]) -> bool:
    """Whether a path means a network on the Hub."""
    return os.fspath(path).startswith(PREFIX)


def require_name(name: str) -> str:
    """``name``, or ValueError unless it is org/name."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"a network on the Hub is called org/name, got {plain(name)}: write hf:org/name")
    return name


def downloaded(path: str | os.PathLike[str], code: bool = False) -> Path:
    """The folder, on this machine, of "hf:org/name" or "hf:org/name@revision". code: whether .py files come too.

    Raises ImportError without huggingface_hub, OSError where the download fails.
    """
    name, _, revision = os.fspath(path).removeprefix(PREFIX).partition("@")
    hub = _require_hub()
    patterns = [*FILES, *(CODE if code else ())]
    try:
        folder = hub.snapshot_download(require_name(name), revision=revision or None, allow_patterns=patterns)
    except ValueError:
        raise
    except Exception as error:  # of a library that may not be there, of any kind
        raise OSError(f"{plain(path)} could not be downloaded: {one_line(error)}") from error
    return Path(folder)


def uploaded(folder: Path, name: str, private: bool, code: bool) -> str:
    """The address of the repository that now holds the files of ``folder``. Errors as ``downloaded``."""
    hub = _require_hub()
    patterns = [*FILES, *(CODE if code else ())]
    try:
        api = hub.HfApi()
        address = api.create_repo(require_name(name), private=private, exist_ok=True)
        message = "Upload from atlas push"
        api.upload_folder(repo_id=name, folder_path=str(folder), allow_patterns=patterns, commit_message=message)
    except ValueError:
        raise
    except Exception as error:
        raise OSError(
            f"{plain(folder)} could not be uploaded to {plain(name)}: {one_line(error)}; `hf auth login` says who you "
            "are"
        ) from error
    return str(address)


def _require_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("networks on the Hub need huggingface_hub: pip install huggingface_hub") from error
    return huggingface_hub
