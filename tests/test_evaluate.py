"""evaluate.py: each metric against its definition, and the script on good and bad input."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (call, exif, flood_fill, make_model, naive_boxes, naive_iou, noise, normalise,
                     picture, save_checkpoint, script_error)
from PIL import Image

import data
import evaluate
from evaluate import evaluate_model, largest_boxes, summarise
from lctr import COUPLINGS, LCTR, Localization, fuse
from support.report import figures


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


def toy_model(head: str = "cdm", img_size=(24, 32)) -> LCTR:
    return make_model(7, torch.float32, img_size=img_size, patch_size=4, embed_dim=12, depth=2,
                      num_heads=3, head=head, num_kernels=2)


def made_up(iou, **columns) -> evaluate.Evaluation:
    """An evaluation of n images and one coupling with these IoUs (n, 100)."""
    iou = np.asarray(iou, np.float32)
    n, t = iou.shape
    known = {
        "label": np.zeros(n, int), "top5": np.zeros((n, 1), int), "path": ["p"] * n,
        "boxes": [torch.tensor([[0.0, 0, 8, 8]])] * n, "view": np.tile([0.0, 0, 16, 16], (n, 1)),
        "box": np.zeros((n, 1, t, 4), np.int16), "iou": iou[:, None],
        "oracle": np.repeat(iou[:, None, :, None] >= 0.5, 4, 3), "baseline": np.zeros((n, 2))}
    return evaluate.Evaluation("cdm", (16, 16), ("relation",), evaluate.THRESHOLDS, False, "off",
                               **known | columns)


# ---------------------------------------------------------------- what each metric is


@pytest.mark.parametrize("head, gt_class", [
    ("cdm", False), ("cdm", True), ("conv", False), ("token", False)])
def test_every_metric_equals_its_definition_image_by_image(head, gt_class):
    """Every number of summarise() recomputed for each image and map, with the flood fill."""
    model, dataset, threshold = toy_model(head, (12, 16)).eval(), Toy(5, (12, 16)), 0.305
    evaluation = evaluate_model(
        model, dataset, batch_size=4, gt_class=gt_class, threshold=threshold)
    metrics = summarise(evaluation, threshold)
    assert list(metrics["couplings"]) == [
        c for c in COUPLINGS if head != "token" or c.endswith("-only")]
    samples = [dataset[i] for i in range(len(dataset))]
    images = {s["path"]: data.normalise(s["image"][None]) for s in samples}
    ranked = {path: model(image)[0].argsort(descending=True).tolist()
              for path, image in images.items()}
    top1 = {s["path"]: ranked[s["path"]][0] == s["label"] for s in samples}
    top5 = {s["path"]: s["label"] in ranked[s["path"]][:5] for s in samples}
    annotated = [s for s in samples if len(s["boxes"])]
    assert metrics["n"] == 5 and metrics["n_boxes"] == len(annotated) < 5
    assert metrics["top1_cls"] == pytest.approx(100 * np.mean(list(top1.values())))
    assert metrics["top5_cls"] == pytest.approx(100 * np.mean(list(top5.values())))

    for coupling, row in metrics["couplings"].items():
        ious, oracle, any_oracle = [], [], []
        for s in annotated:
            scale = torch.tensor([16, 12, 16, 12]) / torch.tensor(s["size"]).repeat(2)
            truth = (s["boxes"] * scale).tolist()
            for chosen, kept in ((s["label"] if gt_class else -1, ious), (s["label"], oracle)):
                small = fuse(model.localize(images[s["path"]], torch.tensor([[chosen]])), coupling)
                m = F.interpolate(small, (12, 16), mode="bilinear", align_corners=False)[0]
                boxes = naive_boxes(m, [*evaluate.THRESHOLDS, threshold])[0].tolist()
                kept.append([max(naive_iou(b, t) for t in truth) for b in boxes])
            components = [flood_fill(normalise(m[0]), t) or [(0, (0, 0, 16, 12))]
                          for t in evaluate.THRESHOLDS]
            any_oracle.append([max(naive_iou(b, t) for _, b in found for t in truth)
                               for found in components])
        ious, oracle, any_oracle = map(np.array, (ious, oracle, any_oracle))
        hit = ious[:, -1] > 0.5
        assert row["gt_known"] == pytest.approx(100 * hit.mean())
        for name, right in (("top1_loc", top1), ("top5_loc", top5)):
            both = [h and right[s["path"]] for h, s in zip(hit, annotated)]
            assert row[name] == pytest.approx(100 * np.mean(both))
        assert row["mean_iou"] == pytest.approx(ious[:, -1].mean(), abs=1e-6)
        curve = (100 * (ious[:, :-1] > 0.5).mean(0)).tolist()
        assert row["gt_known_curve"] == pytest.approx(curve)
        assert row["best_threshold"] == evaluate.THRESHOLDS[np.argmax(row["gt_known_curve"])]
        v1 = 100 * (oracle[:, :-1] >= 0.5).mean(0).max()
        assert row["max_box_acc"] == pytest.approx(v1)
        assert row["max_box_acc_v2"] == pytest.approx(
            100 * np.mean([(any_oracle >= bar).mean(0).max() for bar in (0.3, 0.5, 0.7)]))
        assert row["top1_loc"] + sum(row["failures"].values()) == pytest.approx(100)


@pytest.mark.parametrize("class_map, box, oracle", [
    ("0000 0000 0000 0000", [0, 0, 8, 16], [True, True, True, False]),  # an IoU of exactly half
    ("1000 0000 0011 0011", [0, 0, 4, 4], [False, True, True, True]),  # not the largest component
])
def test_max_box_acc_needs_half_of_the_largest_component_and_v2_takes_any(class_map, box, oracle):
    maps = torch.tensor([[float(c) for c in row] for row in class_map.split()])
    results = evaluate.evaluate_boxes(
        Localization(None, None, maps.expand(1, 2, 4, 4), *torch.ones(2, 1, 4, 4)),
        torch.tensor([[box]]), (16, 16), ["none"], [0.45], False)
    assert results["oracle"].flatten().tolist() == oracle


def test_localised_is_above_half_and_top1_and_top5_loc_need_the_class():
    top5 = np.array([[0, 1], [1, 0], [1, 2], [0, 1]])
    iou = np.tile([[0.9], [0.9], [0.9], [0.5]], (1, 100))
    row = summarise(made_up(iou, top5=top5), 0.2)["couplings"]["relation"]
    assert (row["top1_loc"], row["top5_loc"], row["gt_known"]) == (25, 50, 75)


def test_max_box_acc_v2_has_a_best_threshold_for_each_iou():
    oracle = np.zeros((1, 1, 100, 4), bool)
    oracle[0, 0, [10, 20, 30], [1, 2, 3]] = True  # IoU >= 0.3, 0.5, 0.7
    row = summarise(made_up(np.zeros((1, 100)), oracle=oracle), 0.1)["couplings"]["relation"]
    assert row["max_box_acc_v2"] == 100 and row["max_box_acc"] == 0


def test_best_threshold_is_chosen_after_averaging_never_per_image():
    iou = np.zeros((3, 100))
    iou[0, 10], iou[1, 20], iou[2, 30], iou[:2, 40] = 1, 1, 1, 0.6
    row = summarise(made_up(iou), 0.1)["couplings"]["relation"]
    assert evaluate.best_threshold(made_up(iou), "relation") == row["best_threshold"] == 0.4
    # per image it would be 100
    assert max(row["gt_known_curve"]) == row["max_box_acc"] == pytest.approx(200 / 3)
    assert row["gt_known"] == pytest.approx(100 / 3)  # at the requested threshold, not the best


@pytest.mark.parametrize("box, truth, top1, kind", [
    ((0, 0, 10, 10), [(0, 0, 10, 9)], True, None),
    ((0, 0, 10, 10), [(0, 0, 10, 10)], False, "wrong class"),
    ((0, 0, 16, 4), [(0, 0, 4, 4), (12, 0, 16, 4)], True, "one of several"),
    ((0, 0, 4, 4), [(0, 0, 10, 10)], True, "part of the object"),
    ((0, 0, 16, 16), [(0, 0, 5, 5)], True, "too much"),
    ((0, 0, 4, 4), [(8, 8, 12, 12)], True, "elsewhere"),
    ((0, 0, 8, 4), [(5, 0, 13, 4)], True, "elsewhere"),
    ((0, 0, 4, 4), [(4, 4, 4, 4)], True, "elsewhere"),  # a degenerate box
    ((0, 0, 4, 4), [], False, "wrong class"),
    ((0, 0, 4, 4), [], True, None),
])
def test_kinds_of_failure(box, truth, top1, kind):
    iou = max([naive_iou(box, t) for t in truth], default=0)
    evaluation = made_up(
        np.full((1, 100), iou), boxes=[torch.tensor(truth, dtype=torch.float32).view(-1, 4)],
        top5=np.array([[0 if top1 else 1]]), box=np.tile(np.array(box, np.int16), (1, 1, 100, 1)))
    found = evaluate.failure_kinds(evaluation, "relation", 0.2)[0]
    assert (list(evaluate.FAILURES)[found] if found >= 0 else None) == kind


# ---------------------------------------------------------------- one pass over a data set


def same(a: evaluate.Evaluation, b: evaluate.Evaluation) -> None:
    for key, value in vars(a).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_allclose(value, getattr(b, key), rtol=1e-5, atol=1e-6)
        else:
            assert str(value) == str(getattr(b, key)), key


def test_one_forward_pass_serves_every_coupling_in_batches_of_any_size(monkeypatch):
    model, dataset, seen = toy_model().train(), Toy(10), []
    forward = model.forward_features

    def counted(images, *rest):
        seen.append(len(images))
        return forward(images, *rest)

    monkeypatch.setattr(model, "forward_features", counted)
    whole = evaluate_model(model, dataset, batch_size=10, keep_maps=True)
    assert whole.path == [f"p{i}" for i in range(10)] and model.training
    same(evaluate_model(model, dataset, batch_size=4, keep_maps=True), whole)
    assert seen == [10, 4, 4, 2]
    alone = summarise(evaluate_model(model, dataset, couplings=()), 0.2)  # classification alone
    assert alone["couplings"] == {} and alone["top5_cls"] == summarise(whole, 0.2)["top5_cls"] > 0


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
                evaluation = evaluate.evaluate_model(t.toy_model(), t.Toy(n), batch_size=2)
                if rank == n % 3:
                    torch.save(evaluation, "{tmp_path}/" + str(n))
            dist.destroy_process_group()

        if __name__ == "__main__":
            mp.start_processes(work, (3,), 3, start_method="fork")
    """))
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for n in (7, 2):
        shared = torch.load(tmp_path / str(n), weights_only=False)
        same(shared, evaluate_model(toy_model(), Toy(n), batch_size=4))


