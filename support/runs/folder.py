"""A run folder of train.py: its processes, its lock, its signals, its log and how it resumes."""

import contextlib
import fcntl
import functools
import json
import math
import signal
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
from support.common import last_line, write_atomic
from support.weights import read_weights

PHASES = ("pretrain", "main")
SCORES_STUCK = 20  # logged steps with a mean score below .01 or above .99
FREE_FLAGS = ("out", "workers", "device", "eval_every", "checkpoint_every", "resume")  # may change


# ---------------------------------------------------------------- processes and signals


def process() -> tuple[int, int]:
    """(rank, number of processes) under torchrun, (0, 1) without."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def say(text: str) -> None:
    if process()[0] == 0:
        print(text, flush=True)


class Stop:
    """Ctrl-C and SIGTERM: `asked` is set while `in_steps`, so that the loop ends after its step.

    A second Ctrl-C, or either one elsewhere, is KeyboardInterrupt at once. A second SIGTERM is
    none: torchrun forwards one after a Ctrl-C.
    """

    def __init__(self):
        self.asked = self.in_steps = self.raised = False

    def __enter__(self) -> "Stop":
        self.former = {number: signal.signal(number, self.handle)
                       for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def handle(self, number: int, _) -> None:
        again = self.asked or self.raised
        if again and number == signal.SIGTERM:
            return
        if again or not self.in_steps:
            self.raised = True
            raise KeyboardInterrupt
        self.asked = True
        if process()[0] == 0:
            print("stopping after this step; Ctrl-C again: now", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- the data

def load_data(flags: Namespace, has_val: bool) -> list:
    """The train, val and test sets, val None where there is none; their notes are printed."""
    load = functools.partial(
        data.load_dataset, flags.data, flags.root, img_size=flags.img_size, seed=flags.seed,
        species=flags.species or 9)
    sets = [load(split="train", limit=flags.limit_train),
            load(split="val", limit=flags.limit_test) if has_val else None,
            load(split="test", limit=flags.limit_test)]
    for note in dict.fromkeys(note for split in sets if split for note in split.notes):
        say(f"note: {note}")
    if len(sets[0].classes) < 2:
        raise ValueError(f"{flags.root or flags.data}: one class alone teaches nothing: need two")
    return sets


# ---------------------------------------------------------------- one writer


def lock(out: Path):
    """Holds the folder until the returned file is closed or the process ends, however it ends.

    Raises ValueError where another process holds it. Loading processes do not inherit it.
    """
    if process()[0] > 0:
        return contextlib.ExitStack()  # rank 0 holds it for all
    file = open(out / ".lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ValueError(f"--out: another train.py is writing into {out}: wait for its end, or "
                         "give another folder") from None
    return file


def write_checkpoint(path: Path, checkpoint: dict) -> None:
    """The former file stays until the new one is on disk; no process goes on before it is."""
    rank, world = process()
    if rank == 0:
        write_atomic(path, lambda file: torch.save(checkpoint, file))
    if world > 1:
        dist.barrier()


# ---------------------------------------------------------------- the log


def log(out: Path, entry: dict) -> None:
    if process()[0] == 0:
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")


def say_plan(phase: str, plan, images: int, first: int, config: dict) -> None:
    say(f"{phase}: {images} images, {plan.total} steps of {plan.batch_size} images "
        f"({process()[1]} processes x {config['accumulate']} micro-batches), learning rate "
        f"{plan.peak:g} after {plan.warmup:.0f} steps, amp {config['amp']}, on {config['device']}"
        + f", from step {first}" * bool(first))


def log_epoch(out: Path, phase: str, epoch: int, step: int, running: dict,
              batch_size: int, val_top1: float | None) -> None:
    """Logs and says an epoch's mean loss and accuracy: on val, where it was measured."""
    entry = {"phase": phase, "epoch": epoch, "step": step,
             "mean_loss": running["loss"] / running["steps"],
             "train_top1": 100 * running["right"] / (running["steps"] * batch_size)}
    accuracy = f"training accuracy {entry['train_top1']:.1f} %"
    if val_top1 is not None:
        entry["val_top1_cls"] = val_top1
        accuracy += f", val top-1 accuracy {val_top1:.1f} %"
    log(out, entry)
    say(f"{phase} epoch {epoch + 1}: step {step}, mean loss {entry['mean_loss']:.3f}, {accuracy}")


def score_spread(sums: list[float], images: int) -> dict:
    """Of the scores' sums and squares (2G): mean over images and kernels, spread over images."""
    if not sums:
        return {}
    mean, square = np.array(sums).reshape(2, -1) / images
    spread = np.sqrt(np.maximum(square - mean**2, 0))
    return {"score_mean": float(mean.mean()), "score_std": float(spread.mean())}


def count_stuck(found: dict, stuck: int) -> int:
    """How many logged steps in a row the mean score was at an end; says so once."""
    if 0.01 <= found.get("score_mean", 0.5) <= 0.99:
        return 0
    if stuck + 1 == SCORES_STUCK:
        say("note: the CDM's scores are stuck at 0 or 1, so its kernels no longer differ "
            "between images: a smaller --lr helps")
    return stuck + 1


