"""Evaluates classification and localisation on a data set, or finds boxes in your own photographs.

    python evaluate.py --checkpoint runs/X/best.pt                  # the run's own data, test split
    python evaluate.py --checkpoint runs/X/best.pt --split val --threshold auto --gt-class
    python evaluate.py --checkpoint runs/tscam/best.pt runs/lctr/best.pt --out both     # one table
    python evaluate.py --checkpoint runs/X/best.pt --images a.jpg folder/ --out boxes
    python evaluate.py --checkpoint vit_s14.pth --images a.jpg      # attention alone, no training

The script reads from top to bottom: forward pass, boxes, metrics, report, photographs, command
line. What every number means, and where the choices are made:

    class       the map is the predicted class's (Eq. 3), or with --gt-class the label's
    map         a coupling says which maps are multiplied (lctr.fuse); one forward pass serves all
    box         map enlarged to the input, min-max normalised, value > threshold, its largest
                8-connected component (largest_boxes)
    IoU         half-open boxes, best over the image's annotated boxes, above 0.5 for a hit
    frame       the whole image squashed to the network's input; --crop SIZE its centre
    threshold   --threshold, the checkpoint's own, or the best on val; never the best on the split
                that is evaluated

Oracles use the label's map and pick their threshold on the evaluated split itself: the literature's
MaxBoxAcc and MaxBoxAccV2.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import data
from lctr import COUPLINGS, LCTR, MODEL_FLAGS, Localization, fuse, load_checkpoint, load_pretrained
from support import weights
from support.boxes import (baseline_iou, box_iou, boxes_and_iou, enlarge, largest_boxes, to_image,
                           to_input)
from support.common import (FlagError, autocast, minmax, one_line, pair, printable, progress,
                            say, write_atomic, write_json, write_text)
from support.pictures.folders import find_images
from support.pictures.readers import spread
from support.report.failures import FAILURES, HIT, failure_kinds
from support.report.figures import (Examples, class_name, draw_curve, draw_failures, draw_gallery,
                                    draw_own, is_ours, write_png)
from support.report.outputs import REPORT_FILES, claim, output_names, run_names
from support.report.table import format_table
from support.runs.evaluate_flags import parse_flags as evaluate_flags

THRESHOLDS = [i / 100 for i in range(100)]  # of curves and oracles
DEFAULT_THRESHOLD = 0.2  # CAM's, for a checkpoint that names none
LABELS = {  # what a coupling is called in the literature, by head
    "cdm": {"none": "CDM's class map", "cls": "CDM", "relation": "LCTR"},
    "conv": {"none": "CAM", "cls": "TS-CAM", "relation": "TS-CAM + RPAM"},
    "token": {},
}
ATTENTION_LABELS = {"cls-only": "class attention alone", "relation-only": "patch relation alone"}
PRODUCTS = {  # which maps a coupling multiplies
    "none": "ReLU(class map)", "cls": "ReLU(class map) * M~c",
    "relation": "ReLU(class map) * M^r", "cls-only": "M~c", "relation-only": "M^r",
}


def couplings_of(model: LCTR) -> tuple[str, ...]:
    """The couplings that the model has maps for: a "token" head has no class maps."""
    return tuple(c for c in COUPLINGS if c in LABELS[model.head_type] | ATTENTION_LABELS)


def default_coupling(model: LCTR) -> str:
    """Eq. 3's, or M^r alone on a "token" head."""
    return "relation" if "relation" in couplings_of(model) else "relation-only"


def coupling_label(head: str, coupling: str) -> str:
    return (LABELS[head] | ATTENTION_LABELS)[coupling]


# ---------------------------------------------------------------- forward pass

