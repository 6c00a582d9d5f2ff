"""Scores classification and localisation of a data set, or finds boxes in your own photographs.

    python evaluate.py --checkpoint runs/X/best.pt                  # the run's own data, test split
    python evaluate.py --checkpoint runs/X/best.pt --split val --threshold auto --gt-class
    python evaluate.py --checkpoint runs/tscam/best.pt runs/lctr/best.pt --out both     # one table
    python evaluate.py --checkpoint runs/X/best.pt --images a.jpg folder/ --out boxes
    python evaluate.py --checkpoint vit_s14.pth --images a.jpg      # attention alone, no training

What every number means, and where the choices are made:

    class       the map is the predicted class's (Eq. 3), or with --gt-class the label's
    map         a coupling says which maps are multiplied (lctr.fuse); one forward pass serves all
    box         map enlarged to the input, min-max normalised, value > threshold, its largest
                8-connected component
    IoU         half-open boxes, best over the image's annotated boxes, above 0.5 for a hit
    frame       the whole image squashed to the network's input; --crop SIZE its centre
    threshold   --threshold, the checkpoint's own, or the best on val; never the best on the split
                that is scored

Oracles use the label's map and pick their threshold on the scored split itself: the literature's
MaxBoxAcc and MaxBoxAccV2.
"""

import contextlib
import itertools
import json
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import data
from lctr import COUPLINGS, LCTR, MODEL_FLAGS, Localization, fuse, load_checkpoint, load_pretrained
from support import weights
from support.boxes import (baseline_iou, box_iou, enlarge, largest_boxes, score_maps, to_image,
                           to_input)
from support.common import (FlagError, autocast, minmax, one_line, pair, printable, progress,
                            write_atomic, write_json, write_text)
from support.pictures.annotations import nfc
from support.pictures.folders import find_images
from support.report.failures import FAILURES, HIT, failure_groups, failure_kinds
from support.report.figures import (Examples, draw_curve, draw_failures, draw_gallery, evenly, is_ours,
                             write_png)
from support.runs.evaluate_flags import parse_flags as evaluate_flags
from support.report.outputs import claim, run_names
from support.report.photographs import Viewer, write_photographs
from support.report.table import format_table

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


# ---------------------------------------------------------------- scoring: one forward pass

@dataclass
class ImageScores:
    """What is known of each of n images, in data set order, under Q couplings and t thresholds."""
    index: np.ndarray  # (n,)
    label: np.ndarray  # (n,)
    top5: np.ndarray  # (n, min(5, C)) class ids, the likeliest first
    path: list[str]
    boxes: list[Tensor]  # (M, 4) each: annotated, in the image's pixels
    size: np.ndarray  # (n, 2) width, height
    view: np.ndarray  # (n, 4): the part of the image that the network sees
    baseline: np.ndarray  # (n, 2) IoU of the whole image and of the centred box of half its area
    # None without couplings:
    box: np.ndarray | None = None  # (n, Q, t, 4) int16 in the input's frame
    iou: np.ndarray | None = None  # (n, Q, t) float32
    # the label's map: its largest box's IoU >= 0.5, any component's >= 0.3, 0.5, 0.7
    oracle: np.ndarray | None = None  # (n, Q, t, 4) bool
    # on the patch grid, None unless asked for:
    class_map: np.ndarray | None = None  # (n, h, w) before any ReLU: predicted class or label
    cls_map: np.ndarray | None = None  # (n, h, w)
    relation_map: np.ndarray | None = None  # (n, h, w)


@dataclass
class Scores:
    """What one pass over a data set leaves."""

    head: str
    img_size: tuple[int, int]  # (height, width) of the input
    couplings: tuple[str, ...]
    thresholds: list[float]  # ascending: THRESHOLDS and the requested one, or it alone
    gt_class: bool  # whose map `box` and `iou` are: the label's, or the predicted class's
    amp: str  # precision of the forward pass
    seconds: dict[str, float]  # spent in the forward pass and in boxes and IoU
    images: ImageScores

    @property
    def annotated(self) -> np.ndarray:
        """(n,): which images have boxes, and so count for localisation."""
        return np.array([len(boxes) > 0 for boxes in self.images.boxes])

    def at(self, coupling: str, threshold: float) -> tuple[int, int]:
        return self.couplings.index(coupling), threshold_index(self, threshold)


