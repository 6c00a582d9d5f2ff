"""What LCTR costs over a plain ViT in time and memory; and what loading images costs.

    python docs/speed.py [--repeats N] [--json FILE]     # anywhere; about 8 minutes on 2 idle cores

The floor is DeiT-S with fused attention and one linear layer on the mean patch token. Both run in
one process, interleaved: medians, and the median of their paired ratios. Memory is measured in
processes of its own. The loader's floor decodes JPEGs at full scale. docs/results/end_to_end.json
holds such a run.
"""

import argparse
import collections
import concurrent.futures
import functools
import multiprocessing
import pathlib
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import PIL
import torch
import torch.nn.functional as F
from PIL import Image, JpegImagePlugin
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

DOCS = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "experiments")]

import data
import kernels
from kernels.benchmark import print_table, write_rows
from lctr import LCTR, Attention, VisionTransformer
from record import machine
from support.pictures.birds import draw_bird


class FusedAttention(Attention):
    """Attention without maps."""

    def forward(self, x: Tensor, attention: str) -> tuple[Tensor, None]:
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)  # (B, S, N+1, D/S)
        return self.proj(out.transpose(1, 2).reshape(B, T, D)), None


class PlainViT(VisionTransformer):
    """The floor: the same backbone, fused attention, one linear layer on the mean patch token."""

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
    """Makes a model and its inputs; the result does the work once, on CUDA under bf16 autocast."""
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


def paired_seconds(
    floor: Callable[[], None], ours: Callable[[], None], repeats: int
) -> dict[str, float]:
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
    """Multiplications and additions in the matrix products of localize, or of training's forward
    pass and, where `backward` is set, its backward pass.

    Torch counts them, on no data; it sees neither fused attention nor custom operators.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    with torch.device("meta"):
        network = model(work.num_classes, img_size=work.img_size, **sizes)
        images = torch.empty(work.batch, 3, work.img_size, work.img_size)
    plain = sdpa_kernel(SDPBackend.MATH), kernels.use_backend("torch")
    with FlopCounterMode(display=False) as counter, plain[0], plain[1]:
        output = network.localize(images) if work.task == "localize" else network(images)
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


def peak_memory(work: Work, model: type[nn.Module]) -> int:
    """Bytes at the peak of doing the work twice, model and optimiser included, in a fresh process.

    On CUDA those that torch allocates; on a CPU (Linux) the process's growth since its imports.
    """

    def resident(name: str) -> int:
        status = pathlib.Path("/proc/self/status").read_text()
        return 1024 * int(re.search(rf"{name}:\s*(\d+) kB", status)[1])

    before = resident("VmRSS")
    run = prepare(work, model)
    run(), run()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM") - before


def row(
    work: str, unit: str, lctr: float, floor: float | None, ratio: float | None,
    images_per_s: float | None = None, peak_share: float | None = None,
) -> dict:
    """Of end_to_end's table; None where there is nothing to tell."""
    return {"work": work, "ratio": ratio, "lctr": lctr, "floor": floor, "unit": unit,
            "images_per_s": images_per_s, "peak_share": peak_share}


def end_to_end(repeats: int) -> tuple[dict, list[dict]]:
    """The machine; and a row per work, its memory, and way to load data.

    A row has LCTR's figure and the floor's, the median of their paired ratios, LCTR's images a
    second, and its matrix products' operations a second as a share of one large product's.
    """
    cuda = torch.cuda.is_available()
    device, size, dtype = ("cuda", 8192, torch.bfloat16) if cuda else ("cpu", 2048, torch.float32)
    repeats *= 10 if device == "cuda" else 1
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    products = [seconds(lambda: matrix @ matrix) for _ in range(10)]
    rate = 2 * size**3 / statistics.median(products[1:])  # operations/s
    versions = f"torch {torch.__version__}, Pillow {PIL.__version__}"
    about = {"machine": f"{machine()}, {torch.get_num_threads()} threads",
             "matmul": f"{dtype}, {rate / 1e12:.3g} TFLOP/s",
             "versions": f"Python {platform.python_version()}, {versions}"}

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
            pairs = [  # several, for each process lays out its heap differently
                tuple(pool.submit(peak_memory, work, model).result() / 2**20
                      for model in (PlainViT, LCTR))
                for _ in range(min(repeats, 5))
            ]
        rows.append(row(f"{work}: memory", "MiB", **medians(pairs)))
    return about, rows + loading(repeats)


def loading(repeats: int, count: int = 64) -> list[dict]:
    """end_to_end's rows for data: milliseconds a sample, in one process on one core."""
    rows, threads = [], torch.get_num_threads()
    print("loading ...", file=sys.stderr, flush=True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        pictures = pathlib.Path(folder, "train", "bird")
        pictures.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(draw_bird(0, i, (375, 500))[0]).save(pictures / f"{i}.jpg", quality=90)
        for img_size in (224, 112):
            dataset = data.load_dataset("folder", folder, "train", img_size)

            def load() -> None:
                collections.deque(data.loader(dataset, [list(range(count))]), maxlen=0)

            def load_in_full() -> None:
                full = mock.patch.object(JpegImagePlugin.JpegImageFile, "draft", lambda *_: None)
                with full:
                    load()

            lctr, floor, ratio = paired_seconds(load_in_full, load, repeats).values()
            rows.append(row(f"load a 500x375 JPEG for {img_size} px", "ms", 1e3 * lctr / count,
                            1e3 * floor / count, ratio, count / lctr))

    def draw() -> None:
        for i in range(count):
            draw_bird(0, i, (64, 64))

    birds = statistics.median(seconds(draw) for _ in range(repeats))
    torch.set_num_threads(threads)
    return [*rows, row("draw a 64 px bird", "ms", 1e3 * birds / count, None, None, count / birds)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs per row")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats: got {args.repeats}, need 1 or more")
    about, rows = end_to_end(args.repeats)
    print(*about.values(), sep="; ")
    print_table(rows)
    if args.json:
        write_rows(args.json, [row | about for row in rows])


if __name__ == "__main__":
    main()