@dataclass(frozen=True)
class Evaluation:
    """What one pass over n images gives, in data set order, for Q couplings and t thresholds."""

    head: str
    img_size: tuple[int, int]  # (height, width) of the input
    couplings: tuple[str, ...]
    thresholds: list[float]  # ascending: THRESHOLDS and the requested one, or it alone
    gt_class: bool  # whose map `box` and `iou` are: the label's, or the predicted class's
    amp: str  # precision of the forward pass

    path: list[str]
    label: np.ndarray  # (n,)
    top5: np.ndarray  # (n, min(5, C)) class ids, the likeliest first
    boxes: list[Tensor]  # (M, 4) each: annotated, in the image's pixels
    view: np.ndarray  # (n, 4): the part of the image that the network sees
    baseline: np.ndarray  # (n, 2) IoU of the whole image and of the centred box of half its area
    # None without couplings:
    box: np.ndarray | None = None  # (n, Q, t, 4) int16 in the input's frame
    iou: np.ndarray | None = None  # (n, Q, t) float32
    # the label's map: its largest box's IoU >= 0.5, any component's >= 0.3, 0.5, 0.7
    oracle: np.ndarray | None = None  # (n, Q, t, 4) bool
    # None unless kept, on the patch grid:
    class_map: np.ndarray | None = None  # (n, h, w) before any ReLU: predicted class or label
    cls_map: np.ndarray | None = None  # (n, h, w)
    relation_map: np.ndarray | None = None  # (n, h, w)

    @property
    def annotated(self) -> np.ndarray:
        """(n,): which images have boxes, and so count for localisation."""
        return np.array([len(boxes) > 0 for boxes in self.boxes])

    def at(self, coupling: str, threshold: float) -> tuple[int, int]:
        """Where `box`, `iou` and `oracle` have a coupling and a threshold that were evaluated."""
        return self.couplings.index(coupling), self.thresholds.index(threshold)


@torch.no_grad()
def evaluate_model(
    model: LCTR,
    dataset: torch.utils.data.Dataset,
    *,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    workers: int = 0,
    couplings: Sequence[str] | None = None,
    threshold: float | None = None,
    gt_class: bool = False,
    keep_maps: bool = False,
    amp: str = "off",
) -> Evaluation:
    """Classifies and localises every image of the data set once. Its model must be on `device`.

    couplings: those to evaluate; None for all that the head has, () for classification alone.
    threshold: one besides THRESHOLDS; where the data has no boxes, it alone is evaluated.
    gt_class: `box` and `iou` come from the label's map. keep_maps: the maps on the patch grid stay
    too. amp: the precision of the forward pass; maps are float32. Under torch.distributed each
    process takes its share and all get the whole result, the same for any number of them.
    """
    couplings = couplings_of(model) if couplings is None else tuple(couplings)
    thresholds = sorted({*THRESHOLDS, *([] if threshold is None else [threshold])})
    if getattr(dataset, "annotated", True) == 0:  # no box to compare other thresholds' with
        thresholds = [DEFAULT_THRESHOLD if threshold is None else threshold]
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = np.array_split(np.arange(len(dataset)), world)[rank].tolist()
    batches = [share[i:i + batch_size] for i in range(0, len(share), batch_size)]
    loaded = data.loader(dataset, batches, workers)
    name = getattr(dataset, "name", "images")
    parts, training = [], model.training
    model.eval()
    for _, batch in zip(progress(batches, f"evaluating {name}", rank == 0), loaded):
        # forward pass: the maps of the predicted class and of the label
        labels = batch["label"].to(device)
        classes = torch.stack([torch.full_like(labels, -1), labels], 1)  # (B, 2)
        localization = localize(model, batch["image"], classes, amp)

        # the box of every coupling at every threshold, against the annotated boxes
        ground_truth = to_input(batch["boxes"], batch["view"], model.img_size)  # (B, M, 4)
        part = {
            "label": labels, "view": batch["view"],
            "top5": localization.logits.topk(min(5, localization.logits.shape[1])).indices,
            "baseline": baseline_iou(ground_truth, model.img_size)}
        if couplings:
            with one_thread():
                part |= evaluate_boxes(localization, ground_truth.to(device), model.img_size,
                                       couplings, thresholds, gt_class)
        if keep_maps:
            part |= {"cls_map": localization.cls_map, "relation_map": localization.relation_map}
            if localization.class_maps is not None:
                part["class_map"] = localization.class_maps[:, int(gt_class)]
        part = {key: value.cpu().numpy() for key, value in part.items()}
        parts.append(part | {"path": batch["path"], "boxes": batch["boxes"]})
    model.train(training)

    # all processes' batches in data set order
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, parts)
        parts = list(itertools.chain(*gathered))
    if not parts:
        raise ValueError(f"{name}: no images to evaluate")
    columns = {key: [part[key] for part in parts] for key in parts[0]}
    columns = {key: np.concatenate(values) if isinstance(values[0], np.ndarray)
               else list(itertools.chain(*values)) for key, values in columns.items()}
    return Evaluation(model.head_type, model.img_size, couplings, thresholds, gt_class, amp,
                      **columns)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For hundreds of small operations: to share each among threads costs more than it saves.

    torch's number of threads is the whole process's, so only the main thread changes it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def localize(model: LCTR, images: Tensor, classes: Tensor, amp: str) -> Localization:
    """model.localize of uint8 images, on its device, in that precision; its maps are float32."""
    device = next(model.parameters()).device
    with autocast(device, amp):
        localization = model.localize(data.normalise(images.to(device)), classes.to(device))
    return Localization(*(value.float() if value is not None and value.is_floating_point()
                          else value for value in localization))


