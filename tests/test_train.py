"""train.py as its users run it, on a few tiny birds: in this process, but for signals and torchrun.
"""

import errno
import fcntl
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
import evaluate
import train
from helpers import ROOT, call, make_folder, noise, picture, script_error, spawn, torchrun
from lctr import load_checkpoint
from support.pictures.birds import SPECIES
from support.pictures.readers import spread
from support.runs import folder as runs

pytestmark = pytest.mark.usefixtures("without_pictures")
KINDS = 18  # of birds, by default
TINY = ("--img-size 32 --embed-dim 12 --depth 2 --num-heads 2 --batch-size 8 --epochs 2 "
        "--pretrain-epochs 1 --limit-train 33 --limit-test 10 --freeze-blocks 0 "
        "--device cpu").split()


def run(out, *flags):
    train.main([*TINY, "--out", str(out), *map(str, flags)])
    return Path(out)


def fails(capsys, *flags, status=1):
    """The one line with which train.py ends."""
    return script_error(call(capsys, train, *flags), train, status)


def stops(capsys, *flags):
    """What train.py says when it is interrupted."""
    status, _, errors = call(capsys, train, *flags)
    assert status == 130
    return errors


def hang(*_):
    time.sleep(600)


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


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def own_pictures(tmp_path):
    """A folder of two classes with train/ and test/, and boxes."""
    root = tmp_path / "pictures"
    for i in range(16):
        name = f"{'train' if i < 12 else 'test'}/{('dots', 'lines')[i % 2]}/{i}.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise(i, (50, 40)).save(root / name)
    boxes = "".join(f"test/{('dots', 'lines')[i % 2]}/{i}.png,1,2,30,40\n" for i in range(12, 16))
    (root / "boxes.csv").write_text("path,xmin,ymin,xmax,ymax\n" + boxes)
    return root


def on_pictures(root):
    return ["--data", "folder", "--root", root, "--patch-size", 8, "--batch-size", 4,
            "--pretrain-epochs", 0]


# ---------------------------------------------------------------- one whole run


def test_a_run_leaves_its_checkpoints_log_metrics_and_pictures(finished):
    names = {"config.json", "log.jsonl", "last.pt", "best.pt", "pretrained.pt", "metrics.json",
             "predictions.jsonl", "gallery.png", "curve.png", "failures.png", "loss.png", ".lock"}
    assert {path.name for path in finished.iterdir()} == names
    last, best = (torch.load(finished / name, weights_only=True) for name in ("last.pt", "best.pt"))
    assert set(last) >= {"model", "config", "classes", "phase", "epoch", "step", "optimizer",
                         "scaler", "rng", "metrics", "data"}
    assert not {"optimizer", "scaler", "rng"} & set(best) and best["classes"] == SPECIES[:KINDS]
    assert (last["phase"], last["epoch"], last["step"]) == ("main", 2, 8)
    assert last["config"] == json.loads((finished / "config.json").read_text())
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["n"] == 10 and metrics["threshold"] == best["metrics"]["threshold"]
    assert len((finished / "predictions.jsonl").read_text().splitlines()) == 10
    steps = [(line["phase"], line["step"]) for line in log_lines(finished) if "loss" in line]
    assert steps == [("pretrain", 4), ("main", 8)]
    assert [line["epoch"] for line in log_lines(finished) if "val_top1_cls" in line] == [0, 1]


def test_data_without_val_uses_the_last_epoch_and_the_fixed_threshold(
        tmp_path, own_pictures, capsys):
    out = run(tmp_path / "run", *on_pictures(own_pictures))
    assert json.loads((out / "metrics.json").read_text())["threshold"] == 0.2
    assert all(torch.equal(a, b)
               for a, b in zip(weights(out).values(), weights(out, "best.pt").values()))
    line = fails(capsys, *TINY, "--out", tmp_path / "auto", *on_pictures(own_pictures),
                 "--threshold", "auto", status=2)
    assert not (tmp_path / "auto").exists()
    assert "--threshold" in line and "val" in line


