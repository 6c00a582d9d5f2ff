"""What a measurement says of itself, its code and machine; means and intervals over seeds."""

import datetime
import functools
import math
import os
import platform
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import torch


def about(script: str, arguments: list[str], gpu: bool = True) -> dict:
    """What a file of results says of its making; gpu: whether that takes a GPU where one is."""
    command = f"python {script} {shlex.join(arguments)}".strip()
    return {"command": command, "commit": commit(), "date": str(datetime.date.today()),
            "machine": machine(gpu), "versions": {
                "python": platform.python_version(), "torch": torch.__version__,
                "numpy": np.__version__}}


def commit() -> str:
    """Of the code; empty without a repository."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                           cwd=Path(__file__).parent)
    return found.stdout.strip()


def machine(gpu: bool = True) -> str:
    """The GPU, or the CPU and its number of cores."""
    if gpu and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")  # Linux
    name = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return f"{name[1] if name else platform.machine()}, {os.cpu_count()} cores"


def spread(values: list[float]) -> dict:
    """Mean and standard deviation over seeds."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": deviation}


def interval(values: np.ndarray, variance: float = 0.0) -> dict:
    """The mean of values, one a seed, and its 95 % interval: Student's t, None for one seed.

    variance: the mean's, from what is not resampled with the seeds.
    """
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return {"mean": mean, "low": None, "high": None}
    half = student(count - 1) * math.sqrt(np.var(values, ddof=1) / count + variance)
    return {"mean": mean, "low": mean - half, "high": mean + half}


@functools.cache
def student(freedom: int) -> float:
    """Student's t that 2.5 % lie above, from a million draws: numpy has no quantile of it."""
    draws = np.random.default_rng(0).standard_t(freedom, 1_000_000)
    return float(np.quantile(draws, 0.975))


def difference(a: np.ndarray, b: np.ndarray) -> dict:
    """a - b in points, from hits (seeds, n) of the same seeds and images.

    The interval is over seeds and images, which are crossed: the variances of both means add up.
    """
    gains = 100 * (a.astype(float) - b)
    by_seed, by_image = gains.mean(1), gains.mean(0)
    found = interval(by_seed, by_image.var(ddof=1) / len(by_image))
    return found | {"std": spread(by_seed)["std"], "by_seed": by_seed.round(2).tolist()}
