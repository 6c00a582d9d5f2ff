"""Why Top-1 localisation fails, image by image. evaluation: an evaluate.Evaluation."""

import numpy as np
import torch

from support.boxes import area, box_iou, intersection, to_input

HIT = 0.5  # a box is right where its IoU exceeds this (paper, "Evaluation Metrics")

# The first that applies, so that the shares add up to 100 - top1_loc (TS-CAM's kinds). Of several
# annotated boxes the last three look at the one that the box meets best.
FAILURES = {
    "wrong class": "the label is not the predicted class, whatever the box",
    "one of several": "the box covers more than 30 % of each of two or more annotated boxes",
    "part of the object": "more than half of the box lies in the annotated box",
    "too much": "the box covers more than 70 % of the annotated box, and too much else",
    "elsewhere": "none of these: mostly beside the annotated box",
}


def failure_kinds(evaluation, coupling: str, threshold: float) -> np.ndarray:
    """Why Top-1 localisation fails: (n,) indices into FAILURES.

    -1 where it is right, and where the class is right and no box is annotated.
    """
    at, view = evaluation.at(coupling, threshold), torch.from_numpy(evaluation.view)
    ground_truth = to_input(evaluation.boxes, view, evaluation.img_size)  # (n, M, 4)
    box = torch.from_numpy(evaluation.box[:, *at])[:, None].double()  # (n, 1, 4)
    overlap = intersection(box, ground_truth)  # (n, M)
    best = box_iou(box, ground_truth).argmax(1, keepdim=True)  # (n, 1)
    several = (overlap > 0.3 * area(ground_truth)).sum(1) > 1
    in_box = overlap.gather(1, best)[:, 0]
    part = in_box > 0.5 * area(box)[:, 0]
    much = in_box > 0.7 * area(ground_truth).gather(1, best)[:, 0]
    wrong_class = evaluation.top5[:, 0] != evaluation.label
    right = (evaluation.iou[:, *at] > HIT) | ~evaluation.annotated
    return np.select([wrong_class, right, several, part, much], [0, -1, 1, 2, 3], 4)
