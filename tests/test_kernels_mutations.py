"""Faults planted in the kernels, one at a time: each must fail a check that the true ones pass.

A mutant is a copy of the package in which one piece of one function's text is replaced, imported
under a name of its own. The table has one fault of each kind for each kernel, every third of which
runs without -m full; a piece that the function does not hold exactly once is an error of the table.
"""

import importlib
import pathlib
import re
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime.errors import InterpreterError

import kernels
from kernel_properties import (
    AttentionCase, ConvCase, check_aggregate_attention, check_attention, check_class_ids,
    check_class_maps, check_class_row, check_dynamic_conv2d, check_dynamic_conv_logits, in_bounds,
)

# A check, the case that it is given, and what its module's constants are meanwhile.
ATTENTION, CONV = AttentionCase(), ConvCase(D=37, C=70, G=5)
STRIDED = CONV._replace(layouts=("tokens",) + ("sliced",) * 3, K=9)
HALF = ATTENTION._replace(dtype=torch.float16)
CHECKS = {
    "class row": (check_class_row, ATTENTION._replace(layouts=("packed", "transposed", "packed"))),
    "long rows": (check_class_row, ATTENTION, "rpam", dict(ROW_TILE=512)),
    "one pass": (check_attention, HALF),
    "one program": (check_attention, HALF, "rpam", dict(PROGRAMS=1)),
    "two passes": (check_attention, ATTENTION),
    "low logits": (check_attention, ATTENTION._replace(d=8, shift=20.0)),
    "contiguous v": (check_attention, ATTENTION._replace(
        layouts=("packed", "packed", "contiguous"))),
    "no channels together": (check_attention, ATTENTION._replace(layouts=("transposed",) * 3)),
    "aggregate": (check_aggregate_attention, ATTENTION._replace(layouts=("transposed",) * 3)),
    "logits": (check_dynamic_conv_logits, CONV),
    "padded logits": (check_dynamic_conv_logits, CONV._replace(pool="padded")),
    "large sums": (check_dynamic_conv_logits, ConvCase(
        B=1, D=9, C=7, h=14, w=14, level=60.0, pool="padded", dtype=torch.float16)),
    "class maps": (check_class_maps, STRIDED),
    "class ids": (check_class_ids, CONV._replace(K=9)),
    "conv": (check_dynamic_conv2d, STRIDED),
}

