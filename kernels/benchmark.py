"""What the Triton kernels cost: in time on a GPU, in bytes and in machine code anywhere; and what LCTR costs in all.

    python -m kernels.benchmark                             # on a GPU, minutes: times, GB/s, share of the roofline
    python -m kernels.benchmark --traffic                   # anywhere, a minute: exact bytes against the least
    python -m kernels.benchmark --compile sm_80,sm_90       # anywhere, a minute a target: registers, instructions
    python -m kernels.benchmark --end-to-end                # anywhere, 8 minutes on 2 cores: LCTR against a plain ViT
    each with --json FILE: the rows of its table, as a list of objects

The first three run the same calls at DeiT-S's shape (224 px, patch 16, CUB's 200 classes). --traffic runs them in
Triton's interpreter, --compile stops each launch and compiles what would have been launched for the target instead.
"""

import argparse
import collections
import concurrent.futures
import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import PIL
import torch
import torch.nn.functional as F
from PIL import Image, JpegImagePlugin
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
import kernels
from lctr import LCTR, Attention, VisionTransformer


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


# ---------------------------------------------------------------------------------------------------- --end-to-end


class FusedAttention(Attention):
    """Attention without maps."""

    def forward(self, x: Tensor, attention: str) -> tuple[Tensor, None]:
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, S, N+1, D/S)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D)), None


class PlainViT(VisionTransformer):
    """The floor under LCTR's cost: the same backbone, fused attention, one linear layer on the mean patch token."""

    def __init__(self, num_classes: int, embed_dim: int = 384, num_heads: int = 6, **sizes):
        super().__init__(embed_dim=embed_dim, num_heads=num_heads, **sizes)
        for block in self.blocks:
            block.attn = FusedAttention(embed_dim, num_heads)
        self.classifier = nn.Linear(embed_dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.forward_features(images)[0][:, 1:].mean(1))

    @torch.no_grad()
    def localize(self, images: Tensor) -> Tensor:
        return self(images)


class Work(NamedTuple):
    """What both models do, DeiT-S on `batch` images."""

    task: str  # "train" or "localize"
    num_classes: int
    img_size: int
    batch: int

    def __str__(self) -> str:
        return f"{self.task}, C={self.num_classes}, {self.batch} x {self.img_size} px"


TIMED = (
    Work("train", 200, 224, 32),
    Work("train", 1000, 224, 32),
    Work("localize", 200, 224, 32),
    Work("localize", 1000, 224, 32),
    Work("localize", 200, 448, 8),
)
MEASURED = (TIMED[0], TIMED[-1])  # for memory


def prepare(work: Work, model: type[nn.Module]) -> Callable[[], None]:
    """Makes a model and its inputs; the result does the work once: on CUDA in bfloat16 where autocast allows."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    network = model(work.num_classes, img_size=work.img_size).to(device)
    images = torch.randn(work.batch, 3, work.img_size, work.img_size, device=device)
    labels = torch.randint(work.num_classes, (work.batch,), device=device)
    autocast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=device == "cuda")

    def localize() -> None:
        with autocast():
            network.localize(images)

    def step() -> None:
        with autocast():
            loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if work.task == "localize":
        network.eval()
        return localize
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    return step


def seconds(run: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def paired_seconds(floor: Callable[[], None], ours: Callable[[], None], repeats: int) -> dict[str, float]:
    """Medians of both in turn, in alternating order, after one run each to warm up."""
    pairs = []
    for i in range(repeats + 1):
        first = seconds(ours) if i % 2 else None
        pairs.append((seconds(floor), first or seconds(ours)))
    return medians(pairs[1:])


def medians(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Of pairs (floor, LCTR), and of their ratios pair by pair."""
    floor, ours, ratio = (statistics.median(c) for c in zip(*((f, o, o / f) for f, o in pairs)))
    return {"lctr": ours, "floor": floor, "ratio": ratio}


def operations(work: Work, model: type[nn.Module], backward: bool = False, **sizes) -> int:
    """Multiplications and additions in the matrix products of localize, or of training's forward pass and, where
    asked, its backward pass: counted by torch, which sees neither fused attention nor custom operators, on no data."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    with torch.device("meta"):
        network = model(work.num_classes, img_size=work.img_size, **sizes)
        images = torch.empty(work.batch, 3, work.img_size, work.img_size)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), kernels.use_backend("torch"):
        output = network.localize(images) if work.task == "localize" else network(images)
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


def peak_memory(work: Work, model: type[nn.Module]) -> int:
    """Bytes at the peak of doing the work twice, model and optimiser included, in a process that does nothing else: on
    CUDA those that torch has allocated, on a CPU (Linux) what the process came to hold in RAM since its imports."""

    def resident(name: str) -> int:
        return 1024 * int(re.search(rf"{name}:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])

    before = resident("VmRSS")
    run = prepare(work, model)
    run(), run()
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM") - before


def row(work: str, unit: str, lctr: float, floor: float | None, ratio: float | None, images_per_s: float | None = None,
        peak_share: float | None = None) -> dict:
    """Of end_to_end's table; None where there is nothing to tell."""
    return {"work": work, "ratio": ratio, "lctr": lctr, "floor": floor, "unit": unit, "images_per_s": images_per_s,
            "peak_share": peak_share}


