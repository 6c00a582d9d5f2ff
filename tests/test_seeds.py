"""docs/experiments/seeds.py: means, paired differences and their intervals, of runs with known figures."""

import json
import runpy
import sys

import pytest

from helpers import ROOT


def write_run(folder, head, seed, ious, **changes):
    folder.mkdir(parents=True)
    hits = 100 * sum(iou > 0.5 for iou in ious) / len(ious)
    row = {"gt_known": hits, "top1_loc": hits / 2, "gt_known_curve": [hits, hits + 5, 0]}
    (folder / "metrics.json").write_text(json.dumps(
        {"threshold": 0.2, "top1_cls": 10 * seed, "couplings": {"relation": row}}))
    (folder / "config.json").write_text(json.dumps(
        {"head": head, "seed": seed, "lr": 1.0, "out": str(folder)} | changes))
    (folder / "predictions.jsonl").write_text(
        "".join(json.dumps({"iou": iou}) + "\n" for iou in ious))
    return str(folder)


def seeds(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["seeds.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "docs/experiments/seeds.py"), run_name="__main__")


def test_means_and_paired_difference(tmp_path, monkeypatch):
    runs = [write_run(tmp_path / "a", "cdm", 1, [0.9, 0.9, 0.9, 0.1]),
            write_run(tmp_path / "b", "cdm", 2, [0.9, 0.9, 0.1, 0.1]),
            write_run(tmp_path / "c", "conv", 1, [0.9, 0.1, 0.5, 0.1]),
            write_run(tmp_path / "d", "conv", 2, [0.9, 0.1, 0.1, 0.1])]
    seeds(monkeypatch, *runs, "--json", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["means"]["cdm"]["gt_known"] == {"relation": (75 + 50) / 2}
    assert found["means"]["conv"]["best_gt_known"] == {"relation": 30}
    assert found["means"]["cdm"]["top1_cls"] == 15
    gain = found["lctr_minus_tscam_rpam"]  # by image: 0, 1, 1/2, 0
    assert gain["mean"] == 37.5 and 0 <= gain["interval_95"][0] < 37.5 < gain["interval_95"][1]
    assert [run["seed"] for run in found["runs"]] == [1, 2, 1, 2] and found["commit"]


def test_runs_of_different_flags_are_not_averaged(tmp_path, monkeypatch):
    runs = [write_run(tmp_path / "a", "cdm", 1, [0.9]),
            write_run(tmp_path / "b", "cdm", 2, [0.9], lr=2.0)]
    with pytest.raises(SystemExit) as stop:
        seeds(monkeypatch, *runs)
    assert "--lr is 2.0, and 1.0 in" in stop.value.code
