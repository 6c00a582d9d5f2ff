"""Executes in numpy, on CPU tensors, the PTX to which Triton compiles kernels for an NVIDIA GPU.

    with ptx.emulated(90):                                     # for sm_90; 80 for sm_80
        kernels.attention(q, k, v, relation=True, backend="triton")

Triton's interpreter runs a kernel's source and skips the compiler. Here each launch is compiled as
the launcher would specialise it, and its instructions are executed: all threads of a program in
lockstep, a register being an array with one number per thread; one program after the other.

An execution ends with a Fault that names the instruction, where
  - a global access is outside the launch's tensors, or a shared one outside the program's memory;
  - an address is not a multiple of the access's size;
  - two warps touch a byte with no barrier between them, and one of them changes it;
  - two programs touch a byte, and one of them writes it;
  - two lanes of one store give different bits to one byte;
  - wgmma reads shared memory that was stored and not fenced for it, or registers that were touched
    since the last wgmma.fence;
  - threads of one program would branch differently, or the instruction is unknown.
What is asynchronous happens as late as its wait allows: cp.async at its wait, and what it writes
may not be touched before; wgmma likewise, its results are garbage until then, and its operands may
not change. Shared memory and registers start as garbage (all bits set: NaN).

Not modelled: weak memory order (what one thread writes, all see at once; lanes of a warp never
drift apart); the machine code that ptxas makes of PTX; registers, spills and time. Approximate
instructions (ex2, div.full) give correctly rounded results; mma adds its products in float64
and rounds once.
"""

import atexit
import concurrent.futures
import contextlib
import ctypes
import functools
import importlib
import itertools
import multiprocessing
import os
import re
import struct
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from ptx_instructions import INSTRUCTIONS, REGISTERS, SIGNED, TYPES, UNSIGNED, Fault

# ---------------------------------------------------------------------------- text to instructions


class Address(NamedTuple):
    base: str  # a register, or the name of a parameter or of the shared memory
    offset: int


class Instruction(NamedTuple):
    predicate: str | None
    negated: bool
    parts: list[str]  # "ld.global.v2.b32" at its dots
    operands: list  # names; tuples of names for { }; Address for [ ]
    text: str

    @property
    def type(self) -> str:
        return self.parts[-1]


class Kernel(NamedTuple):
    code: list[Instruction]
    labels: dict[str, int]
    parameters: list[str]
    shared: int  # bytes of a program
    warps: int


def parse_operand(text: str):
    text = text.strip()
    if text.startswith("{"):
        return tuple(name.strip() for name in text[1:-1].split(","))
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        return Address(base.strip(), int(offset or 0))
    return text.partition("|")[0]  # setp's and shfl's second result is never used


def parse(ptx: str, shared: int, warps: int) -> Kernel:
    """One entry function. Comments, directives and the braces of inline assembly are skipped."""
    head, body = re.sub(r"//.*", "", ptx).split("\n{\n", 1)
    code, labels = [], {}
    body = re.sub(r"^\s*\.(loc|file|section).*$", "", body[: body.rindex("}")], flags=re.M)
    for statement in body.split(";"):
        statement = " ".join(statement.split())
        while match := re.match(r"([$\w]+):\s*|[{}]\s*", statement):
            if match[1]:
                labels[match[1]] = len(code)
            statement = statement[match.end() :]
        if not statement or statement.startswith("."):
            continue
        match = re.fullmatch(r"(?:@(!?)(%\w+) )?([a-z][\w.:]*) ?(.*)", statement)
        if not match:
            raise Fault(f"not an instruction: {statement}")
        operands = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s][^,]*", match[4])
        code.append(Instruction(match[2], match[1] == "!", match[3].split("."),
                                [parse_operand(text) for text in operands], statement))
    return Kernel(code, labels, re.findall(r"(\w+_param_\d+)", head), shared, warps)


# ------------------------------------------------------------------------------------------ memory