def test_amp_rounds_the_forward_pass_and_keeps_maps_in_float32():
    exact, mixed = (evaluate_model(toy_model(), Toy(6), keep_maps=True, amp=amp)
                    for amp in ("off", "bf16"))
    for name in ("class_map", "cls_map", "relation_map"):
        a, b = getattr(exact, name), getattr(mixed, name)
        assert b.dtype == np.float32 and not np.array_equal(a, b)
        np.testing.assert_allclose(b, a, rtol=0, atol=0.1 * np.abs(a).max())


def test_without_boxes_one_threshold_is_evaluated_and_no_curve_drawn(tmp_path):
    """Classification, maps with predicted boxes, misclassified pictures, how to add boxes."""
    model, dataset = toy_model(), Toy(9, boxes=0)
    swept = evaluate_model(model, dataset, threshold=0.3)  # it does not know that there are none
    dataset.annotated = 0
    evaluation = evaluate_model(model, dataset, threshold=0.3)
    metrics = summarise(evaluation, 0.3)
    assert evaluation.thresholds == [0.3] and metrics == summarise(swept, 0.3)
    assert metrics["couplings"]["relation"]["gt_known"] is None
    with pytest.raises(ValueError, match="needs annotated boxes"):
        evaluate.best_threshold(evaluation, "relation")

    curve, names = tmp_path / "curve.png", {"failures.png", "gallery.png", "metrics.json",
                                            "predictions.jsonl"}
    figures.write_png(curve, Image.new("RGB", (1, 1)))  # an earlier run's
    written = evaluate.report(tmp_path, model, dataset, evaluation, metrics, "relation", 0.3)
    assert {path.name for path in tmp_path.iterdir()} == names
    assert read(tmp_path / "predictions.jsonl")[0]["iou"] is None
    text = evaluate.format_table([written])
    assert "9 images, 0 of them with boxes" in text and "--convert" in text

    picture(curve)  # a user's, which stays
    evaluate.report(tmp_path, model, dataset, evaluation, metrics, "relation", 0.3)
    assert curve.exists()


