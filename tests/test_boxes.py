"""Boxes from maps against a naive flood fill, IoU and frames against their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import flood_fill, naive_boxes, naive_iou, normalise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evaluate import box_iou, largest_boxes
from support import boxes

# ---------------------------------------------------------------- boxes

thresholds_of = st.lists(st.integers(0, 99).map(lambda i: i / 100), min_size=1, max_size=6)


@st.composite
def plateau_maps(draw) -> Tensor:
    """Small maps of few values, so that components, ties and plateaus abound."""
    B, H, W, top = (draw(st.integers(1, most)) for most in (3, 9, 9, 4))
    values = draw(st.lists(st.integers(0, top), min_size=B * H * W, max_size=B * H * W))
    return torch.tensor(values, dtype=torch.float32).view(B, H, W)


@settings(max_examples=150, deadline=None)
@given(plateau_maps(), thresholds_of)
def test_largest_boxes_equal_a_flood_fill(maps, thresholds):
    assert torch.equal(largest_boxes(maps, thresholds), naive_boxes(maps, thresholds))


@settings(max_examples=60, deadline=None)
@given(plateau_maps(), thresholds_of)
def test_every_component_equals_a_flood_fills(maps, thresholds):
    thresholds = sorted(set(thresholds))
    found = boxes.connected_components(maps, torch.tensor(thresholds))
    expected = [(i * len(thresholds) + k, *component)
                for i, m in enumerate(maps) for k, t in enumerate(thresholds)
                for component in flood_fill(normalise(m), t)]
    rows = zip(found.cell.tolist(), found.pixels.tolist(), map(tuple, found.box.tolist()))
    assert list(rows) == expected


@pytest.mark.parametrize("shape", [(2, 37, 53), (3, 1, 61), (2, 64, 1), (1, 33, 31)])
def test_largest_boxes_on_noise_and_smooth_maps(shape):
    maps = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(maps[:, None, ::7, ::7], shape[1:], mode="bilinear")[:, 0]
    thresholds = [0.0, 0.15, 0.33, 0.5, 0.5, 0.77, 0.99, 0.07]
    for m in (maps, smooth, smooth.double(), maps.mT):
        assert torch.equal(largest_boxes(m, thresholds), naive_boxes(m, thresholds))


def test_maps_are_cut_into_chunks_without_a_trace(monkeypatch):
    maps = torch.rand(7, 9, 11, generator=torch.Generator().manual_seed(1))
    whole = largest_boxes(maps, [0.2, 0.6])
    monkeypatch.setattr(boxes, "map_chunks", lambda maps: maps.split(2))
    assert torch.equal(largest_boxes(maps, [0.2, 0.6]), whole)


def box_of(rows: list[str], threshold: float = 0.5) -> list[int]:
    m = torch.tensor([[float(c) for c in row] for row in rows])
    return largest_boxes(m[None], [threshold])[0, 0].tolist()


def test_hand_made_boxes():
    assert box_of(["00000", "01100", "01100", "00001"]) == [1, 1, 3, 3]
    assert box_of(["10001", "10001", "00001"]) == [4, 0, 5, 3]  # two blobs: the larger
    assert box_of(["00011", "11100"]) == [0, 0, 5, 2]  # corners touch
    assert box_of(["00011", "11000"]) == [3, 0, 5, 1]  # a column lies between
    assert box_of(["00110", "00000", "11000"]) == [2, 0, 4, 1]  # a tie: the first pixel decides
    assert box_of(["00010", "10010", "10000"]) == [3, 0, 4, 2]  # a tie: by row, not by column
    assert box_of(["1000", "0001"]) == [0, 0, 1, 1]  # a row does not touch the next one's start
    assert box_of(["0001", "1000"]) == [3, 0, 4, 1]
    assert box_of(["0000", "0001", "1000"]) == [3, 1, 4, 2]  # nor does the last run of all
    assert box_of(["1111", "1001", "1111"]) == [0, 0, 4, 3]  # a ring
    assert box_of(["10101", "10101", "11111"]) == [0, 0, 5, 3]  # three arms that meet at the foot
    assert box_of(["0000", "0020", "0000"]) == [2, 1, 3, 2]  # one pixel
    assert box_of(["11111", "10001", "10101"]) == [0, 0, 5, 3]
    assert box_of(["0101010", "1010101"]) == [0, 0, 7, 2]  # connected at corners


def test_more_pixels_beat_a_wider_box():
    assert box_of(["1000000", "0100000", "0010000", "0000111", "0000111"]) == [4, 3, 7, 5]


def test_value_must_exceed_the_threshold():
    assert box_of(["012"], 0.5) == [2, 0, 3, 1]
    assert box_of(["012"], 0.49) == [1, 0, 3, 1]
    assert box_of(["012"], 0.0) == [1, 0, 3, 1]


@pytest.mark.parametrize("m", [
    torch.zeros(1, 4, 6), torch.full((1, 4, 6), 7.0), torch.full((1, 4, 6), math.nan),
    torch.full((1, 4, 6), -math.inf), torch.ones(1, 4, 6, dtype=torch.int64)])
def test_maps_without_contrast_give_the_whole_image(m):
    assert largest_boxes(m, [0.0, 0.9]).tolist() == [[[0, 0, 6, 4]] * 2]


def test_one_broken_map_leaves_the_others_alone():
    maps = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(2))
    alone = largest_boxes(maps[[0, 2]], [0.4])
    maps[1, 2, 2] = math.nan
    assert torch.equal(largest_boxes(maps, [0.4])[[0, 2]], alone)
    assert largest_boxes(maps, [0.4])[1].tolist() == [[0, 0, 6, 5]]


def test_no_maps_and_wrong_shapes():
    assert largest_boxes(torch.zeros(0, 4, 6), [0.1, 0.2]).shape == (0, 2, 4)
    with pytest.raises(ValueError, match=r"maps: got shape \(4, 6\)"):
        largest_boxes(torch.zeros(4, 6), [0.1])


@settings(max_examples=60, deadline=None)
@given(plateau_maps(), st.sampled_from([0.0, 0.3, 0.6]), st.sampled_from([0.25, 2.0, 8.0]),
       st.integers(-4, 4))
def test_boxes_flip_with_the_map_and_ignore_scale_and_shift(maps, threshold, scale, shift):
    box = largest_boxes(maps, [threshold])[:, 0]
    assert torch.equal(largest_boxes(maps * scale + shift, [threshold])[:, 0], box)
    for m, expected in zip(maps, box):
        pixels = [p for p, _ in flood_fill(normalise(m), threshold)]
        if pixels and pixels.count(max(pixels)) == 1:
            x0, y0, x1, y1 = largest_boxes(m.flip(1)[None], [threshold])[0, 0].tolist()
            assert expected.tolist() == [m.shape[1] - x1, y0, m.shape[1] - x0, y1]


def test_one_components_box_shrinks_as_the_threshold_rises():
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(50.0), indexing="ij")
    m = torch.exp(-((x - 18) / 9) ** 2 - ((y - 22) / 6) ** 2)
    found = largest_boxes(m[None], [i / 100 for i in range(100)])[0]
    sides = found[:, 2:] - found[:, :2]
    assert (found[1:, :2] >= found[:-1, :2]).all() and (found[1:, 2:] <= found[:-1, 2:]).all()
    assert sides[1].prod() > 4 * sides[-20].prod()


# ---------------------------------------------------------------- IoU

boxes_of = st.tuples(*[st.integers(-20, 20)] * 4).map(
    lambda b: [min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3])])


@settings(max_examples=150, deadline=None)
@given(boxes_of, boxes_of, st.integers(-30, 30), st.sampled_from([0.5, 2, 16]))
def test_iou_properties(a, b, shift, scale):
    ta, tb = torch.tensor(a), torch.tensor(b)
    iou = box_iou(ta, tb).item()
    assert iou == pytest.approx(naive_iou(a, b), abs=1e-12)
    assert iou == box_iou(tb, ta).item() and 0 <= iou <= 1
    assert (iou == 1) == (a == b and a[0] < a[2] and a[1] < a[3])
    assert box_iou(ta * scale + shift, tb * scale + shift).item() == pytest.approx(iou, abs=1e-12)


@pytest.mark.parametrize("a, b, iou", [
    ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7),  # no pixel is added to the sides
    ([0, 0, 1, 1], [1, 0, 2, 1], 0),  # half-open
    ([3, 3, 3, 3], [3, 3, 3, 3], 0),  # an empty union
    ([5, 5, 1, 1], [0, 0, 6, 6], 0),  # inside out
    ([0, 0, 4, 4], [0, 0, 4, 2], 1 / 2),
])
def test_iou_by_hand(a, b, iou):
    assert box_iou(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(iou)


def test_only_equal_boxes_have_an_iou_of_one():
    almost = torch.tensor([0., 0, 30000, 29999.99])
    assert box_iou(torch.tensor([0., 0, 30000, 30000]), almost).item() < 1
    assert box_iou(torch.zeros(3, 1, 4), torch.ones(5, 4)).shape == (3, 5)


# ---------------------------------------------------------------- frames, baselines


def test_frames_are_each_others_inverse_and_clip():
    view = torch.tensor([[10.0, 20, 110, 70]])
    annotated = torch.tensor([[0.0, 20, 60, 45], [10, 20, 110, 70]])
    truth = boxes.to_input([annotated], view, (16, 32))
    assert truth.tolist() == [[[0, 0, 16, 8], [0, 0, 32, 16]]]
    assert boxes.to_image(truth, view, (16, 32)).tolist() == [
        [[10, 20, 60, 45], [10, 20, 110, 70]]]


def test_baselines():
    view = torch.tensor([[0.0, 0, 32, 16]] * 2)
    annotated = [torch.tensor([[0.0, 0, 32, 16]]), torch.zeros(0, 4)]
    truth = boxes.to_input(annotated, view, (16, 32))
    assert boxes.baseline_iou(truth, (16, 32)).flatten().tolist() == pytest.approx(
        [1, 0.5, 0, 0])
