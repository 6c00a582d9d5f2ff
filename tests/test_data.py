import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import data
from helpers import (CUB_CLASSES, ROOT, WNIDS, block_picture, call, error_of, picture, same_samples,
                     script_error, where_white, write_ilsvrc, xml)
from support import common
from support.pictures import views

# pytest undoes the filter of support/pictures/decode.py
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
quick = settings(max_examples=60, deadline=None,
                 suppress_health_check=[HealthCheck.function_scoped_fixture])


def to_input(box, view, img_size):
    """A box of the original in pixels of the network's input, as the docs say what a view is."""
    (x0, y0, x1, y1), (h, w) = view, img_size
    x = sorted((x - x0) / (x1 - x0) * w for x in box[0::2])
    y = sorted((y - y0) / (y1 - y0) * h for y in box[1::2])
    return np.array([x[0], y[0], x[1], y[1]])


def everything(dataset):
    return [dataset[i] for i in range(len(dataset))]


# ---------------------------------------------------------------- Birds in training

def test_the_number_of_processes_changes_no_bird(monkeypatch):
    one, several = [], []
    for drawn, count in ((one, 1), (several, 2)):
        monkeypatch.setattr(data, "_cores", lambda: count)
        dataset = data.load_dataset("synthetic", None, "val", (16, 24), limit=251)
        drawn += dataset.pictures, dataset.labels, dataset.palettes, dataset.boxes
    assert all(map(np.array_equal, one, several))


def test_training_birds_are_reflected_shifted_and_mirrored():
    dataset = data.load_dataset("synthetic", None, "train", (32, 64), limit=4)
    padded = np.pad(dataset.pictures[2], ((3, 3), (6, 6), (0, 0)), mode="reflect")
    seen = set()
    for epoch in range(60):
        sample = dataset[epoch, 2]
        x0, y0, x1, y1 = sample["view"]
        left, top = int(min(x0, x1)), int(y0)
        expected = padded[top + 3:top + 35, left + 6:left + 70]
        expected = expected[:, ::-1] if x0 > x1 else expected
        assert np.array_equal(sample["image"].permute(1, 2, 0), expected)
        assert (abs(x1 - x0), y1 - y0) == (64, 32) and abs(left) <= 6 and abs(top) <= 3
        seen.add((left, top, x0 > x1))
    assert len(seen) > 40 and {mirrored for *_, mirrored in seen} == {True, False}


# ---------------------------------------------------------------- Views

sizes = st.tuples(st.integers(40, 300), st.integers(40, 300))


@quick
@given(sizes, st.sampled_from([(32, 32), (48, 32), (30, 64)]), st.integers(0, 99), st.booleans())
def test_a_marked_block_is_where_its_box_says(tmp_path, size, img_size, seed, crop):
    """In whole pictures and centre crops; PNGs, and JPEGs, perhaps decoded reduced."""
    w, h = size
    block = w * 3 // 8, h * 3 // 8, w * 5 // 8, h * 5 // 8
    file = tmp_path / ("a.jpg" if seed % 2 else "a.png")
    block_picture(size, block).save(file)
    image, view, found = data.load_image(file, img_size, 80 if crop else None)
    assert found == size and image.shape == (3, *img_size) and image.dtype == torch.uint8
    expected = to_input(block, view, img_size).clip(0, img_size[::-1] * 2)
    assert np.abs(where_white(image) - expected).max() < 1.6


