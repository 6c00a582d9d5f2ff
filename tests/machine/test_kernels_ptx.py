"""Every kernel as its PTX for sm_80 and for sm_90, executed by ptx.py on this CPU, against the
equations in float64: kernel_properties.py's properties, forward and backward.

    pytest tests/machine/test_kernels_ptx.py            # a small shape each
    pytest tests/machine/test_kernels_ptx.py -m full    # drawn ones, and DeiT-S's: minutes
"""

import pytest
import torch

pytest.importorskip("triton")

import kernels
import ptx
from kernel_properties import (
    ATTENTIONS, CONVOLUTIONS, DEIT_SMALL, DTYPES, PROPERTIES, AttentionCase, ConvCase,
    check_attention, check_class_maps, check_dynamic_conv2d, check_dynamic_conv_logits, hold,
)

full = pytest.mark.full
each_property = pytest.mark.parametrize("check", PROPERTIES)
each_target = pytest.mark.parametrize("sm", [80, 90])
SMALL = {  # odd sizes, and two programs along each axis that has several
    ATTENTIONS: [AttentionCase(B=2, S=1, N=69, d=24), AttentionCase(B=1, S=1, N=256, d=32)],
    CONVOLUTIONS: [ConvCase(B=2, D=37, C=65, G=3, h=3, w=13), ConvCase(B=1, k=1, h=2)],
}


def run(check, case, sm):
    with ptx.emulated(sm) as launched:
        check(kernels, case)
    assert launched, "no kernel ran"


@pytest.mark.parametrize("sm, dtype", [(80, torch.float32), (90, torch.bfloat16)])
@each_property
def test_compiled_kernels_equal_their_twins(check, sm, dtype):
    run(check, SMALL[PROPERTIES[check]][0]._replace(dtype=dtype), sm)


def small(case) -> bool:
    """Enough for all of its programs to be executed in a second or two."""
    if isinstance(case, AttentionCase):
        return case.B * case.S * case.N <= 300
    return case.B * case.G * case.h * case.w <= 60


@full
@each_target
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_property
def test_drawn_cases_of_compiled_kernels(check, dtype, sm):
    with ptx.emulated(sm):
        hold(check, dtype, 2, small)


@full
@each_target
@each_property
def test_deit_small_as_ptx(check, sm):
    run(check, DEIT_SMALL[PROPERTIES[check]]._replace(B=1, dtype=torch.bfloat16), sm)


@pytest.mark.parametrize("check, case, sm", [
    pytest.param(check_attention, AttentionCase(N=40, d=16, same=True), 80, marks=full),
    pytest.param(check_dynamic_conv2d, ConvCase(B=1), 90, marks=full),
    (check_dynamic_conv_logits, ConvCase(B=1), 80), (check_class_maps, ConvCase(B=1), 90),
])
def test_float32_is_float32_unless_torch_may_take_tf32(check, case, sm):
    run(check, case, sm)
    torch.set_float32_matmul_precision("high")  # conftest resets it
    with pytest.raises(AssertionError, match="off by"):
        run(check, case, sm)
