"""More species of birds: the first nine stay as they are, the others differ by one finer mark."""

import numpy as np
import pytest
import torch

import data
import evaluate
import train
from support.pictures import birds


def shapes(label):
    rng = np.random.default_rng(7)
    return birds._bird(lambda low, high: low + (high - low) * rng.random(), label, 3)


@pytest.mark.parametrize("label", range(9))
def test_each_further_species_has_a_band_across_its_wing(label):
    plain = shapes(label)
    for wing in range(1, 5):
        banded = shapes(label + 9 * wing)
        new = [shape for shape in banded if not any(
            shape[1] == old[1] and np.array_equal(shape[0], old[0]) for old in plain)]
        assert len(banded) == len(plain) + 1 and len(new) == 1 and new[0][0].shape == (4, 2)
        assert new[0][1] == birds._hsv(*list(birds.WINGS.values())[wing])


def test_nine_species_are_the_default_and_all_are_drawn():
    for one, other in zip(data.draw_bird(1, 5), data.draw_bird(1, 5, species=9)):
        assert np.array_equal(one, other)
    labels = [data.draw_bird(3, index, (16, 16), 45)[1] for index in range(600)]
    assert set(labels) == set(range(45)) and len(set(birds.SPECIES)) == 45


def test_a_run_with_more_species(tmp_path, without_pictures, capsys):
    flags = ("--species 12 --img-size 16 --embed-dim 12 --depth 1 --num-heads 2 --epochs 1 "
             "--pretrain-epochs 0 --batch-size 8 --limit-train 16 --limit-test 8 "
             "--freeze-blocks 0 --device cpu").split()
    train.main([*flags, "--out", str(tmp_path / "run")])
    best = torch.load(tmp_path / "run/best.pt", weights_only=True)
    assert best["classes"] == birds.SPECIES[:12] and best["config"]["species"] == 12
    assert evaluate.main(["--checkpoint", str(tmp_path / "run/best.pt"), "--limit-test", "8"]) == 0
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, "--species", "13", "--out", str(tmp_path / "run"), "--resume"])
    assert stop.value.code == 1 and "--species was 12, is 13" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--species", "1"], ["--species", "46"],
                                   ["--species", "12", "--data", "cub", "--root", "CUB"]])
def test_species_out_of_range_or_of_other_data(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_flags(flags)
    assert stop.value.code == 2 and "--species" in capsys.readouterr().err
    with pytest.raises(data.DataError, match="species"):
        data.load_dataset("synthetic", None, "test", 16, limit=2, species=46)