# ---------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("run") / "best.pt", {"threshold": 0.07})


def passes(capsys, *flags) -> str:
    """Standard output of an evaluate.py that ends well."""
    status, out, err = call(capsys, evaluate, *flags)
    assert status == 0, err
    return out


def fails(capsys, *flags, status=1) -> str:
    return script_error(call(capsys, evaluate, *flags), evaluate, status)


def read(path: Path) -> dict | list:
    """metrics.json, boxes.json, or the lines of predictions.jsonl."""
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" \
        else json.loads(text)


def test_a_data_set_end_to_end(checkpoint, tmp_path, capsys):
    out = passes(capsys, "--checkpoint", checkpoint, "--limit-test", 12, "--out", tmp_path,
                 "--save-maps")
    for text in ("threshold 0.07 (the checkpoint's own)", "12 images", "CDM's class map", "LCTR",
                 "Oracles", "patch relation alone", "centred box", "amp off",
                 "ReLU(class map) * M^r"):
        assert text in out
    metrics, lines = read(tmp_path / "metrics.json"), read(tmp_path / "predictions.jsonl")
    assert {"n", "threshold", "top1_cls", "top5_cls"} <= metrics.keys()
    assert metrics["thresholds"] == [i / 100 for i in range(100)]
    assert set(metrics["baselines"]) == {"whole_image", "centred_box"}
    assert set(metrics["couplings"]) == set(COUPLINGS)
    row = metrics["couplings"][metrics["coupling"]]
    assert {"top5_loc", "gt_known_curve", "max_box_acc", "max_box_acc_v2",
            "best_threshold"} <= row.keys()

    # the metrics again, from the predictions, and these from the maps
    assert all(line.keys() == {"path", "label", "top5", "box", "boxes", "iou"} for line in lines)
    ious = [max(naive_iou(line["box"], b) for b in line["boxes"]) for line in lines]
    assert [line["iou"] for line in lines] == pytest.approx(ious, abs=1e-6)
    hit = np.array(ious) > 0.5
    right = np.array([line["top5"][0] == line["label"] for line in lines])
    assert row["gt_known"] == pytest.approx(100 * hit.mean())
    assert row["top1_loc"] == pytest.approx(100 * (hit & right).mean())
    assert row["mean_iou"] == pytest.approx(np.mean(ious))
    maps = np.load(tmp_path / "maps.npz")
    fused = torch.from_numpy(np.maximum(maps["class_map"], 0) * maps["relation_map"])[:, None]
    fused = F.interpolate(fused, (16, 16), mode="bilinear", align_corners=False)[:, 0]
    assert largest_boxes(fused, [0.07])[:, 0].tolist() == [line["box"] for line in lines]
    assert all(maps[key].tolist() == [line[key] for line in lines] for key in ("path", "label"))
    for name in ("gallery", "curve", "failures"):
        assert figures.is_ours(tmp_path / f"{name}.png")


