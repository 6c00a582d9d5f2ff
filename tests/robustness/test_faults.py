"""Broken input through the command line functions: each ends in one line that names it, and leaves
nothing broken.
"""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import train
from helpers import call, make_cub, noise, script_error

CLASSES = ("001.Albatross", "002.Auklet", "003.Bunting")
TINY = ("--img-size 16 --patch-size 8 --embed-dim 12 --depth 1 --num-heads 2 --batch-size 4 "
        "--epochs 1").split()
TRAIN_IMAGE, TEST_IMAGE = "images/002.Auklet/Auklet_0004_28.jpg", "images/002.Auklet/Auklet_0005_35.jpg"
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


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", IMAGE_FAULTS)
def test_training_images_that_are_broken(capsys, small_bombs, cub, tmp_path, fault, workers):
    IMAGE_FAULTS[fault](cub / TRAIN_IMAGE)
    line = script_error(call(capsys, *train_on(cub, tmp_path / "run", "--workers", workers,
                                           "--batch-size", 6)), train)
    assert str(cub / TRAIN_IMAGE) in line
    assert_whole(tmp_path / "run")


def test_a_loading_process_that_the_system_kills(capsys, monkeypatch, cub, tmp_path):
    load, parent = data.load_image, os.getpid()
    monkeypatch.setattr(data, "load_image",
                        lambda *a: os.kill(os.getpid(), 9) if os.getpid() != parent else load(*a))
    line = script_error(call(capsys, *train_on(cub, tmp_path / "run", "--workers", 1)), train)
    assert "DataLoader worker" in line
    assert_whole(tmp_path / "run")


@pytest.mark.parametrize("workers", [0, 2])
def test_odd_pictures_are_trained_on_and_scored(capsys, cub, tmp_path, workers):
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
    status, out, err = call(capsys, *train_on(cub, tmp_path / "run", "--workers", workers))
    assert (status, err) == (0, "")
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (metrics["n"], metrics["n_boxes"]) == (6, 4)
    assert "note: 2 boxes lie outside their images" in out
    assert "note: 2 of 6 test images have no box" in out


# ---------------------------------------------------------------- weights


class Code:
    """Pickled, it opens (and so makes) a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def change_model(change):
    return lambda saved: saved | {"model": saved["model"] | change}


RAW = {
    "missing": None, "empty": lambda whole: b"", "cut": lambda whole: whole[:len(whole) // 2],
    "page": lambda whole: b"<!DOCTYPE html><title>404</title>",
    "zeros": lambda whole: bytes(len(whole)),
}
SAVED = {  # for every use of a file
    "a list": lambda saved: [saved],
    "no dict": lambda saved: {"model": torch.zeros(3), "state_dict": 3},
    "numbers as keys": lambda saved: saved | {"model": {1: torch.zeros(3)}},
    "alien keys": lambda saved: saved | {"model": {"layer1.0.conv1.weight": torch.zeros(3)}},
    "other shapes": change_model({"norm.weight": torch.ones(13)}),
    "no tensor": change_model({"norm.weight": "text"}),
    "not finite": change_model({"norm.weight": torch.full((12,), float("nan"))}),
    "infinite": change_model({"patch_embed.proj.weight": torch.full((12, 3, 8, 8), float("inf"))}),
}
ONE_USE = {
    "--resume": {
        "no optimizer": lambda saved: {
            key: value for key, value in saved.items() if key != "optimizer"},
        "another optimizer": lambda saved: saved | {"optimizer": {"state": {}, "param_groups": []}},
        "no state": lambda saved: saved | {"rng": None},
        "alien phase": lambda saved: saved | {"phase": "third"},
        "no config": lambda saved: saved | {"config": None},
        "no step": lambda saved: saved | {"step": None},
        "only weights": lambda saved: saved["model"],
    },
    "--checkpoint": {
        "few classes": lambda saved: saved | {"classes": ["one"]},
        "no classes": lambda saved: saved | {"classes": None},
        "no config": lambda saved: saved | {"config": None},
        "empty config": lambda saved: saved | {"config": {}},
        "pretraining": lambda saved: saved | {"phase": "pretrain"},
        "few weights": lambda saved: saved | {
            "model": {"norm.weight": saved["model"]["norm.weight"]}},
    },
    "--pretrained": {
        "of another width": lambda saved: {"model": {"pos_embed": torch.zeros(1, 5, 24)}}},
}


def weights_result(capsys, flag, file, whole, trained, tmp_path):
    """(what train or evaluate said, which of them it was) when given this file of weights."""
    if flag == "--checkpoint":
        return call(capsys, evaluate, flag, file, "--root", whole, "--out",
                    tmp_path / "out"), evaluate
    return call(capsys, *train_on(whole, tmp_path / "out", flag, file)), train


@pytest.mark.parametrize("flag, fault", [
    pytest.param(flag, fault, marks=pytest.mark.full if flag != "--resume" else ())
    for flag in ONE_USE for fault in (*RAW, "folder", "code", *SAVED, *ONE_USE[flag])])
def test_weights_that_are_broken(capsys, whole, trained, tmp_path, flag, fault):
    file, last = tmp_path / "odd name.pt", trained / "last.pt"
    changes = SAVED | ONE_USE[flag]
    if fault in changes:
        torch.save(changes[fault](torch.load(last, weights_only=True)), file)
    elif fault == "code":
        torch.save({"model": Code(tmp_path / "executed"), "config": {}, "phase": "main"}, file)
    elif fault == "folder":
        file.mkdir()
    elif fault != "missing":
        file.write_bytes(RAW[fault](last.read_bytes()))
    result, script = weights_result(capsys, flag, file, whole, trained, tmp_path)
    assert str(file) in script_error(result, script)
    assert not (tmp_path / "executed").exists()
    assert_whole(tmp_path / "out")


# ---------------------------------------------------------------- places to write to


@pytest.mark.parametrize("below", ["", "run"])
def test_an_out_that_is_or_lies_in_a_file(capsys, whole, trained, tmp_path, below):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / below
    assert str(out) in script_error(call(capsys, *train_on(whole, out)), train)
    assert str(out) in script_error(call(capsys, *evaluate_on(whole, trained, out)), evaluate, 2)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_an_out_that_is_read_only(capsys, whole, trained, tmp_path):
    tmp_path.chmod(0o500)
    for command in (train_on(whole, tmp_path / "run"),
                    evaluate_on(whole, trained, tmp_path / "evaluation")):
        assert str(tmp_path) in script_error(call(capsys, *command), command[0])
    tmp_path.chmod(0o700)