def test_evaluate_finds_training_s_numbers_with_nothing_but_the_checkpoint(tmp_path, capsys):
    root = make_folder(tmp_path / "my data, ünïcode 鳥")
    out = run(tmp_path / "run", *on_pictures(root))
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 2 and "1 of 4 test images have no box" in notes[1]
    assert evaluate.main(["--checkpoint", str(out / "best.pt"), "--limit-test", "10"]) == 0
    metrics, again = (json.loads((folder / "metrics.json").read_text())
                      for folder in (out, out / "evaluate"))
    assert metrics.items() <= again.items() and metrics["n"] == 4
    val = data.load_dataset("folder", root, "val", 32)
    results = evaluate.evaluate_model(load_checkpoint(out / "best.pt")[0], val)
    assert metrics["threshold"] == evaluate.best_threshold(results, "relation")


# ---------------------------------------------------------------- stopping and going on


class Killed(BaseException):
    """Stands for kill -9: nothing catches it, nothing is saved on the way out."""


@pytest.fixture
def kill_at():
    def arm(call):
        calls, original = iter(range(10**6)), train.learning_rate
        patch.setattr(train, "learning_rate",
                      lambda *a: original(*a) if next(calls) != call else kill())

    def kill():
        patch.undo()
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        yield arm


def killed(kill_at, step, out, *flags):
    kill_at(step)
    with pytest.raises(Killed):
        run(out, *flags)
    return out


def test_a_killed_run_on_pretrained_weights_resumes_exactly(tmp_path, finished, kill_at):
    """The rates of small projections were read off the file, and the loss scale grew: both come
    from the checkpoint.
    """
    flags = ["--pretrain-epochs", 0, "--amp", "fp16", "--pretrained", finished / "best.pt",
             "--checkpoint-every", 1]
    whole = run(tmp_path / "whole", *flags)
    killed(kill_at, 3, tmp_path / "run", *flags)
    assert_same_run(run(tmp_path / "run", "--resume", *flags), whole)


@pytest.mark.parametrize("steps, flags", [
    ([1], []), pytest.param([7, 1], ["--checkpoint-every", 3], marks=pytest.mark.full),
    ([10, 1, 1], ["--workers", 2, "--cache", "off"]),
])
def test_a_killed_run_ends_as_one_never_stopped(tmp_path, finished, kill_at, capsys, steps, flags):
    for step in steps:
        killed(kill_at, step, tmp_path / "run", "--resume", *flags)
    assert "this one starts afresh" in capsys.readouterr().out
    assert_same_run(run(tmp_path / "run", "--resume", *flags), finished)


def test_a_line_of_the_log_holds_the_steps_before_a_stop_too(tmp_path, kill_at):
    flags = ["--pretrain-epochs", 0, "--epochs", 6, "--checkpoint-every", 7]
    whole = run(tmp_path / "whole", *flags)
    killed(kill_at, 15, tmp_path / "run", *flags)  # steps 11 to 14 are in last.pt alone
    assert_same_run(run(tmp_path / "run", "--resume", *flags), whole)
    assert [line["step"] for line in log_lines(whole) if "loss" in line] == [10, 20, 24]


