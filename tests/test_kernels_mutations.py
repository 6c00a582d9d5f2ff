"""Faults planted in the kernels, one at a time: each must fail a check that the true ones pass.

A mutant is a copy of the package with one node of one function's syntax tree changed, imported
under a name of its own. The node is addressed by file, function and its source or, where it is the
value of an assignment, by variable and number: "m = 0" is the first value of m. A fault that would
change no node, or more than one, is an error of this table.
"""

import ast
import importlib
import pathlib

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime.errors import InterpreterError

import kernels
from kernel_properties import (
    AttentionCase, ConvCase, check_aggregate_attention, check_attention, check_class_ids,
    check_class_maps, check_class_row, check_dynamic_conv2d, check_dynamic_conv_logits, in_bounds,
)

ATTENTION, CONV = AttentionCase(), ConvCase(D=37, C=70, G=5)
HALF = torch.float16


def two_passes(module):
    check_attention(module, ATTENTION)  # float32


def one_pass(module):
    check_attention(module, ATTENTION._replace(dtype=HALF))


def low_scores(module):
    check_attention(module, ATTENTION._replace(d=8, shift=20.0))


def contiguous_v(module):
    check_attention(module, ATTENTION._replace(layouts=("packed", "packed", "contiguous")))


def class_row(module):
    check_class_row(module, ATTENTION._replace(layouts=("packed", "transposed", "packed")))


def aggregate(module):
    check_aggregate_attention(module, ATTENTION._replace(layouts=("transposed",) * 3))


def conv(module):
    check_dynamic_conv2d(module, CONV._replace(layouts=("tokens",) + ("sliced",) * 3))


def logits(module):
    check_dynamic_conv_logits(module, CONV)


def padded_logits(module):
    check_dynamic_conv_logits(module, CONV._replace(pool="padded"))


def large_sums(module):
    check_dynamic_conv_logits(module, ConvCase(
        B=1, D=9, C=7, h=14, w=14, level=60.0, pool="padded", dtype=HALF))


def class_ids(module):
    check_class_ids(module, CONV._replace(K=9))


def class_maps(module):
    check_class_maps(module, CONV._replace(layouts=("tokens",) + ("sliced",) * 3, K=9))


CHECKS = (two_passes, one_pass, low_scores, contiguous_v, class_row, aggregate, conv, logits,
          padded_logits, large_sums, class_maps, class_ids)

