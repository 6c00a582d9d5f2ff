"""The ablation study: the paper's Tables 5 to 8, and what the paper leaves open.

    python docs/experiments/study.py all --jobs 2  # synthetic birds
    python docs/experiments/study.py 5 6 7 --regime "head only, trained" --species 45
    python docs/experiments/study.py 8 --data cub --root CUB_200_2011 --pretrained deit_small

Flags that are not the study's own go to every train.py run. The synthetic birds are studied in four
regimes of pretraining. With the palette as a second image label the class token covers the whole
bird, without it it looks at the head only: the partial activation that the paper is about. Patch
tokens are trained to classify, or not (--patch-loss). Each seed has its own pretraining, shared by
all of its variants. A run is a folder below --out: what is in it is not trained or measured again.

How a run is measured: the last weights; each coupling's threshold is the best on val from .01 to
.90 (train.py's --threshold where there is no val split, 0.2 by default). Test boxes choose nothing,
but for best_gt_known, which is at the best threshold on them: an oracle. A difference is paired,
over the same seeds and test images; its 95 % interval is over both (record.difference).
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import data
import evaluate
import kernels
from lctr import LCTR, load_checkpoint, mean_over_blocks
from record import about, difference, interval, spread
from support.common import write_atomic, write_json, write_text

# table: {row: flags of train.py}; the row without flags is LCTR with the paper's choices
TABLES = {
    "8": {"static head": ("--head", "conv"), "CDM": ()},
    "5": {"GAP": ("--scorer", "gap"), "GMP": ("--scorer", "gmp"),
          "GAP + GMP, shared": ("--scorer", "shared"), "GAP, GMP, separate": ()},
    "6": {"G = 2": ("--num-kernels", "2"), "G = 4": (), "G = 8": ("--num-kernels", "8"),
          "G = 16": ("--num-kernels", "16"), "G = 32": ("--num-kernels", "32")},
    "7": {"1 x 1": ("--kernel-size", "1"), "3 x 3": ()},
    "erase": {"raw": (), "minmax": ("--erase", "minmax")},
    "pool": {"gap": (), "padded": ("--pool", "padded")},
}
REGIMES = {  # of the birds' pretraining: what class attention covers, and what patch tokens learn
    "whole bird, trained": (),
    "whole bird, untrained": ("--patch-loss", "none"),
    "head only, trained": ("--no-palette-label",),
    "head only, untrained": ("--no-palette-label", "--patch-loss", "none"),
}  # other data have one, "as given"
THRESHOLDS = evaluate.THRESHOLDS[1:91]


# ---------------------------------------------------------------- one run


def train(folder: Path, flags: list[str], threads: int) -> None:
    """A finished run in `folder`: started, continued, or left as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    # train.py's own scoring is not used: measure() does all of it
    command = [sys.executable, str(ROOT / "train.py"), "--out", str(folder), "--resume",
               "--limit-test", "10", "--eval-every", "1000000", *flags]
    with open(folder / "output.txt", "a") as output:
        ended = subprocess.run(command, stdout=output, stderr=output,
                               env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    if ended.returncode:
        last = (folder / "output.txt").read_text().strip().splitlines()[-1:]
        raise RuntimeError(
            f"{folder}: train.py ended with status {ended.returncode}: {' '.join(last)}")


def measure(folder: Path, source: tuple, limit: int | None) -> None:
    """Evaluates the run on the test split: measured.json, each image's hits in measured.npz."""
    model, checkpoint = load_checkpoint(folder / "last.pt")
    name, root = source
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)

    def load(split: str):
        return data.load_dataset(name, root, split, checkpoint["config"]["img_size"], limit=limit,
                                 classes=checkpoint["classes"])

    chosen, test = checkpoint["config"]["threshold"], load("test")
    on_test = evaluate.evaluate_model(model, test, device=device,
                                      threshold=None if chosen == "auto" else chosen)
    if chosen == "auto":
        on_val = evaluate.evaluate_model(model, load("val"), device=device)
        val_maps = evaluate.summarise(on_val, 0)["couplings"]

    has = on_test.annotated
    if not has.any():
        raise ValueError(f"{name}: no test picture has a box, so nothing can be measured")
    top1 = (on_test.top5[:, 0] == on_test.label)[has]
    metrics = evaluate.summarise(on_test, 0)
    found = {"top1_cls": metrics["top1_cls"], "baselines": metrics["baselines"], "couplings": {}}
    hits = {"top1_cls": top1}
    for coupling in on_test.couplings:
        threshold = chosen
        if chosen == "auto":
            curve = val_maps[coupling]["gt_known_curve"]
            threshold = max(THRESHOLDS, key=lambda t: curve[evaluate.THRESHOLDS.index(t)])
        hit = on_test.iou[has, *on_test.at(coupling, threshold)] > evaluate.HIT
        hits |= {f"{coupling} gt_known": hit, f"{coupling} top1_loc": hit & top1}
        best = max(metrics["couplings"][coupling]["gt_known_curve"])
        found["couplings"][coupling] = {
            "threshold": threshold, "gt_known": 100 * float(hit.mean()),
            "top1_loc": 100 * float((hit & top1).mean()), "best_gt_known": best}
    found["causes"] = causes(model, test)
    write_atomic(folder / "measured.npz", lambda file: np.savez(file, **hits))
    write_json(folder / "measured.json", found)


