"""Broken input through the command line functions: each ends in one line that names it, and leaves
nothing broken.
"""

import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import evaluate
import train

CLASSES = ("001.Albatross", "002.Auklet", "003.Bunting")
CUB_FILES = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt",
             "classes.txt")
TINY = ("--img-size 16 --patch-size 8 --embed-dim 12 --depth 1 --num-heads 2 --batch-size 4 "
        "--epochs 1").split()
TRAIN_IMAGE, TEST_IMAGE = "images/002.Auklet/Auklet_5.jpg", "images/002.Auklet/Auklet_6.jpg"
pytestmark = pytest.mark.usefixtures("without_pictures")
many = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def noise(seed, size=(24, 20)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """CUB's official layout: 3 classes of 4 images, every other one for training, all boxes 12 x
    10.
    """
    root = tmp_path_factory.mktemp("cub") / "CUB_200_2011"
    tables = {name: "" for name in CUB_FILES}
    for i in range(1, 13):
        label = (i - 1) // 4
        path = f"{CLASSES[label]}/{CLASSES[label][4:]}_{i}.jpg"
        (root / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        noise(i).save(root / "images" / path)
        for name, rest in zip(CUB_FILES, (path, label + 1, i % 2, "4.0 3.0 12.0 10.0")):
            tables[name] += f"{i} {rest}\n"
    tables["classes.txt"] = "".join(f"{i} {name}\n" for i, name in enumerate(CLASSES, 1))
    for name, text in tables.items():
        (root / name).write_text(text)
    return root


@pytest.fixture(scope="module")
def trained(whole):
    """The folder of a run on the whole tree."""
    train.main([*TINY, "--data", "cub", "--root", str(whole), "--out", str(whole.parent / "run")])
    return whole.parent / "run"


@pytest.fixture
def cub(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "CUB_200_2011")


def call(capsys, script, *flags):
    """(exit status, standard output, standard error) of train or evaluate."""
    try:
        status = script.main([str(flag) for flag in flags])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    # as python itself does
    return (1, out, f"{err}{status}\n") if isinstance(status, str) else (status or 0, out, err)


def error_of(result, script, status=1):
    found, _, err = result
    assert (found, err.count("\n")) == (status, 1), err
    assert err.startswith(f"{script.__name__}.py: error: "), err
    return err


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
        line = error_of(call(capsys, *command), command[0])
        assert all(word in line for word in words), line
        assert_whole(tmp_path / "run"), assert_whole(tmp_path / "evaluation")


# ---------------------------------------------------------------- annotations


@pytest.mark.parametrize("name", CUB_FILES)
@pytest.mark.parametrize("fault", ["missing", "empty", "blank", "truncated", "binary", "folder"])
def test_annotation_files_that_are_missing_or_broken(capsys, cub, trained, tmp_path, name, fault):
    file = cub / name
    text = file.read_text()
    file.unlink()
    if fault == "folder":
        file.mkdir()
    elif fault != "missing":
        file.write_bytes({"empty": b"", "blank": b"\r\n \n", "binary": bytes(range(256)),
                          "truncated": text.rstrip().rpartition(" ")[0].encode()}[fault])
    assert_both_fail(capsys, cub, trained, tmp_path, str(file))


LINES = [
    ("bounding_boxes.txt", "5 4.0 x 12.0 10.0"), ("bounding_boxes.txt", "5 4.0 3.0 -12.0 10.0"),
    ("bounding_boxes.txt", "5 4.0 3.0 12.0 0"), ("bounding_boxes.txt", "5 nan 3.0 12.0 10.0"),
    ("bounding_boxes.txt", "5 4.0 3.0 inf 10.0"), ("bounding_boxes.txt", "5 4.0 3.0 12.0"),
    ("bounding_boxes.txt", "99 4.0 3.0 12.0 10.0"), ("bounding_boxes.txt", "4 4.0 3.0 12.0 10.0"),
    ("image_class_labels.txt", "5 two"), ("image_class_labels.txt", "5 0"),
    ("image_class_labels.txt", "5 4"),
    ("image_class_labels.txt", "5 nan"), ("image_class_labels.txt", "99 1"),
    ("image_class_labels.txt", "4 2"),
    ("train_test_split.txt", "5 2"), ("train_test_split.txt", "5 -1"),
    ("train_test_split.txt", "5 yes"),
    ("train_test_split.txt", "99 1"), ("train_test_split.txt", "4 1"),
    ("images.txt", "five a.jpg"), ("images.txt", "4 a.jpg"),
    ("images.txt", "5 001.Albatross/Albatross_1.jpg"),
]


@pytest.mark.parametrize("name, line", LINES)
def test_lines_that_are_wrong(capsys, cub, trained, tmp_path, name, line):
    lines = (cub / name).read_text().split("\n")
    lines[4] = line
    (cub / name).write_text("\n".join(lines))
    assert_both_fail(capsys, cub, trained, tmp_path, f"{cub / name}:5: ")


@pytest.mark.parametrize("text, word", [
    ("1 a\n2 b\n2 c\n", "classes.txt:3: "), ("1 a\n2 b\n4 d\n", "needs 1 to 3"),
    ("0 a\n1 b\n2 c\n", "needs 1 to 3"),
    ("one a\n2 b\n3 c\n", "classes.txt:1: "), ("1 a\n2 b\n", "image_class_labels.txt:9: ")])
def test_classes_that_are_wrong(capsys, cub, trained, tmp_path, text, word):
    (cub / "classes.txt").write_text(text)
    assert_both_fail(capsys, cub, trained, tmp_path, word)


def test_windows_line_ends_and_a_byte_order_mark_are_fine(capsys, cub, trained, tmp_path):
    for name in CUB_FILES:
        content = (cub / name).read_bytes().replace(b"\n", b"\r\n")
        (cub / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert call(capsys, *evaluate_on(cub, trained, tmp_path / "out"))[0::2] == (0, "")
    ours, theirs = ([json.loads(line) | {"path": ""}
                     for line in (out / "predictions.jsonl").read_text().splitlines()]
                    for out in (tmp_path / "out", trained))
    assert ours == theirs and len(ours) == 6


def test_other_classes_than_the_checkpoints(capsys, cub, trained, tmp_path):
    (cub / "classes.txt").write_text("1 001.Albatross\n2 002.Auk\n3 003.Bunting\n")
    line = error_of(call(capsys, *evaluate_on(cub, trained, tmp_path / "out")), evaluate)
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
    line = error_of(call(capsys, *train_on(cub, tmp_path / "run", "--workers", workers,
                                           "--batch-size", 6)), train)
    assert str(cub / TRAIN_IMAGE) in line
    assert_whole(tmp_path / "run")


def test_a_loading_process_that_the_system_kills(capsys, monkeypatch, cub, tmp_path):
    load, parent = data.load_image, os.getpid()
    monkeypatch.setattr(data, "load_image",
                        lambda *a: os.kill(os.getpid(), 9) if os.getpid() != parent else load(*a))
    line = error_of(call(capsys, *train_on(cub, tmp_path / "run", "--workers", 1)), train)
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
        for number in (2 * i + 1, 2 * i + 2):  # a training image and a test image
            name = CLASSES[(number - 1) // 4]
            save(cub / "images" / name / f"{name[4:]}_{number}.jpg")
    status, out, err = call(capsys, *train_on(cub, tmp_path / "run", "--workers", workers))
    assert (status, err) == (0, "")
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (metrics["n"], metrics["n_boxes"]) == (6, 3)
    assert "note: 3 boxes lie outside their images" in out
    assert "note: 3 of 6 test images have no box" in out


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
    *((flag, fault) for flag in ONE_USE
      for fault in (*RAW, "folder", "code", *SAVED, *ONE_USE[flag]))])
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
    assert str(file) in error_of(result, script)
    assert not (tmp_path / "executed").exists()
    assert_whole(tmp_path / "out")


# ---------------------------------------------------------------- places to write to


@pytest.mark.parametrize("below", ["", "run"])
def test_an_out_that_is_or_lies_in_a_file(capsys, whole, trained, tmp_path, below):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / below
    assert str(out) in error_of(call(capsys, *train_on(whole, out)), train)
    assert str(out) in error_of(call(capsys, *evaluate_on(whole, trained, out)), evaluate, 2)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_an_out_that_is_read_only(capsys, whole, trained, tmp_path):
    tmp_path.chmod(0o500)
    for command in (train_on(whole, tmp_path / "run"),
                    evaluate_on(whole, trained, tmp_path / "evaluation")):
        assert str(tmp_path) in error_of(call(capsys, *command), command[0])
    tmp_path.chmod(0o700)


# ---------------------------------------------------------------- random damage


def damage(path, seed):
    """Cuts the file or overwrites a few of its bytes, half of the time near its start."""
    rng, content = random.Random(seed), bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(len(content), 2000) if rng.random() < 0.5 else len(content))
        put = rng.choice([rng.randbytes(1), rng.randbytes(3), b"", b"\n", b" nan ", b"9" * 30])
        content[at:at + (len(put) if rng.random() < 0.7 else rng.randint(0, 3))] = put
    path.write_bytes(content[:rng.randrange(len(content))] if rng.random() < 0.2 else content)


def works_or_says_so(result, script, *words):
    if result[0] or result[2]:
        assert any(word in error_of(result, script) for word in words)


@settings(many, max_examples=60)
@given(seed=st.integers(0, 2**32), name=st.sampled_from(CUB_FILES))
def test_damaged_annotations(capsys, whole, cub, trained, tmp_path, seed, name):
    shutil.copy(whole / name, cub / name)
    damage(cub / name, seed)
    works_or_says_so(call(capsys, *evaluate_on(cub, trained, tmp_path / "out")), evaluate,
                     str(cub), "classes are not")
    assert_whole(tmp_path / "out")
    shutil.copy(whole / name, cub / name)


@settings(many, max_examples=40)
@given(seed=st.integers(0, 2**32), name=st.sampled_from([TRAIN_IMAGE, TEST_IMAGE]))
def test_damaged_images(capsys, whole, cub, tmp_path, seed, name):
    damage(cub / name, seed)
    works_or_says_so(call(capsys, *train_on(cub, tmp_path / "run")), train, str(cub / name))
    assert_whole(tmp_path / "run")
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    shutil.copy(whole / name, cub / name)


@settings(many, max_examples=120)
@given(seed=st.integers(0, 2**32), flag=st.sampled_from(list(ONE_USE)))
def test_damaged_weights(capsys, whole, trained, tmp_path, seed, flag):
    file = tmp_path / "odd name.pt"
    # the one step is to be done again
    torch.save(torch.load(trained / "last.pt", weights_only=True) | {"step": 0}, file)
    damage(file, seed)
    works_or_says_so(*weights_result(capsys, flag, file, whole, trained, tmp_path), str(file),
                     "not finite")
    assert_whole(tmp_path / "out")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