# ---------------------------------------------------------------- boxes

def stack_couplings(localization: Localization, couplings: Sequence[str]) -> Tensor:
    """The fused maps of K classes under each of Q couplings: (B, Q, K, h, w)."""
    return torch.stack([fuse(localization, coupling) for coupling in couplings], 1)


def evaluate_boxes(
    localization: Localization, ground_truth: Tensor, img_size: tuple[int, int],
    couplings: Sequence[str], thresholds: list[float], gt_class: bool,
) -> dict[str, Tensor]:
    """An Evaluation's box, iou and oracle of B images; ground_truth (B, M, 4), input's frame."""
    Q = len(couplings)
    maps = stack_couplings(localization, couplings).flatten(0, 1)  # (B*Q, 2, h, w)
    ground_truth = ground_truth.repeat_interleave(Q, 0)  # (B*Q, M, 4)

    # the label's map where it is another than the predicted class's: no map is evaluated twice
    predicted_maps, label_maps = maps.unbind(1)
    other = (predicted_maps != label_maps).flatten(1).any(1)  # (B*Q,)
    maps = torch.cat([predicted_maps, label_maps[other]])
    rows = torch.arange(len(other), device=other.device)
    label_rows = torch.where(other, len(other) + other.cumsum(0) - 1, rows)  # of each label's map
    box, iou, any_iou = boxes_and_iou(
        maps, torch.cat([ground_truth, ground_truth[other]]), img_size, thresholds)

    chosen = label_rows if gt_class else rows
    any_iou = any_iou[label_rows]
    oracle = torch.stack([iou[label_rows] >= 0.5, *(any_iou >= bar for bar in (0.3, 0.5, 0.7))], -1)
    results = {"box": box[chosen], "iou": iou[chosen], "oracle": oracle}
    return {name: value.unflatten(0, (-1, Q)) for name, value in results.items()}


# ---------------------------------------------------------------- metrics

def summarise(evaluation: Evaluation, threshold: float) -> dict:
    """All metrics of a pass at one threshold, as metrics.json has them: percent, unrounded.

    top1_cls, top5_cls: the label is the predicted class, or among the five likeliest; over all n
    images. All others are over the n_boxes images with annotated boxes, None where there are none:
    gt_known: IoU > 0.5. top1_loc, top5_loc: gt_known and top1_cls, top5_cls (the paper's rule: one
      box per image, while TS-CAM's code gives each of the five classes a box of its own).
      mean_iou of that box, in [0, 1]. gt_known_curve: at each threshold.
    best_threshold: where gt_known_curve peaks: an oracle, shown beside the threshold in use.
    max_box_acc: IoU >= 0.5 of the label's map's largest component, at the best threshold after
      averaging over images. max_box_acc_v2: the same for any component, best threshold for
      each of IoU >= 0.3, 0.5, 0.7, then averaged. Oracles both.
    failures: the share of each of FAILURES. baselines: gt_known of two fixed boxes.
    """
    has = evaluation.annotated  # (n,)
    correct = evaluation.top5 == evaluation.label[:, None]  # (n, 5)
    top1, top5 = correct[:, 0], correct.any(1)
    metrics = {
        "n": len(has), "n_boxes": int(has.sum()), "head": evaluation.head, "threshold": threshold,
        "map_class": "label" if evaluation.gt_class else "predicted", "amp": evaluation.amp,
        "top1_cls": percent(top1), "top5_cls": percent(top5),
        "thresholds": THRESHOLDS, "couplings": {},
        "baselines": {"whole_image": percent(evaluation.baseline[has, 0] > HIT),
                      "centred_box": percent(evaluation.baseline[has, 1] > HIT)},
    }
    for coupling in evaluation.couplings:
        q, t = evaluation.at(coupling, threshold)
        iou = evaluation.iou[has, q]  # (n_boxes, t)
        hit = iou > HIT
        row = {"label": coupling_label(evaluation.head, coupling), "product": PRODUCTS[coupling],
               "top1_loc": percent(hit[:, t] & top1[has]),
               "top5_loc": percent(hit[:, t] & top5[has]), "gt_known": percent(hit[:, t]),
               "mean_iou": None, "gt_known_curve": [None] * len(THRESHOLDS),
               "max_box_acc": None, "max_box_acc_v2": None, "best_threshold": None}
        if has.any():
            curve = [evaluation.thresholds.index(value) for value in THRESHOLDS]
            known = [percent(column) for column in hit[:, curve].T]
            oracle = evaluation.oracle[has, q][:, curve].mean(0) * 100  # (100, 4)
            row |= {"mean_iou": float(iou[:, t].mean(dtype=np.float64)), "gt_known_curve": known,
                    "max_box_acc": float(oracle[:, 0].max()),
                    "max_box_acc_v2": float(oracle[:, 1:].max(0).mean()),
                    "best_threshold": THRESHOLDS[int(np.argmax(known))]}
        kinds = failure_kinds(evaluation, coupling, threshold)[has]
        row["failures"] = {name: percent(kinds == kind) for kind, name in enumerate(FAILURES)}
        metrics["couplings"][coupling] = row
    return metrics