@torch.no_grad()
def causes(model: LCTR, dataset) -> dict[str, float]:
    """Why the maps are as they are.

    accuracy_all, _object, _background: top-1 in % from the mean class map over all patches, those
    whose centre lies in the box, and those whose k x k window holds none of these; over images that
    have all three. inside_*: the map's mean inside the box over its mean outside, median over
    images. score_variance_between: share of the variance of the CDM's scores S_g that lies between
    classes, in %. accuracy_mean_scores: top-1 in % with every image's S_g replaced by their mean
    over images.
    """
    right, ratios, labels, scores, parts = [], [], [], [], []
    batches = [list(range(i, min(i + 64, len(dataset)))) for i in range(0, len(dataset), 64)]
    device = next(model.parameters()).device
    for batch in data.loader(dataset, batches):
        images, label = data.normalise(batch["image"].to(device)), batch["label"].to(device)
        found = model.localize(images, "all")
        inside, background = (part.to(device) for part in regions_of(model, batch))  # (B, h, w)
        whole = inside.flatten(1).any(1) & background.flatten(1).any(1)  # (B,)
        regions = torch.stack([torch.ones_like(inside), inside, background], 1)
        regions = regions[whole].float()  # (B', 3, h, w)
        logits = torch.einsum("bchw,brhw->brc", found.class_maps[whole], regions)
        logits = logits / regions.sum((2, 3))[..., None]
        right.append(logits.argmax(-1) == label[whole, None])  # (B', 3)
        chosen = found.logits.argmax(1)[:, None, None, None]
        predicted = found.class_maps.take_along_dim(chosen, 1)[:, 0].relu()  # (B, h, w)
        maps = torch.stack([predicted, found.cls_map, found.relation_map], 1)[whole]
        inner, outer = regions[:, 1:2], 1 - regions[:, 1:2]
        ratios.append((maps * inner).sum((2, 3)) / inner.sum((2, 3))
                      / ((maps * outer).sum((2, 3)) / outer.sum((2, 3))))  # (B', 3)
        if model.head_type == "cdm":
            score, part = scores_of(model, images)
            scores.append(score)
            parts.append(part)
            labels.append(label)
    accuracy = 100 * torch.cat(right).float().mean(0)
    nothing = torch.full((1, 3), torch.nan, device=device)  # boxes may fill every picture
    ratio = torch.cat([*ratios, nothing]).nanmedian(0).values
    result = dict(zip(("accuracy_all", "accuracy_object", "accuracy_background"),
                      accuracy.tolist()))
    result |= dict(zip(("inside_class_map", "inside_cls_map", "inside_relation_map"),
                       ratio.tolist()))
    if scores:
        bias = model.cdm.bias
        result |= causes_of_scores(*(torch.cat(x) for x in (scores, parts, labels)), bias)
    return result