def end_to_end(repeats: int) -> tuple[dict, list[dict]]:
    """The machine; and a row per work, its memory, and way to load data: LCTR's figure and the floor's, median of their
    paired ratios, LCTR's images a second, and its matrix products' operations a second as a share of a large one's."""
    device, size, dtype = ("cuda", 8192, torch.bfloat16) if torch.cuda.is_available() else ("cpu", 2048, torch.float32)
    repeats *= 10 if device == "cuda" else 1
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    rate = 2 * size**3 / statistics.median([seconds(lambda: matrix @ matrix) for _ in range(10)][1:])  # operations/s
    about = {"machine": machine(), "matmul": f"{dtype}, {rate / 1e12:.3g} TFLOP/s",
             "versions": f"Python {platform.python_version()}, torch {torch.__version__}, Pillow {PIL.__version__}"}

    rows = []
    for work in TIMED:
        print(work, "...", file=sys.stderr, flush=True)
        measured = paired_seconds(prepare(work, PlainViT), prepare(work, LCTR), repeats)
        count = operations(work, LCTR, backward=work.task == "train")
        rows.append(row(str(work), "s", **measured, images_per_s=work.batch / measured["lctr"],
                        peak_share=count / measured["lctr"] / rate))
    for work in MEASURED:
        print(f"{work}: memory ...", file=sys.stderr, flush=True)
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
            pairs = [tuple(pool.submit(peak_memory, work, model).result() / 2**20 for model in (PlainViT, LCTR))
                     for _ in range(min(repeats, 5))]  # the heap falls into place differently in each process
        rows.append(row(f"{work}: memory", "MiB", **medians(pairs)))
    return about, rows + loading(repeats)


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = pathlib.Path("/proc/cpuinfo")  # Linux
    name = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return f"{name[1] if name else platform.machine()}, {torch.get_num_threads()} threads on {os.cpu_count()} cores"


def loading(repeats: int, count: int = 64) -> list[dict]:
    """end_to_end's rows for data, milliseconds a sample in one process on one core; the floor decodes at full scale."""
    rows, threads = [], torch.get_num_threads()
    print("loading ...", file=sys.stderr, flush=True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        pictures = pathlib.Path(folder, "train", "bird")
        pictures.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(data.draw_bird(0, i, (375, 500))[0]).save(pictures / f"{i}.jpg", quality=90)
        for img_size in (224, 112):
            dataset = data.load_dataset("folder", folder, "train", img_size)

            def load() -> None:
                collections.deque(data.loader(dataset, [list(range(count))]), maxlen=0)

            def load_in_full() -> None:
                with mock.patch.object(JpegImagePlugin.JpegImageFile, "draft", lambda *_: None):
                    load()

            lctr, floor, ratio = paired_seconds(load_in_full, load, repeats).values()
            rows.append(row(f"load a 500x375 JPEG for {img_size} px", "ms", 1e3 * lctr / count, 1e3 * floor / count,
                            ratio, count / lctr))
    birds = statistics.median(seconds(lambda: [data.draw_bird(0, i) for i in range(count)]) for _ in range(repeats))
    torch.set_num_threads(threads)
    return [*rows, row("draw a 64 px bird", "ms", 1e3 * birds / count, None, None, count / birds)]


# ------------------------------------------------------------------------------------------------------------ main


def print_table(rows: list[dict]) -> None:
    def text(value) -> str:
        return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    columns = {name: [name, *(text(row[name]) for row in rows)] for name in rows[0]}
    widths = [max(map(len, cells)) for cells in columns.values()]
    for cells in zip(*columns.values()):
        print("  ".join(c.ljust(w) if not c[:1].isdigit() else c.rjust(w) for c, w in zip(cells, widths)).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--traffic", action="store_true", help="count bytes in the interpreter")
    mode.add_argument("--compile", metavar="TARGETS", help=f"comma-separated, of {', '.join(SHARED_MEMORY)}")
    mode.add_argument("--end-to-end", action="store_true",
                      help="LCTR against a plain ViT in time and memory, and the loader; 8 minutes on 2 idle cores")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs per row of --end-to-end")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    args = parser.parse_args()
    targets = args.compile.split(",") if args.compile is not None else []
    for target in targets:
        if target not in SHARED_MEMORY:
            parser.error(f"--compile: got {target!r}, need some of {', '.join(SHARED_MEMORY)}")

    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.10 changes its default
    os.environ["TRITON_INTERPRET"] = "1" if args.traffic else "0"  # before triton is imported
    if args.repeats < 1:
        parser.error(f"--repeats: got {args.repeats}, need 1 or more")
    about = {}
    if args.traffic:
        rows = traffic()
    elif args.end_to_end:
        about, rows = end_to_end(args.repeats)
        print(*about.values(), sep="; ")
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
        partial.write_text(json.dumps([row | about for row in rows], indent=1) + "\n")
        partial.replace(args.json)


if __name__ == "__main__":
    main()
