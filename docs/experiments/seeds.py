"""What several seeds of one train.py command found: means, and how often one map beats another.

    python docs/experiments/seeds.py RUN [RUN ...] [--json FILE]       # seconds

RUN: a run's folder. Runs may differ in --seed, --out and what changes no result. For each map:
GT-known by run, its mean and its standard deviation over runs; best_gt_known is at the map's best
threshold on the test images: an oracle. The gains are of maps within a run: LCTR's over the others,
with 95 % intervals over seeds, whose runs are averaged first.
docs/results/birds.json holds such figures.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from record import about, interval, spread
from support.common import write_json

FREE = ("seed", "out", "workers", "device", "cache", "eval_every", "checkpoint_every")
GAINS = (("relation", "cls"), ("relation", "cls-only"), ("relation-only", "cls-only"))


def read(folder: Path) -> tuple[dict, dict]:
    """A run's row, and its flags."""
    metrics = json.loads((folder / "metrics.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    row = {"run": folder.name, "seed": config["seed"]}
    row |= {name: metrics[name] for name in ("n", "threshold", "top1_cls", "baselines")}
    for key in ("gt_known", "top1_loc"):
        row[key] = {name: maps[key] for name, maps in metrics["couplings"].items()}
    row["best_gt_known"] = {name: max(maps["gt_known_curve"])
                            for name, maps in metrics["couplings"].items()}
    return row, config


def summary(rows: list[dict]) -> dict:
    """Mean and standard deviation over runs of each figure; LCTR's gains, over seeds."""
    result = {"top1_cls": spread([row["top1_cls"] for row in rows])}
    for key in ("gt_known", "top1_loc", "best_gt_known"):
        result[key] = {name: spread([row[key][name] for row in rows]) for name in rows[0][key]}
    result["gains"] = {}
    for a, b in GAINS:
        gains = [row["gt_known"][a] - row["gt_known"][b] for row in rows]
        by_seed = [np.mean([gain for gain, row in zip(gains, rows) if row["seed"] == seed])
                   for seed in dict.fromkeys(row["seed"] for row in rows)]
        result["gains"][f"{a} - {b}"] = (
            interval(np.array(by_seed)) | {"above": sum(gain > 0 for gain in gains)})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--json", metavar="FILE")
    flags = parser.parse_args()
    try:
        rows, configs = zip(*map(read, flags.runs))
    except OSError as error:
        sys.exit(f"seeds.py: error: {error}: not a finished run")

    first = {name: value for name, value in configs[0].items() if name not in FREE}
    for folder, config in zip(flags.runs, configs):
        for name, value in first.items():
            if config.get(name) != value:
                sys.exit(f"seeds.py: error: {folder}: --{name.replace('_', '-')} is "
                         f"{config.get(name)!r}, and {value!r} in {flags.runs[0]}")

    result = summary(rows)
    print(f"{len(rows)} runs, {rows[0]['n']} test images, GT-known in %")
    for name, value in result["gt_known"].items():
        runs = " ".join(f"{row['gt_known'][name]:5.1f}" for row in rows)
        deviation = "" if value["std"] is None else f" +- {value['std']:.1f}"
        print(f"{name:15}{runs}   mean {value['mean']:.1f}{deviation}")
    for name, value in result["gains"].items():
        low, high = (f"{value[end]:+.2f}" if value[end] is not None else "?"
                     for end in ("low", "high"))
        print(f"{name}: {value['mean']:+.2f} ({low} to {high} over seeds), above 0 in "
              f"{value['above']} of {len(rows)} runs")
    if flags.json:
        config = {name: value for name, value in first.items() if name != "root"}
        write_json(flags.json, about("docs/experiments/seeds.py", sys.argv[1:])
                   | {"config": config, "summary": result, "runs": rows})


if __name__ == "__main__":
    main()