def regions_of(model: LCTR, batch: dict) -> tuple[Tensor, Tensor]:
    """Which patches (B, h, w) have their centre in a box, and whose k x k window holds none."""
    (h, w), (H, W) = model.grid, model.img_size
    rows, columns = (torch.arange(h) + 0.5) * H / h, (torch.arange(w) + 0.5) * W / w
    k = model.conv_head.conv_kernels().shape[-1]
    ground_truth = evaluate.to_input(batch["boxes"], batch["view"], model.img_size)  # (B, M, 4)
    x0, y0, x1, y1 = ground_truth.unbind(-1)  # (B, M) each
    tall = (rows >= y0[..., None]) & (rows < y1[..., None])  # (B, M, h)
    wide = (columns >= x0[..., None]) & (columns < x1[..., None])  # (B, M, w)
    inside = (tall[..., :, None] & wide[..., None, :]).any(1)  # (B, h, w)
    return inside, F.max_pool2d(inside[:, None].float(), k, 1, k // 2)[:, 0] == 0


def scores_of(model: LCTR, images: Tensor) -> tuple[Tensor, Tensor]:
    """The CDM's scores (B, G), and what each kernel adds to the logits at score 1 (B, G, C)."""
    tokens, attention = model.forward_features(images)
    cls_map = model.on_grid(mean_over_blocks(attention, "cls")[:, 1:])
    scores, features = model.classify(tokens, cls_map)[1], model.on_grid(tokens[:, 1:])
    parts = [kernels.dynamic_conv_logits(features, one.expand_as(scores).contiguous(),
                                         model.cdm.weight, None, model.cdm.pool)
             for one in torch.eye(scores.shape[1], device=scores.device)]
    return scores, torch.stack(parts, 1)


def causes_of_scores(scores: Tensor, parts: Tensor, labels: Tensor, bias: Tensor) -> dict:
    """Of scores (n, G), kernels' parts of the logits (n, G, C) and labels (n,): see causes."""
    mean = scores.mean(0)  # (G,)
    centres = torch.stack([scores[labels == c].mean(0) for c in labels.unique()])  # (classes, G)
    share = torch.stack([(labels == c).float().mean() for c in labels.unique()])[:, None]
    between = (share * (centres - mean) ** 2).sum() / scores.var(0, correction=0).sum()
    with_mean = (torch.einsum("bgc,g->bc", parts, mean) + bias).argmax(1) == labels
    with_own = (torch.einsum("bgc,bg->bc", parts, scores) + bias).argmax(1) == labels
    return {"score_mean": mean.mean().item(), "score_std": scores.std(0).mean().item(),
            "score_variance_between": 100 * between.item(),
            "accuracy_mean_scores": 100 * with_mean.float().mean().item(),
            "accuracy_own_scores": 100 * with_own.float().mean().item()}


# ---------------------------------------------------------------- all runs of a table


def run_all(flags: argparse.Namespace, extra: list[str], regimes: dict, tables: list[str]) -> None:
    """Trains and measures what is missing: each seed's pretraining, then its variants."""
    source = ["--data", flags.data, *(["--root", flags.root] if flags.root else []), *extra]
    claim(flags.out, [*source, "--limit-test", str(flags.limit_test)])
    threads = max(1, (os.cpu_count() or 1) // flags.jobs)
    variants = dict.fromkeys(row for table in tables for row in TABLES[table].values())
    starts = [(seed, regime) for seed in range(flags.seeds) for regime in regimes]

    def pretrain(start: tuple[int, str]) -> None:
        seed, regime = start
        folder = run_folder(flags.out, regime, seed, ("pretraining",))
        if not (folder / "pretrained.pt").exists():  # the main phase is cut to one step
            train(folder, [*source, "--seed", str(seed), *regimes[regime], "--max-steps", "1"],
                  threads)
        print(f"{regime}, seed {seed}: pretrained", flush=True)

    def variant(start: tuple[int, str], row: tuple[str, ...]) -> None:
        seed, regime = start
        folder = run_folder(flags.out, regime, seed, row)
        if not (folder / "measured.json").exists():
            command = [*source, "--seed", str(seed), *row]
            if flags.data == "synthetic":
                backbone = run_folder(flags.out, regime, seed, ("pretraining",)) / "pretrained.pt"
                command += ["--pretrained", str(backbone), "--pretrain-epochs", "0"]
            train(folder, command, threads)
            measure(folder, (flags.data, flags.root), flags.limit_test)
        found = json.loads((folder / "measured.json").read_text())
        known = ", ".join(f"{name} {row['gt_known']:.1f}"
                          for name, row in found["couplings"].items())
        print(f"{regime}, seed {seed}, {' '.join(row) or 'default'}: "
              f"top-1 {found['top1_cls']:.1f}; GT-known: {known}", flush=True)

    with ThreadPoolExecutor(flags.jobs) as pool:
        try:
            if flags.data == "synthetic":
                list(pool.map(pretrain, starts))
            jobs = [(start, row) for row in variants for start in starts]  # table after table
            list(pool.map(variant, *zip(*jobs)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def claim(out: Path, flags: list[str]) -> None:
    """Refuses a folder whose runs had other flags: they would pass for this command's."""
    file = out / "flags.json"
    if file.exists() and (known := json.loads(file.read_text())) != flags:
        raise ValueError(f"{out}: its runs are of {shlex.join(known)}, not {shlex.join(flags)}: "
                         "choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, flags)


def run_folder(out: Path, regime: str, seed: int, row: tuple[str, ...]) -> Path:
    name = "-".join(part.removeprefix("--") for part in row) or "default"
    return out / regime.replace(" ", "") / f"seed{seed}" / name


class Runs:
    """The measured runs of one regime: figures and hits of a row of a table, by seed."""

    def __init__(self, out: Path, regime: str, seeds: int):
        self.folder = lambda row, seed: run_folder(out, regime, seed, row)
        self.seeds = range(seeds)

    def figures(self, row: tuple[str, ...]) -> list[dict]:
        return [json.loads((self.folder(row, seed) / "measured.json").read_text())
                for seed in self.seeds]

    def hits(self, row: tuple[str, ...], key: str) -> np.ndarray:
        """(seeds, n test images) bool."""
        return np.stack([np.load(self.folder(row, seed) / "measured.npz")[key]
                         for seed in self.seeds])


# ---------------------------------------------------------------- the report


def tabulate(table: str, runs: Runs) -> dict:
    """One table of one regime: rows of figures, and the differences that its question asks for."""
    rows, pairs = TABLES[table], []
    result = {"baselines": runs.figures(())[0]["baselines"], "rows": {}, "differences": {},
              "causes": {}}
    for name, row in rows.items():
        figures = runs.figures(row)
        for coupling in figures[0]["couplings"] if table == "8" else ("relation",):
            label = evaluate.coupling_label("conv" if "conv" in row else "cdm", coupling)
            if table != "8":
                label = name
            elif coupling.endswith("-only"):
                label = f"{name}, {label}"
            result["rows"][label] = {"top1_cls": spread([f["top1_cls"] for f in figures])} | {
                key: spread([f["couplings"][coupling][key] for f in figures])
                for key in ("top1_loc", "gt_known", "best_gt_known", "threshold")}
            known = [f["couplings"][coupling]["gt_known"] for f in figures]
            result["rows"][label]["gt_known_by_seed"] = known
        result["causes"][name] = {key: spread([f["causes"][key] for f in figures])
                                  for key in figures[0]["causes"]}
    if table == "8":
        static, cdm = rows["static head"], rows["CDM"]
        tscam, tscam_rpam = (static, "cls gt_known"), (static, "relation gt_known")
        cdm_alone, lctr = (cdm, "cls gt_known"), (cdm, "relation gt_known")
        cls_alone, relation_alone = ((cdm, f"{part}-only gt_known") for part in ("cls", "relation"))
        pairs = [
            ("RPAM with a static head (TS-CAM + RPAM - TS-CAM)", tscam_rpam, tscam),
            ("RPAM with the CDM (LCTR - CDM)", lctr, cdm_alone),
            ("the CDM without RPAM (CDM - TS-CAM)", cdm_alone, tscam),
            ("the CDM with RPAM (LCTR - TS-CAM + RPAM)", lctr, tscam_rpam),
            ("both (LCTR - TS-CAM)", lctr, tscam),
            ("patch relation alone - class attention alone", relation_alone, cls_alone),
            ("LCTR - its class attention alone", lctr, cls_alone),
            ("LCTR - its patch relation alone", lctr, relation_alone),
            ("Top-1 Cls: CDM - static head", (cdm, "top1_cls"), (static, "top1_cls")),
            ("Top-1 Loc: LCTR - TS-CAM", (cdm, "relation top1_loc"), (static, "cls top1_loc")),
        ]
    else:
        default = next(name for name, row in rows.items() if not row)
        for name, row in rows.items():
            if row:
                pairs += [(f"GT-known: {name} - {default}",
                           (row, "relation gt_known"), ((), "relation gt_known")),
                          (f"Top-1 Cls: {name} - {default}", (row, "top1_cls"), ((), "top1_cls"))]
    for label, a, b in pairs:
        result["differences"][label] = difference(runs.hits(*a), runs.hits(*b))
    return result


def figure(value: dict) -> str:
    deviation = f" ± {value['std']:.1f}" if value["std"] is not None else ""
    return f"{value['mean']:.1f}{deviation}"


def gain(value: dict) -> str:
    bounds = "one seed" if value["low"] is None else f"{value['low']:+.1f} to {value['high']:+.1f}"
    return f"{value['mean']:+.1f} ({bounds})"


def markdown(title: str, result: dict) -> str:
    """The three tables of a result."""
    lines = [f"#### {title}", "", "| row | Top-1 Cls | Top-1 Loc | GT-known |",
             "| --- | ---: | ---: | ---: |"]
    lines += [f"| {name} | {figure(row['top1_cls'])} | {figure(row['top1_loc'])} | "
              f"{figure(row['gt_known'])} |" for name, row in result["rows"].items()]
    lines += ["", "| difference | points (95 % over seeds and images) | std over seeds |",
              "| --- | ---: | ---: |"]
    lines += [f"| {name} | {gain(value)} | {value['std'] or 0:.1f} |"
              for name, value in result["differences"].items()]
    names = list(result["causes"])
    lines += ["", f"| cause | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    keys = dict.fromkeys(key for name in names for key in result["causes"][name])
    for key in keys:
        cells = [f"{causes[key]['mean']:.3g}" if key in causes else ""
                 for causes in result["causes"].values()]
        lines.append(f"| `{key}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def what_rpam_needs(known: dict, extra: str) -> str:
    """The four regimes side by side, once Table 8 of all of them is known."""
    rpam = "RPAM with the CDM (LCTR - CDM)"
    gains = (rpam, "patch relation alone - class attention alone")
    names = ("CDM, class attention alone", "CDM, patch relation alone", "CDM", "LCTR")
    lines = ["| class attention sees, patch tokens | Top-1 Cls | M~c alone | M^r alone | CDM | "
             "LCTR | LCTR - CDM | M^r - M~c alone |", "| --- |" + " ---: |" * 7]
    by_seed = []
    for regime in REGIMES:
        table = known.get(", ".join(filter(None, ("Table 8", regime, extra))))
        if not table:
            return ""
        values = [table["rows"]["LCTR"]["top1_cls"]]
        values += [table["rows"][name]["gt_known"] for name in names]
        cells = [*map(figure, values), *(gain(table["differences"][name]) for name in gains)]
        lines.append(f"| {regime} | {' | '.join(cells)} |")
        by_seed.append(table["differences"][rpam]["by_seed"])
    seeds = min(map(len, by_seed))  # that all regimes have
    trained, untrained = np.reshape([found[:seeds] for found in by_seed], (2, 2, -1)).mean(0)
    lines += ["", "Training the patch tokens changes LCTR - CDM by "
              f"{gain(interval(trained - untrained))} points, over seeds."]
    return "\n".join(["#### What RPAM needs", "", *lines, ""])


def count(text: str) -> int:
    return max(1, int(text))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     epilog="All other flags go to train.py.")
    parser.error = lambda message: parser.exit(2, f"study.py: error: {message}\n")
    parser.add_argument("tables", nargs="+", choices=[*TABLES, "all"], metavar="table",
                        help=f"{', '.join(TABLES)}, or all")
    parser.add_argument("--seeds", type=count, default=3,
                        help="runs of each row, seeds 0, 1, ... (default 3)")
    parser.add_argument("--jobs", type=count, default=1,
                        help="runs at a time, which share the cores (default 1)")
    parser.add_argument("--regime", choices=REGIMES, help="only this pretraining of the birds")
    parser.add_argument("--data", default="synthetic")
    parser.add_argument("--root")
    parser.add_argument("--limit-test", type=count, help="score that many images of val and test")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the runs")
    parser.add_argument("--results", type=Path,
                        help="JSON to add the tables to; .md beside it (default: study.json "
                        "in --out)")
    argv = sys.argv[1:] if argv is None else argv
    flags, extra = parser.parse_known_args(argv)
    tables = list(TABLES) if "all" in flags.tables else flags.tables
    regimes = REGIMES if flags.data == "synthetic" else {"as given": ()}
    if flags.regime and flags.data == "synthetic":
        regimes = {flags.regime: REGIMES[flags.regime]}
    results = flags.results or flags.out / "study.json"
    try:
        run_all(flags, extra, regimes, tables)
        known = json.loads(results.read_text()) if results.exists() else {}
        made = about("docs/experiments/study.py", argv) | {"seeds": flags.seeds}
        for regime in regimes:
            for table in tables:
                name = f"Table {table}" if table.isdigit() else table
                title = ", ".join(filter(None, (name, regime, " ".join(extra))))
                known[title] = made | tabulate(table, Runs(flags.out, regime, flags.seeds))
        write_text(results, json.dumps(known, indent=1))
        page = [what_rpam_needs(known, " ".join(extra)),
                *(f"{markdown(title, result)}\n\n    {result['command']}\n"
                  for title, result in known.items())]
        write_text(results.with_suffix(".md"), "\n".join(page))
        print("\n".join(["", *page]))
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"study.py: error: {error}")


if __name__ == "__main__":
    main()
