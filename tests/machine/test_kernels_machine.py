"""What the Triton kernels do to a machine: every byte that they touch, counted, and the code that
compilers make of them."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

import kernels
from kernels import benchmark, cdm, rpam
from kernels.benchmark import Shape
from kernels.meter import measure

# ------------------------------------------------------------------------------------------- memory


def passes(shape: Shape, itemsize: int) -> dict[str, dict[str, float]]:
    """How often each kernel may ask for each byte of an input, from what its programs own."""
    B, S, d, h, w, D, C, G, k, K = shape
    P, T, taps = h * w, h * w + 1, k * k
    up = lambda a, b: math.ceil(a / b)
    rows = max(128, max(16, 1 << (d - 1).bit_length()) * itemsize)
    attention = rpam.BLOCKS["attention_kernel"][rows]
    relation = up(T, rpam.BLOCKS["relation_kernel"][rows]["BLOCK_J"])
    one_pass = rpam.BLOCKS["one_pass_kernel"][0]
    row, keys = rpam.BLOCKS["class_row_kernel"], up(T, one_pass["BLOCK_I"])
    aggregate, backward = rpam.BLOCKS["aggregate_kernel"], rpam.BLOCKS["aggregate_backward_kernel"]
    conv, weight = cdm.BLOCKS["conv_kernel"][itemsize], cdm.BLOCKS["conv_weight_kernel"][itemsize]
    spread = cdm.BLOCKS["window_sums_backward_kernel"]
    classes = cdm.BLOCKS["class_products_kernel"][itemsize]
    groups = up(G, cdm.MAX_GROUP)
    images = up(P, conv["BLOCK_P"])
    pairs = up(K * taps, 16 if K * taps <= 16 else 32 if K * taps <= 32 else 64)
    return {
        # Row 0 is read once more in all, and once more by each column block.
        "aggregate_kernel": dict(attn=1 + (1 + up(T, aggregate["BLOCK_J"])) / T),
        "aggregate_backward_kernel": dict(
            attn=1, cls_attn=1, grad_relation=up(T, backward["BLOCK_I"]),
        ),
        "class_row_kernel": dict(q=up(T, row["BLOCK_J"])),
        "class_row_backward_kernel": {},
        "one_pass_kernel": dict(k=keys, v=keys, cls_attn=S),
        "attention_kernel": dict(k=up(T, attention["BLOCK_I"]), v=up(T, attention["BLOCK_I"])),
        "relation_kernel": dict(q=relation, k=1, lse=relation, cls_attn=S * relation),
        # Each tap and each block of channels out reads the image; each image and each block of
        # positions reads the weight.
        "conv_kernel": dict(
            x=taps * up(C, conv["BLOCK_OUT"]), weight=B * images, bias=B * images,
            scores=images * up(C, conv["BLOCK_OUT"]) * taps * up(D, conv["BLOCK_IN"]),
        ),
        "conv_kernel, transposed": dict(
            x=taps * up(D, conv["BLOCK_OUT"]), weight=B * images,
            scores=images * up(D, conv["BLOCK_OUT"]) * taps * up(C, conv["BLOCK_IN"]),
        ),
        "conv_weight_kernel": dict(
            x=taps * groups * up(C, weight["BLOCK_C"]),
            grad=taps * groups * up(D, weight["BLOCK_D"]), weight=B,
            scores=taps * up(C, weight["BLOCK_C"]) * up(D, weight["BLOCK_D"]),
        ),
        "window_sums_kernel": dict(x=1),
        "window_sums_backward_kernel": dict(grad_sums=up(P, spread["BLOCK_P"])),
        "class_products_kernel": dict(
            x=pairs, weight=up(P, classes["BLOCK_P"]),
            scores=up(P, classes["BLOCK_P"]) * pairs * up(D, classes["BLOCK_D"]),
            classes=taps * up(P, classes["BLOCK_P"]),
        ),
    }


@pytest.mark.parametrize("shape, dtype", [
    (Shape(S=3, d=24, h=7, w=11, D=45, C=21, G=5, K=2), torch.float32),
    (Shape(S=2, d=80, h=1, w=67, D=70, C=65, G=3, k=1, K=5), torch.bfloat16),
    (Shape(S=2, d=128, h=9, w=15, D=33, C=17, G=2, K=8), torch.float32),
    (Shape(S=3, d=24, h=9, w=15, D=33, C=17, G=2), torch.float16),
], ids=str)
def test_memory_traffic(shape, dtype):
    """Every byte that must move is touched and no other, as often as the programs' shares say. One
    program stores it."""
    least, allowed = benchmark.least_bytes(shape, dtype.itemsize), passes(shape, dtype.itemsize)
    for kernel, launch in benchmark.metered(shape, dtype):
        assert launch.atomics == 0 and launch.stray == 0, kernel
        assert launch.tensors.keys() == least[kernel].keys(), kernel
        for name, access in launch.tensors.items():
            what = f"{kernel}, {name}"
            assert access.races == 0, what
            if name in ("grad_scores", "partial") and launch.kernel != "class_row_backward_kernel":
                # Partial sums, one for each program's tile: each written, none read.
                assert access.unique == access.issued == access.tensor.nbytes, what
                continue
            assert access.unique == least[kernel][name], what
            assert access.issued <= round(allowed[kernel].get(name, 1) * least[kernel][name]), what


def test_deit_shape_reads_x_and_a_once():
    """The kernels whose point is one read: issued is unique, but for RPAM's weights, row 0 of A."""
    rows = {}
    for name in ("aggregate_attention", "dynamic_conv_logits", "class_maps"):
        with measure() as launches:
            benchmark.cases(Shape(), torch.bfloat16)[name].forward("triton")
        for launch in launches:
            rows |= {(launch.kernel, tensor): used for tensor, used in launch.tensors.items()}
    assert rows["aggregate_kernel", "attn"].unique == 2 * 6 * 197 * 197 * 2
    assert rows["aggregate_kernel", "attn"].issued == 2 * 6 * (197 + 5) * 197 * 2
    for kernel in ("window_sums_kernel", "class_products_kernel"):
        assert rows[kernel, "x"].issued == rows[kernel, "x"].unique == 2 * 196 * 384 * 2