def test_training_views_are_crops_of_the_whole_picture_squashed(folder):
    """The paper: both sides to 256/224 of the input, a random crop, mirrored half of the time."""
    dataset = data.load_dataset("folder", folder, "train", (112, 224))
    whole = data.open_image(dataset.path(0))
    squashed = np.asarray(whole.resize((256, 128), Image.Resampling.BILINEAR))
    corners, mirrored = [], []
    for epoch in range(300):
        sample = dataset[epoch, 0]
        x0, y0, x1, y1 = sample["view"]
        left, top = min(x0, x1) * 256 / whole.width, y0 * 128 / whole.height
        assert abs(x1 - x0) == pytest.approx(whole.width * 224 / 256)
        assert y1 - y0 == pytest.approx(whole.height * 112 / 128)
        corners.append((round(left), round(top)))
        mirrored.append(x0 > x1)
        expected = squashed[corners[-1][1]:, corners[-1][0]:][:112, :224]
        expected = expected[:, ::-1] if mirrored[-1] else expected
        assert np.array_equal(sample["image"].permute(1, 2, 0), expected)
    assert np.min(corners, 0).tolist() == [0, 0] and np.max(corners, 0).tolist() == [32, 16]
    assert 100 < sum(mirrored) < 200


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (300, 300), (257, 1000)])
def test_crop_is_resize_the_shorter_side_then_cut_the_centre(tmp_path, size):
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3)).astype(np.uint8)
    original = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    original.save(tmp_path / "a.png")
    scale = 64 / min(size)
    resized = (int(side * scale + 1e-9) for side in size)
    resized = original.resize(tuple(resized), Image.Resampling.BILINEAR)
    left, top = round((resized.width - 56) / 2), round((resized.height - 56) / 2)
    expected = np.asarray(resized.crop((left, top, left + 56, top + 56)), float)
    found = data.load_image(tmp_path / "a.png", 56, 64)[0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected)[1:-1, 1:-1].max() <= 1


def test_crop_smaller_than_the_input_is_refused():
    error_of(lambda: data.load_dataset("synthetic", None, "test", 64, crop=63), "crop", "63", "64")


def test_boxes_are_cut_to_a_view():
    boxes = torch.tensor([[-5.0, 2, 30, 40], [10, 10, 20, 20], [50, 50, 60, 60]])
    assert views.clip_boxes(boxes, (0, 5, 25, 30)).tolist() == [
        [0, 5, 25, 30], [10, 10, 20, 20], [25, 30, 25, 30]]


def test_images_are_normalised_by_imagenets_statistics():
    images = torch.randint(0, 256, (2, 5, 3, 4, 6), dtype=torch.uint8)
    normalised = data.normalise(images)
    assert normalised.shape == images.shape and normalised.dtype == torch.float32
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (images.movedim(2, -1).numpy() / 255 - mean) / std
    assert np.allclose(normalised.movedim(2, -1), expected, atol=1e-6)


# ---------------------------------------------------------------- CUB

def load_cub(root, split="test", **options):
    return data.load_dataset("cub", root, split, 16, **options)


def test_cub_is_read_as_its_files_say(cub):
    train, test = load_cub(cub, "train"), load_cub(cub)
    assert train.classes == list(CUB_CLASSES) and len(train) == len(test) == 6
    assert train.notes == test.notes == []
    assert [s["label"] for s in everything(test)] == [0, 0, 1, 1, 2, 2]
    assert [s["boxes"].tolist() for s in everything(test)] == [
        [[i, 2, i + 10, 22]] for i in range(1, 12, 2)]
    assert {s["path"] for s in everything(train)}.isdisjoint(s["path"] for s in everything(test))
    sample = test[0]
    first = "001.Black_footed_Albatross/Black_footed_Albatross_0001_7.jpg"
    assert sample["path"] == str(cub / "images" / first)
    assert sample["size"] == (40, 30) and sample["view"] == (0, 0, 40, 30)
    assert sample["image"].shape == (3, 16, 16)
    assert sample["boxes"].dtype == torch.float32 and type(sample["label"]) is int
    error_of(lambda: load_cub(cub, "val"), "val")
    has = [data.has_split("cub", cub, split) for split in ("train", "val", "test")]
    assert has == [True, False, True]


