"""What the scripts share: min-max normalisation, files, progress, flags, device and precision."""

import argparse
import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor


def minmax(maps: Tensor) -> Tensor:
    """Each map (..., H, W) scaled to [0, 1] by its own extremes; 0 where constant or not finite."""
    low, high = maps.amin((-2, -1), True), maps.amax((-2, -1), True)  # (..., 1, 1)
    span = high - low
    return ((maps - low) / torch.where(span > 0, span, 1)).nan_to_num(0, 0, 0)


def pair(img_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of an image size given as one number or two."""
    return (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)


def last_line(error: BaseException) -> str:
    """The last line of an error's message, where torch says what was wrong; else its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()


def printable(text: object) -> str:
    """One line that any terminal shows: what it cannot is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
                   for c in str(text))


def one_line(error: BaseException, folder: str | Path) -> str:
    """What a script says of an error before it ends; folder: where it was writing."""
    if isinstance(error, OSError):
        file = Path(os.fspath(error.filename or folder))
        if file.name.endswith(".partial"):  # write_atomic's temporary file
            file = file.with_name(file.name[1:].removesuffix(".partial"))
        return f"{printable(file)}: {error.strerror or error}"
    text = printable((str(error).strip() or type(error).__name__).splitlines()[0])
    if text.startswith("DataLoader worker"):  # torch's word of one that died between two batches
        text = f"--workers: {text} Fewer need less memory, 0 needs none"
    return text


def say(text: str) -> None:
    """Prints a line. Raises OSError, which names standard output, where that takes none."""
    try:
        print(text, flush=True)
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # or python fails again when it ends
        raise OSError(error.errno, error.strerror, "standard output") from None


class FlagError(ValueError):
    """A flag does not fit the data or the checkpoint: status 2."""


# ---------------------------------------------------------------- files


def write_atomic(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """write(file) fills a temporary file beside `path`, which replaces it once it is on disk.

    Where anything fails, `path` stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json(path: str | Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


# ---------------------------------------------------------------- progress


def progress(
    items: Sequence, label: str, show: bool = True, later: float = 0, warmup: int = 0
) -> Iterator:
    """Passes items through and says on standard error how many are done, rate and time left.

    later: what the script does after them, in items; the time left includes it. warmup: the first
    so many items do not count for the rate. On a terminal that is one line that overwrites itself;
    elsewhere a plain line every 30 s.
    """
    total, started = len(items), time.monotonic()
    show = show and sys.stderr is not None  # closed
    terminal, reported = show and sys.stderr.isatty(), started
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if done == warmup < total:
            started = now
        due = now - reported >= (0.1 if terminal else 30) or terminal and done == total
        if not (show and due and done > warmup):
            continue
        reported = now
        rate = (done - warmup) / max(now - started, 1e-9)
        left = f"{(total - done + later) / rate:.0f} s left"
        left = left if done < total else f"{now - started:.0f} s"
        text = f"{label}: {done}/{total}, {rate:.3g}/s, {left}"
        end = "" if terminal and done < total else "\n"
        print(f"\r\033[K{text}" if terminal else text, end=end, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with status 2. Abbreviated flags are errors."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind: type, low: float, high: float = math.inf, *, above: bool = False) -> Callable:
    """A flag's type: an int or float from `low` (above it, if `above` is set) and below `high`."""
    need = f"a {'whole ' * (kind is int)}number {'above' if above else 'from'} {low:g}"
    need += f" and below {high:g}" * (high < math.inf)

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if (low < value if above else low <= value) and value < high:
                return value
        raise argparse.ArgumentTypeError(f"got {text}, need {need}")

    return parse


def img_size_flag(text: str) -> int | list[int]:
    """224, or height x width as 160x224."""
    sides = [number(int, 1, 10**6)(side) for side in text.split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"got {text}, need 224, or height x width as 160x224")
    return sides[0] if len(set(sides)) == 1 else sides


def threshold_flag(text: str) -> float | str:
    """A number in [0, 1), or auto."""
    return text if text == "auto" else number(float, 0, 1)(text)


# ---------------------------------------------------------------- device and precision

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def open_device(name: str | None) -> torch.device:
    """The device of that name, opened; by default a GPU (each process of torchrun its own) or CPU.

    Raises ValueError, one short line, where there is no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK') or 0}"
    try:
        device = torch.empty(0, device=name).device
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        if device.type == "cuda":
            torch.cuda.set_device(device)  # Triton's and NCCL's choice
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        if reason.startswith(("Could not run", "Expected one of")):  # torch lists all that it knows
            reason = "this machine or this build of torch has no such device"
        raise ValueError(f"{name}: {reason[:120]}") from None
    return device


def choose_amp(name: str, device: torch.device) -> str:
    """"auto" resolved: bf16 on a GPU that computes in it, fp16 on another GPU, off on a CPU."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "off"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """The precision of a forward pass, in train.py and evaluate.py alike."""
    return torch.autocast(device.type, AMP[amp], enabled=amp != "off")


def environment(name: str, default: int) -> int:
    """A whole number of at least 1 that torchrun or a cluster sets; else the default."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() and int(text) > 0 else default


def local_processes() -> int:
    """How many processes of this run share the machine."""
    return environment("LOCAL_WORLD_SIZE", 1)


def free_memory(device: torch.device) -> float:
    """Bytes that are free for this process: on a GPU its memory, else the machine's."""
    if device.type == "cuda":
        sharing = math.ceil(local_processes() / torch.cuda.device_count())
        return torch.cuda.mem_get_info(device)[0] / sharing
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, TypeError):  # Linux: what caches of files take is free, too
        meminfo = Path("/proc/meminfo").read_text()
        available = 1024 * int(re.search(r"MemAvailable:\s*(\d+)", meminfo)[1])
    with contextlib.suppress(OSError, ValueError):  # a container's limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text())
                       for name in ("max", "current"))
        available = min(available, limit - used)
    return available / local_processes()
