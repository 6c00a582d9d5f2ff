"""ptx.py itself: small programs with known results, and faults that it must see."""

import numpy as np
import pytest
import torch

import ptx

HEAD = ".visible .entry k({})\n{{\n"
START = "ld.param.b64 %rd1, [k_param_0]; mov.u32 %r1, %tid.x; mad.wide.u32 %rd2, %r1, 4, %rd1;"
I = np.arange(32, dtype=np.int64)


F = I.astype(np.float32)
NAN = "0f7FC00000"


def bits(values):
    """float32 numbers as 32-bit words."""
    return np.asarray(values, np.float32).view(np.uint32).astype(np.int64)


def execute(body, warps=1, shared=4096, grid=(1,), inputs=(), words=1):
    """What a program leaves in its first parameter, `words` numbers a thread."""
    out = torch.zeros(32 * warps * words, dtype=torch.int32)
    parameters = ", ".join(f".param .u64 k_param_{i}" for i in range(1 + len(inputs)))
    code = f"{HEAD.format(parameters)}{START}{body} ret;\n}}\n"
    ptx.run(ptx.parse(code, shared, warps), grid, [out, *inputs])
    return out.numpy().view(np.uint32)


@pytest.mark.parametrize("line, expected", [
    # integers of 32, 16 and 64 bits
    ("add.s32 %r2, %r1, -3;", I - 3),
    ("neg.s32 %r2, %r1;", -I),
    ("mul.lo.s32 %r2, %r1, -5;", -5 * I),
    ("max.u32 %r2, %r1, 9;", np.maximum(I, 9)),
    ("or.b32 %r3, %r1, 5; and.b32 %r4, %r3, 23; xor.b32 %r2, %r4, 3;", (I | 5) & 23 ^ 3),
    ("add.s16x2 %r2, %r1, 0x0002FFFF;", (I - 1) % 2**16 + 0x20000),
    ("cvt.u16.u32 %rs1, %r1; add.s16 %rs2, %rs1, -3; cvt.u32.u16 %r2, %rs2;", (I - 3) % 2**16),
    ("cvt.u16.u32 %rs1, %r1; sub.s16 %rs2, 7, %rs1; cvt.u32.u16 %r2, %rs2;", (7 - I) % 2**16),
    ("cvt.u16.u32 %rs1, %r1; mul.lo.s16 %rs2, %rs1, 3000; cvt.u32.u16 %r2, %rs2;",
     3000 * I % 2**16),
    ("cvt.u16.u32 %rs1, %r1; mul.hi.u16 %rs2, %rs1, 0x4000; cvt.u32.u16 %r2, %rs2;", I // 4),
    ("cvt.u16.u32 %rs1, %r1; mul.wide.u16 %r2, %rs1, 50000;", 50000 * I),
    ("cvt.u16.u32 %rs1, %r1; max.u16 %rs2, %rs1, 9; and.b16 %rs3, %rs2, 14; or.b16 %rs4, %rs3, 64;"
     "shl.b16 %rs5, %rs4, 9; shr.u16 %rs6, %rs5, 8; cvt.u32.u16 %r2, %rs6;",
     ((np.maximum(I, 9) & 14 | 64) << 9) % 2**16 >> 8),
    ("cvt.u64.u32 %rd3, %r1; add.s64 %rd4, %rd3, -40; sub.s64 %rd5, %rd4, 2; "
     "cvt.u32.u64 %r2, %rd5;", I - 42),
    ("cvt.u64.u32 %rd3, %r1; mad.lo.s64 %rd4, %rd3, %rd3, -1; mul.lo.s64 %rd5, %rd4, 3; "
     "cvt.u32.u64 %r2, %rd5;", 3 * I * I - 3),
    ("mul.wide.s32 %rd3, %r1, -2; shr.s64 %rd4, %rd3, 2; cvt.u32.u64 %r2, %rd4;", -2 * I >> 2),
    ("mul.wide.u32 %rd3, %r1, 0x80000000; shr.u64 %rd4, %rd3, 31; cvt.u32.u64 %r2, %rd4;", I),
    ("mad.wide.s32 %rd3, %r1, -1, 4; shl.b64 %rd4, %rd3, 3; or.b64 %rd5, %rd4, 1; "
     "and.b64 %rd6, %rd5, 0xFF; xor.b64 %rd7, %rd6, 3; cvt.u32.u64 %r2, %rd7;",
     ((4 - I) * 8 | 1) & 0xFF ^ 3),
    ("sub.s32 %r3, %r1, 9; cvt.s64.s32 %rd3, %r3; shr.u64 %rd4, %rd3, 63; cvt.u32.u64 %r2, %rd4;",
     I < 9),
    ("mov.b64 %rd3, {%r1, 7}; mov.b64 {%r3, %r4}, %rd3; mad.lo.s32 %r2, %r3, 10, %r4;", 10 * I + 7),
    ("mov.u64 %rd3, 5; cvt.u16.u64 %rs1, %rd3; mov.u16 %rs2, %rs1; mov.b16 %rs3, %rs2; "
     "cvt.u64.u16 %rd4, %rs3; mov.b64 %rd5, %rd4; cvt.u32.u64 %r2, %rd5;", 5 + 0 * I),
    ("mov.b32 %r3, {1, 2}; mov.u32 %r2, %r3;", 0x20001 + 0 * I),
    ("mul.hi.u32 %r2, %r1, 0x80000000;", I // 2),
    ("mad.lo.s32 %r2, %r1, %r1, 7;", I * I + 7),
    ("sub.s32 %r3, %r1, 9; div.s32 %r2, %r3, 4;", np.trunc((I - 9) / 4).astype(int)),
    ("sub.s32 %r3, %r1, 9; shr.s32 %r2, %r3, 1;", (I - 9) >> 1),
    ("shl.b32 %r2, %r1, %r1;", (1 << I) * I),
    ("shr.u32 %r3, %r1, 1; shr.u32 %r4, 0x80000000, 40; or.b32 %r2, %r3, %r4;", I >> 1),
    ("bfe.s32 %r2, %r1, 1, 2;", np.array([0, 1, -2, -1])[I // 2 % 4]),
    ("bfe.u32 %r2, %r1, 1, 2;", I // 2 % 4),
    ("prmt.b32 %r2, %r1, 0xAB, 0x4440;", I + 0xABABAB00),
    ("prmt.b32 %r2, %r1, 0x7FAB, 0xDC08;", 0xFF0000 + I * 256),  # with 8: a byte's sign
    ("setp.lt.s32 %p1, %r1, 5; selp.b32 %r2, 1, 2, %p1;", np.where(I < 5, 1, 2)),
    ("mov.b32 %r2, 0; setp.gt.u32 %p1, %r1, 5; @!%p1 mov.b32 %r2, 4;", np.where(I > 5, 0, 4)),
    # predicates
    ("setp.lt.u32 %p1, %r1, 20; setp.gt.s32 %p2, %r1, 3; and.pred %p3, %p1, %p2; "
     "not.pred %p4, %p3; mov.pred %p5, %p4; selp.f32 %r2, 1, 2, %p5;",
     np.where((I < 20) & (I > 3), 2, 1)),
    ("mov.pred %p1, -1; selp.b32 %r2, %r1, 0, %p1;", I),
    ("setp.eq.b32 %p1, %r1, 4; setp.ne.b32 %p2, %r1, 4; selp.b32 %r3, 8, 0, %p1; "
     "selp.b32 %r4, 1, 0, %p2; add.s32 %r2, %r3, %r4;", np.where(I == 4, 8, 1)),
    ("cvt.u16.u32 %rs1, %r1; sub.s16 %rs2, %rs1, 9; setp.lt.s16 %p1, %rs2, 0; "
     "setp.lt.u16 %p2, %rs2, 9; setp.eq.b16 %p3, %rs1, 3; setp.ne.b16 %p4, %rs1, 5; "
     "selp.b16 %rs3, 1, 2, %p1; selp.b16 %rs4, 4, 8, %p2; selp.b16 %rs5, 16, 32, %p3; "
     "selp.b16 %rs6, 64, 128, %p4; or.b16 %rs7, %rs3, %rs4; or.b16 %rs8, %rs5, %rs6; "
     "or.b16 %rs9, %rs7, %rs8; cvt.u32.u16 %r2, %rs9;",
     np.where(I < 9, 1, 2) | np.where((I >= 9) & (I < 18), 4, 8) | np.where(I == 3, 16, 32)
     | np.where(I == 5, 128, 64)),
    ("cvt.u64.u32 %rd3, %r1; sub.s64 %rd4, %rd3, 9; setp.lt.s64 %p1, %rd4, 0; "
     "setp.lt.u64 %p2, %rd4, 9; setp.eq.b64 %p3, %rd4, 0; setp.ne.b64 %p4, %rd4, 1; "
     "selp.b64 %rd5, 1, 2, %p1; selp.b64 %rd6, 4, 8, %p2; selp.b64 %rd7, 16, 32, %p3; "
     "selp.b64 %rd8, 64, 128, %p4; or.b64 %rd9, %rd5, %rd6; or.b64 %rd10, %rd7, %rd8; "
     "or.b64 %rd11, %rd9, %rd10; cvt.u32.u64 %r2, %rd11;",
     np.where(I < 9, 1, 2) | np.where((I >= 9) & (I < 18), 4, 8) | np.where(I == 9, 16, 32)
     | np.where(I == 10, 128, 64)),
    (f"cvt.rn.f32.u32 %f1, %r1; setp.eq.f32 %p1, %f1, 0f40400000; setp.lt.f32 %p2, %f1, {NAN}; "
     f"setp.num.f32 %p3, %f1, %f1; setp.num.f32 %p4, %f1, {NAN}; selp.b32 %r3, 1, 0, %p1; "
     "selp.b32 %r4, 2, 0, %p2; selp.b32 %r5, 4, 0, %p3; selp.b32 %r6, 8, 0, %p4; "
     "or.b32 %r7, %r3, %r4; or.b32 %r8, %r5, %r6; or.b32 %r2, %r7, %r8;", (I == 3) + 4),
    ("mov.u32 %r2, 0; bra.uni $SECOND; $FIRST: add.s32 %r2, %r2, 1; $SECOND: "
     "add.s32 %r2, %r2, 10; setp.lt.s32 %p1, %r2, 40; @%p1 bra $FIRST;", 43 + 0 * I),
    # floats
    ("cvt.rn.f32.u32 %f1, %r1; add.f32 %f2, %f1, 0f3FC00000; sub.f32 %f3, %f2, 0f40000000; "
     "mul.f32 %r2, %f3, 0fC0800000;", bits((F - .5) * -4)),
    ("cvt.rn.f32.u32 %f1, %r1; add.rn.f32 %f2, %f1, 0f3F800000; mul.rn.f32 %f3, %f2, 0f3EAAAAAB; "
     "sub.rn.f32 %r2, %f3, 0f40000000;", bits((F + 1) * np.float32(1 / 3) - 2)),
    ("cvt.rn.f32.u32 %f1, %r1; div.full.f32 %r2, 0f3F800000, %f1;", bits([np.inf, *1 / F[1:]])),
    ("cvt.rn.f32.s32 %f1, %r1; add.f32 %f2, %f1, 0fC31B0000; ex2.approx.ftz.f32 %r2, %f2;",
     bits(np.where(F - 155 < -126, 0, np.exp2(np.float64(F - 155))))),  # 2^-155 .. 2^-124
    ("cvt.rn.f32.u32 %f1, %r1; fma.rn.ftz.f32 %r2, %f1, 0f00400000, 0f00000000;", 0 * I),
    ("cvt.rn.f32.u32 %f1, %r1; mul.f32 %r2, %f1, 0f00000001;", I),  # not flushed
    ("mov.b32 %f1, 0f3F800001; fma.rn.f32 %r2, %f1, %f1, 0fBF800002;",  # rounded once
     bits(F * 0 + 2.0**-46)),
    (f"cvt.rn.f32.u32 %f1, %r1; max.f32 %f2, %f1, 0f41100000; max.f32 %r2, {NAN}, %f2;",
     bits(np.maximum(F, 9))),
    ("mov.b32 %r3, 0f3F80A000; cvt.rna.tf32.f32 %r4, %r3; mov.b32 %r5, 0f3F801000; "
     "cvt.rna.tf32.f32 %r6, %r5; sub.s32 %r2, %r4, %r6;", 0x8000 + 0 * I),
    ("cvt.rn.bf16.u32 %rs1, %r1; cvt.f32.bf16 %f1, %rs1; add.f32 %f2, %f1, 0f3C000000; "
     "cvt.rn.bf16.f32 %rs2, %f2; mov.b32 %r2, {0, %rs2};",
     bits(torch.tensor(F + 2**-7).bfloat16().float().numpy())),
    ("cvt.rn.f16.u32 %rs1, %r1; cvt.f32.f16 %f1, %rs1; add.f32 %f2, %f1, 0f3A000000; "
     "cvt.rn.f16.f32 %rs2, %f2; cvt.f32.f16 %f3, %rs2; mov.b32 %r2, %f3;",
     bits((F + np.float32(2**-11)).astype(np.float16))),
    ("cvt.rn.f32.s32 %r3, %r1; cvt.rn.f16x2.f32 %r2, %r3, 0f3F800000;",
     F.astype(np.float16).view(np.uint16).astype(np.int64) * 2**16 + 0x3C00),
    # lanes
    ("shfl.sync.bfly.b32 %r2, %r1, 5, 31, -1;", I ^ 5),
    ("shfl.sync.idx.b32 %r2, %r1, 3, 31, -1;", I * 0 + 3),
    ("cvt.rn.f32.s32 %r3, %r1; cvt.rn.bf16x2.f32 %r2, %r3, 0f3F800000;",
     (I.astype(np.float32).view(np.uint32) & 0xFFFF0000) + 0x3F80),
    # memory
    ("shl.b32 %r3, %r1, 2; st.shared.b32 [%r3], %r1; xor.b32 %r4, %r3, 12; "
     "ld.shared.b32 %r2, [%r4];", I ^ 3),
    ("shl.b32 %r3, %r1, 2; cvt.u16.u32 %rs1, %r1; st.shared.b16 [%r3], %rs1; "
     "st.shared.b16 [%r3+2], 3; ld.shared.v2.b16 {%rs2, %rs3}, [%r3]; mov.b32 %r2, {%rs3, %rs2};",
     I * 2**16 + 3),
    ("shl.b32 %r3, %r1, 1; sub.s32 %r4, %r1, 9; cvt.u16.u32 %rs1, %r4; "
     "st.shared.b16 [%r3], %rs1; ld.shared.s16 %r2, [%r3];", I - 9),
    ("shl.b32 %r3, %r1, 2; ld.shared.b32 %r2, [%r3];", 0 * I - 1),  # never written: garbage
    ("shl.b32 %r3, %r1, 3; cvt.u16.u32 %rs1, %r1; st.shared.v2.b16 [%r3], {%rs1, 5}; "
     "st.shared.v2.b16 [%r3+4], {6, 7}; ld.shared.v4.b16 {%rs2, %rs3, %rs4, %rs5}, [%r3]; "
     "st.shared.v4.b16 [%r3], {%rs5, %rs4, %rs3, %rs2}; ld.shared.v2.b32 {%r4, %r5}, [%r3]; "
     "ld.shared.b16 %rs6, [%r3+6]; cvt.u32.u16 %r6, %rs6; xor.b32 %r7, %r4, %r5; "
     "xor.b32 %r2, %r7, %r6;", (7 + 6 * 2**16) ^ (5 + I * 2**16) ^ I),
    ("shl.b32 %r3, %r1, 4; st.shared.v2.b32 [%r3+8], {%r1, 2}; "
     "st.shared.v4.b32 [%r3], {4, 3, %r1, 2}; ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r3]; "
     "mad.lo.s32 %r8, %r4, %r6, %r5; sub.s32 %r2, %r8, %r7;", 4 * I + 1),
    ("cvt.u16.u32 %rs1, %r1; st.global.b16 [%rd2], %rs1; st.global.b16 [%rd2+2], 9; "
     "ld.global.b16 %rs2, [%rd2]; ld.global.b32 %r3, [%rd2]; cvt.u32.u16 %r4, %rs2; "
     "add.s32 %r2, %r3, %r4;", 9 * 2**16 + 2 * I),
    ("and.b32 %r3, %r1, 7; mad.wide.u32 %rd3, %r3, 16, %rd1; setp.lt.u32 %p1, %r1, 8; "
     "@%p1 st.global.v4.b32 [%rd3], {%r1, 5, 6, 7}; "
     "ld.global.v2.b32 {%r4, %r5}, [%rd3]; ld.global.b64 %rd4, [%rd3+8]; cvt.u32.u64 %r6, %rd4; "
     "ld.global.v4.b32 {%r7, %r8, %r9, %r10}, [%rd3]; mad.lo.s32 %r11, %r4, %r5, %r6; "
     "mad.lo.s32 %r2, %r7, %r10, %r11;", I % 8 * 12 + 6),
    ("ld.param.b32 %r3, [k_param_0]; ld.param.s32 %r4, [k_param_0]; cvt.u32.u64 %r5, %rd1; "
     "sub.s32 %r6, %r3, %r5; sub.s32 %r7, %r4, %r5; or.b32 %r2, %r6, %r7;", 0 * I),
])
def test_instruction(line, expected):
    found = execute(line + "st.global.b32 [%rd2], %r2;")
    np.testing.assert_array_equal(found, (expected & 0xFFFFFFFF).astype(np.uint32))


EXCHANGE = ("shl.b32 %r3, %r1, 2; st.shared.b32 [%r3], %r1; bar.sync 0; xor.b32 %r4, %r3, 128; "
            "ld.shared.b32 %r2, [%r4]; st.global.b32 [%rd2], %r2;")
COPY = ("st.global.b32 [%rd2], %r1; shl.b32 %r3, %r1, 2; "
        "cp.async.ca.shared.global [%r3], [%rd2], 4; cp.async.commit_group; "
        "cp.async.wait_group 0; ld.shared.b32 %r2, [%r3];"
        "st.global.b32 [%rd2], %r2;")


def test_barriers_and_waits():
    assert (execute(EXCHANGE, 2) == np.arange(64) ^ 32).all()
    assert (execute(COPY) == I).all()
    with pytest.raises(ptx.Fault, match="before its copy was waited for"):
        execute(COPY.replace("wait_group 0", "wait_group 1"))


@pytest.mark.parametrize("body, options, words", [
    (EXCHANGE.replace("bar.sync 0;", ""), dict(warps=2), "race"),
    (EXCHANGE, dict(warps=2, shared=252), "out of bounds"),
    ("setp.lt.u32 %p1, %r1, 32; @%p1 st.shared.b32 [%r4], 1; @!%p1 st.shared.b32 [%r4], 2;"
     .replace("%r4", "global_smem"), dict(warps=2), "race"),
    ("st.global.b32 [%rd2+4], %r1;", {}, "out of bounds"),
    ("st.global.b32 [%rd2], %r1;", dict(grid=(2,)), "race"),
    ("mov.u32 %r3, %ctaid.x; setp.eq.u32 %p1, %r3, 0; @%p1 st.global.b32 [%rd2], %r1; "
     "@!%p1 ld.global.b32 %r4, [%rd2];", dict(grid=(2,)), "race"),
    (EXCHANGE + "cp.async.ca.shared.global [%r3], [%rd2], 4; cp.async.commit_group; bar.sync 0; "
     "cp.async.wait_group 0;", dict(warps=2), "race"),
    ("setp.lt.u32 %p1, %r1, 5; @%p1 bra $END; $END:", {}, "branch differently"),
    ("st.global.b32 [%rd1], %r1;", {}, "lanes of a store differ"),
    ("st.global.b32 [%rd2+2], %r1;", {}, "misaligned"),
    ("brev.b32 %r2, %r1;", {}, "brev.b32"),
])
def test_fault(body, options, words):
    with pytest.raises(ptx.Fault, match=words):
        execute(body, **options)


# ----------------------------------------------------------------------------------------- matrices
# What lies in which lane's register is written here as the PTX manual gives it, lane by lane:
# g = lane / 4, t = lane % 4.

# lane l gives row l % 8 of matrix l / 8, here the bytes from 16 (31 - l) on, of the halves 0 .. 255
HALVES = ("shl.b32 %r3, %r1, 4; shl.b32 %r4, %r1, 2; mad.lo.s32 %r5, %r4, 0x20002, 0x10000; "
          "add.s32 %r6, %r5, 0x20002; add.s32 %r7, %r6, 0x20002; add.s32 %r8, %r7, 0x20002; "
          "st.shared.v4.b32 [%r3], {%r5, %r6, %r7, %r8}; sub.s32 %r9, 496, %r3; "
          "mad.wide.u32 %rd7, %r1, 16, %rd1; ")
OUT_FOUR = "st.global.v4.b32 [%rd7], {%r10, %r11, %r12, %r13};"


def matrix_words(transposed: bool):
    """Registers (lane, matrix) of the halves read so."""
    found = np.zeros((32, 4), np.int64)
    for lane, matrix in np.ndindex(32, 4):
        g, t = divmod(lane, 4)
        places = [(2 * t, g), (2 * t + 1, g)] if transposed else [(g, 2 * t), (g, 2 * t + 1)]
        low, high = (8 * (31 - 8 * matrix - row) + column for row, column in places)
        found[lane, matrix] = low | high << 16
    return found


@pytest.mark.parametrize("count, trans", [(1, ""), (4, ""), (4, ".trans")])
def test_matrices_of_8_rows(count, trans):
    names = ", ".join(f"%r{10 + i}" for i in range(count))
    load = f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{names}}}, [%r9]; "
    found = execute(HALVES + load + OUT_FOUR, words=4).reshape(32, 4)
    np.testing.assert_array_equal(found[:, :count], matrix_words(bool(trans))[:, :count])
    # stored with the same addresses they are where they were, among zeros
    store = f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r9], {{{names}}}; "
    zeros = "st.shared.v4.b32 [%r3], {0, 0, 0, 0}; "
    again = "ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r3]; "
    found = execute(HALVES + load + zeros + store + again + OUT_FOUR, words=4)
    np.testing.assert_array_equal(found[-32 * count:], (0x10000 + 0x20002 * np.arange(128))[
        -32 * count:])
    assert not found[: -32 * count].any()


def test_copies_of_fewer_bytes_fill_with_zeros():
    """cp.async.cg of 16 bytes, of which the last operand says how many are read."""
    found = execute(
        "mad.wide.u32 %rd7, %r1, 16, %rd1; st.global.v4.b32 [%rd7], {%r1, 1, 2, 3}; "
        "shl.b32 %r3, %r1, 4; and.b32 %r4, %r1, 1; shl.b32 %r4, %r4, 4; "  # odd lanes: 16 bytes
        "cp.async.cg.shared.global [%r3], [%rd7], 0x10, %r4; cp.async.commit_group; "
        "cp.async.wait_group 0; ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r3]; " + OUT_FOUR,
        words=4)
    odd = I % 2
    np.testing.assert_array_equal(found.reshape(32, 4), np.stack([I, 1 + 0 * I, 2 + 0 * I,
                                                                  3 + 0 * I], 1) * odd[:, None])


KINDS = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}


def words(values):
    """A row of each lane's numbers (lanes, n) as 32-bit words."""
    return values.contiguous().view(torch.int32)


def cut(values):
    """In float64, what tensor cores read: of a float32 the upper 19 bits."""
    if values.dtype == torch.float32:
        values = (values.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return values.double()


def left_words(a, kind):
    """A (16, K) as the registers a0 .. a3 of 32 lanes: (32, 4) words."""
    lanes = []
    for lane in range(32):
        g, t = divmod(lane, 4)
        if kind == "tf32":  # K = 8
            places = [[(g, t)], [(g + 8, t)], [(g, t + 4)], [(g + 8, t + 4)]]
        else:  # K = 16
            places = [[(row, column), (row, column + 1)] for column in (2 * t, 2 * t + 8)
                      for row in (g, g + 8)]
        lanes.append(torch.stack([a[place] for register in places for place in register]))
    return words(torch.stack(lanes))


def right_words(b, kind):
    """B (K, 8) as the registers b0, b1 of 32 lanes: (32, 2) words."""
    lanes = []
    for lane in range(32):
        g, t = divmod(lane, 4)
        rows = [t, t + 4] if kind == "tf32" else [2 * t, 2 * t + 1, 2 * t + 8, 2 * t + 9]
        lanes.append(torch.stack([b[row, g] for row in rows]))
    return words(torch.stack(lanes))


def result_matrix(found, rows=16, columns=8):
    """D from the registers of each lane, 4 for each 8 columns; a warp has 16 rows."""
    d = np.full((rows, columns), np.nan, np.float32)
    for lane, registers in enumerate(found.view(np.float32).reshape(-1, columns // 2)):
        warp, (g, t) = lane // 32, divmod(lane % 32, 4)
        for i, value in enumerate(registers):
            tile, i = divmod(i, 4)
            d[16 * warp + g + 8 * (i // 2), 8 * tile + 2 * t + i % 2] = value
    return d


LOAD_A = ("ld.param.b64 %rd3, [k_param_1]; mad.wide.u32 %rd4, %r1, 16, %rd3; "
          "ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd4]; ")
STORE_D = ("mad.wide.u32 %rd7, %r1, 16, %rd1; "
           "st.global.v4.b32 [%rd7], {%f1, %f2, %f3, %f4};")


@pytest.mark.parametrize("kind", KINDS)
def test_mma(kind):
    generator, K = torch.Generator().manual_seed(0), 8 if kind == "tf32" else 16
    a, b = (torch.randn(size, generator=generator).to(KINDS[kind]) for size in ((16, K), (K, 8)))
    found = execute(
        LOAD_A + "ld.param.b64 %rd5, [k_param_2]; mad.wide.u32 %rd6, %r1, 8, %rd5; "
        "ld.global.v2.b32 {%r14, %r15}, [%rd6]; mov.b32 %f5, 0f3F800000; "
        "mov.b32 %f6, 0f40000000; mov.b32 %f7, 0f40400000; mov.b32 %f8, 0f40800000; "
        f"mma.sync.aligned.m16n8k{K}.row.col.f32.{kind}.{kind}.f32 {{%f1, %f2, %f3, %f4}}, "
        "{%r10, %r11, %r12, %r13}, {%r14, %r15}, {%f5, %f6, %f7, %f8}; " + STORE_D,
        inputs=[left_words(a, kind), right_words(b, kind)], words=4)
    c = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat_interleave(8, 0).repeat(1, 4)
    expected = cut(a) @ cut(b) + c
    np.testing.assert_allclose(result_matrix(found), expected.numpy(), rtol=1e-5, atol=1e-5)


def shared_image(memory, matrix, start, width, leading, stride, along_k):
    """Lays a matrix (rows, K) into bytes as a descriptor of these four numbers has it.

    along_k: 8 rows of `width` bytes of k each, 8 rows further after `stride` bytes. Else each k
    has `width` bytes of rows, k + 8 follows after `stride`, the rows beyond `width` after
    `leading`. Then the 16-byte pieces of each `width` are permuted by the number of the 128 bytes
    that they lie in.
    """
    size = matrix.element_size()
    values = matrix.view(torch.uint8).numpy().reshape(*matrix.shape, size)
    for row, k in np.ndindex(*matrix.shape):
        if along_k:
            place = start + row // 8 * stride + row % 8 * width + k * size
        else:
            beyond, within = divmod(row * size, width)
            place = start + beyond * leading + k // 8 * stride + k % 8 * width + within
        line, byte = divmod(place, 128)
        piece, byte = divmod(byte, 16)
        piece ^= line % (width // 16)
        memory[128 * line + 16 * piece + byte :][:size] = values[row, k]


def packed_descriptor(start, width, leading, stride):
    kind = {128: 1, 64: 2, 32: 3}[width]
    bits = start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | kind << 62
    return bits - 2**64 if bits >= 2**63 else bits


def wgmma(kind, columns, left, right, accumulate=False, edit=("", "")):
    """(D, A B or 1 + A B): D (64, columns), A and B in shared memory as `left` and `right` lay them
    out, or A in registers (None). `edit`: what is replaced in the program, and by what."""
    generator, K = torch.Generator().manual_seed(2), 8 if kind == "tf32" else 16
    a, b = (torch.randn(n, K, generator=generator).to(KINDS[kind]) for n in (64, columns))
    memory = np.zeros(16384, np.uint8)
    shared_image(memory, b, *right)
    registers = [f"%f{i}" for i in range(columns // 2)]
    if left:
        shared_image(memory, a, *left)
        source, inputs = "%rd9", [torch.zeros(128, 4, dtype=torch.int32)]
    else:
        source = "{%r10, %r11, %r12, %r13}"
        inputs = [torch.cat([left_words(a[16 * warp:][:16], kind) for warp in range(4)])]
    transposed = [str(int(not layout[4])) for layout in (left, right) if layout]
    body = (
        LOAD_A + "ld.param.b64 %rd5, [k_param_2]; mad.wide.u32 %rd6, %r1, 128, %rd5; "
        "mul.lo.u32 %r14, %r1, 128; "
        + " ".join(f"ld.global.b32 %r15, [%rd6+{i}]; st.shared.b32 [%r14+{i}], %r15;"
                   for i in range(0, 128, 4))
        + "fence.proxy.async.shared::cta; bar.sync 0; "
        + " ".join(f"mov.b32 {name}, 0f3F800000;" for name in registers * accumulate)
        + f"setp.ne.u32 %p2, {int(accumulate)}, 0; "
        "ld.param.b64 %rd8, [k_param_3]; ld.param.b64 %rd9, [k_param_4]; "
        "wgmma.fence.sync.aligned; "
        f"wgmma.mma_async.sync.aligned.m64n{columns}k{K}.f32.{kind}.{kind} "
        f"{{{', '.join(registers)}}}, {source}, "
        f"%rd8, %p2, 1, 1{', '.join(['', *transposed]) if kind != 'tf32' else ''}; "
        "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; "
        f"mad.wide.u32 %rd7, %r1, {2 * columns}, %rd1; "
        + " ".join(f"st.global.b32 [%rd7+{4 * i}], {name};" for i, name in enumerate(registers)))
    assert edit[0] in body
    descriptors = [packed_descriptor(*layout[:4]) if layout else 0 for layout in (right, left)]
    found = execute(body.replace(*edit), 4, 16384, words=columns // 2,
                    inputs=[*inputs, torch.from_numpy(memory), *descriptors])
    return result_matrix(found, 64, columns), (cut(a) @ cut(b).T + accumulate).numpy()


@pytest.mark.parametrize("kind, columns, left, right, accumulate", [
    # (start, width, leading, stride, along k) of A, None: in registers; and of B
    ("f16", 24, None, (1024, 32, 16, 256, True), True),
    ("bf16", 24, (0, 128, 16, 1024, True), (8192 + 32, 128, 16, 1024, True), False),  # k >= 16 of B
    ("f16", 16, (0, 64, 16, 512, True), (4096, 32, 16, 256, False), False),
    ("bf16", 64, (0, 128, 16, 1024, False), (8192, 64, 512, 1024, False), True),
    ("bf16", 128, None, (0, 128, 2048, 1024, False), False),
    ("tf32", 40, None, (0, 32, 16, 256, True), False),
    ("tf32", 8, (0, 64, 16, 512, True), (8192, 128, 16, 1024, True), True),
])
def test_wgmma(kind, columns, left, right, accumulate):
    found, expected = wgmma(kind, columns, left, right, accumulate)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


A_IN_REGISTERS = ("f16", 8, None, (1024, 32, 16, 256, True))
A_IN_SHARED_MEMORY = ("tf32", 8, (0, 64, 16, 512, True), (8192, 128, 16, 1024, True))
REGISTER_FENCE = "wgmma.fence.sync.aligned; "


def test_wgmma_is_done_when_it_is_waited_for():
    late = ("wait_group.sync.aligned 0", "wait_group.sync.aligned 1")
    found, _ = wgmma(*A_IN_REGISTERS, accumulate=True, edit=late)
    assert np.isnan(found).all()  # garbage until then


@pytest.mark.parametrize("layout", [A_IN_REGISTERS, A_IN_SHARED_MEMORY])
@pytest.mark.parametrize("line, by, words", [
    # shared memory that was just stored
    ("fence.proxy.async.shared::cta;", "", "not fenced"), ("bar.sync 0;", "", "race"),
    # registers touched since the last wgmma.fence: no fence, which untouched ones need too; written
    # and read behind it
    (REGISTER_FENCE, "", "since the last wgmma.fence"),
    (REGISTER_FENCE, REGISTER_FENCE + "add.f32 %f2, %f9, %f9; ", "since the last wgmma.fence"),
    (REGISTER_FENCE, REGISTER_FENCE + "add.f32 %f9, %f2, %f2; ", "since the last wgmma.fence"),
    # an operand that changes before the product is done
    ("wgmma.wait_group", "st.shared.b32 [%r14], 0; wgmma.wait_group", "race|changed before"),
])
def test_wgmma_needs_fences_barriers_and_waits(layout, line, by, words):
    with pytest.raises(ptx.Fault, match=words):
        wgmma(*layout, edit=(line, by))


def test_registers_that_wgmma_reads_may_not_change_before_it_is_done():
    with pytest.raises(ptx.Fault, match="changed before it was waited for"):
        wgmma(*A_IN_REGISTERS, edit=("wgmma.wait_group", "mov.b32 %r10, 0; wgmma.wait_group"))