def test_cub_files_may_have_other_line_ends_a_mark_and_blank_lines(cub):
    before = everything(load_cub(cub))
    for file in cub.glob("*.txt"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert all(map(same_samples, before, everything(load_cub(cub))))


CUB_FAULTS = [
    ("bounding_boxes", 3, "3 1.0 2.0 x 20.0", ":3", "x"),
    ("bounding_boxes", 3, "3 1.0 2.0 10.0", ":3"),
    ("bounding_boxes", 3, "3 1.0 2.0 10.0 5.0 5.0", ":3"),
    ("bounding_boxes", 3, "3 1.0 2.0 -10.0 5.0", ":3", "-10.0"),
    ("bounding_boxes", 3, "3 1.0 2.0 0 5.0", ":3"),
    ("bounding_boxes", 3, "3 nan 2.0 10.0 5.0", ":3", "nan"),
    ("bounding_boxes", 3, "3 inf 2.0 10.0 5.0", ":3"),
    ("bounding_boxes", 3, "3 1.0 2.0 1e999 5.0", ":3"),
    ("bounding_boxes", 3, "2 1.0 2.0 10.0 5.0", ":3", "line 2"),
    ("bounding_boxes", 3, "77 1 2 10 5", ":3", "77"),
    ("bounding_boxes", 3, "", "3", "images.txt:3"), ("bounding_boxes", 3, "3", ":3"),
    ("image_class_labels", 5, "5 4", ":5", "5 4"), ("image_class_labels", 5, "5 0", ":5"),
    ("image_class_labels", 5, "5 two", ":5"), ("image_class_labels", 5, "99 1", ":5", "99"),
    ("image_class_labels", 5, "4 1", ":5"), ("image_class_labels", 5, "", "5"),
    ("train_test_split", 1, "1 2", ":1"), ("train_test_split", 1, "1", ":1"),
    ("train_test_split", 1, "1 yes", ":1"),
    ("images", 4, "4 gone.jpg", "gone.jpg", "images.txt:4"), ("images", 4, "3 again.jpg", ":4"),
    ("images", 4, "x y", ":4"), ("images", 4, "4", ":4"),
    ("images", 4, "4 " + "n" * 5000, "images.txt:4"),
    ("images", 4, f"4 {CUB_CLASSES[0]}/Black_footed_Albatross_0001_7.jpg", ":4", "line 2"),
    ("classes", 2, "3 twice", ":3", "line 2"), ("classes", 2, "7 seven", "from 1 to 7"),
    ("classes", 2, "two b", ":2"),
]


CUB_FILES = ("images", "image_class_labels", "train_test_split", "bounding_boxes", "classes")


@pytest.mark.parametrize("name, line, replacement, parts", [
    (name, line, replacement, parts) for name, line, replacement, *parts in CUB_FAULTS])
def test_cub_faults_name_file_and_line(cub, name, line, replacement, parts):
    file = cub / f"{name}.txt"
    lines = file.read_text().split("\n")
    lines[line - 1] = replacement
    file.write_text("\n".join(lines))
    error_of(lambda: load_cub(cub), f"{name}.txt", *parts)


@pytest.mark.parametrize("name", CUB_FILES)
@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe\0"])
def test_cub_files_missing_or_broken(cub, name, content):
    file = cub / f"{name}.txt"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    error_of(lambda: load_cub(cub), f"{name}.txt")


def test_cub_root_and_images(cub, tmp_path):
    error_of(lambda: load_cub(tmp_path / "nowhere"), tmp_path / "nowhere", "no such folder")
    error_of(lambda: load_cub(None), "no such folder")
    shutil.rmtree(cub / "images" / CUB_CLASSES[1])
    error_of(lambda: load_cub(cub), CUB_CLASSES[1], "images.txt:6")


def test_boxes_beyond_their_images_are_clipped_and_counted(cub):
    lines = (cub / "bounding_boxes.txt").read_text().split("\n")
    lines[1], lines[3], lines[5] = "2 -5 -5 100 20", "4 400 1 10 10", "6 0 0 40 30"
    (cub / "bounding_boxes.txt").write_text("\n".join(lines))
    dataset = load_cub(cub)
    assert [dataset[i]["boxes"].tolist() for i in range(3)] == [
        [[0, 0, 40, 15]], [], [[0, 0, 40, 30]]]
    assert dataset[1]["boxes"].shape == (0, 4)
    clipped, outside, unscored = dataset.notes
    assert clipped.startswith("1 ") and outside.startswith("1 ")
    assert unscored.startswith("1 of 6 test images")


@pytest.mark.parametrize("limit, kept", [
    (1, [0]), (3, [0, 2, 4]), (4, [0, 1, 3, 4]), (6, range(6)), (99, range(6)), (None, range(6))])
def test_limit_spreads_over_the_split(cub, limit, kept):
    paths = [sample["path"] for sample in everything(load_cub(cub))]
    limited = everything(load_cub(cub, limit=limit))
    assert [sample["path"] for sample in limited] == [paths[i] for i in kept]
    assert data.load_dataset("synthetic", None, "test", 16, limit=4).indices == [0, 250, 500, 750]


# ---------------------------------------------------------------- ILSVRC

def load_ilsvrc(root, split="test", **options):
    return data.load_dataset("ilsvrc", root, split, 16, **options)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("images, annotations, mapping, root", [
    # Kaggle's archive
    ("ILSVRC/Data/CLS-LOC", "ILSVRC/Annotations/CLS-LOC/val", "LOC_synset_mapping.txt", "."),
    ("ILSVRC/Data/CLS-LOC", "ILSVRC/Annotations/CLS-LOC/val", "LOC_synset_mapping.txt", "ILSVRC"),
    ("i/Data/CLS-LOC", "i/Annotations/CLS-LOC/val", "i/LOC_synset_mapping.txt", "i"),
    ("i", "i/Annotations/val", None, "i"),
    ("i", "i/Annotations/CLS-LOC/val", None, "i"),
    ("i", "i/val", None, "i"),  # beside the images
])
def test_ilsvrc_layouts(tmp_path, images, annotations, mapping, root, flat):
    write_ilsvrc(tmp_path / images, tmp_path / annotations, flat, mapping and tmp_path / mapping)
    train, test = load_ilsvrc(tmp_path / root, "train"), load_ilsvrc(tmp_path / root)
    expected = list(WNIDS.values())[::-1] if mapping else sorted(WNIDS)
    assert train.classes == test.classes == expected
    for dataset in train, test:
        assert dataset.notes == [] and len(dataset) == 6
    order = [2, 2, 1, 1, 0, 0] if mapping else [0, 0, 1, 1, 2, 2]
    assert [s["label"] for s in everything(test)] == (order if flat else sorted(order))
    assert [len(s["boxes"]) for s in everything(test)] == [1, 2] * 3
    assert test[0]["boxes"].tolist() == [[1, 2, 30, 40]]
    assert test[1]["boxes"].tolist() == [[0, 0, 10, 10], [5, 6, 50, 40]]
    wnid = "n02012849" if mapping else "n01440764"  # the first class
    assert [Path(s["path"]).name for s in everything(train)][:2] == [
        f"{wnid}_10.JPEG", f"{wnid}_9.JPEG"]
    assert [s["boxes"].shape for s in everything(train)] == [(0, 4)] * 6
    error_of(lambda: load_ilsvrc(tmp_path / root, "val"), "val")


FIRST = "Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml"
LAUGHS = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 10))
BILLION_LAUGHS = f'<!DOCTYPE a [<!ENTITY e0 "ha">{LAUGHS}]>' + xml("&e9;", (1, 2, 3, 4))