def percent(hits: np.ndarray) -> float | None:
    return 100 * float(hits.mean()) if len(hits) else None


def best_threshold(evaluation: Evaluation, coupling: str) -> float:
    """The first of THRESHOLDS with the highest gt_known: to choose on val, never on test."""
    if not evaluation.annotated.any():
        raise ValueError("threshold: auto needs annotated boxes, the images have none")
    return summarise(evaluation, THRESHOLDS[0])["couplings"][coupling]["best_threshold"]


# ---------------------------------------------------------------- report

@torch.no_grad()
def examine(
    model: LCTR, images: Tensor, classes: Tensor, couplings: Sequence[str], threshold: float,
    amp: str,
) -> tuple[Tensor, np.ndarray, Tensor]:
    """Of a few images (B, 3, H, W) and a class id each, -1 for the predicted class, for pictures:

    logits (B, C), min-max normalised maps (B, Q, H, W), their boxes (B, Q, 4) in the input's frame.
    """
    localization = localize(model, images, classes[:, None], amp)
    maps = enlarge(stack_couplings(localization, couplings)[:, :, 0], model.img_size)
    box = largest_boxes(maps.flatten(0, 1), [threshold]).view(*maps.shape[:2], 4)
    return localization.logits.cpu(), minmax(maps).cpu().numpy(), box.cpu()


def examples_of(
    model: LCTR, dataset: torch.utils.data.Dataset, evaluation: Evaluation,
    indices: Sequence[int], couplings: Sequence[str], threshold: float,
) -> Examples:
    """A few images of a data set, localised again as they were evaluated, for their maps."""
    batch = data.collate([dataset[int(i)] for i in indices])
    classes = batch["label"] if evaluation.gt_class else torch.full_like(batch["label"], -1)
    logits, heat, box = examine(
        model, batch["image"], classes, couplings, threshold, evaluation.amp)
    ground_truth = to_input(batch["boxes"], batch["view"], model.img_size)  # (n, M, 4)
    iou = box_iou(box[:, :, None], ground_truth[:, None]).amax(-1)
    return Examples(
        batch["image"].movedim(1, 3).numpy(), batch["view"].tolist(), batch["label"].tolist(),
        logits.argmax(1).tolist(),
        [rows[:len(boxes)].numpy() for rows, boxes in zip(ground_truth, batch["boxes"])],
        heat, box.numpy(), iou.numpy())


