"""docs/speed.py and docs/experiments/ run, each on a tiny size."""

import json
import runpy
import sys

import data
import numpy as np
import pytest
import torch
from helpers import ROOT, LayerScaleViT
from PIL import Image

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


def test_seeds_averages_runs_and_compares_their_maps(tmp_path, monkeypatch):
    runs = []
    for seed, lctr, cdm in ((1, 90, 85), (2, 80, 81), (2, 84, 81), (3, 82, 84)):
        folder = tmp_path / f"run{len(runs)}"
        folder.mkdir()
        maps = {name: {"gt_known": known, "top1_loc": known / 2, "gt_known_curve": [known, 95]}
                for name, known in (("relation", lctr), ("cls", cdm), ("relation-only", 70),
                                    ("cls-only", 60))}
        metrics = {"n": 4, "threshold": 0.2, "top1_cls": 10 * seed, "baselines": {},
                   "couplings": maps}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        (folder / "config.json").write_text(json.dumps({"seed": seed, "lr": 1.0}))
        runs.append(folder)
    run(monkeypatch, "experiments/seeds.py", *runs, "--json", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())["summary"]
    assert found["gt_known"]["relation"]["mean"] == 84
    assert found["gt_known"]["relation"]["std"] == pytest.approx((56 / 3) ** 0.5)
    assert found["best_gt_known"]["cls"] == {"mean": 95, "std": 0}
    gain = found["gains"]["relation - cls"]  # 5 -1 3 -2 by run, 5 1 -2 by seed
    assert gain["mean"] == pytest.approx(4 / 3) and gain["above"] == 2
    error = 3.5119 / 3**0.5  # of three seeds
    assert gain["high"] - gain["mean"] == pytest.approx(4.3027 * error, rel=0.01)
    (runs[1] / "config.json").write_text(json.dumps({"seed": 2, "lr": 2.0}))
    with pytest.raises(SystemExit, match="--lr is 2.0, and 1.0 in"):
        run(monkeypatch, "experiments/seeds.py", *runs)
    with pytest.raises(SystemExit, match="metrics.json.*not a finished run"):
        run(monkeypatch, "experiments/seeds.py", tmp_path)


def test_an_interval_is_over_seeds_and_images():
    from record import difference, interval

    assert interval(np.array([3.0])) == {"mean": 3, "low": None, "high": None}
    ones = np.ones((4, 500), bool)
    half = np.arange(4)[:, None] < np.full(500, 2)  # two seeds lose all images
    over_seeds = difference(ones, ones & ~half)
    assert over_seeds["mean"] == 50 and over_seeds["by_seed"] == [100, 100, 0, 0]
    error = 57.735 / 4**0.5
    assert over_seeds["high"] - 50 == pytest.approx(3.1824 * error, rel=0.01)
    over_images = difference(ones, np.arange(500) % 2 == np.zeros((4, 1)))  # all seeds alike
    assert over_images["mean"] == 50 and over_images["std"] == 0
    assert over_images["high"] - 50 == pytest.approx(3.1824 * 50 / 500**0.5, rel=0.01)


def test_gate_trains_both_heads_on_a_frozen_backbone(tmp_path, cub, monkeypatch):
    backbone = LayerScaleViT(12, 2, depth=1, patch=14, grid=(2, 2))
    torch.save(backbone.state_dict(), tmp_path / "vit.pth")
    run(monkeypatch, "experiments/gate.py", "--root", cub, "--img-size", "28", "--pretrained",
        tmp_path / "vit.pth", "--json", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["head"] for row in rows] == 3 * ["conv", "cdm", "standardised"]
    assert all(row["loss"] != other["loss"] for row, other in zip(rows[1::3], rows[2::3]))
    assert all(0 <= row["test"]["relation"] <= 100 and row["loss"] > 0 for row in rows)


@pytest.mark.full
def test_study_trains_measures_and_skips_what_is_there(tmp_path, monkeypatch, capsys):
    command = ["8", "--limit-test", "24", *TINY, "--seeds", "1", "--regime", "head only, trained",
               "--out", tmp_path]
    run(monkeypatch, "experiments/study.py", *command)
    first = capsys.readouterr().out
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("measured.*")}
    assert "| LCTR |" in first and len(written) == 4  # a .json and an .npz for each head
    run(monkeypatch, "experiments/study.py", *command)
    assert capsys.readouterr().out == first
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("measured.*")}