# (file, function, source of the node, its replacement, the check that must fail); a source
# "name = 2" addresses the third value assigned to `name`, of which the replacement takes the place
MUTATIONS = {
    "aggregate: off-by-one mask": (
        "rpam.py", "aggregate_kernel", "(j >= 1) & (j < T)", "(j >= 1) & (j < T - 1)", aggregate),
    "aggregate: a dropped head": (
        "rpam.py", "aggregate_kernel", "cls_weight = 1", "tl.load(head + i * stride_j, mask=i < T, "
        "other=0.0).to(tl.float32) - cls_weight", aggregate),
    "aggregate: a missing 1 / (N+1)": (
        "rpam.py", "aggregate_kernel", "S * S * T", "S * S", aggregate),
    "aggregate: a swapped stride": (
        "rpam.py", "aggregate_kernel", "head + i * stride_j", "head + i * stride_i", aggregate),
    "aggregate: heads of the first image": (
        "rpam.py", "aggregate_kernel", "b * stride_b", "0 * stride_b", aggregate),
    "aggregate: a skipped row block": (
        "rpam.py", "aggregate_kernel", "range(0, T, BLOCK_I)", "range(BLOCK_I, T, BLOCK_I)",
        aggregate),
    "aggregate backward: a lost column block": (
        "rpam.py", "aggregate_backward_kernel", "heads * g[None, :]",
        "heads * g[None, :] - total", aggregate),
    "aggregate backward: row 0 without its own term": (
        "rpam.py", "_aggregate_attention_backward", "as_row + grad_cls + grad_cls_weight",
        "as_row + grad_cls", aggregate),
    "aggregate: strides taken for granted": (
        "rpam.py", "aggregate_attention", "attn.stride()", "(attn.stride(0), attn.stride(1), "
        "attn.shape[3], 1)", aggregate),
    "class row: scores without their scale": (
        "rpam.py", "class_scores", "1 / math.sqrt(D)", "1.0", class_row),
    "class row: keys of the first head": (
        "rpam.py", "class_row_kernel", "b * stride_b + s * stride_s", "b * stride_b", class_row),
    "class row: channels taken for granted": (
        "rpam.py", "_channels_together", "tensor.stride(3) == 1", "True", class_row),
    "class row: a query's channels at once": (
        "rpam.py", "class_row_kernel", "c < D", "c < D - 1", class_row),
    "class row backward: a lost block of keys": (
        "rpam.py", "class_row_backward_kernel", "range(0, T, BLOCK_J)",
        "range(0, T - BLOCK_J, BLOCK_J)", class_row),
    "class row backward: another head's gradient": (
        "rpam.py", "class_row_backward_kernel", "s * D", "0 * D", class_row),
    "one pass: no mask on the last columns": (
        "rpam.py", "one_pass_kernel", "score = 1", "score", one_pass),
    "one pass: weights of the first image": (
        "rpam.py", "one_pass_kernel", "cls_attn + b * T + i", "cls_attn + i", one_pass),
    "one pass: a share that no softmax divides": (
        "rpam.py", "one_pass_kernel",
        "tl.load(cls_attn + b * T + i, mask=i < T, other=0.0) / total",
        "tl.load(cls_attn + b * T + i, mask=i < T, other=0.0)", one_pass),
    "one pass: row blocks that overwrite each other": (
        "rpam.py", "one_pass_kernel", "((b * S + s) * tl.num_programs(1) + block) * T",
        "((b * S + s) * tl.num_programs(1)) * T", one_pass),
    "attention: a maximum that starts at 0": (
        "rpam.py", "attention_kernel", "m = 0", "tl.zeros([BLOCK_I], tl.float32)", low_scores),
    "attention: no mask on the last columns": (
        "rpam.py", "attention_kernel", "score = 1", "score", two_passes),
    "attention: an accumulator without alpha": (
        "rpam.py", "attention_kernel", "acc * alpha[:, None]", "acc", two_passes),
    "attention: the scores of row 1": (
        "rpam.py", "attention_kernel", "i[:, None] == 0", "i[:, None] == 1", two_passes),
    "attention: v read with the strides of q": (
        "rpam.py", "attention_relation", "q.stride() == k.stride() == v.stride()",
        "q.stride() == k.stride()", contiguous_v),
    "relation: an unscaled score": (
        "rpam.py", "relation_kernel", "score = 0",
        "tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)", two_passes),
    "relation: M^c of the first image": (
        "rpam.py", "relation_kernel", "cls_attn + b * T + i", "cls_attn + i", two_passes),
    "conv: a wrong tap": (
        "cdm.py", "conv_kernel", "c[None, :] * KERNEL * KERNEL + tap",
        "c[None, :] * KERNEL * KERNEL + (tap ^ 1)", conv),
    "conv: a lost border row": (
        "cdm.py", "conv_kernel", "row < H", "row < H - 1", conv),
    "conv: columns that wrap around": (
        "cdm.py", "conv_kernel", "column < W", "column < W + 1", conv),
    "conv: an unscaled score": (
        "cdm.py", "conv_kernel", "tl.load(scores + g) * w_tile", "w_tile", conv),
    "conv: scores of the first image": (
        "cdm.py", "conv_kernel", "b * G", "0 * G", conv),
    "conv: a weight in its own layout": (
        "cdm.py", "dynamic_conv2d", "weight.flatten(3).transpose(2, 3).contiguous()",
        "weight.flatten(3).reshape(*weight.shape[:2], -1, weight.shape[2]).contiguous()", conv),
    "conv: a bias taken for contiguous": (
        "cdm.py", "dynamic_conv2d", "bias.contiguous()", "bias", conv),
    "conv: scores taken for contiguous": (
        "cdm.py", "dynamic_conv2d", "scores.float().contiguous()", "scores.float()", conv),
    "window sums: a position that wraps around": (
        "cdm.py", "window_counts", "column < W", "column < W + 1", logits),
    "window sums: a mean over the window only": (
        "cdm.py", "window_sums_kernel", "9 * H * W if PADDED else H * W",
        "9 * H * W if PADDED else (H - 1) * (W - 1)", logits),
    "padded pool: a corner too light": (
        "cdm.py", "window_counts", "1 + (column > 0).to(tl.int32)", "(column > 0).to(tl.int32)",
        padded_logits),
    "window sums: a sum in float16": (
        "cdm.py", "window_sums_kernel", "mean = 0",
        "acc.to(tl.float16).to(tl.float32) / (9 * H * W if PADDED else H * W)", large_sums),
    "window sums backward: a swapped tap": (
        "cdm.py", "window_sums_backward_kernel", "counts = 0",
        "window_counts(p[:, None], 8 - tap[None, :], H, W, KERNEL, PADDED)", logits),
    "class maps: taps not mirrored": (
        "cdm.py", "class_products_kernel", "TAPS - 1 - n[None, :] % TAPS", "n[None, :] % TAPS",
        class_maps),
    "class maps: the first image's classes": (
        "cdm.py", "class_products_kernel", "classes + b * K + n // TAPS", "classes + n // TAPS",
        class_maps),
    "class maps: an unknown class's weights": (
        "cdm.py", "class_products_kernel", "(c >= 0) & (c < C)", "(c >= 0) & (c <= C)", class_ids),
    "class maps: an unknown class of zeros": (
        "cdm.py", "class_products_kernel", "float('nan')", "0.0", class_ids),
    "class maps: ids cut to 32 bits": (
        "cdm.py", "class_products_kernel", "c = 0",
        "tl.load(classes + b * K + n // TAPS, mask=n < K * TAPS, other=0).to(tl.int32)", class_ids),
    "class maps: a lost block of classes": (
        "cdm.py", "class_products", "triton.cdiv(K * k * k, columns)",
        "max(1, K * k * k // columns)", class_maps),
    "class maps: classes taken for contiguous": (
        "cdm.py", "class_products", "classes.contiguous()", "classes", class_maps),
    "class maps: weight taken for contiguous": (
        "cdm.py", "class_products", "weight.contiguous()", "weight", class_maps),
}