def test_ctrl_c_ends_the_last_evaluation_at_once(tmp_path, finished, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "report", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    message = stops(capsys, *TINY, "--out", tmp_path / "run")
    assert "stopping after this step" not in message
    monkeypatch.undo()
    assert_same_run(run(tmp_path / "run", "--resume"), finished)


def test_checkpoints_at_epochs_ends_are_half_a_minute_apart(tmp_path, monkeypatch):
    times, saved = iter(range(0, 10**6, 7)), []
    clock = types.SimpleNamespace(monotonic=lambda: next(times), perf_counter=time.perf_counter)
    monkeypatch.setattr(train, "time", clock)  # 7 s a step, and 7 to write
    write = train.write_checkpoint
    monkeypatch.setattr(train, "write_checkpoint", lambda path, state: (
        write(path, state), path.name == "last.pt" and saved.append(state["step"])))
    run(tmp_path / "run", "--pretrain-epochs", 0, "--epochs", 8, "--limit-train", 16)
    # epochs end at 2, 4, 6 ...: after the first, 30 s later, and at the end; then it is finished
    assert saved == [2, 8, 14, 16, 16]


def test_resume_from_a_file_into_another_folder(tmp_path, finished, kill_at, capsys):
    first = killed(kill_at, 9, tmp_path / "first")
    assert_same_run(run(tmp_path / "second", "--resume", first / "last.pt"), finished)
    before = {path: path.read_bytes() for path in finished.iterdir()}
    line = fails(capsys, *TINY, "--out", finished, "--resume", first / "last.pt")
    assert "already holds a run" in line
    assert before == {path: path.read_bytes() for path in finished.iterdir()}


def test_a_log_is_cut_back_to_the_checkpoint_and_mended(tmp_path, finished, kill_at):
    out = killed(kill_at, 9, tmp_path / "run")
    (out / "metrics.json").write_text("{}")  # an evaluation does not finish a run
    with open(out / "log.jsonl", "ab") as file:
        file.write(b'{"phase": "main", "epoch": 1, "step": 5, "loss": 1.0}\n\xff\0\n{"phase": "mai')
    assert_same_run(run(out, "--resume"), finished)


def test_resume_of_a_finished_run_changes_nothing(finished, capsys):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    run(finished, "--resume")
    assert "finished" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in finished.iterdir()}


def test_resume_with_other_flags_lists_the_differences(finished, capsys):
    line = fails(capsys, *TINY, "--out", finished, "--resume", "--lr", 0.5, "--scorer", "gap",
                 "--workers", 1, "--cache", "off")
    assert f"--lr was {train.RECIPES['synthetic']['lr']}, is 0.5" in line
    assert "--scorer was 'separate', is 'gap'" in line
    assert "--workers" not in line and "--cache" not in line


def test_resume_compares_what_flags_mean_not_how_they_are_spelt(
        tmp_path, own_pictures, kill_at, monkeypatch):
    monkeypatch.chdir(tmp_path)
    killed(kill_at, 1, tmp_path / "run", *on_pictures(own_pictures), "--checkpoint-every", 1)
    own_pictures.rename("moved")
    run(tmp_path / "run", *on_pictures("./moved/"), "--img-size", "32x32", "--resume")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["n"] == 4


def test_resume_compares_pretrained_weights_by_what_they_hold(tmp_path, finished, kill_at, capsys):
    a, b = (shutil.copy(finished / "best.pt", tmp_path / name) for name in ("a.pt", "b.pt"))
    flags = ["--pretrain-epochs", 0, "--checkpoint-every", 1]
    killed(kill_at, 2, tmp_path / "run", *flags, "--pretrained", a)
    shutil.copy(finished / "last.pt", a)
    line = fails(capsys, *TINY, "--out", tmp_path / "run", "--resume", *flags, "--pretrained", a)
    assert "--pretrained" in line and "other contents" in line
    run(tmp_path / "run", "--resume", *flags, "--pretrained", b)


def test_resume_refuses_other_data_and_what_is_not_the_last(tmp_path, finished, capsys):
    saved, file = torch.load(finished / "last.pt", weights_only=True), tmp_path / "last.pt"
    classes, pictures = saved["classes"], saved["data"]
    same, more = (f"{count} classes, 33 training pictures" for count in (KINDS, KINDS + 1))
    for change, words in (
        ({"classes": ["dodo", *classes[1:]]}, f"{same} then, {same} now; other file names"),
        ({"classes": [*classes, "dodo"]}, f"{more} then, {same} now"),
        ({"data": pictures | {"images": 7}}, f"{same.replace('33', '7')} then, {same} now"),
        ({"data": pictures | {"digest": "x"}}, f"{same} then, {same} now; other file names"),
        ({"optimizer": None}, "holds no optimizer to resume with"),
    ):
        torch.save(saved | {"metrics": {}} | change, file)
        assert words in fails(capsys, *TINY, "--out", tmp_path / "run", "--resume", file)
        assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- what is in --out


