"""docs/performance.md holds what the results say, and its generator says what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from performance_page import BLOCK, PAGE, RESULTS, filled

FIRST, SECOND = "| a |\n| ---: |\n| 1 |", "| b |"
TABLES = f"# Title\n\n## First, by batch\n\n{FIRST}\n\n## Second\n\n{SECOND}\n\nA note.\n\n`python x.py`\n\ncpu.\n"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "f-cpu.png").write_bytes(b"")
    (tmp_path / "x.md").write_text(TABLES)
    (tmp_path / "x2.md").write_text("# Other\n\nold\n")
    return tmp_path, tmp_path / "figures"


def block(what: str, inside: str = "old\n") -> str:
    return f"before\n<!-- begin: {what} -->\n{inside}<!-- end -->\nafter\n"


def test_page_is_as_its_results_make_it() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(BLOCK.findall(text)) == text.count("<!-- begin") == text.count("<!-- end") > 5
    assert filled(text, RESULTS, PAGE.parent / "figures") == text, "run python benchmarks/performance_page.py"


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
    made = filled(block(what) + block(what, ""), *folders)
    assert made == 2 * block(what, f"\n{inside}\n\n")
    assert filled(made, *folders) == made


def test_pattern_takes_every_file_in_order(folders: tuple[Path, Path]) -> None:
    made = filled(block("x*.md"), *folders)
    assert made.index("### Title") < made.index("### Other")


def test_notes_are_said_once(folders: tuple[Path, Path]) -> None:
    (folders[0] / "x3.md").write_text(TABLES.replace("# Title", "# Third"))
    made = filled(block("x*.md"), *folders)
    assert made.count("A note.") == 1 and made.count(FIRST) == made.count("cpu.") == made.count("`python x.py`") == 2


def test_a_table_that_is_not_there_is_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="x.md has no table 'Third'.*it has 'First, by batch', 'Second'"):
        filled(block("x.md: Third"), *folders)
