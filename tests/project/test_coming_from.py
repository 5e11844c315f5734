"""docs/guide/coming-from.md: every "here" cell runs, and torch.ao's "there" with its error beside ours."""

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "coming-from.md"
if not PAGE.exists():
    pytest.skip("needs the source tree", allow_module_level=True)
SETUP = re.search(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)[1]
# Of the relative error: where ours is larger, it is by less than this share, or below what nobody sees.
TOLERATED, UNSEEN = 1.25, 0.012


def code_of(cell: str) -> str | None:
    """The program in a cell: one statement a line. None: it is no program, but words or a fragment."""
    lines = cell.split("<br>")
    if not all(re.fullmatch(r"`[^`]+`", line.strip()) for line in lines):
        return None
    return "\n".join(line.strip()[1:-1] for line in lines)


def rows() -> list:
    found = []
    for section in PAGE.read_text().split("\n## ")[1:]:
        if "| there | here |" not in section:
            continue
        library = section.split("\n")[0].split(" ")[0]
        for number, match in enumerate(re.finditer(r"^\| (?!there|---)(.*?) \| (.*?) \|$", section, re.MULTILINE)):
            found.append(pytest.param(library, *match.groups(), id=f"{library}-{number}"))
    return found


def run(code: str, folder: Path, monkeypatch) -> dict:
    """The variables after the page's setup and `code`; `floats` is the model as it was before."""
    monkeypatch.chdir(folder)
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(SETUP, names)
        names |= {"floats": copy.deepcopy(names["model"]), "ao": torch.ao.quantization}
        exec(code, names)
    return names


def error(names: dict) -> float:
    with torch.no_grad():
        expected, out = (torch.cat([names[key](x) for x in names["batches"]]) for key in ("floats", "model"))
    return ((out - expected).norm() / expected.norm()).item()


def test_the_page_has_its_rows():
    assert len(rows()) >= 25 and sum(param.values[0] == "torch.ao" for param in rows()) >= 9


@pytest.mark.parametrize(("library", "there", "here"), rows())
def test_cells_run(library, there, here, tmp_path, monkeypatch):
    if "QKernelsConfig" in here:
        pytest.importorskip("transformers")
    code = code_of(here)
    assert code is not None, f"no program: {here}"
    ours = run(code, tmp_path, monkeypatch)
    if "quantize_(" in code or "convert_(" in code:
        changed = {type(module).__name__ for module in ours["model"].modules()}
        assert "QuantLinear" in changed
    trains = "train(" in code
    own_error = error(ours) if isinstance(ours["floats"], torch.nn.Module) and not trains else None
    if own_error is not None:
        assert own_error < (0.2 if "w4" in code else 0.05)
    source = code_of(there)
    if library != "torch.ao" or source is None or not source.startswith("model = "):
        return
    if "x86" in source and "x86" not in torch.backends.quantized.supported_engines:
        pytest.skip("needs torch's x86 engine")
    theirs = run(source, tmp_path, monkeypatch)
    assert not any(type(module) is torch.nn.Linear for module in theirs["model"].modules())
    if own_error is not None:
        assert own_error <= max(TOLERATED * error(theirs), UNSEEN), (own_error, error(theirs))
