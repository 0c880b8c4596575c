"""README and docs hold what the code and the results say, and their generator says what is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import atlas_kernels
from atlas_train import methods
from pages import BLOCK, DOCS, PAGES, ROOT, filled

FIRST, SECOND = "| a |\n| ---: |\n| 1 |", "| b |"
TABLES = f"# Title\n\n## First, by batch\n\n{FIRST}\n\n## Second\n\n{SECOND}\n\nA note.\n\n`python x.py`\n\ncpu.\n"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "f-cpu.png").write_bytes(b"")
    (tmp_path / "x.md").write_text(TABLES)
    (tmp_path / "x2.md").write_text("# Other\n\nold\n")
    return tmp_path, tmp_path / "figures"


def made_of(text: str, folders: tuple[Path, Path]) -> str:
    return filled(text, folders[0] / "page.md", *folders)


def block(what: str, inside: str = "old\n") -> str:
    return f"before\n<!-- begin: {what} -->\n{inside}<!-- end -->\nafter\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_is_as_its_sources_make_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(BLOCK.findall(text)) == text.count("<!-- begin") == text.count("<!-- end")
    assert filled(text, page) == text, "run python benchmarks/pages.py"


def test_readme_is_short_and_counts_the_methods() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    assert f"{len(methods.names())} methods" in text


def test_every_public_name_is_listed() -> None:
    listed = set(re.findall(r"\w+", (DOCS / "operators.md").read_text(encoding="utf-8")))
    assert set(atlas_kernels.__all__) <= listed


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))], ids=str)
def test_pages_that_are_named_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"\bdocs/[\w/]+\.md", text)) | set(re.findall(r"\bbenchmarks/\w+\.(?:py|sh)", text))
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize(
    "what, inside",
    [
        ("x.md: Second", f"Second:\n\n{SECOND}\n\nPrinted by `python x.py`."),
        ("x.md: First, by batch", f"First, by batch:\n\n{FIRST}\n\nPrinted by `python x.py`."),
        ("x.md", TABLES.replace("## ", "#### ").replace("# Title", "### Title").rstrip()),
        ("x2*.md", "### Other\n\nold"),
        ("f-cpu.png", "![f-cpu](figures/f-cpu.png)"),
        ("absent*.md", "(Not measured yet: there is no `absent*.md`.)"),
        ("absent.png", "(Not measured yet: there is no `absent.png`.)"),
    ],
)
def test_blocks(folders: tuple[Path, Path], what: str, inside: str) -> None:
    made = made_of(block(what) + block(what, ""), folders)
    assert made == 2 * block(what, f"\n{inside}\n\n")
    assert made_of(made, folders) == made


def test_pattern_takes_every_file_in_order(folders: tuple[Path, Path]) -> None:
    made = made_of(block("x*.md"), folders)
    assert made.index("### Title") < made.index("### Other")


def test_notes_are_said_once(folders: tuple[Path, Path]) -> None:
    (folders[0] / "x3.md").write_text(TABLES.replace("# Title", "# Third"))
    made = made_of(block("x*.md"), folders)
    assert made.count("A note.") == 1 and made.count(FIRST) == made.count("cpu.") == made.count("`python x.py`") == 2


def test_a_table_that_is_not_there_is_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="x.md has no table 'Third'.*it has 'First, by batch', 'Second'"):
        made_of(block("x.md: Third"), folders)
