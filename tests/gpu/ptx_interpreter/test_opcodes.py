"""Each instruction against its definition in the PTX ISA, written out here for one thread in plain Python."""

import math
import random
import struct
from fractions import Fraction

import numpy as np
import pytest
from gpu_emulation.ptx import arithmetic, conversion, movement, warp, warpgroup  # noqa: F401
from gpu_emulation.ptx.harness import apply
from gpu_emulation.ptx.machine import DTYPES, HANDLERS, bits_of
from gpu_emulation.ptx.program import PtxError

THREADS = 128


def signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def unsigned(value: int, bits: int) -> int:
    return value & ((1 << bits) - 1)


def as_type(value: int, kind: str) -> int:
    return signed(value, bits_of(kind)) if kind[0] == "s" else unsigned(value, bits_of(kind))


def to_float(bits: int, kind: str) -> float:
    if kind == "bf16":
        return struct.unpack("f", struct.pack("I", bits << 16))[0]
    code, integer = {"f16": ("e", "H"), "f32": ("f", "I"), "f64": ("d", "Q")}[kind]
    return struct.unpack(code, struct.pack(integer, bits))[0]


PRECISION = {
    "f16": (11, -24, 65504.0),
    "bf16": (8, -133, 3.3895313892515355e38),
    "f32": (24, -149, 3.4028234663852886e38),
}


def round_exact(value: Fraction, kind: str) -> float:
    """The nearest number of `kind` to an exact value, half to even."""
    if value == 0:
        return 0.0
    digits, least, largest = PRECISION[kind]
    exponent = max(math.frexp(abs(float(value)))[1] - digits, least)
    scaled = value / Fraction(2) ** exponent
    if abs(round(scaled)) >= 1 << digits:  # rounded up to the next power of two, which is fine
        pass
    result = Fraction(round(scaled)) * Fraction(2) ** exponent
    return math.copysign(math.inf, value) if abs(result) > Fraction(largest) else float(result)


def random_bits(kind: str, seed: int, finite: bool = False) -> np.ndarray:
    """Edge cases, then random numbers."""
    choose, bits = random.Random(f"{kind} {seed}"), bits_of(kind)
    if kind in ("f32", "f16", "bf16"):
        edges = [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, 3.0, -7.25, 1e-3, 12582912.0, 127.4999, 2.0**-126, 1e-41]
        edges = [to_bits(value, kind) for value in edges]
        if not finite:
            edges += [to_bits(value, kind) for value in (math.inf, -math.inf, math.nan, 3.4e38, -1e30, 70000.0)]
        values = edges * 2
        values += [to_bits(choose.uniform(-4, 4) * 2.0 ** choose.randint(-12, 12), kind) for _ in range(THREADS)]
    else:
        edges = [0, 1, 2, 3, 7, 31, 32, 33, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1, 255, 128]
        values = [unsigned(edge, bits) for edge in edges * 2] + [choose.getrandbits(bits) for _ in range(THREADS)]
    choose.shuffle(values)
    return np.array(values[:THREADS], DTYPES[f"b{bits}"])


def to_bits(value: float, kind: str) -> int:
    if math.isnan(value):
        return {"f16": 0x7E00, "bf16": 0x7FC0, "f32": 0x7FC00000}[kind]
    if math.isinf(value):
        rounded = value
    else:
        rounded = round_exact(Fraction(value), kind)
        rounded = math.copysign(0.0, value) if rounded == 0 else rounded
    if kind == "bf16":
        return struct.unpack("I", struct.pack("f", rounded))[0] >> 16
    code, integer = {"f16": ("e", "H"), "f32": ("f", "I")}[kind]
    return struct.unpack(integer, struct.pack(code, rounded))[0]


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def exact_or_special(function, a: float, b: float, kind: str = "f32") -> float:
    """`function` of exact fractions rounded once; Inf, NaN and signed zeros as IEEE float64 has them."""
    operation = {"add": lambda: a + b, "sub": lambda: a - b, "mul": lambda: a * b, "div": lambda: a / b}[function]
    if not (math.isfinite(a) and math.isfinite(b)):
        if function == "div" and b == 0:
            return math.nan if math.isnan(a) else math.copysign(math.inf, a) * math.copysign(1, b)
        return operation()
    if function == "div" and b == 0:
        return math.nan if a == 0 else math.copysign(math.inf, a) * math.copysign(1, b)
    x, y = Fraction(a), Fraction(b)
    exact = {"add": x + y, "sub": x - y, "mul": x * y, "div": x / y if y else 0}[function]
    if exact == 0:
        return operation()
    rounded = round_exact(exact, kind)
    return math.copysign(0.0, exact) if rounded == 0 else rounded