def report(
    out: str | Path, model: LCTR, dataset: torch.utils.data.Dataset, evaluation: Evaluation,
    metrics: dict, coupling: str, threshold: float, **about: object,
) -> dict:
    """Writes predictions.jsonl, gallery.png, curve.png, failures.png and, last, metrics.json.

    They go into the folder `out`. The model is in eval mode. about: what else metrics.json shall
    say (checkpoint, data, split, frame, where the threshold came from). No curve.png where no image
    has a box. Returns what metrics.json holds.
    """
    out, n = Path(out), len(evaluation.label)
    out.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(line) + "\n" for line in predictions(evaluation, coupling, threshold))
    write_text(out / "predictions.jsonl", "".join(lines))

    # a few images under every coupling
    where = f"{dataset.name} {getattr(dataset, 'split', about.get('split', ''))}".strip()
    whose = "label" if evaluation.gt_class else "predicted class"
    boxes = f"Boxes at threshold {threshold:g} of the {whose}'s min-max normalised map"
    boxes += "; in white their IoU in %." if metrics["n_boxes"] else "."
    shown = spread(n, 8)
    titles = [(coupling_label(evaluation.head, c), PRODUCTS[c]) for c in evaluation.couplings]
    note = f"{len(shown)} of the {n} images of {where}, evenly spread. {boxes}"
    examples = examples_of(model, dataset, evaluation, shown, evaluation.couplings, threshold)
    write_png(out / "gallery.png", draw_gallery([examples], [titles], dataset.classes, note))

    # gt_known over thresholds
    if metrics["n_boxes"]:
        note = f"{metrics['n_boxes']} images of {where}, the {whose}'s map"
        write_png(out / "curve.png", draw_curve(metrics, coupling, note))
    elif is_ours(out / "curve.png"):  # an earlier run's
        (out / "curve.png").unlink()

    # a few images of each kind of failure
    kinds, groups = failure_kinds(evaluation, coupling, threshold), []
    for kind, (name, meaning) in enumerate(FAILURES.items()):
        failed = np.flatnonzero(kinds == kind)
        if len(failed):
            shown = failed[spread(len(failed), 6)]
            title = f"{name} ({meaning}): {len(failed)} of {n} images, {len(shown)} shown"
            examples = examples_of(model, dataset, evaluation, shown, [coupling], threshold)
            groups.append((title.capitalize(), examples))
    label = coupling_label(evaluation.head, coupling)
    note = f"The {n} images of {where}. Map: {label} = {PRODUCTS[coupling]}. {boxes}"
    write_png(out / "failures.png", draw_failures(groups, dataset.classes, note))
    metrics = metrics | {"coupling": coupling} | about
    write_json(out / "metrics.json", metrics)
    return metrics


def predictions(evaluation: Evaluation, coupling: str, threshold: float) -> Iterator[dict]:
    """predictions.jsonl, an entry per image: boxes in its upright pixels; iou None without any."""
    at = evaluation.at(coupling, threshold)
    box = torch.from_numpy(evaluation.box[:, *at])[:, None]  # (n, 1, 4)
    box = to_image(box, torch.from_numpy(evaluation.view), evaluation.img_size)[:, 0].tolist()
    for i, boxes in enumerate(evaluation.boxes):
        yield {"path": evaluation.path[i], "label": int(evaluation.label[i]),
               "top5": evaluation.top5[i].tolist(), "box": box[i], "boxes": boxes.tolist(),
               "iou": float(evaluation.iou[i, *at]) if len(boxes) else None}


def save_maps(path: str | Path, evaluation: Evaluation) -> None:
    """maps.npz, for metrics of your own.

    cls_map M~c and relation_map M^r (n, h, w), label (n,), path (n,), and, where the head has
    them, class_map (n, h, w) before any ReLU, with `class` (n,), the class it belongs to.
    """
    kept = {name: getattr(evaluation, name) for name in ("class_map", "cls_map", "relation_map")}
    arrays = {name: maps for name, maps in kept.items() if maps is not None}
    arrays |= {"label": evaluation.label, "path": np.array(evaluation.path),
               "class": evaluation.label if evaluation.gt_class else evaluation.top5[:, 0]}
    write_atomic(path, lambda file: np.savez(file, **arrays))


# ---------------------------------------------------------------- your own photographs