@pytest.mark.parametrize("content, part", [
    ("", ":1"), ("{}", ":1"), ("<annotation><object>\n</annotation>", ":2"),
    (BILLION_LAUGHS, "limit on input amplification"), (xml("n01440764"), "0 objects"),
    (xml("n99999999", (1, 2, 3, 4)), "n99999999"), (xml("", (1, 2, 3, 4)), "class ''"),
    (xml("n01440764", (3, 2, 3, 4)), "object 1"),
    (xml("n01440764", (1, 2, 3, 4), (1, 2, "nan", 4)), "object 2"),
    (xml("n01440764", (1, 2, "x", 4)), "object 1"),
    ("<annotation><object><name>n01440764</name></object></annotation>", "object 1"),
    ("<annotation><object><bndbox/></object></annotation>", "object 1")])
def test_ilsvrc_annotations_that_are_wrong(ilsvrc, content, part):
    (ilsvrc / FIRST).write_text(content)
    error_of(lambda: load_ilsvrc(ilsvrc), ilsvrc / FIRST, part)


def test_ilsvrc_val_in_folders_needs_no_annotation_but_an_agreeing_one(tmp_path):
    write_ilsvrc(tmp_path, tmp_path / "Annotations/val", False)
    first = tmp_path / "Annotations/val/ILSVRC2012_val_00000001.xml"
    first.write_text(xml("n01443537", (1, 2, 3, 4)))
    error_of(lambda: load_ilsvrc(tmp_path), first, "n01440764")
    first.unlink()
    assert load_ilsvrc(tmp_path).notes == ["1 of 6 test images have no box and are not scored"]
    shutil.rmtree(tmp_path / "Annotations")
    assert load_ilsvrc(tmp_path).notes == ["6 of 6 test images have no box and are not scored"]
    picture(tmp_path / "val/n02012849/ILSVRC2012_val_00000001.JPEG")
    error_of(lambda: load_ilsvrc(tmp_path), "ILSVRC2012_val_00000001", "n02012849")


