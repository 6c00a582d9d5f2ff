"""Broken input through the command line functions: each ends in one line that names it, and leaves
nothing broken.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train
from helpers import call, make_cub, noise, script_error

CLASSES = ("001.Albatross", "002.Auklet", "003.Bunting")
TINY = ("--img-size 16 --patch-size 8 --embed-dim 12 --depth 1 --num-heads 2 --batch-size 4 "
        "--epochs 1").split()
TRAIN_IMAGE = "images/002.Auklet/Auklet_0004_28.jpg"
TEST_IMAGE = "images/002.Auklet/Auklet_0005_35.jpg"
pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """CUB's official layout: 3 classes of 4 images, every other one for training."""
    def draw(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(int(path.stem.split("_")[1]), (24, 24)).save(path)

    return make_cub(tmp_path_factory.mktemp("cub") / "CUB_200_2011", draw, CLASSES)


@pytest.fixture(scope="module")
def trained(whole):
    """The folder of a run on the whole tree."""
    train.main([*TINY, "--data", "cub", "--root", str(whole), "--out", str(whole.parent / "run")])
    return whole.parent / "run"


@pytest.fixture
def cub(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "CUB_200_2011")


def train_on(root, out, *flags):
    return (train, *TINY, "--data", "cub", "--root", root, "--out", out, *flags)


def evaluate_on(root, trained, out, *flags):
    return (evaluate, "--checkpoint", trained / "best.pt", "--root", root, "--out", out, *flags)


def assert_whole(out):
    """Every file that a script left can be read to its end."""
    readers = {".json": lambda path: json.loads(path.read_text()),
               ".png": lambda path: Image.open(path).load(),
               ".jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()],
               ".pt": lambda path: torch.load(path, weights_only=True)}
    for path in out.rglob("*.*[a-z]") if out.exists() else ():
        if path.name == ".lock":  # of a run, without content
            continue
        readers[path.suffix](path)


def assert_both_fail(capsys, root, trained, tmp_path, *words):
    for command in (train_on(root, tmp_path / "run"),
                    evaluate_on(root, trained, tmp_path / "evaluation")):
        line = script_error(call(capsys, *command), command[0])
        assert all(word in line for word in words), line
        assert_whole(tmp_path / "run"), assert_whole(tmp_path / "evaluation")


# ---------------------------------------------------------------- annotations


@pytest.mark.parametrize("name, line", [
    ("bounding_boxes.txt", "5 4.0 3.0 -12.0 10.0"), ("image_class_labels.txt", "5 4"),
    ("train_test_split.txt", "5 yes"), ("images.txt", "4 a.jpg"), ("classes.txt", None)])
def test_annotations_that_are_wrong(capsys, cub, trained, tmp_path, name, line):
    lines = (cub / name).read_text().split("\n")
    (cub / name).write_text("\n".join([*lines[:4], line, *lines[5:]]) if line else "")
    assert_both_fail(capsys, cub, trained, tmp_path, f"{cub / name}" + ":5: " * bool(line))


def test_other_classes_than_the_checkpoints(capsys, cub, trained, tmp_path):
    (cub / "classes.txt").write_text("1 001.Albatross\n2 002.Auk\n3 003.Bunting\n")
    line = script_error(call(capsys, *evaluate_on(cub, trained, tmp_path / "out")), evaluate)
    assert str(trained / "best.pt") in line and "'002.Auklet'" in line and "'002.Auk'" in line


# ---------------------------------------------------------------- pictures


def half(path):
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2])


IMAGE_FAULTS = {
    "missing": lambda path: path.unlink(), "zero bytes": lambda path: path.write_bytes(b""),
    "half": half,
    "page": lambda path: path.write_text("<!DOCTYPE html><title>404</title>"),
    "bomb": lambda path: noise(0, (60, 60)).save(path),
}


@pytest.fixture
def small_bombs(monkeypatch):
    """Pillow refuses what has more than twice as many pixels."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)


@pytest.mark.parametrize("fault", IMAGE_FAULTS)
def test_scored_images_that_are_broken(capsys, small_bombs, cub, trained, tmp_path, fault):
    IMAGE_FAULTS[fault](cub / TEST_IMAGE)
    assert_both_fail(capsys, cub, trained, tmp_path, str(cub / TEST_IMAGE))


@pytest.mark.parametrize("fault, workers", [("missing", 0), ("half", 0), ("half", 2), ("bomb", 0)])
def test_training_images_that_are_broken(capsys, small_bombs, cub, tmp_path, fault, workers):
    IMAGE_FAULTS[fault](cub / TRAIN_IMAGE)
    line = script_error(call(capsys, *train_on(cub, tmp_path / "run", "--workers", workers,
                                           "--batch-size", 6)), train)
    assert str(cub / TRAIN_IMAGE) in line
    assert_whole(tmp_path / "run")


def test_odd_pictures_are_trained_on_and_scored(capsys, cub, tmp_path):
    frames = [noise(i) for i in range(3)]
    for i, save in enumerate((
        lambda path: noise(0, (1, 1)).save(path, "PNG"),
        lambda path: noise(0, (4000, 3)).save(path),
        lambda path: noise(0, (3, 4000)).save(path),
        lambda path: frames[0].save(path, "GIF", save_all=True, append_images=frames[1:]),
        lambda path: noise(0).convert("CMYK").save(path),
        lambda path: Image.fromarray(np.full((20, 24), 9999, np.uint16)).save(path, "PNG"),
    )):
        for number in (2 * i, 2 * i + 1):  # a training image and a test image
            name = CLASSES[number // 4]
            save(cub / "images" / name / f"{name[4:]}_{number:04d}_{7 * number}.jpg")
    status, out, err = call(capsys, *train_on(cub, tmp_path / "run"))
    assert (status, err) == (0, "")
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (metrics["n"], metrics["n_boxes"]) == (6, 4)
    assert "note: 2 boxes lie outside their images" in out
    assert "note: 2 of 6 test images have no box" in out


# ---------------------------------------------------------------- checkpoints to resume from


RESUMED = {
    "a list": lambda saved: [saved],
    "only weights": lambda saved: saved["model"],
    "no config": lambda saved: saved | {"config": None},
    "no step": lambda saved: saved | {"step": None},
    "alien phase": lambda saved: saved | {"phase": "third"},
    "no optimizer": lambda saved: {k: value for k, value in saved.items() if k != "optimizer"},
    "another optimizer": lambda saved: saved | {"optimizer": {"state": {}, "param_groups": []}},
    "no random state": lambda saved: saved | {"rng": None},
    "no model": lambda saved: saved | {"model": {1: torch.zeros(3)}},
    "other shapes": lambda saved: saved | {
        "model": saved["model"] | {"norm.weight": torch.ones(13)}},
    "not finite": lambda saved: saved | {
        "model": saved["model"] | {"norm.weight": torch.full((12,), float("nan"))}},
}


@pytest.mark.parametrize("fault", RESUMED)
def test_a_checkpoint_that_cannot_be_resumed(capsys, whole, trained, tmp_path, fault):
    file = tmp_path / "odd name.pt"
    torch.save(RESUMED[fault](torch.load(trained / "last.pt", weights_only=True)), file)
    ended = call(capsys, *train_on(whole, tmp_path / "out", "--resume", file))
    assert str(file) in script_error(ended, train)
    assert_whole(tmp_path / "out")
