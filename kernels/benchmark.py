"""What the Triton kernels cost: in time on a GPU, in machine code anywhere.

    python -m kernels.benchmark                        # on a GPU, minutes: times, roofline shares
    python -m kernels.benchmark --compile sm_80,sm_90  # anywhere, minutes: registers, instructions
    each with --json FILE: the rows of its table, as a list of objects

Both make the same calls at DeiT-S's shape (224 px, patch 16, CUB's 200 classes). --compile records
each launch instead of running it, and compiles for the target what it would run.
"""

import argparse
import collections
import functools
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

import kernels
from kernels import reference


class Shape(NamedTuple):
    """As in `kernels`: B images of h x w patches, S heads of width d, D channels, C classes."""

    B: int = 2
    S: int = 6
    d: int = 64
    h: int = 14
    w: int = 14
    D: int = 384
    C: int = 200
    G: int = 4  # kernels of k x k
    k: int = 3
    K: int = 1  # requested classes


class Call(NamedTuple):
    """A public function on its inputs, in training with its backward pass, from ones: what the
    kernels do does not depend on values."""

    function: Callable
    inputs: tuple[Tensor, ...]
    operations: int  # multiplications and additions in its matrix products, the least
    training: bool = False
    baseline: Callable | None = None  # what it is timed against; None: itself, backend="torch"

    def run(self, backend: str) -> tuple[Tensor, ...]:
        """The outputs; in training the gradients after them."""
        if backend == "torch" and self.baseline:
            outputs = self.baseline(*self.inputs)
        else:
            outputs = self.function(*self.inputs, backend=backend)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        outputs = tuple(o for o in outputs if o is not None)
        if not self.training:
            return outputs
        upstream = [torch.ones_like(o) for o in outputs]
        return *outputs, *torch.autograd.grad(outputs, self.inputs, upstream)


def calls(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> dict[str, Call]:
    """What is timed and compiled, on inputs laid out as the model lays them out."""
    B, S, d, h, w, D, C, G, k, K = shape
    N, T = h * w, h * w + 1
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    def leaves(tensors) -> tuple[Tensor, ...]:
        return tuple(t.detach().requires_grad_() for t in tensors)

    qkv = normal(B, T, 3, S, d).permute(2, 0, 3, 1, 4)  # views of one packed projection
    attn = normal(B, S, T, T).softmax(-1)
    x = normal(B, T, D)[:, 1:].mT.unflatten(2, (h, w))  # the token view
    conv = (x, normal(B, G).sigmoid(), normal(G, C, D, k, k) / 64, normal(C))
    classes = torch.arange(B * K, device=device).view(B, K) % C
    product = 2 * B * S * T * T * d  # q k^T, or A v
    return {
        "attention, training": Call(kernels.attention, leaves(qkv), 7 * product, True),
        "attention, localisation": Call(
            functools.partial(kernels.attention, relation=True), tuple(qkv), 2 * product,
            baseline=functools.partial(reference.attention, relation=True),
        ),
        "dynamic_conv_logits, training": Call(
            kernels.dynamic_conv_logits, leaves(conv), 6 * B * G * C * D * k * k, True),
        "class_maps": Call(kernels.class_maps, (*conv, classes), 2 * B * K * N * D * k * k),
        "aggregate_attention": Call(kernels.aggregate_attention, (attn,), 2 * B * S * T * T),
        "dynamic_conv2d": Call(kernels.dynamic_conv2d, conv, 2 * B * N * C * D * k * k),
    }


# ----------------------------------------------------------------------------------- --compile

# What is compiled: DeiT-S on CUB; the widest head, 1 x 1 kernels and an A whose rows are aligned;
# 448 px; more kernels than are loaded ahead, and the widest tile of requested classes.
SHAPES = (Shape(), Shape(d=128, k=1, h=9, w=23, K=7), Shape(h=28, w=28), Shape(G=16, K=7))
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
            torch.int64: "*i64"}
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}  # a program's limit
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def compiled(targets: list[str]) -> list[dict]:
    """A row per kernel, config, dtype and target: what the compiler makes of what calls() launch.

    registers: a thread's; spills: bytes of its local memory; shared: bytes; tensor_core:
    instructions; load_bytes: the width of load and store instructions that move most bytes.
    """
    rows = {}
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for shape, dtype, target in itertools.product(SHAPES, dtypes, targets):
        for kernel, arguments in recorded_launches(shape, dtype, target):
            name = str(dtype).removeprefix("torch.")
            key = (kernel.__name__, describe(kernel, arguments), name, target)
            if key not in rows:
                rows[key] = dict(zip(("kernel", "config", "dtype", "target"), key))
                binary, _ = compile_kernel(kernel, arguments, target)
                rows[key] |= read_machine_code(binary)
    return list(rows.values())