def test_ilsvrc_class_folders(ilsvrc):
    train = ilsvrc / "Data/CLS-LOC/train"
    (train / "n77777777").mkdir()
    error_of(lambda: load_ilsvrc(ilsvrc, "train"), train / "n77777777")
    (train / "n77777777").rmdir()
    shutil.rmtree(train / "n01443537")
    error_of(lambda: load_ilsvrc(ilsvrc, "train"), train / "n01443537")
    shutil.rmtree(train)
    error_of(lambda: load_ilsvrc(ilsvrc, "train"), train)
    assert len(load_ilsvrc(ilsvrc)) == 6  # scoring needs the mapping only
    shutil.rmtree(ilsvrc / "Annotations")
    error_of(lambda: load_ilsvrc(ilsvrc), "no XML annotations")
    (ilsvrc / "LOC_synset_mapping.txt").write_text("n01440764 tench\nn01440764 tench\n")
    error_of(lambda: load_ilsvrc(ilsvrc), "LOC_synset_mapping.txt:2")


def test_ilsvrc_annotations_may_lie_in_folders_and_limit_reads_only_the_kept(ilsvrc):
    last = ilsvrc / FIRST.replace("01.xml", "06.xml")
    (last.parent / "n02012849").mkdir()
    last.rename(last.parent / "n02012849" / last.name)
    assert len(load_ilsvrc(ilsvrc)[5]["boxes"]) == 2
    (ilsvrc / FIRST.replace("01.xml", "02.xml")).write_text("broken")
    assert [s["label"] for s in everything(load_ilsvrc(ilsvrc, limit=3))] == [2, 1, 0]


# ---------------------------------------------------------------- A folder of one's own

def load_folder(root, split="test", **options):
    return data.load_dataset("folder", root, split, 16, **options)


def test_folder_is_read_as_it_lies(folder):
    train, val, test = (load_folder(folder, split) for split in ("train", "val", "test"))
    assert train.classes == val.classes == test.classes == ["chat noir", "Ünïcode"]
    assert [s["label"] for s in everything(test)] == [0, 0, 1, 1]
    assert [s["label"] for s in everything(val)] == [1]
    assert [s["boxes"].tolist() for s in everything(test)] == [
        [[1, 2, 30.5, 40]], [[1, 1, 2, 2], [3, 3, 9, 9]], [], [[0, 0, 60, 40]]]
    assert [Path(s["path"]).relative_to(folder).as_posix() for s in everything(train)] == [
        "train/chat noir/a b.JPG", "train/chat noir/grey.tif", "train/Ünïcode/猫.png"]
    assert [len(s["boxes"]) for s in everything(train)] == [0, 0, 1]
    assert train.notes == ["1 hidden files or folders are left out (the first: "
                           f"{folder / 'train/chat noir/.hidden.jpg'})"]
    assert val.notes == []
    assert test.notes == ["1 of 4 test images have no box and are not scored"]


