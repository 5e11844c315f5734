"""The tiers of the suite: what is drawn pairwise covers every pair, and no command leaves a test out for good."""

import re
from itertools import combinations
from pathlib import Path

import op_samples
import pytest
from tiers import QUICK_SCHEMES, pairwise, tiered

from qkernels import QuantScheme

ROOT = Path(__file__).resolve().parents[2]

if not (ROOT / "Makefile").is_file():
    pytest.skip("needs the source tree", allow_module_level=True)


@pytest.mark.parametrize(
    ("names", "most"),
    [(op_samples.SCHEMES, 30), (op_samples.INT_SCHEMES, 25), (op_samples.FLOAT_SCHEMES, 23)],
    ids=["all", "int", "float"],
)
def test_every_pair_of_axes_occurs(names, most):
    def pairs(schemes: list[str]) -> set:
        found = set()
        for scheme in map(QuantScheme.parse, schemes):
            axes = enumerate(
                (scheme.weight_bits, scheme.zeros, scheme.group_size, scheme.act_bits, scheme.act_group_size)
            )
            found |= set(combinations(axes, 2))
        return found

    chosen = pairwise(names)
    assert pairs(chosen) == pairs(names)
    assert len(chosen) <= most


def test_every_scheme_runs_in_some_tier():
    parameters = tiered(op_samples.SCHEMES)
    assert tuple(parameter.values[0] for parameter in parameters) == op_samples.SCHEMES
    marks = {parameter.values[0]: [mark.name for mark in parameter.marks] for parameter in parameters}
    usual = set(pairwise(op_samples.SCHEMES))
    assert {name for name, found in marks.items() if not found} == set(QUICK_SCHEMES)
    assert {name for name, found in marks.items() if found == ["thorough"]} == usual - set(QUICK_SCHEMES)
    assert {tuple(found) for found in marks.values()} == {(), ("thorough",), ("slow",)}


def test_commands_of_the_tiers():
    """`make test` and `make test-slow` together are everything but `gpu`; the quick one names files that exist."""
    make = (ROOT / "Makefile").read_text()
    rules = dict(re.findall(r"^(test[\w-]*): .*\n\t\$\(PYTEST\) -m \"([^\"]+)\"", make, re.MULTILINE))
    assert rules == {
        "test": "not gpu and not slow",
        "test-quick": "not gpu and not slow and not thorough",
        "test-slow": "slow and not gpu",
    }
    (paths,) = re.findall(r"^QUICK_TESTS := \$\(addprefix tests/,(.*)\)$", make, re.MULTILINE)
    assert all((ROOT / "tests" / path).exists() for path in paths.split())
    ci = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"^make (.+)$", ci, re.MULTILINE) == ["lint", "test", "test-slow"]
