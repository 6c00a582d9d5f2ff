"""What a measurement says of itself, its code and machine; means and intervals over seeds."""

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import numpy as np
import torch

DRAWS = 10_000  # of the bootstrap


def about(command: str) -> dict:
    """What a file of results says of its making."""
    return {"command": command, "commit": commit(), "date": str(datetime.date.today()),
            "machine": machine(), "versions": {
                "python": platform.python_version(), "torch": torch.__version__,
                "numpy": np.__version__}}


def commit() -> str:
    """Of the code; empty without a repository."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                           cwd=Path(__file__).parent)
    return found.stdout.strip()


def machine() -> str:
    """The GPU, or the CPU and its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")  # Linux
    name = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    return f"{name[1] if name else platform.machine()}, {threads}"


def spread(values: list[float]) -> dict:
    """Mean and standard deviation over seeds."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": deviation}


def difference(a: np.ndarray, b: np.ndarray) -> dict:
    """a - b in points, from hits (seeds, n) of the same seeds and images.

    The 95 % interval is a bootstrap's that resamples both.
    """
    gains, rng = 100 * (a.astype(float) - b), np.random.default_rng(0)
    seeds, images = (rng.multinomial(n, np.full(n, 1 / n), DRAWS) / n for n in gains.shape)
    low, high = np.quantile(((seeds @ gains) * images).sum(1), (0.025, 0.975))
    by_seed = gains.mean(1)
    return spread(by_seed.tolist()) | {"low": float(low), "high": float(high),
                                       "by_seed": by_seed.round(2).tolist()}