def couplings_of(model: LCTR) -> tuple[str, ...]:
    """The couplings that the model has maps for: a "token" head has no class maps."""
    return tuple(c for c in COUPLINGS if model.head_type != "token" or c in ATTENTION_LABELS)


def default_coupling(model: LCTR) -> str:
    """Eq. 3's, or M^r alone on a "token" head."""
    return "relation" if "relation" in couplings_of(model) else "relation-only"


def coupling_label(head: str, coupling: str) -> str:
    return (LABELS[head] | ATTENTION_LABELS)[coupling]


@torch.no_grad()
def score(
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
) -> Scores:
    """Classifies and localises every image of the data set once. Its model must be on `device`.

    couplings: those to score; None for all that the head has, () for classification alone.
    threshold: one to score besides THRESHOLDS; where the data has no boxes, it alone is.
    gt_class: `box` and `iou` come from the label's map. keep_maps: the maps on the patch grid stay
    too. amp: the precision of the forward pass; maps are float32. Under torch.distributed each
    process takes its share and all get the whole result, the same for any number of them.
    """
    name = getattr(dataset, "name", "images")
    couplings = couplings_of(model) if couplings is None else tuple(couplings)
    requested = [] if threshold is None else [threshold]
    thresholds = sorted({*THRESHOLDS, *requested})
    if getattr(dataset, "annotated", 1) == 0:  # nothing to compare other thresholds' boxes with
        thresholds = requested or [DEFAULT_THRESHOLD]
    rank, world = 0, 1
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    mine = list(range(rank, len(dataset), world))
    batches = [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]

    scores = Scores(model.head_type, model.img_size, couplings, thresholds, gt_class, amp,
                    {"forward": 0.0, "boxes": 0.0}, None)
    parts, was_training = [], model.training
    model.eval()
    loaded = iter(data.loader(dataset, batches, workers))
    for indices in progress(batches, f"scoring {name}", show=rank == 0):
        parts.append(score_batch(model, next(loaded), indices, device, scores, keep_maps))
    model.train(was_training)

    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, parts)
        parts = [part for share in gathered for part in share]
    if not parts:
        raise ValueError(f"{name}: no images to score")
    scores.images = join(parts)
    return scores


def join(parts: Sequence[ImageScores]) -> ImageScores:
    """The batches' scores as one, in data set order."""
    order = np.concatenate([part.index for part in parts]).argsort()

    def column(name: str) -> np.ndarray | list | None:
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], list):
            values = list(itertools.chain(*values))
            return [values[i] for i in order]
        return None if values[0] is None else np.concatenate(values)[order]

    return ImageScores(**{field.name: column(field.name) for field in fields(ImageScores)})


def localize(model: LCTR, images: Tensor, classes: Tensor, amp: str) -> Localization:
    """model.localize in that precision, its maps in float32."""
    with autocast(images.device, amp):
        localization = model.localize(images, classes)
    return Localization(*(value.float() if value is not None and value.is_floating_point()
                          else value for value in localization))


def score_batch(
    model: LCTR, batch: dict, indices: Sequence[int], device: str | torch.device, scores: Scores,
    keep_maps: bool,
) -> ImageScores:
    """One batch, scored as `scores` says; adds to its seconds."""
    images = data.normalise(batch["image"].to(device))
    labels = batch["label"].to(device)
    started = now(device)
    classes = torch.stack([torch.full_like(labels, -1), labels], 1)  # (B, 2): predicted, label
    localization = localize(model, images, classes, scores.amp)
    forwarded = now(device)
    ground_truth = to_input(batch["boxes"], batch["view"], model.img_size)  # (B, M, 4)
    found = {
        "label": labels, "size": batch["size"], "view": batch["view"],
        "top5": localization.logits.topk(min(5, localization.logits.shape[1])).indices,
        "baseline": baseline_iou(ground_truth, model.img_size)}
    if scores.couplings:
        found |= score_couplings(localization, ground_truth.to(device), scores)
    if keep_maps:
        found |= {"cls_map": localization.cls_map, "relation_map": localization.relation_map}
        if localization.class_maps is not None:
            found["class_map"] = localization.class_maps[:, int(scores.gt_class)]
    part = ImageScores(np.array(indices), path=batch["path"], boxes=batch["boxes"],
                       **{key: value.cpu().numpy() for key, value in found.items()})
    scores.seconds["forward"] += forwarded - started
    scores.seconds["boxes"] += now(device) - forwarded
    return part


