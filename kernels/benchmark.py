"""What the Triton kernels cost: in time on a GPU, in machine code anywhere.

    python -m kernels.benchmark                        # on a GPU, minutes: times, roofline shares
    python -m kernels.benchmark --compile sm_80,sm_90  # anywhere, minutes: registers, instructions
    each with --json FILE: the rows of its table, as a list of objects

All make the same calls at DeiT-S's shape (224 px, patch 16, CUB's 200 classes). --compile stops each
launch and compiles for the target what it would run.
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
    """As in `kernels`: B images of h x w patches, S heads of d channels, D channels, C classes."""

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


class Case(NamedTuple):
    """A public function on its inputs, and what it launches, as least_bytes names it.

    `baseline` is what it is timed against: the same in torch, with all of A where A is needed.
    """

    function: Callable
    inputs: tuple[Tensor, ...]
    kernels: dict[str, tuple[str, ...]]  # by direction
    baseline: Callable | None = None  # None: the function itself, with backend="torch"

    def forward(self, backend: str):
        if backend == "torch" and self.baseline:
            return self.baseline(*self.inputs)
        return self.function(*self.inputs, backend=backend)

    def gradient(self, outputs) -> tuple[Tensor, ...]:
        """Backward from ones: what the kernels launch and move does not depend on values."""
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        outputs = [o for o in outputs if o is not None]
        leaves, ones = [t for t in self.inputs if t.requires_grad], map(torch.ones_like, outputs)
        return torch.autograd.grad(outputs, leaves, list(ones))


def cases(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> dict[str, Case]:
    """The functions at a shape, with inputs laid out as the model lays them out."""
    B, S, d, h, w, D, C, G, k, K = shape
    T = h * w + 1
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    attn = normal(B, S, T, T).softmax(-1).requires_grad_()
    qkv = normal(B, T, 3, S, d).permute(2, 0, 3, 1, 4)  # views of one packed projection
    x = normal(B, T, D)[:, 1:].mT.unflatten(2, (h, w))  # the token view
    conv = (x, normal(B, G).sigmoid(), normal(G, C, D, k, k) / 64, normal(C))
    leaves = tuple(t.detach().requires_grad_() for t in conv)
    classes = torch.arange(B * K, device=device).view(B, K) % C
    one_pass = T <= 256 and d <= 64 and dtype.itemsize == 2
    passes = ("class_row_kernel", "one_pass_kernel") if one_pass else (
        "attention_kernel", "relation_kernel")
    return {
        "attention, training": Case(
            kernels.attention, tuple(t.detach().requires_grad_() for t in qkv),
            {"forward": ("class_row_kernel", "SDPA"),
             "backward": ("class_row_backward_kernel", "SDPA, backward")},
        ),
        "attention, localisation": Case(
            functools.partial(kernels.attention, relation=True), tuple(qkv), {"forward": passes},
            functools.partial(reference.attention, relation=True),
        ),
        "aggregate_attention": Case(
            kernels.aggregate_attention, (attn,),
            {"forward": ("aggregate_kernel",), "backward": ("aggregate_backward_kernel",)},
        ),
        "dynamic_conv2d": Case(kernels.dynamic_conv2d, conv, {"forward": ("conv_kernel",)}),
        "dynamic_conv_logits": Case(
            kernels.dynamic_conv_logits, leaves,
            {"forward": ("window_sums_kernel", "GEMM"),
             "backward": ("window_sums_backward_kernel", "GEMM, backward")},
        ),
        "class_maps": Case(
            kernels.class_maps, (*conv, classes), {"forward": ("class_products_kernel",)},
        ),
    }


def least_bytes(shape: Shape, itemsize: int) -> dict[str, dict[str, int]]:
    """Per kernel and argument: what any implementation moves, each input and each output once."""
    B, S, d, h, w, D, C, G, k, K = shape
    N, T, e = h * w, h * w + 1, itemsize
    qkv, row, weight = B * S * T * d * e, B * S * d * e, G * C * k * k * D * e
    head_rows = B * S * T * 4  # float32
    return {
        "aggregate_kernel": dict(attn=B * S * T * T * e, cls_attn=B * T * 4, relation=B * N * 4),
        "aggregate_backward_kernel": dict(
            attn=B * S * T * T * e, cls_attn=B * T * 4, grad_relation=B * N * 4,
            grad_cls_weight=B * T * 4, grad_attn=B * (T - 1) * T * e,  # row 0 follows
        ),
        "class_row_kernel": dict(q=row, k=qkv, cls_attn=B * T * 4, rows=head_rows),
        "class_row_backward_kernel": dict(
            q=row, k=qkv, grad_cls=B * T * 4, rows=head_rows, grad_q=row, grad_k=qkv,
        ),
        "SDPA": dict(q=qkv, k=qkv, v=qkv, out=qkv),  # torch's fused attention
        "SDPA, backward": dict(q=qkv, k=qkv, v=qkv, out=qkv, grad=qkv, dq=qkv, dk=qkv, dv=qkv),
        "one_pass_kernel": dict(
            q=qkv, k=qkv, v=qkv, cls_attn=B * T * 4, out=qkv, columns=head_rows,
        ),
        "attention_kernel": dict(
            q=qkv, k=qkv, v=qkv, out=qkv, lse=head_rows, cls_logits=head_rows,
        ),
        "relation_kernel": dict(
            q=qkv, k=qkv, lse=head_rows, cls_attn=B * T * 4, columns=head_rows,
        ),
        "conv_kernel": dict(
            x=B * N * D * e, scores=B * G * 4, weight=weight, bias=C * e, out=B * N * C * e,
        ),
        "window_sums_kernel": dict(x=B * N * D * e, sums=B * D * k * k * e),
        "window_sums_backward_kernel": dict(grad_sums=B * D * k * k * e, grad_x=B * N * D * e),
        "GEMM": dict(weight=weight, logits=B * C * e),  # torch's, the rest of dynamic_conv_logits
        "GEMM, backward": dict(weight=weight, grad_weight=weight, grad_logits=B * C * e),
        "class_products_kernel": dict(
            x=B * N * D * e, scores=B * G * 4, weight=G * min(B * K, C) * D * k * k * e,
            classes=B * K * 8, products=B * K * k * k * N * 4,
        ),
    }


def least_operations(shape: Shape) -> dict[tuple[str, str], int]:
    """Per function and direction: multiplications and additions in its matrix products."""
    B, S, d, h, w, D, C, G, k, K = shape
    N, T = h * w, h * w + 1
    conv, gemm = 2 * B * N * C * D * k * k, 2 * B * G * C * D * k * k
    product = 2 * B * S * T * T * d
    return {
        ("attention, training", "forward"): 2 * product,  # Q K^T, A V
        ("attention, training", "backward"): 5 * product,
        ("attention, localisation", "forward"): 2 * product,
        ("aggregate_attention", "forward"): 2 * B * S * T * T,
        ("aggregate_attention", "backward"): 2 * B * S * T * T,
        ("dynamic_conv2d", "forward"): conv,
        ("dynamic_conv_logits", "forward"): gemm,
        ("dynamic_conv_logits", "backward"): 2 * gemm,
        ("class_maps", "forward"): 2 * B * K * N * D * k * k,
    }


# ----------------------------------------------------------------------------------- --compile

# What is compiled: DeiT-S on CUB; the widest head, 1 x 1 kernels and an A whose rows are aligned;
# 448 px; more kernels than are loaded ahead, and the widest tile of requested classes.
SHAPES = (Shape(), Shape(d=128, k=1, h=9, w=23, K=7), Shape(h=28, w=28), Shape(G=16, K=7))
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
            torch.int64: "*i64", torch.int32: "*i32"}
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}  # a program's limit
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def compiled(targets: list[str]) -> list[dict]:
    """A row per kernel, config, dtype and target: what the compiler makes of what cases() launch.

    registers: a thread's; spills: bytes of its local memory; shared: bytes; tensor_core:
    instructions; load_bytes: the width of load and store instructions that move most bytes.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("--compile: TRITON_INTERPRET=1 is set, which replaces the compiler")
    rows = {}
    for shape, dtype, target in itertools.product(SHAPES, POINTERS, targets):
        if not dtype.is_floating_point:
            continue
        for kernel, arguments in recorded_launches(shape, dtype, target):
            name = str(dtype).removeprefix("torch.")
            key = (kernel.__name__, describe(kernel, arguments), name, target)
            if key not in rows:
                rows[key] = dict(zip(("kernel", "config", "dtype", "target"), key))
                rows[key] |= compile_launch(kernel, arguments, target)
    return list(rows.values())


