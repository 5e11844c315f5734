"""wgmma against a product in NumPy, for each swizzle, and its faults."""

import numpy as np
import pytest
from gpu_emulation.ptx.harness import run
from gpu_emulation.ptx.program import PtxError
from gpu_emulation.ptx.warpgroup import SWIZZLE

COLUMNS = 16
THREADS = 128
B_AT = 64 * 128  # where B begins in shared memory


def swizzled(matrix: np.ndarray, width: int, mask: int) -> np.ndarray:
    """Rows of `width` bytes one after the other; 16-byte piece c of row r stands at c xor its row's bits."""
    out = np.zeros((len(matrix), width), np.int8)
    for row in range(len(matrix)):
        turn = (row * width // 128) & mask
        for piece in range(width // 16):
            out[row, 16 * (piece ^ turn) : 16 * (piece ^ turn) + 16] = matrix[row, 16 * piece : 16 * piece + 16]
    return out


def program(mode: int, step: int, accumulate: int) -> str:
    """Copies A and B to shared memory as they are, and multiplies their columns from 32 * step on."""
    width = SWIZZLE[mode][0]
    high = (8 * width >> 4) | mode << 30
    registers = ", ".join(f"%r{10 + i}" for i in range(8))
    copies = "".join(
        f"""
        mad.wide.u32 %rd1, %r70, 16, %rd30; shl.b32 %r1, %r70, 4; mov.u32 %r2, buffer; add.s32 %r1, %r1, %r2;
        ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%rd1+{2048 * i}];
        st.shared.v4.b32 [%r1+{2048 * i}], {{%r3, %r4, %r5, %r6}};"""
        for i in range((B_AT + 128 * COLUMNS) // 2048)
    )
    return f"""{copies}
        bar.sync 0;
        fence.proxy.async.shared::cta;
        mov.b32 %r7, buffer; add.s32 %r7, %r7, {32 * step}; shr.u32 %r7, %r7, 4; add.s32 %r8, %r7, {B_AT >> 4};
        mov.b32 %r9, {high}; mov.b64 %rd2, {{%r7, %r9}}; mov.b64 %rd3, {{%r8, %r9}};
        {"".join(f"mov.b32 %r{10 + i}, {i};" for i in range(8))}
        mov.b32 %r30, {accumulate}; setp.ne.s32 %p1, %r30, 0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n16k32.s32.s8.s8 {{{registers}}}, %rd2, %rd3, %p1;
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        mad.wide.u32 %rd4, %r70, 32, %rd31;
        {"".join(f"st.global.b32 [%rd4+{4 * i}], %r{10 + i};" for i in range(8))}
    """


@pytest.mark.parametrize(("mode", "step"), [(1, 0), (1, 3), (2, 0), (2, 1), (3, 0)])
@pytest.mark.parametrize("accumulate", [0, 1])
def test_product(mode, step, accumulate):
    width, mask = SWIZZLE[mode]
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-128, 128, (rows, width), dtype=np.int8) for rows in (64, COLUMNS))
    memory, result = np.zeros(B_AT + 128 * COLUMNS, np.int8), np.zeros(THREADS * 8, np.int32)
    memory[: 64 * width] = swizzled(a, width, mask).reshape(-1)
    memory[B_AT : B_AT + COLUMNS * width] = swizzled(b, width, mask).reshape(-1)
    run(program(mode, step, accumulate), [memory, result], threads=THREADS, shared=len(memory))
    depth = slice(32 * step, 32 * step + 32)
    product = a[:, depth].astype(int) @ b[:, depth].astype(int).T
    for thread in range(THREADS):
        for number in range(8):
            row = thread // 32 * 16 + thread % 32 // 4 + 8 * (number % 4 // 2)
            column = 8 * (number // 4) + 2 * (thread % 4) + number % 2
            assert result[8 * thread + number] == product[row, column] + accumulate * number


@pytest.mark.parametrize(
    ("planted", "replacement", "message"),
    [
        ("wgmma.wait_group.sync.aligned 0;", "", "wgmma were waited for"),
        ("bar.sync 0;", "", "race"),
        ("mov.b32 %r9,", "xor.b32 %r8, %r8, %r70; mov.b32 %r9,", "disagree"),
        ("setp.ne.s32 %p1, %r30, 0;", "setp.ne.s32 %p1, %r70, 0;", "disagree"),
    ],
)
def test_fault_is_reported(planted, replacement, message):
    memory, result = np.zeros(B_AT + 128 * COLUMNS, np.int8), np.zeros(THREADS * 8, np.int32)
    with pytest.raises(PtxError, match=message):
        run(program(1, 0, 0).replace(planted, replacement), [memory, result], threads=THREADS, shared=len(memory))
