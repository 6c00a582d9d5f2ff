"""docs/experiments/gate.py on a tiny backbone and a few pictures."""

import json
import runpy
import sys

import torch

from helpers import ROOT, LayerScaleViT


def test_rows_of_both_heads(tmp_path, cub, monkeypatch):
    backbone = LayerScaleViT(12, 2, depth=1, patch=14, grid=(2, 2))
    torch.save(backbone.state_dict(), tmp_path / "v.pth")
    monkeypatch.setattr(sys, "argv", ["gate.py", "--root", str(cub), "--img-size", "28",
                                      "--pretrained", str(tmp_path / "v.pth"),
                                      "--json", str(tmp_path / "rows.json")])
    runpy.run_path(str(ROOT / "docs/experiments/gate.py"), run_name="__main__")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(rows) == 3 * 3 * 2
    for row in rows:
        assert 0 <= row["test"]["relation"] <= 100 and row["loss"] > 0
        if row["head"] == "cdm":  # a tiny step from a half
            assert 0.05 < row["score_mean"][0] <= row["score_mean"][1] < 0.95
            assert row["test_with_mean_scores"].keys() == row["test"].keys()
