"""Memory, copies and warp-wide instructions, and each fault the interpreter must report."""

import struct

import numpy as np
import pytest
from gpu_emulation.ptx import machine
from gpu_emulation.ptx.harness import HEADER, kernel, run
from gpu_emulation.ptx.machine import WARP, Statistics
from gpu_emulation.ptx.memory import GlobalMemory
from gpu_emulation.ptx.program import PtxError, parse

LANES = np.arange(WARP)


def random_words(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 32, count, dtype=np.uint32)


def store(register: str, parameter: int, size: int = 4, index: str = "%r70") -> str:
    return f"mad.wide.u32 %rd20, {index}, {size}, %rd{30 + parameter}; st.global.b{8 * size} [%rd20], {register};"


COPY = """
    mad.wide.u32 %rd1, %r70, 16, %rd30;
    shl.b32 %r1, %r70, 4; mov.u32 %r2, buffer; add.s32 %r1, %r1, %r2;
    cp.async.cg.shared.global [%r1], [%rd1], 16;
    cp.async.commit_group;
"""


def test_vector_loads_and_stores():
    source, result = random_words(128), np.zeros(128, np.uint32)
    body = """
        mad.wide.u32 %rd1, %r70, 16, %rd30; mad.wide.u32 %rd2, %r70, 16, %rd31;
        ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1]; st.global.v2.b32 [%rd2+8], {%r1, %r2};
        st.global.v2.b32 [%rd2], {%r3, %r4};
    """
    run(body, [source, result])
    assert (result.reshape(-1, 4) == source.reshape(-1, 4)[:, [2, 3, 0, 1]]).all()


def test_narrow_loads_extend_by_type():
    source = np.arange(-16, 16, dtype=np.int8)
    for kind, expected in (("s8", source.astype(np.int32)), ("u8", source.view(np.uint8).astype(np.int32))):
        result = np.zeros(32, np.int32)
        body = f"cvt.u64.u32 %rd1, %r70; add.s64 %rd1, %rd1, %rd30; ld.global.{kind} %r1, [%rd1];"
        run(body + store("%r1", 1), [source, result])
        assert (result == expected).all()


def test_predicated_and_divergent_code():
    result = np.zeros(64, np.uint32)
    body = """
        mov.b32 %r1, 1; setp.lt.u32 %p1, %r70, 40; @%p1 mov.b32 %r1, 2;
        mov.b32 %r2, 0; setp.eq.u32 %p2, %r70, 0; @%p2 bra $done;
        $loop: add.s32 %r1, %r1, 10; add.s32 %r2, %r2, 1; setp.lt.u32 %p3, %r2, %r70; @%p3 bra $loop;
        $done: bar.sync 0;
    """
    run(body + store("%r1", 0), [result], threads=64)
    assert result.tolist() == [(2 if t < 40 else 1) + 10 * t for t in range(64)]


def test_blocks_and_special_registers():
    result = np.zeros(2 * 3 * 32, np.uint32)
    body = """
        mov.u32 %r1, %ctaid.y; mov.u32 %r2, %nctaid.x; mov.u32 %r3, %ctaid.x; mov.u32 %r4, %ntid.x;
        mad.lo.s32 %r5, %r1, %r2, %r3; mad.lo.s32 %r6, %r5, %r4, %r70; add.s32 %r7, %r6, 1000;
    """
    run(body + store("%r7", 0, index="%r6"), [result], grid=(2, 3))
    assert (result == 1000 + np.arange(192)).all()


def test_copies_arrive_and_fill_with_zeros():
    source, result = random_words(128), np.zeros(128, np.uint32)
    body = COPY.replace("[%rd1], 16;", "[%rd1], 16, %r3;").replace(
        "cp.async.cg", "setp.lt.u32 %p1, %r70, 20; selp.b32 %r3, 16, 8, %p1; cp.async.cg"
    )
    body += "cp.async.wait_group 0; bar.sync 0; ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r1];"
    body += "mad.wide.u32 %rd2, %r70, 16, %rd31; st.global.v4.b32 [%rd2], {%r4, %r5, %r6, %r7};"
    run(body, [source, result], shared=512)
    expected = source.reshape(-1, 4).copy()
    expected[20:, 2:] = 0
    assert (result.reshape(-1, 4) == expected).all()


