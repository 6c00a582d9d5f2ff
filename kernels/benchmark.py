"""What the Triton kernels cost: in time on a GPU, in bytes and in machine code anywhere.

    python -m kernels.benchmark                             # on a GPU, minutes: times, GB/s, share of the roofline
    python -m kernels.benchmark --traffic                   # anywhere, a minute: exact bytes against the least
    python -m kernels.benchmark --compile sm_80,sm_90       # anywhere, a minute a target: registers, instructions
    each with --json FILE: the rows of its table, as a list of objects

All modes run the same calls at DeiT-S's shape (224 px, patch 16, CUB's 200 classes). --traffic runs them in Triton's
interpreter, --compile stops each launch and compiles what would have been launched for the target instead.
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


class Shape(NamedTuple):
    """B images, S heads of d channels, h x w patches, D channels, C classes, G kernels of k x k, K asked classes."""

    B: int = 2
    S: int = 6
    d: int = 64
    h: int = 14
    w: int = 14
    D: int = 384
    C: int = 200
    G: int = 4
    k: int = 3
    K: int = 1


class Case(NamedTuple):
    """One public function on its inputs, and by direction the kernels that it launches, as least_bytes names them."""

    function: Callable
    inputs: tuple[Tensor, ...]
    kernels: dict[str, tuple[str, ...]]

    @property
    def differentiable(self) -> bool:
        return "backward" in self.kernels

    def forward(self, backend: str):
        return self.function(*self.inputs, backend=backend)

    def gradient(self, outputs) -> tuple[Tensor, ...]:
        """Backward from ones: what the kernels launch and move does not depend on values."""
        outputs = [outputs] if isinstance(outputs, Tensor) else [o for o in outputs if o is not None]
        return torch.autograd.grad(outputs, self.inputs, [torch.ones_like(o) for o in outputs], retain_graph=True)


def cases(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> dict[str, Case]:
    """The five functions at a shape, with inputs laid out as the model lays them out."""
    B, S, d, h, w, D, C, G, k, K = shape
    T = h * w + 1
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    attn = normal(B, S, T, T).softmax(-1).requires_grad_()
    q, k_, v = normal(B, T, 3, S, d).permute(2, 0, 3, 1, 4)  # views of one packed projection
    x = normal(B, T, D)[:, 1:].mT.unflatten(2, (h, w))  # the token view
    conv = (x, normal(B, G).sigmoid(), normal(G, C, D, k, k) / 64, normal(C))
    leaves = tuple(t.requires_grad_() for t in conv)
    classes = torch.arange(B * K, device=device).view(B, K) % C
    return {
        "aggregate_attention": Case(
            kernels.aggregate_attention, (attn,),
            {"forward": ("aggregate_kernel",), "backward": ("aggregate_backward_kernel",)},
        ),
        "attention": Case(
            functools.partial(kernels.attention, relation=True), (q, k_, v),
            {"forward": ("attention_kernel", "relation_kernel")},
        ),
        "dynamic_conv2d": Case(
            kernels.dynamic_conv2d, leaves,
            {"forward": ("conv_kernel",), "backward": ("conv_kernel, transposed", "conv_weight_kernel")},
        ),
        "dynamic_conv_logits": Case(
            kernels.dynamic_conv_logits, leaves,
            {"forward": ("window_sums_kernel", "GEMM"), "backward": ("window_sums_backward_kernel", "GEMM, backward")},
        ),
        "class_maps": Case(
            kernels.class_maps, (*(t.detach() for t in conv), classes), {"forward": ("class_products_kernel",)}
        ),
    }


def least_bytes(shape: Shape, itemsize: int) -> dict[str, dict[str, int]]:
    """Per kernel and tensor argument: the bytes that any implementation moves, each input and each output once."""
    B, S, d, h, w, D, C, G, k, K = shape
    N, T, e = h * w, h * w + 1, itemsize
    qkv, weight = B * S * T * d * e, G * C * k * k * D * e
    return {
        "aggregate_kernel": dict(attn=B * S * T * T * e, cls_attn=B * T * 4, relation=B * N * 4),
        "aggregate_backward_kernel": dict(
            attn=B * S * T * T * e, cls_attn=B * T * 4, grad_relation=B * N * 4, grad_guide=B * T * 4,
            grad_attn=B * (T - 1) * T * e,  # row 0 follows
        ),
        "attention_kernel": dict(q=qkv, k=qkv, v=qkv, out=qkv, lse=B * S * T * 4, cls_rows=B * S * T * 4),
        "relation_kernel": dict(q=qkv, k=qkv, lse=B * S * T * 4, cls_attn=B * T * 4, columns=B * S * T * 4),
        "conv_kernel": dict(x=B * N * D * e, scores=B * G * 4, weight=weight, bias=C * e, out=B * N * C * e),
        "conv_kernel, transposed": dict(x=B * N * C * e, scores=B * G * 4, weight=weight, out=B * N * D * e),
        "conv_weight_kernel": dict(
            x=B * N * D * e, grad=B * N * C * e, scores=B * G * 4, weight=weight, grad_weight=weight,
            grad_scores=B * G * 4,
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
    return {
        ("aggregate_attention", "forward"): 2 * B * S * T * T,
        ("aggregate_attention", "backward"): 2 * B * S * T * T,
        ("attention", "forward"): 6 * B * S * T * T * d,  # Q K^T, P V, and Q K^T again
        ("dynamic_conv2d", "forward"): conv,
        ("dynamic_conv2d", "backward"): 2 * conv,
        ("dynamic_conv_logits", "forward"): gemm,
        ("dynamic_conv_logits", "backward"): 2 * gemm,
        ("class_maps", "forward"): 2 * B * K * N * D * k * k,
    }


# ------------------------------------------------------------------------------------------------------- --traffic


def metered(shape: Shape, dtype: torch.dtype) -> Iterator[tuple]:
    """(kernel, meter.Launch) of every launch of every case, in Triton's interpreter."""
    from . import meter

    for case in cases(shape, dtype).values():
        with meter.measure() as launches:
            outputs = case.forward("triton")
            if case.differentiable:
                case.gradient(outputs)
        for launch in launches:
            transposed = launch.kernel == "conv_kernel" and "bias" not in launch.tensors
            yield launch.kernel + ", transposed" * transposed, launch