def prmt(a: int, b: int, selector: int) -> int:
    source = [(a | b << 32) >> 8 * i & 255 for i in range(8)]
    out = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = source[nibble & 7]
        out |= ((255 if byte & 128 else 0) if nibble & 8 else byte) << 8 * i
    return out


def bfe(kind: str, a: int, b: int, c: int) -> int:
    """The loop the ISA gives."""
    bits = bits_of(kind)
    msb, pos, length = bits - 1, b & 255, c & 255
    top = min(pos + length - 1, msb)
    sign = 0 if kind[0] == "u" or length == 0 else a >> top & 1
    result = 0
    for i in range(bits):
        result |= (a >> (pos + i) & 1 if i < length and pos + i <= msb else sign) << i
    return result


def bfi(a: int, b: int, c: int, d: int) -> int:
    result, pos, length = b, c & 255, d & 255
    for i in range(length):
        if pos + i < 32:
            result = result & ~(1 << (pos + i)) | (a >> i & 1) << (pos + i)
    return result


def lop3(a: int, b: int, c: int, table: int) -> int:
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))


def shift(name: str, kind: str, a: int, n: int) -> int:
    bits = bits_of(kind)
    if name == "shl":
        return a << n if n < bits else 0
    return as_type(a, kind) >> min(n, bits) if kind[0] == "s" else (a >> n if n < bits else 0)


def dp4a(a: int, b: int, c: int) -> int:
    return c + sum(signed(a >> 8 * i, 8) * signed(b >> 8 * i, 8) for i in range(4))


