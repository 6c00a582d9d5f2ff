"""docs/speed.py in small: its rows, and what it refuses."""

import json
import sys

import pytest

import speed
from lctr import LCTR

COLUMNS = ["work", "ratio", "lctr", "floor", "unit", "images_per_s", "peak_share"]


def test_rows_and_file(tmp_path, monkeypatch, capsys):
    small = [speed.Work(task, 3, 32, 1) for task in ("train", "localize")]
    monkeypatch.setattr(speed, "TIMED", small)
    monkeypatch.setattr(speed, "MEASURED", ())
    monkeypatch.setattr(speed.loading, "__defaults__", (2,))
    path = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["speed.py", "--repeats", "1", "--json", str(path)])
    speed.main()
    rows = json.loads(path.read_text())
    assert [list(row)[:7] for row in rows] == [COLUMNS] * 5
    assert [row["unit"] for row in rows] == ["s", "s", "ms", "ms", "ms"]
    assert "train, C=3, 1 x 32 px" in capsys.readouterr().out


def test_repeats_below_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speed.py", "--repeats", "0"])
    with pytest.raises(SystemExit) as ended:
        speed.main()
    assert ended.value.code == 2 and "--repeats: got 0, need 1 or more" in capsys.readouterr().err


def test_both_models_do_the_work():
    for model in (speed.PlainViT, LCTR):
        for task in ("train", "localize"):
            speed.prepare(speed.Work(task, 3, 32, 1), model)()
