"""ptx.py itself: small programs with known results, and faults that it must see."""

import numpy as np
import pytest
import torch

import ptx

HEAD = ".visible .entry k({})\n{{\n"
START = "ld.param.b64 %rd1, [k_param_0]; mov.u32 %r1, %tid.x; mad.wide.u32 %rd2, %r1, 4, %rd1;"
I = np.arange(32, dtype=np.int64)


def execute(body, warps=1, shared=4096, grid=(1,), inputs=(), words=1):
    """What a program leaves in its first parameter, `words` numbers a thread."""
    out = torch.zeros(32 * warps * words, dtype=torch.int32)
    parameters = ", ".join(f".param .u64 k_param_{i}" for i in range(1 + len(inputs)))
    code = f"{HEAD.format(parameters)}{START}{body} ret;\n}}\n"
    ptx.run(ptx.parse(code, shared, warps), grid, [out, *inputs])
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
    with pytest.raises(ptx.Fault, match="before its copy was waited for"):
        execute(COPY.replace("wait_group 0", "wait_group 1"))


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


# ----------------------------------------------------------------------------------------- matrices
# What lies in which lane's register is written here as the PTX manual gives it, lane by lane:
# g = lane / 4, t = lane % 4.

# the 8 x 8 matrix 0 .. 63 in shared memory, two numbers to a lane's word; %r6: row 7 - lane % 8
PAIRS = I * 0x20002 + 0x10000
MATRIX = ("mad.lo.s32 %r4, %r1, 0x20002, 0x10000; shl.b32 %r3, %r1, 2; st.shared.b32 [%r3], %r4; "
          "and.b32 %r5, %r1, 7; shl.b32 %r5, %r5, 4; sub.s32 %r6, 112, %r5; ")


def element(row, column):
    """Of the matrix that MATRIX stores: row r's two numbers for one lane."""
    return row * 8 + column


def pair(low, high):
    return low | high << 16