def localise_photographs(subject: "Subject", flags: Namespace) -> int:
    """A picture for each photograph and boxes.json; returns the exit status.

    A photograph that cannot be read, or its picture written, is named and skipped; boxes.json is
    written whatever happens.
    """
    _, model, checkpoint, coupling, threshold, _ = subject
    classes, couplings, entries = checkpoint["classes"], [coupling], []
    if model.head_type == "token" and not flags.coupling:  # no class map: both attention maps
        couplings = ["cls-only", "relation-only"]
    titles = [(coupling_label(model.head_type, c), PRODUCTS[c]) for c in couplings]
    text = f"Box at threshold {threshold:g} of the min-max normalised map."
    text += " No class was trained: the maps are the backbone's attention." * (not classes)
    paths, notes = find_images(flags.images)
    print_notes(notes)
    if not paths:
        raise FlagError(f"--images: no picture in {', '.join(map(printable, flags.images))}")
    names = output_names(paths)
    claim({flags.out: [*names, "boxes.json"]}, inputs=paths)
    try:
        for path, file in zip(paths, (flags.out / name for name in names)):
            try:
                # the predicted class's maps, their boxes in the photograph's pixels
                image, view, size = data.load_image(path, model.img_size, flags.crop)
                logits, heat, box = examine(
                    model, image[None], torch.tensor([-1]), couplings, threshold, flags.amp)
                boxes = to_image(box, torch.tensor([view]), model.img_size)[0].tolist()
                chances, ids = logits[0].softmax(0).topk(min(5, len(classes)))
                top5 = list(zip(ids.tolist(), chances.tolist()))

                # the picture
                caption = ", ".join(f"{class_name(classes, c)} {100 * p:.1f} %"
                                    for c, p in top5[:3])
                write_png(file, draw_own(data.open_image(path), view, titles, heat[0], boxes,
                                         caption, text))
            except (ValueError, OSError) as error:
                print(f"evaluate.py: skipped: {one_line(error, path)}", file=sys.stderr)
                continue

            # the entry of boxes.json
            by_coupling = dict(zip(couplings, boxes))
            entry = {"path": str(path), "size": list(size),
                     "top5": [[classes[c], p] for c, p in top5], "box": by_coupling[coupling]}
            entries.append(entry | ({"boxes": by_coupling} if len(couplings) > 1 else {}))
            best = "".join(f"{classes[c]} ({100 * p:.1f} %), " for c, p in top5[:1])
            corners = " ".join(f"{v:.0f}" for v in by_coupling[coupling])
            say(printable(f"{path} -> {file}: {best}box {corners}"))
    finally:
        write_json(flags.out / "boxes.json", entries)
    skipped = len(paths) - len(entries)
    say(f"{len(entries)} pictures and boxes.json in {printable(flags.out)}"
        + f", {skipped} skipped" * bool(skipped))
    return 1 if skipped else 0


# ---------------------------------------------------------------- the script

class Subject(NamedTuple):
    """One checkpoint of those evaluated."""

    path: str
    model: LCTR
    checkpoint: dict  # classes, config, metrics, phase
    coupling: str
    threshold: float | str  # "auto": the best on val, which is yet to be evaluated
    threshold_from: str


def load(path: str, flags: Namespace) -> Subject:
    """A checkpoint's model on the device; with --images a backbone without a head will do."""
    try:
        model, checkpoint = load_checkpoint(path)
    except ValueError:
        content = weights.read_weights(path) if flags.images else {"config": None}
        if "config" in content:
            raise
        model, checkpoint = backbone(path, content, flags.img_size)
    config, classes = checkpoint["config"], checkpoint["classes"]
    if checkpoint["phase"] == "external" and classes:
        say(f"{path}: sizes read off its shapes, {config['num_heads']} attention heads (64 "
            "channels each where the file does not say)")
    if flags.img_size and pair(flags.img_size) != model.img_size:
        state, grid = model.state_dict(), model.grid
        model = build(len(classes), {flag: config[flag] for flag in MODEL_FLAGS}, flags.img_size)
        state["pos_embed"] = weights.resize_pos_embed(state["pos_embed"], grid, model.grid)
        model.load_state_dict(state)

    # what the flags ask of it
    coupling, least = flags.coupling or default_coupling(model), max(model.img_size)
    if coupling not in couplings_of(model):
        raise FlagError(f"--coupling: {path} has a {model.head_type} head, whose couplings are "
                        f"{', '.join(couplings_of(model))}")
    if flags.crop and flags.crop < least:
        raise FlagError(f"--crop: got {flags.crop}, need at least {least}, the side of {path}'s "
                        "input")
    threshold, source = flags.threshold, "--threshold"
    if threshold is None:
        threshold, source = own_threshold(path, checkpoint.get("metrics"))
    return Subject(path, model.to(flags.device), checkpoint, coupling, threshold, source)