ONE_PASS, CLASS_ROW = "rpam.one_pass_kernel", "rpam.class_row_kernel"
ROW_BACKWARD, AGGREGATE = "rpam.class_row_backward_kernel", "rpam.aggregate_kernel"
PRODUCTS, CONVOLUTION = "cdm.class_products_kernel", "cdm.conv_kernel"
MUTATIONS = (  # file and function, what stands there, what stands there instead, who must see it
    (CLASS_ROW, "logit * scale", "logit", "class row"),
    (CLASS_ROW, "j < T, logit * scale", "j <= T, logit * scale", "class row"),
    (CLASS_ROW, "k + b * stride_b + s * stride_s", "k + b * stride_b", "class row"),
    (CLASS_ROW, "total += row", "total = row", "class row"),
    (CLASS_ROW, "rows + (b * S + s) * T", "rows + b * S * T", "class row"),
    (CLASS_ROW, "logit += tl.sum(", "logit = tl.sum(", "long rows"),
    (CLASS_ROW, "channel < HEAD_DIM, other", "channel < HEAD_DIM - 1, other", "long rows"),
    (ROW_BACKWARD, "- mean)", ")", "class row"),
    (ROW_BACKWARD, "inner += row", "inner = row", "class row"),
    (ROW_BACKWARD, "total += g", "total = g", "class row"),
    (ROW_BACKWARD, "+ s * HEAD_DIM", "+ 0 * HEAD_DIM", "class row"),
    ("rpam._channels_together", "tensor.stride(3) == 1", "True", "class row"),
    (ONE_PASS, "j[None, :] < T, logit", "j[None, :] <= T, logit", "one pass"),
    (ONE_PASS, "cls_attn + b * T + i", "cls_attn + i", "one pass"),
    (ONE_PASS, "other=0.0) / total", "other=0.0)", "one pass"),
    (ONE_PASS, " + tl.program_id(1)) * T", ") * T", "one pass"),
    (ONE_PASS, "tl.num_programs(1) * BLOCK_I)", "2 * BLOCK_I)", "one program"),
    (ONE_PASS, "column += ", "column = ", "one program"),
    ("rpam.attention_kernel", "tl.full([BLOCK_I], float(\"-inf\")", "tl.full([BLOCK_I], 0.0",
     "low logits"),
    ("rpam.attention_kernel", "j[None, :] < T, logit", "j[None, :] <= T, logit", "two passes"),
    ("rpam.attention_kernel", "acc * alpha[:, None]", "acc", "two passes"),
    ("rpam.attention_kernel", "total * alpha", "total", "two passes"),
    ("rpam.attention_kernel", "i[:, None] == 0", "i[:, None] == 1", "two passes"),
    ("rpam.attention_relation", " == v.stride()", "", "contiguous v"),
    ("rpam.attention_relation", " or q.stride(3) != 1", "", "no channels together"),
    ("rpam.relation_kernel", " * scale", "", "two passes"),
    ("rpam.relation_kernel", "cls_attn + b * T + i", "cls_attn + i", "two passes"),
    ("rpam.relation_kernel", "total += ", "total = ", "two passes"),
    (AGGREGATE, "(j >= 1) & (j < T)", "(j >= 1) & (j < T - 1)", "aggregate"),
    (AGGREGATE, "S * S * T)", "S * S)", "aggregate"),
    (AGGREGATE, "head + i * stride_j", "head + i * stride_i", "aggregate"),
    (AGGREGATE, "b * stride_b", "0 * stride_b", "aggregate"),
    (AGGREGATE, "range(0, T, BLOCK_I)", "range(BLOCK_I, T, BLOCK_I)", "aggregate"),
    ("rpam.aggregate_attention", "*attn.stride()", "*attn.contiguous().stride()", "aggregate"),
    ("cdm.window_counts", "column < GRID_W)", "column < GRID_W + 1)", "logits"),
    ("cdm.window_counts", "1 + (column > 0)", "(column > 0)", "padded logits"),
    ("cdm.window_sums_kernel", "acc / (", "acc.to(tl.float16).to(tl.float32) / (", "large sums"),
    ("cdm.window_sums_backward_kernel", ", tap[None, :], GRID_H", ", 8 - tap[None, :], GRID_H",
     "logits"),
    (PRODUCTS, "TAPS - 1 - pair[None, :] % TAPS", "pair[None, :] % TAPS", "class maps"),
    (PRODUCTS, "classes + b * K", "classes", "class maps"),
    (PRODUCTS, "(c < C)", "(c <= C)", "class ids"),
    (PRODUCTS, "float(\"nan\")", "0.0", "class ids"),
    (PRODUCTS, "other=0)\n", "other=0).to(tl.int32)\n", "class ids"),
    ("cdm.class_products", "triton.cdiv(K * k * k, columns)", "max(1, K * k * k // columns)",
     "class maps"),
    ("cdm.class_products", "classes.contiguous()", "classes", "class maps"),
    ("cdm.class_products", "weight.contiguous()", "weight", "class maps"),
    (CONVOLUTION, "KERNEL * KERNEL + tap)", "KERNEL * KERNEL + (tap ^ 1))", "conv"),
    (CONVOLUTION, "row < GRID_H", "row < GRID_H - 1", "conv"),
    (CONVOLUTION, "tl.load(scores + g) * w_tile", "w_tile", "conv"),
    (CONVOLUTION, "scores += b * G", "scores += 0 * G", "conv"),
    ("cdm.dynamic_conv2d", "bias.contiguous()", "bias", "conv"),
    ("cdm.dynamic_conv2d", "scores.float().contiguous()", "scores.float()", "conv"),
)


def run(check: str, package) -> None:
    function, case, *patch = CHECKS[check]
    if not patch:
        return function(package, case)
    file, constants = patch
    module = importlib.import_module(f"{package.__name__}.{file}")
    with mock.patch.multiple(module, **constants):
        function(package, case)


def plant(folder: pathlib.Path, where: str, old: str, new: str):
    """A package in `folder` that is `kernels` with the fault. The interpreter's patches stay
    those of `kernels`."""
    file, function = where.split(".")
    for path in pathlib.Path(kernels.__file__).parent.glob("*.py"):
        text = path.read_text()
        if path.stem == file:
            body = re.search(rf"^def {function}\(.*?(?=^[^\s)])", text, re.M | re.S)[0]
            assert body.count(old) == 1, f"{where} holds {old!r} {body.count(old)} times"
            text = text.replace(body, body.replace(old, new))
        if path.name == "interpreter.py":
            text = "from kernels.interpreter import *"
        (folder / path.name).write_text(text)
    return importlib.import_module(folder.name)


@pytest.mark.parametrize("check", CHECKS)
def test_the_true_kernels_pass(check):
    with in_bounds():
        run(check, kernels)


@pytest.mark.parametrize("number", [
    pytest.param(number, marks=[pytest.mark.full] if number % 3 else [])
    for number in range(len(MUTATIONS))
])
def test_a_planted_fault_is_caught(number, tmp_path, monkeypatch):
    *fault, check = MUTATIONS[number]
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / f"mutant{number}"
    folder.mkdir()
    mutant = plant(folder, *fault)
    seen = pytest.raises((AssertionError, InterpreterError), match="off by|out of bounds")
    with seen, in_bounds():
        run(check, mutant)