@pytest.mark.full
def test_study_of_data_without_val_takes_the_threshold_of_the_flags(tmp_path, cub, monkeypatch):
    run(monkeypatch, "experiments/study.py", "8", *TINY, "--seeds", "2", "--data", "cub", "--root",
        cub, "--threshold", "0.125", "--out", tmp_path, "--results", tmp_path / "found.json")
    (found,) = json.loads((tmp_path / "found.json").read_text()).values()
    assert found["rows"]["LCTR"]["threshold"] == {"mean": 0.125, "std": 0}
    assert set(found["baselines"]) == {"whole_image", "centred_box"}
    assert found["versions"]["torch"] == torch.__version__
    with pytest.raises(SystemExit, match="--threshold 0.125.*choose another --out"):
        run(monkeypatch, "experiments/study.py", "8", *TINY, "--data", "cub", "--root", cub,
            "--out", tmp_path)


def test_what_rpam_needs_is_told_once_all_regimes_are_known():
    import study

    names = "CDM, class attention alone", "CDM, patch relation alone", "CDM", "LCTR"
    rows = {name: {"top1_cls": {"mean": 90.0, "std": 1.0}, "gt_known": {"mean": i, "std": None}}
            for i, name in enumerate(names)}
    known = {}
    for regime, by_seed in zip(study.REGIMES, ([1, 3], [-9, -5], [3, 3, 9], [0, 0])):
        gains = {"RPAM with the CDM (LCTR - CDM)": {"mean": -3.0, "low": -5.0, "high": -1.0,
                                                    "by_seed": by_seed},
                 "patch relation alone - class attention alone": {"mean": 2, "low": None}}
        known[f"Table 8, {regime}, --species 45"] = {"rows": rows, "differences": gains}
    page = study.what_rpam_needs(known, "--species 45")
    assert "changes LCTR - CDM by +6.0 (-0.4 to +12.4) points" in page  # 6.5 and 5.5 by seed
    cells = "90.0 ± 1.0 | 0.0 | 1.0 | 2.0 | 3.0 | -3.0 (-5.0 to -1.0) | +2.0 (one seed) |"
    assert [f"| {regime} | {cells}" in page for regime in study.REGIMES] == 4 * [True]
    known.popitem()
    assert study.what_rpam_needs(known, "--species 45") == ""


def test_photographs_keep_test_objects_and_wallpapers_apart(tmp_path, monkeypatch):
    import photographs

    share, rng = tmp_path / "debian/usr/share", np.random.default_rng(0)
    wallpapers = [path.parent / "1x1.png" if path.name == "*" else path
                  for path in photographs.wallpapers(share)]
    stamps = [path for name in photographs.CLASSES for path in photographs.stamps(share, name)]
    for path in wallpapers + stamps:  # each of one colour
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 60), tuple(rng.integers(256, size=3).tolist())).save(path)

    compose, used = photographs.compose, []

    def watched(stamp, wallpaper, rng):
        picture, box = compose(stamp, wallpaper, rng)
        used.append((stamp.getpixel((0, 0))[:3], wallpaper.getpixel((0, 0)), box))
        return picture, box

    monkeypatch.setattr(photographs, "compose", watched)
    monkeypatch.setattr(photographs, "COUNTS", {"train": 24, "test": 8})
    out = tmp_path / "photographs"
    photographs.write_set(share, out)

    rows = {"train": [], "test": []}
    for start in range(0, len(used), 32):  # class after class
        rows["train"] += used[start:start + 24]
        rows["test"] += used[start + 24:start + 32]
    for kind in (0, 1):
        train, test = ({row[kind] for row in rows[split]} for split in ("train", "test"))
        assert not train & test and len(train | test) > len(test) > 10
    for split, of_split in rows.items():
        pictures = data.load_dataset("cub", out, split, 28, augment=False)
        assert len(pictures) == len(of_split) and len(pictures.classes) == 12
        for sample, (colour, background, (x, y, width, height)) in zip(pictures, of_split):
            assert sample["boxes"].tolist() == [[x, y, x + width, y + height]]
            with Image.open(out / "images" / sample["path"]) as picture:
                pixels = np.asarray(picture).astype(int)
            inside = np.median(pixels[y:y + height, x:x + width], (0, 1))
            assert abs(inside - colour).max() < 4  # JPEG
            around = slice(max(y - 16, 0), y + height + 16), slice(max(x - 16, 0), x + width + 16)
            pixels[around] = background
            assert abs(pixels - background).max() < 4


def test_photographs_name_a_package_that_is_missing(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="Aqua.jpg: missing, one of"):
        run(monkeypatch, "experiments/photographs.py", "--debian", tmp_path, "--out",
            tmp_path / "out")
    assert not (tmp_path / "out").exists()