def test_nothing_is_replaced_that_the_run_did_not_write(tmp_path, finished, capsys):
    for name in ("best.pt", "config.json", "log.jsonl", "metrics.json", "gallery.png", "loss.png"):
        out = tmp_path / f"with {name}"
        out.mkdir()
        (out / name).write_text("mine")
        for resume in ([], ["--resume"]):
            assert name in fails(capsys, *TINY, "--out", out, *resume)
        assert [path.name for path in out.iterdir()] == [name]
        assert (out / name).read_text() == "mine"


def test_a_run_whose_last_checkpoint_is_gone_is_not_replaced(tmp_path, finished, capsys):
    assert "--resume" in fails(capsys, *TINY, "--out", finished)
    out = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("last.pt"))
    for resume in ([], ["--resume"]):
        assert "from a last.pt" in fails(capsys, *TINY, "--out", out, *resume)
    (out / "last.pt").symlink_to(tmp_path / "gone.pt")
    assert "already holds a run" in fails(capsys, *TINY, "--out", out)
    assert "last.pt" in fails(capsys, *TINY, "--out", out, "--resume")
    for path in finished.iterdir():
        assert path.name == "last.pt" or (out / path.name).read_bytes() == path.read_bytes()


def test_one_process_at_a_time_writes_into_a_run(tmp_path, capsys):
    out, fork = tmp_path / "new" / "run", multiprocessing.get_context("fork")
    held = fork.Event()

    def hold():
        with runs.hold(out, None):
            held.set()
            hang()

    other = fork.Process(target=hold)
    other.start()
    assert held.wait(60)
    assert "another train.py is writing into" in fails(capsys, *TINY, "--out", out)
    other.kill()
    other.join()
    run(out, "--max-steps", 1)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_gets_a_note(tmp_path, monkeypatch, capsys, number):
    fails_so = mock.Mock(side_effect=OSError(number, os.strerror(number)))
    monkeypatch.setattr(fcntl, "lockf", fails_so)
    with runs.hold(tmp_path / "run", None):
        assert "cannot be locked" in capsys.readouterr().out


def test_a_failing_write_keeps_the_former_checkpoint(tmp_path, monkeypatch, capsys):
    original, saves = torch.save, iter(range(10))

    def full_disk(content, file):
        original(content, file)
        if next(saves) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    line = fails(capsys, *TINY, "--out", tmp_path / "run", "--checkpoint-every", 2)
    assert "No space left" in line and str(tmp_path / "run") in line
    assert weights(tmp_path / "run", key="step") == 4
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.endswith(".partial")]


# ------------------------------------------------------- the same numbers however they are computed


def assert_close(run, other):
    """But for the key third of qkv.bias: softmax is blind to it, so Adam makes steps of its
    rounding noise.
    """
    for line, expected in zip(log_lines(run), log_lines(other), strict=True):
        assert line.pop("phase") == expected.pop("phase")
        # Adam is blind to the gradient's scale, grad_norm is not
        assert line == pytest.approx(expected, rel=1e-3)
    a, b = weights(run), weights(other)
    for key, value in a.items():
        if key.endswith("qkv.bias"):
            value, b[key] = (torch.cat([x[:12], x[24:]]) for x in (value, b[key]))
        torch.testing.assert_close(value, b[key], rtol=1e-3, atol=2e-5, msg=key)


@pytest.fixture(scope="module")
def with_depth(tmp_path_factory):
    """A run with stochastic depth, whose noise is each image's own."""
    return run(tmp_path_factory.mktemp("with_depth") / "run", "--drop-path", 0.3)


def test_accumulated_micro_batches_make_the_same_steps(tmp_path, with_depth):
    assert_close(run(tmp_path / "run", "--drop-path", 0.3, "--accumulate", 3), with_depth)


@pytest.mark.full
def test_two_processes_make_the_same_run(tmp_path, with_depth):
    status, errors = torchrun(*TINY, "--out", tmp_path / "run", "--drop-path", 0.3)
    assert status == 0, errors
    assert_close(tmp_path / "run", with_depth)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["n"] == 10
    assert (tmp_path / "run" / "predictions.jsonl").read_text().count("\n") == 10


def test_bfloat16_trains(tmp_path):
    out = run(tmp_path / "run", "--amp", "bf16", "--max-steps", 2, "--pretrain-epochs", 0)
    assert all(torch.isfinite(value).all() for value in weights(out).values())