def test_flags_reach_the_metrics(checkpoint, tmp_path, capsys):
    """--gt-class, --crop, --coupling, --amp, --img-size, --threshold auto and off the curve's."""
    common = "--checkpoint", checkpoint, "--limit-test", 8, "--out", tmp_path
    out = passes(capsys, *common, "--gt-class", "--crop", 20, "--coupling", "cls-only",
                 "--threshold", 0.123, "--amp", "bf16")
    metrics = read(tmp_path / "metrics.json")
    assert "0.123 (--threshold)" in out and "LABEL's map" in out and "centre crop of 20" in out
    assert [metrics[key] for key in ("threshold", "coupling", "map_class", "amp")] == [
        0.123, "cls-only", "label", "bf16"]
    boxes = torch.tensor([line["box"] for line in read(tmp_path / "predictions.jsonl")])
    assert (boxes.frac() != 0).any()  # image pixels
    assert boxes.min() >= 1.5 and boxes.max() <= 14.5

    out = passes(capsys, *common, "--threshold", "auto")
    model, _ = evaluate.load_checkpoint(checkpoint)
    val = data.load_dataset("synthetic", None, "val", 16, limit=8)
    best = evaluate.best_threshold(evaluate_model(model, val), "relation")
    assert f"threshold {best:g} (the best gt-known of 8 val" in out

    passes(capsys, *common, "--img-size", "32x16", "--save-maps")
    assert np.load(tmp_path / "maps.npz")["cls_map"].shape == (8, 8, 4)


def test_a_token_head_has_attention_maps_alone(tmp_path, capsys):
    path = save_checkpoint(tmp_path / "best.pt", head="token")
    out = passes(capsys, "--checkpoint", path, "--limit-test", 3)
    assert "patch relation alone (relation-only), threshold 0.2 (CAM's" in out
    assert (tmp_path / "evaluate" / "gallery.png").exists()  # where results go by default
    err = fails(capsys, "--checkpoint", path, "--coupling", "relation", status=2)
    assert "--coupling" in err and "token head, whose couplings are cls-only, relation-only" in err


