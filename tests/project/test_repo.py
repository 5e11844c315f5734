"""Properties of the source tree and of `import qkernels`."""

import re
from pathlib import Path

import pytest
from helpers import run_python

import qkernels

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("qkernels", "csrc", "tests", "examples", "benchmarks", "docs", ".ci", ".github")
SUFFIXES = {".py", ".cpp", ".h", ".inc", ".cu", ".cuh", ".md", ".toml", ".yaml", ".yml", ".cfg", ".sh"}

if not (ROOT / "csrc").is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)


def files(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    return sorted(path for path in found if path.is_file())


def all_files() -> list[Path]:
    top = [path for path in ROOT.iterdir() if path.is_file() and (path.suffix in SUFFIXES or path.name == "Makefile")]
    return [*top, *files(*FOLDERS)]


def occurrences(pattern: str, paths: list[Path]) -> list[str]:
    """`file:line: text` of every match outside this file."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        if path != Path(__file__).resolve()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_there_are_files_to_check():
    names = {path.name for path in all_files()}
    assert {"setup.py", "pyproject.toml", "ops.py", "ops.cpp", "scalar.cpp", "test_repo.py"} <= names


def test_source_files_are_short():
    sources = [path for path in all_files() if path.suffix in {".py", ".cpp", ".h", ".inc", ".cu", ".cuh"}]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources}
    assert {name: length for name, length in lengths.items() if length >= 600} == {}
    assert lengths["setup.py"] < 150


def test_at_most_two_environment_variables_are_read_at_run_time():
    found = set()
    for path in files("qkernels", "csrc"):
        text = path.read_text()
        found |= set(re.findall(r"getenv\(\s*\"(\w+)\"", text))
        found |= set(re.findall(r"environ(?:\.get\(|\[)\s*[\"'](\w+)[\"']", text))
        uses = len(re.findall(r"getenv\(|\benviron\b", text))
        named = len(re.findall(r"getenv\(\s*\"\w+\"|environ(?:\.get\(|\[)\s*[\"']\w+[\"']", text))
        assert uses == named, f"{path.relative_to(ROOT)} reads the environment in a way this test cannot name"
    assert len(found) <= 2, found


def test_nothing_is_built_for_one_machine():
    build = [
        ROOT / "setup.py",
        ROOT / "pyproject.toml",
        *files("csrc"),
        *(p for p in all_files() if p.name == "Makefile"),
    ]
    assert occurrences(r"-march=|-mtune=|-mcpu=|-ffast-math|-Ofast|-funsafe-math", build) == []


def test_no_paths_of_a_machine():
    assert occurrences(r"/(home|work|root|Users|tmp|mnt)/\w", all_files()) == []


def test_version_is_stated_once():
    assert re.fullmatch(r"\d+\.\d+\.\d+", qkernels.__version__)
    places = [path for path in all_files() if f'"{qkernels.__version__}"' in path.read_text()]
    assert places == [ROOT / "qkernels" / "version.py"]
    assert 'attr = "qkernels.version.__version__"' in (ROOT / "pyproject.toml").read_text()


def test_import_is_light():
    """Optional packages are imported by those who use them only."""
    code = "import sys, qkernels; print([m for m in {} if m in sys.modules])".format(
        ["transformers", "peft", "triton", "accelerate", "gguf", "matplotlib", "typer", "rich", "torch._inductor"]
    )
    assert run_python(code).stdout.strip() == "[]"


def test_public_names_exist_and_are_documented():
    assert len(set(qkernels.__all__)) == len(qkernels.__all__)
    for name in qkernels.__all__:
        assert getattr(qkernels, name).__doc__, name