def traffic(shape: Shape = Shape(), dtype: torch.dtype = torch.bfloat16) -> list[dict]:
    """A row per kernel and tensor: bytes at least, touched, and asked for by the kernel's loads and stores."""
    least = least_bytes(shape, dtype.itemsize)
    return [
        {"kernel": kernel, "tensor": name, "least": least[kernel][name], "unique": used.unique, "issued": used.issued}
        for kernel, launch in metered(shape, dtype)
        for name, used in launch.tensors.items()
    ]


# ------------------------------------------------------------------------------------------------------- --compile

# What is compiled: DeiT-S on CUB; the widest head, 1x1 kernels, seven asked classes and an A whose rows are aligned;
# more kernels than are loaded ahead.
SHAPES = (Shape(), Shape(d=128, k=1, h=9, w=23, K=7), Shape(G=16))
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64"}
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}  # bytes that one program may have


def compiled(targets: list[str]) -> list[dict]:
    """A row per kernel, config, dtype and target: what the compiler makes of exactly what the cases launch.

    registers: a thread's; spills: bytes of its local memory; shared: bytes; tensor_core: instructions; load_bytes: the
    width of load and store instructions by which the code moves most of its bytes.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("--compile: TRITON_INTERPRET=1 is set, which replaces the compiler: unset it")
    rows = {}
    for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.float16, torch.bfloat16)):
        for kernel, arguments in recorded_launches(shape, dtype):
            for target in targets:
                key = (kernel.__name__, describe(kernel, arguments), str(dtype).removeprefix("torch."), target)
                if key not in rows:
                    rows[key] = dict(zip(("kernel", "config", "dtype", "target"), key))
                    rows[key] |= compile_launch(kernel, arguments, target)
    return list(rows.values())


def recorded_launches(shape: Shape, dtype: torch.dtype) -> list[tuple]:
    """(kernel, its arguments by name) of every launch of every case, on CPU tensors, with none of them run."""
    from triton.runtime.jit import JITFunction

    launches = []

    def record(self, *args, grid, warmup, **kwargs):
        launches.append((self, dict(zip(self.arg_names, args)) | kwargs))

    with mock.patch.object(JITFunction, "run", record), mock.patch.object(kernels, "_runs_triton", return_value=True):
        for case in cases(shape, dtype).values():
            outputs = case.forward("triton")
            if case.differentiable:
                case.gradient(outputs)
    return launches


def describe(kernel, arguments: dict) -> str:
    """A launch's compile-time constants, but for strides, and A's row stride, which decides how wide it is loaded."""
    constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr and "stride" not in p.name}
    constants |= {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    if "attn" in arguments:
        constants["stride_i"] = arguments["stride_i"]
    return " ".join(f"{name}={value}" for name, value in constants.items())


def compile_launch(kernel, arguments: dict, target: str) -> dict:
    """Compiles one recorded launch for `target` as Triton's launcher would have specialised it, and reads the code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = target.startswith("gfx")
    arguments = dict(arguments)
    if amd and "PRECISION" in arguments:
        arguments["PRECISION"] = "ieee"  # what dot_precision() says there
    signature, constants, hints = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or not isinstance(value, Tensor) and value == 1:
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        signature[parameter.name] = (
            POINTERS[value.dtype] if isinstance(value, Tensor) else "fp32" if isinstance(value, float) else "i32"
        )
        if (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0:
            hints[(i,)] = [["tt.divisibility", 16]]
    options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    source = ASTSource(kernel, signature, constants, hints)
    binary = triton.compile(source, target=gpu, options=options)
    statistics = read_amdgcn(binary.asm["amdgcn"]) if amd else read_cubin(binary.asm["cubin"])
    return statistics | {"shared": binary.metadata.shared}


def read_cubin(cubin: bytes) -> dict:
    import triton

    cuobjdump = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", "--dump-sass", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", code)[1]) for name in ("REG", "STACK", "LOCAL"))
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1}
    moved = collections.Counter()
    for modifiers in re.findall(r"\b(?:LDG|LDGSTS|STG)\.E([.\w]*)", code):
        width = next((widths[m] for m in modifiers.split(".") if m in widths), 4)
        moved[width] += width
    return {
        "registers": registers,
        "spills": stack + local,
        "tensor_core": len(re.findall(r"\bHG?MMA\b", code)),
        "load_bytes": moved.most_common(1)[0][0],
    }


