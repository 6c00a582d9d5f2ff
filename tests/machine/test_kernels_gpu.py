"""The properties of test_kernels.py on compiled kernels: needs a GPU, else skipped."""

import pytest

pytest.importorskip("triton")

import kernel_properties
from helpers import ROOT, on_a_gpu


@pytest.fixture(scope="module")
def verdicts() -> dict[str, str]:
    output = on_a_gpu(ROOT / "tests/kernel_properties.py")
    return dict(line.split(": ", 1) for line in output.splitlines())


@pytest.mark.parametrize("name", kernel_properties.NAMES)
def test_compiled_kernel_on_a_gpu(name, verdicts):
    assert verdicts[name] == "ok"
