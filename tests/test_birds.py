"""Synthetic birds: what is drawn tells the species, and the box is around all of it."""

import numpy as np
import pytest
from PIL import Image

import data
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
    for one, other in zip(birds.draw_bird(1, 5), birds.draw_bird(1, 5, species=9)):
        assert np.array_equal(one, other)
    labels = [birds.draw_bird(3, index, (16, 16), 45)[1] for index in range(300)]
    assert set(labels) == set(range(45)) and len(set(birds.SPECIES)) == 45


def test_species_out_of_range():
    with pytest.raises(data.DataError, match="species"):
        data.load_dataset("synthetic", None, "test", 16, limit=2, species=46)


def test_splits_share_no_bird():
    seen = [data.load_dataset("synthetic", None, split, 32, limit=100).pictures
            for split in birds.BIRDS]
    assert len({bird.tobytes() for pictures in seen for bird in pictures}) == 300
    assert birds.BIRDS == {"train": 12_000, "val": 600, "test": 1000}


def test_the_box_is_tight_around_the_whole_bird(monkeypatch):
    magenta = lambda rng, u, h, w: np.full((h, w, 3), (255, 0, 255), np.uint8)
    monkeypatch.setattr(birds, "_background", magenta)
    monkeypatch.setattr(birds, "_draw_clutter", lambda *_: None)
    for index in range(60):
        pixels, _, _, box = birds.draw_bird(3, index, (192, 256))
        rows, columns = np.nonzero((np.abs(pixels - np.array([255.0, 0, 255])) > 60).any(2))
        seen = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        assert np.abs(box - seen).max() < 2, index  # sharp tips fade within a pixel


def test_the_head_tells_the_species(monkeypatch):
    """The hue's share of vivid pixels: only the label's hue is on a bird without clutter."""
    grey = lambda rng, u, h, w: np.full((h, w, 3), 128, np.uint8)
    monkeypatch.setattr(birds, "_background", grey)
    monkeypatch.setattr(birds, "_draw_clutter", lambda *_: None)
    for index in range(60):
        pixels, label, _, _ = birds.draw_bird(1, index, (128, 128))
        hsv = np.asarray(Image.fromarray(pixels).convert("HSV"), float) / 255
        vivid = hsv[(hsv[..., 1] > 0.68) & (hsv[..., 2] > 0.68)][:, 0]
        distance = [np.abs((vivid - h + 0.5) % 1 - 0.5) for h, _, _ in birds.HUES.values()]
        assert np.bincount(np.argmin(distance, 0), minlength=3).argmax() == label % 3, index


def test_labels_are_even_and_palettes_follow_them_partly():
    dataset = data.load_dataset("synthetic", None, "test", 8)
    counts = np.bincount(dataset.labels, minlength=9)
    assert len(dataset.classes) == len(set(dataset.classes)) == 9
    assert counts.min() > 70 and counts.max() < 160
    own = (dataset.palettes == dataset.labels % dataset.num_palettes).mean()
    assert abs(own - (birds.PALETTE_CUE + (1 - birds.PALETTE_CUE) / 8)) < 0.05
