"""docs/experiments/study.py on a few tiny birds, and its statistics against closed forms."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import evaluate
from lctr import LCTR, load_checkpoint

ROOT = Path(__file__).parent.parent
TINY = ("--limit-test 24 --img-size 32 --embed-dim 12 --depth 2 --num-heads 2 --batch-size 8 "
        "--epochs 1 --pretrain-epochs 1 --limit-train 17").split()
spec = importlib.util.spec_from_file_location("study", ROOT / "docs" / "experiments" / "study.py")
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)


def test_a_study_is_not_run_twice(tmp_path, capsys):
    command = ["7", *TINY, "--seeds", "1", "--regime", "species", "--out", str(tmp_path)]
    study.main(command)
    first = capsys.readouterr().out
    written = lambda: {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")
                       if path.suffix in (".pt", ".npz")}
    runs = written()
    assert {path.parent.name for path in runs} == {"pretraining", "kernel-size-1", "default"}
    assert {path.parent.name for path in runs if path.name == "pretrained.pt"} == {"pretraining"}
    study.main([*command, "--results", str(tmp_path / "again.json")])
    assert capsys.readouterr().out == first
    assert runs == written()

    ((title, results),) = json.loads((tmp_path / "study.json").read_text()).items()
    # other recipes stand beside, not in place of it
    assert title == f"Table 7, species, {' '.join(TINY[2:])}"
    tables, page = study.markdown(title, results), (tmp_path / "study.md").read_text()
    assert tables in page and tables in first and results["command"] in page
    assert results["rows"].keys() == {"1 x 1", "3 x 3"} and results["seeds"] == 1
    assert results["commit"]
    measured = json.loads(
        (tmp_path / "species" / "seed0" / "default" / "measured.json").read_text())
    assert results["rows"]["3 x 3"]["gt_known"]["mean"] == measured["couplings"][
        "relation"]["gt_known"]
    assert measured["causes"]["accuracy_own_scores"] == pytest.approx(measured["top1_cls"])
    model = load_checkpoint(tmp_path / "species" / "seed0" / "default" / "last.pt")[0]
    val, test = (evaluate.score(model, data.load_dataset("synthetic", None, split, 32, limit=24))
                 for split in ("val", "test"))
    for coupling, found in measured["couplings"].items():
        curve = evaluate.summarise(val, 0)["couplings"][coupling]["gt_known_curve"]
        assert curve[round(100 * found["threshold"])] == max(curve[1:91])
        expected = evaluate.summarise(test, found["threshold"])["couplings"][coupling]
        assert found["gt_known"] == pytest.approx(expected["gt_known"])
        assert found["top1_loc"] == pytest.approx(expected["top1_loc"])
        hits = np.load(tmp_path / "species" / "seed0" / "default" / "measured.npz")
        assert [100 * hits[key].mean() for key in (f"{coupling} gt_known", f"{coupling} top1_loc",
                                                   "top1_cls")] == \
            pytest.approx([found["gt_known"], found["top1_loc"], measured["top1_cls"]])
    assert (study.THRESHOLDS[0], study.THRESHOLDS[-1], len(study.THRESHOLDS)) == (0.01, 0.9, 90)
    pretrained = torch.load(tmp_path / "species" / "seed0" / "pretraining" / "pretrained.pt",
                            weights_only=True)
    # species alone: no output for the palette
    assert len(pretrained["model"]["classifier.bias"]) == 9


def test_every_run_goes_on_from_its_seeds_pretraining(tmp_path, capsys):
    study.main(["8", *TINY, "--seeds", "2", "--jobs", "2", "--regime", "species + palette", "--lr",
                "1e-30",
                "--out", str(tmp_path)])
    assert "| LCTR |" in capsys.readouterr().out
    for seed in range(2):
        folder = tmp_path / "species+palette" / f"seed{seed}"
        pretrained = torch.load(folder / "pretraining" / "pretrained.pt",
                                weights_only=True)["model"]
        assert len(pretrained["classifier.bias"]) == 17
        for row in ("default", "head-conv"):
            model = torch.load(folder / row / "last.pt", weights_only=True)["model"]
            assert torch.equal(model["blocks.1.attn.qkv.weight"],
                               pretrained["blocks.1.attn.qkv.weight"])


def test_a_failed_run_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        study.main(["8", *TINY, "--seeds", "1", "--lr", "-1", "--out", str(tmp_path)])
    assert "pretraining" in caught.value.code and "--lr" in caught.value.code
    assert "\n" not in caught.value.code


def test_the_interval_is_the_bootstraps():
    """Against the normal approximation: the standard error of a mean of n paired differences."""
    rng = np.random.default_rng(1)
    a, b = rng.random((3, 2000)) < 0.6, rng.random((3, 2000)) < 0.5
    found = study.difference(a, b)
    by_image = 100 * (a.astype(float) - b).mean(0)
    error = by_image.std() / len(by_image) ** 0.5
    assert found["mean"] == pytest.approx(by_image.mean())
    assert found["low"] == pytest.approx(by_image.mean() - 1.96 * error, abs=0.15 * error)
    assert found["high"] == pytest.approx(by_image.mean() + 1.96 * error, abs=0.15 * error)
    assert found["std"] == pytest.approx(np.std(100 * (a.mean(1) - b.mean(1)), ddof=1))
    same = study.difference(a, a)
    assert same["low"] == same["high"] == same["mean"] == same["std"] == 0


class Boxed:
    """Data set of 64 random images whose box is the left half, labelled by `label`."""

    name, split = "boxed", "test"

    def __init__(self, labels):
        self.labels = labels
        self.images = torch.randn(len(labels), 3, 64, 64,
                                  generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": int(self.labels[index]), "index": index,
                "path": str(index),
                "boxes": torch.tensor([[0.0, 0, 32, 64]]), "size": (64, 64), "view": (0, 0, 64, 64)}


@torch.no_grad()
@pytest.mark.parametrize("kernel_size", (1, 3))
def test_causes_of_a_known_model(kernel_size):
    """A head whose maps hold class 0 inside the box and class 1 outside. Where the kernels are 3 x
    3, class 0's reads the patch on the left: at the box's edge, a patch outside holds it too and is
    no background.
    """
    torch.manual_seed(0)
    model = LCTR(2, 64, 8, 8, 1, 2, head="conv", kernel_size=kernel_size).eval()
    model.head.weight.zero_()
    model.head.bias.zero_()
    model.norm.weight.zero_()
    centre = kernel_size // 2
    model.head.weight[0, 0, centre, 0], model.head.weight[1, 1, centre, centre] = 1.0, 1.0
    left = (torch.arange(8) < 4).float().repeat(8)  # (N,)
    planted = torch.stack([left * 29 + 1, 2 - left], 1)  # (N, 2): classes 0 and 1
    plain = model.forward_features

    def forward_features(images, *arguments):
        tokens, maps = plain(images, *arguments)
        return torch.cat([torch.zeros(len(images), 1, 8),
                          torch.cat([planted, torch.zeros(64, 6)], 1).expand(
            len(images), 64, 8)], 1), maps

    model.forward_features = forward_features
    found = study.causes(model, Boxed(np.zeros(64)))
    accuracies = [found[f"accuracy_{part}"] for part in ("all", "object", "background")]
    assert accuracies == [100, 100, 0]
    expected = {1: 30, 3: (3 * 30 / 4) / ((30 + 3) / 4)}[kernel_size]
    assert found["inside_class_map"] == pytest.approx(expected)
    assert 0.5 < found["inside_cls_map"] < 2


@torch.no_grad()
def test_causes_of_the_scores():
    """Scores that are a code of the class vary between classes alone; scores that are noise hardly
    do. Kernel g knows class g alone, so that their mean, the same for every image, says one class
    of four.
    """
    torch.manual_seed(0)
    model = LCTR(4, 64, 8, 8, 1, 2).eval()
    labels = np.arange(64) % 4
    model.norm.weight.zero_()
    model.norm.bias.fill_(1)
    model.cdm.weight.zero_()
    model.cdm.weight[range(4), range(4), :, 1, 1] = 1.0
    model.cdm.bias[0] = 0.1
    model.cdm.scores = lambda features, cls_map: torch.eye(4)[torch.tensor(labels[:len(features)])]
    found = study.causes(model, Boxed(labels))
    assert found["score_variance_between"] == pytest.approx(100)
    assert (found["accuracy_own_scores"], found["accuracy_mean_scores"]) == (100, 25)
    noise = torch.rand(64, 4)
    model.cdm.scores = lambda features, cls_map: noise[:len(features)]
    assert study.causes(model, Boxed(labels))["score_variance_between"] < 25