class Region:
    """Bytes from address `low` on, and for each byte who touched it last.

    A time is the number of a stretch between barriers, counted on over all programs of a launch.
    Who: a bit for each warp.
    """

    def __init__(self, low: int, data: np.ndarray):
        self.low, self.data = low, data
        size = len(data)
        self.write_time, self.writer = np.zeros(size, np.int32), np.zeros(size, np.uint32)
        self.read_time, self.readers = np.zeros(size, np.int32), np.zeros(size, np.uint32)
        self.first_read = np.zeros(size, np.int32)
        self.unfenced = np.zeros(size, bool)  # stored, and not yet fenced for wgmma
        self.pending = np.zeros(size, np.int16)  # copies under way to it


class Memory:
    """Global or shared memory, in bounds and without races."""

    def __init__(self, name: str, regions: list[Region]):
        self.name, self.regions = name, regions
        self.time = self.start = 0  # now, and when the running program began

    def access(self, addresses, size, active, who, data=None):
        """Loads (n, size) bytes, or stores them: `data`. Threads that are not active load zeros."""
        addresses = addresses.astype(np.int64)
        if (addresses[active] % size).any():
            raise Fault(f"misaligned {self.name} access")
        out, left = np.zeros((len(addresses), size), np.uint8), active.copy()
        for region in self.regions:
            offset = addresses - region.low
            here = left & (offset >= 0) & (offset + size <= len(region.data))
            if not here.any():
                continue
            left &= ~here
            index = offset[here, None] + np.arange(size)
            if region.pending[index].any():
                raise Fault(f"{self.name} memory is touched before its copy was waited for")
            bits = np.broadcast_to(who[here, None], index.shape)
            if data is None:
                self.note_read(region, index, bits)
                out[here] = region.data[index]
            else:
                self.note_write(region, index, bits, data[here])
                region.data[index] = data[here]
        if left.any():
            raise Fault(f"{self.name} access out of bounds at {addresses[left][0]:#x}")
        return out

    def note_read(self, region, index, bits):
        written = region.write_time[index]
        foreign = (written > 0) & (written < self.start)
        if (foreign | (written == self.time) & (region.writer[index] != bits)).any():
            raise Fault(f"race in {self.name} memory: read while another writes")
        region.readers[index[region.read_time[index] != self.time]] = 0
        np.bitwise_or.at(region.readers, index, bits)
        region.read_time[index] = self.time
        region.first_read[index[region.first_read[index] == 0]] = self.time

    def note_write(self, region, index, bits, data):
        order = np.argsort(index, axis=None, kind="stable")
        byte, value = index.ravel()[order], data.ravel()[order]
        if ((byte[1:] == byte[:-1]) & (value[1:] != value[:-1])).any():
            raise Fault(f"race in {self.name} memory: lanes of a store differ at one address")
        written, first = region.write_time[index], region.first_read[index]
        foreign = (written > 0) & (written < self.start) | (first > 0) & (first < self.start)
        near = (written == self.time) & (region.writer[index] != bits)
        near |= (region.read_time[index] == self.time) & (region.readers[index] & ~bits != 0)
        if (foreign | near & (region.data[index] != data)).any():  # the same bits again do no harm
            raise Fault(f"race in {self.name} memory: written while another reads or writes")
        region.write_time[index], region.writer[index] = self.time, bits
        region.unfenced[index] = True


# ----------------------------------------------------------------------------------------- program