INTEGER = [  # instruction, types of the operands, type of the result, definition on the bits
    *((f"add.{t} {{0}}, {{1}}, {{2}}", (t, t), t, lambda a, b: a + b) for t in ("s16", "s32", "u32", "s64")),
    *((f"sub.{t} {{0}}, {{1}}, {{2}}", (t, t), t, lambda a, b: a - b) for t in ("s16", "s32", "s64")),
    *((f"mul.lo.{t} {{0}}, {{1}}, {{2}}", (t, t), t, lambda a, b: a * b) for t in ("s16", "s32", "s64")),
    ("add.s16x2 {0}, {1}, {2}", ("b32", "b32"), "b32",
     lambda a, b: unsigned(a + b, 16) | unsigned((a >> 16) + (b >> 16), 16) << 16),
    ("add.sat.s32 {0}, {1}, {2}", ("s32", "s32"), "s32",
     lambda a, b: min(max(signed(a, 32) + signed(b, 32), -(2**31)), 2**31 - 1)),
    ("mul.hi.u32 {0}, {1}, {2}", ("u32", "u32"), "u32", lambda a, b: a * b >> 32),
    ("mul.hi.s32 {0}, {1}, {2}", ("s32", "s32"), "s32", lambda a, b: signed(a, 32) * signed(b, 32) >> 32),
    ("mul.wide.s32 {0}, {1}, {2}", ("s32", "s32"), "s64", lambda a, b: signed(a, 32) * signed(b, 32)),
    ("mul.wide.u16 {0}, {1}, {2}", ("u16", "u16"), "u32", lambda a, b: a * b),
    ("mad.lo.s32 {0}, {1}, {2}, {3}", ("s32", "s32", "s32"), "s32", lambda a, b, c: a * b + c),
    ("mad.lo.s64 {0}, {1}, {2}, {3}", ("s64", "s64", "s64"), "s64", lambda a, b, c: a * b + c),
    ("mad.wide.s32 {0}, {1}, {2}, {3}", ("s32", "s32", "s64"), "s64",
     lambda a, b, c: signed(a, 32) * signed(b, 32) + c),
    ("mad.wide.u32 {0}, {1}, {2}, {3}", ("u32", "u32", "u64"), "u64", lambda a, b, c: a * b + c),
    *((f"{n}.{t} {{0}}, {{1}}, {{2}}", (t, t), t, lambda a, b, n=n, t=t: {"min": min, "max": max}[n](
        as_type(a, t), as_type(b, t))) for n in ("min", "max") for t in ("s32", "u32", "s16", "s64")),
    ("abs.s32 {0}, {1}", ("s32",), "s32", lambda a: abs(signed(a, 32))),
    ("neg.s32 {0}, {1}", ("s32",), "s32", lambda a: -a),
    *((f"{n}.b{w} {{0}}, {{1}}, {{2}}", (f"b{w}",) * 2, f"b{w}", f) for w in (16, 32, 64) for n, f in (
        ("and", lambda a, b: a & b), ("or", lambda a, b: a | b), ("xor", lambda a, b: a ^ b))),
    ("and.pred {0}, {1}, {2}", ("pred", "pred"), "pred", lambda a, b: bool(a) and bool(b)),
    ("not.b32 {0}, {1}", ("b32",), "b32", lambda a: ~a),
    ("not.pred {0}, {1}", ("pred",), "pred", lambda a: not a),
    ("lop3.b32 {0}, {1}, {2}, {3}, 0xe2", ("b32",) * 3, "b32", lambda a, b, c: lop3(a, b, c, 0xE2)),
    ("lop3.b32 {0}, {1}, {2}, {3}, 0x1b", ("b32",) * 3, "b32", lambda a, b, c: lop3(a, b, c, 0x1B)),
    *((f"{n}.{t} {{0}}, {{1}}, {{2}}", (t, "amount"), t, lambda a, s, n=n, t=t: shift(n, t, a, s)) for n, t in (
        ("shl", "b16"), ("shl", "b32"), ("shl", "b64"), ("shr", "s32"), ("shr", "u32"), ("shr", "s16"),
        ("shr", "u64"))),
    ("shf.l.wrap.b32 {0}, {1}, {2}, {3}", ("b32", "b32", "amount"), "b32",
     lambda a, b, n: ((b << 32 | a) << (n & 31)) >> 32),
    ("shf.r.wrap.b32 {0}, {1}, {2}, {3}", ("b32", "b32", "amount"), "b32", lambda a, b, n: (b << 32 | a) >> (n & 31)),
    ("shf.r.clamp.b32 {0}, {1}, {2}, {3}", ("b32", "b32", "amount"), "b32",
     lambda a, b, n: (b << 32 | a) >> min(n, 32)),
    *((f"bfe.{t} {{0}}, {{1}}, {{2}}, {{3}}", (t, "amount", "amount"), t, lambda a, b, c, t=t: bfe(t, a, b, c))
      for t in ("s32", "u32", "s64")),
    ("bfi.b32 {0}, {1}, {2}, {3}, {4}", ("b32", "b32", "amount", "amount"), "b32", bfi),
    ("prmt.b32 {0}, {1}, {2}, {3}", ("b32",) * 3, "b32", lambda a, b, c: prmt(a, b, c & 0xFFFF)),
    ("popc.b32 {0}, {1}", ("b32",), "u32", lambda a: a.bit_count()),
    ("clz.b32 {0}, {1}", ("b32",), "u32", lambda a: 32 - a.bit_length()),
    ("brev.b32 {0}, {1}", ("b32",), "b32", lambda a: int(f"{a:032b}"[::-1], 2)),
    ("dp4a.s32.s32 {0}, {1}, {2}, {3}", ("b32", "b32", "s32"), "s32", dp4a),
    ("mov.b32 {0}, {1}", ("b32",), "b32", lambda a: a),
    ("cvta.to.global.u64 {0}, {1}", ("u64",), "u64", lambda a: a),
    ("selp.b32 {0}, {1}, {2}, {3}", ("b32", "b32", "pred"), "b32", lambda a, b, p: a if p else b),
    *((f"setp.{n}.{t} {{0}}, {{1}}, {{2}}", (t, t), "pred", lambda a, b, f=f, t=t: f(as_type(a, t), as_type(b, t)))
      for t in ("s32", "u32", "s64") for n, f in (
          ("eq", lambda a, b: a == b), ("ne", lambda a, b: a != b), ("lt", lambda a, b: a < b),
          ("le", lambda a, b: a <= b), ("gt", lambda a, b: a > b), ("ge", lambda a, b: a >= b))),
    ("setp.lt.and.s32 {0}, {1}, {2}, {3}", ("s32", "s32", "pred"), "pred",
     lambda a, b, p: signed(a, 32) < signed(b, 32) and bool(p)),
    ("setp.hs.u32 {0}, {1}, {2}", ("u32", "u32"), "pred", lambda a, b: a >= b),
    *((f"cvt.{d}.{s} {{0}}, {{1}}", (s,), d, lambda a, s=s: as_type(a, s)) for d, s in (
        ("u32", "u16"), ("s32", "s16"), ("s64", "s32"), ("u64", "u32"), ("u16", "u32"), ("u32", "u64"))),
    ("cvt.s16.s8 {0}, {1}", ("b16",), "s16", lambda a: signed(a, 8)),
    ("cvt.s8.s32 {0}, {1}", ("s32",), "s16", lambda a: signed(a, 8)),
    ("cvt.sat.s8.s32 {0}, {1}", ("s32",), "s16", lambda a: min(max(signed(a, 32), -128), 127)),
]  # fmt: skip


