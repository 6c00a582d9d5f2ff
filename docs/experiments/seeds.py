"""Means over seeds of finished runs of train.py, and what the CDM is worth over a static head.

    python docs/experiments/seeds.py RUN [RUN ...] [--json FILE]

RUN: a run's folder. Runs must differ in --head and --seed alone. A difference is paired: LCTR's
hits less TS-CAM + RPAM's on the same test images, the seeds' hits averaged first; its interval and
the standard errors are the bootstrap's over images. best_gt_known is each map's at its best
threshold on the test images, an oracle. docs/results/photos.json holds such figures.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from evaluate import HIT
from support.common import commit, machine, write_json

KINDS = ("gt_known", "top1_loc", "best_gt_known")
FREE = ("head", "seed", "out", "workers", "device", "eval_every", "checkpoint_every")
DRAWS = 10_000  # of the bootstrap


def read(folder: Path) -> tuple[dict, dict, np.ndarray]:
    """A run's row, its flags, and which test images its box hits (n,)."""
    metrics = json.loads((folder / "metrics.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    known = {name: row["gt_known"] for name, row in metrics["couplings"].items()}
    row = {"head": config["head"], "seed": config["seed"], "threshold": metrics["threshold"],
           "top1_cls": metrics["top1_cls"], "gt_known": known,
           "top1_loc": {name: row["top1_loc"] for name, row in metrics["couplings"].items()},
           "best_gt_known": {name: max(row["gt_known_curve"])
                             for name, row in metrics["couplings"].items()}}
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return row, config, np.array([json.loads(line)["iou"] > HIT for line in lines])


def average(rows: list[dict]) -> dict:
    return {"top1_cls": float(np.mean([row["top1_cls"] for row in rows]))} | {
        kind: {name: float(np.mean([row[kind][name] for row in rows])) for name in rows[0][kind]}
        for kind in KINDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--json", metavar="FILE")
    flags = parser.parse_args()
    runs = [read(folder) for folder in flags.runs]
    first = {name: value for name, value in runs[0][1].items() if name not in FREE}
    for folder, (_, config, _) in zip(flags.runs, runs):
        for name, value in first.items():
            if config.get(name) != value:
                sys.exit(f"seeds.py: error: {folder}: --{name.replace('_', '-')} is "
                         f"{config.get(name)!r}, and {value!r} in {flags.runs[0]}")
    result = {"runs": [row for row, *_ in runs], "means": {}, "standard_error": {}}
    images = runs[0][2].size
    draws = np.random.default_rng(0).integers(images, size=(DRAWS, images))
    hits = {}
    for head in dict.fromkeys(row["head"] for row, *_ in runs):
        result["means"][head] = average([row for row, *_ in runs if row["head"] == head])
        hits[head] = np.mean([hit for row, _, hit in runs if row["head"] == head], 0)
        result["standard_error"][head] = float(100 * hits[head][draws].mean(1).std())
    if {"cdm", "conv"} <= hits.keys():
        gain = 100 * (hits["cdm"] - hits["conv"])
        low, high = np.quantile(gain[draws].mean(1), (0.025, 0.975))
        result["lctr_minus_tscam_rpam"] = {"mean": float(gain.mean()),
                                           "interval_95": [float(low), float(high)]}
    print(json.dumps({name: value for name, value in result.items() if name != "runs"}, indent=2))
    if flags.json:
        about = {"command": "python docs/experiments/seeds.py RUN RUN ...", "commit": commit(),
                 "date": str(datetime.date.today()), "machine": machine()}
        write_json(flags.json, about | result)


if __name__ == "__main__":
    main()
