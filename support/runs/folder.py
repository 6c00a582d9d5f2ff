"""A run folder of train.py: processes and signals, one writer, checkpoints, how it resumes."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from support import common
from support.common import last_line, write_atomic, write_json
from support.report.figures import is_ours
from support.weights import read_weights

PHASES = ("pretrain", "main")
# what may change on --resume; --arch says what --embed-dim, --depth and --num-heads say
FREE_FLAGS = ("out", "workers", "cache", "device", "eval_every", "checkpoint_every", "arch")
BY_CONTENT = ("root", "pretrained", "pretrained_digest")  # compared by what they hold
STARTED = ("config.json", "log.jsonl")  # of a run: what it has before its first last.pt
RESULTS = ("last.pt", "best.pt", "pretrained.pt", "metrics.json", "predictions.jsonl")
PICTURES = ("gallery.png", "curve.png", "failures.png", "loss.png")
GRACE = 20  # seconds that a step has to end after a signal


# ---------------------------------------------------------------- processes and signals


def process() -> tuple[int, int]:
    """(rank, number of processes) under torchrun, (0, 1) without."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@functools.lru_cache
def cpu_group():
    return dist.new_group(backend="gloo")


def any_process(*flags: bool) -> list[bool]:
    """Of each flag whether any process has set it, agreed without waiting for a GPU."""
    if process()[1] == 1:
        return list(flags)
    agreed = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(agreed, dist.ReduceOp.MAX, cpu_group())
    return agreed.bool().tolist()


def say(text: str) -> None:
    """Prints a line, from one process."""
    if process()[0] == 0:
        common.say(text)


class Stop:
    """Ctrl-C, SIGTERM and a terminal's end: `requested` is set while `in_steps`, so that the loop ends
    after its step.

    A second Ctrl-C, any of them elsewhere, or a step that does not end, is KeyboardInterrupt. A
    second SIGTERM is none: torchrun forwards one after a Ctrl-C. Only a main thread gets signals.
    """

    def __init__(self):
        self.requested = self.in_steps = False
        self.former = {}

    def __enter__(self) -> "Stop":
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup sets it
            numbers.append(signal.SIGHUP)
        if threading.current_thread() is threading.main_thread():
            self.former = {number: signal.signal(number, self.handle) for number in numbers}
            self.former[signal.SIGALRM] = signal.signal(signal.SIGALRM, self.end)
        return self

    def __exit__(self, *_) -> None:
        self.step_ended()
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def handle(self, number: int, _) -> None:
        if self.requested and number != signal.SIGINT:
            return
        if self.requested or not self.in_steps:
            self.end()
        self.requested = True
        signal.alarm(GRACE)
        if process()[0] == 0:
            with contextlib.suppress(OSError):  # the terminal may be gone
                print("stopping after this step; Ctrl-C again: now", file=sys.stderr, flush=True)

    def step_ended(self) -> None:
        """What is saved then may take its time."""
        signal.alarm(0)

    def end(self, *_) -> None:
        self.step_ended()
        self.requested = True
        raise KeyboardInterrupt


# ---------------------------------------------------------------- one writer


@contextlib.contextmanager
def hold(out: Path, resume: bool | str | None) -> Iterator[None]:
    """Makes the folder and keeps other processes from writing into it until the end, however that
    comes. What was made goes where no run began.

    Raises ValueError where another process holds it, or a file would be replaced that is not this
    run's. Processes that load images do not inherit the lock.
    """
    if process()[0] > 0:  # rank 0 holds it for all
        yield
        return
    refuse(out, resume)
    lock, made = out / ".lock", not out.exists()
    known = lock.exists()
    out.mkdir(parents=True, exist_ok=True)
    with open(lock, "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(f"--out: another train.py is writing into {out}: wait for its "
                                 "end, or give another folder") from None
            say(f"note: {out} cannot be locked ({error.strerror}): start one train.py alone there")
        try:
            yield
        finally:
            if not known and not (out / "config.json").exists():
                lock.unlink(missing_ok=True)
                if made and not os.listdir(out):
                    out.rmdir()