def test_wait_leaves_the_newest_groups():
    """The first of two groups has arrived, the second has not."""
    body = COPY + "add.s32 %r5, %r1, 512; cp.async.cg.shared.global [%r5], [%rd1], 16; cp.async.commit_group;"
    body += "cp.async.wait_group 1; ld.shared.b32 %r4, [%r1]; {late} cp.async.wait_all;" + store("%r4", 1)
    source, result = random_words(128), np.zeros(32, np.uint32)
    run(body.replace("{late}", ""), [source, result], shared=1024)
    assert (result == source[::4]).all()
    with pytest.raises(PtxError, match="not delivered"):
        run(body.replace("{late}", "ld.shared.b32 %r6, [%r5];"), [source, result], shared=1024)


def test_atomics():
    for operation, expected in (("add", 500 + 64), ("max", 500), ("min", 1), ("exch", 1), ("or", 501), ("xor", 500)):
        total, old = np.array([500], np.uint32), np.zeros(64, np.uint32)
        body = f"mov.b32 %r1, 1; atom.global.{operation}.b32 %r2, [%rd30], %r1;".replace(
            ".b32 %r2", ".u32 %r2" if operation in ("add", "max", "min") else ".b32 %r2"
        )
        run(body + store("%r2", 1), [total, old], threads=64)
        assert total[0] == expected
        assert old[0] == 500
    total = np.zeros(1, np.float32)
    run("red.global.add.f32 [%rd30], 0f3F000000;", [total], threads=64)
    assert total[0] == 32
    cell = np.zeros(1, np.uint32)
    run("atom.global.cas.b32 %r2, [%rd30], %r70, 7;", [cell])
    assert cell[0] == 7


def matrices(shared: np.ndarray) -> np.ndarray:
    return shared.view(np.uint16).reshape(4, 8, 8)


LOAD_MATRICES = (
    COPY
    + """
    cp.async.wait_group 0; bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r1];
    mad.wide.u32 %rd2, %r70, 16, %rd31; st.global.v4.b32 [%rd2], {{%r10, %r11, %r12, %r13}};
"""
)


