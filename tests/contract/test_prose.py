"""Docstrings are sentences that a reader understands without the name above them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("shoal", "kernels", "parallel", "runtime", "cluster", "benchmarks", "examples", "tests")
FRAGMENTS = {"Of", "By", "That", "Who", "Whom", "Whose"}
"""First words of phrases that continue the name: an editor shows the docstring without it."""


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every string that stands alone as a statement, which documents what is above it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value.strip()


def fragments(source: str) -> list[str]:
    """`line: first words` of every docstring that begins as a fragment does."""
    return [
        f"{line}: {' '.join(text.split()[:8])}"
        for line, text in docstrings(source)
        if text and text.split()[0].rstrip(",:;.") in FRAGMENTS
    ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_docstring_is_a_fragment(folder: str) -> None:
    found = {
        str(path.relative_to(ROOT)): lines
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (lines := fragments(path.read_text()))
    }
    assert found == {}


def test_the_check_finds_fragments_wherever_docstrings_stand() -> None:
    source = '"""Of a module."""\nX = 1\n"""By whom."""\ndef f() -> None:\n    """That it is."""\n    g("Of it")\n'
    assert fragments(source) == ["1: Of a module.", "3: By whom.", "5: That it is."]
    assert fragments('def f() -> None:\n    """Offset of a row, by which rows are found."""\n') == []
