"""Of what a measurement was made: the code and the machine."""

import os
import platform
import re
import subprocess
from pathlib import Path

import torch


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