def recorded_launches(shape: Shape, dtype: torch.dtype, target: str = "sm_90") -> list[tuple]:
    """(kernel, its arguments by name) of every launch of every case, on CPU tensors; none runs."""
    from triton.runtime.jit import JITFunction

    launches = []

    def record(self, *args, grid, warmup, **kwargs):
        launches.append((self, dict(zip(self.arg_names, args)) | kwargs))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(kernels, "_runs_triton", return_value=True),
        mock.patch.object(torch.version, "hip", "6" if target.startswith("gfx") else None),
    ):
        for case in cases(shape, dtype).values():
            outputs = case.forward("triton")
            if "backward" in case.kernels:
                case.gradient(outputs)
    return launches


def describe(kernel, arguments: dict) -> str:
    """A launch's constants but strides, and A's row stride, which decides how wide it is loaded."""
    names = [p.name for p in kernel.params if p.is_constexpr and "stride" not in p.name]
    names += ["stride_i"] * ("attn" in arguments)
    return " ".join(f"{name}={arguments[name]}" for name in (*names, *OPTIONS) if name in arguments)


def compile_kernel(kernel, arguments: dict, target: str):
    """One recorded launch compiled for `target`, specialised as Triton's launcher would.

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
        else:
            number = "i32" if value < 2**31 else "i64"
            signature[parameter.name] = "fp32" if isinstance(value, float) else number
        hints[(i,)] = []
        if not isinstance(value, float) and (value.data_ptr() if tensor else value) % 16 == 0:
            hints[(i,)].append(["tt.divisibility", 16])
        if amd and tensor and value.untyped_storage().nbytes() < 2**31:
            hints[(i,)].append(["tt.pointer_range", 32])  # for buffer loads
    options = {name: arguments[name] for name in OPTIONS if name in arguments}
    wave = 64 if target.startswith("gfx9") else 32
    number = target if amd else int(target.removeprefix("sm_"))
    gpu = GPUTarget("hip" if amd else "cuda", number, wave)
    binary = triton.compile(ASTSource(kernel, signature, constants, hints), gpu, options)
    return binary, [name for name, kind in signature.items() if kind != "constexpr"]


def compile_launch(kernel, arguments: dict, target: str) -> dict:
    """What the compiler makes of one recorded launch: the last five columns of compiled()."""
    binary, _ = compile_kernel(kernel, arguments, target)
    amd = target.startswith("gfx")
    found = read_amdgcn(binary.asm["amdgcn"]) if amd else read_cubin(binary.asm["cubin"])
    return found | {"shared": binary.metadata.shared}


def read_cubin(cubin: bytes) -> dict:
    import triton

    cuobjdump = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", "--dump-sass", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = [int(re.search(rf"\b{name}:(\d+)", code)[1]) for name in ("REG", "STACK", "LOCAL")]
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1}
    moved = collections.Counter()
    for modifiers in re.findall(r"\b(?:LDG|LDGSTS|STG)\.E([.\w]*)", code):
        width = next((widths[m] for m in modifiers.split(".") if m in widths), 4)
        moved[width] += width
    return {
        "registers": used[0],
        "spills": used[1] + used[2],
        "tensor_core": len(re.findall(r"\bHG?MMA\b", code)),
        "load_bytes": moved.most_common(1)[0][0],
    }


def read_amdgcn(code: str) -> dict:
    widths = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4,
              "ushort": 2, "short": 2, "ubyte": 1, "byte": 1}
    moved = collections.Counter()
    for name in re.findall(r"\b(?:global|buffer)_(?:load|store)_(dwordx\d|[a-z]+)", code):
        moved[widths.get(name, 4)] += widths.get(name, 4)
    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1]),
        "spills": 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", code)[1]),
        "tensor_core": len(re.findall(r"\bv_mfma", code)),
        "load_bytes": moved.most_common(1)[0][0],
    }


# --------------------------------------------------------------------------------------- times

# What is timed: training and evaluation as shipped (bfloat16 autocast), evaluation with --amp off,
# and 448 px.
TIMED = (
    (Shape(B=128), torch.bfloat16), (Shape(B=128), torch.float32),
    (Shape(B=32, h=28, w=28), torch.bfloat16),
)
SHORT = 1.0  # milliseconds: a shorter call is timed in a CUDA graph, else Python would be timed


def times() -> list[dict]:
    """A row per function, direction and shape: milliseconds on Triton, torch, torch.compile.

    Also GB/s and the share of the roofline: its floor is the longer of least bytes / copy bandwidth
    and least operations / matmul rate, both measured here on the same device.
    """
    return [row for shape, dtype in TIMED for row in times_at(shape, dtype)]


def milliseconds(function: Callable) -> float:
    from triton.testing import do_bench, do_bench_cudagraph

    eager = do_bench(function)
    return do_bench_cudagraph(function) if eager < SHORT else eager


def times_at(shape: Shape, dtype: torch.dtype, device: str = "cuda") -> Iterator[dict]:
    source, target = (torch.empty(1 << 28, dtype=torch.uint8, device=device) for _ in range(2))
    bandwidth = 2e3 * source.nbytes / milliseconds(lambda: target.copy_(source))  # bytes/s
    matrix = torch.empty(8192, 8192, dtype=dtype, device=device).normal_()
    rate = 2e3 * 8192**3 / milliseconds(lambda: matrix @ matrix)  # operations/s
    print(f"{torch.cuda.get_device_name()}, {dtype}: copies at {bandwidth / 1e9:.0f} GB/s, "
          f"matmul at {rate / 1e12:.0f} TFLOP/s", flush=True)

    least, operations = least_bytes(shape, dtype.itemsize), least_operations(shape)
    for name, case in cases(shape, dtype, device).items():
        torch.compiler.reset()  # what was compiled before counts towards the recompilation limit
        compiled_torch = torch.compile(case.forward, fullgraph=True, dynamic=False)
        forward = {
            "triton": lambda: case.forward("triton"),
            "torch": lambda: case.forward("torch"),
            "compile": lambda: compiled_torch("torch"),
        }
        measured = {"forward": forward}
        if "backward" in case.kernels:  # with its forward pass, as one CUDA graph can hold them
            measured["forward + backward"] = {
                backend: lambda run=run: case.gradient(run()) for backend, run in forward.items()
            }
        for direction, functions in measured.items():
            found = {backend: milliseconds(function) for backend, function in functions.items()}
            parts = direction.split(" + ")
            moved = sum(sum(least[kernel].values()) for part in parts
                        for kernel in case.kernels[part])
            seconds = found["triton"] * 1e-3
            floor = max(moved / bandwidth, sum(operations[name, part] for part in parts) / rate)
            yield {
                "function": name, "direction": direction,
                "dtype": str(dtype).removeprefix("torch."), "B": shape.B, "N": shape.h * shape.w,
                **{f"{backend}_ms": value for backend, value in found.items()},
                "gb_per_s": moved / seconds / 1e9, "roofline": floor / seconds,
            }


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

    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.10 changes its default
    os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported
    if targets or torch.cuda.is_available():
        rows = compiled(targets) if targets else times()
        print_table(rows)
    else:
        sys.exit("benchmark: error: no GPU: times need CUDA; --compile runs anywhere")
    if args.json:
        write_rows(args.json, rows)


if __name__ == "__main__":
    main()