def own_threshold(path: str, metrics: object) -> tuple[float, str]:
    """The threshold that a checkpoint's metrics name, or CAM's, and which of the two it is."""
    threshold = metrics.get("threshold") if isinstance(metrics, dict) else None
    if threshold is None:
        return DEFAULT_THRESHOLD, "CAM's, since the checkpoint names none"
    if type(threshold) not in (int, float) or not 0 <= threshold < 1:
        raise ValueError(f"{path}: its threshold is {threshold!r}, need a number in [0, 1): give "
                         "--threshold")
    return threshold, "the checkpoint's own"


def build(num_classes: int, config: dict, img_size: int | list[int] | None) -> LCTR:
    try:
        return LCTR(num_classes, **config | {"img_size": img_size or config["img_size"]}).eval()
    except ValueError as error:
        raise FlagError(f"--img-size: {error}") from None


def backbone(path: str, content: dict, img_size: int | list[int] | None) -> tuple[LCTR, dict]:
    """A backbone alone, for a first look at its attention, and a checkpoint without classes."""
    state, _, about = weights.read_state(content, path)
    config = weights.architecture(state, about, path) | {"head": "token"}
    model = build(1, config, img_size)  # its head is never looked at
    say(f"{path}: no class was trained: attention alone, {config['depth']} blocks, "
        f"{config['num_heads']} attention heads (64 channels each where the file does not say), "
        f"input {' x '.join(map(str, model.img_size))}")
    say(load_pretrained(model, path))
    return model, {"classes": [], "phase": "external",
                   "config": config | {"img_size": model.img_size}}


def choose_data(subjects: Sequence[Subject], flags: Namespace) -> None:
    """Fills in --data and --root: one set for all checkpoints, by default the first one's."""
    first = subjects[0].checkpoint["config"]
    own = not flags.root and flags.data in (None, first.get("data"))
    flags.root = first.get("root") if own else flags.root
    flags.data = flags.data or first.get("data")
    if flags.images and flags.threshold != "auto":
        return
    if flags.data is None:
        raise FlagError(f"--data: missing, {subjects[0].path} names no data set")
    if flags.data == "synthetic" and flags.root:
        raise FlagError("--root: the synthetic birds are drawn, not read: leave it out")
    if flags.data != "synthetic" and flags.root is None:
        raise FlagError(f"--root: {flags.data} needs the data set's folder")
    if flags.threshold == "auto" and not data.has_split(flags.data, flags.root, "val"):
        raise FlagError(f"--threshold: auto needs a val split, {flags.data} has none: give a "
                        "number")
    for path, _, checkpoint, *_ in subjects:
        root = checkpoint["config"].get("root")
        if own and root and os.path.realpath(root) != os.path.realpath(flags.root or ""):
            say(f"note: {path} was trained on {printable(root)}, but all are evaluated on "
                f"{printable(flags.root or flags.data)}: --root chooses another")


def load_split(subject: Subject, flags: Namespace, split: str) -> torch.utils.data.Dataset:
    """A split of the data set. Raises ValueError where its classes are not the checkpoint's."""
    known, external = subject.checkpoint["classes"], subject.checkpoint["phase"] == "external"
    dataset = data.load_dataset(
        flags.data, flags.root, split, subject.model.img_size, limit=flags.limit_test,
        crop=flags.crop, augment=False,
        classes=None if external else known)  # a folder of pictures to test on needs no train/
    classes = dataset.classes
    numbered = external and len(known) == len(classes)  # its file has no names to compare
    if list(known) != list(classes) and not numbered:
        pairs = enumerate(itertools.zip_longest(known, classes, fillvalue="nothing"))
        i, theirs, ours = next((i, a, b) for i, (a, b) in pairs if a != b)
        raise ValueError(
            f"{subject.path}: its {len(known)} classes are not the {len(classes)} of {flags.data} "
            f"{split}: class {i} is {theirs!r} there, {ours!r} here")
    return dataset


def print_notes(notes: Sequence[str]) -> None:
    """What was left out, clipped or taken on trust in the data, each once."""
    for note in dict.fromkeys(notes):
        say(f"note: {printable(note)}")


def with_threshold(subject: Subject, flags: Namespace) -> Subject:
    """The subject with a number where its threshold is "auto"; says what is evaluated, and how."""
    if subject.threshold == "auto":
        val_set = load_split(subject, flags, "val")
        print_notes(val_set.notes)
        evaluation = evaluate_model(
            subject.model, val_set, batch_size=flags.batch_size, device=flags.device,
            workers=flags.workers, couplings=[subject.coupling], amp=flags.amp)
        subject = subject._replace(threshold=best_threshold(evaluation, subject.coupling),
                                   threshold_from=f"the best gt-known of {len(val_set)} val images")
    path, model, _, coupling, threshold, source = subject
    say(f"{path}: {coupling_label(model.head_type, coupling)} ({coupling}), threshold "
        f"{threshold:g} ({source}), on {flags.device}, amp {flags.amp}")
    return subject


