"""Boxes from maps against a naive flood fill, IoU and frames against their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import naive_boxes, naive_iou
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


@pytest.mark.parametrize("rows, box", [
    ("00000 01100 01100 00001", [1, 1, 3, 3]),
    ("10001 10001 00001", [4, 0, 5, 3]),  # two components: the larger
    ("00011 11100", [0, 0, 5, 2]),  # corners touch
    ("00011 11000", [3, 0, 5, 1]),  # a column lies between
    ("00110 00000 11000", [2, 0, 4, 1]),  # a tie: the first pixel decides
    ("00010 10010 10000", [3, 0, 4, 2]),  # a tie: by row, not by column
    ("1000 0001", [0, 0, 1, 1]),  # a row does not touch the next one's start
    ("0001 1000", [3, 0, 4, 1]),
    ("0000 0001 1000", [3, 1, 4, 2]),  # nor does the last run of all
    ("1111 1001 1111", [0, 0, 4, 3]),  # a ring
    ("10101 10101 11111", [0, 0, 5, 3]),  # three arms that meet at the foot
    ("0000 0020 0000", [2, 1, 3, 2]),  # one pixel
    ("0101010 1010101", [0, 0, 7, 2]),  # connected at corners
    ("1000000 0100000 0010000 0000111 0000111", [4, 3, 7, 5]),  # more pixels beat a wider box
])
def test_largest_boxes_by_hand(rows, box):
    m = torch.tensor([[float(c) for c in row] for row in rows.split()])
    assert largest_boxes(m[None], [0.5])[0, 0].tolist() == box


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


def test_torchs_number_of_threads_stays(monkeypatch):
    """It is the whole process's: callers may be threads."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _: pytest.fail("it was changed"))
    assert largest_boxes(torch.zeros(1, 4, 6), [0.5]).tolist() == [[[0, 0, 6, 4]]]


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