def test_a_loss_that_is_not_finite_names_its_step_and_pictures(tmp_path, monkeypatch, capsys):
    """Before anything is saved, though the device is read later."""
    original, out, steps = train.loss_sum, tmp_path / "run", iter(range(1, 10))
    monkeypatch.setattr(train, "loss_sum", lambda *a: original(*a) * (
        math.nan if (out / "pretrained.pt").exists() and next(steps) >= 3 else 1))
    line = fails(capsys, *TINY, "--out", out)
    assert "main step 3: loss nan" in line
    names = [f"synthetic/train/{spread(12_000, 33)[i]:05d}"
             for i in train.epoch_batches(33, 8, 0, 1, 0)[2]]
    assert line.endswith(f"images of this batch: {', '.join(names)}\n")
    assert weights(out, key="phase") == "pretrain"


# ---------------------------------------------------------------- a device that nobody waits for


def test_the_host_reads_the_device_once_in_ten_steps(tmp_path, monkeypatch):
    reads, at_step = [], []
    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, original=original, **k: (
            reads.append(1), original(self, *a, **k))[1])
    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda step, *a: (
        at_step.append(len(reads)), rate(step, *a))[1])
    run(tmp_path / "run", "--pretrain-epochs", 0, "--epochs", 1, "--limit-train", 272,
        "--drop-path", 0.1)
    counts = np.diff(at_step).tolist()  # of steps 1 to 33; the last one is an epoch's end
    assert [step for step, count in enumerate(counts, 1) if count] == [3, 6, 10, 20, 30]
    assert set(counts) == {0, 1}


@pytest.fixture
def plain_compile(monkeypatch):
    """torch.compile without a code generator, which would need a compiler; a break of the graph or
    a second compilation is an error. Returns the modes that were requested.
    """
    original, modes = torch.compile, []

    def compile_whole(function, mode):
        modes.append(mode)
        return original(function, fullgraph=True, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_whole)
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield modes
    torch.compiler.reset()


@pytest.mark.full
def test_a_compiled_run_is_the_same_and_compiles_once_a_phase(
        tmp_path, with_depth, kill_at, plain_compile):
    flags = ["--drop-path", 0.3, "--compile", "on", "--checkpoint-every", 1]
    killed(kill_at, 6, tmp_path / "run", *flags)
    out = run(tmp_path / "run", *flags, "--resume")
    assert plain_compile == ["default"] * 3
    assert_close(out, with_depth)


def test_a_model_that_does_not_compile_is_trained_without(tmp_path, finished, monkeypatch, capsys):
    monkeypatch.setattr(train, "compile_mode", lambda *_: "reduce-overhead")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: lambda *_: 1 / 0)
    assert_same_run(run(tmp_path / "run"), finished)
    assert capsys.readouterr().out.count("note: the model does not compile") == 2
    line = fails(capsys, *TINY, "--compile", "on", "--out", tmp_path / "on")
    assert "--compile" in line and "division by zero" in line


def test_only_long_phases_on_one_gpu_are_compiled_by_default():
    config = dict(device="cuda:0", amp="bf16", accumulate=1, compile="auto")
    assert train.compile_mode(1000, config) == "reduce-overhead"
    assert train.compile_mode(999, config) is None
    assert train.compile_mode(1000, config | dict(compile="off")) is None
    for change in (dict(device="cpu"), dict(amp="fp16"), dict(accumulate=2)):
        assert train.compile_mode(1000, config | change) is None
        assert train.compile_mode(1000, config | change | dict(compile="on")) == "default"


# ---------------------------------------------------------------- the parts


