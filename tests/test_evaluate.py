"""evaluate.py: its numbers against their definitions, its script on good and bad input."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (call, flood_fill, naive_boxes, naive_iou, noise, normalise, picture,
                     save_checkpoint, script_error)
from PIL import Image
from torch import Tensor

import data
import evaluate
from evaluate import largest_boxes
from lctr import COUPLINGS, LCTR, Localization, fuse
from support.report import figures

# ---------------------------------------------------------------- scoring


class Toy(torch.utils.data.Dataset):
    """Random pictures with 0 to 3 boxes each, of several sizes."""

    name, classes = "toy", [f"class {c}" for c in range(7)]

    def __init__(self, n=11, img_size=(24, 32), seed=0, boxes: int | None = None):
        self.n, self.img_size, self.seed, self.boxes = n, img_size, seed, boxes

    def __len__(self):
        return self.n

    def __getitem__(self, i: int) -> dict:
        rng = np.random.default_rng((self.seed, i))
        width, height = 20 + 7 * i, 90 - 5 * i
        count = i % 4 if self.boxes is None else self.boxes
        corner = rng.random((count, 2)) * (0.6 * width, 0.6 * height)
        side = rng.random(corner.shape) * (0.4 * width, 0.4 * height)
        boxes = np.concatenate([corner, corner + side], 1)
        image = torch.from_numpy(rng.integers(0, 256, (3, *self.img_size), np.uint8))
        return {"image": image, "label": int(rng.integers(7)),
                "boxes": torch.from_numpy(boxes).float(), "size": (width, height),
                "view": (0.0, 0.0, float(width), float(height)), "path": f"p{i}", "index": i}


def toy_model(head: str = "cdm", classes: int = 7, img_size=(24, 32), seed: int = 0) -> LCTR:
    torch.manual_seed(seed)
    model = LCTR(classes, img_size, 4, 12, 2, 3, head=head, num_kernels=2)
    for parameter in model.parameters():  # random enough that maps, classes and couplings differ
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("head, gt_class", [
    ("cdm", False), ("cdm", True), ("conv", False), ("token", False)])
def test_scores_equal_their_definition(head, gt_class):
    """Every number of summarise() recomputed image by image, map by map, with the flood fill."""
    model, dataset, threshold = toy_model(head, img_size=(12, 16)).eval(), Toy(7, (12, 16)), 0.3
    scores = evaluate.evaluate_model(model, dataset, batch_size=4, gt_class=gt_class)
    metrics = evaluate.summarise(scores, threshold)
    assert list(metrics["couplings"]) == [
        c for c in COUPLINGS if head != "token" or c.endswith("-only")]
    samples = [dataset[i] for i in range(len(dataset))]
    annotated = [s for s in samples if len(s["boxes"])]
    logits = {s["path"]: model(data.normalise(s["image"][None]))[0] for s in samples}
    ranked = {path: row.argsort(descending=True).tolist() for path, row in logits.items()}
    top1 = {s["path"]: ranked[s["path"]][0] == s["label"] for s in samples}
    top5 = {s["path"]: s["label"] in ranked[s["path"]][:5] for s in samples}
    assert metrics["n"] == 7 and metrics["n_boxes"] == len(annotated) < 7
    assert metrics["top1_cls"] == pytest.approx(100 * np.mean(list(top1.values())))
    assert metrics["top5_cls"] == pytest.approx(100 * np.mean(list(top5.values())))

    for coupling, found in metrics["couplings"].items():
        ious, oracle, any_oracle = [], [], []
        for s in annotated:
            scale = torch.tensor([16, 12, 16, 12]) / torch.tensor(s["size"]).repeat(2)
            truth = (s["boxes"] * scale).tolist()
            for wanted, kept in ((s["label"] if gt_class else -1, ious), (s["label"], oracle)):
                images = data.normalise(s["image"][None])
                small = fuse(model.localize(images, torch.tensor([[wanted]])), coupling)
                m = F.interpolate(small, (12, 16), mode="bilinear", align_corners=False)[0]
                boxes = naive_boxes(m, [*evaluate.THRESHOLDS, threshold])[0].tolist()
                kept.append([max(naive_iou(b, t) for t in truth) for b in boxes])
            components = [flood_fill(normalise(m[0]), t) or [(0, (0, 0, 16, 12))]
                          for t in evaluate.THRESHOLDS]
            any_oracle.append([max(naive_iou(b, t) for _, b in row for t in truth)
                               for row in components])
        ious, oracle, any_oracle = map(np.array, (ious, oracle, any_oracle))
        hit = ious[:, -1] > 0.5
        assert found["gt_known"] == pytest.approx(100 * hit.mean())
        for name, right in (("top1_loc", top1), ("top5_loc", top5)):
            both = [h and right[s["path"]] for h, s in zip(hit, annotated)]
            assert found[name] == pytest.approx(100 * np.mean(both))
        assert found["mean_iou"] == pytest.approx(ious[:, -1].mean(), abs=1e-6)
        curve = (100 * (ious[:, :-1] > 0.5).mean(0)).tolist()
        assert found["gt_known_curve"] == pytest.approx(curve)
        assert found["best_threshold"] == evaluate.THRESHOLDS[np.argmax(found["gt_known_curve"])]
        v1 = 100 * (oracle[:, :-1] >= 0.5).mean(0).max()
        assert found["max_box_acc"] == pytest.approx(v1)
        assert found["max_box_acc_v2"] == pytest.approx(
            100 * np.mean([(any_oracle >= bar).mean(0).max() for bar in (0.3, 0.5, 0.7)]))


@pytest.mark.parametrize("seed", range(3))
def test_relations_between_metrics(seed):
    scores = evaluate.evaluate_model(toy_model(seed=seed), Toy(30, seed=seed, boxes=1))
    metrics = evaluate.summarise(scores, 0.1)
    assert metrics["n"] == metrics["n_boxes"] == 30
    for row in metrics["couplings"].values():
        assert row["top1_loc"] <= row["top5_loc"] <= row["gt_known"] <= 100
        assert row["top1_loc"] <= metrics["top1_cls"] and row["top5_loc"] <= metrics["top5_cls"]
        assert row["gt_known"] == row["gt_known_curve"][10] <= max(row["gt_known_curve"])
        assert row["top1_loc"] + sum(row["failures"].values()) == pytest.approx(100)


def same(a: evaluate.Evaluation, b: evaluate.Evaluation) -> None:
    for key, value in vars(a).items():
        other = getattr(b, key)
        if key == "seconds":
            continue
        if key == "boxes":
            assert all(torch.equal(x, y) for x, y in zip(value, other, strict=True))
        elif not isinstance(value, np.ndarray):
            assert value == other
        else:
            np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-6)


def test_batch_size_and_repetition_change_nothing():
    model, dataset = toy_model(), Toy(10)
    first = evaluate.evaluate_model(model, dataset, batch_size=10, keep_maps=True)
    assert first.path == [f"p{i}" for i in range(10)]
    for batch_size in (10, 3, 1):
        same(evaluate.evaluate_model(model, dataset, batch_size=batch_size, keep_maps=True), first)


def test_one_forward_pass_serves_every_coupling(monkeypatch):
    model, seen = toy_model(), []
    forward = model.forward_features

    def counted(images, *rest):
        seen.append(len(images))
        return forward(images, *rest)

    monkeypatch.setattr(model, "forward_features", counted)
    evaluate.evaluate_model(model, Toy(10), batch_size=4)
    assert seen == [4, 4, 2]


def test_classification_alone_and_the_models_mode():
    model = toy_model().train()
    scores = evaluate.evaluate_model(model, Toy(6), couplings=())
    assert model.training and evaluate.summarise(scores, 0.2)["couplings"] == {}
    whole = evaluate.summarise(evaluate.evaluate_model(model, Toy(6)), 0.2)
    assert evaluate.summarise(scores, 0.2)["top5_cls"] == whole["top5_cls"] > 0


def test_images_without_boxes_count_for_classification_alone(tmp_path):
    dataset = Toy(5, boxes=0)
    scores = evaluate.evaluate_model(toy_model(), dataset)
    metrics = evaluate.summarise(scores, 0.2)
    assert metrics["n"] == 5 and metrics["n_boxes"] == 0 and metrics["top5_cls"] is not None
    assert metrics["couplings"]["relation"]["gt_known"] is None
    assert metrics["baselines"]["whole_image"] is None
    with pytest.raises(ValueError, match="needs annotated boxes"):
        evaluate.best_threshold(scores, "relation")
    evaluate.report(tmp_path, toy_model(), dataset, scores, metrics, "relation", 0.2)
    assert json.loads((tmp_path / "predictions.jsonl").read_text().splitlines()[0])["iou"] is None
    assert "5 images, 0 of them with boxes" in evaluate.format_table(metrics)


class Painted(LCTR):
    """A model with given logits (C) and class maps (C, h, w), the same for every image."""

    def __init__(self, logits: list[float], class_maps: Tensor):
        img_size = tuple(4 * side for side in class_maps.shape[1:])
        super().__init__(len(logits), img_size, 4, 8, 1, 2, head="conv")
        self.logits, self.class_maps = torch.tensor(logits), class_maps

    def localize(self, images, classes=None):
        classes = torch.where(classes < 0, self.logits.argmax(), classes)
        ones = torch.ones(len(images), *self.class_maps.shape[1:])
        logits = self.logits.expand(len(images), -1)
        return Localization(logits, classes, self.class_maps[classes], ones, ones)


def painted_set(boxes: list, label: int, n: int = 1) -> Toy:
    dataset = Toy(n, (16, 16))
    sample = {"image": torch.zeros(3, 16, 16, dtype=torch.uint8), "label": label, "size": (16, 16),
              "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
              "view": (0.0, 0.0, 16.0, 16.0), "path": "p"}
    dataset.__class__ = type(
        "Fixed", (Toy,), {"__getitem__": lambda self, i: sample | {"index": i}})
    return dataset


def blob(x: int, y: int) -> Tensor:
    m = torch.zeros(4, 4)
    m[y, x] = 1
    return m


def test_top5_rules_differ_and_the_papers_is_used():
    """The label is second; its own map is right, the predicted class's is wrong.

    TS-CAM's code, which gives each of the five classes its own box, counts Top-5 Loc; the paper
    (Top-5 Cls and Gt-known, one map, Eq. 3) and the authors' code do not.
    """
    model = Painted([3.0, 2.0, 1.0], torch.stack([blob(3, 3), blob(0, 0), blob(0, 3)]))
    dataset = painted_set([[0, 0, 5, 5]], label=1)
    by_paper = evaluate.summarise(evaluate.evaluate_model(model, dataset), 0.2)
    assert by_paper["top5_cls"] == 100 and by_paper["top1_cls"] == 0
    row = by_paper["couplings"]["relation"]
    assert row["top5_loc"] == row["gt_known"] == 0
    assert row["max_box_acc"] == 100  # the oracle looks at the label's map

    by_label = evaluate.summarise(evaluate.evaluate_model(model, dataset, gt_class=True), 0.2)
    row = by_label["couplings"]["relation"]
    assert row["top5_loc"] == row["gt_known"] == 100 and row["top1_loc"] == 0  # TS-CAM's result

    # and the other way round: the predicted class's map is right, the label's wrong
    dataset = painted_set([[11, 11, 16, 16]], label=1)
    row = evaluate.summarise(evaluate.evaluate_model(model, dataset), 0.2)["couplings"]["relation"]
    assert row["top5_loc"] == row["gt_known"] == 100 and row["max_box_acc"] == 0


def test_v2_takes_any_component_and_v1_the_largest():
    class_map = blob(0, 0)
    class_map[2:, 2:] = 1
    model = Painted([1.0, 0.0], torch.stack([class_map, blob(3, 0)]))
    metrics = evaluate.summarise(evaluate.evaluate_model(model, painted_set([[0, 0, 4, 4]], label=0)), 0.2)
    row = metrics["couplings"]["none"]
    assert row["max_box_acc"] == 0 and row["max_box_acc_v2"] > 60


def test_best_of_several_annotated_boxes():
    model = Painted([1.0, 0.0], torch.stack([blob(0, 0), blob(3, 0)]))
    for boxes, known in (([[0, 0, 5, 5]], 100), ([[9, 9, 16, 16], [0, 0, 5, 5]], 100),
                         ([[0, 0, 5, 5], [1, 1, 1, 9]], 100), ([[2, 2, 2, 2]], 0)):
        metrics = evaluate.summarise(evaluate.evaluate_model(model, painted_set(boxes, 0)), 0.2)
        assert metrics["couplings"]["none"]["gt_known"] == known


def made_up(iou: np.ndarray, **images) -> evaluate.Evaluation:
    """An evaluation of n images and one coupling with these IoUs (n, T)."""
    n, t = iou.shape
    known = {
        "label": np.zeros(n, int), "top5": np.zeros((n, 1), int),
        "path": ["p"] * n, "boxes": [torch.tensor([[0.0, 0, 8, 8]])] * n,
        "view": np.tile([0.0, 0, 16, 16], (n, 1)),
        "box": np.zeros((n, 1, t, 4), np.int16), "iou": iou[:, None],
        "oracle": np.repeat(iou[:, None, :, None] >= 0.5, 4, 3), "baseline": np.zeros((n, 2))}
    return evaluate.Evaluation(
        "cdm", (16, 16), ("relation",), evaluate.THRESHOLDS, False, "off", {}, **known | images)


def test_the_best_threshold_is_found_after_averaging_never_per_image():
    iou = np.zeros((3, 100), np.float32)
    iou[0, 10], iou[1, 20], iou[2, 30], iou[:2, 40] = 1, 1, 1, 0.6
    scores = made_up(iou)
    row = evaluate.summarise(scores, 0.1)["couplings"]["relation"]
    assert evaluate.best_threshold(scores, "relation") == row["best_threshold"] == 0.4
    # per image it would be 100
    assert max(row["gt_known_curve"]) == row["max_box_acc"] == pytest.approx(200 / 3)
    assert row["gt_known"] == pytest.approx(100 / 3)  # at the requested threshold, not the best


def test_a_hit_exceeds_half_while_the_oracle_may_equal_it():
    metrics = evaluate.summarise(made_up(np.full((1, 100), 0.5, np.float32)), 0.2)
    row = metrics["couplings"]["relation"]
    assert row["gt_known"] == 0 and row["max_box_acc"] == 100


def test_a_threshold_that_was_not_scored_is_an_error():
    with pytest.raises(ValueError, match="0.123 was not evaluated"):
        evaluate.summarise(made_up(np.zeros((1, 100), np.float32)), 0.123)


def test_a_threshold_off_the_curves_grid_moves_no_curve():
    thresholds = sorted([*evaluate.THRESHOLDS, 0.0005])
    iou = np.array([[float(t >= 0.5) for t in thresholds]], np.float32)
    scores = replace(made_up(iou), thresholds=thresholds)
    for threshold in (0.0005, 0.7):
        row = evaluate.summarise(scores, threshold)["couplings"]["relation"]
        assert row["gt_known_curve"] == [0] * 50 + [100] * 50 and row["best_threshold"] == 0.5
        assert row["gt_known"] == 100 * (threshold > 0.5)


@pytest.mark.parametrize("box, truth, top1, kind", [
    ((0, 0, 10, 10), [(0, 0, 10, 9)], True, None),
    ((0, 0, 10, 10), [(0, 0, 10, 10)], False, "wrong class"),
    ((0, 0, 16, 4), [(0, 0, 4, 4), (12, 0, 16, 4)], True, "one of several"),
    ((0, 0, 4, 4), [(0, 0, 10, 10)], True, "part of the object"),
    ((0, 0, 16, 16), [(0, 0, 5, 5)], True, "too much"),
    ((0, 0, 4, 4), [(8, 8, 12, 12)], True, "elsewhere"),
    ((0, 0, 8, 4), [(5, 0, 13, 4)], True, "elsewhere"),
    ((0, 0, 4, 4), [(4, 4, 4, 4)], True, "elsewhere"),  # a degenerate box
    ((0, 0, 4, 4), [], False, None),  # not annotated: not counted
])
def test_kinds_of_failure(box, truth, top1, kind):
    truth = torch.tensor(truth, dtype=torch.float32).view(-1, 4)
    iou = max([naive_iou(box, t) for t in truth.tolist()], default=0)
    scores = made_up(
        np.full((1, 100), iou, np.float32), boxes=[truth], top5=np.array([[0 if top1 else 1]]),
        box=np.tile(np.array(box, np.int16), (1, 1, 100, 1)))
    found = evaluate.failure_kinds(scores, "relation", 0.2)[0]
    assert (list(evaluate.FAILURES)[found] if found >= 0 else None) == kind


def test_processes_share_the_work_and_agree(tmp_path):
    """Three processes over 7 images, then over 2, so that one has none: as one process."""
    script = tmp_path / "share.py"
    folders = [str(Path(evaluate.__file__).parent), str(Path(__file__).parent)]
    script.write_text(textwrap.dedent(f"""
        import sys, torch
        sys.path[:0] = {folders!r}
        import torch.distributed as dist
        import torch.multiprocessing as mp
        import evaluate, test_evaluate as t

        def work(rank, world):
            torch.set_num_threads(1)
            dist.init_process_group(
                "gloo", init_method="file://{tmp_path}/meet", rank=rank, world_size=world)
            for n in (7, 2):
                scores = evaluate.evaluate_model(t.toy_model(), t.Toy(n), batch_size=2)
                if rank == n % 3:
                    torch.save(scores, "{tmp_path}/" + str(n))
            dist.destroy_process_group()

        if __name__ == "__main__":
            mp.start_processes(work, (3,), 3, start_method="fork")
    """))
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for n in (7, 2):
        alone = evaluate.evaluate_model(toy_model(), Toy(n), batch_size=4)
        shared = torch.load(tmp_path / str(n), weights_only=False)
        same(shared, alone)


# ---------------------------------------------------------------- the script

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("run") / "best.pt", {"threshold": 0.07})


def test_a_data_set_end_to_end(checkpoint, tmp_path, capsys):
    status, out, err = call(capsys, evaluate, "--checkpoint", checkpoint, "--limit-test", 12,
                            "--out", tmp_path, "--profile", "--save-maps")
    assert status == 0, err
    assert "threshold 0.07 (the checkpoint's own)" in out
    for label in ("12 images", "ms for the forward pass", "CDM's class map", "LCTR", "Oracles",
                  "class attention alone", "patch relation alone", "centred box", "amp off",
                  "ReLU(class map) * M^r"):
        assert label in out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {"n", "threshold", "top1_cls", "top5_cls", "thresholds", "couplings",
            "baselines"} <= metrics.keys()
    assert metrics["thresholds"] == [i / 100 for i in range(100)]
    assert (metrics["coupling"], metrics["amp"]) == ("relation", "off")
    assert set(metrics["baselines"]) == {"whole_image", "centred_box"}
    assert set(metrics["couplings"]) == set(COUPLINGS)
    assert {"top1_loc", "top5_loc", "gt_known", "mean_iou", "gt_known_curve", "max_box_acc",
            "max_box_acc_v2", "best_threshold"} <= metrics["couplings"]["relation"].keys()

    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    assert all(line.keys() == {"path", "label", "top5", "box", "boxes", "iou"} for line in lines)
    for line in lines:
        best = max(naive_iou(line["box"], b) for b in line["boxes"])
        assert line["iou"] == pytest.approx(best, abs=1e-6)
    hit = np.array([line["iou"] > 0.5 for line in lines])
    right = np.array([line["top5"][0] == line["label"] for line in lines])
    row = metrics["couplings"]["relation"]
    assert row["gt_known"] == pytest.approx(100 * hit.mean())
    assert row["top1_loc"] == pytest.approx(100 * (hit & right).mean())
    assert row["mean_iou"] == pytest.approx(np.mean([line["iou"] for line in lines]))

    maps = np.load(tmp_path / "maps.npz")  # enough to find the same boxes again
    fused = torch.from_numpy(np.maximum(maps["class_map"], 0) * maps["relation_map"])[:, None]
    fused = F.interpolate(fused, (16, 16), mode="bilinear", align_corners=False)[:, 0]
    assert largest_boxes(fused, [0.07])[:, 0].tolist() == [line["box"] for line in lines]
    assert all(maps[key].tolist() == [line[key] for line in lines] for key in ("path", "label"))
    for name in ("gallery", "curve", "failures"):
        assert Image.open(tmp_path / f"{name}.png").width > 500


def test_flags_reach_the_numbers(checkpoint, tmp_path, capsys):
    """--gt-class, --crop, --coupling, --threshold auto and off the curve's grid."""
    common = "--checkpoint", checkpoint, "--limit-test", 8, "--out", tmp_path
    status, out, err = call(capsys, evaluate, *common, "--gt-class", "--crop", 20,
                            "--coupling", "cls-only", "--threshold", 0.123)
    assert status == 0, err
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert "0.123 (--threshold)" in out and "LABEL's map" in out and "centre crop of 20" in out
    found = metrics["threshold"], metrics["coupling"], metrics["map_class"]
    assert found == (0.123, "cls-only", "label")
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    boxes = torch.tensor([json.loads(line)["box"] for line in lines])
    assert (boxes.frac() != 0).any()  # image pixels
    assert boxes.min() >= 1.5 and boxes.max() <= 14.5

    status, out, err = call(capsys, evaluate, *common, "--threshold", "auto")
    model, _ = evaluate.load_checkpoint(checkpoint)
    val = data.load_dataset("synthetic", None, "val", 16, limit=8)
    best = evaluate.best_threshold(evaluate.evaluate_model(model, val), "relation")
    assert f"threshold {best:g} (the best gt-known of 8 val" in out