class Program:
    """One program of a launch: its registers, its shared memory, what is under way."""

    def __init__(self, kernel: Kernel, place, grid, arguments: dict[str, int], memory: Memory):
        self.kernel, self.arguments, self.memory = kernel, arguments, memory
        self.threads = n = 32 * kernel.warps
        self.all, self.lane, self.warp = np.ones(n, bool), np.arange(n) % 32, np.arange(n) // 32
        self.who = np.uint32(1) << self.warp.astype(np.uint32)
        region = Region(0, np.full(kernel.shared, 0xFF, np.uint8))
        self.shared = Memory("shared", [region])
        self.special = {"%tid.x": np.arange(n), "%ntid.x": n, "%laneid": self.lane,
                        "%tid.y": 0, "%tid.z": 0, "global_smem": 0}
        for axis, index, count in zip("xyz", place, grid):
            self.special |= {f"%ctaid.{axis}": index, f"%nctaid.{axis}": count}
        self.registers, self.constants = {}, {}
        self.copies, self.copy_groups = [], []  # cp.async: not yet committed; committed
        self.products, self.product_groups = [], []  # wgmma, likewise
        self.under_way = {}  # the last wgmma that is not done, by the registers that it writes
        # registers touched since the last wgmma.fence; "": nothing is ordered before the first one
        self.unordered = {""}
        self.barrier()
        memory.start = memory.time

    def barrier(self):
        self.memory.time += 1
        self.shared.time += 1

    def get(self, name: str, kind: str):
        """An operand as numbers of a type: a register, a special register or a constant."""
        self.unordered.add(name)
        value = self.registers.get(name)
        if value is None:
            if (name, kind) not in self.constants:
                self.constants[name, kind] = self.constant(name, kind)
            return self.constants[name, kind]
        dtype = TYPES[kind]
        if dtype == bool:
            return value
        if value.itemsize != dtype.itemsize:  # the low bits, or zeros above
            value = value.astype(UNSIGNED[dtype.itemsize])
        return value.view(dtype)

    def constant(self, name: str, kind: str):
        """A special register, one that was never written (garbage), a float's bits, an integer."""
        if name in self.special:
            value = self.special[name]
        elif name.startswith("%"):
            value = 0 if kind == "pred" else -1
        else:
            value = int(name[2:], 16) if name[:2] in ("0f", "0F") else int(name.rstrip("U"), 0)
        value, dtype = np.broadcast_to(np.array(value), self.threads), TYPES[kind]
        return value != 0 if dtype == bool else value.astype(UNSIGNED[dtype.itemsize]).view(dtype)

    def put(self, name: str, value, active=None):
        """Into a register: a wider one gets the sign of signed numbers, zeros above others."""
        if name == "_":
            return
        size = REGISTERS[re.match("%([a-z]+)", name)[1]]
        if size == 0:
            value = value.astype(bool, copy=False)
        elif value.itemsize != size or value.dtype == bool:
            value = value.astype((SIGNED if value.dtype.kind == "i" else UNSIGNED)[size])
        if size:
            value = np.ascontiguousarray(value).view(UNSIGNED[size])
        if active is not None and not active.all():
            value = np.where(active, value, self.get(name, f"b{8 * size}" if size else "pred"))
        self.registers[name] = value
        self.unordered.add(name)

    def address(self, address: Address, kind: str):
        if address.base in self.arguments:
            return np.full(self.threads, self.arguments[address.base], np.uint64)
        return self.get(address.base, kind).astype(np.int64) + address.offset

    def run(self, limit: int = 10_000_000):
        """Instruction by instruction, up to ret."""
        code, counter = self.kernel.code, 0
        with np.errstate(all="ignore"):
            for _ in range(limit):
                step = code[counter]
                counter += 1
                active = self.all
                if step.predicate:
                    active = self.get(step.predicate, "pred") ^ step.negated
                name = step.parts[0]
                try:
                    if name in ("bra", "ret"):
                        if active.any() and not active.all():
                            raise Fault("threads of one program branch differently")
                        if active.all() and name != "bra":
                            return
                        counter = self.kernel.labels[step.operands[0]] if active.all() else counter
                    else:
                        INSTRUCTIONS[name](self, step, active)
                except Fault as fault:
                    raise Fault(f"{fault}: {step.text}") from None
                except (KeyError, ValueError, IndexError, TypeError) as error:
                    raise Fault(f"cannot execute {step.text} ({error!r})") from error
        raise Fault("the program does not end")


# ---------------------------------------------------------------------------------------- launches


class TensorLike(NamedTuple):
    """What specialisation looks at in a tensor."""

    dtype: torch.dtype
    aligned: bool  # at a multiple of 16 bytes


