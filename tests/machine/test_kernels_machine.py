"""How the interpreter rounds bfloat16, and the code that compilers make of the Triton kernels."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

import kernels
from kernels import benchmark, cdm, rpam
from kernels.benchmark import Shape

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
