"""How the interpreter rounds bfloat16, and the code that compilers make of the Triton kernels."""

import collections
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

pytest.importorskip("triton")

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


def run_benchmark(*flags: str) -> subprocess.CompletedProcess:
    """In a process of its own: the interpreter replaces the compiler in this one."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-m", "kernels.benchmark", *flags], cwd=ROOT,
                          env=environment, text=True, capture_output=True)


@pytest.mark.full
def test_compiled_kernels_fit_and_use_the_tensor_cores(tmp_path):
    """Every kernel for every dtype and target, without spills. On NVIDIA loads move 16 bytes where
    rows are aligned: those of A, of 197 or 785 elements, are not."""
    file, targets = tmp_path / "rows.json", benchmark.SHARED_MEMORY
    ended = run_benchmark("--compile", ",".join(targets), "--json", str(file))
    assert ended.returncode == 0, ended.stderr
    kernels_of = collections.defaultdict(set)
    for row in json.loads(file.read_text()):
        kernels_of[row["target"], row["dtype"]].add(row["kernel"])
        assert row["spills"] == 0, row
        assert row["shared"] <= targets[row["target"]], row
        elementwise = row["kernel"].startswith(("aggregate", "class_row"))
        assert (row["tensor_core"] > 0) == (not elementwise), row
        odd_rows = any(f"stride_i={T}" in row["config"] for T in (197, 785))
        if row["target"].startswith("sm_") and not odd_rows:
            assert row["load_bytes"] == 16, row

    names = rpam.BLOCKS.keys() | cdm.BLOCKS.keys()
    for target, dtype in itertools.product(targets, ("float32", "float16", "bfloat16")):
        # one pass holds whole rows of A, for which 32-bit inputs leave no room: two passes
        left_out = {"one_pass_kernel"} if dtype == "float32" else set()
        assert kernels_of[target, dtype] == names - left_out


def test_times_table(monkeypatch):
    """What a GPU runs, on a CPU, where everything takes 2 ms: bytes moved, roofline."""
    timed = []

    def milliseconds(function):
        timed.append(function)
        if len(timed) > 2:  # not the copy and the product that scale the roofline: large
            function()
        return 2.0

    monkeypatch.setattr(benchmark, "milliseconds", milliseconds)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    shape = Shape(B=1, S=1, d=16, h=2, w=3, D=16, C=3, G=2)
    rows = list(benchmark.times(shape, torch.bfloat16, "cpu"))
    made = benchmark.calls(shape, torch.bfloat16)
    assert [row["call"] for row in rows] == list(made)

    qkv, out, cls_attn, relation = 3 * 7 * 16 * 2, 7 * 16 * 2, 7 * 4, 6 * 4  # bytes
    training, localisation = 3 * qkv + 2 * (out + cls_attn), qkv + out + cls_attn + relation
    for row, moved in zip(rows, (training, localisation)):
        assert row["gb_per_s"] == pytest.approx(moved / 2e6)
        operations = made[row["call"]].operations
        assert row["roofline"] == pytest.approx(max(moved / 2**29, operations / (2 * 8192**3)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_benchmark_says_what_it_lacks():
    ended = run_benchmark()
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("benchmark: error: no GPU") and ended.stderr.count("\n") == 1
    ended = run_benchmark("--compile", "sm_1")
    assert ended.returncode == 2 and "--compile: got 'sm_1'" in ended.stderr
