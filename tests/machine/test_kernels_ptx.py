"""Every kernel as its PTX for sm_80 and for sm_90, executed by ptx.py on this CPU, against the
equations in float64: kernel_properties.py's properties, forward and backward.

    pytest tests/machine/test_kernels_ptx.py            # a few small shapes
    pytest tests/machine/test_kernels_ptx.py -m full    # more of them, and DeiT-S's: minutes
"""

import itertools
import pathlib
import re

import pytest
import torch

pytest.importorskip("triton")

import kernels
import ptx
from kernel_properties import (
    DEIT_SMALL, DTYPES, PROPERTIES, AttentionCase, ConvCase, check_attention, check_class_maps,
    check_dynamic_conv2d, check_dynamic_conv_logits, hold,
)

each_target = pytest.mark.parametrize("sm", [80, 90])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_property = pytest.mark.parametrize("check", PROPERTIES)


def small(case) -> bool:
    """Enough for all of its programs to be executed in a second or two."""
    if isinstance(case, AttentionCase):
        return case.B * case.S * case.N <= 300
    return case.B * case.G * case.h * case.w <= 60


def hold_as_ptx(check, dtype, sm, examples):
    with ptx.emulated(sm) as launched:
        hold(check, dtype, examples, small)
    assert launched, "no kernel ran"


@each_property
def test_compiled_kernels_equal_their_twins(check):
    hold_as_ptx(check, torch.bfloat16, 90, examples=2)


@pytest.mark.full
@each_target
@each_dtype
@each_property
def test_more_compiled_kernels_equal_their_twins(check, dtype, sm):
    hold_as_ptx(check, dtype, sm, examples=4)


@pytest.mark.full
@each_target
@each_property
def test_deit_small_as_ptx(check, sm):
    with ptx.emulated(sm):
        check(kernels, DEIT_SMALL[PROPERTIES[check]]._replace(B=1, dtype=torch.bfloat16))


@pytest.mark.parametrize("check, case, sm", [
    (check_attention, AttentionCase(N=40, d=16, same=True), 80),
    (check_dynamic_conv2d, ConvCase(B=1), 90), (check_dynamic_conv_logits, ConvCase(B=1), 80),
    (check_class_maps, ConvCase(B=1), 90),
])
def test_float32_is_float32_unless_torch_may_take_tf32(check, case, sm):
    with ptx.emulated(sm):
        check(kernels, case)
        torch.set_float32_matmul_precision("high")  # conftest resets it
        with pytest.raises(AssertionError, match="off by"):
            check(kernels, case)


@pytest.mark.full
def test_every_instruction_that_kernels_use_is_tested_by_itself():
    """test_ptx.py has each in a program written by hand."""
    written = (pathlib.Path(__file__).parent / "test_ptx.py").read_text()
    written, used = written + written.replace("{trans}", ""), set()

    def collect(code):
        used.update(".".join(step.parts) for step in ptx.parse(code, 0, 1).code)
        return code

    for sm, dtype in itertools.product((80, 90), DTYPES):
        with ptx.emulated(sm, collect):
            for check, cases in PROPERTIES.items():
                case = DEIT_SMALL[cases]
                case = case._replace(dtype=dtype)
                check(kernels, case)