def test_folder_without_boxes_or_header_or_val(folder):
    before = everything(load_folder(folder))
    rows = (folder / "boxes.csv").read_text()
    rows = rows.split("\n", 1)[1].replace("test/", ".\\test\\", 1)
    (folder / "boxes.csv").write_text("\n" + rows)
    assert all(map(same_samples, before, everything(load_folder(folder))))
    (folder / "boxes.csv").unlink()
    assert load_folder(folder).notes == ["4 of 4 test images have no box and are not scored"]
    assert data.has_split("folder", folder, "val")
    shutil.rmtree(folder / "val")
    assert not data.has_split("folder", folder, "val")


@pytest.mark.parametrize("row", [
    "test/x.jpg,1,2,3", "test/x.jpg,1,2,3,4,5", "test/x.jpg,1,2,three,4", "test/x.jpg,5,2,3,4",
    "test/x.jpg,1,2,nan,4",
    "test/x.jpg", "path,xmin,ymin,xmax,ymax", 'test/x"y,1,2,3,4"', '"test/x.jpg,1,2,3,4'])
def test_folder_rows_that_are_wrong(folder, row):
    lines = (folder / "boxes.csv").read_text().split("\n")
    (folder / "boxes.csv").write_text("\n".join([*lines[:3], row]))
    error_of(lambda: load_folder(folder), f"{folder / 'boxes.csv'}:4")


def test_folder_classes(folder, tmp_path):
    picture(folder / "test/dog/a.jpg")
    error_of(lambda: load_folder(folder), folder / "test/dog")
    shutil.rmtree(folder / "test")
    error_of(lambda: load_folder(folder), folder / "test")
    (folder / "train/empty").mkdir()
    error_of(lambda: load_folder(folder, "train"), folder / "train/empty", "no images")
    error_of(lambda: load_folder(tmp_path), tmp_path / "train")
    error_of(lambda: load_folder(tmp_path / "nowhere"), "nowhere", "no such folder")
    error_of(lambda: data.load_dataset("imagenet", tmp_path, "train", 16), "imagenet", "synthetic")


@pytest.mark.full
@settings(quick, max_examples=400)
@given(st.sampled_from([*(("cub", f"{name}.txt") for name in CUB_FILES), ("ilsvrc", FIRST),
                        ("folder", "boxes.csv")]),
       st.floats(0, 1), st.integers(0, 12), st.binary(max_size=6) | st.sampled_from(
           [b"\n", b" ", b"-", b"nan", b'"', b"<", b"9" * 400]))
def test_corrupt_annotations_load_or_say_so(cub, ilsvrc, folder, place, at, cut, put):
    name, file = place
    root = {"cub": cub, "ilsvrc": ilsvrc, "folder": folder}[name]
    content = (root / file).read_bytes()
    at = int(at * len(content))
    (root / file).write_bytes(content[:at] + put + content[at + cut:])
    try:
        everything(data.load_dataset(name, root, "test", 16, limit=2))
    except data.DataError as error:
        assert str(error).strip() and "\n" not in str(error)
    finally:
        (root / file).write_bytes(content)


# ---------------------------------------------------------------- Batches

@pytest.mark.parametrize("name", ["folder", "synthetic"])
def test_training_samples_are_functions_of_seed_epoch_and_index(folder, name):
    keys = [(epoch, index) for epoch in (0, 1, 2) for index in (2, 0, 1)]
    views = set()
    for seed in (0, 1):
        one, other = (data.load_dataset(name, folder, "train", 24, limit=3, seed=seed)
                      for _ in range(2))
        for key, sample in [(key, one[key]) for key in keys][::-1]:
            assert same_samples(sample, other[key])
            assert sample["label"] == one.labels[key[1]] and sample["index"] == key[1]
            views.add(sample["view"])
    assert len(views) > 8


def test_collate(folder):
    batch = data.collate(everything(load_folder(folder)))
    keys = "image", "label", "size", "view", "index"
    assert {key: tuple(batch[key].shape) for key in keys} == {
        "image": (4, 3, 16, 16), "label": (4,), "size": (4, 2), "view": (4, 4), "index": (4,)}
    assert batch["label"].dtype == batch["size"].dtype == batch["index"].dtype == torch.int64
    assert [len(boxes) for boxes in batch["boxes"]] == [1, 2, 0, 1] and len(batch["path"]) == 4


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name, split", [("folder", "train"), ("folder", "test"),
                                         ("synthetic", "train")])
