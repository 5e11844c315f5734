"""`QuantScheme`: what a quantized layer stores and how it multiplies, as pure data."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from .weight_format import WEIGHT_FORMATS, WeightFormat

GROUP_SIZES = (32, 64, 128)  # of activations, and of weights of every format; `WeightFormat.group_sizes` may have more


class _Zeros(NamedTuple):
    """How a name and a code say what `zeros` holds."""

    suffix: str
    digit: int


_ZEROS: dict[Literal["zero_point", "min"] | None, _Zeros] = {
    None: _Zeros("", 0),
    "zero_point": _Zeros("-asym", 1),
    "min": _Zeros("-min", 2),
}


@dataclass(frozen=True)
class QuantScheme:
    """A weight format together with the precision of the activations it is multiplied with.

    Attributes:
        weight_bits: 8 or 4.
        act_bits: 8 (activations are quantized to int8 in every call) or 16 (activations stay float).
        group_size: weight elements along K that share a scale; None: one scale per output channel.
        zeros: what the stored tensor `zeros` holds for each group: "zero_point" (4 bits only), an integer that is
            subtracted; "min", a float that is added; None: there is none, and the weight is symmetric.
        act_group_size: activation elements along K that share a scale; None: one scale per token.
        static_activations: one scale for all activations of a layer, which calibration chose (`x_scale`).

    The canonical name is ``w{4,8}a{8,8s,16}[-g{16,32,64,128}][-asym | -min][-ag{32,64,128}]``.
    """

    weight_bits: int
    act_bits: int
    group_size: int | None = None
    zeros: Literal["zero_point", "min"] | None = None
    act_group_size: int | None = None
    static_activations: bool = False

    def __post_init__(self) -> None:
        def expect(ok: bool, field: str, what: str) -> None:
            if not ok:
                raise ValueError(f"{field} must be {what}, got {getattr(self, field)!r}")

        expect(self.weight_bits in WEIGHT_FORMATS, "weight_bits", "4 or 8")
        expect(self.act_bits in (8, 16), "act_bits", "8 or 16")
        sizes = self.weight_format.group_sizes
        expect(self.group_size in (None, *sizes), "group_size", f"None or one of {sizes}")
        expect(self.act_group_size in (None, *GROUP_SIZES), "act_group_size", f"None or one of {GROUP_SIZES}")
        expect(self.zeros in _ZEROS, "zeros", "None, 'zero_point' or 'min'")
        has_point = self.zeros != "zero_point" or self.weight_format.has_zeros
        expect(has_point, "zeros", "None or 'min' for 8-bit weights")
        expect(self.act_group_size is None or self.act_bits == 8, "act_group_size", "None for float activations")
        expect(not self.static_activations or self.act_bits == 8, "static_activations", "False for float activations")
        one_scale = self.act_group_size is None or not self.static_activations
        expect(one_scale, "act_group_size", "None for static activations")

    @staticmethod
    def names() -> tuple[str, ...]:
        """Every valid scheme name."""
        return tuple(_BY_NAME)

    @staticmethod
    def parse(scheme: str | QuantScheme) -> QuantScheme:
        """The scheme called `scheme`.

        Raises:
            ValueError: for any other string; the message offers the nearest valid name.
            TypeError: if `scheme` is neither a string nor a `QuantScheme`.
        """
        if isinstance(scheme, QuantScheme):
            return scheme
        if not isinstance(scheme, str):
            how = ""
            if isinstance(scheme, dict):
                how = "; quantize_ and QKernelsConfig take a mapping from patterns to schemes"
            elif isinstance(scheme, set | frozenset | list | tuple):
                how = "; layers are chosen by name, with include= and skip="
            raise TypeError(f"scheme must be a string or a QuantScheme, got {type(scheme).__name__}{how}")
        if scheme not in _BY_NAME:
            raise ValueError(
                f"unknown scheme {scheme!r}; did you mean {_nearest(scheme)!r}? "
                "Schemes are named w{4,8}a{8,8s,16}[-g{16,32,64,128}][-asym | -min][-ag{32,64,128}] "
                "(-g16 for w8, -asym for w4, -ag for a8 only)."
            )
        return _BY_NAME[scheme]

    @property
    def name(self) -> str:
        return (
            f"w{self.weight_bits}a{self.act_bits}{'s' if self.static_activations else ''}"
            + (f"-g{self.group_size}" if self.group_size else "")
            + _ZEROS[self.zeros].suffix
            + (f"-ag{self.act_group_size}" if self.act_group_size else "")
        )

    def __str__(self) -> str:
        return self.name

    @property
    def code(self) -> int:
        """The integer that the operators of `torch.ops.qkernels` take for the scheme; it is the same in every version.

        Its decimal digits are the name in order: one of the bits of the weight, two of the bits of the activations,
        three of the group size, one that is 1 for `-asym` and 2 for `-min`, three of the activation group size; 0
        where there is none.
        A 1 before them all means `a8s`.

        >>> QuantScheme.parse("w4a8-g32-asym-ag64").code
        4080321064
        """
        bits = self.static_activations * 10**10 + self.weight_bits * 10**9 + self.act_bits * 10**7
        groups = (self.group_size or 0) * 10**4 + (self.act_group_size or 0)
        return bits + groups + 1000 * _ZEROS[self.zeros].digit

    @staticmethod
    def from_code(code: int) -> QuantScheme:
        """The scheme with this `code`.

        Raises:
            ValueError: for any other number.
        """
        scheme = _BY_CODE.get(code)
        if scheme is None:
            raise ValueError(f"unknown scheme code {code!r}; QuantScheme.code is {_EXAMPLE.code} for {_EXAMPLE}")
        return scheme

    @property
    def int_activations(self) -> bool:
        return self.act_bits == 8

    @property
    def symmetric(self) -> bool:
        """True if a weight has neither zero points nor minima: an integer times its scale is its value."""
        return self.zeros is None

    @property
    def has_min(self) -> bool:
        """True if a weight has a float minimum per group, which is added to integer times scale."""
        return self.zeros == "min"

    @property
    def row_scaled(self) -> bool:
        """True if one scale a row is all that makes numbers of a weight's integers, so that gradients can fold it."""
        return self.group_size is None and not self.has_min

    @property
    def of_dynamic(self) -> QuantScheme:
        """The scheme with the scales of activations found in every call, in the place of static ones."""
        return replace(self, static_activations=False)

    @property
    def of_floats(self) -> QuantScheme:
        """The scheme of the same weight with float activations."""
        return replace(self, act_bits=16, act_group_size=None, static_activations=False)

    @property
    def weight_format(self) -> WeightFormat:
        """How the integers of the weight are stored."""
        return WEIGHT_FORMATS[self.weight_bits]

    def weight_groups(self, in_features: int) -> int:
        """Scales per row of a weight with `in_features` columns."""
        return -(-in_features // self.group_size) if self.group_size else 1

    def act_groups(self, in_features: int) -> int:
        """Scales per row of an activation with `in_features` columns."""
        return -(-in_features // self.act_group_size) if self.act_group_size else 1

    def acc_group_size(self, in_features: int) -> int:
        """Elements along K summed in integers before a scale is applied: the finer of the two groupings."""
        return min(self.group_size or in_features, self.act_group_size or in_features)

    def packed_features(self, in_features: int) -> int:
        """Bytes in a row of `qweight`."""
        return self.weight_format.packed_columns(in_features)

    def storage_shapes(self, in_features: int, out_features: int) -> dict[str, tuple[int, int]]:
        """Shapes of the stored tensors by name; `zeros` is present for `-asym` and `-min` schemes only."""
        groups = self.weight_groups(in_features)
        shapes = {
            "qweight": (out_features, self.packed_features(in_features)),
            "scales": (out_features, groups),
        }
        if not self.symmetric:
            shapes["zeros"] = (out_features, groups)
        return shapes


def _nearest(scheme: str) -> str:
    """The name of a valid scheme that is most like `scheme`, in number of bits rather than in letters."""
    name = re.sub(r"[\s_]+", "-", scheme.strip().lower())
    static = next((mark for mark in ("-static", "sa8") if mark in name), None)  # "w8a8-static", "w8sa8"
    name = name if static is None else name.replace(static, "" if static == "-static" else "a8").replace("a8", "a8s", 1)
    if bits := re.match(r"w(\d+)-?a(\d+)", name):
        weight, act = (int(number) for number in bits.groups())
        name = f"w{4 if weight < 6 else 8}a{8 if act < 12 else 16}{name[bits.end() :]}"
    parts = sorted(name.split("-"))
    nearest = difflib.get_close_matches(name, _BY_NAME, n=1, cutoff=0.0)[0]
    return next((valid for valid in _BY_NAME if sorted(valid.split("-")) == parts), nearest)


def _all_schemes() -> list[QuantScheme]:
    act_groups = (None, *GROUP_SIZES)
    return [
        QuantScheme(bits, act_bits, group, zeros, act_group, static)
        for bits in WEIGHT_FORMATS
        for act_bits, static in ((8, False), (16, False), (8, True))
        for group in (None, *WEIGHT_FORMATS[bits].group_sizes)
        for zeros in _ZEROS
        if zeros != "zero_point" or WEIGHT_FORMATS[bits].has_zeros
        for act_group in (act_groups if act_bits == 8 and not static else (None,))
    ]


_BY_NAME = {scheme.name: scheme for scheme in _all_schemes()}
_BY_CODE = {scheme.code: scheme for scheme in _BY_NAME.values()}
_CODES = {name: scheme.code for name, scheme in _BY_NAME.items()}
_EXAMPLE = _BY_NAME["w8a8"]


def scheme_code(scheme: str | QuantScheme) -> int:
    """`QuantScheme.parse(scheme).code`, and as cheap as a look-up for a name."""
    if isinstance(scheme, str) and scheme in _CODES:
        return _CODES[scheme]
    return QuantScheme.parse(scheme).code