def class_folders(root: Path, **files: int) -> Path:
    """test/a/0.png, ... and one training picture a class, for a=2, b=3."""
    for name, count in files.items():
        picture(root / "train" / name / "0.png")
        for i in range(count):
            picture(root / "test" / name / f"{i}.png")
    return root


def test_checkpoints_of_different_roots_are_compared_on_the_first_ones_data(tmp_path, capsys):
    """One table, one metrics.json and one gallery."""
    roots = [class_folders(tmp_path / "one", a=3, b=2), class_folders(tmp_path / "two", a=1, b=1)]
    runs = [save_checkpoint(tmp_path / f"run-{root.name}" / "best.pt", classes=("a", "b"),
                            data="folder", root=str(root), head=head)
            for root, head in zip(roots, ("conv", "cdm"))]
    both, out = ["--checkpoint", *runs, "--out", tmp_path / "both"], tmp_path / "both"
    table = passes(capsys, *both)
    assert f"{runs[1]} was trained on {roots[1]}, but all are evaluated on" in table
    assert "TS-CAM + RPAM" in table and "LCTR" in table
    joint = read(out / "metrics.json")
    assert [(name, metrics["n"]) for name, metrics in joint.items()] == [("run-one", 5),
                                                                         ("run-two", 5)]
    assert joint["run-two"]["couplings"] == read(out / "run-two" / "metrics.json")["couplings"]
    assert Image.open(out / "gallery.png").width > 5 * figures.CELL  # input, two maps of each
    assert "was trained on" not in passes(capsys, *both, "--root", roots[1])
    assert [metrics["n"] for metrics in read(out / "metrics.json").values()] == [2, 2]
    paths = {line["path"] for run in ("run-one", "run-two")
             for line in read(out / run / "predictions.jsonl")}
    assert paths == {str(roots[1] / "test" / name / "0.png") for name in "ab"}


def test_a_file_without_config_takes_its_data_from_the_flags(tmp_path, capsys):
    """Such as the authors' checkpoint: sizes read off its shapes, classes without names."""
    root = class_folders(tmp_path / "set", dots=1, lines=1)
    (root / "boxes.csv").write_text("test/dots/0.png,2,3,20,15\n")
    torch.manual_seed(0)
    model = LCTR(2, img_size=16, patch_size=8, embed_dim=64, depth=1, num_heads=1, pool="padded")
    torch.save({"model": model.state_dict()}, tmp_path / "lctr.pth")
    flags = ["--checkpoint", tmp_path / "lctr.pth", "--out", tmp_path / "out"]
    assert "1 attention heads" in passes(capsys, *flags, "--data", "folder", "--root", root)
    metrics = read(tmp_path / "out" / "metrics.json")
    assert [metrics[key] for key in ("n", "n_boxes", "head", "threshold")] == [2, 1, "cdm", 0.2]
    assert "--data: missing" in fails(capsys, *flags, status=2)


@pytest.mark.parametrize("classes, message", [(("a", "b"), None), (("a", "b", "c"), None),
                                              (("a",), "b"), (("b",), "a")])
def test_a_folder_without_train_has_the_checkpoints_classes(tmp_path, capsys, classes, message):
    """And without boxes.csv its table says how to add boxes."""
    for name in ("test/a/2.png", "test/b/2.png"):
        picture(tmp_path / "set" / name)
    path = save_checkpoint(tmp_path / "run" / "best.pt", classes=classes, data="folder",
                           root=str(tmp_path / "set"))
    out = tmp_path / "run" / "evaluate"
    if message:
        assert message in fails(capsys, "--checkpoint", path)
        return
    text = passes(capsys, "--checkpoint", path)
    assert [line["label"] for line in read(out / "predictions.jsonl")] == [0, 1]
    assert "boxes.csv" in text and not (out / "curve.png").exists()
    (tmp_path / "set" / "boxes.csv").write_text("test/a/2.png,1,2,20,20\n")
    assert "gt-known" in passes(capsys, "--checkpoint", path) and (out / "curve.png").exists()


@pytest.mark.parametrize("metrics, message", [
    *(({"threshold": wrong}, f"its threshold is {wrong!r}")
      for wrong in (float("nan"), "0.3", 1, True, [0.2])),
    ({"threshold": 0}, "threshold 0 (the checkpoint's own)"),
    (None, "threshold 0.2 (CAM's"),
])
def test_a_checkpoints_threshold_is_checked(
        checkpoint, tmp_path, capsys, metrics, message, without_pictures):
    torch.save(torch.load(checkpoint, weights_only=True) | {"metrics": metrics}, tmp_path / "b.pt")
    flags = "--checkpoint", tmp_path / "b.pt", "--limit-test", 2, "--out", tmp_path / "out"
    assert message in (fails if message.startswith("its") else passes)(capsys, *flags)
    assert (tmp_path / "out").exists() != message.startswith("its")


