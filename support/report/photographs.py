"""evaluate.py --images: a picture and an entry of boxes.json for each of a user's photographs."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from support.boxes import largest_boxes, to_image
from support.common import minmax, write_json
from support.report.figures import class_name, draw_own, write_png
from support.report.outputs import claim, output_names, printable


class Viewer(NamedTuple):
    """What a model makes of photographs; the maps it has are named and explained."""

    read: Callable[[Path], tuple]  # -> (image (3, H, W) uint8, view, (width, height)); ValueError
    open: Callable[[Path], Image.Image]  # the upright photograph
    find: Callable[[Tensor], tuple]  # (B, 3, H, W) uint8 -> (logits (B, C), maps (B, Q, H, W))
    img_size: tuple[int, int]
    couplings: Sequence[str]  # Q, of which one is `chosen` for "box"
    chosen: str
    titles: Sequence[tuple[str, str]]  # Q: a map's name, and what is multiplied
    classes: Sequence[str]  # none where no class was trained
    threshold: float


def write_photographs(viewer: Viewer, paths: Sequence[Path], out: Path, batch_size: int) -> int:
    """Returns how many could not be read or written: they are named and skipped.

    boxes.json is written whatever happens.
    """
    names, entries, failed = output_names(paths), [], 0
    claim({out: [*names, "boxes.json"]}, inputs=paths)

    def skip(path: Path, error: Exception) -> int:
        reason = getattr(error, "strerror", None) or error
        about = "" if str(path) in str(reason) else f"{printable(path)}: "
        print(f"evaluate.py: skipped: {about}{printable(reason)}", file=sys.stderr)
        return 1

    try:
        for first in range(0, len(paths), batch_size):
            batch = []
            for path, name in list(zip(paths, names))[first:first + batch_size]:
                try:
                    batch.append((path, out / name, *viewer.read(path)))
                except (ValueError, OSError) as error:
                    failed += skip(path, error)
            for path, file, entry, picture in draw_batch(viewer, batch) if batch else ():
                try:
                    write_png(file, picture())
                except (ValueError, OSError) as error:
                    failed += skip(path, error)
                    continue
                entries.append(entry)
                best = entry["top5"][:1]
                best = f"{best[0][0]} ({100 * best[0][1]:.1f} %), " if best else ""
                print(printable(f"{path} -> {file}: {best}box "
                                + " ".join(f"{v:.0f}" for v in entry["box"])))
    finally:
        write_json(out / "boxes.json", entries)
    print(f"{len(entries)} pictures and boxes.json in {printable(out)}"
          + f", {failed} skipped" * bool(failed))
    return failed


def draw_batch(viewer: Viewer, batch: Sequence[tuple]):
    """Of each (path, file, image, view, size): path, file, its entry, a function that draws it."""
    logits, maps = viewer.find(torch.stack([image for _, _, image, _, _ in batch]))
    boxes = largest_boxes(maps.flatten(0, 1), [viewer.threshold]).view(len(batch), -1, 4).cpu()
    boxes = to_image(boxes, torch.tensor([view for *_, view, _ in batch]), viewer.img_size)
    classes, heat = viewer.classes, minmax(maps).cpu().numpy()
    k = min(5, len(classes))
    chances, ids = (top.tolist() for top in logits.softmax(1).cpu().topk(k)) if k else ([[]], [[]])
    means = "; ".join(f"{title} = {product}" if title != product else title
                      for title, product in viewer.titles)
    for i, (path, file, _, view, size) in enumerate(batch):
        top5 = list(zip(ids[i], chances[i])) if k else []
        found = dict(zip(viewer.couplings, boxes[i].tolist()))
        entry = {"path": str(path), "size": list(size),
                 "top5": [[classes[c], p] for c, p in top5], "box": found[viewer.chosen]}
        entry |= {"boxes": found} if len(found) > 1 else {}
        lines = [f"{rank}. {class_name(classes, c)} {100 * p:.1f} %"
                 for rank, (c, p) in enumerate(top5[:3], 1)]
        lines = lines or ["No class was trained: the maps are the backbone's attention."]
        lines.append(
            f"Boxes at threshold {viewer.threshold:g} of the min-max normalised map: {means}.")
        shown = [(title, heat[i, q], box)
                 for q, ((title, _), box) in enumerate(zip(viewer.titles, found.values()))]
        yield path, file, entry, lambda: draw_own(viewer.open(path), view, shown, lines)