def check_finite(found: dict, where: str, last: Path, paths: list[str], scaled: bool) -> None:
    """Raises FloatingPointError for a loss or gradient that is no number.

    scaled: fp16's scaler leaves out a step whose gradient overflows, so that one may pass.
    """
    if math.isfinite(found["loss"]) and (math.isfinite(found["grad_norm"]) or scaled):
        return
    kept = f"the last good state stays in {last}; " * last.exists()
    raise FloatingPointError(
        f"{where}: loss {found['loss']}, gradient norm {found['grad_norm']}, learning rate "
        f"{found['lr']:.3g}: not finite; {kept}images of this batch: {', '.join(paths)}")


def read_log(out: Path) -> list[dict]:
    """The entries of log.jsonl; a line cut short by a kill is left out."""
    entries, path = [], out / "log.jsonl"
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            PHASES.index(entry["phase"]), entry["step"] + 0
            entries.append(entry)
    return entries


def cut_log(out: Path, saved: dict | None) -> None:
    """Keeps the entries that the checkpoint knows of: later ones will be computed again."""
    kept = [entry for entry in read_log(out) if saved and
            (PHASES.index(entry["phase"]), entry["step"])
            <= (PHASES.index(saved["phase"]), saved["step"])]
    text = "".join(json.dumps(entry) + "\n" for entry in kept)
    write_atomic(out / "log.jsonl", lambda file: file.write(text.encode()))


# ---------------------------------------------------------------- resuming


def find_saved(out: Path, resume: bool | str | None, config: dict) -> dict | None:
    """The checkpoint to continue, with its path, or None for a fresh run.

    Raises ValueError where it cannot be continued with these flags.
    """
    last = out / "last.pt"
    path = Path(resume) if isinstance(resume, str) else last
    elsewhere = path.parent.resolve() != out.resolve()
    if last.exists() and (elsewhere or not resume):
        raise ValueError(f"--out: {out} already holds a run: continue it with --resume, or give "
                         "another folder")
    if not resume:
        return None
    if resume is True and not last.exists():
        say(f"--resume: no run in {out} yet: this one starts afresh")
        return None
    saved = read_weights(path)
    kinds = {"config": dict, "metrics": dict, "step": int, "classes": list}
    if saved.get("phase") not in PHASES or not all(
            isinstance(saved.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"{path}: no phase, config or step in it: need a last.pt of train.py")
    if "optimizer" not in saved:
        raise ValueError(f"{path}: holds no optimizer to resume with: need the run's last.pt")
    if config["epochs"] is None:  # chosen by the number of pictures, which must be the same
        config["epochs"] = saved["config"].get("epochs")
    differences = [
        f"--{name.replace('_', '-')} was {saved['config'].get(name)!r}, is {value!r}"
        for name, value in config.items()
        if name not in FREE_FLAGS and saved["config"].get(name) != value]
    if differences:
        raise ValueError(f"--resume: flags differ from those of {path}: {'; '.join(differences)}")
    return saved | {"path": path}


def restore(saved: dict, model, optimizer, scaler) -> tuple[int, dict, dict]:
    """Puts a checkpoint's state back; returns its step, its metrics and its epoch's sums."""
    try:
        model.load_state_dict(saved["model"])
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise ValueError("weights that are not finite")
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["rng"])
        return int(saved["step"]), dict(saved["metrics"]), dict(saved["running"])
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{saved['path']}: cannot go on from its state: {last_line(error)}") from None


def check_data(saved: dict, classes: list[str], images: int, digest: str) -> None:
    """Raises ValueError where the checkpoint was trained on other classes or pictures."""
    path, known = saved["path"], saved["classes"]
    if known != list(classes):
        names = [(a, b) for a, b in zip(known, classes) if a != b]
        what = (f"class {names[0][0]!r} is now {names[0][1]!r}" if names
                else f"{len(known)} classes then, {len(classes)} now")
        raise ValueError(f"--resume: {path} was trained on other data: {what}")
    now, then = {"images": images, "digest": digest}, saved.get("data")
    if then is not None and then != now:
        before = then.get("images") if isinstance(then, dict) else None
        what = f"{before} training pictures then, {images} now"
        if before == images:
            what = "other file names or labels among its training pictures"
        raise ValueError(f"--resume: {path} was trained on other data: {what}")


def adopt(saved: dict, out: Path) -> None:
    """Copies a run that is resumed from another folder; a last.pt that came alone is enough."""
    path = saved["path"]
    if path.parent.resolve() == out.resolve():
        return
    best, former_log = path.parent / "best.pt", path.parent / "log.jsonl"
    if saved["phase"] == "main" and not best.exists():
        best = path
    for former, name in ((best, "best.pt"), (former_log, "log.jsonl"), (path, "last.pt")):
        if former.exists():
            write_atomic(out / name, lambda file: file.write(former.read_bytes()))