def now(device: str | torch.device) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def score_couplings(
    localization: Localization, ground_truth: Tensor, scores: Scores
) -> dict[str, Tensor]:
    """Boxes, IoU and oracles of each coupling's map of the predicted class and of the label."""
    Q = len(scores.couplings)
    ground_truth = ground_truth.repeat_interleave(Q, 0)  # (B*Q, M, 4)
    maps = stack_couplings(localization, scores.couplings)  # (B, Q, 2, h, w)
    maps, label_maps = maps.flatten(0, 1).unbind(1)  # (B*Q, h, w) each
    predicted = score_maps(maps, ground_truth, scores.img_size, scores.thresholds)
    reported = [values.clone() for values in predicted]  # of the label's map
    # where the label is not the predicted class, and the coupling looks at the class
    other = (maps != label_maps).flatten(1).any(1)
    if other.any():
        others = score_maps(label_maps[other], ground_truth[other], scores.img_size,
                            scores.thresholds)
        for values, value in zip(reported, others):
            values[other] = value
    predicted, reported = ([values.unflatten(0, (-1, Q)) for values in three]
                           for three in (predicted, reported))
    box, iou, _ = reported if scores.gt_class else predicted
    _, label_iou, any_iou = reported
    oracle = [label_iou >= 0.5, *(any_iou >= bar for bar in (0.3, 0.5, 0.7))]
    return {"box": box, "iou": iou, "oracle": torch.stack(oracle, -1)}  # oracle (B, Q, t, 4)


def stack_couplings(localization: Localization, couplings: Sequence[str]) -> Tensor:
    """The fused maps of K classes under each of Q couplings: (B, Q, K, h, w)."""
    return torch.stack([fuse(localization, coupling) for coupling in couplings], 1)


# ---------------------------------------------------------------- metrics

def threshold_index(scores: Scores, threshold: float) -> int:
    if threshold not in scores.thresholds:
        raise ValueError(f"threshold: {threshold} was not scored: give it to score()")
    return scores.thresholds.index(threshold)