def refuse(out: Path, resume: bool | str | None) -> None:
    """Raises ValueError where this run would replace a file that is not its own.

    The lock tells that train.py was here: what a run has before its first last.pt is its own then.
    """
    last = out / "last.pt"
    source = Path(resume) if isinstance(resume, str) else last
    continued = resume and source.parent.resolve() == out.resolve()
    if os.path.lexists(last) and not continued:
        raise ValueError(f"--out: {out} already holds a run: continue it with --resume, or give "
                         "another folder")
    others = [] if continued and os.path.lexists(source) else [*RESULTS]
    if others and not (out / ".lock").exists():
        others += STARTED
    others += [name for name in PICTURES if not is_ours(out / name)]
    for name in others:
        if os.path.lexists(out / name):
            raise ValueError(f"--out: {out / name} is of no run that goes on here, from a last.pt: "
                             "it is not replaced: give another folder")


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


def read_log(out: Path) -> list[dict]:
    """The entries of log.jsonl; a line cut short by a kill is left out."""
    entries, path = [], out / "log.jsonl"
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def begin(out: Path, saved: dict | None, config: dict) -> None:
    """Writes config.json, and of the log what the checkpoint knows: later lines come again."""
    if process()[0] > 0:
        return
    if saved:
        adopt(saved, out)
    kept = [entry for entry in read_log(out) if saved and
            (PHASES.index(entry["phase"]), entry["step"])
            <= (PHASES.index(saved["phase"]), saved["step"])]
    text = "".join(json.dumps(entry) + "\n" for entry in kept)
    write_atomic(out / "log.jsonl", lambda file: file.write(text.encode()))
    write_json(out / "config.json", config)


# ---------------------------------------------------------------- resuming


def digest_of(file: str | None) -> str | None:
    """A hash of what a file holds; None where there is none, or it is yet to be downloaded."""
    if not file or not os.path.isfile(file):
        return None
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def find_saved(out: Path, resume: bool | str | None, config: dict) -> dict | None:
    """The checkpoint to continue, with its path, or None for a fresh run.

    Raises ValueError where it cannot be continued with these flags.
    """
    path = Path(resume) if isinstance(resume, str) else out / "last.pt"
    if not resume:
        return None
    if resume is True and not os.path.lexists(path):
        say(f"--resume: no run in {out} yet: this one starts afresh")
        return None
    saved = read_weights(path)
    needed = {"config": dict, "metrics": dict, "step": int, "classes": list, "data": dict,
              "optimizer": dict}
    lacking = [name for name, kind in needed.items() if not isinstance(saved.get(name), kind)]
    if lacking or saved.get("phase") not in PHASES:
        raise ValueError(f"{path}: holds no {', '.join(lacking) or 'phase'} to resume with: need "
                         "the run's last.pt")
    former = saved["config"]
    if config["epochs"] is None:  # chosen by the number of pictures, which must be the same
        config["epochs"] = former.get("epochs")
    differing = [name for name, value in config.items()
                 if name not in FREE_FLAGS + BY_CONTENT and former.get(name) != value]
    # a file of weights that is gone or not yet downloaded has its name alone
    one, other = ((c.get("pretrained"), c.get("pretrained_digest")) for c in (former, config))
    if one[1] != other[1] if one[1] and other[1] else one[0] != other[0]:
        differing.append("pretrained")
    differences = [f"--{name.replace('_', '-')} was {former.get(name)!r}, is {config[name]!r}"
                   + " (other contents)" * (former.get(name) == config[name])
                   for name in differing]
    if differences:
        raise ValueError(f"--resume: flags differ from those of {path}: {'; '.join(differences)}")
    return saved | {"path": path}


def restore(saved: dict, model, optimizer, scaler) -> tuple[int, dict, dict]:
    """Puts a checkpoint's state back; returns its step, its metrics and its steps' figures."""
    try:
        model.load_state_dict(saved["model"])
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise ValueError("weights that are not finite")
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["rng"])
        running = {key: list(saved["running"][key]) for key in ("line", "epoch")}
        return int(saved["step"]), dict(saved["metrics"]), running
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{saved['path']}: cannot go on from its state: {last_line(error)}") from None


def check_data(saved: dict, classes: list[str], images: int, digest: str) -> None:
    """Raises ValueError where the checkpoint was trained on other classes or pictures."""
    data = {"images": images, "digest": digest}
    if saved["classes"] != list(classes) or saved["data"] != data:
        then = f"{len(saved['classes'])} classes, {saved['data'].get('images')} training pictures"
        now = f"{len(classes)} classes, {images} training pictures"
        names = "; other file names, labels or classes" * (then == now)
        raise ValueError(f"--resume: {saved['path']} was trained on other data: {then} then, {now} "
                         f"now{names}")


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
