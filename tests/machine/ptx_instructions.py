"""PTX's instructions in numpy, for ptx.py: what each does to a program's registers and memory.

An instruction is a function of (program, step, active): the ptx.Program, the ptx.Instruction, and
which threads take part. Registers are arrays with one number per thread.
"""

import functools
import itertools
import re
from typing import Any, NamedTuple

import numpy as np


class Fault(Exception):
    """What a GPU would do wrong, or what this file cannot execute."""


# --------------------------------------------------------------------------------- number formats

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # by bytes
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
REGISTERS = {"r": 4, "rd": 8, "rs": 2, "f": 4, "p": 0}  # bytes, by a name's first letters
TYPES = {f"{letter}{8 * size}": np.dtype(kinds[size])
         for letter, kinds in (("b", UNSIGNED), ("u", UNSIGNED), ("s", SIGNED)) for size in kinds}
TYPES |= {"f16": np.dtype(np.float16), "f32": np.dtype(np.float32),
          "bf16": np.dtype(np.uint16), "pred": np.dtype(bool)}  # numpy has no bfloat16


def widen(bits):
    """bfloat16 bits -> float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values):
    """float32 -> bfloat16 bits, to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits.astype(np.uint64) + 0x7FFF + even) >> np.uint64(16)
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def flush(values):
    """.ftz: subnormal numbers become zeros of their sign."""
    tiny = np.abs(values) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), values), values).astype(np.float32)


def rounded(values, kind):
    """Numbers as those of another type, bfloat16 as bits."""
    return narrow(values) if kind == "bf16" else values.astype(TYPES[kind])