def read_amdgcn(code: str) -> dict:
    widths = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1}
    moved = collections.Counter()
    for name in re.findall(r"\b(?:global|buffer)_(?:load|store)_(dwordx\d|[a-z]+)", code):
        moved[widths.get(name, 4)] += widths.get(name, 4)
    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1]),
        "spills": 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", code)[1]),
        "tensor_core": len(re.findall(r"\bv_mfma", code)),
        "load_bytes": moved.most_common(1)[0][0],
    }


# ----------------------------------------------------------------------------------------------------------- times


def times(shape: Shape = Shape(B=128), dtype: torch.dtype = torch.bfloat16) -> list[dict]:
    """A row per function and direction: milliseconds on Triton, torch, torch.compile; GB/s; share of the roofline.

    The roofline's floor is the longer of least bytes / copy bandwidth and least operations / matmul rate, both measured
    here on the same device. Torch runs the fast path of `kernels`, not the naive twin.
    """
    from torch._functorch import config
    from triton.testing import do_bench

    config.donated_buffer = False  # else compiled backward passes cannot run again
    size = 1 << 28
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    bandwidth = 2 * size / do_bench(lambda: target.copy_(source)) / 1e-3  # bytes/s: one read, one write
    matrix = torch.randn(8192, 8192, dtype=dtype, device="cuda")
    rate = 2 * 8192**3 / do_bench(lambda: matrix @ matrix) / 1e-3  # operations/s
    print(f"{torch.cuda.get_device_name()}: copies at {bandwidth / 1e9:.0f} GB/s, matmul at {rate / 1e12:.0f} TFLOP/s")

    least, operations = least_bytes(shape, dtype.itemsize), least_operations(shape)
    rows = []
    for name, case in cases(shape, dtype, "cuda").items():
        compiled_torch = torch.compile(case.forward, fullgraph=True, dynamic=False)
        runs = {
            "triton": lambda: case.forward("triton"),
            "torch": lambda: case.forward("torch"),
            "compile": lambda: compiled_torch("torch"),
        }
        directions = {"forward": runs}
        if case.differentiable:
            directions["backward"] = {
                backend: functools.partial(case.gradient, run()) for backend, run in runs.items()
            }
        for direction, functions in directions.items():
            milliseconds = {backend: do_bench(function) for backend, function in functions.items()}
            moved = sum(sum(least[kernel].values()) for kernel in case.kernels[direction])
            seconds = milliseconds["triton"] * 1e-3
            floor = max(moved / bandwidth, operations[name, direction] / rate)
            rows.append(
                {"function": name, "direction": direction, "dtype": str(dtype).removeprefix("torch.")}
                | {f"{backend}_ms": value for backend, value in milliseconds.items()}
                | {"gb_per_s": moved / seconds / 1e9, "roofline": floor / seconds}
            )
    return rows


# ------------------------------------------------------------------------------------------------------------ main


def print_table(rows: list[dict]) -> None:
    def text(value) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    columns = {name: [name, *(text(row[name]) for row in rows)] for name in rows[0]}
    widths = [max(map(len, cells)) for cells in columns.values()]
    for cells in zip(*columns.values()):
        print("  ".join(c.ljust(w) if not c[:1].isdigit() else c.rjust(w) for c, w in zip(cells, widths)).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--traffic", action="store_true", help="count bytes in the interpreter")
    mode.add_argument("--compile", metavar="TARGETS", help=f"comma-separated, of {', '.join(SHARED_MEMORY)}")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    args = parser.parse_args()
    targets = args.compile.split(",") if args.compile is not None else []
    for target in targets:
        if target not in SHARED_MEMORY:
            parser.error(f"--compile: got {target!r}, need some of {', '.join(SHARED_MEMORY)}")

    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.10 changes its default
    os.environ["TRITON_INTERPRET"] = "1" if args.traffic else "0"  # before triton is imported
    if args.traffic:
        rows = traffic()
    elif targets:
        rows = compiled(targets)
    elif torch.cuda.is_available():
        rows = times()
    else:
        sys.exit("benchmark: error: no GPU: times need CUDA; --traffic and --compile run anywhere")
    if args.traffic:
        print_table([row | {"ratio": row["issued"] / row["least"]} for row in rows])
    else:
        print_table(rows)
    if args.json:
        partial = pathlib.Path(f"{args.json}.partial")
        partial.write_text(json.dumps(rows, indent=1) + "\n")
        partial.replace(args.json)


if __name__ == "__main__":
    main()