def summarise(scores: Scores, threshold: float) -> dict:
    """All metrics of a pass at one threshold, as metrics.json has them: percent, unrounded.

    top1_cls, top5_cls: the label is the predicted class, or among the five likeliest; over all n
    images. All others are over the n_boxes images with annotated boxes, None where there are none:
    gt_known: IoU > 0.5. top1_loc, top5_loc: gt_known and top1_cls, top5_cls (the paper's rule: one
      box per image, while TS-CAM's code gives each of the five classes a box of its own).
      mean_iou of that box, in [0, 1]. gt_known_curve: at each threshold.
    best_threshold: where gt_known_curve peaks: an oracle, shown beside the threshold in use.
    max_box_acc: IoU >= 0.5 of the label's map's largest component, at the best threshold, found
      after averaging over images. max_box_acc_v2: the same for any component, best threshold for
      each of IoU >= 0.3, 0.5, 0.7, then averaged. Oracles both.
    failures: the share of each of FAILURES. baselines: gt_known of two fixed boxes.
    """
    images, has = scores.images, scores.annotated
    correct = images.top5 == images.label[:, None]  # (n, 5)
    top1, top5 = correct[:, 0], correct.any(1)
    t = threshold_index(scores, threshold)
    curve = [scores.thresholds.index(value) for value in THRESHOLDS] if has.any() else []
    metrics = {
        "n": len(has), "n_boxes": int(has.sum()), "head": scores.head, "threshold": threshold,
        "map_class": "label" if scores.gt_class else "predicted", "amp": scores.amp,
        "top1_cls": percent(top1), "top5_cls": percent(top5),
        "thresholds": THRESHOLDS, "couplings": {},
        "baselines": {"whole_image": percent(images.baseline[has, 0] > HIT),
                      "centred_box": percent(images.baseline[has, 1] > HIT)},
    }
    for q, coupling in enumerate(scores.couplings):
        iou = images.iou[has, q]  # (n_boxes, t)
        hit = iou > HIT
        row = {"label": coupling_label(scores.head, coupling), "product": PRODUCTS[coupling],
               "top1_loc": percent(hit[:, t] & top1[has]),
               "top5_loc": percent(hit[:, t] & top5[has]), "gt_known": percent(hit[:, t]),
               "mean_iou": None, "gt_known_curve": [None] * len(THRESHOLDS),
               "max_box_acc": None, "max_box_acc_v2": None, "best_threshold": None}
        if has.any():
            known = [percent(column) for column in hit[:, curve].T]
            oracle = images.oracle[has, q][:, curve].mean(0) * 100  # (100, 4)
            row |= {"mean_iou": float(iou[:, t].mean(dtype=np.float64)), "gt_known_curve": known,
                    "max_box_acc": float(oracle[:, 0].max()),
                    "max_box_acc_v2": float(oracle[:, 1:].max(0).mean()),
                    "best_threshold": THRESHOLDS[int(np.argmax(known))]}
        kinds = failure_kinds(scores, coupling, threshold)[has]
        row["failures"] = {name: percent(kinds == kind) for kind, name in enumerate(FAILURES)}
        metrics["couplings"][coupling] = row
    return metrics


def percent(hits: np.ndarray) -> float | None:
    return 100 * float(hits.mean()) if len(hits) else None


def best_threshold(scores: Scores, coupling: str) -> float:
    """The first of THRESHOLDS with the highest gt_known: to choose on val, never on test."""
    if not scores.annotated.any():
        raise ValueError("threshold: auto needs annotated boxes, the images have none")
    return summarise(scores, THRESHOLDS[0])["couplings"][coupling]["best_threshold"]


# ---------------------------------------------------------------- reports

@torch.no_grad()
def examine(
    model: LCTR, dataset: torch.utils.data.Dataset, indices: Sequence[int],
    couplings: Sequence[str], threshold: float, gt_class: bool, amp: str,
) -> Examples:
    """Localises a few images again, for pictures: scoring keeps no maps."""
    batch = data.collate([dataset[int(i)] for i in indices])
    images = data.normalise(batch["image"].to(next(model.parameters()).device))
    classes = batch["label"] if gt_class else torch.full_like(batch["label"], -1)
    localization = localize(model, images, classes.to(images.device)[:, None], amp)
    maps = enlarge(stack_couplings(localization, couplings)[:, :, 0], model.img_size)  # (n,Q,H,W)
    box = largest_boxes(maps.flatten(0, 1), [threshold]).view(*maps.shape[:2], 4).cpu()
    ground_truth = to_input(batch["boxes"], batch["view"], model.img_size)  # (n, M, 4)
    iou = box_iou(box[:, :, None], ground_truth[:, None]).amax(-1)
    return Examples(
        batch["image"].movedim(1, 3).numpy(), batch["view"].tolist(), batch["label"].tolist(),
        localization.logits.argmax(1).tolist(),
        [rows[:len(boxes)].numpy() for rows, boxes in zip(ground_truth, batch["boxes"])],
        minmax(maps).cpu().numpy(), box.numpy(), iou.numpy())