@pytest.mark.parametrize(("text", "kinds", "output", "definition"), INTEGER, ids=[row[0].split()[0] for row in INTEGER])
def test_integer(text, kinds, output, definition):
    inputs = []
    for number, kind in enumerate(kinds):
        if kind == "amount":
            inputs.append(("u32", random_bits("u32", number) % 70))
        elif kind == "pred":
            inputs.append(("pred", random_bits("u32", number) & 1))
        else:
            inputs.append((kind, random_bits(kind, number)))
    actual = apply(text, inputs, output)
    bits = 1 if output == "pred" else bits_of(output)
    rows = zip(*(values.tolist() for _, values in inputs), strict=True)
    assert actual.tolist() == [unsigned(int(definition(*row)), bits) for row in rows]


@pytest.mark.parametrize("text", ["div.s32", "rem.s32", "div.u32", "rem.u32", "div.s64"])
def test_division_rounds_towards_zero(text):
    name, kind = text.split(".")
    a, b = random_bits(kind, 0), random_bits(kind, 1)
    bits = bits_of(kind)
    b[(b == 0) | (b == (1 << bits) - 1)] = 5
    actual = apply(f"{text} {{0}}, {{1}}, {{2}}", [(kind, a), (kind, b)], kind)
    for x, y, result in zip(a.tolist(), b.tolist(), actual.tolist(), strict=True):
        x, y = as_type(x, kind), as_type(y, kind)
        quotient = truncated(x, y)
        assert result == unsigned(quotient if name == "div" else x - quotient * y, bits)


def same(result: int, expected: float, kind: str) -> bool:
    """Equal bits; any NaN is as good as another."""
    value = to_float(result, kind)
    return math.isnan(value) if math.isnan(expected) else result == to_bits(expected, kind)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_float32(name):
    a, b = random_bits("f32", 0), random_bits("f32", 1)
    actual = apply(f"{name}.rn.f32 {{0}}, {{1}}, {{2}}", [("f32", a), ("f32", b)], "f32")
    for x, y, result in zip(a.tolist(), b.tolist(), actual.tolist(), strict=True):
        assert same(result, exact_or_special(name, to_float(x, "f32"), to_float(y, "f32")), "f32")


@pytest.mark.parametrize(("text", "kind"), [("add.rn.f32.f16", "f16"), ("sub.rn.f32.bf16", "bf16")])
def test_mixed_precision(text, kind):
    a, b = random_bits(kind, 0), random_bits("f32", 1)
    actual = apply(f"{text} {{0}}, {{1}}, {{2}}", [(kind, a), ("f32", b)], "f32")
    for x, y, result in zip(a.tolist(), b.tolist(), actual.tolist(), strict=True):
        assert same(result, exact_or_special(text[:3], to_float(x, kind), to_float(y, "f32")), "f32")