def evaluate(flags: Namespace) -> int:
    """Everything that the flags request; returns the exit status."""
    # the checkpoints
    subjects = [load(path, flags) for path in flags.checkpoint]
    choose_data(subjects, flags)
    if flags.images:
        return localise_photographs(with_threshold(subjects[0], flags), flags)

    # the data, the same for all
    datasets = [load_split(subject, flags, flags.split) for subject in subjects]
    print_notes([note for dataset in datasets for note in dataset.notes])
    for subject, dataset in zip(subjects, datasets):
        if list(dataset.classes) != list(datasets[0].classes):
            raise ValueError(f"{subject.path}: its classes are not those of {subjects[0].path}")

    # the files to be written: a folder for each of several checkpoints
    several = len(subjects) > 1
    names = run_names(flags.checkpoint) if several else [""]
    files = [*REPORT_FILES, *["maps.npz"] * flags.save_maps]
    joint = {flags.out: ["metrics.json", "gallery.png"]} if several else {}
    claim(joint | {flags.out / name: files for name in names})

    all_metrics, examples, titles = [], [], []
    for subject, dataset, name in zip(subjects, datasets, names):
        # forward pass, boxes, metrics
        subject = with_threshold(subject, flags)
        path, model, _, coupling, threshold, source = subject
        evaluation = evaluate_model(
            model, dataset, batch_size=flags.batch_size, device=flags.device,
            workers=flags.workers, threshold=threshold, gt_class=flags.gt_class,
            keep_maps=flags.save_maps, amp=flags.amp)
        metrics = summarise(evaluation, threshold)

        # the report
        frame = f"centre crop of {flags.crop}" if flags.crop else "whole image"
        metrics = report(
            flags.out / name, model, dataset, evaluation, metrics, coupling, threshold,
            threshold_from=source, checkpoint=str(path), data=dataset.name, split=flags.split,
            frame=frame)
        all_metrics.append(metrics | {"name": name})
        if flags.save_maps:
            save_maps(flags.out / name / "maps.npz", evaluation)

        # its part of the gallery of all
        if several:
            shown = [c for c in evaluation.couplings
                     if c in ("cls", "relation", coupling) or model.head_type == "token"]
            titles.append([(f"{name}: {coupling_label(model.head_type, c)}", PRODUCTS[c])
                           for c in shown])
            examples.append(examples_of(model, dataset, evaluation, spread(len(dataset), 8), shown,
                                        threshold))

    # one table, and one gallery, of all
    if several:
        write_json(flags.out / "metrics.json", dict(zip(names, all_metrics)))
        used = ", ".join(f"{m['threshold']:g} ({m['name']})" for m in all_metrics)
        note = (f"{len(examples[0].label)} images of {dataset.name} {flags.split}, evenly spread. "
                f"Boxes at threshold {used} of the min-max normalised map; in white their IoU in "
                "%.")
        write_png(flags.out / "gallery.png",
                  draw_gallery(examples, titles, dataset.classes, note))
    say(f"\n{dataset.name} {flags.split}, {frame}\n{format_table(all_metrics)}\n\n"
        f"report and pictures in {printable(flags.out)}")
    return 0


def parse_flags(argv: Sequence[str] | None = None) -> Namespace:
    description = (__doc__ or "Evaluates.").split("\n\n")[0]
    return evaluate_flags(argv, description, data.DATASETS, COUPLINGS)


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse_flags(argv)
    torch.set_float32_matmul_precision("high")  # as in train.py: TF32 where a GPU has it
    with contextlib.suppress(AttributeError):  # a name or class that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    others = set(multiprocessing.active_children())
    try:
        return evaluate(flags)
    except BrokenPipeError:  # such as by | head: nobody reads on
        pass
    except KeyboardInterrupt:
        print("evaluate.py: stopped", file=sys.stderr)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"evaluate.py: error: {one_line(error, flags.out)}", file=sys.stderr)
        return 2 if isinstance(error, FlagError) else 1
    finally:
        data.end_workers(others)
    return 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