def mutate(text: str, function: str, source: str, replacement: str) -> str:
    """The file's text with exactly one node of the function replaced."""
    module = ast.parse(text)
    (body,) = [n for n in module.body if isinstance(n, ast.FunctionDef) and n.name == function]
    assigned = ast.parse(source).body[0]
    changed = 0

    def is_target(statement) -> bool:
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        names = [t.id for t in targets if isinstance(t, ast.Name)]
        is_assignment = isinstance(statement, (ast.Assign, ast.AugAssign))
        return is_assignment and assigned.targets[0].id in names

    value = ast.parse(replacement, mode="eval").body
    if isinstance(assigned, ast.Assign):
        statements = [n for n in ast.walk(body) if is_target(n)]
        statements.sort(key=lambda n: n.lineno)
        statements[assigned.value.value].value = value
        changed = 1
    else:
        wanted = ast.dump(assigned.value)

        class Replace(ast.NodeTransformer):
            def visit(self, node):
                nonlocal changed
                if isinstance(node, ast.expr) and ast.dump(node) == wanted:
                    changed += 1
                    return value if changed == 1 else node
                return self.generic_visit(node)

        Replace().visit(body)
    assert changed == 1, f"{changed} nodes of {function} read {source!r}"
    return ast.unparse(module)


def planted(name: str, folder: pathlib.Path, file: str, *fault: str):
    """The mutant, imported. What changes the interpreter stays the true package's."""
    package = folder / name
    package.mkdir()
    for path in pathlib.Path(kernels.__file__).parent.glob("*.py"):
        text = path.read_text()
        if path.name == file:
            text = mutate(text, *fault)
        if path.name == "interpreter.py":
            text = f"from kernels.{path.stem} import *"
        (package / path.name).write_text(text)
    return importlib.import_module(name)


@pytest.mark.parametrize("check", CHECKS)
def test_the_true_kernels_pass(check):
    check(kernels)


@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=MUTATIONS)
def test_a_planted_fault_is_caught(number, tmp_path, monkeypatch):
    file, function, source, replacement, check = list(MUTATIONS.values())[number]
    monkeypatch.syspath_prepend(tmp_path)
    mutant = planted(f"mutant{number}", tmp_path, file, function, source, replacement)
    seen = pytest.raises((AssertionError, InterpreterError), match="off by|out of bounds")
    with seen, in_bounds():
        check(mutant)