def report(
    out: str | Path, model: LCTR, dataset: torch.utils.data.Dataset, scores: Scores, metrics: dict,
    coupling: str, threshold: float, **about: object,
) -> None:
    """Writes predictions.jsonl, gallery.png, curve.png, failures.png and, last, metrics.json.

    They go into the folder `out`. about: what else metrics.json shall say (checkpoint, data,
    split, frame, where the threshold came from). No curve.png where no image has a box.
    """
    out, training, n = Path(out), model.training, len(scores.images.label)
    out.mkdir(parents=True, exist_ok=True)
    model.eval()
    lines = (json.dumps(line) + "\n" for line in predictions(scores, coupling, threshold))
    write_text(out / "predictions.jsonl", "".join(lines))

    def look(indices: Sequence[int], couplings: Sequence[str]) -> Examples:
        return examine(model, dataset, indices, couplings, threshold, scores.gt_class, scores.amp)

    where = f"{dataset.name} {getattr(dataset, 'split', about.get('split', ''))}".strip()
    whose = "label" if scores.gt_class else "predicted class"
    boxes = f"Boxes at threshold {threshold:g} of the {whose}'s min-max normalised map"
    boxes += "; in white their IoU in %." if metrics["n_boxes"] else "."
    shown = evenly(n, 8)
    titles = [(coupling_label(scores.head, c), PRODUCTS[c]) for c in scores.couplings]
    note = f"{len(shown)} of the {n} images of {where}, evenly spread. {boxes}"
    alone = metrics["couplings"].get("none", {}).get("gt_known")
    if alone is not None and alone < metrics["baselines"]["whole_image"] + 5:
        note += (" The class map alone is flat, its box the whole image: each patch knows the "
                 "class, wherever it lies.")
    write_png(out / "gallery.png", draw_gallery(
        [look(shown, scores.couplings)], [titles], dataset.classes, note))

    if metrics["n_boxes"]:
        note = f"{metrics['n_boxes']} images of {where}, the {whose}'s map"
        write_png(out / "curve.png", draw_curve(metrics, coupling, note))
    elif is_ours(out / "curve.png"):  # an earlier run's
        (out / "curve.png").unlink()

    per_row, groups = 6, []
    for title, failed in failure_groups(scores, coupling, threshold):
        title += f": {len(failed)} of {n} images"
        title += f", {per_row} shown" * (len(failed) > per_row)
        examples = look(failed[evenly(len(failed), per_row)], [coupling])
        groups.append((title, examples))
    label = coupling_label(scores.head, coupling)
    note = f"The {n} images of {where}. Map: {label} = {PRODUCTS[coupling]}. {boxes}"
    write_png(out / "failures.png", draw_failures(groups, dataset.classes, note, per_row))
    write_json(out / "metrics.json", metrics | {"coupling": coupling} | about)
    model.train(training)


def predictions(scores: Scores, coupling: str, threshold: float) -> Iterator[dict]:
    """predictions.jsonl, an entry per image: boxes in its upright pixels; iou None without any."""
    at, images = scores.at(coupling, threshold), scores.images
    box = torch.from_numpy(images.box[:, *at])[:, None]  # (n, 1, 4)
    box = to_image(box, torch.from_numpy(images.view), scores.img_size)[:, 0].tolist()
    for i, boxes in enumerate(images.boxes):
        yield {"path": images.path[i], "label": int(images.label[i]),
               "top5": images.top5[i].tolist(), "box": box[i], "boxes": boxes.tolist(),
               "iou": float(images.iou[i, *at]) if len(boxes) else None}


def save_maps(path: str | Path, scores: Scores) -> None:
    """maps.npz, for scoring of your own.

    cls_map M~c and relation_map M^r (n, h, w), label (n,), path (n,), and, where the head has
    them, class_map (n, h, w) before any ReLU, with `class` (n,), the class it belongs to.
    """
    images = scores.images
    arrays = {key: getattr(images, key) for key in ("class_map", "cls_map", "relation_map")
              if getattr(images, key) is not None}
    arrays |= {"label": images.label, "path": np.array(images.path),
               "class": images.label if scores.gt_class else images.top5[:, 0]}
    write_atomic(path, lambda file: np.savez(file, **arrays))


# ---------------------------------------------------------------- your own photographs