@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(trans):
    """Lane t gets elements 2 (t mod 4) and the next of row t div 4; of the column if transposed."""
    source, result = random_words(128), np.zeros(128, np.uint32)
    run(LOAD_MATRICES.format(trans=".trans" if trans else ""), [source, result], shared=512)
    for lane in range(WARP):
        for number, matrix in enumerate(matrices(source)):
            row = (matrix.T if trans else matrix)[lane // 4]
            pair = result.reshape(WARP, 4)[lane, number : number + 1].view(np.uint16)
            assert pair.tolist() == row[2 * (lane % 4) : 2 * (lane % 4) + 2].tolist()


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_stmatrix_is_the_inverse_of_ldmatrix(trans):
    body = (
        LOAD_MATRICES.format(trans=trans).split("mad.wide.u32 %rd2")[0]
        + f"""
        add.s32 %r3, %r1, 512; stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r3], {{%r10, %r11, %r12, %r13}};
        bar.sync 0; ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r3];
        mad.wide.u32 %rd2, %r70, 16, %rd31; st.global.v4.b32 [%rd2], {{%r4, %r5, %r6, %r7}};
    """
    )
    source, result = random_words(128), np.zeros(128, np.uint32)
    run(body, [source, result], shared=1024)
    assert (result == source).all()


def fragment_index(lane: int, register: int, place: int, per: int, row_steps: int) -> tuple[int, int]:
    """Row (or column of B) and depth of an element, as the figures of PTX ISA 9.7.14.5 have it."""
    return lane // 4 + 8 * (register % row_steps), per * (lane % 4) + place + 4 * per * (register // row_steps)


CASES = [
    ("m16n8k32.row.col.satfinite.s32.s8.s8.s32", np.int8, 32),
    ("m16n8k32.row.col.s32.s8.s8.s32", np.int8, 32),
    ("m16n8k32.row.col.s32.u8.u8.s32", np.uint8, 32),
    ("m16n8k16.row.col.s32.s8.s8.s32", np.int8, 16),
    ("m16n8k16.row.col.f32.f16.f16.f32", np.float16, 16),
    ("m16n8k8.row.col.f32.f16.f16.f32", np.float16, 8),
    ("m16n8k16.row.col.f32.bf16.bf16.f32", np.uint16, 16),
]


@pytest.mark.parametrize(("shape", "dtype", "depth"), CASES, ids=[case[0] for case in CASES])
def test_mma(shape, dtype, depth):
    rng = np.random.default_rng(0)
    size = np.dtype(dtype).itemsize
    per = 4 // size
    is_float = ".f32." in shape
    if is_float:
        a, b = rng.integers(-8, 9, (16, depth)) / 4, rng.integers(-8, 9, (8, depth)) / 4
        c = rng.integers(-100, 100, (16, 8)) / 2
    else:
        limits = np.iinfo(dtype)
        a, b = (rng.integers(limits.min, limits.max + 1, (rows, depth)) for rows in (16, 8))
        c = rng.integers(-1000, 1000, (16, 8))

    def stored(values):
        if dtype is np.uint16:
            return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return values.astype(dtype)

    def spread(values, rows):
        count = rows * depth * size // (4 * WARP)
        out = np.zeros((WARP, count, per), dtype)
        for lane in range(WARP):
            for register in range(count):
                for place in range(per):
                    out[lane, register, place] = stored(values)[fragment_index(lane, register, place, per, rows // 8)]
        return out.reshape(-1).view(np.uint32), count

    (fragment_a, count_a), (fragment_b, count_b) = spread(a, 16), spread(b, 8)
    result_dtype = np.float32 if is_float else np.int32
    at = [(lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2) for lane in range(WARP) for i in range(4)]
    fragment_c = np.array([c[place] for place in at], result_dtype)
    lines = []
    for first, count, parameter in ((10, count_a, 0), (20, count_b, 1), (30, 4, 2)):
        for i in range(count):
            lines.append(f"mad.wide.u32 %rd1, %r70, {4 * count}, %rd{30 + parameter};")
            lines.append(f"ld.global.b32 %r{first + i}, [%rd1+{4 * i}];")
    names = [
        ", ".join(f"%r{first + i}" for i in range(count)) for first, count in ((10, count_a), (20, count_b), (30, 4))
    ]
    lines.append(f"mma.sync.aligned.{shape} {{{names[2]}}}, {{{names[0]}}}, {{{names[1]}}}, {{{names[2]}}};")
    lines.append("mad.wide.u32 %rd2, %r70, 16, %rd33;")
    lines += [f"st.global.b32 [%rd2+{4 * i}], %r{30 + i};" for i in range(4)]
    result = np.zeros(128, result_dtype)
    run("\n".join(lines), [fragment_a, fragment_b, fragment_c, result])
    expected = a @ b.T + c
    assert result.tolist() == [expected[place] for place in at]


def test_integer_mma_saturates_or_wraps():
    """Only where .satfinite stands does the sum stop at the ends of int32."""
    ones = np.full(128, 0x7F7F7F7F, np.uint32)
    for modifier, expected in ((".satfinite", 2**31 - 1), ("", 2**31 - 1 + 32 * 127 * 127 - 2**32)):
        body = (
            """
            mad.wide.u32 %rd1, %r70, 4, %rd30; ld.global.b32 %r1, [%rd1]; mov.b32 %r2, 2147483647;
        """
            + f"""
            mma.sync.aligned.m16n8k32.row.col{modifier}.s32.s8.s8.s32
                {{%r3, %r4, %r5, %r6}}, {{%r1, %r1, %r1, %r1}}, {{%r1, %r1}}, {{%r2, %r2, %r2, %r2}};
        """
        )
        result = np.zeros(32, np.int32)
        run(body + store("%r3", 1), [ones, result])
        assert (result == expected).all()


@pytest.mark.parametrize(
    ("mode", "b", "c", "source"),
    [
        ("bfly", 5, 31, lambda lane: lane ^ 5),
        ("idx", 9, 31, lambda lane: 9),
        ("idx", 3, 0x181F, lambda lane: lane & 24 | 3),
        ("up", 4, 0, lambda lane: lane - 4 if lane >= 4 else lane),
        ("down", 7, 31, lambda lane: lane + 7 if lane + 7 <= 31 else lane),
        ("down", 2, 0x181F, lambda lane: lane + 2 if lane + 2 <= (lane & 24 | 7) else lane),
    ],
)
def test_shfl(mode, b, c, source):
    result = np.zeros(64, np.uint32)
    body = f"mul.lo.s32 %r1, %r70, 3; shfl.sync.{mode}.b32 %r2|%p1, %r1, {b}, {c}, -1;"
    run(body + store("%r2", 0), [result], threads=64)
    assert result.tolist() == [3 * (lane // 32 * 32 + source(lane % 32)) for lane in range(64)]


@pytest.mark.parametrize("mode", ["all", "any", "uni", "ballot"])
@pytest.mark.parametrize("limit", [0, 5, 32])
def test_vote(mode, limit):
    result = np.zeros(32, np.uint32)
    target = "%r1" if mode == "ballot" else "%p2"
    kind = "b32" if mode == "ballot" else "pred"
    body = f"setp.lt.u32 %p1, %r70, {limit}; vote.sync.{mode}.{kind} {target}, %p1, -1;"
    body += "" if mode == "ballot" else "selp.b32 %r1, 1, 0, %p2;"
    run(body + store("%r1", 0), [result])
    expected = {"all": limit == 32, "any": limit > 0, "uni": limit in (0, 32), "ballot": (1 << limit) - 1}[mode]
    assert (result == int(expected)).all()


@pytest.mark.parametrize(
    ("operation", "kind", "function"),
    [
        ("add", "s32", lambda v: sum(v) & 0xFFFFFFFF),
        ("max", "s32", lambda v: max(v)),
        ("min", "u32", lambda v: min(v)),
        ("and", "b32", lambda v: np.bitwise_and.reduce(v)),
        ("or", "b32", lambda v: np.bitwise_or.reduce(v)),
        ("xor", "b32", lambda v: np.bitwise_xor.reduce(v)),
    ],
)
def test_redux(operation, kind, function):
    values, result = random_words(64) >> 1, np.zeros(64, np.uint32)
    body = f"mad.wide.u32 %rd1, %r70, 4, %rd30; ld.global.b32 %r1, [%rd1]; redux.sync.{operation}.{kind} %r2, %r1, -1;"
    run(body + store("%r2", 1), [values, result], threads=64)
    assert result.tolist() == [int(function(values[w * 32 : w * 32 + 32].tolist())) for w in (0, 1) for _ in LANES]


FAULTS = {
    "out of bounds at": "mad.wide.u32 %rd1, %r70, 4, %rd30; ld.global.b32 %r1, [%rd1+4];",
    "not a multiple of 8": "mad.wide.u32 %rd1, %r70, 4, %rd30; ld.global.v2.b32 {%r1, %r2}, [%rd1];",
    "shared access out of bounds": "mov.b32 %r1, buffer; ld.shared.b32 %r2, [%r1+512];",
    "which was never written": "mov.b32 %r1, buffer; ld.shared.b32 %r2, [%r1];",
    "different values to one byte by one": "st.global.b32 [%rd30], %r70;",
    "part of one": "setp.lt.u32 %p1, %r70, 7; @%p1 shfl.sync.bfly.b32 %r1, %r70, 1, 31, -1;",
    "member mask": "shfl.sync.bfly.b32 %r1, %r70, 1, 31, 15;",
    "cp.async were waited for": COPY,
    "only barrier 0": "bar.sync 1;",
    "division by zero": "mov.b32 %r1, 0; div.s32 %r2, %r70, %r1;",
}


@pytest.mark.parametrize("message", FAULTS)
def test_fault_is_reported(message):
    with pytest.raises(PtxError, match=message):
        run(FAULTS[message], [random_words(128)[: 32 if "bounds at" in message else 128]], shared=512)


def test_race_between_warps_is_reported_without_the_barrier():
    """Warp 0 writes what warp 1 reads, and the reverse order."""
    first = "mov.b32 %r1, buffer; shl.b32 %r2, %r70, 2; add.s32 %r3, %r1, %r2; st.shared.b32 [%r3], %r70; "
    second = "xor.b32 %r4, %r2, 128; add.s32 %r4, %r4, %r1; {0} ld.shared.b32 %r5, [%r4];"
    result = np.zeros(64, np.uint32)
    run(first + second.format("bar.sync 0;") + store("%r5", 0), [result], threads=64, shared=256)
    assert result.tolist() == [lane ^ 32 for lane in range(64)]
    with pytest.raises(PtxError, match="race: read"):
        run(first + second.format("") + store("%r5", 0), [result], threads=64, shared=256)
    again = first + second.format("bar.sync 0;") + "st.shared.b32 [%r3], %r5;"
    with pytest.raises(PtxError, match="race: write"):
        run(again, [result], threads=64, shared=256)


def test_blocks_must_not_meet_in_global_memory():
    body = "mad.wide.u32 %rd1, %r70, 4, %rd30; mov.u32 %r1, %ctaid.x; {} "
    with pytest.raises(PtxError, match="store to bytes that another block writes"):
        run(body.format("st.global.b32 [%rd1], %r1;"), [np.zeros(32, np.uint32)], grid=(2,))
    write_once = "setp.eq.s32 %p1, %r1, 0; @%p1 st.global.b32 [%rd1], %r1; ld.global.b32 %r2, [%rd1];"
    with pytest.raises(PtxError, match="load of bytes that another block writes"):
        run(body.format(write_once), [np.zeros(32, np.uint32)], grid=(2,))


def test_outputs_are_not_read_before_they_are_written():
    result = np.zeros(32, np.uint32)
    with pytest.raises(PtxError, match="never written"):
        run("ld.global.b32 %r1, [%rd30];", [result], undefined=[result])


def test_traffic_and_instructions_are_counted():
    """Neighbours share sectors and banks; a stride of 128 bytes gives each lane its own sector, and all one bank."""
    source = random_words(2048)
    for stride, sectors, wavefronts in ((4, 4, 1), (128, 32, 32)):
        body = f"mul.lo.s32 %r1, %r70, {stride}; cvt.u64.u32 %rd1, %r1; add.s64 %rd1, %rd1, %rd30;"
        body += "ld.global.b32 %r2, [%rd1]; mov.b32 %r3, buffer; add.s32 %r3, %r3, %r1; st.shared.b32 [%r3], %r2;"
        statistics = Statistics()
        run(body, [source], shared=4096, statistics=statistics)
        assert (statistics.traffic.sectors, statistics.traffic.least_sectors) == (sectors, 4)
        assert (statistics.traffic.wavefronts, statistics.traffic.least_wavefronts) == (wavefronts, 1)
        assert statistics.traffic.global_bytes == 128
        assert statistics.instructions["ld.global.b32"] == 1


def test_names_of_inner_scopes_are_their_own():
    result = np.zeros(32, np.uint32)
    body = "mov.b32 %r1, 5; { .reg .b32 %r1; .reg .b32 t<2>; mov.b32 %r1, 9; mov.b32 t1, %r1; mov.b32 %r2, t1; }"
    run(body + "add.s32 %r3, %r1, %r2;" + store("%r3", 0), [result])
    assert (result == 14).all()


def test_parse_finds_parameters_and_labels():
    (found,) = parse(kernel("$here: bra $there; $there:", 2, shared=48)).values()
    assert found.parameters == [("p0", 64), ("p1", 64)]
    assert found.shared == {"buffer": 0} and found.shared_bytes == 48
    assert found.code[found.labels["$here"]].parts == ("bra",)
    assert machine.bits_of("bf16x2") == 32


def test_structure_as_a_parameter():
    """Members by their offset, also two at a time; pointers are addresses of this process."""
    body = """
    ld.param.u64 %rd1, [s]; ld.param.v2.u32 {%r1, %r2}, [s+8]; sub.s32 %r3, %r2, %r1; st.global.u32 [%rd1], %r3; ret;
    """
    registers = ".reg .b32 %r<9>; .reg .b64 %rd<9>;"
    text = f"{HEADER}.visible .entry test(.param .align 8 .b8 s[16])\n{{\n{registers}{body}}}\n"
    out, memory = np.zeros(1, np.int32), GlobalMemory()
    memory.add_in_place(out)
    structure = struct.pack("<Qii", out.ctypes.data, 30, 72)
    machine.launch(text, (1,), 1, [int.from_bytes(structure, "little")], memory=memory)
    assert out[0] == 42