def compile_kernel(module: str, name: str, args: tuple, kwargs: tuple, sm: int) -> tuple:
    """In a process without TRITON_INTERPRET: (PTX, bytes of shared memory, warps, arguments kept).

    Specialises with the launcher's own functions, so for instance an argument of 1 is a constant.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    def real(value):
        if not isinstance(value, TensorLike):
            return value
        memory = torch.empty(64, dtype=value.dtype)  # which torch aligns to 64 bytes
        return memory if value.aligned else memory[1:]

    kernel = getattr(importlib.import_module(module), name)
    target = GPUTarget("cuda", sm, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    given = {key: real(value) for key, value in kwargs}
    bound, specialisation, options = bind(*map(real, args), **given)
    options, signature, constants, hints = kernel._pack_args(
        backend, given, bound, specialisation, options)
    binary = triton.compile(
        ASTSource(kernel, signature, constants, hints), target=target, options=options.__dict__)
    kept = [key for key, kind in signature.items() if kind != "constexpr"]
    return binary.asm["ptx"], binary.metadata.shared, binary.metadata.num_warps, kept


@functools.cache
def compiler():
    """One process that compiles, for Triton's kernels are interpreted here. It may import the
    script that runs, and Triton with it: it must start without the interpreter."""
    pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with mock.patch.dict(os.environ, TRITON_INTERPRET="0"):
        pool.submit(os.getpid).result()
    atexit.register(pool.shutdown)
    return pool


@functools.cache
def compiled(*configuration) -> tuple:
    return compiler().submit(compile_kernel, *configuration).result()


def launch(kernel, args, kwargs, grid, sm: int, edit=None) -> None:
    """Runs all programs of a launch. `edit`: a function of the PTX, for planted faults."""

    def described(value):
        if not isinstance(value, torch.Tensor):
            return value
        return TensorLike(value.dtype, value.data_ptr() % 16 == 0)

    code, shared, warps, kept = compiled(
        kernel.fn.__module__, kernel.__name__, tuple(map(described, args)),
        tuple((key, described(value)) for key, value in kwargs.items()), sm)
    program = parse(edit(code) if edit else code, shared, warps)
    values = dict(zip(kernel.arg_names, args)) | kwargs
    run(program, grid, [values[name] for name in kept] + [0, 0])  # Triton's scratch: unused


def run(kernel: Kernel, grid, values: list) -> None:
    """Every program of a grid; `values` are tensors, integers and floats.

    Storages get addresses 2^40 apart, so that a stray access never meets a neighbour's memory.
    """
    regions = {}  # by the storage's real address
    for value in values:
        if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes():
            storage = value.untyped_storage()
            start = storage.data_ptr()
            low = (len(regions) + 1 << 40) + start % 64
            memory = (ctypes.c_uint8 * storage.nbytes()).from_address(start)
            regions.setdefault(start, Region(low, np.ctypeslib.as_array(memory)))

    def bits(value):
        if isinstance(value, torch.Tensor):
            start = value.untyped_storage().data_ptr()
            return regions[start].low + value.data_ptr() - start if start in regions else 0
        if isinstance(value, float):
            return struct.unpack("<I", struct.pack("<f", value))[0]
        return value

    arguments = dict(zip(kernel.parameters, map(bits, values), strict=True))
    memory = Memory("global", list(regions.values()))
    grid = (*grid, 1, 1)[:3]
    for z, y, x in itertools.product(*map(range, reversed(grid))):
        Program(kernel, (x, y, z), grid, arguments, memory).run()


@contextlib.contextmanager
def emulated(sm: int, edit=None):
    """Within the with-block every Triton launch runs here, as compiled for sm_80 or sm_90.

    Gives a list to which each launch appends its kernel's name."""
    from triton.runtime.interpreter import InterpretedFunction

    names = []

    def run_launch(self, *args, grid, warmup, **kwargs):
        names.append(self.__name__)
        launch(self, args, kwargs, grid, sm, edit)

    # new memory is filled with NaN: what a kernel fails to store is no right value of before
    former = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with mock.patch.object(InterpretedFunction, "run", run_launch):
            yield names
    finally:
        torch.use_deterministic_algorithms(former)
