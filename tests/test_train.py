"""train.py as its users run it, on a few tiny birds: in this process, but for torchrun and kill -9.
"""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import data
import evaluate
import train
from lctr import load_checkpoint
from support import common
from support.runs import folder as runs

pytestmark = pytest.mark.usefixtures("without_pictures")
ROOT = Path(__file__).parent.parent
TINY = ("--img-size 32 --embed-dim 12 --depth 2 --num-heads 2 --batch-size 8 --epochs 2 "
        "--pretrain-epochs 1 --limit-train 33 --limit-test 10 --freeze-blocks 0").split()


def run(out, *flags):
    train.main([*TINY, "--out", str(out), *map(str, flags)])
    return Path(out)


def fails(capsys, *flags, status=1):
    """What train.py says on standard error before it ends with this status."""
    with pytest.raises(SystemExit) as caught:
        train.main([str(flag) for flag in flags])
    assert caught.value.code == status
    return capsys.readouterr().err.removesuffix("\n")


def weights(out, name="last.pt", key="model"):
    return torch.load(Path(out) / name, weights_only=True)[key]


def log_lines(out):
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_s"} for line in lines]


def assert_same_run(a, b):
    for name in ("last.pt", "best.pt"):
        left, right = weights(a, name), weights(b, name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
    assert log_lines(a) == log_lines(b)
    assert (a / "predictions.jsonl").read_text() == (b / "predictions.jsonl").read_text()


def spawn(*arguments):
    """Another python, with as many threads as this one: their number decides how sums are rounded.
    """
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, env=threads,
                            text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def torchrun(*arguments):
    """(exit status, standard error) of train.py in two processes."""
    run = spawn("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py",
                "--device", "cpu",
                *arguments)
    try:
        return run.wait(120), run.stderr.read()
    finally:
        run.terminate()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("finished") / "run")


# ---------------------------------------------------------------- one whole run


def test_a_run_leaves_what_it_promises(finished):
    assert {path.name for path in finished.iterdir()} >= {
        "config.json", "log.jsonl", "last.pt", "best.pt", "metrics.json", "predictions.jsonl",
        "gallery.png",
        "curve.png"}
    for name in ("gallery.png", "curve.png"):
        Image.open(finished / name).verify()
    endings = (".json", ".jsonl", ".pt", ".png")
    assert not [path for path in finished.iterdir()
                if path.suffix not in endings and path.name != ".lock"]
    assert (finished / "loss.png").exists()
    best = torch.load(finished / "best.pt", weights_only=True)
    assert not {"optimizer", "scaler", "rng"} & set(best)

    checkpoint = torch.load(finished / "last.pt", weights_only=True)
    assert set(checkpoint) >= {"model", "config", "classes", "phase", "epoch", "step", "optimizer",
                               "rng", "metrics"}
    assert (checkpoint["phase"], checkpoint["epoch"], checkpoint["step"]) == ("main", 2, 8)
    assert checkpoint["config"] == json.loads((finished / "config.json").read_text())
    model, best = load_checkpoint(finished / "best.pt")
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["n"] == 10 and metrics["threshold"] == best["metrics"]["threshold"]
    assert len((finished / "predictions.jsonl").read_text().splitlines()) == 10
    steps = [(line["phase"], line["step"]) for line in log_lines(finished) if "loss" in line]
    assert steps == [("pretrain", 4), ("main", 8)]
    assert [line["epoch"] for line in log_lines(finished) if "val_top1_cls" in line] == [0, 1]


def test_the_main_phase_starts_from_the_pretrained_backbone(tmp_path):
    out = run(tmp_path / "run", "--max-steps", 1, "--lr", 1e-30, "--pretrain-lr", 1e-30)
    torch.manual_seed(0)
    fresh = train.build(json.loads((out / "config.json").read_text()), 18)
    moved = [key for key, value in weights(out).items()
             if (value - fresh.state_dict()[key]).abs().max() > 1e-20]
    # nothing is learnt at this rate: both phases started from the seed's weights ...
    assert not moved
    trained = run(tmp_path / "trained", "--max-steps", 1)
    difference = (
        weights(trained)["blocks.0.mlp.fc1.weight"] - fresh.blocks[0].mlp.fc1.weight).abs().max()
    # ... and at the usual one, further away than one step of Adam (1e-3) can go
    assert difference > 2e-3


