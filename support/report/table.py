"""The metrics of evaluate.summarise as text."""

from collections.abc import Sequence

ADD_BOXES = """\
Localisation is not evaluated, since no image has an annotated box. To evaluate it, add boxes: a
file boxes.csv (path,xmin,ymin,xmax,ymax) in the data set's folder, written by hand or from COCO,
VOC or YOLO annotations with python data.py --convert."""


def format_table(all_metrics: Sequence[dict]) -> str:
    """What evaluate.report returns for one or several checkpoints on the same images, as text."""
    one = all_metrics[0]
    left = max(len(m.get("name", "")) for m in all_metrics)
    left += 2 * (left > 0)
    boxes = f", {one['n_boxes']} of them with boxes" if one["n_boxes"] < one["n"] else ""
    lines = [f"{one['n']} images{boxes}"]
    for m in all_metrics:
        source = f" ({m['threshold_from']})" if "threshold_from" in m else ""
        lines.append(
            f"{m.get('name', ''):{left}}top-1 classification {m['top1_cls']:.2f} %, top-5 "
            f"{m['top5_cls']:.2f} %; boxes at threshold {m['threshold']:g}{source}")
    if not one["n_boxes"]:
        return "\n".join([*lines, "", ADD_BOXES])
    return "\n".join(lines + localisation_table(all_metrics, left))


def localisation_table(all_metrics: Sequence[dict], left: int) -> list[str]:
    """A line for each map of each checkpoint, the baselines, and a line for each map's failures."""
    one = all_metrics[0]
    rows = [(m.get("name", ""), row, coupling == m["coupling"])
            for m in all_metrics for coupling, row in m["couplings"].items()]
    centred = "centred box of half the area"
    width = 2 + max(len(label) for label in [centred, *(row["label"] for _, row, _ in rows)])

    whose = ("the predicted class's map" if one["map_class"] == "predicted"
             else "the LABEL's map (--gt-class)")
    lines = [
        "", f"Localisation in %: box of the largest component of {whose}, IoU > 0.5; mean IoU of "
        "that box.", "Oracles: the label's map, the best threshold of these very images; best-thr "
        "is gt-known's.", "",
        f"{'':{left}}{'map':{width}}  top-1 loc  top-5 loc   gt-known   mean IoU  | oracles:"
        "  MaxBoxAcc         V2   best-thr"]
    for name, row, chosen in rows:
        lines.append(
            f"{name:{left}}{row['label']:{width}}{row['top1_loc']:11.2f}{row['top5_loc']:11.2f}"
            f"{row['gt_known']:11.2f}{row['mean_iou']:11.3f}  |{row['max_box_acc']:20.2f}"
            f"{row['max_box_acc_v2']:11.2f}{row['best_threshold']:11.2f}" + "  *" * chosen)
    for name, key in (("whole image", "whole_image"), (centred, "centred_box")):
        lines.append(f"{'':{left}}{name:{width}}{one['baselines'][key]:33.2f}")

    products = {row["label"]: row["product"] for _, row, _ in rows}
    lines += ["", "What is multiplied:"]
    lines += [f"{'':{left}}{label:{width}}{product}" for label, product in products.items()]

    kinds = "".join(f"  {kind}" for kind in rows[0][1]["failures"])
    lines += ["", "Why top-1 localisation fails, in % of images:",
              f"{'':{left}}{'map':{width}}{kinds}"]
    for name, row, _ in rows:
        lines.append(f"{name:{left}}{row['label']:{width}}" + "".join(
            f"{share:{len(kind) + 2}.2f}" for kind, share in row["failures"].items()))
    return lines
