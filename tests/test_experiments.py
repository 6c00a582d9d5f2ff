"""docs/speed.py and docs/experiments/ run, each on a tiny size."""

import json
import runpy
import sys

import pytest
import torch
from helpers import ROOT, LayerScaleViT

TINY = ("--img-size 32 --embed-dim 12 --depth 2 --num-heads 2 --batch-size 8 --epochs 1 "
        "--pretrain-epochs 1 --limit-train 17").split()


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(ROOT / "docs" / script), run_name="__main__")


def test_speed_prints_a_row_for_each_task(tmp_path, monkeypatch, capsys):
    import speed

    small = [speed.Work(task, 3, 32, 1) for task in ("train", "localize")]
    monkeypatch.setattr(speed, "TIMED", small)
    monkeypatch.setattr(speed, "MEASURED", ())
    monkeypatch.setattr(speed.loading, "__defaults__", (2,))
    argv = ["speed.py", "--repeats", "1", "--json", f"{tmp_path}/rows.json"]
    monkeypatch.setattr(sys, "argv", argv)
    speed.main()
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["unit"] for row in rows] == ["s", "s", "ms", "ms", "ms"]
    assert "train, C=3, 1 x 32 px" in capsys.readouterr().out


def test_seeds_averages_runs_and_pairs_both_heads(tmp_path, monkeypatch):
    runs = []
    for head, seed, ious in (("cdm", 1, [0.9, 0.9, 0.9, 0.1]), ("cdm", 2, [0.9, 0.9, 0.1, 0.1]),
                             ("conv", 1, [0.9, 0.1, 0.5, 0.1]), ("conv", 2, [0.9, 0.1, 0.1, 0.1])):
        folder = tmp_path / f"{head}{seed}"
        folder.mkdir()
        known = 25 * sum(iou > 0.5 for iou in ious)
        maps = {"gt_known": known, "top1_loc": known / 2, "gt_known_curve": [known, known + 5]}
        metrics = {"threshold": 0.2, "top1_cls": 10 * seed, "baselines": {}}
        metrics["couplings"] = {"relation": maps}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        (folder / "config.json").write_text(json.dumps({"head": head, "seed": seed, "lr": 1.0}))
        lines = [json.dumps({"iou": iou}) + "\n" for iou in ious]
        (folder / "predictions.jsonl").write_text("".join(lines))
        runs.append(folder)
    run(monkeypatch, "experiments/seeds.py", *runs, "--json", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    known = result["heads"]["cdm"]["gt_known"]["relation"]
    assert known["mean"] == 62.5 and known["std"] == pytest.approx(12.5 * 2**0.5)
    assert result["heads"]["conv"]["best_gt_known"]["relation"]["mean"] == 30
    gain = result["lctr_minus_tscam_rpam"]
    assert gain["mean"] == 37.5 and gain["interval_95"][0] < 37.5 < gain["interval_95"][1]
    (runs[3] / "config.json").write_text(json.dumps({"head": "conv", "seed": 2, "lr": 2.0}))
    with pytest.raises(SystemExit, match="--lr is 2.0, and 1.0 in"):
        run(monkeypatch, "experiments/seeds.py", *runs)


def test_gate_trains_both_heads_on_a_frozen_backbone(tmp_path, cub, monkeypatch):
    backbone = LayerScaleViT(12, 2, depth=1, patch=14, grid=(2, 2))
    torch.save(backbone.state_dict(), tmp_path / "vit.pth")
    run(monkeypatch, "experiments/gate.py", "--root", cub, "--img-size", "28", "--pretrained",
        tmp_path / "vit.pth", "--json", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(rows) == 3 * 3 * 2
    assert all(0 <= row["test"]["relation"] <= 100 and row["loss"] > 0 for row in rows)


@pytest.mark.full
def test_study_trains_measures_and_skips_what_is_there(tmp_path, monkeypatch, capsys):
    command = ["8", "--limit-test", "24", *TINY, "--seeds", "1", "--regime", "species", "--out",
               tmp_path]
    run(monkeypatch, "experiments/study.py", *command)
    first = capsys.readouterr().out
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("measured.*")}
    assert "| LCTR |" in first and len(written) == 4  # a .json and an .npz for each head
    run(monkeypatch, "experiments/study.py", *command)
    assert capsys.readouterr().out == first
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("measured.*")}