def own_photographs(subject: "Subject", flags: Namespace, threshold: float) -> int:
    """A picture per photograph and boxes.json; returns the exit status."""
    model, coupling = subject.model, subject.coupling
    couplings = [coupling]
    if model.head_type == "token" and not flags.coupling:  # no class map: both attention maps
        couplings = ["cls-only", "relation-only"]

    @torch.no_grad()
    def find(images: Tensor) -> tuple[Tensor, Tensor]:
        classes = torch.full((len(images), 1), -1, device=flags.device)  # the predicted class
        localization = localize(model, data.normalise(images.to(flags.device)), classes, flags.amp)
        maps = stack_couplings(localization, couplings)[:, :, 0]  # (B, Q, h, w)
        return localization.logits, enlarge(maps, model.img_size)

    paths, notes = find_images(flags.images)
    for note in notes:
        print(f"note: {note}")
    if not paths:
        raise ValueError(f"--images: no picture in {', '.join(map(printable, flags.images))}")
    viewer = Viewer(
        lambda path: data.load_image(path, model.img_size, flags.crop), data.open_image, find,
        model.img_size, couplings, coupling,
        [(coupling_label(model.head_type, c), PRODUCTS[c]) for c in couplings],
        subject.checkpoint["classes"], threshold)
    return 1 if write_photographs(viewer, paths, flags.out, flags.batch_size) else 0


# ---------------------------------------------------------------- the script

def parse_flags(argv: Sequence[str] | None = None) -> Namespace:
    description = (__doc__ or "Evaluates.").split("\n\n")[0]
    return evaluate_flags(argv, description, data.DATASETS, COUPLINGS)


class Subject(NamedTuple):
    """One checkpoint of those evaluated."""

    path: str
    model: LCTR
    checkpoint: dict  # classes, config, metrics, phase
    coupling: str


def load(path: str, flags: Namespace) -> Subject:
    """A checkpoint's model on the device; with --images a backbone without a head will do."""
    content = weights.read_weights(path) if flags.images else None
    try:
        model, checkpoint = load_checkpoint(path)
    except ValueError:
        if content is None or "config" in content:
            raise
        model, checkpoint = backbone(path, content, flags.img_size)
    if checkpoint["phase"] != "main" and checkpoint["classes"]:
        print(f"{path}: sizes read off its shapes, {checkpoint['config']['num_heads']} attention "
              "heads (64 channels each where the file does not say)")
    if flags.img_size and pair(flags.img_size) != model.img_size and checkpoint["classes"]:
        config = {flag: value for flag, value in checkpoint["config"].items()
                  if flag in MODEL_FLAGS} | {"img_size": flags.img_size}
        state, grid = model.state_dict(), model.grid
        model = build(len(checkpoint["classes"]), config)
        state["pos_embed"] = weights.resize_pos_embed(state["pos_embed"], grid, model.grid)
        model.load_state_dict(state)
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise ValueError(f"{path}: weights that are not finite")
    return Subject(path, model.to(flags.device), checkpoint,
                   flags.coupling or default_coupling(model))


def build(num_classes: int, config: dict) -> LCTR:
    try:
        return LCTR(num_classes, **config).eval()
    except ValueError as error:
        raise FlagError(f"--img-size: {error}") from None


def backbone(path: str, content: dict, img_size: int | list[int] | None) -> tuple[LCTR, dict]:
    """A backbone alone, for a first look at its attention, and a checkpoint without classes."""
    state, _, about = weights.read_state(content, path)
    config = weights.architecture(state, about, path)
    config |= {"head": "token", "img_size": img_size or config["img_size"]}
    model = build(1, config)  # its head is never looked at
    print(f"{path}: no class was trained: attention alone, {config['depth']} blocks, "
          f"{config['num_heads']} attention heads (64 channels each where the file does not say), "
          f"input {' x '.join(map(str, model.img_size))}")
    print(load_pretrained(model, path))
    return model, {"classes": [], "phase": "external", "config": config}