def test_workers_change_nothing(folder, name, split, workers):
    batches, state = [[2, 0], [1], [1, 2, 0, 1]], torch.get_rng_state()
    dataset = data.load_dataset(name, folder, split, 16, limit=3)
    loaded = list(data.loader(dataset, batches, workers))
    for batch, indices in zip(loaded, batches, strict=True):
        expected = data.collate([dataset[i] for i in indices])
        boxes = zip(batch.pop("boxes"), expected.pop("boxes"), strict=True)
        assert same_samples(batch, expected) and all(torch.equal(*pair) for pair in boxes)
    assert torch.equal(state, torch.get_rng_state())


def test_the_cache_gives_the_loaders_batches_bit_for_bit(folder):
    for dataset in (data.load_dataset("folder", folder, "train", (30, 64)),
                    data.load_dataset("synthetic", None, "train", (32, 48), limit=3)):
        cache = data.Cache(dataset, torch.device("cpu"))
        batches = [[(epoch, index) for index in (2, 0, 1)] for epoch in range(40)]
        for keys, loaded in zip(batches, data.loader(dataset, batches)):
            cached = cache.batch(keys)
            assert cached.keys() == {"image", "label", "palette"} & loaded.keys()
            assert all(torch.equal(cached[name], loaded[name]) for name in cached)


def test_the_cache_takes_at_most_a_quarter_of_the_free_memory(folder, monkeypatch):
    dataset = load_folder(folder, "train")  # 3 pictures of 18 x 18
    for free, fits in ((4 * 3 * 3 * 18 * 18, True), (4 * 3 * 3 * 18 * 18 - 1, False)):
        monkeypatch.setattr(data, "free_memory", lambda device: free)
        assert data.cache_fits(dataset, torch.device("cpu")) == fits


@pytest.mark.parametrize("count", ["", "0", "x", "-1", "2"])
def test_processes_that_share_a_machine_share_its_memory(monkeypatch, count):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", count)
    assert common.local_processes() == (2 if count == "2" else 1)
    monkeypatch.setattr(common.os, "sysconf", lambda name: 1)
    monkeypatch.setattr(common.Path, "read_text", lambda path: "MemAvailable:  1024 kB")
    assert common.free_memory(torch.device("cpu")) == 2**20 / common.local_processes()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_one_line_out_of_a_worker_too(folder, workers):
    broken = folder / "train/Ünïcode/猫.png"
    broken.write_bytes(broken.read_bytes()[:60])
    dataset = load_folder(folder, "train")
    error_of(lambda: list(data.loader(dataset, [[0, 1, 2]], workers)), broken)
    error_of(lambda: data.Cache(dataset, torch.device("cpu")), broken)


# ---------------------------------------------------------------- The contact sheet

def test_contact_sheet_of_a_folder_with_odd_images_says_nothing_on_stderr(folder):
    odd = Image.new("P", (60, 40))
    odd.putpalette([255, 0, 0, 0, 255, 0])
    # Pillow warns of this
    odd.save(folder / "test/Ünïcode/palette.png", transparency=bytes([0, 255]))
    done = subprocess.run([sys.executable, ROOT / "data.py", "--data", "folder", "--root", folder,
                           "--out", folder / "sheet.png"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 of 5 test images have no box" in done.stdout
    sheet = Image.open(folder / "sheet.png")
    assert sheet.size == (1152, 192)
    # a, b.JPEG, 60 x 40: the left and the right side of its box (1, 2, 30.5, 40)
    assert sheet.getpixel((3, 100)) == sheet.getpixel((97, 100)) == (255, 0, 0)


def test_contact_sheet_errors_are_one_line(cub, capsys):
    (cub / "images.txt").write_text("1 a\n1 b\n")
    ended = call(capsys, data, "--data", "cub", "--root", cub, "--out", cub / "sheet.png")
    assert "images.txt:2" in script_error(ended, data) and not (cub / "sheet.png").exists()