@pytest.mark.parametrize("patch_loss", ["mean", "each"])
def test_pretraining_may_classify_patch_tokens_too(patch_loss):
    model = train.build(vars(train.parse_flags(TINY)), 5, head="token")
    images = torch.randn(4, 3, 32, 32)
    labels = [torch.tensor([0, 1, 2, 0]), torch.tensor([1, 0, 1, 1])]
    logits, patch_logits = train.Classifier(model, patch_loss)(images, None)
    assert torch.equal(logits, model(images))
    tokens = model.forward_features(images)[0][:, 1:]  # (B, N, D)
    tokens = tokens.mean(1, keepdim=True) if patch_loss == "mean" else tokens
    loss = 0.0
    for image, (species, palette) in enumerate(zip(*labels)):  # 3 species and 2 palettes
        for token in tokens[image]:
            a, b = model.classifier(token).split([3, 2])
            losses = a.logsumexp(0) - a[species] + b.logsumexp(0) - b[palette]
            loss += losses / len(tokens[image])
    torch.testing.assert_close(train.loss_sum(patch_logits, labels, [3, 2], 0.0), loss)


@given(samples=st.integers(1, 50), batch_size=st.integers(1, 60), seed=st.integers(0, 3),
       epoch=st.integers(0, 3))
def test_epoch_batches_are_full_disjoint_and_repeatable(samples, batch_size, seed, epoch):
    batch_size = min(batch_size, samples)
    batches = train.epoch_batches(samples, batch_size, seed, epoch)
    flat = [i for batch in batches for i in batch]
    assert [len(batch) for batch in batches] == [batch_size] * (samples // batch_size)
    assert len(set(flat)) == len(flat) and set(flat) <= set(range(samples))
    assert batches == train.epoch_batches(samples, batch_size, seed, epoch)
    long = train.epoch_batches(99, 99, seed, epoch)
    assert train.epoch_batches(99, 99, seed + 1, epoch) != long
    assert train.epoch_batches(99, 99, seed, epoch + 1) != long


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


def rates(layer_decay=1.0):
    """Each parameter's (scale of the rate, weight decay)."""
    model = train.build(vars(train.parse_flags(TINY)), 9)
    groups = train.adamw(model, 0.05, layer_decay, frozen=0).param_groups
    settings = {parameter: (group["scale"], group["weight_decay"])
                for group in groups for parameter in group["params"]}
    return {name: settings[parameter] for name, parameter in model.named_parameters()}


def test_what_is_decayed_and_what_learns_slower():
    for name, (scale, weight_decay) in rates().items():
        assert scale == (train.GATE_RATE if name.startswith(("cdm.conv", "cdm.score_")) else 1)
        plain = name.endswith("bias") or "norm" in name or name in ("cls_token", "pos_embed")
        assert weight_decay == (0 if plain else 0.05), name


def test_rates_decay_by_layer():
    found = rates(layer_decay=0.5)
    for name, scale in (("cdm.weight", 1), ("norm.weight", 1), ("blocks.1.attn.qkv.weight", 0.5),
                        ("blocks.0.attn.qkv.weight", 0.25), ("pos_embed", 0.125),
                        ("cls_token", 0.125), ("patch_embed.proj.bias", 0.125)):
        assert found[name][0] == scale, name


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_blocks_do_not_move(tmp_path, frozen):
    out = run(tmp_path / "run", "--freeze-blocks", frozen)
    before, after = weights(out, "pretrained.pt"), weights(out)
    for name, value in after.items():
        if name.startswith(train.HEADS):
            continue
        layer = train.layer_of(name, 2)
        assert torch.equal(value, before[name]) == (frozen > 0 and layer <= frozen), name


def test_frozen_blocks_take_no_backward_pass():
    model = train.build(vars(train.parse_flags(TINY)), 9)
    train.adamw(model, 0.05, 1.0, frozen=1)
    graphs = []
    for block in model.blocks:
        block.register_forward_hook(lambda *args: graphs.append(args[2][0].requires_grad))
    model(torch.randn(2, 3, 32, 32))
    assert graphs == [False, True]


def test_defaults_are_the_papers():
    cub = train.parse_flags(["--data", "cub", "--root", "x"])
    assert (cub.batch_size, cub.lr, cub.epochs, cub.weight_decay) == (128, 5e-5, 80, 5e-4)
    assert (cub.embed_dim, cub.depth, cub.num_heads, cub.num_kernels) == (384, 12, 6, 4)
    assert (cub.img_size, cub.patch_size) == (224, 16)
    ilsvrc = train.parse_flags(["--data", "ilsvrc", "--root", "x", "--arch", "base"])
    assert (ilsvrc.batch_size, ilsvrc.lr, ilsvrc.epochs, ilsvrc.embed_dim) == (256, 5e-4, 14, 768)


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
    (["--device", "mps"], "mps"), (["--cache", "yes"], "--cache"), (["--compile"], "--compile"),
    (["--patch-loss", "all"], "--patch-loss"), (["--layer-decay", "0"], "--layer-decay"),
    (["--checkpoint-every", "0"], "--checkpoint-every"), (["--eval-every", "0"], "--eval-every"),
    (["--species", "1"], "--species"), (["--species", "46"], "--species"),
    (["--species", "12", "--data", "cub", "--root", "CUB"], "--species"),
])
def test_wrong_flags_end_in_one_line_with_status_2(capsys, monkeypatch, flags, name):
    monkeypatch.setattr(train, "train", lambda *_: None)
    assert name in fails(capsys, *flags, status=2)


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
        assert words in fails(capsys, *flags)