@pytest.mark.parametrize(
    ("text", "kind"), [("sub.rn.bf16x2", "bf16"), ("mul.rn.f16x2", "f16"), ("add.rn.f32x2", "f32")]
)
def test_packed(text, kind):
    width = bits_of(kind)
    wide = f"b{2 * width}"
    halves = [[random_bits(kind, 2 * i + j) for j in range(2)] for i in range(2)]
    packed = [
        (low.astype(DTYPES[wide]) | high.astype(DTYPES[wide]) << np.array(width, DTYPES[wide])) for low, high in halves
    ]
    actual = apply(f"{text} {{0}}, {{1}}, {{2}}", [(wide, packed[0]), (wide, packed[1])], wide)
    for thread, result in enumerate(actual.tolist()):
        for half in range(2):
            x, y = (to_float(int(halves[i][half][thread]), kind) for i in range(2))
            assert same(result >> half * width & ((1 << width) - 1), exact_or_special(text[:3], x, y, kind), kind)


def test_fma_of_packed_bfloat16():
    """Sums of small integers, which float32 holds and bfloat16 must round; others are refused."""
    numbers = random.Random(0)
    rows = [[tuple(numbers.randint(-n, n) for n in (99, 9, 255)) for _ in "lh"] for _ in range(THREADS)]
    inputs = []
    for operand in range(3):
        low, high = (np.array([to_bits(row[half][operand], "bf16") for row in rows], np.uint32) for half in range(2))
        inputs.append(("b32", low | high << 16))
    actual = apply("fma.rn.bf16x2 {0}, {1}, {2}, {3}", inputs, "b32")
    for row, result in zip(rows, actual.tolist(), strict=True):
        for half, (x, y, z) in enumerate(row):
            assert same(result >> 16 * half & 0xFFFF, round_exact(Fraction(x * y + z), "bf16"), "bf16")
    tiny = ("b32", np.full(THREADS, to_bits(2.0**-60, "bf16") * 0x10001, np.uint32))
    with pytest.raises(PtxError, match="float32 holds"):
        apply("fma.rn.bf16x2 {0}, {1}, {2}, {3}", [inputs[0], inputs[1], tiny], "b32")


def test_fma_rounds_once():
    a, b, c = (random_bits("f32", seed, finite=True) for seed in range(3))
    c[:40] = (a.view(np.float32)[:40] * b.view(np.float32)[:40] * np.float32(-1)).view(np.uint32)  # cancellation
    actual = apply("fma.rn.f32 {0}, {1}, {2}, {3}", [("f32", a), ("f32", b), ("f32", c)], "f32")
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), actual.tolist(), strict=True):
        x, y, z = (to_float(value, "f32") for value in (x, y, z))
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        assert to_float(result, "f32") == round_exact(exact, "f32")


def test_fma_at_a_tie():
    """Where rounding first to float64 and then to float32 would give another result."""
    a, b, c = (np.full(1, value, np.float32) for value in (1 + 2.0**-23, 1 + 2.0**-11, 2.0**-60))
    exact = Fraction(float(a[0])) * Fraction(float(b[0])) + Fraction(float(c[0]))
    inputs = [("f32", np.repeat(value, 32).view(np.uint32)) for value in (a, b, c)]
    (first, *_) = apply("fma.rn.f32 {0}, {1}, {2}, {3}", inputs, "f32").tolist()
    assert to_float(first, "f32") == round_exact(exact, "f32")