def test_a_checkpoint_without_a_threshold_gets_cams(tmp_path, capsys):
    path = save_checkpoint(tmp_path / "best.pt", head="token")
    status, out, err = call(capsys, evaluate, "--checkpoint", path, "--limit-test", 3)
    assert status == 0 and "patch relation alone (relation-only), threshold 0.2 (CAM's" in out
    assert (tmp_path / "evaluate" / "gallery.png").exists()


def test_several_checkpoints(tmp_path, capsys):
    one = save_checkpoint(tmp_path / "tscam" / "best.pt", head="conv")
    two = save_checkpoint(tmp_path / "lctr" / "best.pt")
    status, out, err = call(capsys, evaluate, "--checkpoint", one, two, "--limit-test", 6,
                            "--out", tmp_path / "both")
    assert status == 0, err
    assert "TS-CAM + RPAM" in out and "LCTR" in out and out.count("class attention alone") == 5
    joint = json.loads((tmp_path / "both" / "metrics.json").read_text())
    assert list(joint) == ["tscam", "lctr"]
    assert joint["tscam"]["couplings"]["none"]["label"] == "CAM"
    alone = json.loads((tmp_path / "both" / "lctr" / "metrics.json").read_text())
    assert alone["couplings"] == joint["lctr"]["couplings"]
    gallery = Image.open(tmp_path / "both" / "gallery.png")
    assert gallery.width > 5 * figures.CELL  # the input and two maps of each


