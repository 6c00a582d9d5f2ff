"""Triton's interpreter must be chosen before triton is imported; without it the kernels cannot run
on a CPU.
"""

import os
import signal

import pytest
from PIL import Image

os.environ["TRITON_INTERPRET"] = "1"
# the scripts take a GPU where there is one: not here, but for test_kernels_gpu.py's own process
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""
# a shell's background job ignores Ctrl-C, under nohup a hangup too; so would what it starts
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def compile_whole():
    """torch.compile that raises where it would break the graph; without a code generator, which
    would need a compiler. What earlier tests compiled would count towards the limit of
    recompilations.
    """
    import torch

    torch.compiler.reset()
    yield lambda function: torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.compiler.reset()


@pytest.fixture
def without_pictures():
    """For runs whose pictures nobody looks at: drawing takes longer than all else in a tiny run."""
    import evaluate

    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_gallery", "draw_curve", "draw_failures"):
            patch.setattr(evaluate, name, lambda *_: Image.new("RGB", (1, 1)))
        yield


@pytest.fixture
def cub(tmp_path):
    """CUB's official layout, in small."""
    import helpers

    return helpers.make_cub(tmp_path / "CUB_200_2011")


@pytest.fixture
def ilsvrc(tmp_path):
    """ILSVRC's official layout, in small."""
    import helpers

    return helpers.make_ilsvrc(tmp_path / "ILSVRC")


@pytest.fixture
def folder(tmp_path):
    """A folder of one's own, in small."""
    import helpers

    return helpers.make_folder(tmp_path / "my data")


@pytest.fixture
def place(tmp_path, cub, folder, ilsvrc, monkeypatch, without_pictures):
    """A working directory with all that README's commands name, in small."""
    import shutil

    import helpers

    shutil.copytree(cub, tmp_path / "PHOTOS")
    folder.rename(tmp_path / "mydata")
    helpers.make_place(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def exact_float32_products():
    """The scripts let a GPU round float32 products to TF32, for the whole process: not here."""
    import torch

    torch.set_float32_matmul_precision("highest")
