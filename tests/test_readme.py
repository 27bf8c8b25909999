"""The README and the documentation against the tree."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_map_of_the_code_is_the_tree():
    """Every Python file of the package stands in the map, under its folder, and nothing else does."""
    code_map = re.search(r"## Map of the code\n+```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    listed, folder = set(), ""
    for line in code_map.splitlines():
        if line and not line.startswith(" "):
            folder = line.split()[0]
            if folder.endswith(".py"):
                listed |= {word for word in line.split("  ")[0].split() if word.endswith(".py")}
                continue
        if folder.endswith("/"):
            listed |= {folder + name for name in re.findall(r"[\w.]+\.py", line)}
    tree = {str(path.relative_to(ROOT)) for path in (ROOT / "pe_av").rglob("*.py") if path.name != "__init__.py"}
    assert listed == tree | {path.name for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                target
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_settings_that_are_named_exist(page: Path):
    text = page.read_text()
    for path in re.findall(r"`((?:pe_av|configs|tests|benchmarks|docs)/[\w/.\-]+)`", text):
        assert (ROOT / path).exists() or "NAME" in path, path
    for module in re.findall(r"python -m (pe_av[\w.]*)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
