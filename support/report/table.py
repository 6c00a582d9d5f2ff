"""The metrics of evaluate.summarise as text."""

from collections.abc import Sequence

ADD_BOXES = """\
Localisation is not evaluated, since no image has an annotated box. To evaluate it, add boxes: a
file boxes.csv (path,xmin,ymin,xmax,ymax) in the data set's folder, written by hand or from COCO,
VOC or YOLO annotations with python data.py --convert."""


def format_table(metrics: dict | Sequence[dict], chosen: str | None = None) -> str:
    """The metrics of one pass, or of several over the same images, as text to print."""
    several = [metrics] if isinstance(metrics, dict) else list(metrics)
    one = several[0]
    names = [m.get("name", "") for m in several]
    left = max(map(len, names)) + 2 if any(names) else 0
    boxes = f", {one['n_boxes']} of them with boxes" if one["n_boxes"] < one["n"] else ""
    lines = [f"{one['n']} images{boxes}"]
    for name, m in zip(names, several):
        source = f" ({m['threshold_from']})" if "threshold_from" in m else ""
        lines.append(f"{name:{left}}top-1 classification {m['top1_cls']:.2f} %, top-5 "
                     f"{m['top5_cls']:.2f} %; boxes at threshold {m['threshold']:g}{source}")
    if not one["n_boxes"]:
        return "\n".join([*lines, "", ADD_BOXES])
    return "\n".join(lines + localisation_table(several, names, left, chosen))


def localisation_table(
    several: Sequence[dict], names: Sequence[str], left: int, chosen: str | None
) -> list[str]:
    """A line for each map of each pass, the baselines, and a line for each map's failures."""
    one, rows = several[0], [(name, m, coupling, row) for name, m in zip(names, several)
                             for coupling, row in m["couplings"].items()]
    width = max([len(row["label"]) for *_, row in rows] + [len("centred box of half the area")]) + 2

    def cells(*values: float | str | None, digits: int = 2) -> str:
        texts = ("-" if v is None else v if isinstance(v, str) else f"{v:.{digits}f}"
                 for v in values)
        return "".join(f"{text:>11}" for text in texts)

    whose = ("the predicted class's map" if one["map_class"] == "predicted"
             else "the LABEL's map (--gt-class)")
    lines = [
        "", f"Localisation in %: box of the largest component of {whose}, IoU > 0.5; mean IoU of "
        "that box.", "Oracles: the label's map, the best threshold of these very images; best-thr "
        "is gt-known's.", "",
        f"{'':{left}}{'map':{width}}" + cells("top-1 loc", "top-5 loc", "gt-known", "mean IoU")
        + f"{'| oracles:':>12}" + cells("MaxBoxAcc", "V2", "best-thr")]
    for name, m, coupling, row in rows:
        lines.append(
            f"{name:{left}}{row['label']:{width}}"
            + cells(row["top1_loc"], row["top5_loc"], row["gt_known"])
            + cells(row["mean_iou"], digits=3) + f"{'|':>3}{'':9}"
            + cells(row["max_box_acc"], row["max_box_acc_v2"], row["best_threshold"])
            + "  *" * (coupling == m.get("coupling", chosen)))
    for name, key in (("whole image", "whole_image"),
                      ("centred box of half the area", "centred_box")):
        lines.append(f"{'':{left}}{name:{width}}{'':22}" + cells(one["baselines"][key]))
    products = {row["label"]: row["product"] for *_, row in rows}
    lines += ["", "What is multiplied:"]
    lines += [f"{'':{left}}{label:{width}}{product}" for label, product in products.items()]
    if any(m["head"] == "conv" for m in several):
        lines.append("TS-CAM's own code multiplies the signed class map: lctr.fuse(..., relu=False)"
                     ".")
    lines += ["", "Why top-1 localisation fails, in % of images:", f"{'':{left}}{'map':{width}}"
              + "".join(f"{kind:>{len(kind) + 2}}" for kind in rows[0][3]["failures"])]
    for name, _, _, row in rows:
        lines.append(f"{name:{left}}{row['label']:{width}}" + "".join(
            f"{share:>{len(kind) + 2}.2f}" for kind, share in row["failures"].items()))
    return lines
