"""No circles: of two files, modules or packages, at most one knows the other."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {"atlas_kernels": ROOT / "atlas_kernels", "atlas_train": ROOT / "python" / "atlas_train"}


def modules(sources: dict[str, Path]) -> dict[str, Path]:
    """Every module by its name; a package's is that of its ``__init__.py``."""
    named = {}
    for package, folder in sources.items():
        for path in folder.rglob("*.py"):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def imports(name: str, known: dict[str, Path]) -> Iterator[str]:
    """The modules of ours that ``name`` imports: at its top, inside functions, and for annotations alone."""
    parents = name.split(".")
    for node in ast.walk(ast.parse(known[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            up = node.level - (known[name].name == "__init__.py")
            base = parents[: len(parents) - up] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                if inner in known or source in known:
                    yield inner if inner in known else source


def circles(sources: dict[str, Path]) -> dict[str, set[str]]:
    """By package, each import among its modules, its packages (as wholes) and ``__init__`` that closes a circle."""
    known = modules(sources)
    edges = [(name, target) for name in known for target in imports(name, known)]
    closed = {}
    for package in {"", *(name for name, path in known.items() if path.name == "__init__.py")}:
        graph: dict[str, set[str]] = {}
        for name, target in edges:
            a, b = _part(name, package), _part(target, package)
            if a and b and a != b:
                graph.setdefault(a, set()).add(b)
        closing = {f"{a} -> {b}" for a in graph for b in graph[a] if a in _reached(graph, b)}
        if closing:
            closed[package] = closing
    return closed


def _part(name: str, package: str) -> str | None:
    """What of ``package`` the module ``name`` is or lies in."""
    if name == package:
        return "__init__"
    if not package:
        return name.split(".")[0]
    return name[len(package) + 1 :].split(".")[0] if name.startswith(f"{package}.") else None


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """``start``, what it imports, what that imports, and so on."""
    reached, waiting = {start}, [start]
    while waiting:
        new = graph.get(waiting.pop(), set()) - reached
        reached |= new
        waiting.extend(new)
    return reached


def test_nothing_is_imported_in_a_circle() -> None:
    assert circles(SOURCES) == {}


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"a": "from .b import x", "b": "def f():\n    from .a import y"}, {"a -> b", "b -> a"}),
        ({"a": "if TYPE_CHECKING:\n    from . import b", "b": "from p.a import x"}, {"a -> b", "b -> a"}),
        ({"a": "from . import b", "b": "import p.c", "c": "from .b import x", "d": "import p.a"}, {"b -> c", "c -> b"}),
        ({"a": "import p.b", "b": "import p.a, p.c", "c": "import p.a"}, {"a -> b", "b -> a", "b -> c", "c -> a"}),
        ({"__init__": "from .a import x", "a": "from . import x"}, {"__init__ -> a", "a -> __init__"}),
        ({"a": "from .q.b import x", "q/b": "import p.c", "q/d": "from ..a import x", "c": ""}, {"a -> q", "q -> a"}),
        ({"a": "from .q import b", "q/b": "from . import c", "q/c": "import p.d", "__init__": "import p.a"}, None),
    ],
)
def test_circles_are_seen(tmp_path: Path, files: dict[str, str], expected: set[str] | None) -> None:
    for name, text in {"__init__": "", "q/__init__": "", "c": "", "d": "", **files}.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert circles({"p": tmp_path}) == ({} if expected is None else {"p": expected})


def test_operators_need_no_module_before_theirs() -> None:
    alone = (
        "import sys, types\n"
        "sys.modules['atlas_kernels'] = package = types.ModuleType('atlas_kernels')\n"  # without its own imports
        f"package.__path__ = [{str(SOURCES['atlas_kernels'])!r}]\n"
        "import atlas_kernels.pairwise"
    )
    told = subprocess.run([sys.executable, "-c", alone], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
