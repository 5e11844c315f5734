"""README.md is short; its numbers, and those of tables in docs, are those of benchmarks/results."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"

if not README.is_file():
    pytest.skip("needs the source tree", allow_module_level=True)


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("readme_numbers", ROOT / "tools" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_is_short():
    assert len(README.read_text().splitlines()) <= 120


def test_numbers_are_those_of_the_results(generator):
    for page in generator.PAGES:
        text = (ROOT / page).read_text()
        assert generator.rendered(text, page) == text, f"{page}: run python tools/tables.py"


def test_every_generated_block_has_its_table(generator):
    for page in [README, *(ROOT / "docs").rglob("*.md")]:
        names = re.findall("<!-- (.*): generated -->", page.read_text())
        assert names == [*generator.PAGES.get(str(page.relative_to(ROOT)), {})], page


def test_methods_of_peft_pass_or_are_refused(generator):
    table = generator.peft_table()
    assert "fails" not in table and len(table.splitlines()) > 60


def test_a_changed_number_is_noticed(generator):
    text = README.read_text()
    number = f"{generator.step(generator.INT8) * 1e3:.0f}"
    assert number in text and generator.rendered(text.replace(number, "1000")) == text


def test_picture_can_be_drawn(generator, tmp_path):
    pytest.importorskip("matplotlib")
    generator.draw(tmp_path / "readme.png")
    assert (tmp_path / "readme.png").stat().st_size > 1000 and generator.PICTURE.is_file()


def test_links_lead_to_files():
    for page in [README, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