@pytest.mark.parametrize("name", ["min", "max"])
@pytest.mark.parametrize("propagate", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_float_minimum(name, propagate, count):
    """Of two or three operands."""
    inputs = [random_bits("f32", i) for i in range(count)]
    inputs[1][:8] = inputs[0][:8] ^ np.uint32(1 << 31)
    modifier, places = ".NaN" if propagate else "", ", ".join(f"{{{i}}}" for i in range(count + 1))
    actual = apply(f"{name}{modifier}.f32 {places}", [("f32", bits) for bits in inputs], "f32")
    for *values, result in zip(*(bits.tolist() for bits in inputs), actual.tolist(), strict=True):
        values = [to_float(value, "f32") for value in values]
        numbers = [value for value in values if not math.isnan(value)]
        if not numbers or (propagate and len(numbers) < count):
            expected = math.nan
        else:
            expected = {"min": min, "max": max}[name]((value, math.copysign(1, value)) for value in numbers)[0]
        assert same(result, expected, "f32")


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_float_sign(kind):
    a = random_bits(kind, 0)
    top = 1 << (bits_of(kind) - 1)
    assert apply(f"neg.{kind} {{0}}, {{1}}", [(kind, a)], kind).tolist() == [x ^ top for x in a.tolist()]
    assert apply(f"abs.{kind} {{0}}, {{1}}", [(kind, a)], kind).tolist() == [x & ~top for x in a.tolist()]


@pytest.mark.parametrize(
    "name", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
)
def test_float_comparison(name):
    a, b = random_bits("f32", 0), random_bits("f32", 1)
    b[::3] = a[::3]
    actual = apply(f"setp.{name}.f32 {{0}}, {{1}}, {{2}}", [("f32", a), ("f32", b)], "pred")
    for x, y, result in zip(a.tolist(), b.tolist(), actual.tolist(), strict=True):
        x, y = to_float(x, "f32"), to_float(y, "f32")
        unordered = math.isnan(x) or math.isnan(y)
        if name in ("num", "nan"):
            expected = unordered == (name == "nan")
        else:
            holds = {"eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}[name[:2]]
            expected = (unordered or holds) if len(name) == 3 else (not unordered and holds)
        assert result == expected


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_conversion_between_floats(kind):
    a, narrow = random_bits("f32", 0), random_bits(kind, 1)
    for x, result in zip(
        a.tolist(), apply(f"cvt.rn.{kind}.f32 {{0}}, {{1}}", [("f32", a)], kind).tolist(), strict=True
    ):
        value = to_float(x, "f32")
        expected = value if not math.isfinite(value) else to_float(to_bits(value, kind), kind)
        assert same(result, expected, kind)
    for x, result in zip(
        narrow.tolist(), apply(f"cvt.f32.{kind} {{0}}, {{1}}", [(kind, narrow)], "f32").tolist(), strict=True
    ):
        assert same(result, to_float(x, kind), "f32")
    b = random_bits("f32", 2)
    actual = apply(f"cvt.rn.{kind}x2.f32 {{0}}, {{1}}, {{2}}", [("f32", a), ("f32", b)], "b32")
    for upper, lower, result in zip(a.tolist(), b.tolist(), actual.tolist(), strict=True):
        assert same(result >> 16, to_float(to_bits(to_float(upper, "f32"), kind), kind), kind)
        assert same(result & 0xFFFF, to_float(to_bits(to_float(lower, "f32"), kind), kind), kind)


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("kind", ["s16", "s32", "u32", "s64"])
def test_conversion_to_integer(mode, kind):
    a = random_bits("f32", 0)
    bits, rounding = bits_of(kind), {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[mode]
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)
    actual = apply(f"cvt.{mode}.{kind}.f32 {{0}}, {{1}}", [("f32", a)], kind)
    for x, result in zip(a.tolist(), actual.tolist(), strict=True):
        value = to_float(x, "f32")
        expected = 0 if math.isnan(value) else (low if value < low else high if value > high else rounding(value))
        assert result == unsigned(min(max(expected, low), high), bits)


@pytest.mark.parametrize(
    ("to", "source"), [("f32", "s32"), ("f32", "u32"), ("f32", "s16"), ("f16", "s16"), ("f32", "s64")]
)
def test_conversion_from_integer(to, source):
    a = random_bits(source, 0)
    actual = apply(f"cvt.rn.{to}.{source} {{0}}, {{1}}", [(source, a)], to)
    for x, result in zip(a.tolist(), actual.tolist(), strict=True):
        assert same(result, round_exact(Fraction(as_type(x, source)), to), to)


def test_what_is_not_known_is_refused():
    a = random_bits("f32", 0)
    for text in ("add.rz.f32", "div.full.f32", "mul.ftz.f32"):
        with pytest.raises(PtxError, match="not known"):
            apply(f"{text} {{0}}, {{1}}, {{2}}", [("f32", a), ("f32", a)], "f32")
    with pytest.raises(PtxError, match="unknown instruction"):
        apply("tanh.approx.f32 {0}, {1}", [("f32", a)], "f32")


def test_every_opcode_has_a_test():
    here = {row[0].split(".")[0] for row in INTEGER} | {"div", "rem", "fma", "cvt", "min", "max"}
    in_test_memory = {"ld", "st", "cp", "atom", "red", "ldmatrix", "stmatrix", "mma", "shfl", "vote", "redux"}
    in_test_warpgroup = {"wgmma", "fence"}
    assert here | in_test_memory | in_test_warpgroup == set(HANDLERS)
