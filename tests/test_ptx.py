"""ptx.py itself: small programs with known results, and faults that it must see."""

import numpy as np
import pytest
import torch

import ptx

HEAD = ".visible .entry k(.param .u64 k_param_0)\n{\n"
START = "ld.param.b64 %rd1, [k_param_0]; mov.u32 %r1, %tid.x; mad.wide.u32 %rd2, %r1, 4, %rd1;"
I = np.arange(32, dtype=np.int64)


def execute(body, warps=1, shared=4096, grid=(1,)):
    out = torch.zeros(32 * warps, dtype=torch.int32)
    code = f"{HEAD}{START}{body} ret;\n}}\n"
    ptx.run(ptx.parse(code, shared, warps), grid, [out])
    return out.numpy().view(np.uint32)


@pytest.mark.parametrize("line, expected", [
    ("add.s32 %r2, %r1, -3;", I - 3),
    ("mul.hi.u32 %r2, %r1, 0x80000000;", I // 2),
    ("mad.lo.s32 %r2, %r1, %r1, 7;", I * I + 7),
    ("sub.s32 %r3, %r1, 9; div.s32 %r2, %r3, 4;", np.trunc((I - 9) / 4).astype(int)),
    ("sub.s32 %r3, %r1, 9; shr.s32 %r2, %r3, 1;", (I - 9) >> 1),
    ("shl.b32 %r2, %r1, %r1;", (1 << I) * I),
    ("bfe.s32 %r2, %r1, 1, 2;", np.array([0, 1, -2, -1])[I // 2 % 4]),
    ("prmt.b32 %r2, %r1, 0xAB, 0x4440;", I + 0xABABAB00),
    ("setp.lt.s32 %p1, %r1, 5; selp.b32 %r2, 1, 2, %p1;", np.where(I < 5, 1, 2)),
    ("mov.b32 %r2, 0; setp.gt.u32 %p1, %r1, 5; @!%p1 mov.b32 %r2, 4;", np.where(I > 5, 0, 4)),
    ("shfl.sync.bfly.b32 %r2, %r1, 5, 31, -1;", I ^ 5),
    ("shfl.sync.idx.b32 %r2, %r1, 3, 31, -1;", I * 0 + 3),
    ("cvt.rn.f32.s32 %r3, %r1; fma.rn.f32 %r4, %r3, %r3, 0f3F800000; cvt.rzi.s32.f32 %r2, %r4;",
     I * I + 1),
    ("cvt.rn.f32.s32 %r3, %r1; cvt.rn.bf16x2.f32 %r2, %r3, 0f3F800000;",
     (I.astype(np.float32).view(np.uint32) & 0xFFFF0000) + 0x3F80),
    ("shl.b32 %r3, %r1, 2; st.shared.b32 [%r3], %r1; xor.b32 %r4, %r3, 12; "
     "ld.shared.b32 %r2, [%r4];", I ^ 3),
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
    assert (execute(COPY.replace("wait_group 0", "wait_group 1")) == 0xFFFFFFFF).all()


@pytest.mark.parametrize("body, options, words", [
    (EXCHANGE.replace("bar.sync 0;", ""), dict(warps=2), "race"),
    (EXCHANGE, dict(warps=2, shared=252), "out of bounds"),
    ("st.global.b32 [%rd2+4], %r1;", {}, "out of bounds"),
    ("st.global.b32 [%rd2], %r1;", dict(grid=(2,)), "race"),
    ("st.global.b32 [%rd1], %r1;", {}, "lanes of a store differ"),
    ("st.global.b32 [%rd2+2], %r1;", {}, "misaligned"),
    ("brev.b32 %r2, %r1;", {}, "brev.b32"),
])
def test_fault(body, options, words):
    with pytest.raises(ptx.Fault, match=words):
        execute(body, **options)
