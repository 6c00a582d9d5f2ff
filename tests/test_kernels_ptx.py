"""Every kernel three ways against the equations in float64: in Triton's interpreter, and as the PTX
for sm_80 and for sm_90, executed by ptx.py on this CPU. Forward and backward, all dtypes.

    pytest tests/test_kernels_ptx.py            # small shapes, drawn
    pytest tests/test_kernels_ptx.py -m full    # DeiT-S's shapes too, minutes
"""

import contextlib
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import kernels
import ptx
from kernel_checks import (
    DTYPES, AttentionCase, ConvCase, check_aggregate, check_attention, check_class_maps,
    check_class_row, check_conv,
)

WAYS = {"interpreter": contextlib.nullcontext, "sm_80": lambda: ptx.emulated(80),
        "sm_90": lambda: ptx.emulated(90)}
drawn = settings(max_examples=3, deadline=None, derandomize=True, database=None,
                 suppress_health_check=list(HealthCheck))
ATTENTION = st.builds(AttentionCase()._replace, B=st.just(2), S=st.sampled_from([1, 2]),
                      N=st.sampled_from([1, 4, 34, 69]), d=st.sampled_from([8, 24, 64]))
CONVOLUTION = st.builds(ConvCase()._replace, B=st.sampled_from([1, 2]), D=st.sampled_from([5, 20]),
                        C=st.sampled_from([3, 10]), G=st.sampled_from([1, 2]),
                        h=st.sampled_from([1, 3]), w=st.sampled_from([4, 5]),
                        k=st.sampled_from([1, 3]))
CHECKS = {
    "attention": (ATTENTION, check_attention),
    "class row": (ATTENTION, check_class_row),
    "aggregate": (ATTENTION, check_aggregate),
    "conv": (CONVOLUTION, check_conv),
    "logits": (CONVOLUTION, lambda m, case: check_conv(m, case, "dynamic_conv_logits")),
    "class maps": (CONVOLUTION, check_class_maps),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CHECKS)
def test_three_ways(name, dtype):
    cases, check = CHECKS[name]

    @drawn
    @given(cases)
    def compare(case):
        for way, emulation in WAYS.items():
            with emulation() as launched:
                check(kernels, case._replace(dtype=dtype))
            assert way == "interpreter" or launched, "no kernel ran"

    compare()


@pytest.mark.full
@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CHECKS)
def test_deit_shapes(name, dtype, sm):
    case = (AttentionCase(B=1, S=6, N=196, d=64, dtype=dtype) if CHECKS[name][0] is ATTENTION
            else ConvCase(B=1, D=384, C=200, G=4, h=14, w=14, dtype=dtype))
    with ptx.emulated(sm):
        CHECKS[name][1](kernels, case)


FAULTS = {  # of the compiled code: every match is replaced
    "no barrier": (r"\bbar\.sync\s+0;", ""),
    "no wait for copies": (r"\bcp\.async\.wait_group\s+\d+;", ""),
    "no wait for products": (r"\bwgmma\.wait_group\.sync\.aligned\s+\d+;", ""),
    "no fence": (r"\bfence\.proxy\.async\.shared::cta;", ""),
    "loads of the masked": (r"@(%p\d+) ld\.global", r"@!\1 ld.global"),
    "stores of the masked": (r"@(%p\d+) st\.global", r"@!\1 st.global"),
    "not transposed": (r"\.x4\.trans\b", ".x4"),
}


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_compiled_code_is_seen(fault, sm):
    replaced = []

    def edit(code):
        code, count = re.subn(*FAULTS[fault], code)
        replaced.append(count)
        return code

    case = ConvCase(B=1, D=72, C=24, G=2, h=3, w=5, dtype=torch.bfloat16)
    with pytest.raises((AssertionError, ptx.Fault)), ptx.emulated(sm, edit):
        check_conv(kernels, case)
        if not any(replaced):
            pytest.skip("nothing to break in this kernel")
