"""README and docs/: links lead somewhere, and every folder of the package has its line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#([^)\s]+))?\)")
LAYERS = ("cluster", "runtime", "parallel", "kernels")


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path = (page.parent / target).resolve()
        assert path.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(path), f"{page.name} links to {target}#{anchor}"


def test_the_index_lists_every_page() -> None:
    listed = {target for target, _ in LINK.findall((ROOT / "docs" / "README.md").read_text(encoding="utf-8"))}
    assert listed == {page.name for page in PAGES} - {"README.md"}


def test_every_folder_of_the_package_has_a_line() -> None:
    rows = re.findall(r"^\| `([a-z_/]+)/` \|", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.M)
    folders = {
        str(path.parent.relative_to(ROOT))
        for layer in LAYERS
        for path in (ROOT / layer).rglob("*.py")
        if path.parent.name != "__pycache__"
    }
    # `cluster` and `runtime` are listed by their folders, `kernels` and its folders in one line.
    expected = {folder for folder in folders if folder not in ("cluster", "runtime") and "kernels/" not in folder}
    assert expected <= set(rows)


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
