"""Faults planted in the Triton kernels, one at a time: each must fail a check that the true kernels pass.

A mutant is a copy of the package with one piece of one kernel's source replaced, imported under a name of its own.
"""

import importlib
import pathlib

import pytest

pytest.importorskip("triton")
from triton.runtime.errors import InterpreterError

import kernels
from kernels.meter import measure
from test_kernels import AttentionCase, ConvCase, check_aggregate, check_attention, check_class_maps, check_conv

ATTENTION, CONV = AttentionCase(), ConvCase(D=37, C=70, G=5)


def attention(module):
    check_attention(module, ATTENTION)


def wide_attention(module):
    check_attention(module, ATTENTION._replace(N=130))


def aggregate(module):
    check_aggregate(module, ATTENTION)


def conv(module):
    check_conv(module, CONV)


def logits(module):
    check_conv(module, CONV, "dynamic_conv_logits")


def padded_logits(module):
    check_conv(module, CONV, "dynamic_conv_logits", pool="padded")


def class_maps(module):
    check_class_maps(module, CONV, K=9)


MUTATIONS = {
    # name: (file, source, its replacement, the check that must fail)
    "aggregate: off-by-one mask": (
        "rpam.py",
        "column, mask=(j >= 1) & (j < T))",
        "column, mask=(j >= 1) & (j < T - 1))",
        aggregate,
    ),
    "aggregate: a dropped head": (
        "rpam.py",
        "            guide += tl.load(head",
        "            guide = tl.load(head",
        aggregate,
    ),
    "aggregate: a missing 1 / (N+1)": (
        "rpam.py",
        "/ (S * S * T)",
        "/ (S * S)",
        aggregate,
    ),
    "aggregate: a swapped stride": (
        "rpam.py",
        "guide += tl.load(head + i * stride_j",
        "guide += tl.load(head + i * stride_i",
        aggregate,
    ),
    "aggregate: a skipped row block": (
        "rpam.py",
        "        total += guide[:, None] * heads",
        "        total += tl.where(start > 0, guide[:, None] * heads, 0.0)",
        aggregate,
    ),
    "aggregate backward: a lost column block": (
        "rpam.py",
        "total += heads * g[None, :]",
        "total = heads * g[None, :]",
        aggregate,
    ),
    "aggregate backward: row 0 without its own term": (
        "rpam.py",
        " + grad_cls + grad_guide",
        " + grad_cls",
        aggregate,
    ),
    "attention: no mask on the last columns": (
        "rpam.py",
        'score = tl.where(j[None, :] < T, score, float("-inf"))',
        "pass",
        attention,
    ),
    "attention: an accumulator that does not decay": (
        "rpam.py",
        "acc * decay[:, None]",
        "acc",
        attention,
    ),
    "attention: the class row of row 1": (
        "rpam.py",
        "tl.where(i == 0, row_lse, 0.0)",
        "tl.where(i == 1, row_lse, 0.0)",
        attention,
    ),
    "relation: a skipped column block": (
        "rpam.py",
        'grid = (triton.cdiv(T, blocks["BLOCK_J"]), B * S)',
        'grid = (T // blocks["BLOCK_J"], B * S)',
        attention,
    ),
    "relation: an unscaled logit": (
        "rpam.py",
        "score = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale",
        "score = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)",
        attention,
    ),
    "conv: a wrong tap": (
        "cdm.py",
        "tap * stride_tap + c_in",
        "(tap ^ 1) * stride_tap + c_in",
        conv,
    ),
    "conv: a lost border row": (
        "cdm.py",
        "inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)\n        x_tile",
        "inside = (row >= 0) & (row < H - 1) & (column >= 0) & (column < W)\n        x_tile",
        conv,
    ),
    "conv: columns that wrap around": (
        "cdm.py",
        "& (row < H) & (column >= 0) & (column < W)\n        x_tile",
        "& (row < H)\n        x_tile",
        conv,
    ),
    "conv: an unscaled score": (
        "cdm.py",
        "kernel += tl.load(scores + g) * w_tile\n",
        "kernel += w_tile\n",
        conv,
    ),
    "conv: scores of the first image": (
        "cdm.py",
        "    scores += b * G\n",
        "",
        conv,
    ),
    "conv: a gradient that does not mirror": (
        "cdm.py",
        "row = p // W + DIRECTION * (",
        "row = p // W + (",
        conv,
    ),
    "conv gradient: a dropped image": (
        "cdm.py",
        "for b in range(B):",
        "for b in range(1, B):",
        conv,
    ),
    "conv gradient: a kernel beyond the fourth": (
        "cdm.py",
        "taps * triton.cdiv(G, group)",
        "taps",
        conv,
    ),
    "conv gradient: W of another tap": (
        "cdm.py",
        "* KERNEL * KERNEL + tap) * D + d[None, None, :]",
        "* KERNEL * KERNEL) * D + d[None, None, :]",
        conv,
    ),
    "window sums: a place that wraps around": (
        "cdm.py",
        "(row < H) & (column >= 0) & (column < W)\n    count",
        "(row < H)\n    count",
        logits,
    ),
    "window sums: a mean over the window only": (
        "cdm.py",
        "mean = acc / (9 * H * W if PADDED else H * W)",
        "mean = acc / (9 * H * W if PADDED else (H - 1) * (W - 1))",
        logits,
    ),
    "padded pool: a corner too light": (
        "cdm.py",
        "count *= 1 + (column > 0)",
        "count *= 0 + (column > 0)",
        padded_logits,
    ),
    "window sums backward: a swapped tap": (
        "cdm.py",
        "window_counts(p[:, None], tap[None, :],",
        "window_counts(p[:, None], 8 - tap[None, :],",
        logits,
    ),
    "class maps: taps not mirrored": (
        "cdm.py",
        "(TAPS - 1 - n[None, :] % TAPS)",
        "n[None, :] % TAPS",
        class_maps,
    ),
    "class maps: the first image's classes": (
        "cdm.py",
        "classes + b * K + n // TAPS",
        "classes + n // TAPS",
        class_maps,
    ),
    "class maps: a lost block of classes": (
        "cdm.py",
        "triton.cdiv(K * k * k, columns))",
        "max(1, K * k * k // columns))",
        class_maps,
    ),
}


def planted(name: str, folder: pathlib.Path, file: str, source: str, replacement: str):
    """The mutant, imported; its source must have held exactly one place to change."""
    package = folder / name
    package.mkdir()
    for path in pathlib.Path(kernels.__file__).parent.glob("*.py"):
        text = path.read_text()
        if path.name == file:
            assert text.count(source) == 1, f"{text.count(source)} places in {file} read {source!r}"
            text = text.replace(source, replacement)
        if path.name == "meter.py":
            text = "from kernels.meter import *"  # the interpreter is changed once only
        (package / path.name).write_text(text)
    return importlib.import_module(name)


@pytest.mark.parametrize("check", [attention, wide_attention, aggregate, conv, logits, padded_logits, class_maps])
def test_the_true_kernels_pass(check):
    check(kernels)


@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=MUTATIONS)
def test_a_planted_fault_is_caught(number, tmp_path, monkeypatch):
    file, source, replacement, check = list(MUTATIONS.values())[number]
    monkeypatch.syspath_prepend(tmp_path)
    mutant = planted(f"mutant{number}", tmp_path, file, source, replacement)
    with pytest.raises((AssertionError, InterpreterError), match="off by|out of bounds"), measure():
        check(mutant)
