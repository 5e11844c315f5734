"""Scheme names, their parser and the storage they imply."""

import copy
import dataclasses
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkernels import QuantScheme
from qkernels.formats.scheme import GROUP_SIZES, scheme_code

NAMES = QuantScheme.names()


def test_names_are_all_combinations_once():
    assert len(NAMES) == len(set(NAMES)) == 132  # (w8: 5 * 2, w4: 4 * 3) groupings x (a8: 4, a16: 1, a8s: 1)
    for name in ("w8a8", "w8a16", "w8a8-ag128", "w4a8-g32", "w4a16-g128-asym", "w4a8-g32-asym-ag64", "w8a8-g16-min"):
        assert name in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name):
    scheme = QuantScheme.parse(name)
    assert scheme.name == str(scheme) == name
    assert QuantScheme.parse(scheme) is scheme
    rebuilt = QuantScheme(**dataclasses.asdict(scheme))
    assert rebuilt == scheme and hash(rebuilt) == hash(scheme)
    assert pickle.loads(pickle.dumps(scheme)) == copy.deepcopy(scheme) == scheme


@pytest.mark.parametrize("name", NAMES)
def test_code_is_read_back(name):
    scheme = QuantScheme.parse(name)
    assert QuantScheme.from_code(scheme.code) is scheme
    assert scheme_code(name) == scheme_code(scheme) == scheme.code


def test_codes_are_the_digits_of_the_name():
    """Exported graphs hold them: they never change."""
    codes = {"w8a8": 8080000000, "w8a16-g128": 8161280000, "w4a8-ag128": 4080000128, "w4a8-g32-asym-ag64": 4080321064}
    codes |= {"w8a8s": 18080000000, "w8a8-g16-ag32": 8080160032, "w4a8s-g32-asym": 14080321000}
    codes |= {"w4a8-g32-min-ag64": 4080322064, "w8a8s-min": 18080002000}
    assert {name: QuantScheme.parse(name).code for name in codes} == codes
    assert len({QuantScheme.parse(name).code for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize(
    "code",
    [
        0,
        -1,
        8,
        8080000001,
        8081000000,
        2080000000,
        8160000032,
        4080160000,
        8080000016,
        48080000000,
        18160000000,
        18080000032,
        2**62,
        "w8a8",
    ],
)
def test_other_codes_are_refused(code):
    with pytest.raises(ValueError, match=f"unknown scheme code {code!r}; "):
        QuantScheme.from_code(code)
    if isinstance(code, int):
        with pytest.raises((RuntimeError, ValueError), match=f"unknown scheme code {code}"):
            torch.ops.qkernels.quantize_activation(torch.ones(1, 4), code)


def test_schemes_are_distinct_and_frozen():
    assert len({QuantScheme.parse(name) for name in NAMES}) == len(NAMES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantScheme.parse("w8a8").weight_bits = 4


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("w4a8-asym-g32", "w4a8-g32-asym"),
        ("w4a8-ag128-g32", "w4a8-g32-ag128"),
        ("w4a8g32", "w4a8-g32"),
        ("w8a8-asym", "w4a8-asym"),
        ("w8a8-static", "w8a8s"),
        ("w8sa8", "w8a8s"),
        ("w4a8-g32-static", "w4a8s-g32"),
        ("w8a8s-ag32", "w8a8s-g32"),
        ("W8A8", "w8a8"),
        ("w8a8-g12", "w8a8-g128"),
        ("w4a16-g32-ag32", "w4a8-g32-ag32"),
        (" w8a8", "w8a8"),
        ("w8a8\n", "w8a8"),
        ("w3a8", "w4a8"),
        ("w8a8_g32", "w8a8-g32"),
        ("W4A16_G32_ASYM", "w4a16-g32-asym"),
        ("w16a16", "w8a16"),
    ],
)
def test_wrong_names_offer_the_nearest(wrong, nearest):
    with pytest.raises(ValueError, match="unknown scheme") as error:
        QuantScheme.parse(wrong)
    assert repr(wrong) in str(error.value) and f"did you mean {nearest!r}?" in str(error.value)


@given(st.text(max_size=24) | st.from_regex(r"w[0-9]a[0-9]{1,2}(-a?g[0-9]{1,3})?(-asym)?", fullmatch=True))
def test_any_other_string_is_refused_with_an_offer(text):
    if text in NAMES:
        assert QuantScheme.parse(text).name == text
        return
    with pytest.raises(ValueError, match=r"did you mean 'w[48]a(8|16)"):
        QuantScheme.parse(text)


@pytest.mark.parametrize("wrong", [None, 8, b"w8a8", ["w8a8"]])
def test_other_types_are_refused(wrong):
    with pytest.raises(TypeError, match="scheme must be a string or a QuantScheme, got"):
        QuantScheme.parse(wrong)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("weight_bits", {"weight_bits": 3}),
        ("weight_bits", {"weight_bits": "8"}),
        ("act_bits", {"act_bits": 32}),
        ("group_size", {"group_size": 16, "weight_bits": 4}),
        ("group_size", {"group_size": 8}),
        ("act_group_size", {"act_group_size": 16}),
        ("group_size", {"group_size": 0}),
        ("group_size", {"group_size": -32}),
        ("act_group_size", {"act_group_size": 256}),
        ("zeros", {"zeros": "zero_point"}),
        ("zeros", {"zeros": "mins"}),
        ("act_group_size", {"act_bits": 16, "act_group_size": 32}),
    ],
)
def test_invalid_fields_are_named(field, values):
    with pytest.raises(ValueError, match=f"^{field} must be .*, got "):
        QuantScheme(**{"weight_bits": 8, "act_bits": 8, **values})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("in_features", [1, 31, 32, 33, 127, 128, 129, 257])
def test_storage_shapes(name, in_features):
    scheme = QuantScheme.parse(name)
    shapes = scheme.storage_shapes(in_features, 5)
    starts = range(0, in_features, scheme.group_size or in_features)
    assert shapes["scales"] == (5, len(starts))
    assert shapes["qweight"] == (5, in_features if scheme.weight_bits == 8 else (in_features + 1) // 2)
    assert shapes.get("zeros") == (None if scheme.symmetric else (5, len(starts)))
    assert scheme.act_groups(in_features) == len(range(0, in_features, scheme.act_group_size or in_features))
    sizes = [size for size in (scheme.group_size, scheme.act_group_size) if size]
    step = min(sizes, default=in_features)
    assert [*range(0, in_features, scheme.acc_group_size(in_features))] == [*range(0, in_features, step)]
    assert set(sizes) <= {*GROUP_SIZES, 16}