# ---------------------------------------------------------------- your own photographs


def test_photographs_get_a_picture_and_an_entry_each(tmp_path, capsys):
    source, out = tmp_path / "mine", tmp_path / "run" / "images"
    picture(source / "a.jpg", (90, 40), exif=exif(6))  # on its side: shown as 40 x 90
    picture(source / "deep" / "a.png", (3, 500))
    (source / "broken.png").write_bytes(b"\x89PNG broken")
    (source / "unreadable.heic").write_text("no format of Pillow's")
    path = save_checkpoint(tmp_path / "run" / "best.pt")
    status, text, err = call(
        capsys, evaluate, "--checkpoint", path, "--images", source, source / "a.jpg")
    assert status == 1 and "broken.png" in err and err.count("\n") == 1
    assert "note: 1 files" in text and "unreadable.heic" in text
    entries = read(out / "boxes.json")
    assert [e["size"] for e in entries] == [[40, 90], [3, 500], [40, 90]]
    for entry in entries:
        (width, height), (x0, y0, x1, y1) = entry["size"], entry["box"]
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
        names, chances = zip(*entry["top5"])
        assert len(names) == 5 and set(names) <= set(data.SPECIES)
        assert list(chances) == sorted(chances, reverse=True)
    assert {p.name for p in out.iterdir()} == {
        "a-2.png", "a-3.png", "a.png", "boxes.json", "manifest.json"}
    out = evaluate.parse_flags(["--checkpoint", "deit_small", "--images", "p.jpg"]).out
    assert out == Path("images")  # of a downloaded checkpoint


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
    passes(capsys, "--checkpoint", checkpoint, "--images", *paths, "--out", out)
    assert [Path(entry["path"]) for entry in read(out / "boxes.json")] == paths
    assert sum(path.suffix == ".png" for path in out.iterdir()) == len(paths)


@pytest.mark.parametrize("name, content", [
    ("none.jpg", None), ("empty.jpg", 0), ("two\nlines.jpg", 0), ("cut.png", 0.5),
    ("x" * 256 + ".jpg", None), ("full.jpg", 1),
])
def test_what_cannot_be_read_or_written_is_named_and_skipped(
        checkpoint, tmp_path, capsys, name, content):
    good, bad, out = picture(tmp_path / "good.jpg"), tmp_path / name, tmp_path / "out"
    (out / ".full.png.partial").mkdir(parents=True)  # full.jpg's picture cannot be written
    if content is not None:
        whole = picture(bad, (300, 300)).read_bytes()
        bad.write_bytes(whole[:int(content * len(whole))])
    status, stdout, err = call(capsys, evaluate, "--checkpoint", checkpoint, "--images", bad, good,
                               "--out", out)
    assert status == 1 and err.startswith("evaluate.py: skipped: ") and err.count("\n") == 1
    assert name.replace("\n", "\\n").split(".")[0] in err and "1 skipped" in stdout
    assert [entry["path"] for entry in read(out / "boxes.json")] == [str(good)]


def backbone_file(path, head=None, **more):
    """A file in timm's names: a small random ViT, with an image classifier if asked for."""
    torch.manual_seed(1)
    model = LCTR(head or 1, img_size=16, patch_size=4, embed_dim=64, depth=2, num_heads=1,
                 head="token").eval()
    state = model.state_dict()
    for key in ("weight", "bias"):
        value = state.pop(f"classifier.{key}")
        if head:
            state[f"head.{key}"] = value
    torch.save(state | more, path)
    return model