# ---------------------------------------------------------------- signals, times, odd surroundings


def signals_at(monkeypatch, step, *numbers):
    """Sends this process these signals, one after another, before that step of the main phase."""
    original = train.learning_rate

    def interrupt(now, total, *rest):
        if now == step and total == 8:
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(now, total, *rest)

    monkeypatch.setattr(train, "learning_rate", interrupt)


@pytest.mark.parametrize("numbers, step", [
    ((signal.SIGHUP,), 6),
    ((signal.SIGTERM, signal.SIGINT), 4),  # at once: the state of the last epoch's end
    ((signal.SIGINT, signal.SIGTERM), 6),  # torchrun forwards a SIGTERM after a Ctrl-C
], ids=str)
def test_a_signal_ends_training_after_its_step_a_second_ctrl_c_at_once(
        tmp_path, finished, monkeypatch, capsys, numbers, step):
    signals_at(monkeypatch, 5, *numbers)
    message = stops(capsys, *TINY, "--out", tmp_path / "run")
    assert "stopping after this step" in message and "--resume goes on" in message
    assert weights(tmp_path / "run", "last.pt", "step") == step
    monkeypatch.undo()
    assert_same_run(run(tmp_path / "run", "--resume"), finished)


@pytest.mark.full
@pytest.mark.parametrize("launcher, number", [
    ([], signal.SIGINT), ([], signal.SIGTERM), ([], signal.SIGHUP),
    (["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], signal.SIGTERM)])
def test_loading_processes_leave_signals_to_the_run(tmp_path, launcher, number):
    """A terminal's Ctrl-C reaches the whole group; torchrun passes a signal on."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, *launcher, "train.py", *TINY, "--epochs", "1000", "--cache", "off",
         "--eval-every", "1000000", "--workers", "1", "--out", out],
        cwd=ROOT, text=True, stderr=subprocess.PIPE, start_new_session=True)
    while process.poll() is None and not any(
            entry["phase"] == "main" for entry in train.read_log(out)):
        time.sleep(0.02)
    os.killpg(process.pid, number)
    errors = process.communicate()[1]
    assert process.returncode and "--resume goes on" in errors
    assert launcher or "Traceback" not in errors
    logged = max(entry["step"] for entry in train.read_log(out) if entry["phase"] == "main")
    assert 4 <= logged <= weights(out, "last.pt", "step")


@pytest.mark.parametrize("sent", [None, signal.SIGTERM])
def test_a_loading_process_that_hangs_ends_the_run(
        tmp_path, own_pictures, monkeypatch, capsys, sent):
    """By itself in the end; after a signal soon."""
    monkeypatch.setattr(data, "load_whole", hang)
    monkeypatch.setattr(data, "LOADING_TIMEOUT", 600 if sent else 1)
    monkeypatch.setattr(runs, "GRACE", 1)
    flags = [*TINY, *on_pictures(own_pictures), "--workers", 1, "--cache", "off", "--out",
             tmp_path / "run"]
    if sent:
        threading.Timer(2, os.kill, (os.getpid(), sent)).start()
        assert "nothing was saved" in stops(capsys, *flags)
    else:
        assert "--workers" in fails(capsys, *flags)


@pytest.mark.full
def test_a_stopped_loading_process_does_not_outlive_the_run(tmp_path, own_pictures):
    """The signal reaches the run within a step, where nobody waits for the process."""
    out = tmp_path / "run"
    process = spawn("train.py", *TINY, *on_pictures(own_pictures), "--epochs", 100_000, "--cache",
                    "off", "--workers", 2, "--out", out)
    while process.poll() is None and not (out / "last.pt").exists():
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGSTOP)
    process.terminate()
    _, errors = process.communicate(timeout=100)
    assert children and process.returncode == 130 and "--resume goes on" in errors


def test_loading_processes_without_shared_memory_or_files_end_the_run(
        tmp_path, own_pictures, monkeypatch, capsys):
    flags = [*TINY, *on_pictures(own_pictures), "--workers", 1, "--cache", "off", "--out",
             tmp_path / "run"]
    dumps, parent = ForkingPickler.dumps, os.getpid()
    with monkeypatch.context() as patch:  # what cannot be sent is not waited for
        patch.setattr(ForkingPickler, "dumps",
                      lambda *a: dumps(*a) if os.getpid() == parent else 1 / 0)
        assert "--workers" in fails(capsys, *flags)
    monkeypatch.setattr("resource.getrlimit", lambda *_: (40, 40))
    line = fails(capsys, *flags)
    assert "--workers" in line and "ulimit -n allows 40" in line


@pytest.mark.full
def test_odd_surroundings_do_not_end_a_run(tmp_path):
    """A terminal that shows ASCII alone, variables that are no numbers."""
    process = spawn("train.py", *TINY, "--max-steps", 1, "--pretrain-epochs", 0, "--out",
                    tmp_path / "ünïcode", PYTHONIOENCODING="ascii", LOCAL_WORLD_SIZE="0",
                    LOCAL_RANK="")
    said, errors = process.communicate()
    assert (process.returncode, errors) == (0, "") and "report and pictures in" in said


def test_training_in_a_thread(tmp_path, finished):
    thread = threading.Thread(target=run, args=(tmp_path / "run",))
    thread.start()
    thread.join()
    assert_same_run(tmp_path / "run", finished)


def test_times_are_told_for_the_whole_run_without_warm_up(tmp_path, monkeypatch, capsys):
    minutes = iter([1000.0, *range(10000, 60000, 60)])  # the first steps take long
    clock = types.SimpleNamespace(perf_counter=lambda: next(minutes), monotonic=time.monotonic)
    monkeypatch.setattr(train, "time", clock)
    run(tmp_path / "run", "--epochs", 3, "--pretrain-epochs", 0, "--limit-train", 32)
    told, = [line for line in capsys.readouterr().out.splitlines() if "minutes to go" in line]
    # two readings, an epoch's end at step 4 and step 6, are two minutes after step 3: 40 s a step;
    # 6 of 12 steps to go, then 10 + 10 images scored at half a step's cost
    assert told.split("about ")[1] == "4.8 minutes to go, evaluation included"


def test_stuck_scores_are_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    monkeypatch.setattr(train, "SCORES_STUCK", 3)
    original = train.mean_figures
    monkeypatch.setattr(train, "mean_figures", lambda *a: original(*a) | {"score_mean": 0.999})
    run(tmp_path / "run", "--pretrain-epochs", 0)
    assert capsys.readouterr().out.count("scores are stuck") == 1


def test_one_class_alone_is_refused(tmp_path, capsys):
    for split in ("train", "test"):
        picture(tmp_path / "data" / split / "alone" / "0.png")
    message = fails(capsys, *TINY, *on_pictures(tmp_path / "data"), "--out", tmp_path / "run")
    assert "one class alone teaches nothing: need two" in message


def test_no_test_takes_a_gpu():
    """What conftest.py hides from this process and from those that it starts."""
    assert not torch.cuda.is_available() and train.parse_flags([]).device == "cpu"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" == os.environ["HIP_VISIBLE_DEVICES"]