def recorded_launches(shape: Shape, dtype: torch.dtype, target: str) -> list[tuple]:
    """(kernel, its arguments by name) of every launch of every call, on CPU tensors; none runs."""
    from triton.runtime.jit import JITFunction

    launches = []

    def record(self, *args, grid, warmup, **kwargs):
        launches.append((self, dict(zip(self.arg_names, args)) | kwargs))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(kernels, "_runs_triton", return_value=True),
        mock.patch.object(torch.version, "hip", "6" if target.startswith("gfx") else None),
    ):
        for call in calls(shape, dtype).values():
            call.run("triton")
    return launches


def describe(kernel, arguments: dict) -> str:
    """A launch's constants but strides, and A's row stride, which decides how wide it is loaded."""
    names = [p.name for p in kernel.params if p.is_constexpr and "stride" not in p.name]
    names += ["stride_i"] * ("attn" in arguments)
    return " ".join(f"{name}={arguments[name]}" for name in (*names, *OPTIONS) if name in arguments)


def compile_kernel(kernel, arguments: dict, target: str):
    """One launch compiled for `target`, specialised as Triton's launcher would.

    -> (the compiled kernel, the names of its run-time arguments in order).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = target.startswith("gfx")
    signature, constants, hints = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        tensor = isinstance(value, Tensor)
        if parameter.is_constexpr or value is None or not tensor and value == 1:
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        if tensor:
            signature[parameter.name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
        hints[(i,)] = []
        if not isinstance(value, float) and (value.data_ptr() if tensor else value) % 16 == 0:
            hints[(i,)].append(["tt.divisibility", 16])
        if amd and tensor and value.untyped_storage().nbytes() < 2**31:
            hints[(i,)].append(["tt.pointer_range", 32])  # for buffer loads
    options = {name: arguments[name] for name in OPTIONS if name in arguments}
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32)
    binary = triton.compile(ASTSource(kernel, signature, constants, hints), gpu, options)
    return binary, [name for name, kind in signature.items() if kind != "constexpr"]


LOADS = {  # bytes that an instruction moves a lane, by its modifier; others move 4
    "128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1,  # NVIDIA
    "dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1,
}


def read_machine_code(binary) -> dict:
    """The last five columns of compiled()."""
    if "amdgcn" in binary.asm:
        code = binary.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1])
        spills = 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", code)[1])
        products = re.findall(r"\bv_mfma", code)
        loads = re.findall(r"\b(?:global|buffer)_(?:load|store)_(dwordx\d|[a-z]+)", code)
    else:
        code = disassemble(binary.asm["cubin"])
        registers, *local = (int(re.search(rf"\b{name}:(\d+)", code)[1])
                             for name in ("REG", "STACK", "LOCAL"))
        spills = sum(local)
        products = re.findall(r"\bHG?MMA\b", code)
        loads = re.findall(r"\b(?:LDG|LDGSTS|STG)\.E([.\w]*)", code)
    moved = collections.Counter()
    for modifiers in loads:
        width = next((LOADS[m] for m in modifiers.split(".") if m in LOADS), 4)
        moved[width] += width
    return {"registers": registers, "spills": spills, "shared": binary.metadata.shared,
            "tensor_core": len(products), "load_bytes": moved.most_common(1)[0][0]}


def disassemble(cubin: bytes) -> str:
    import triton

    cuobjdump = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", "--dump-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# --------------------------------------------------------------------------------------- times

# What is timed: training and evaluation as shipped (bfloat16 autocast), evaluation with --amp off,
# and 448 px.
TIMED = (
    (Shape(B=128), torch.bfloat16), (Shape(B=128), torch.float32),
    (Shape(B=32, h=28, w=28), torch.bfloat16),
)


def milliseconds(function: Callable) -> float:
    """Of a call; of one below a millisecond in a CUDA graph, else Python would be timed."""
    from triton.testing import do_bench, do_bench_cudagraph

    eager = do_bench(function)
    return do_bench_cudagraph(function) if eager < 1 else eager


def times(shape: Shape, dtype: torch.dtype, device: str = "cuda") -> Iterator[dict]:
    """A row per call: milliseconds on Triton, torch, torch.compile; GB/s; share of the roofline.

    The roofline is the longer of moved bytes / copy bandwidth and operations / matmul rate, both
    measured here. Bytes are each input and output once, in training each input twice more (read
    again, its gradient written) and each output once more; class_maps counts all of its weight.
    """
    source, target = (torch.empty(1 << 28, dtype=torch.uint8, device=device) for _ in range(2))
    bandwidth = 2e3 * source.nbytes / milliseconds(lambda: target.copy_(source))  # bytes/s
    matrix = torch.empty(8192, 8192, dtype=dtype, device=device).normal_()
    rate = 2e3 * 8192**3 / milliseconds(lambda: matrix @ matrix)  # operations/s
    for name, call in calls(shape, dtype, device).items():
        torch.compiler.reset()  # what was compiled before counts towards the recompilation limit
        in_torch = torch.compile(call.run, fullgraph=True, dynamic=False)
        found = {
            "triton_ms": milliseconds(lambda: call.run("triton")),
            "torch_ms": milliseconds(lambda: call.run("torch")),
            "compile_ms": milliseconds(lambda: in_torch("torch")),
        }
        tensors = sum(t.nbytes for t in (*call.inputs, *call.run("triton")))
        moved = 2 * tensors - sum(t.nbytes for t in call.inputs) if call.training else tensors
        seconds = 1e-3 * found["triton_ms"]
        floor = max(moved / bandwidth, call.operations / rate)
        yield {"call": name, "dtype": str(dtype).removeprefix("torch."), "B": shape.B,
               "N": shape.h * shape.w, **found, "gb_per_s": moved / seconds / 1e9,
               "roofline": floor / seconds}


# ---------------------------------------------------------------------------------------- main


def print_table(rows: list[dict]) -> None:
    def text(value) -> str:
        return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    columns = {name: [name, *(text(row[name]) for row in rows)] for name in rows[0]}
    widths = [max(map(len, cells)) for cells in columns.values()]
    for cells in zip(*columns.values()):
        aligned = (c.ljust(n) if not c[:1].isdigit() else c.rjust(n) for c, n in zip(cells, widths))
        print("  ".join(aligned).rstrip())


def write_rows(path: str, rows: list[dict]) -> None:
    partial = pathlib.Path(f"{path}.partial")
    partial.write_text(json.dumps(rows, indent=1) + "\n")
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", metavar="TARGETS",
                        help=f"comma-separated, of {', '.join(SHARED_MEMORY)}")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    args = parser.parse_args()
    targets = args.compile.split(",") if args.compile is not None else []
    for target in targets:
        if target not in SHARED_MEMORY:
            parser.error(f"--compile: got {target!r}, need some of {', '.join(SHARED_MEMORY)}")

    os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.10 changes its default
    if targets:
        rows = compiled(targets)
    elif torch.cuda.is_available():
        print(torch.cuda.get_device_name())
        rows = [row for shape, dtype in TIMED for row in times(shape, dtype)]
    else:
        sys.exit("benchmark: error: no GPU: times need CUDA; --compile runs anywhere")
    print_table(rows)
    if args.json:
        write_rows(args.json, rows)


if __name__ == "__main__":
    main()