def test_the_meter_sees_faults():
    """A race, a store out of every tensor, and one in a tensor's storage but not in its view."""
    import triton
    import triton.language as tl

    @triton.jit
    def store_kernel(out, OFFSET: tl.constexpr, STEP: tl.constexpr):
        i = OFFSET + STEP * tl.program_id(0) + tl.arange(0, 4)
        tl.store(out + i, i.to(tl.float32))

    memory = torch.zeros(16)
    with measure() as launches:
        store_kernel[(2,)](memory, 0, 4)
        store_kernel[(2,)](memory, 0, 2)
        store_kernel[(2,)](memory[:6], 0, 4)
        with pytest.raises(Exception, match="out of bounds"):
            store_kernel[(2,)](memory, 12, 4)
    good, race, stray, _ = launches
    assert (good.tensors["out"].races, good.stray, good.programs) == (0, 0, 2)
    assert (good.tensors["out"].unique, good.tensors["out"].issued) == (32, 32)
    out = race.tensors["out"]
    assert (out.races, out.unique, out.issued) == (2, 24, 32)
    assert stray.stray == 2


def test_bfloat16_in_the_interpreter_rounds_as_torch_does():
    import triton
    import triton.language as tl

    @triton.jit
    def cast_kernel(values, wide, narrow, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE)
        tl.store(narrow + i, tl.load(values + i).to(tl.bfloat16))
        tl.store(wide + i, tl.load(narrow + i).to(tl.float32))

    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=generator, dtype=torch.int64)
    # every kind of float: subnormal, infinite, not a number
    values = bits.to(torch.int32).view(torch.float32)
    wide, narrow = torch.empty_like(values), torch.empty(4096, dtype=torch.bfloat16)
    cast_kernel[(1,)](values, wide, narrow, 4096)
    torch.testing.assert_close(narrow, values.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(wide, values.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------------------------------- compilers


def start(*flags: str) -> subprocess.Popen:
    """The benchmark in a process of its own: the interpreter replaces the compiler in this one."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.benchmark", *flags]
    root = os.path.dirname(os.path.dirname(kernels.__file__))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=root, env=environment, text=True, **pipes)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("compiled")
    processes = {t: start("--compile", t, "--json", str(folder / t)) for t in ("sm_80", "sm_90")}
    processes["gfx942"] = None
    rows = []
    for target, process in processes.items():
        process = process or start("--compile", target, "--json", str(folder / target))
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        rows += json.loads((folder / target).read_text())
    return rows


FIELDS = {"kernel", "config", "dtype", "target", "registers", "spills", "shared", "tensor_core",
          "load_bytes"}


def test_every_kernel_compiles_for_every_dtype_and_target(compiled):
    import inspect

    jitted = {
        name
        for module in (rpam, cdm)
        for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "fn") and inspect.isfunction(value.fn)
    }
    assert jitted == rpam.BLOCKS.keys() | cdm.BLOCKS.keys()
    for target in benchmark.SHARED_MEMORY:
        for dtype in ("float32", "float16", "bfloat16"):
            found = {r["kernel"] for r in compiled if (r["target"], r["dtype"]) == (target, dtype)}
            # one pass holds whole rows of A, for which 32-bit inputs leave no room: two passes
            assert found == jitted - ({"one_pass_kernel"} if dtype == "float32" else set())
    assert all(row.keys() == FIELDS for row in compiled)


def test_shipped_block_sizes_are_the_compiled_ones(compiled):
    for name, blocks in (rpam.BLOCKS | cdm.BLOCKS).items():
        for config in [blocks] if "num_warps" in blocks else blocks.values():
            words = {f"{key}={value}" for key, value in config.items()}
            configs = [set(row["config"].split()) for row in compiled if row["kernel"] == name]
            assert any(words <= compiled_words for compiled_words in configs), (name, config)


def test_no_spills_and_shared_memory_fits(compiled):
    for row in compiled:
        assert row["spills"] == 0, row
        assert row["shared"] <= benchmark.SHARED_MEMORY[row["target"]], row


def test_tile_products_run_on_tensor_cores(compiled):
    for row in compiled:
        elementwise = row["kernel"].startswith(("aggregate", "class_row"))
        assert (row["tensor_core"] > 0) == (not elementwise), row


def test_most_bytes_move_sixteen_at_a_time(compiled):
    """On NVIDIA, where rows are aligned: those of A, of 197 or 785 elements, are not."""
    for row in compiled:
        odd_rows = any(f"stride_i={T}" in row["config"] for T in (197, 785))
        if row["target"].startswith("sm_") and not odd_rows:
            assert row["load_bytes"] == 16, row


def test_times_table(monkeypatch):
    """What the first GPU runs, on a CPU: every call once, and what its rows are made of."""
    def once(function):
        calls.append(function)
        if len(calls) > 2:  # not the copy and the product that scale the roofline: large
            function()
        return len(calls)  # milliseconds

    calls = []
    monkeypatch.setattr(benchmark, "milliseconds", once)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU")
    shape = Shape(B=1, S=1, d=16, h=2, w=3, D=16, C=3, G=2)
    rows = list(benchmark.times_at(shape, torch.bfloat16, "cpu"))
    assert len(calls) == 2 + 3 * len(rows)
    cases = benchmark.cases(shape, torch.bfloat16)
    directions = [(name, direction) for name, case in cases.items()
                  for direction in ("forward", "forward + backward")[:len(case.kernels)]]
    assert [(row["function"], row["direction"]) for row in rows] == directions
    least, operations = benchmark.least_bytes(shape, 2), benchmark.least_operations(shape)
    for i, row in enumerate(rows):
        times = [row[f"{backend}_ms"] for backend in ("triton", "torch", "compile")]
        assert times == [3 * i + 3, 3 * i + 4, 3 * i + 5]
        parts = row["direction"].split(" + ")
        moved = sum(sum(least[kernel].values()) for part in parts
                    for kernel in cases[row["function"]].kernels[part])
        work = sum(operations[row["function"], part] for part in parts)
        floor = max(moved / (2 * 2**28), 2 * work / (2 * 8192**3))  # ms: copies took 1, matmul 2
        assert row["gb_per_s"] == pytest.approx(moved / times[0] / 1e6)
        assert row["roofline"] == pytest.approx(floor / times[0])


@pytest.mark.parametrize("eager", [0.1, 5.0])
def test_short_calls_are_timed_in_a_cuda_graph(eager, monkeypatch):
    import triton.testing

    monkeypatch.setattr(triton.testing, "do_bench", lambda function: eager)
    monkeypatch.setattr(triton.testing, "do_bench_cudagraph", lambda function: 0.01)
    assert benchmark.milliseconds(lambda: None) == (0.01 if eager < 1 else eager)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_benchmark_says_what_it_lacks():
    process = start()
    output, errors = process.communicate()
    assert (process.returncode, output) == (1, "")
    assert errors.startswith("benchmark: error: no GPU") and errors.count("\n") == 1
    process = start("--compile", "sm_1")
    assert "--compile: got 'sm_1'" in process.communicate()[1] and process.returncode == 2


def test_traffic_table(tmp_path, monkeypatch, capsys):
    small = Shape(S=1, d=16, h=2, w=3, D=16, C=3, G=2)
    monkeypatch.setattr(benchmark.traffic, "__defaults__", (small, torch.bfloat16))
    file = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["benchmark", "--traffic", "--json", str(file)])
    benchmark.main()
    rows = json.loads(file.read_text())
    columns = ["kernel", "tensor", "least", "unique", "issued"]
    assert all(list(row) == columns for row in rows)
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == [*columns, "ratio"] and len(lines) == len(rows)