@pytest.mark.parametrize("line, expected", [
    ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r6];",
     pair(element(7 - I // 4, 2 * (I % 4)), element(7 - I // 4, 2 * (I % 4) + 1))),
    ("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r2}, [%r5];",
     pair(element(2 * (I % 4), I // 4), element(2 * (I % 4) + 1, I // 4))),
    ("shr.u32 %r8, %r1, 3; and.b32 %r8, %r8, 1; setp.eq.u32 %p1, %r8, 0; "  # lanes 8 to 15: row i
     "selp.b32 %r7, %r6, %r5, %p1; "
     "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r9, %r2}, [%r7]; sub.s32 %r2, %r2, %r9;",
     PAIRS - pair(element(7 - I // 4, 2 * (I % 4)), element(7 - I // 4, 2 * (I % 4) + 1))),
    ("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r6], {%r4}; ld.shared.b32 %r2, [%r3];",
     pair(element(7 - I // 4, 2 * (I % 4)), element(7 - I // 4, 2 * (I % 4) + 1))),
    ("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%r5], {%r4}; ld.shared.b32 %r2, [%r3];",
     pair(element(2 * (I % 4), I // 4), element(2 * (I % 4) + 1, I // 4))),
])
def test_matrices_of_8_rows(line, expected):
    found = execute(MATRIX + line + "st.global.b32 [%rd2], %r2;")
    np.testing.assert_array_equal(found, (expected & 0xFFFFFFFF).astype(np.uint32))


KINDS = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}


def words(values):
    """A row of each lane's numbers (lanes, n) as 32-bit words."""
    return values.contiguous().view(torch.int32)


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
    a, b = torch.randn(16, K, generator=generator), torch.randn(K, 8, generator=generator)
    a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) if kind == "tf32"
            else x.to(KINDS[kind]) for x in (a, b))
    found = execute(
        LOAD_A + "ld.param.b64 %rd5, [k_param_2]; mad.wide.u32 %rd6, %r1, 8, %rd5; "
        "ld.global.v2.b32 {%r14, %r15}, [%rd6]; mov.b32 %f5, 0f3F800000; "
        f"mma.sync.aligned.m16n8k{K}.row.col.f32.{kind}.{kind}.f32 {{%f1, %f2, %f3, %f4}}, "
        "{%r10, %r11, %r12, %r13}, {%r14, %r15}, {%f5, %f5, %f5, %f5}; " + STORE_D,
        inputs=[left_words(a, kind), right_words(b, kind)], words=4)
    expected = a.double() @ b.double() + 1
    np.testing.assert_allclose(result_matrix(found), expected.numpy(), rtol=1e-5, atol=1e-5)


WGMMA = (LOAD_A + "ld.param.b64 %rd5, [k_param_2]; mad.wide.u32 %rd6, %r1, 8, %rd5; "
         "ld.global.v2.b32 {%r14, %r15}, [%rd6]; setp.lt.u32 %p1, %r1, 64; "  # a word, its place
         "@%p1 st.shared.b32 [%r15], %r14; fence.proxy.async.shared::cta; bar.sync 0; "
         "ld.param.b64 %rd8, [k_param_3]; setp.ne.u32 %p2, 1, 0; "
         "mov.b32 %f1, 0f3F800000; mov.b32 %f2, %f1; mov.b32 %f3, %f1; mov.b32 %f4, %f1; "
         "wgmma.fence.sync.aligned; "
         "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f1, %f2, %f3, %f4}, "
         "{%r10, %r11, %r12, %r13}, %rd8, %p2, 1, 1, 0; "
         "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; " + STORE_D)


def wgmma(body, start=256):
    """(D, A B + 1): A (64, 16) in four warps' registers, B (16, 8) in shared memory from `start`.

    B lies by columns of 16 numbers, 32 bytes, in whose swizzle the address's bit 4 is flipped
    where its bit 7 is set.
    """
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(64, 16, generator=generator).half()
    b = torch.randn(16, 8, generator=generator).half()
    left = torch.cat([left_words(a[16 * warp:16 * warp + 16], "f16") for warp in range(4)])
    places = start + 4 * torch.arange(64)  # of each pair of numbers
    places = places ^ ((places >> 7 & 1) << 4)
    stored = torch.zeros(128, 2, dtype=torch.int32)
    stored[:64, 0], stored[:64, 1] = words(b.T.contiguous()).flatten(), places.int()
    descriptor = start >> 4 | 1 << 16 | (256 >> 4) << 32 | 3 << 62
    found = execute(body, 4, inputs=[left, stored, descriptor - 2**64], words=4)
    return result_matrix(found, 64), (a.double() @ b.double() + 1).numpy()


def test_wgmma():
    found, expected = wgmma(WGMMA)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_wgmma_is_done_when_it_is_waited_for():
    found, _ = wgmma(WGMMA.replace("wait_group.sync.aligned 0", "wait_group.sync.aligned 1"))
    assert np.isnan(found).all()  # garbage until then


@pytest.mark.parametrize("line, words", [
    ("fence.proxy.async.shared::cta;", "not fenced"), ("bar.sync 0;", "race|not fenced"),
])
def test_wgmma_of_what_was_just_stored(line, words):
    with pytest.raises(ptx.Fault, match=words):
        wgmma(WGMMA.replace(line, ""))


@pytest.mark.parametrize("line", ["wgmma.fence.sync.aligned;", "mov.b32 %f2, %f1;"])
def test_wgmma_of_registers_that_were_not_fenced(line):
    """No fence; a register written behind the fence."""
    moved = "" if line.startswith("wgmma") else line + " add.f32 %f2, %f2, 0f00000000;"
    body = WGMMA.replace("wgmma.fence.sync.aligned;", "") if not moved else WGMMA.replace(
        "wgmma.mma_async", moved + " wgmma.mma_async")
    with pytest.raises(ptx.Fault, match="since the last wgmma.fence"):
        wgmma(body)


@pytest.mark.parametrize("line, words", [
    ("mov.b32 %r10, 0;", "changed before it was waited for"),
    ("@%p1 st.shared.b32 [%r15], 0;", "race|changed before it was waited for"),
])
def test_what_wgmma_reads_may_not_change_before_it_is_done(line, words):
    with pytest.raises(ptx.Fault, match=words):
        wgmma(WGMMA.replace("wgmma.wait_group", line + " wgmma.wait_group"))


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


@pytest.mark.parametrize("kind, columns, left, right", [
    # (start, width, leading, stride, along k) of A, None: in registers; and of B
    ("f16", 24, None, (1024, 32, 16, 256, True)),
    ("bf16", 24, (0, 128, 16, 1024, True), (8192 + 32, 128, 16, 1024, True)),  # k = 16 .. 31 of B
    ("f16", 16, (0, 64, 16, 512, True), (4096, 32, 16, 256, False)),
    ("bf16", 64, (0, 128, 16, 1024, False), (8192, 64, 512, 1024, False)),
    ("bf16", 128, None, (0, 128, 2048, 1024, False)),
    ("tf32", 40, None, (0, 32, 16, 256, True)),
    ("tf32", 8, (0, 64, 16, 512, True), (8192, 128, 16, 1024, True)),
])
def test_wgmma_of_several_tiles(kind, columns, left, right):
    """D (64, columns) = A B, from registers and from shared memory in each of its layouts."""
    generator, K = torch.Generator().manual_seed(2), 8 if kind == "tf32" else 16
    a, b = (torch.randn(n, K, generator=generator) for n in (64, columns))
    a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) if kind == "tf32"
            else x.to(KINDS[kind]) for x in (a, b))
    memory = np.zeros(16384, np.uint8)
    shared_image(memory, b, *right)
    d = ", ".join(f"%f{i}" for i in range(columns // 2))
    if left:
        shared_image(memory, a, *left)
        source, inputs = "%rd9", [torch.zeros(128, 4, dtype=torch.int32)]
    else:
        source = "{%r10, %r11, %r12, %r13}"
        inputs = [torch.cat([left_words(a[16 * warp:][:16], kind) for warp in range(4)])]
    transposed = [str(int(not layout[4])) for layout in (left, right) if layout]
    stores = " ".join(f"st.global.b32 [%rd7+{4 * i}], %f{i};" for i in range(columns // 2))
    body = (
        LOAD_A + "ld.param.b64 %rd5, [k_param_2]; mad.wide.u32 %rd6, %r1, 128, %rd5; "
        "mul.lo.u32 %r14, %r1, 128; "
        + " ".join(f"ld.global.b32 %r15, [%rd6+{i}]; st.shared.b32 [%r14+{i}], %r15;"
                   for i in range(0, 128, 4))
        + "fence.proxy.async.shared::cta; bar.sync 0; "
        "ld.param.b64 %rd8, [k_param_3]; ld.param.b64 %rd9, [k_param_4]; setp.ne.u32 %p2, 0, 0; "
        "wgmma.fence.sync.aligned; "
        f"wgmma.mma_async.sync.aligned.m64n{columns}k{K}.f32.{kind}.{kind} {{{d}}}, {source}, "
        f"%rd8, %p2, 1, 1{', '.join(['', *transposed]) if kind != 'tf32' else ''}; "
        "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; "
        f"mad.wide.u32 %rd7, %r1, {2 * columns}, %rd1; " + stores)
    descriptors = [packed_descriptor(*layout[:4]) if layout else 0 for layout in (right, left)]
    found = execute(body, 4, 16384, inputs=[*inputs, torch.from_numpy(memory), *descriptors],
                    words=columns // 2)
    expected = (a.double() @ b.double().T).numpy()
    np.testing.assert_allclose(result_matrix(found, 64, columns), expected, rtol=1e-5, atol=1e-5)
