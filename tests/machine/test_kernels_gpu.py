"""The same properties as in test_kernels.py, on compiled kernels: needs a GPU, else skipped.

The other tests choose Triton's interpreter before triton is imported, so these run in a process of
their own.
"""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

import kernel_checks

pytestmark = pytest.mark.skipif(
    not (torch.version.cuda or torch.version.hip), reason="torch was built without CUDA")
ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    """What `python tests/machine/kernel_checks.py` prints, by check."""
    hidden = ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")  # by conftest
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment["PYTHONPATH"] = str(ROOT)
    available = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", available], env=environment).returncode:
        pytest.skip("there is no GPU")
    command = [sys.executable, str(ROOT / "tests/machine/kernel_checks.py")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return dict(line.split(": ", 1) for line in ended.stdout.splitlines())


@pytest.mark.parametrize("name", kernel_checks.NAMES)
def test_compiled_kernel(name, found):
    assert found[name] == "ok"
