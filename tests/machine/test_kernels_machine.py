"""How the interpreter rounds bfloat16, and the code that compilers make of the Triton kernels."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

import kernels
from kernels import benchmark, cdm, interpreter, rpam
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
    interpreter.enable()
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
    """A row for each kernel, shape, dtype and target."""
    file = tmp_path_factory.mktemp("compiled") / "rows.json"
    process = start("--compile", ",".join(benchmark.SHARED_MEMORY), "--json", str(file))
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return json.loads(file.read_text())


@pytest.mark.full
def test_every_kernel_compiles_for_every_dtype_and_target(compiled):
    names = rpam.BLOCKS.keys() | cdm.BLOCKS.keys()
    for target in benchmark.SHARED_MEMORY:
        for dtype in ("float32", "float16", "bfloat16"):
            found = {r["kernel"] for r in compiled if (r["target"], r["dtype"]) == (target, dtype)}
            # one pass holds whole rows of A, for which 32-bit inputs leave no room: two passes
            assert found == names - ({"one_pass_kernel"} if dtype == "float32" else set())
    fields = {"kernel", "config", "dtype", "target", "registers", "spills", "shared",
              "tensor_core", "load_bytes"}
    assert all(row.keys() == fields for row in compiled)


@pytest.mark.full
def test_compiled_kernels_fit_and_use_the_tensor_cores(compiled):
    """Without spills. On NVIDIA loads move 16 bytes where rows are aligned: those of A, of 197 or
    785 elements, are not."""
    for row in compiled:
        assert row["spills"] == 0, row
        assert row["shared"] <= benchmark.SHARED_MEMORY[row["target"]], row
        elementwise = row["kernel"].startswith(("aggregate", "class_row"))
        assert (row["tensor_core"] > 0) == (not elementwise), row
        odd_rows = any(f"stride_i={T}" in row["config"] for T in (197, 785))
        if row["target"].startswith("sm_") and not odd_rows:
            assert row["load_bytes"] == 16, row


def test_times_table(monkeypatch):
    """What a GPU runs, on a CPU: each call once, and what its row is made of."""
    def milliseconds(function):
        calls.append(function)
        if len(calls) > 2:  # not the copy and the product that scale the roofline: large
            function()
        return len(calls)

    calls = []
    monkeypatch.setattr(benchmark, "milliseconds", milliseconds)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    shape = Shape(B=1, S=1, d=16, h=2, w=3, D=16, C=3, G=2)
    rows = list(benchmark.times(shape, torch.bfloat16, "cpu"))
    made = benchmark.calls(shape, torch.bfloat16)
    assert len(calls) == 2 + 3 * len(rows) and [row["call"] for row in rows] == list(made)
    qkv, out, maps = 3 * 7 * 16 * 2, 7 * 16 * 2, (7 + 6) * 4  # bytes; the training row's M^c: 7 * 4
    moved = {0: 3 * qkv + 2 * (out + 7 * 4), 1: qkv + out + maps}
    for i, row in enumerate(rows):
        times = [row[f"{backend}_ms"] for backend in ("triton", "torch", "compile")]
        assert times == [3 * i + 3, 3 * i + 4, 3 * i + 5]
        rate = moved.get(i, row["gb_per_s"] * times[0] * 1e6)
        work = made[row["call"]].operations
        floor = max(rate / (2 * 2**28), 2 * work / (2 * 8192**3))  # ms: copies took 1, matmul 2
        assert row["gb_per_s"] == pytest.approx(rate / times[0] / 1e6)
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
