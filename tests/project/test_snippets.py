"""Every Python block of README.md and docs/ runs as printed, in a new interpreter; and so do examples of docstrings.

A block that cannot run here says why in its first line, `# needs a GPU` or `# needs MODEL`, and is skipped.
"""

import doctest
import importlib
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import qkernels

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

if not (ROOT / "docs").is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)


def snippets() -> list:
    return [
        pytest.param(match[1], id=f"{page.relative_to(ROOT)}:{page.read_text()[: match.start()].count(chr(10)) + 1}")
        for page in PAGES
        for match in BLOCK.finditer(page.read_text())
    ]


@pytest.mark.parametrize("code", snippets())
def test_runs_as_printed(code, tmp_path):
    if reason := re.match(r"# (needs .*)", code):
        pytest.skip(reason[1])
    for package in ("transformers", "peft", "onnxruntime"):
        if re.search(rf"^(from|import) {package}\b", code, re.MULTILINE):
            pytest.importorskip(package)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def modules_with_examples() -> list[str]:
    found = [path for path in (ROOT / "qkernels").rglob("*.py") if ">>> " in path.read_text()]
    return sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in found)


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_of_docstrings_print_what_they_say(name):
    module = importlib.import_module(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one example shows a name that is no longer used
        result = doctest.testmod(
            module, extraglobs={"torch": torch, "nn": torch.nn, "qk": qkernels, "qkernels": qkernels}
        )
    assert result.attempted and not result.failed


def test_no_python_hides_from_this_test():
    """Blocks have one spelling of the language, and lines with an ellipsis would pass without doing anything."""
    for page in PAGES:
        text = page.read_text()
        assert not re.search(r"^```(py|python3|pycon)\n", text, re.MULTILINE), page
        assert text.count("```python\n") == len(BLOCK.findall(text)), page
        assert not any(re.search(r"^\s*\.\.\.", block, re.MULTILINE) for block in BLOCK.findall(text)), page


def test_the_readme_has_one():
    assert BLOCK.search((ROOT / "README.md").read_text())
