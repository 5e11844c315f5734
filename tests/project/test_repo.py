"""Properties of the source tree and of `import qkernels`."""

import ast
import io
import re
import tokenize
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


# A name of a file, with or without folders, and names that are not files of this tree: what runs write, other projects.
FILE_NAME = re.compile(
    r"(?<![\w/.<-])((?:[\w.-]+/)*[\w-]+\.(?:py|pyi|cpp|cc|h|cu|cuh|inc|md|toml|yml|yaml|sh|c))(?![\w/(])"
)
NOT_OURS = {"report.md", "quality.md", "llama.cpp", "name.py"}


def prose(path: Path) -> list[str]:
    """The lines of a file in which people are told something: comments, docstrings, all of a page."""
    text = path.read_text()
    if path.suffix == ".md":
        return text.splitlines()
    if path.suffix == ".py":
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        lines = [token.string for token in tokens if token.type == tokenize.COMMENT]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                lines += (ast.get_docstring(node) or "").splitlines()
        return lines
    mark = "//" if path.suffix in {".cpp", ".h", ".inc", ".cu", ".cuh"} else "#"
    return [line[line.index(mark) :] for line in text.splitlines() if mark in line]


def missing_files(lines: list[str], folder: Path, paths: set[str]) -> list[str]:
    """The names of files in `lines` that are neither the end of one of `paths` nor relative to `folder`."""
    names = {name for line in lines for name in FILE_NAME.findall(line)} - NOT_OURS
    return sorted(name for name in names if name not in paths and not (folder / name).exists())


def test_files_that_are_named_exist():
    """`formats/rules.py` in a comment, a docstring or a page is the end of a path in the source tree."""
    sources = [*all_files(), *files("tools")]
    whole = [path.relative_to(ROOT).parts for path in sources]
    ends = {"/".join(parts[at:]) for parts in whole for at in range(len(parts))}
    assert missing_files(["as in `formats/rules.py`, not `formats/quantize.py`"], ROOT, ends) == ["formats/quantize.py"]
    told = {path: lines for path in sources if path.name != "CHANGELOG.md" and (lines := prose(path))}
    assert len(told) > 200
    missing = {path: missing_files(lines, path.parent, ends) for path, lines in told.items()}
    assert {str(path.relative_to(ROOT)): names for path, names in missing.items() if names} == {}


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