@pytest.mark.parametrize("img_size", [None, [16, 24]])
def test_a_first_look_needs_no_training(tmp_path, capsys, img_size):
    photo, out = tmp_path / "p.png", tmp_path / "out"
    noise(0, (50, 40)).save(photo)
    backbone_file(tmp_path / "vit.pth")
    flags = ["--img-size", "x".join(map(str, img_size))] if img_size else []
    text = passes(capsys, "--checkpoint", tmp_path / "vit.pth", "--images", photo, "--out", out,
                  "--threshold", 0.4, *flags)
    assert "no class was trained" in text and "1 attention heads" in text  # a guess, printed
    entry, = read(out / "boxes.json")

    model = LCTR(1, img_size=img_size or 16, patch_size=4, embed_dim=64, depth=2, num_heads=1,
                 head="token").eval()
    evaluate.load_pretrained(model, str(tmp_path / "vit.pth"))
    image, _, _ = data.load_image(photo, model.img_size)
    found = model.localize(data.normalise(image[None]))
    for coupling, m in (("cls-only", found.cls_map), ("relation-only", found.relation_map)):
        m = F.interpolate(m[None], model.img_size, mode="bilinear", align_corners=False)[0]
        box = largest_boxes(m, [0.4])[0, 0] / torch.tensor([*model.img_size[::-1]] * 2)
        box = box * torch.tensor([50, 40, 50, 40])
        assert entry["boxes"][coupling] == pytest.approx(box.tolist())
    assert entry["top5"] == [] and entry["box"] == entry["boxes"]["relation-only"]


def test_a_file_with_a_classifier_keeps_its_classes(tmp_path, capsys):
    photo = tmp_path / "p.png"
    noise(0, (50, 40)).save(photo)
    model = backbone_file(tmp_path / "deit.pth", head=7)
    text = passes(capsys, "--checkpoint", tmp_path / "deit.pth", "--images", photo,
                  "--out", tmp_path / "out")
    assert "1 attention heads (64 channels each" in text
    entry, = read(tmp_path / "out" / "boxes.json")
    chances = model(data.normalise(data.load_image(photo, 16)[0][None])).softmax(1)[0]
    names, top5 = zip(*entry["top5"])
    assert names == tuple(f"class {c}" for c in chances.topk(5).indices.tolist())
    assert top5 == pytest.approx(chances.topk(5).values.tolist(), rel=1e-5)
    assert entry["boxes"].keys() == {"cls-only", "relation-only"}


def test_a_backbone_of_another_network_or_for_a_data_set_is_an_error(tmp_path, capsys):
    backbone_file(tmp_path / "vit.pth")
    err = fails(capsys, "--checkpoint", tmp_path / "vit.pth", "--data", "synthetic")
    assert "vit.pth: no head" in err
    backbone_file(tmp_path / "vit.pth", **{"blocks.0.ls3": torch.ones(64)})
    err = fails(capsys, "--checkpoint", tmp_path / "vit.pth", "--out", tmp_path / "out",
                "--images", picture(tmp_path / "p.jpg"))
    assert "blocks.0.ls3" in err and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- files that are not the script's


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with what it holds."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("present, flags", [
    (["a.png"], ["--images", "a.png", "--out", "."]),
    (["a.png"], ["--images", ".", "--out", "."]),
    (["p.jpg", "g/p.png"], ["--images", "p.jpg", "--out", "g"]),
    (["p.jpg", "g/P.PNG", "g/p.png"], ["--images", "p.jpg", "g/P.PNG", "--out", "g"]),
    (["p.jpg", "boxes.json"], ["--images", "p.jpg", "--out", "."]),
    (["p.jpg", "manifest.json"], ["--images", "p.jpg", "--out", "."]),
    (["p.jpg", "g/boxes.json/x"], ["--images", "p.jpg", "--out", "g"]),
    (["g/gallery.png"], ["--out", "g"]),
    (["g/metrics.json"], ["--out", "g"]),
    (["g/maps.npz"], ["--out", "g", "--save-maps"]),
    (["g/failures.png/x"], ["--out", "g"]),
    (["g/last.pt"], ["--out", "g"]),  # runs of train.py
    (["g/config.json"], ["--out", "g"]),
    (["p.jpg", "g/log.jsonl"], ["--images", "p.jpg", "--out", "g"]),
    (["g/two/log.jsonl"], ["--checkpoint", "one/best.pt", "two/best.pt", "--out", "g"]),
])
def test_a_users_file_is_never_replaced(tmp_path, monkeypatch, capsys, present, flags):
    monkeypatch.chdir(tmp_path)
    for name in ("one/best.pt", "two/best.pt"):
        save_checkpoint(name)
    for name in present:
        if name.lower().endswith((".png", ".jpg")):
            picture(tmp_path / name)
        else:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text('{"files": ["boxes.json"]}')
    before = contents(tmp_path)
    limit = [] if "--images" in flags else ["--limit-test", 3]
    fails(capsys, "--checkpoint", "one/best.pt", *limit, *flags, status=2)
    assert contents(tmp_path) == before


