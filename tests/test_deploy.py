"""docs/deploy.md: its lines run, and give what the model gives."""

import json
import re
import textwrap

import pytest
import torch

import data
import evaluate
import lctr
from helpers import ROOT, picture, save_checkpoint

BLOCKS = [textwrap.dedent(block) for block in re.findall(
    r"(?<=\n\n)(?: {4}.*\n|\n(?= {4}))+", (ROOT / "docs/deploy.md").read_text())]


@pytest.fixture
def place(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "runs/X/best.pt")
    picture(tmp_path / "photo.jpg", size=(60, 40))
    monkeypatch.chdir(tmp_path)


def test_a_picture_to_a_box_in_a_few_lines(place):
    names = {}
    exec(BLOCKS[0], names)  # noqa: S102
    assert evaluate.main("--checkpoint runs/X/best.pt --images photo.jpg --threshold 0.1 --device "
                         "cpu --out out".split()) == 0
    entry = json.loads(open("out/boxes.json").read())[0]
    assert names["box"].flatten().tolist() == pytest.approx(entry["box"])
    assert names["name"] == entry["top5"][0][0]


@pytest.mark.parametrize("head", ["cdm", pytest.param("conv", marks=pytest.mark.full)])
def test_the_exported_program_takes_any_batch(place, tmp_path, head):
    save_checkpoint(tmp_path / "runs/X/best.pt", head=head)
    names = {}
    exec(BLOCKS[1], names)  # noqa: S102
    model, program = names["model"], torch.export.load("lctr.pt2").module()
    for batch in (1, 2, 5):
        images = torch.randint(256, (batch, 3, *model.img_size), dtype=torch.uint8)
        localization = model.localize(data.normalise(images))
        logits, maps = program(images)
        torch.testing.assert_close(logits, localization.logits)
        torch.testing.assert_close(maps, lctr.fuse(localization)[:, 0])