def test_your_own_pictures(checkpoint, tmp_path, capsys):
    source, out_dir = tmp_path / "mine", tmp_path / "out"
    (source / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 255, (40, 90, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side: 90 x 40 is shown as 40 x 90
    pixels.save(source / "a.jpg", exif=exif)
    pixels.convert("L").resize((3, 500)).save(source / "deep" / "a.png")
    (source / "notes.txt").write_text("no picture")
    (source / "broken.png").write_bytes(b"\x89PNG broken")
    status, out, err = call(capsys, evaluate, "--checkpoint", checkpoint,
                            "--images", source, source / "a.jpg", "--out", out_dir)
    assert status == 1 and "broken.png" in err and err.count("\n") == 1
    entries = json.loads((out_dir / "boxes.json").read_text())
    assert [e["size"] for e in entries] == [[40, 90], [3, 500], [40, 90]]
    assert all(e.keys() == {"path", "size", "top5", "box"} for e in entries)
    for entry in entries:
        (width, height), (x0, y0, x1, y1) = entry["size"], entry["box"]
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
        names, chances = zip(*entry["top5"])
        assert len(names) == 5 and set(names) <= set(data.SPECIES)
        assert list(chances) == sorted(chances, reverse=True)
    assert sorted(p.name for p in out_dir.iterdir()) == [
        "a-2.png", "a-3.png", "a.png", "boxes.json", "manifest.json"]
    status, _, err = call(capsys, evaluate, "--checkpoint", checkpoint,
                          "--images", source / "a.jpg", "--out", out_dir)
    assert status == 0 and err == ""


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("flags, status, message", [
    (["--threshold", "1"], 2, "--threshold: got 1, need a number from 0 and below 1"),
    (["--threshold", "-0.1"], 2, "--threshold: got -0.1"),
    (["--threshold", "nan"], 2, "--threshold: got nan"),
    (["--coupling", "both"], 2, "--coupling: invalid choice: 'both'"),
    (["--limit-test", "0"], 2, "--limit-test: got 0"),
    (["--batch-size", "x"], 2, "--batch-size: got x"),
    (["--device", "abacus"], 2, "--device: abacus"),
    (["--crop", "9"], 2, "--crop: got 9, need at least"),
    (["--data", "cub"], 2, "--root: cub needs the data set's folder"),
    (["--data", "cub", "--root", "nowhere"], 1, "nowhere: no such folder"),
    (["--data", "cub", "--root", "nowhere", "--threshold", "auto"], 2,
     "auto needs a val split, cub has none"),
])
def test_bad_flags(checkpoint, tmp_path, capsys, flags, status, message):
    found, out, err = call(
        capsys, evaluate, "--checkpoint", checkpoint, "--out", tmp_path / "out", *flags)
    assert found == status and message in err
    assert err.startswith("evaluate.py: error: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bad_checkpoints(checkpoint, tmp_path, capsys):
    whole = checkpoint.read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save({"model": Path("x")}, tmp_path / "pickle.pt")
    for name in ("none.pt", "cut.pt", "other.pt", "pickle.pt", "."):
        status, out, err = call(capsys, evaluate, "--checkpoint", tmp_path / name)
        assert status == 1 and str(tmp_path / name) in err and err.count("\n") == 1, err


def test_coupling_that_the_head_lacks(tmp_path, capsys):
    path = save_checkpoint(tmp_path / "best.pt", head="token")
    status, _, err = call(capsys, evaluate, "--checkpoint", path, "--coupling", "relation")
    assert status == 2 and "--coupling" in err
    assert "token head, whose couplings are cls-only, relation-only" in err


def test_classes_of_another_data_set(tmp_path, capsys):
    path = save_checkpoint(tmp_path / "best.pt", classes=("finch", "wren"))
    status, _, err = call(capsys, evaluate, "--checkpoint", path, "--limit-test", 3)
    assert status == 1 and "its 2 classes are not the 2 of synthetic test" in err
    assert "class 0 is 'finch' there" in err


def test_out_that_is_a_file(checkpoint, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        status, _, err = call(capsys, evaluate, "--checkpoint", checkpoint, "--out", out)
        assert status == 2 and f"--out: {out}" in err


def test_the_authors_checkpoint_is_scored_from_the_command_line(tmp_path, capsys):
    """A file in the authors' names has no classes and no data set: both come from the flags."""
    for name in ("dots", "lines"):
        for split in ("train", "test"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            Image.new("RGB", (30, 20), "green").save(tmp_path / "set" / split / name / "1.png")
    (tmp_path / "set" / "boxes.csv").write_text("test/dots/1.png,2,3,20,15\n")
    torch.manual_seed(0)
    own = LCTR(2, img_size=16, patch_size=8, embed_dim=64, depth=1, num_heads=1,
               pool="padded").state_dict()
    names = {"cdm.conv.": "conv3x3.", "cdm.score_avg.": "CDM._routing_fn_two.fc.",
             "cdm.score_max.": "CDM._routing_fn_two.fc2.", "cdm.": "CDM."}
    state = {}
    for key, value in own.items():
        prefix = next((prefix for prefix in names if key.startswith(prefix)), "")
        state[names.get(prefix, "") + key.removeprefix(prefix)] = value
    torch.save({"model": state}, tmp_path / "lctr.pth")
    flags = ["--checkpoint", str(tmp_path / "lctr.pth"), "--out", str(tmp_path / "out")]
    assert evaluate.main([*flags, "--data", "folder", "--root", str(tmp_path / "set")]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["n"], metrics["n_boxes"], metrics["head"]) == (2, 1, "cdm")
    assert metrics["threshold"] == 0.2
    capsys.readouterr()
    assert evaluate.main(flags) == 2
    assert "--data: missing" in capsys.readouterr().err


# ---------------------------------------------------------------- files that are not the script's


def theirs(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with what it holds."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("present, flags", [
    (["a.png"], ["--images", "a.png", "--out", "."]),
    (["a.png"], ["--images", ".", "--out", "."]),
    (["g/p.jpg", "g/p.png"], ["--images", "g/p.jpg", "--out", "g"]),
    (["p.jpg", "g/p.png"], ["--images", "p.jpg", "--out", "g"]),
    (["p.jpg", "g/P.PNG", "g/p.png"], ["--images", "p.jpg", "g/P.PNG", "--out", "g"]),
    (["p.jpg", "boxes.json"], ["--images", "p.jpg", "--out", "."]),
    (["p.jpg", "manifest.json"], ["--images", "p.jpg", "--out", "."]),
    (["p.jpg", "g/boxes.json/x"], ["--images", "p.jpg", "--out", "g"]),
    (["g/gallery.png"], ["--out", "g"]),
    (["g/curve.png"], ["--out", "g"]),
    (["g/metrics.json"], ["--out", "g"]),
    (["g/predictions.jsonl"], ["--out", "g"]),
    (["g/maps.npz"], ["--out", "g", "--save-maps"]),
    (["g/failures.png/x"], ["--out", "g"]),
    (["g/last.pt"], ["--out", "g"]),  # runs of train.py
    (["g/best.pt"], ["--out", "g"]),
    (["g/config.json"], ["--out", "g"]),
    (["p.jpg", "g/log.jsonl"], ["--images", "p.jpg", "--out", "g"]),
])
def test_a_users_file_is_never_replaced(checkpoint, tmp_path, monkeypatch, capsys, present, flags):
    monkeypatch.chdir(tmp_path)
    for name in present:
        if name.lower().endswith((".png", ".jpg")):
            picture(tmp_path / name)
        else:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text('{"files": ["boxes.json"]}')
    before = theirs(tmp_path)
    result = call(capsys, evaluate, "--checkpoint", checkpoint, "--limit-test", 3, *flags) \
        if "--images" not in flags else call(capsys, evaluate, "--checkpoint", checkpoint, *flags)
    script_error(result, evaluate, 2)
    assert theirs(tmp_path) == before


def test_own_files_are_replaced_and_a_users_picture_in_their_place_is_not(
        checkpoint, tmp_path, capsys):
    photo, flags = picture(tmp_path / "g" / "p.jpg"), ["--checkpoint", checkpoint, "--images"]
    before = photo.read_bytes()
    for _ in range(3):  # the third finds its own pictures in the folder and leaves them out
        where = tmp_path / "g" if _ else photo
        status, out, err = call(capsys, evaluate, *flags, where, "--out", tmp_path / "g")
        assert (status, err) == (0, "") and "1 pictures and boxes.json" in out
    assert photo.read_bytes() == before
    picture(tmp_path / "g" / "p.png")  # the user puts another in its place
    mine = (tmp_path / "g" / "p.png").read_bytes()
    result = call(capsys, evaluate, *flags, photo, "--out", tmp_path / "g")
    assert "was not written by this script" in script_error(result, evaluate, 2)
    assert (tmp_path / "g" / "p.png").read_bytes() == mine


def test_an_own_picture_is_not_replaced_while_it_is_an_input(checkpoint, tmp_path, capsys):
    photo, out = picture(tmp_path / "p.jpg"), tmp_path / "g"
    assert call(capsys, evaluate, "--checkpoint", checkpoint, "--images", photo,
                "--out", out)[0] == 0
    before = theirs(tmp_path)
    result = call(capsys, evaluate, "--checkpoint", checkpoint, "--images", out / "p.png",
                  "--out", out)
    assert "exists and is an input" in script_error(result, evaluate, 2)
    assert theirs(tmp_path) == before


def test_where_results_go_by_default(tmp_path, capsys, monkeypatch):
    path, photo = save_checkpoint(tmp_path / "run" / "best.pt"), picture(tmp_path / "p.jpg")
    assert call(capsys, evaluate, "--checkpoint", path, "--images", photo)[0] == 0
    assert (tmp_path / "run" / "images" / "p.png").exists()
    flags = evaluate.parse_flags(["--checkpoint", "deit_small", "--images", "p.jpg"])
    assert flags.out == Path("images")


# ---------------------------------------------------------------- photographs with odd names

ODD_NAMES = [
    b"\xff\xfe.jpg",  # no UTF-8
    b"two\nlines.jpg", b"tab\t.jpg", b"bell\x07.jpg", b"x" * 250 + b".jpg",
    "猫".encode() * 80 + b".png", b"%s {} .jpg", b"a.b.c.jpg", b"-dash.jpg", b"no ending",
    "e\u0301.jpg".encode(), "\u202eright to left.jpg".encode(), b"CON.jpg", b"A.jpg", b"a.jpg",
]


def test_any_name_of_a_photograph_is_in_boxes_json(checkpoint, tmp_path, capsys):
    folder, out = tmp_path / "mine", tmp_path / "out"
    paths = [Path(os.fsdecode(os.fsencode(folder) + b"/" + name)) for name in ODD_NAMES]
    folder.mkdir()
    for path in paths:
        Image.new("RGB", (30, 20)).save(path, "JPEG")
    status, _, err = call(capsys, evaluate, "--checkpoint", checkpoint, "--images", *paths,
                          "--out", out)
    assert (status, err) == (0, "")
    entries = json.loads((out / "boxes.json").read_text())
    assert [Path(entry["path"]) for entry in entries] == paths
    assert sum(path.suffix == ".png" for path in out.iterdir()) == len(paths)


@pytest.mark.parametrize("name, content", [
    ("none.jpg", None), ("empty.jpg", b""), ("text.png", b"words"), ("two\nlines.jpg", b""),
    ("cut.png", "cut"), ("x" * 256 + ".jpg", None), ("folder.jpg/none.jpg", None),
])
def test_what_cannot_be_read_is_named_and_skipped(checkpoint, tmp_path, capsys, name, content):
    good, bad, out = picture(tmp_path / "good.jpg"), tmp_path / name, tmp_path / "out"
    if content == "cut":
        content = picture(bad, (300, 300)).read_bytes()
        content = content[:len(content) // 2]
    if content is not None:
        bad.write_bytes(content)
    status, stdout, err = call(capsys, evaluate, "--checkpoint", checkpoint, "--images", bad, good,
                               "--out", out)
    assert status == 1 and err.startswith("evaluate.py: skipped: ") and err.count("\n") == 1
    assert name.replace("\n", "\\n") in err and "1 skipped" in stdout
    entries = json.loads((out / "boxes.json").read_text())
    assert [entry["path"] for entry in entries] == [str(good)]


def test_a_picture_that_cannot_be_written_ends_no_batch(checkpoint, tmp_path, capsys, monkeypatch):
    paths = [picture(tmp_path / f"{i}.jpg") for i in range(3)]
    write = evaluate.write_png

    def failing(path, drawing):
        if path.name == "1.png":
            raise OSError(28, "No space left on device")
        write(path, drawing)

    monkeypatch.setattr(evaluate, "write_png", failing)
    status, _, err = call(capsys, evaluate, "--checkpoint", checkpoint, "--images", *paths,
                          "--out", tmp_path / "out")
    assert status == 1 and "1.jpg: No space left on device" in err and err.count("\n") == 1
    entries = json.loads((tmp_path / "out" / "boxes.json").read_text())
    assert [Path(entry["path"]).name for entry in entries] == ["0.jpg", "2.jpg"]


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize("flags, message", [
    (["--split", "val"], "--split: does nothing with --images"),
    (["--gt-class"], "--gt-class: does nothing"),
    (["--save-maps"], "--save-maps: does nothing"),
    (["--profile"], "--profile: does nothing"),
    (["--data", "synthetic"], "--data: does nothing"),
    (["--root", "."], "--root: does nothing"),
    (["--limit-test", "3"], "--limit-test: does nothing"),
    (["--workers", "1"], "--workers: does nothing"),
    (["--threshold", "0.1", "--data", "synthetic"], "--data: does nothing"),
    (["--checkpoint", "a", "b"], "--images: takes one --checkpoint"),
    (["--img-size", "0"], "--img-size: got 0"),
    (["--img-size", "2x3x4"], "--img-size: got 2x3x4"),
    (["--img-size", "18"], "--img-size"),
    (["--device", "mps"], "--device: mps"),
    (["--device", "meta"], "--device: meta"),
    (["--amp", "fp8"], "--amp: invalid choice"),
    (["--batch", "3"], "unrecognized arguments: --batch"),
    (["--images", ""], "--images: got an empty name"),
    (["--checkpoint", ""], "--checkpoint: got an empty name"),
    (["--out", "x" * 300], "--out: " + "x" * 300 + ": File name too long"),
    (["--out", "/proc/x"], "--out: /proc/x: "),
])
def test_flags_that_do_nothing_or_do_not_fit(checkpoint, tmp_path, capsys, flags, message):
    photo, out = picture(tmp_path / "p.jpg"), tmp_path / "out"
    result = call(capsys, evaluate, "--checkpoint", checkpoint, "--images", photo, "--out", out,
                  *flags)
    err = script_error(result, evaluate, 2)
    assert message in err and len(err) < 400 and not out.exists()


def test_flags_that_serve_the_choice_of_a_threshold(checkpoint, tmp_path, capsys):
    status, out, err = call(
        capsys, evaluate, "--checkpoint", checkpoint, "--images", picture(tmp_path / "p.jpg"),
        "--threshold", "auto", "--data", "synthetic", "--limit-test", 6)
    assert status == 0 and "the best gt-known of 6 val images" in out, err


def test_the_birds_have_no_root(checkpoint, capsys):
    result = call(capsys, evaluate, "--checkpoint", checkpoint, "--data", "synthetic",
                  "--root", ".")
    assert "--root: the synthetic birds are drawn" in script_error(result, evaluate, 2)


def test_an_out_that_leads_nowhere(checkpoint, tmp_path, capsys):
    (tmp_path / "out").symlink_to("nowhere")
    result = call(capsys, evaluate, "--checkpoint", checkpoint, "--limit-test", 2,
                  "--out", tmp_path / "out")
    assert "out: File exists" in script_error(result, evaluate, 2)


@pytest.mark.parametrize("metrics, status, message", [
    ({"threshold": float("nan")}, 1, "its threshold is nan"),
    ({"threshold": "0.3"}, 1, "its threshold is '0.3'"),
    ({"threshold": 3.0}, 1, "its threshold is 3.0"),
    ({"threshold": 1}, 1, "its threshold is 1"),
    ({"threshold": -0.1}, 1, "its threshold is -0.1"),
    ({"threshold": True}, 1, "its threshold is True"),
    ({"threshold": [0.2]}, 1, "its threshold is [0.2]"),
    ({"threshold": 0}, 0, "threshold 0 (the checkpoint's own)"),
    ({"threshold": None}, 0, "threshold 0.2 (CAM's"),
    (None, 0, "threshold 0.2 (CAM's"), ("none", 0, "threshold 0.2 (CAM's"),
])
def test_a_checkpoints_threshold_is_checked(
        checkpoint, tmp_path, capsys, metrics, status, message, without_pictures):
    content = torch.load(checkpoint, weights_only=True) | {"metrics": metrics}
    torch.save(content, tmp_path / "best.pt")
    result = call(capsys, evaluate, "--checkpoint", tmp_path / "best.pt", "--limit-test", 2,
                  "--out", tmp_path / "out")
    if status:
        assert message in script_error(result, evaluate) and not (tmp_path / "out").exists()
    else:
        assert result[0] == 0 and message in result[1]


def test_a_checkpoint_that_names_no_folder(tmp_path, capsys):
    path = save_checkpoint(tmp_path / "best.pt", data="cub")
    content = torch.load(path, weights_only=True)
    del content["config"]["root"]
    torch.save(content, path)
    result = call(capsys, evaluate, "--checkpoint", path)
    assert "--root: cub needs the data set's folder" in script_error(result, evaluate, 2)


def test_help_names_every_flag_in_its_group(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_flags(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n{group}:" in text for group in ("data", "model", "recipe", "run", "output"))
    assert "(default: 64)" in text and "0.2" in text


# ---------------------------------------------------------------- how the script is started


def script(*flags, optimise=(), **environment):
    return subprocess.Popen(
        [sys.executable, *optimise, Path(evaluate.__file__), *map(str, flags)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)


def test_without_docstrings_and_on_a_terminal_of_ascii(checkpoint, tmp_path):
    done = script("--checkpoint", checkpoint, "--images", picture(tmp_path / "é猫.jpg"),
                  "--out", tmp_path / "out", optimise=["-OO"], PYTHONIOENCODING="ascii")
    out, err = done.communicate(timeout=120)
    assert (done.returncode, err) == (0, "") and "1 pictures and boxes.json" in out


@pytest.mark.parametrize("rank, lines", [("0", 1), ("1", 0)])
def test_torchrun_is_refused_in_one_line(checkpoint, capsys, monkeypatch, rank, lines):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    status, out, err = call(capsys, evaluate, "--checkpoint", checkpoint)
    assert (status, out, err.count("\n")) == (2, "", lines)


def test_a_reader_that_leaves_early_is_no_error(checkpoint, tmp_path):
    run = script("--checkpoint", checkpoint, "--out", tmp_path / "out", "--limit-test", "3")
    run.stdout.close()
    assert (run.stderr.read(), run.wait(120)) == ("", 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_one_line(checkpoint, tmp_path, number):
    run = script("--checkpoint", checkpoint, "--out", tmp_path / "out")
    assert run.stdout.readline().endswith("amp off\n")  # it scores now
    run.send_signal(number)
    out, err = run.communicate(timeout=120)
    assert (run.returncode, err) == (1, "evaluate.py: stopped\n")
    assert not (tmp_path / "out" / "metrics.json").exists()


# ---------------------------------------------------------------- a first look without training


def backbone_file(path, head=None, D=64, heads=1, **more):
    """A file in timm's names: a small random ViT, with an image classifier if asked for."""
    torch.manual_seed(1)
    model = LCTR(head or 1, img_size=16, patch_size=4, embed_dim=D, depth=2, num_heads=heads,
                 head="token").eval()
    state = model.state_dict()
    for key in ("weight", "bias"):
        value = state.pop(f"classifier.{key}")
        if head:
            state[f"head.{key}"] = value
    torch.save(state | more, path)
    return model


@pytest.mark.parametrize("img_size", [None, 32, [16, 24]])
def test_a_first_look_needs_no_training(tmp_path, capsys, img_size):
    photo, out = tmp_path / "p.png", tmp_path / "out"
    noise(0, (50, 40)).save(photo)
    backbone_file(tmp_path / "vit.pth")
    flags = ["--img-size", "x".join(map(str, np.atleast_1d(img_size)))] if img_size else []
    status, text, err = call(capsys, evaluate, "--checkpoint", tmp_path / "vit.pth",
                             "--images", photo, "--out", out, "--threshold", 0.4, *flags)
    assert (status, err) == (0, "") and "no class was trained" in text
    assert "1 attention heads" in text  # a guess, printed
    entry, = json.loads((out / "boxes.json").read_text())

    model = LCTR(1, img_size=img_size or 16, patch_size=4, embed_dim=64, depth=2, num_heads=1,
                 head="token").eval()
    evaluate.load_pretrained(model, str(tmp_path / "vit.pth"))
    image, _, _ = data.load_image(photo, model.img_size)
    with torch.no_grad():
        found = model.localize(data.normalise(image[None]))
    for coupling, m in (("cls-only", found.cls_map), ("relation-only", found.relation_map)):
        m = F.interpolate(m[None], model.img_size, mode="bilinear", align_corners=False)[0]
        box = largest_boxes(m, [0.4])[0, 0] / torch.tensor([*model.img_size[::-1]] * 2)
        assert entry["boxes"][coupling] == pytest.approx((box * torch.tensor([50, 40, 50, 40]))
                                                         .tolist())
    assert entry["top5"] == [] and entry["box"] == entry["boxes"]["relation-only"]
    assert figures.is_ours(out / "p.png")


def test_a_file_with_a_classifier_keeps_its_classes(tmp_path, capsys):
    photo = tmp_path / "p.png"
    noise(0, (50, 40)).save(photo)
    model = backbone_file(tmp_path / "deit.pth", head=7)
    status, text, err = call(capsys, evaluate, "--checkpoint", tmp_path / "deit.pth",
                             "--images", photo, "--out", tmp_path / "out")
    assert status == 0 and "1 attention heads (64 channels each" in text, err
    entry, = json.loads((tmp_path / "out" / "boxes.json").read_text())
    with torch.no_grad():
        chances = model(data.normalise(data.load_image(photo, 16)[0][None])).softmax(1)[0]
    best = chances.topk(5)
    assert [name for name, _ in entry["top5"]] == [f"class {c}" for c in best.indices.tolist()]
    assert [p for _, p in entry["top5"]] == pytest.approx(best.values.tolist(), rel=1e-5)
    assert entry["boxes"].keys() == {"cls-only", "relation-only"}


@pytest.mark.parametrize("more, message", [
    ({"blocks.0.ls3": torch.ones(64)}, "blocks.0.ls3"),  # it computes something else
    ({"norm.weight": None}, "norm.weight"), ({"pos_embed": torch.zeros(1, 12, 64)}, "vit.pth"),
    ({"patch_embed.proj.weight": torch.zeros(64, 1, 4, 4)}, "patch_embed"),
])
def test_a_first_look_at_another_network_is_an_error(tmp_path, capsys, more, message):
    backbone_file(tmp_path / "vit.pth", **more)
    state = torch.load(tmp_path / "vit.pth", weights_only=True)
    torch.save({k: v for k, v in state.items() if v is not None}, tmp_path / "vit.pth")
    result = call(capsys, evaluate, "--checkpoint", tmp_path / "vit.pth", "--out",
                  tmp_path / "out", "--images", picture(tmp_path / "p.jpg"))
    assert message in script_error(result, evaluate) and not (tmp_path / "out").exists()


def test_a_backbone_alone_scores_no_data_set(tmp_path, capsys):
    backbone_file(tmp_path / "vit.pth")
    result = call(capsys, evaluate, "--checkpoint", tmp_path / "vit.pth", "--data", "synthetic")
    assert "vit.pth" in script_error(result, evaluate)


def test_another_input_size_resizes_a_checkpoints_positions(checkpoint, tmp_path, capsys):
    status, _, err = call(capsys, evaluate, "--checkpoint", checkpoint, "--limit-test", 4,
                          "--img-size", "32x16", "--out", tmp_path / "out", "--save-maps")
    assert status == 0, err
    assert np.load(tmp_path / "out" / "maps.npz")["cls_map"].shape == (4, 8, 4)


# ---------------------------------------------------------------- data without boxes


def test_without_boxes_one_threshold_is_scored_and_no_curve_drawn(tmp_path, capsys):
    """Classification, maps with predicted boxes, misclassified pictures, how to add boxes."""
    model, dataset = toy_model(), Toy(9, boxes=0)
    dataset.annotated = 0
    scores = evaluate.evaluate_model(model, dataset, threshold=0.3)
    assert scores.thresholds == [0.3] and scores.box.shape[2] == 1
    swept = evaluate.evaluate_model(model, Toy(9, boxes=0), threshold=0.3)
    at = swept.thresholds.index(0.3)
    assert (swept.box[:, :, at] == scores.box[:, :, 0]).all()
    metrics = evaluate.summarise(scores, 0.3)
    assert metrics == evaluate.summarise(swept, 0.3)
    figures.write_png(tmp_path / "curve.png", Image.new("RGB", (1, 1)))  # an earlier run's
    evaluate.report(tmp_path, model, dataset, scores, metrics, "relation", 0.3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "failures.png", "gallery.png", "metrics.json", "predictions.jsonl"]
    text = evaluate.format_table(metrics)
    assert "boxes.csv" in text and "--convert" in text and len(text.splitlines()) < 8
    assert "top-5 localisation" not in text and "gt-known" not in text


def test_a_folder_without_boxes_from_the_command_line(tmp_path, capsys):
    """Its table says how to add boxes; the same folder with boxes.csv gets all of it."""
    for name in ("train/a/1.png", "train/b/1.png", "test/a/2.png", "test/b/2.png"):
        picture(tmp_path / "set" / name)
    path = save_checkpoint(tmp_path / "run" / "best.pt", classes=("a", "b"), data="folder",
                           root=str(tmp_path / "set"))
    out = tmp_path / "run" / "evaluate"
    status, text, err = call(capsys, evaluate, "--checkpoint", path, "--profile")
    assert status == 0 and "boxes.csv" in text and "1 thresholds" in text, err
    assert "gt-known" not in text and not (out / "curve.png").exists()
    (tmp_path / "set" / "boxes.csv").write_text("test/a/2.png,1,2,20,20\n")
    status, text, err = call(capsys, evaluate, "--checkpoint", path, "--profile")
    assert status == 0 and "gt-known" in text and "100 thresholds" in text, err
    assert (out / "curve.png").exists()


@pytest.mark.parametrize("classes, message", [(("a", "b"), None), (("a", "b", "c"), None),
                                              (("a",), "b"), (("b",), "a")])
def test_a_folder_without_train_has_the_checkpoints_classes(tmp_path, capsys, classes, message):
    for name in ("test/a/2.png", "test/b/2.png"):
        picture(tmp_path / "set" / name)
    path = save_checkpoint(tmp_path / "run" / "best.pt", classes=classes, data="folder",
                           root=str(tmp_path / "set"))
    result = call(capsys, evaluate, "--checkpoint", path)
    if message:
        assert message in script_error(result, evaluate)
        return
    assert result[0] == 0, result[2]
    lines = (tmp_path / "run" / "evaluate" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines] == [0, 1]


def test_a_users_curve_is_left_where_no_image_has_a_box(tmp_path):
    model, dataset = toy_model(), Toy(3, boxes=0)
    picture(tmp_path / "curve.png")
    before = (tmp_path / "curve.png").read_bytes()
    scores = evaluate.evaluate_model(model, dataset)
    evaluate.report(tmp_path, model, dataset, scores, evaluate.summarise(scores, 0.2),
                    "relation", 0.2)
    assert (tmp_path / "curve.png").read_bytes() == before


# ---------------------------------------------------------------- precision, failures


def test_amp_reaches_the_forward_pass_and_the_report(checkpoint, tmp_path, capsys):
    model, dataset = toy_model(), Toy(6)
    exact = evaluate.evaluate_model(model, dataset, keep_maps=True)
    mixed = evaluate.evaluate_model(model, dataset, keep_maps=True, amp="bf16")
    assert (exact.amp, mixed.amp) == ("off", "bf16")
    for name in ("class_map", "cls_map", "relation_map"):
        a, b = getattr(exact, name), getattr(mixed, name)
        assert b.dtype == np.float32
        assert not np.array_equal(a, b)
        np.testing.assert_allclose(b, a, rtol=0, atol=0.1 * np.abs(a).max())
    status, out, err = call(capsys, evaluate, "--checkpoint", checkpoint, "--limit-test", 3,
                            "--amp", "bf16", "--out", tmp_path)
    assert status == 0 and "amp bf16" in out, err
    assert json.loads((tmp_path / "metrics.json").read_text())["amp"] == "bf16"


def test_the_default_precision_is_train_pys(monkeypatch):
    monkeypatch.setattr("support.runs.evaluate_flags.open_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert evaluate.parse_flags(["--checkpoint", "x"]).amp == "bf16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert evaluate.parse_flags(["--checkpoint", "x"]).amp == "fp16"


def test_failures_are_told_apart_by_class_and_box():
    """Images: right; wrong class with a right box; both wrong; a part; wrong class, no box."""
    box, nothing = torch.tensor([[0.0, 0, 8, 8]]), torch.zeros(0, 4)
    iou = np.tile(np.float32([[0.9], [0.82], [0.1], [0.1], [0.0]]), (1, 100))
    scores = made_up(
        iou, boxes=[box] * 4 + [nothing], top5=np.array([[0], [1], [1], [0], [1]]),
        box=np.tile(np.array([0, 0, 4, 4], np.int16), (5, 1, 100, 1)))
    groups = evaluate.failure_groups(scores, "relation", 0.2)
    assert [(title.split(" (")[0], images.tolist()) for title, images in groups] == [
        ("Wrong class, though the box is right", [1]),
        ("Wrong class, and the box is wrong too", [2]),
        ("Wrong class", [4]), ("Class right, box wrong, part of the object", [3])]