def test_own_pictures_are_replaced_unless_they_are_inputs(checkpoint, tmp_path, capsys):
    photo, out = picture(tmp_path / "g" / "p.jpg"), tmp_path / "g"
    flags = ["--checkpoint", checkpoint, "--out", out, "--images"]
    for where in (photo, photo, out):  # the folder's own pictures are none of its photographs
        assert "1 pictures and boxes.json" in passes(capsys, *flags, where)
    before = contents(tmp_path)
    assert "exists and is an input" in fails(capsys, *flags, out / "p.png", status=2)
    assert contents(tmp_path) == before


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize("flags, status, message", [
    (["--threshold", "1"], 2, "--threshold: got 1, need a number from 0 and below 1"),
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
    (["--data", "synthetic", "--root", "."], 2, "--root: the synthetic birds are drawn"),
    (["--img-size", "18"], 2, "--img-size"),
    (["--img-size", "2x3x4"], 2, "--img-size: got 2x3x4"),
    (["--device", "meta"], 2, "--device: meta"),
    (["--batch", "3"], 2, "unrecognized arguments: --batch"),
    (["--checkpoint", "none.pt"], 1, "none.pt"),
    (["--out", "x" * 300], 2, "--out: " + "x" * 300 + ": File name too long"),
    (["--out", "/proc/x"], 2, "--out: /proc/x: "),
    (["--images", "."], 2, "--images: no picture in ."),
    (["--checkpoint", ""], 2, "got an empty name"),
    (["--images", ""], 2, "got an empty name"),
    (["--images", "a", "--checkpoint", "a", "b"], 2, "--images: takes one --checkpoint"),
    (["--images", "a", "--threshold", "0.1", "--data", "synthetic"], 2, "--data: does nothing"),
    *((["--images", "a", flag, *value], 2, f"{flag}: does nothing with --images")
      for flag, *value in (["--split", "val"], ["--gt-class"], ["--save-maps"],
                           ["--root", "."], ["--limit-test", "3"], ["--workers", "1"])),
])
def test_a_flag_that_does_not_fit_ends_in_one_line(
        checkpoint, tmp_path, monkeypatch, capsys, flags, status, message):
    monkeypatch.chdir(tmp_path)
    err = fails(capsys, "--checkpoint", checkpoint, "--out", tmp_path / "out", *flags,
                status=status)
    assert message in err and len(err) < 400 and not any(tmp_path.iterdir())


def test_flags_that_serve_the_choice_of_a_threshold(checkpoint, tmp_path, capsys):
    out = passes(capsys, "--checkpoint", checkpoint, "--images", picture(tmp_path / "p.jpg"),
                 "--threshold", "auto", "--data", "synthetic", "--limit-test", 6)
    assert "the best gt-known of 6 val images" in out


# ---------------------------------------------------------------- how the script is started


def script(*flags, optimise=(), **environment):
    return subprocess.Popen(
        [sys.executable, *optimise, Path(evaluate.__file__), *map(str, flags)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)


def test_without_docstrings_and_on_a_terminal_of_ascii(checkpoint, tmp_path):
    run = script("--checkpoint", checkpoint, "--images", picture(tmp_path / "é猫.jpg"),
                 "--out", tmp_path / "out", optimise=["-OO"], PYTHONIOENCODING="ascii")
    out, err = run.communicate(timeout=120)
    assert (run.returncode, err) == (0, "") and "1 pictures and boxes.json" in out


def test_torchrun_is_refused_in_one_line(checkpoint, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in fails(capsys, "--checkpoint", checkpoint, status=2)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_standard_output_is_named_and_a_reader_that_leaves_is_no_error(checkpoint, tmp_path):
    flags = "--checkpoint", checkpoint, "--out", tmp_path / "out", "--limit-test", "3"
    run = script(*flags)
    run.stdout.close()
    assert (run.stderr.read(), run.wait(120)) == ("", 1)
    with open("/dev/full", "w") as full:
        run = subprocess.run([sys.executable, evaluate.__file__, *map(str, flags)], text=True,
                             stdout=full, stderr=subprocess.PIPE)
    assert run.returncode == 1
    assert run.stderr == "evaluate.py: error: standard output: No space left on device\n"


@pytest.mark.parametrize("number", [
    signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)])
def test_a_signal_ends_it_in_one_line(checkpoint, tmp_path, number):
    run = script("--checkpoint", checkpoint, "--out", tmp_path / "out")
    assert run.stdout.readline().endswith("amp off\n")  # it evaluates now
    run.send_signal(number)
    out, err = run.communicate(timeout=120)
    assert (run.returncode, err) == (1, "evaluate.py: stopped\n")
    assert not (tmp_path / "out" / "metrics.json").exists()
