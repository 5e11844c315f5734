"""docs/internals/design.md: its layers are the folders and the import contract, its links lead to what they name."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "internals" / "design.md"

if not PAGE.is_file():
    pytest.skip("needs the source tree", allow_module_level=True)


@pytest.fixture(scope="module")
def references():
    spec = importlib.util.spec_from_file_location("line_references", ROOT / "tools" / "line_references.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def layers() -> list[set[str]]:
    """The picture, top first."""
    (block,) = re.findall(r"^```layers\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [set(re.split(r",\s*", re.split(r"\s{2,}", line)[0])) for line in block.splitlines()]


def test_layers_are_the_folders():
    folders = {path.parent.name for path in (ROOT / "qkernels").glob("*/__init__.py")}
    assert set().union(*layers()) == folders
    assert sum(map(len, layers())) == len(folders)
    built = {path for path in (ROOT / "qkernels").glob("*.so")}
    entries = {path for path in (ROOT / "qkernels").iterdir() if path.name != "__pycache__"} - built
    assert len(entries) <= 20, sorted(entries)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs tomllib")
def test_layers_are_the_contract_of_the_linter():
    import tomllib

    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = [contract for contract in contracts if contract["type"] == "layers"]
    modules = {path.stem for path in (ROOT / "qkernels").glob("*.py")}
    of_folders = [set(re.split(r"\s*\|\s*", layer)) - modules for layer in contract["layers"]]
    assert [layer for layer in of_folders if layer] == layers()


def test_links_lead_to_the_lines_of_their_symbols(references):
    for page in references.PAGES:
        text = page.read_text()
        assert references.mended(page, text) == text, "run python tools/line_references.py"


def test_a_wrong_line_is_noticed(references):
    text = PAGE.read_text()
    wrong, count = re.subn(r"#L\d+\)", "#L1)", text, count=1)
    assert count == 1 and references.mended(PAGE, wrong) == text
    with pytest.raises(ValueError, match="none"):
        references.mended(PAGE, "[`no such symbol`](../../setup.py#L1)")


def test_five_files_lie_between_the_layer_and_the_micro_kernel(references):
    rows = re.findall(r"^\| (layer|\d|kernel) \| (.*)$", PAGE.read_text(), re.MULTILINE)
    assert [number for number, _ in rows] == ["layer", "1", "2", "3", "4", "5", "kernel"]
    files = [set(re.findall(r"\]\(([^)#]+)#", row)) for _, row in rows]
    assert [len(named) for named in files] == [1] * 7
    assert len(set().union(*files)) == 7
