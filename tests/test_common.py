"""What the scripts share: files written whole or not at all, the progress line."""

import io
import sys

import pytest

from support import common
from support.common import progress, write_atomic


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "a.txt"
    write_atomic(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new")
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_progress_passes_everything_on(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress([3, 1, 2], "work")) == [3, 1, 2]
    assert "work: 3/3" in sys.stderr.getvalue() and sys.stderr.getvalue().endswith("\n")


def test_the_time_left_includes_what_follows_and_no_warm_up(monkeypatch, capsys):
    clock = iter([0, *range(1000, 4000, 40)])
    monkeypatch.setattr(common.time, "monotonic", lambda: next(clock))
    assert list(progress(range(5), "work", later=6, warmup=1)) == [0, 1, 2, 3, 4]
    lines = capsys.readouterr().err.splitlines()
    assert "2/5" in lines[0] and f"{(5 - 2 + 6) * 40} s left" in lines[0]
    assert lines[-1].endswith("160 s")