def exact(bits, kind):
    """What tensor cores read, in float32. Of tf32 that is the upper 19 bits."""
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    return widen(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def size_of(kind):
    """Bytes of one operand's number in a matrix product."""
    return 4 if kind == "tf32" else 2


# ------------------------------------------------------------------------------- moves, conversions


def names_of(operand):
    return operand if isinstance(operand, tuple) else (operand,)


def gather(program, operand, size):
    """A register of `size` bytes, or several side by side, the lowest bits first: bytes (n, ..)."""
    words = [program.get(name, f"b{8 * size}") for name in names_of(operand)]
    return np.stack(words, 1).view(np.uint8)


def scatter(program, operand, data, dtype, active=None):
    """Its inverse; `dtype` of one."""
    for name, word in zip(names_of(operand), data.view(dtype).T, strict=True):
        program.put(name, word, active)


def move(program, step, active):
    """mov, also between one wide register and several narrow ones."""
    to, source = step.operands
    if isinstance(to, tuple) or isinstance(source, tuple):
        size = TYPES[step.type].itemsize
        data = gather(program, source, size // len(names_of(source)))
        scatter(program, to, data, UNSIGNED[size // len(names_of(to))], active)
        return
    ordered = source.startswith("%") and source not in program.unordered
    program.put(to, program.get(source, step.type), active)
    if ordered:  # ptxas may give both names one register
        program.unordered -= {to, source}


def convert(program, step, active):
    """cvt. Two floats are packed with the first in the high half."""
    to, *sources = step.operands
    target, source = step.parts[-2:]
    if target.endswith("x2"):
        pair = [rounded(program.get(name, "f32"), target[:-2]) for name in reversed(sources)]
        program.put(to, np.stack(pair, 1).view(np.uint32)[:, 0], active)
    elif target == "tf32":  # to nearest, ties away from zero, in the upper 19 bits
        bits = program.get(sources[0], "b32").astype(np.uint64)
        program.put(to, ((bits + 0x1000) & 0xFFFFE000).astype(np.uint32), active)
    else:
        value = program.get(sources[0], source)
        program.put(to, rounded(widen(value) if source == "bf16" else value, target), active)


def select(program, step, active):
    to, a, b, condition = step.operands
    value = np.where(program.get(condition, "pred"), *(program.get(x, step.type) for x in (a, b)))
    program.put(to, value, active)


COMPARISONS = {
    "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "ne": lambda a, b: (a != b) & (a == a) & (b == b), "num": lambda a, b: (a == a) & (b == b),
}


def compare(program, step, active):
    """setp. A comparison with NaN is false."""
    a, b = (program.get(name, step.type) for name in step.operands[1:3])
    program.put(step.operands[0], COMPARISONS[step.parts[1]](a, b), active)


# --------------------------------------------------------------------------------------- arithmetic


def quotient(a, b):
    """Integer division towards zero."""
    whole = np.abs(a.astype(np.int64)) // np.maximum(np.abs(b.astype(np.int64)), 1)
    return (whole * np.where((a < 0) == (b < 0), 1, -1)).astype(a.dtype)


def fused(a, b, c):
    """a * b + c, rounded once: the product of two float32 is exact in float64."""
    return (a.astype(np.float64) * b + c).astype(a.dtype)


INTEGER = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "not": np.invert, "neg": np.negative, "max": np.maximum, "div": quotient,
}
FLOAT = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "fma": fused,
    "min": np.fmin, "max": np.fmax,
    "ex2": lambda x: np.exp2(x.astype(np.float64)),  # correctly rounded
}


def arithmetic(program, step, active):
    """One function of all operands."""
    name, kind = step.parts[0], step.type
    values = [program.get(x, "b32" if kind == "s16x2" else kind) for x in step.operands[1:]]
    if kind == "s16x2":
        result = INTEGER[name](*(value.view(np.int16) for value in values)).view(np.uint32)
    elif kind != "f32":
        result = INTEGER[name](*values)
    elif "ftz" in step.parts:
        result = flush(FLOAT[name](*map(flush, values)).astype(np.float32))
    else:
        result = FLOAT[name](*values).astype(np.float32)
    program.put(step.operands[0], result, active)


def multiply(program, step, active):
    """Integer mul and mad: the low half of the product, the high half, or all of it."""
    name, half, kind = step.parts[0], step.parts[1], step.type
    if kind == "f32":
        return arithmetic(program, step, active)
    a, b = (program.get(x, kind) for x in step.operands[1:3])
    if half == "lo":
        result = a * b
    else:
        wide = (SIGNED if kind[0] == "s" else UNSIGNED)[2 * a.itemsize]
        result = a.astype(wide) * b.astype(wide)
        if half == "hi":
            result = (result >> wide(8 * a.itemsize)).astype(a.dtype)
    if name == "mad":
        result = result + program.get(step.operands[3], f"{kind[0]}{8 * result.itemsize}")
    program.put(step.operands[0], result, active)


def shift(program, step, active):
    """Beyond the number's width all bits are zeros, or the sign of a signed one shifted right."""
    value, by = program.get(step.operands[1], step.type), program.get(step.operands[2], "u32")
    width = 8 * value.itemsize
    within = np.minimum(by, width - 1).astype(value.dtype)
    shifted = value << within if step.parts[0] == "shl" else value >> within
    if step.parts[0] == "shl" or value.dtype.kind == "u":
        shifted = np.where(by < width, shifted, 0).astype(value.dtype)
    program.put(step.operands[0], shifted, active)


def extract_bits(program, step, active):
    """bfe: `length` bits from a position on; signed ones extend their highest bit."""
    value, position, length = (program.get(x, "u32").astype(np.int64) for x in step.operands[1:4])
    field = (value >> position) & (1 << length) - 1
    if step.type == "s32":
        field -= ((field >> np.maximum(length - 1, 0)) & 1) << length
    program.put(step.operands[0], field.astype(TYPES[step.type]), active)


def permute_bytes(program, step, active):
    """prmt: each result byte is one of the eight of a and b, or that byte's sign throughout."""
    a, b, selector = (program.get(x, "u32") for x in step.operands[1:4])
    source = np.stack([a, b], 1).view(np.uint8)  # (n, 8)
    picks = (selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & np.uint32(15)
    chosen = np.take_along_axis(source, (picks & 7).astype(np.int64), 1)
    chosen = np.where(picks & 8, np.where(chosen & 128, 255, 0), chosen).astype(np.uint8)
    program.put(step.operands[0], chosen.view(np.uint32)[:, 0], active)


# -------------------------------------------------------------------- loads, stores, copies, warps


def load(program, step, active):
    to, address = step.operands
    size = TYPES[step.type].itemsize
    if "param" in step.parts:
        bits = program.arguments[address.base] & (1 << 8 * size) - 1
        return program.put(to, np.full(program.threads, bits, UNSIGNED[size]), active)
    memory, kind = memory_of(program, step)
    where = program.address(address, kind)
    data = memory.access(where, size * len(names_of(to)), active, program.who)
    scatter(program, to, data, TYPES[step.type])


def store(program, step, active):
    memory, kind = memory_of(program, step)
    data = gather(program, step.operands[1], TYPES[step.type].itemsize)
    where = program.address(step.operands[0], kind)
    memory.access(where, data.shape[1], active, program.who, data)


def memory_of(program, step):
    space = next(p for p in step.parts if p.startswith(("global", "shared")))
    return (program.memory, "u64") if space == "global" else (program.shared, "u32")


def copy_async(program, step, active):
    """cp.async: until its group is waited for, the destination holds garbage.

    The last operand is the number of bytes read; the rest of the destination becomes zero.
    """
    parts = step.parts[2:]
    if parts == ["commit_group"]:
        program.copy_groups.append(program.copies)
        program.copies = []
    elif parts[0] == "wait_group":
        while len(program.copy_groups) > int(step.operands[0]):
            for arguments in program.copy_groups.pop(0):
                finish_copy(program, *arguments)
    elif parts[0] in ("ca", "cg"):
        to, source = (program.address(*pair) for pair in zip(step.operands, ("u32", "u64")))
        size = int(step.operands[2], 0)
        count = program.get(step.operands[3] if len(step.operands) > 3 else str(size), "u32")
        garbage = np.full((program.threads, size), 0xFF, np.uint8)
        program.shared.access(to, size, active, program.who, garbage)
        np.add.at(program.shared.regions[0].pending, to[active, None] + np.arange(size), 1)
        program.copies.append((to, source, size, count, active))
    else:
        raise Fault("unknown instruction")


def finish_copy(program, to, source, size, count, active):
    np.add.at(program.shared.regions[0].pending, to[active, None] + np.arange(size), -1)
    data = np.zeros((program.threads, size), np.uint8)
    for bytes_read in set(count[active].tolist()) - {0}:
        some = active & (count == bytes_read)
        got = program.memory.access(source, bytes_read, some, program.who)
        data[some, :bytes_read] = got[some]
    program.shared.access(to, size, active, program.who, data)


def barrier(program, step, active):
    """All threads of the program wait for each other."""
    if step.parts[1:] != ["sync"] or step.operands != ["0"]:
        raise Fault("unknown instruction")
    program.barrier()


def fence(program, step, active):
    """fence.proxy.async: shared memory stored so far may be read by wgmma."""
    if step.parts[1:3] != ["proxy", "async"]:
        raise Fault("unknown instruction")
    program.shared.regions[0].unfenced[:] = False


def shuffle(program, step, active):
    """shfl: the value of the lane of the warp whose number differs in some bits, or of one lane."""
    value, by = (program.get(name, "u32") for name in step.operands[1:3])
    if step.operands[3] != "31" or step.parts[2] not in ("bfly", "idx"):
        raise Fault("unknown instruction")
    lane = program.lane ^ by if step.parts[2] == "bfly" else by
    program.put(step.operands[0], value[32 * program.warp + lane.astype(np.int64)], active)


# ---------------------------------------------------------------------------------------- matrices
# In a warp's 8 x 8 matrix of 16-bit numbers (8 x 4 of 32 bits) lane 4 r + c holds row r's c-th 32
# bits: registers (n) are matrices (warps, 8, 4).


def matrix_rows(program, address, number):
    """The addresses of the 8 rows of a matrix: lanes 8 i .. 8 i + 7 give those of matrix i."""
    rows = program.address(address, "u32").reshape(-1, 32)[:, 8 * number : 8 * number + 8]
    who = np.uint32(1) << np.arange(rows.size, dtype=np.uint32) // 8
    return rows.reshape(-1), np.ones(rows.size, bool), who


def turned(step, matrices):
    """Matrices of 16-bit numbers (.., 8, 8), with .trans transposed."""
    return np.ascontiguousarray(matrices.mT) if "trans" in step.parts else matrices


def load_matrix(program, step, active):
    """ldmatrix: 8 x 8 matrices from shared memory."""
    for number, name in enumerate(step.operands[0]):
        rows, every, who = matrix_rows(program, step.operands[1], number)
        data = program.shared.access(rows, 16, every, who)
        matrices = turned(step, data.view(np.uint16).reshape(-1, 8, 8))
        program.put(name, matrices.view(np.uint32).reshape(-1))


def store_matrix(program, step, active):
    """stmatrix: its inverse."""
    for number, name in enumerate(step.operands[1]):
        rows, every, who = matrix_rows(program, step.operands[0], number)
        matrices = program.get(name, "b32").view(np.uint16).reshape(-1, 8, 8)
        data = turned(step, matrices).view(np.uint8).reshape(-1, 16)
        program.shared.access(rows, 16, every, who, data)


def fragments(program, names, kind):
    """Registers as matrices (warps, 8, 8) of 16-bit numbers or (warps, 8, 4) of tf32."""
    size = size_of(kind)
    words = [program.get(name, "b32").view(UNSIGNED[size]) for name in names]
    return [exact(w, kind).reshape(-1, 8, 16 // size) for w in words]


def left_operand(program, names, kind):
    """A (warps, 16, K): its four quarters, down the columns first."""
    a = fragments(program, names, kind)
    return np.concatenate([np.concatenate(a[0::2], 2), np.concatenate(a[1::2], 2)], 1)


def product(a, b, c):
    """a (.., M, K) b (.., N, K) + c (.., M, N), in one order of k for all, so equal rows give equal
    bits."""
    total, a, b = c.astype(np.float64), a.astype(np.float64), b.astype(np.float64)
    for k in range(a.shape[-1]):
        total = total + a[..., :, None, k] * b[..., None, :, k]
    return total.astype(np.float32)


def multiply_matrices(program, step, active):
    """mma: each warp's D (16, 8) = A (16, K) B (K, 8) + C."""
    shape, kind = step.parts[3], step.parts[7]
    if (shape, kind) not in (("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "tf32")):
        raise Fault("unknown instruction")
    if step.parts[4:7] != ["row", "col", "f32"] or step.parts[8:] != [kind, "f32"]:
        raise Fault("unknown instruction")
    d, a, b, c = step.operands
    b = np.concatenate(fragments(program, b, kind), 2)  # (warps, 8, K)
    c = [program.get(name, "f32").reshape(-1, 8, 4) for name in c]
    halves_of_c = [np.stack(c[i : i + 2], -1).reshape(-1, 8, 8) for i in (0, 2)]
    result = product(left_operand(program, a, kind), b, np.concatenate(halves_of_c, 1))
    pairs = result.reshape(-1, 2, 8, 4, 2)  # (warps, upper or lower half, 8, 4, of two columns)
    for name, (half, column) in zip(d, itertools.product(range(2), repeat=2)):
        program.put(name, np.ascontiguousarray(pairs[:, half, :, :, column]).reshape(-1))


class Product(NamedTuple):
    """A wgmma under way, with what its operands were when it began."""

    step: Any  # ptx.Instruction
    descriptors: dict[int, np.ndarray]
    operands: tuple[np.ndarray, np.ndarray]  # A (groups, 64, K), B (groups, N, K)
    result: np.ndarray  # (groups, 64, N)


def warp_group(program, step, active):
    """wgmma: D (64, N) += A (64, K) B (K, N) of each 4 warps, done when its group is waited for.

    It reads at any time until then: its operands must be there when it begins, and may not change.
    """
    action = step.parts[1]
    if action == "fence":
        program.unordered.clear()
    elif action == "commit_group":
        program.product_groups.append(program.products)
        program.products = []
    elif action == "wait_group":
        while len(program.product_groups) > int(step.operands[0]):
            for job in program.product_groups.pop(0):
                finish_product(program, job)
    elif action == "mma_async":
        d, a, b, scale = step.operands[:4]
        registers = {"", *d, *(a if isinstance(a, tuple) else ())}
        if registers & program.unordered:
            raise Fault("wgmma uses registers touched since the last wgmma.fence")
        before = program.under_way.get(d)
        start = before.result if before else accumulator(program, d)
        if not program.get(scale, "pred").any():
            start = np.zeros_like(start)
        descriptors = {i: program.get(x, "u64").reshape(-1, 128)[:, 0]
                       for i, x in ((1, a), (2, b)) if isinstance(x, str)}
        operands = product_operands(program, step, descriptors)
        result = product(*operands, start)
        program.under_way[d] = Product(step, descriptors, operands, result)
        program.products.append(program.under_way[d])
        put_result(program, d, np.full((len(d), program.threads), 0xFFFFFFFF, np.uint32))
    else:
        raise Fault("unknown instruction")


def put_result(program, names, values):
    """Registers that wgmma writes, in order with itself."""
    for name, value in zip(names, values):
        program.put(name, value)
    program.unordered.difference_update(names)


def accumulator(program, names):
    """D as it lies in the registers: warp w holds rows 16 w .. 16 w + 15, in tiles of 8 columns."""
    words = np.stack([program.get(name, "f32") for name in names], -1)
    # (group, warp, row, lane in the row, tile, upper or lower half, column of two)
    words = words.reshape(-1, 4, 8, 4, len(names) // 4, 2, 2)
    return words.transpose(0, 1, 5, 2, 4, 3, 6).reshape(-1, 64, 2 * len(names))


def product_operands(program, step, descriptors):
    """A (groups, 64, K), B (groups, N, K) from registers, or from shared memory by descriptor."""
    _, n, k = map(int, re.fullmatch(r"m(\d+)n(\d+)k(\d+)", step.parts[4]).groups())
    kind = step.parts[6]
    _, a, _, _, *flags = step.operands  # flags: signs of A and B, then which are transposed
    transposed = [int(x) for x in flags[2:]]
    if flags[:2] != ["1", "1"]:
        raise Fault("unknown instruction")
    if isinstance(a, tuple):
        registers, a = a, left_operand(program, a, kind).reshape(-1, 64, k)
        program.unordered.difference_update(registers)  # which only wgmma itself has touched
    else:
        a = shared_operand(program, descriptors[1], 64, k, kind, transposed[:1] == [1])
    return a, shared_operand(program, descriptors[2], n, k, kind, transposed[-1:] == [1])


def finish_product(program, job):
    d, n = job.step.operands[0], 2 * len(job.step.operands[0])
    operands = product_operands(program, job.step, job.descriptors)
    if not all(map(functools.partial(np.array_equal, equal_nan=True), operands, job.operands)):
        raise Fault(f"changed before it was waited for: an operand of {job.step.text}")
    if program.under_way[d] is not job:  # a later one adds to it, so the registers stay garbage
        return
    del program.under_way[d]
    result = job.result.reshape(-1, 4, 2, 8, n // 8, 4, 2)
    put_result(program, d, result.transpose(0, 1, 3, 5, 4, 2, 6).reshape(program.threads, -1).T)


def shared_operand(program, descriptors, rows, k, kind, transposed):
    """An operand (groups, rows, K) of wgmma in shared memory, as its descriptor lays it out.

    Atoms of 8 rows of 32, 64 or 128 bytes, in which 16-byte pieces are permuted by the row. Rows
    are those of the operand, or of its transpose.
    """
    size = size_of(kind)
    i, j = np.indices((rows, k))
    places = []
    for bits in descriptors.tolist():
        start, leading, stride = ((bits >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        if bits >> 62 == 0 or bits >> 49 & 7:
            raise Fault(f"unknown descriptor {bits:#x}")
        width = {1: 128, 2: 64, 3: 32}[bits >> 62]
        if transposed:
            across = width // size
            place = i // across * leading + j // 8 * stride + j % 8 * width + i % across * size
        else:
            place = i // 8 * stride + i % 8 * width + j * size
        place += start
        places.append(place ^ ((place >> 7) & (width // 16 - 1)) << 4)
    places = np.stack(places).reshape(-1)
    region = program.shared.regions[0]
    inside = places[places + size <= len(region.data)]
    if region.unfenced[inside].any():
        raise Fault("wgmma reads shared memory that was not fenced")
    who = np.uint32(15) << 4 * np.repeat(np.arange(len(descriptors), dtype=np.uint32), rows * k)
    data = program.shared.access(places, size, np.ones(len(places), bool), who)
    return exact(data.view(UNSIGNED[size]), kind).reshape(-1, rows, k)


INSTRUCTIONS = {
    **dict.fromkeys([*INTEGER, *FLOAT], arithmetic), "mul": multiply, "mad": multiply,
    "shl": shift, "shr": shift, "bfe": extract_bits, "prmt": permute_bytes,
    "mov": move, "cvt": convert, "selp": select, "setp": compare,
    "ld": load, "st": store, "cp": copy_async, "bar": barrier, "fence": fence,
    "shfl": shuffle, "ldmatrix": load_matrix, "stmatrix": store_matrix, "mma": multiply_matrices,
    "wgmma": warp_group,
}