def check_subject(subject: Subject, flags: Namespace) -> None:
    """What flags ask of a checkpoint that it does not have."""
    path, model, checkpoint, coupling = subject
    if coupling not in couplings_of(model):
        raise FlagError(f"--coupling: {path} has a {model.head_type} head, "
                                     f"whose couplings are {', '.join(couplings_of(model))}")
    if flags.crop and flags.crop < max(model.img_size):
        raise FlagError(f"--crop: got {flags.crop}, need at least "
                                     f"{max(model.img_size)}, the side of {path}'s input")
    if flags.threshold is None:
        own_threshold(subject)
    name, root = data_source(flags, checkpoint)
    if name is None and (not flags.images or flags.threshold == "auto"):
        raise FlagError(f"--data: missing, {path} names no data set")
    if name and name != "synthetic" and root is None and not flags.images:
        raise FlagError(f"--root: {name} needs the data set's folder")
    if flags.threshold == "auto" and not data.has_split(name, root, "val"):
        raise FlagError(
            f"--threshold: auto needs a val split, {name} has none: give a number")


def data_source(flags: Namespace, checkpoint: dict) -> tuple[str | None, str | None]:
    """The data set's name and folder: the flags', else the checkpoint's own."""
    config = checkpoint["config"]
    name = flags.data or config.get("data")
    same = name and name == config.get("data")
    return name, flags.root or (config.get("root") if same else None)


def load_split(subject: Subject, flags: Namespace, split: str) -> torch.utils.data.Dataset:
    """A split of the checkpoint's data set unless flags say otherwise; classes must be equal."""
    known, (name, root) = subject.checkpoint["classes"], data_source(flags, subject.checkpoint)
    trained_on = known if subject.checkpoint["phase"] == "main" else None  # needs no train/ folder
    dataset = data.load_dataset(
        name, root, split, subject.model.img_size, limit=flags.limit_test, crop=flags.crop,
        augment=False, classes=trained_on)
    found = dataset.classes
    if subject.checkpoint["phase"] in ("external", "foreign") and len(known) == len(found):
        known = found  # the file has no names to compare
    if list(map(nfc, known)) != list(map(nfc, found)):
        i = next((i for i, (a, b) in enumerate(zip(known, found)) if nfc(a) != nfc(b)),
                 min(len(known), len(found)))
        names = [repr(c[i]) if i < len(c) else "nothing" for c in (known, found)]
        raise ValueError(
            f"{subject.path}: its {len(known)} classes are not the {len(found)} of {name} {split}: "
            f"class {i} is {names[0]} there, {names[1]} here")
    if not len(dataset):
        raise ValueError(f"{name} {split}: no images")
    return dataset


def print_notes(datasets: Sequence[torch.utils.data.Dataset]) -> None:
    """What the data sets left out, clipped or took on trust."""
    for note in dict.fromkeys(note for dataset in datasets for note in dataset.notes):
        print(f"note: {printable(note)}")


def choose_threshold(subject: Subject, flags: Namespace) -> tuple[float, str]:
    """The threshold and where it came from."""
    if flags.threshold == "auto":
        val_set = load_split(subject, flags, "val")
        print_notes([val_set])
        scores = score(subject.model, val_set, batch_size=flags.batch_size, device=flags.device,
                       workers=flags.workers, couplings=[subject.coupling], amp=flags.amp)
        best = best_threshold(scores, subject.coupling)
        return best, f"the best gt-known of {len(val_set)} val images"
    if flags.threshold is not None:
        return flags.threshold, "--threshold"
    own = own_threshold(subject)
    if own is None:
        return DEFAULT_THRESHOLD, "CAM's, since the checkpoint names none"
    return own, "the checkpoint's own"


def own_threshold(subject: Subject) -> float | None:
    """What the checkpoint's own evaluation used. Raises ValueError where it is no threshold."""
    metrics = subject.checkpoint.get("metrics")
    own = metrics.get("threshold") if isinstance(metrics, dict) else None
    if own is not None and (type(own) not in (int, float) or not 0 <= own < 1):
        raise ValueError(f"{subject.path}: its threshold is {own!r}, need a number in [0, 1): give "
                         "--threshold")
    return own