def test_data_without_val_uses_the_last_epoch_and_the_fixed_threshold(tmp_path, capsys):
    root = tmp_path / "pictures"
    for split, n in (("train", 6), ("test", 2)):
        for name in ("dots", "lines"):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = np.random.default_rng(i).integers(0, 255, (40, 50, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    boxes = "".join(f"test/{name}/{i}.png,1,2,30,40\n" for name in ("dots", "lines")
                    for i in range(2))
    (root / "boxes.csv").write_text("path,xmin,ymin,xmax,ymax\n" + boxes)
    flags = ["--data", "folder", "--root", root, "--patch-size", 8, "--batch-size", 4,
             "--pretrain-epochs", 0]
    out = run(tmp_path / "run", *flags)
    assert json.loads((out / "metrics.json").read_text())["threshold"] == 0.2
    assert all(torch.equal(a, b)
               for a, b in zip(weights(out).values(), weights(out, "best.pt").values()))
    line = fails(capsys, *TINY, "--out", tmp_path / "auto", *flags, "--threshold", "auto", status=2)
    assert not (tmp_path / "auto").exists()
    assert "--threshold" in line and "val" in line


# -------------------------------------------------------------- other data, from pictures to scores


def picture(path, mode="RGB", form="JPEG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path.name))).integers(0, 255, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, form)


def train_and_evaluate(name, root, out, capsys):
    """A run, its metrics.json and notes, and that evaluate.py finds the same numbers with nothing
    but its checkpoint.
    """
    run(out, "--data", name, "--root", root, "--patch-size", 8, "--batch-size", 4,
        "--pretrain-epochs", 0)
    said, warned = capsys.readouterr()
    assert evaluate.main(["--checkpoint", str(out / "best.pt"), "--limit-test", "10"]) == 0
    assert not warned
    metrics, again = (json.loads((folder / "metrics.json").read_text())
                      for folder in (out, out / "evaluate"))
    assert metrics.items() <= again.items()
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    return metrics, lines, [line.removeprefix("note: ") for line in said.splitlines()
                            if line.startswith("note: ")]


def test_ilsvrc_as_the_challenge_lays_it_out(tmp_path, capsys):
    images, annotations = (tmp_path / "ILSVRC" / part / "CLS-LOC"
                           for part in ("Data", "Annotations"))
    words = {"n02123045": "tabby, tabby cat", "n01440764": "tench, Tinca tinca",
             "n02105855": "Shetland sheepdog, Shetland"}
    (annotations / "val").mkdir(parents=True)
    number = 0
    for wnid in words:
        for i, odd in ((10026, {}), (293, {"mode": "L"}), (2933, {"form": "PNG"}),
                       (4152, {"mode": "CMYK"})):
            # the real set has such ones, too
            picture(images / "train" / wnid / f"{wnid}_{i}.JPEG", **odd)
        for boxes in ([(0, 0, 20, 30)], [(2, 3, 20, 30), (10, 10, 60, 39)]):
            number += 1
            stem = f"ILSVRC2012_val_{number:08d}"
            picture(images / "val" / f"{stem}.JPEG")
            objects = "".join(
                f"\t<object>\n\t\t<name>{wnid}</name>\n\t\t<pose>Unspecified</pose>\n"
                f"\t\t<truncated>0</truncated>\n\t\t<difficult>0</difficult>\n"
                f"\t\t<bndbox>\n\t\t\t<xmin>{x0}</xmin>\n\t\t\t<ymin>{y0}</ymin>\n"
                f"\t\t\t<xmax>{x1}</xmax>\n\t\t\t<ymax>{y1}</ymax>\n\t\t</bndbox>\n\t</object>\n"
                for x0, y0, x1, y1 in boxes)
            (annotations / "val" / f"{stem}.xml").write_text(
                f"<annotation>\n\t<folder>val</folder>\n\t<filename>{stem}</filename>\n"
                "\t<source>\n\t\t<database>ILSVRC_2012</database>\n\t</source>\n"
                "\t<size>\n\t\t<width>50</width>\n\t\t<height>40</height>\n\t\t<depth>3</depth>\n"
                f"\t</size>\n\t<segmented>0</segmented>\n{objects}</annotation>\n")
    mapping = "".join(f"{wnid} {rest}\n" for wnid, rest in sorted(words.items()))
    (tmp_path / "LOC_synset_mapping.txt").write_text(mapping)
    (annotations / "val" / "ILSVRC2012_val_00000001.xml").rename(
        annotations / "val" / "ILSVRC2012_val_00009999.xml")

    metrics, lines, notes = train_and_evaluate("ilsvrc", tmp_path, tmp_path / "run", capsys)
    assert (metrics["n"], metrics["n_boxes"], metrics["threshold"]) == (5, 5, 0.2)
    assert [len(line["boxes"]) for line in lines] == [2, 1, 2, 1, 2]
    assert lines[0]["boxes"] == [[2, 3, 20, 30], [10, 10, 50, 39]]  # the second is clipped
    # the mapping's order: tench, sheepdog, tabby
    assert [line["label"] for line in lines] == [2, 0, 0, 1, 1]
    assert [note.split(" (")[0] for note in notes] == [
        "1 annotations have no image and are ignored",
        "1 images have no annotation and are left out",
        "3 boxes reach beyond their images and are clipped"]
    checkpoint = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert checkpoint["classes"] == ["tench, Tinca tinca", "Shetland sheepdog, Shetland",
                                     "tabby, tabby cat"]


@pytest.mark.parametrize("boxes", ["all sorts", "none"])
def test_a_folder_with_odd_names(tmp_path, capsys, boxes):
    root = tmp_path / "my data, ünïcode 鳥"
    for place, odd in {
        "train/great tit/a b.JPG": {}, "train/great tit/grey.jpeg": {"mode": "L"},
        "train/Ünïcode/鳥.PNG": {"form": "PNG"},
        "train/Ünïcode/cmyk.Jpg": {"mode": "CMYK"}, "val/Ünïcode/v.png": {"form": "PNG"},
        "val/great tit/v.png": {"form": "PNG"},
        'test/great tit/a, "b".jpeg': {"mode": "L"}, "test/great tit/unboxed.tif": {"form": "TIFF"},
        "test/Ünïcode/鳥 2.JPG": {"mode": "CMYK"}, "test/Ünïcode/two.webp": {"form": "WEBP"},
    }.items():
        picture(root / place, **odd)
    (root / "train/great tit/Thumbs.db").write_text("no picture")
    if boxes == "all sorts":
        (root / "boxes.csv").write_text(
            'Path,xmin,ymin,xmax,ymax\r\n"test/great tit/a, ""b"".jpeg",1,2,30.5,40\r\n'
            "test/Ünïcode/鳥 2.JPG,-5,0,50,20\r\ntest/Ünïcode/two.webp,1,1,9,9\r\n"
            "test/Ünïcode/two.webp,20,5,50,40\r\nval/Ünïcode/v.png,5,5,40,35\r\n"
            "test/Ünïcode/gone.jpg,1,2,3,4\r\n", "utf-8")
    metrics, lines, notes = train_and_evaluate("folder", root, tmp_path / "run", capsys)
    assert metrics["n"] == len(lines) == 4 and [line["label"] for line in lines] == [0, 0, 1, 1]
    assert [line["path"].rpartition("/")[2] for line in lines] == ['a, "b".jpeg', "unboxed.tif",
                                                                   "two.webp", "鳥 2.JPG"]
    if boxes == "none":
        assert metrics["n_boxes"] == 0 and metrics["threshold"] == 0.2
        assert metrics["couplings"]["relation"]["gt_known"] is None
        assert notes == ["2 of 2 val images have no box and are not scored",
                         "4 of 4 test images have no box and are not scored"]
    else:
        assert metrics["n_boxes"] == 3 and [len(line["boxes"]) for line in lines] == [1, 0, 2, 1]
        val = data.load_dataset("folder", root, "val", 32)
        scores = evaluate.evaluate_model(load_checkpoint(tmp_path / "run" / "best.pt")[0], val)
        assert metrics["threshold"] == evaluate.best_threshold(scores, "relation") != 0.2
        assert lines[3]["boxes"] == [[0, 0, 50, 20]] and lines[1]["iou"] is None
        assert [note.split(" (")[0] for note in notes] == [
            f"1 rows of {root / 'boxes.csv'} name no image",
            "1 of 2 val images have no box and are not scored",
            "1 boxes reach beyond their images and are clipped",
            "1 of 4 test images have no box and are not scored"]


# ---------------------------------------------------------------- stopping and going on


class Killed(BaseException):
    """Stands for kill -9: nothing catches it, nothing is saved on the way out."""


@pytest.fixture
def kill_at(monkeypatch):
    def arm(call):
        calls, original = iter(range(10**6)), train.learning_rate
        monkeypatch.setattr(train, "learning_rate",
                            lambda *a: original(*a) if next(calls) != call else kill())

    def kill():
        monkeypatch.undo()
        raise Killed

    return arm


@pytest.mark.parametrize("flags", [["--pretrain-epochs", 0],
                                   ["--pretrain-epochs", 0, "--amp", "fp16"]], ids=str)
def test_a_killed_run_on_pretrained_weights(tmp_path, finished, kill_at, flags):
    """The rates of small projections were read off the file, and the loss scale grew: both come
    from the checkpoint.
    """
    flags = [*flags, "--pretrained", finished / "best.pt", "--checkpoint-every", 1]
    whole = run(tmp_path / "whole", *flags)
    kill_at(3)
    with pytest.raises(Killed):
        run(tmp_path / "run", *flags)
    assert_same_run(run(tmp_path / "run", "--resume", *flags), whole)


@pytest.mark.parametrize("steps, flags", [
    ([1], []), ([3], ["--checkpoint-every", 1]), ([5], []), ([7, 1], ["--checkpoint-every", 3]),
    ([10, 1, 1], ["--workers", 2]),
])
def test_a_killed_run_ends_as_one_never_stopped(tmp_path, finished, kill_at, steps, flags):
    for step in steps:
        kill_at(step)
        with pytest.raises(Killed):
            run(tmp_path / "run", "--resume", *flags)
    assert_same_run(run(tmp_path / "run", "--resume", *flags), finished)


def test_kill_9_at_any_moment_of_either_phase(tmp_path):
    flags = [*TINY, "--epochs", "6", "--pretrain-epochs", "6", "--checkpoint-every", "1"]
    killed, rng = tmp_path / "killed", np.random.default_rng()
    for phase in train.PHASES:
        process = spawn("train.py", *flags, "--resume", "--out", killed)
        step = int(rng.integers(1, 12))
        while process.poll() is None:
            if (killed / "last.pt").exists():
                # readable at any moment, too
                saved = torch.load(killed / "last.pt", weights_only=True)
                if saved["phase"] == phase and saved["step"] >= step:
                    break
            time.sleep(rng.random() / 50)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
    before = torch.load(killed / "last.pt", weights_only=True)
    train.main([*flags, "--resume", "--out", str(killed)])
    train.main([*flags, "--out", str(tmp_path / "whole")])
    assert_same_run(killed, tmp_path / "whole")
    assert before["phase"] == "main" and before["step"] < weights(killed, "last.pt", "step")
    assert not [path for path in killed.iterdir() if path.name.endswith(".partial")]


def test_killed_before_its_last_evaluation(tmp_path, finished, monkeypatch):
    monkeypatch.setattr(train.evaluate, "report", lambda *_, **__: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        run(tmp_path / "run")
    monkeypatch.undo()
    assert_same_run(run(tmp_path / "run", "--resume"), finished)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, finished, monkeypatch, capsys, number):
    original = train.learning_rate

    def interrupt(step, *rest):
        if step == 5:
            os.kill(os.getpid(), number)
        return original(step, *rest)

    monkeypatch.setattr(train, "learning_rate", interrupt)
    message = fails(capsys, *TINY, "--out", tmp_path / "run", "--checkpoint-every", 100, status=130)
    assert "--resume" in message and "stopping after this step" in message
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert (saved["phase"], saved["step"]) == ("main", 6)
    monkeypatch.undo()
    assert_same_run(run(tmp_path / "run", "--resume"), finished)


def test_resume_from_a_file_into_another_folder(tmp_path, finished, kill_at):
    kill_at(9)
    with pytest.raises(Killed):
        run(tmp_path / "first")
    assert_same_run(run(tmp_path / "second", "--resume", tmp_path / "first" / "last.pt"), finished)


def test_resume_from_a_file_into_another_run_is_refused(tmp_path, finished, kill_at, capsys):
    kill_at(6)
    with pytest.raises(Killed):
        run(tmp_path / "other")
    before = {path: path.read_bytes() for path in finished.iterdir()}
    assert "already holds a run" in fails(capsys, *TINY, "--out", finished, "--resume",
                                          tmp_path / "other" / "last.pt")
    assert before == {path: path.read_bytes() for path in finished.iterdir()}


def test_a_log_is_cut_back_to_the_checkpoint_and_mended(tmp_path, finished, kill_at):
    kill_at(9)
    with pytest.raises(Killed):
        run(tmp_path / "run")
    with open(tmp_path / "run" / "log.jsonl", "ab") as file:
        file.write(b'{"phase": "main", "epoch": 1, "step": 5, "loss": 1.0}\n{"step": 9}\n[]\n'
                   b'\xff\0\n{"phase": "main", "epo')
    assert_same_run(run(tmp_path / "run", "--resume"), finished)


def test_resume_of_a_finished_run_changes_nothing(finished, capsys):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    run(finished, "--resume")
    assert "finished" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in finished.iterdir()}


def test_resume_with_other_flags_lists_the_differences(finished, capsys):
    line = fails(capsys, *TINY, "--out", finished, "--resume", "--lr", 0.5, "--scorer", "gap",
                 "--workers", 1)
    assert f"--lr was {train.RECIPES['synthetic']['lr']}, is 0.5" in line
    assert "--scorer was 'separate', is 'gap'" in line
    assert "--workers" not in line


def test_a_run_is_never_overwritten(finished, capsys):
    before = (finished / "last.pt").read_bytes()
    assert "--resume" in fails(capsys, *TINY, "--out", finished)
    assert (finished / "last.pt").read_bytes() == before


def test_a_full_disk_keeps_the_former_checkpoint(tmp_path, finished, capsys):
    """Files may grow to what the backbone's checkpoint needs, not the larger one of the main phase.
    """
    def write_at_most(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    write_at_most((finished / "last.pt").stat().st_size - 1)
    try:
        line = fails(capsys, *TINY, "--out", tmp_path / "run")
    finally:
        write_at_most(resource.RLIM_INFINITY)
    assert str(tmp_path / "run") in line and "File too large" in line and "\n" not in line
    assert weights(tmp_path / "run", "last.pt", "phase") == "pretrain"
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.endswith(".partial")]
    assert_same_run(run(tmp_path / "run", "--resume"), finished)


def test_a_failing_write_keeps_the_former_checkpoint(tmp_path, monkeypatch, capsys):
    original, saves = torch.save, []

    def full_disk(content, file):
        saves.append(1)
        if len(saves) == 3:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        original(content, file)

    monkeypatch.setattr(torch, "save", full_disk)
    line = fails(capsys, *TINY, "--out", tmp_path / "run", "--checkpoint-every", 2)
    assert "No space left" in line
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert (saved["phase"], saved["step"]) == ("pretrain", 4)


# ------------------------------------------------------- the same numbers however they are computed


def test_workers_change_nothing(tmp_path, finished):
    assert_same_run(run(tmp_path / "run", "--workers", 2), finished)


def assert_close(run, other):
    """But for the key third of qkv.bias: softmax is blind to it, so Adam makes steps of its
    rounding noise.
    """
    assert len(log_lines(run)) == len(log_lines(other))
    for line, expected in zip(log_lines(run), log_lines(other)):
        assert line.pop("phase") == expected.pop("phase")
        # Adam is blind to the gradient's scale, grad_norm is not
        assert line == pytest.approx(expected, rel=1e-3)
    a, b = weights(run), weights(other)
    for key, value in a.items():
        if key.endswith("qkv.bias"):
            value, b[key] = (torch.cat([x[:12], x[24:]]) for x in (value, b[key]))
        torch.testing.assert_close(value, b[key], rtol=1e-3, atol=2e-5, msg=key)


def test_accumulated_pieces_make_the_same_steps(tmp_path, finished):
    assert_close(run(tmp_path / "run", "--accumulate", 3), finished)


def test_two_processes_make_the_same_run(tmp_path, finished):
    status, errors = torchrun(*TINY, "--out", tmp_path / "run")
    assert status == 0, errors
    assert_close(tmp_path / "run", finished)
    one, two = (json.loads((out / "metrics.json").read_text())
                for out in (finished, tmp_path / "run"))
    assert two["n"] == one["n"] == 10
    assert (tmp_path / "run" / "predictions.jsonl").read_text().count("\n") == 10


def test_one_process_that_fails_ends_all_and_shows_why(tmp_path):
    """The picture that cannot be read is met in training, by the one process that has it in its
    half of the batch.
    """
    for split, n in (("train", 8), ("test", 2)):
        for i in range(n):
            name = tmp_path / split / ("dots", "lines")[i % 2] / f"{i}.png"
            name.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (i, 0, 0)).save(name)
    culprit = tmp_path / "train" / "lines" / "5.png"
    culprit.write_bytes(culprit.read_bytes()[:60])
    status, errors = torchrun(*TINY, "--data", "folder", "--root", tmp_path, "--patch-size", 8,
                              "--out", tmp_path / "run")
    ours = [line for line in errors.splitlines() if line.startswith("train.py: error: ")]
    assert status == 1 and f"{culprit}: cannot be read as an image" in "".join(ours)
    # the other process may say that it lost this one
    assert len(ours) <= 2 and "in train\n" not in errors


def test_bfloat16_trains(tmp_path):
    assert all(torch.isfinite(value).all()
               for value in weights(run(tmp_path / "run", "--amp", "bf16")).values())


def test_a_loss_that_is_not_finite_stops_with_the_culprits(tmp_path, monkeypatch, capsys):
    original = train.loss_sum
    last = tmp_path / "run" / "last.pt"
    monkeypatch.setattr(train, "loss_sum",
                        lambda *a: original(*a) * (math.nan if last.exists() else 1))
    line = fails(capsys, *TINY, "--out", tmp_path / "run")
    assert "main step 1: loss nan" in line and "learning rate" in line and line.count(",") > 8
    assert "\n" not in line
    assert torch.load(last, weights_only=True)["phase"] == "pretrain"


# ---------------------------------------------------------------- the parts


@given(samples=st.integers(1, 50), batch_size=st.integers(1, 60), seed=st.integers(0, 3),
       epoch=st.integers(0, 3))
def test_epoch_batches_are_full_disjoint_and_repeatable(samples, batch_size, seed, epoch):
    batch_size = min(batch_size, samples)
    batches = train.epoch_batches(samples, batch_size, seed, epoch)
    flat = [i for batch in batches for i in batch]
    size = batch_size
    assert {len(batch) for batch in batches} == {size} and len(batches) == samples // size
    assert len(set(flat)) == len(flat) and set(flat) <= set(range(samples))
    assert batches == train.epoch_batches(samples, batch_size, seed, epoch)


def test_epochs_and_seeds_shuffle_differently():
    orders = [train.epoch_batches(1000, 1000, seed, epoch)[0] for seed in (0, 1)
              for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@given(total=st.integers(1, 400), share=st.floats(0, 0.1), peak=st.floats(1e-6, 1))
def test_learning_rate_rises_to_its_peak_and_falls_to_a_hundredth(total, share, peak):
    warmup = share * total
    rates = [train.learning_rate(step, total, warmup, peak) for step in range(total)]
    top = rates.index(max(rates))
    assert all(0 < rate <= peak * (1 + 1e-9) for rate in rates)
    assert rates[:top + 1] == sorted(rates[:top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert top <= math.ceil(warmup) and rates[-1] >= 0.01 * peak * (1 - 1e-9)
    assert train.learning_rate(total, total, warmup, peak) == pytest.approx(0.01 * peak)


def rates(*flags, layer_decay=1.0, frozen=0):
    """Each parameter's (scale of the rate, weight decay), None where it is frozen."""
    model = train.build(vars(train.parse_flags([*TINY, *flags])), 9)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = dict.fromkeys(names.values())
    for group in train.adamw(model, 0.05, layer_decay, frozen).param_groups:
        for parameter in group["params"]:
            found[names[parameter]] = (group["scale"], group["weight_decay"])
    return found


def test_what_is_decayed_and_what_learns_slower():
    found = rates()
    assert None not in found.values()
    gate = {name for name, (scale, _) in found.items() if scale == train.GATE_RATE}
    assert gate == {f"cdm.{layer}.{kind}" for layer in ("conv", "score_avg", "score_max")
                    for kind in ("weight", "bias")}
    assert {scale for name, (scale, _) in found.items() if name not in gate} == {1.0}
    for name in ("cls_token", "pos_embed", "norm.weight", "blocks.0.attn.qkv.bias", "cdm.bias"):
        assert found[name][1] == 0
    for name in ("cdm.weight", "patch_embed.proj.weight", "blocks.1.mlp.fc2.weight"):
        assert found[name][1] == 0.05


def test_rates_decay_by_layer():
    found = rates(layer_decay=0.5)
    for name, scale in (("cdm.weight", 1), ("norm.weight", 1), ("blocks.1.attn.qkv.weight", 0.5),
                        ("blocks.0.attn.qkv.weight", 0.25), ("pos_embed", 0.125),
                        ("cls_token", 0.125), ("patch_embed.proj.bias", 0.125)):
        assert found[name][0] == scale, name


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_blocks_do_not_move(tmp_path, frozen):
    out = run(tmp_path / "run", "--freeze-blocks", frozen)
    before, after = weights(out, "pretrained.pt"), weights(out)
    for name, value in after.items():
        if name.startswith(train.HEADS):
            continue
        layer = train.layer_of(name, 2)
        assert torch.equal(value, before[name]) == (frozen > 0 and layer <= frozen), name


def test_frozen_blocks_take_no_backward_pass(monkeypatch):
    model = train.build(vars(train.parse_flags(TINY)), 9)
    train.adamw(model, 0.05, 1.0, frozen=1)
    tokens, _ = model.forward_features(torch.randn(2, 3, 32, 32))
    assert tokens.requires_grad and not model.embed(torch.randn(2, 3, 32, 32)).requires_grad
    model.blocks[0].register_forward_hook(
        lambda *args: pytest.fail("graph") if args[2][0].requires_grad else None)
    model(torch.randn(2, 3, 32, 32))


def test_resume_refuses_other_data_and_what_is_not_the_last(tmp_path, finished, capsys):
    saved = torch.load(finished / "last.pt", weights_only=True)
    for change, words in (
        (lambda s: s["classes"].__setitem__(1, "dodo"), "class 'dodo' is now"),
        (lambda s: s["classes"].append("dodo"), "19 classes then, 18 now"),
        (lambda s: s["data"].update(images=7), "7 training pictures then, 33 now"),
        (lambda s: s["data"].update(digest="x"), "other file names or labels"),
        (lambda s: s.pop("optimizer"), "holds no optimizer to resume with"),
    ):
        content = {**saved, "classes": list(saved["classes"]), "data": dict(saved["data"]),
                   "metrics": {}}
        change(content)
        torch.save(content, tmp_path / "last.pt")
        line = fails(capsys, *TINY, "--out", tmp_path / "run", "--resume", tmp_path / "last.pt")
        assert words in line and "\n" not in line
        assert not (tmp_path / "run").exists()


def test_one_process_at_a_time_writes_into_a_run(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    code = ("import sys, pathlib; from support.runs.folder import hold\n"
            "with hold(pathlib.Path(sys.argv[1]), None): print('held', flush=True); sys.stdin.read()")
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], cwd=ROOT,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    line = fails(capsys, *TINY, "--out", tmp_path / "run")
    assert "another train.py is writing into" in line
    other.kill(), other.wait()
    run(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.json").exists()


def test_resume_where_nothing_is_says_so(tmp_path, capsys):
    run(tmp_path / "run", "--resume")
    assert "this one starts afresh" in capsys.readouterr().out


def test_an_evaluation_does_not_finish_a_run(tmp_path, finished, kill_at):
    kill_at(9)
    with pytest.raises(Killed):
        run(tmp_path / "run")
    (tmp_path / "run" / "metrics.json").write_text("{}")
    assert_same_run(run(tmp_path / "run", "--resume"), finished)


def test_defaults_are_the_papers():
    cub = train.parse_flags(["--data", "cub", "--root", "x"])
    assert (cub.batch_size, cub.lr, cub.epochs, cub.weight_decay) == (128, 5e-5, 80, 5e-4)
    assert (cub.embed_dim, cub.depth, cub.num_heads, cub.num_kernels) == (384, 12, 6, 4)
    assert (cub.img_size, cub.patch_size) == (224, 16)
    ilsvrc = train.parse_flags(["--data", "ilsvrc", "--root", "x", "--arch", "base"])
    assert (ilsvrc.batch_size, ilsvrc.lr, ilsvrc.epochs, ilsvrc.embed_dim) == (256, 5e-4, 14, 768)
    assert train.parse_flags(["--img-size", "32x64"]).img_size == [32, 64]


# ---------------------------------------------------------------- wrong flags


@pytest.mark.parametrize("flags, name", [
    (["--epochs", "0"], "--epochs"), (["--epochs", "1.5"], "--epochs"),
    (["--batch-size", "-1"], "--batch-size"),
    (["--lr", "0"], "--lr"), (["--lr", "nan"], "--lr"), (["--lr", "inf"], "--lr"),
    (["--lr", "x"], "--lr"),
    (["--weight-decay", "-1"], "--weight-decay"), (["--warmup-epochs", "inf"], "--warmup-epochs"),
    (["--label-smoothing", "1"], "--label-smoothing"), (["--drop-path", "1"], "--drop-path"),
    (["--threshold", "1"], "--threshold"), (["--threshold", "best"], "--threshold"),
    (["--threshold", "-0.1"], "--threshold"),
    (["--img-size", "60"], "--img-size"), (["--img-size", "0"], "--img-size"),
    (["--img-size", "64x"], "--img-size"),
    (["--img-size", "64x64x3"], "--img-size"), (["--num-heads", "5"], "--num-heads"),
    (["--patch-size", "0"], "--patch-size"),
    (["--kernel-size", "5"], "--kernel-size"), (["--head", "gap"], "--head"),
    (["--scorer", "max"], "--scorer"),
    (["--amp", "int8"], "--amp"), (["--device", "quantum"], "--device"),
    (["--workers", "-1"], "--workers"),
    (["--seed", "-1"], "--seed"), (["--seed", str(2**64)], "--seed"),
    (["--max-steps", "0"], "--max-steps"),
    (["--limit-train", "0"], "--limit-train"),
    (["--data", "imagenet"], "--data"), (["--data", "cub"], "--root"),
    (["--root", "birds"], "--root"),
    (["--colour"], "--colour"),
    (["--pretrain-epochs", "-1"], "--pretrain-epochs"), (["--accumulate", "0"], "--accumulate"),
    (["--arch", "huge"], "--arch"),
    (["--embed-dim", "9" * 20], "--embed-dim"), (["--depth", "9" * 9], "--depth"),
    (["--epochs", "9" * 400], "--epochs"),
    (["--workers", "100000"], "--workers"), (["--device", "cuda:99"], "--device"),
    (["--img-size", "9" * 12], "--img-size"),
    (["--accumulate", "40"], "--batch-size"), (["--freeze-blocks", "9"], "--freeze-blocks"),
    (["--device", "mps"], "mps"), (["--layer-decay", "0"], "--layer-decay"),
    (["--checkpoint-every", "0"], "--checkpoint-every"), (["--eval-every", "0"], "--eval-every"),
])
def test_wrong_flags_end_in_one_line_with_status_2(capsys, monkeypatch, flags, name):
    monkeypatch.setattr(train, "train", lambda *_: None)
    error = fails(capsys, *flags, status=2)
    assert error.startswith("train.py: error: ") and name in error and error.count("\n") == 0


def test_wrong_files_end_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    for flags, words in (
        (["--data", "cub", "--root", tmp_path / "none", "--out", tmp_path / "a"],
         str(tmp_path / "none")),
        ([*TINY, "--out", tmp_path / "file"], str(tmp_path / "file")),
        ([*TINY, "--out", tmp_path / "file" / "run"], str(tmp_path / "file")),
        ([*TINY, "--out", tmp_path / "b", "--pretrained", tmp_path / "none.pth"], "none.pth"),
        ([*TINY, "--out", tmp_path / "b", "--pretrained", tmp_path / "file"],
         str(tmp_path / "file")),
        ([*TINY, "--out", tmp_path / "c", "--resume", tmp_path / "none.pt"], "none.pt"),
    ):
        line = fails(capsys, *flags)
        assert line.startswith("train.py: error: ") and words in line and "\n" not in line


# ---------------------------------------------------------------- signals, times, warnings


def signals_at(monkeypatch, step, *numbers):
    """Sends this process these signals, one after another, before that step of the main phase."""
    original, calls = train.learning_rate, []

    def interrupt(now, total, *rest):
        calls.append(now)
        if now == step and total == 8:
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(now, total, *rest)

    monkeypatch.setattr(train, "learning_rate", interrupt)


@pytest.mark.parametrize("numbers, step", [
    ((signal.SIGINT, signal.SIGINT), 4),  # at once: the state of the last epoch's end
    ((signal.SIGTERM, signal.SIGINT), 4),
    ((signal.SIGINT, signal.SIGTERM), 6),  # torchrun forwards a SIGTERM after a Ctrl-C
    ((signal.SIGTERM, signal.SIGTERM), 6),
], ids=str)
def test_a_second_ctrl_c_ends_at_once(tmp_path, finished, monkeypatch, capsys, numbers, step):
    signals_at(monkeypatch, 5, *numbers)
    assert "--resume goes on" in fails(capsys, *TINY, "--out", tmp_path / "run", status=130)
    assert weights(tmp_path / "run", "last.pt", "step") == step
    monkeypatch.undo()
    assert_same_run(run(tmp_path / "run", "--resume"), finished)


def test_ctrl_c_ends_an_evaluation_at_once(tmp_path, finished, monkeypatch, capsys):
    calls = []

    def interrupt(*_):
        calls.append(1)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(evaluate, "localize", interrupt)
    message = fails(capsys, *TINY, "--out", tmp_path / "run", status=130)
    assert len(calls) == 1 and "stopping after this step" not in message
    assert weights(tmp_path / "run", "last.pt", "phase") == "pretrain"
    monkeypatch.undo()
    assert_same_run(run(tmp_path / "run", "--resume"), finished)


def started(process, out, phase="main"):
    """Waits until the run has logged a step of that phase."""
    while process.poll() is None:
        if phase in {entry["phase"] for entry in train.read_log(out)}:
            return
        time.sleep(0.02)
    pytest.fail(process.stderr.read())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_loading_processes_leave_signals_to_the_run(tmp_path, number):
    """A terminal's Ctrl-C reaches the whole group."""
    command = [sys.executable, "train.py", *TINY, "--device", "cpu", "--epochs", 1000,
               "--eval-every", 10**6, "--workers", 1, "--out", tmp_path / "run"]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, text=True,
                               stderr=subprocess.PIPE, start_new_session=True)
    started(process, tmp_path / "run")
    os.killpg(process.pid, number)
    errors = process.communicate()[1]
    assert process.returncode == 130 and "--resume goes on" in errors
    assert "Traceback" not in errors
    log, step = train.read_log(tmp_path / "run"), weights(tmp_path / "run", "last.pt", "step")
    assert 4 <= max(entry["step"] for entry in log if entry["phase"] == "main") <= step


def test_sigterm_under_torchrun_saves_and_says_how_to_go_on(tmp_path):
    process = spawn("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                    "train.py", *TINY, "--device", "cpu", "--epochs", 1000, "--eval-every", 10**6,
                    "--out", tmp_path / "run")
    started(process, tmp_path / "run")
    process.terminate()
    errors = process.communicate()[1]
    assert process.returncode and "--resume goes on" in errors
    log, step = train.read_log(tmp_path / "run"), weights(tmp_path / "run", "last.pt", "step")
    assert 4 <= max(entry["step"] for entry in log if entry["phase"] == "main") <= step


def test_training_runs_without_docstrings_and_asserts(tmp_path):
    process = spawn("-OO", "train.py", *TINY, "--device", "cpu", "--max-steps", 1,
                    "--pretrain-epochs", 0, "--out", tmp_path / "run")
    assert process.wait() == 0, process.stderr.read()


def test_times_are_told_for_the_whole_run_without_warm_up(tmp_path, monkeypatch, capsys):
    minutes = iter([1000.0, *range(10000, 60000, 60)])  # the first steps take long
    clock = types.SimpleNamespace(perf_counter=lambda: next(minutes), monotonic=time.monotonic)
    monkeypatch.setattr(train, "time", clock)
    run(tmp_path / "run", "--epochs", 3, "--pretrain-epochs", 0, "--limit-train", 32)
    told, = [line for line in capsys.readouterr().out.splitlines() if "minutes to go" in line]
    # two readings, an epoch's end at step 4 and step 6, are two minutes after step 3: 40 s a step;
    # 6 of 12 steps to go, then 10 + 10 images scored at half a step's cost
    assert told.split("about ")[1] == "4.8 minutes to go, evaluation included"


def test_the_time_left_includes_what_follows_and_no_warm_up(monkeypatch, capsys):
    clock = iter([0, *range(1000, 4000, 40)])
    monkeypatch.setattr(common.time, "monotonic", lambda: next(clock))
    assert list(common.progress(range(5), "work", later=6, warmup=1)) == [0, 1, 2, 3, 4]
    lines = capsys.readouterr().err.splitlines()
    assert "2/5" in lines[0] and f"{(5 - 2 + 6) * 40} s left" in lines[0]
    assert lines[-1].endswith("160 s")


def test_one_class_alone_is_refused(tmp_path, capsys):
    for split in ("train", "test"):
        for i in range(2):
            picture(tmp_path / "data" / split / "alone" / f"{i}.png")
    message = fails(capsys, *TINY, "--data", "folder", "--root", tmp_path / "data", "--patch-size",
                    8, "--pretrain-epochs", 0, "--out", tmp_path / "run")
    assert "one class alone teaches nothing: need two" in message
    assert not (tmp_path / "run").exists()


def test_no_test_takes_a_gpu(monkeypatch):
    """What conftest.py hides from this process and from those that it starts."""
    assert not torch.cuda.is_available() and train.parse_flags([]).device == "cpu"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" == os.environ["HIP_VISIBLE_DEVICES"]
    empty, gpu = torch.empty, torch.device("cuda", 0)  # without that, on a machine with a GPU:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch, "empty", lambda *a, device=None, **kw: types.SimpleNamespace(
        device=gpu) if str(device).startswith("cuda") else empty(*a, device=device, **kw))
    flags = train.parse_flags([])
    assert (flags.device, flags.amp) == ("cuda:0", "bf16")
