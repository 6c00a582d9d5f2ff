"""Every kernel as its PTX for sm_80 and for sm_90, executed by ptx.py on this CPU, against the
equations in float64. Forward and backward, all dtypes, drawn shapes and layouts.

    pytest tests/test_kernels_ptx.py            # small shapes
    pytest tests/test_kernels_ptx.py -m full    # DeiT-S's shapes too, minutes
"""

import pytest

pytest.importorskip("triton")

import kernels
import ptx
from kernel_checks import ATTENTION, DEIT_SMALL, DTYPES, PROPERTIES, AttentionCase, hold


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


@pytest.mark.full
@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROPERTIES)
def test_deit_shapes(name, dtype, sm):
    cases, check = PROPERTIES[name]
    case = DEIT_SMALL[cases is not ATTENTION]
    with ptx.emulated(sm):
        check(kernels, case._replace(B=1, dtype=dtype))