def evaluate(flags: Namespace) -> int:
    """Everything that the flags ask for; returns the exit status."""
    subjects = [load(path, flags) for path in flags.checkpoint]
    for subject in subjects:
        check_subject(subject, flags)
        if list(subject.checkpoint["classes"]) != list(subjects[0].checkpoint["classes"]):
            raise ValueError(f"{subject.path}: its classes are not those of {subjects[0].path}")
    names, several = run_names(flags.checkpoint), len(subjects) > 1
    folders = [flags.out / name if several else flags.out for name in names]
    if not flags.images:
        datasets = [load_split(subject, flags, flags.split) for subject in subjects]
        print_notes(datasets)
        files = ["predictions.jsonl", "metrics.json", "gallery.png", "curve.png", "failures.png"]
        files += ["maps.npz"] * flags.save_maps
        joint = {flags.out: ["metrics.json", "gallery.png"]} if several else {}
        claim(joint | {folder: files for folder in folders})

    all_metrics, seen, titles = [], [], []
    for i, (subject, name, folder) in enumerate(zip(subjects, names, folders)):
        path, model, _, coupling = subject
        threshold, source = choose_threshold(subject, flags)
        print(f"{path}: {coupling_label(model.head_type, coupling)} ({coupling}), threshold "
              f"{threshold:g} ({source}), on {flags.device}, amp {flags.amp}", flush=True)
        if flags.images:
            return own_photographs(subject, flags, threshold)
        scores = score(model, datasets[i], batch_size=flags.batch_size, device=flags.device,
                       workers=flags.workers, threshold=threshold, gt_class=flags.gt_class,
                       keep_maps=flags.save_maps, amp=flags.amp)
        metrics = summarise(scores, threshold) | {"coupling": coupling}
        about = {"threshold_from": source, "checkpoint": str(path), "data": datasets[i].name,
                 "split": flags.split,
                 "frame": f"centre crop of {flags.crop}" if flags.crop else "whole image"}
        report(folder, model, datasets[i], scores, metrics, coupling, threshold, **about)
        if flags.save_maps:
            save_maps(folder / "maps.npz", scores)
        if flags.profile:
            n = len(scores.images.label)
            forward, boxes = (1e3 * scores.seconds[part] / n for part in ("forward", "boxes"))
            print(f"{name}: per image {forward:.2f} ms for the forward pass, {boxes:.2f} ms for "
                  f"boxes and IoU: {len(scores.couplings)} couplings, {len(scores.thresholds)} "
                  "thresholds, predicted class and label")
        all_metrics.append(metrics | about | ({"name": name} if several else {}))
        if several:
            shown = [c for c in scores.couplings
                     if c in ("cls", "relation", coupling) or scores.head == "token"]
            seen.append(examine(model, datasets[i], evenly(len(datasets[i]), 8), shown, threshold,
                                flags.gt_class, flags.amp))
            titles.append([(f"{name}: {coupling_label(scores.head, c)}", PRODUCTS[c])
                           for c in shown])

    first = all_metrics[0]
    if several:
        write_json(flags.out / "metrics.json", dict(zip(names, all_metrics)))
        own = ", ".join(f"{m['threshold']:g} ({m['name']})" for m in all_metrics)
        note = (f"{len(seen[0].label)} images of {first['data']} {first['split']}, evenly spread. "
                f"Boxes at threshold {own} of the min-max normalised map; in white their IoU in %.")
        write_png(flags.out / "gallery.png",
                  draw_gallery(seen, titles, datasets[0].classes, note))
    print(f"\n{first['data']} {first['split']}, {first['frame']}\n{format_table(all_metrics)}\n\n"
          f"report and pictures in {printable(flags.out)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse_flags(argv)
    torch.set_float32_matmul_precision("high")  # as in train.py: TF32 where a GPU has it
    with contextlib.suppress(AttributeError):  # a name or class that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return evaluate(flags)
    except BrokenPipeError:  # such as by | head: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except KeyboardInterrupt:
        print("evaluate.py: stopped", file=sys.stderr)
    except (OSError, ValueError, RuntimeError) as error:
        line = one_line(error, flags.out)
        print(f"evaluate.py: error: {line}", file=sys.stderr)
        return 2 if line.startswith("--") else 1  # a flag's fault, or a file's
    return 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
