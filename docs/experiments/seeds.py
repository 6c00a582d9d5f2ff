"""Means over the seeds of finished runs of train.py, and what the CDM is worth over a static head.

    python docs/experiments/seeds.py RUN [RUN ...] [--json FILE]       # seconds

RUN: a run's folder. Runs may differ in --head and --seed alone. For each head and map: GT-known by
seed, its mean and its standard deviation over seeds. With runs of both heads, one difference:
LCTR's hits less those of TS-CAM + RPAM on the same test images; its 95 % interval resamples seeds
and images (a bootstrap). best_gt_known is at each map's best threshold on the test images: an
oracle. docs/results/birds.json and docs/results/photos.json hold such figures.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from evaluate import HIT
from record import commit, machine
from support.common import write_json

FREE = ("head", "seed", "out", "workers", "device", "cache", "eval_every", "checkpoint_every")
DRAWS = 10_000  # of the bootstrap


def read(folder: Path) -> tuple[dict, dict, np.ndarray]:
    """A run's row, its flags, and which test images its box hits (n,)."""
    metrics = json.loads((folder / "metrics.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    row = {name: config[name] for name in ("head", "seed")}
    row |= {name: metrics[name] for name in ("threshold", "top1_cls", "baselines")}
    for key in ("gt_known", "top1_loc"):
        row[key] = {name: maps[key] for name, maps in metrics["couplings"].items()}
    row["best_gt_known"] = {name: max(maps["gt_known_curve"])
                            for name, maps in metrics["couplings"].items()}
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return row, config, np.array([json.loads(line)["iou"] > HIT for line in lines])


def summary(rows: list[dict]) -> dict:
    """Mean and standard deviation over seeds of each figure of one head."""
    result = {"top1_cls": spread([row["top1_cls"] for row in rows])}
    for key in ("gt_known", "top1_loc", "best_gt_known"):
        result[key] = {name: spread([row[key][name] for row in rows]) for name in rows[0][key]}
    return result


def spread(values: list[float]) -> dict:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": deviation}


def difference(a: np.ndarray, b: np.ndarray) -> dict:
    """Of hits (seeds, n): a - b in points, and its 95 % interval over seeds and images."""
    rng, gains = np.random.default_rng(0), []
    for _ in range(DRAWS):
        images = rng.integers(a.shape[1], size=a.shape[1])
        ours, theirs = (hits[rng.integers(len(hits), size=len(hits))] for hits in (a, b))
        gains.append(ours[:, images].mean() - theirs[:, images].mean())
    low, high = 100 * np.quantile(gains, (0.025, 0.975))
    return {"mean": float(100 * (a.mean() - b.mean())), "interval_95": [float(low), float(high)]}


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

    result = {"images": runs[0][2].size, "heads": {}, "runs": [row for row, *_ in runs]}
    hits = {}
    for head in dict.fromkeys(row["head"] for row, *_ in runs):
        rows = [row for row, *_ in runs if row["head"] == head]
        result["heads"][head] = summary(rows)
        hits[head] = np.stack([hit for row, _, hit in runs if row["head"] == head])
        print(f"\n{head}: {len(rows)} seeds, {result['images']} test images, GT-known")
        for name, value in result["heads"][head]["gt_known"].items():
            seeds = " ".join(f"{row['gt_known'][name]:5.1f}" for row in rows)
            deviation = "" if value["std"] is None else f" +- {value['std']:.1f}"
            print(f"{name:15}{seeds}   mean {value['mean']:.1f}{deviation}")
    if {"cdm", "conv"} <= hits.keys():
        result["lctr_minus_tscam_rpam"] = difference(hits["cdm"], hits["conv"])
        print("\nLCTR - (TS-CAM + RPAM):", result["lctr_minus_tscam_rpam"])
    if flags.json:
        about = {"command": "python docs/experiments/seeds.py RUN RUN ...", "commit": commit(),
                 "date": str(datetime.date.today()), "machine": machine(),
                 "config": {name: value for name, value in first.items() if name != "root"}}
        write_json(flags.json, about | result)


if __name__ == "__main__":
    main()
