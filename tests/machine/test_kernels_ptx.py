"""Every kernel as its PTX for sm_80 and for sm_90, executed by ptx.py on this CPU, against the
equations in float64. Forward and backward, all dtypes, drawn shapes and layouts.

    pytest tests/test_kernels_ptx.py            # small shapes
    pytest tests/test_kernels_ptx.py -m full    # DeiT-S's shapes too, minutes
"""

import itertools
import pathlib
import re

import pytest
import torch

pytest.importorskip("triton")

import kernels
import ptx
import test_ptx
from kernel_checks import (
    ATTENTION, DEIT_SMALL, DTYPES, PROPERTIES, AttentionCase, ConvCase, check_aggregate,
    check_attention, check_class_maps, check_class_row, check_conv, check_logits, hold,
)


def quick(case) -> bool:
    """Small enough for all of its programs to be executed in a second or two."""
    if isinstance(case, AttentionCase):
        return case.B * case.S * case.N <= 300
    return case.B * case.G * case.h * case.w <= 60


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROPERTIES)
def test_compiled_kernels_equal_their_twins(name, dtype, sm):
    """The cases of test_kernels.py, where the interpreter runs them."""
    def run(check, case):
        with ptx.emulated(sm) as launched:
            check(kernels, case._replace(dtype=dtype))
        assert launched, "no kernel ran"

    hold(name, run, 6, quick)


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("check, case", [
    (check_attention, AttentionCase(N=40, d=16, same=True)),
    (check_conv, ConvCase(B=1)), (check_logits, ConvCase(B=1)), (check_class_maps, ConvCase(B=1)),
])
def test_float32_is_float32_unless_torch_may_take_tf32(check, case, sm):
    with ptx.emulated(sm):
        check(kernels, case)
        torch.set_float32_matmul_precision("high")  # conftest resets it
        with pytest.raises(AssertionError, match="off by"):
            check(kernels, case)


def test_every_instruction_that_kernels_use_is_tested_by_itself():
    """test_ptx.py has each in a program written by hand."""
    written = pathlib.Path(test_ptx.__file__).read_text()
    written, used = written + written.replace("{trans}", ""), set()

    def collect(code):
        used.update(".".join(step.parts) for step in ptx.parse(code, 0, 1).code)
        return code

    for sm, dtype in itertools.product((80, 90), DTYPES):
        with ptx.emulated(sm, collect):
            for case in (AttentionCase(dtype=dtype), AttentionCase(B=1, S=1, N=256, dtype=dtype)):
                check_attention(kernels, case)
                check_class_row(kernels, case)
                check_aggregate(kernels, case)
            for case in (ConvCase(B=1, dtype=dtype), ConvCase(B=1, k=1, h=2, dtype=dtype)):
                for check in (check_conv, check_logits, check_class_maps):
                    check(kernels, case)
    def tested(name: str) -> bool:
        tiles = re.search(r"mma.*\.(m\d+n)\d+(k\d+)\.", name)
        if tiles:  # there for each kind of number and each way to hold the operands
            sizes = [("m16n", "k16"), ("m16n", "k8"), ("m64n", "k16"), ("m64n", "k8")]
            return tiles.groups() in sizes and name.split(".")[-2] in test_ptx.KINDS
        return name in written or name.replace(".trans", "{trans}") in written

    assert len(used) > 90 and not [name for name in sorted(used) if not tested(name)]


@pytest.mark.full
@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROPERTIES)
def test_deit_shapes(name, dtype, sm):
    cases, check = PROPERTIES[name]
    case = DEIT_SMALL[cases is not ATTENTION]
    with ptx.emulated(sm):
        check(kernels, case._replace(B=1, dtype=dtype))
