"""The examples in tools/gpu_emulation/README.md run as printed, without this package."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_emulation import host

TOOLS = Path(__file__).resolve().parents[2] / "tools"
PAGE = TOOLS / "gpu_emulation" / "README.md"

if not PAGE.is_file():
    pytest.skip("needs the source tree", allow_module_level=True)

SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL))
WITHOUT_US = "import sys\nsys.modules['qkernels'] = None\n"


def snippets(section: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", SECTIONS[section], re.DOTALL)


@pytest.mark.parametrize("section", ["PTX", "Triton", "CUDA C++"])
def test_example(section, tmp_path):
    if section == "Triton":
        pytest.importorskip("triton")
    if section == "CUDA C++":
        if host.MISSING:
            pytest.skip(host.MISSING)
        (source,) = snippets(section, "cpp")
        (tmp_path / "sum.cxx").write_text(source)
    (code,) = snippets(section, "python")
    (tmp_path / "example.py").write_text(WITHOUT_US + code)
    command = [sys.executable, "example.py"]
    environment = {**os.environ, "PYTHONPATH": str(TOOLS)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_project_knows_this_package_and_nothing_knows_the_tests():
    general = [path for path in (TOOLS / "gpu_emulation").rglob("*.py") if "project" not in path.parts]
    assert len(general) > 10
    for path in general:
        assert not re.search(r"^\s*(from|import) qkernels", path.read_text(), re.MULTILINE), path
        assert "gpu_emulation.project" not in path.read_text(), path
    of_tests = r"^\s*(from|import) (tests|helpers|op_samples|launch_checks)\b"
    for path in (TOOLS / "gpu_emulation").rglob("*.py"):
        assert not re.search(of_tests, path.read_text(), re.MULTILINE), path
