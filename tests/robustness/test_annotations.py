"""Boxes in the right frame, and nothing of a folder left out without a word: tables of cases, each
with its right value.
"""

import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import evaluate
import lctr
from helpers import (WNIDS, call, error_of, exif, make_cub, noise, picture, save_checkpoint,
                     write_ilsvrc, xml)
from support.pictures import folders
from support.pictures.annotations import read_objects

BOX = (5, 10, 25, 35)


def load(name, root, split="test", **options):
    return data.load_dataset(name, root, split, 16, **options)


def boxes_of(dataset):
    return {Path(sample["path"]).name: sample["boxes"].tolist()
            for sample in (dataset[i] for i in range(len(dataset)))}


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def touch(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def size_xml(width, height):
    return f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"


@pytest.fixture
def cats(tmp_path):
    """A folder of one's own: two classes, three pictures in each split."""
    for split in ("train", "test"):
        for name in ("cat/a.jpg", "cat/b.jpg", "dog/c.jpg"):
            picture(tmp_path / "pets" / split / name, (60, 40))
    return tmp_path / "pets"


# ---------------------------------------------------------------- ILSVRC: the frame of <size>


def one_picture(root, image, orientation, text, encoding="utf-8"):
    """ILSVRC in class folders with one picture to score, and its annotation."""
    write_ilsvrc(root, root / "unused", False)
    shutil.rmtree(root / "val")
    path = root / "val/n01440764/a.JPEG"
    path.parent.mkdir(parents=True)
    image.save(path, exif=exif(orientation), quality=95)
    touch(root / "Annotations/val/a.xml", text.encode(encoding))
    return load("ilsvrc", root)


FRAMES = {  # stored size, EXIF's orientation, <size>, box, the right box or the error, the note
    "as stated": ((60, 40), 1, size_xml(60, 40), BOX, BOX, None),
    "upright": ((60, 40), 6, size_xml(40, 60), BOX, BOX, None),
    "stored, 6": ((60, 40), 6, size_xml(60, 40), BOX, (5, 5, 30, 25), None),
    "stored, 8": ((60, 40), 8, size_xml(60, 40), BOX, (10, 35, 35, 55), None),
    "stored, nearly square": ((40, 41), 6, size_xml(40, 41), BOX, (6, 5, 31, 25), None),
    "turned by half": ((60, 40), 3, size_xml(60, 40), BOX, BOX, "turned or mirrored by EXIF"),
    "a square": ((40, 40), 6, size_xml(40, 40), BOX, BOX, "turned or mirrored by EXIF"),
    "merely swapped": ((60, 40), 1, size_xml(40, 60), BOX, BOX, None),
    "swapped and small": ((5, 4), 1, size_xml(4, 5), (1, 1, 4, 3), (1, 1, 4, 3), None),
    "halved": ((250, 188), 1, size_xml(500, 375), (100, 75, 400, 300),
               (50, 75 * 188 / 375, 200, 300 * 188 / 375), "scaled"),
    "shorter side to 256": ((341, 256), 1, size_xml(500, 375), (100, 75, 400, 300),
                            (68.2, 51.2, 272.8, 204.8), "scaled"),
    "rounded up": ((342, 256), 1, size_xml(500, 375), (100, 75, 400, 300),
                   (68.4, 51.2, 273.6, 204.8), "scaled"),
    "doubled": ((120, 80), 1, size_xml(60, 40), BOX, (10, 20, 50, 70), "scaled"),
    "a row less": ((60, 39), 1, size_xml(60, 40), BOX, (5, 9.75, 25, 34.125), "scaled"),
    "a square made smaller": ((64, 64), 1, size_xml(128, 128), (8, 4, 64, 32), (4, 2, 32, 16),
                              "scaled"),
    "halved, upright": ((30, 20), 6, size_xml(40, 60), BOX, (2.5, 5, 12.5, 17.5), "scaled"),
    "halved, stored": ((30, 20), 6, size_xml(60, 40), BOX, (2.5, 2.5, 15, 12.5), "scaled"),
    "none": ((60, 40), 1, "", BOX, BOX, "state no size"),
    "none, turned": ((60, 40), 6, "", BOX, BOX, "state no size"),
    "zeros": ((60, 40), 1, size_xml(0, 0), BOX, BOX, "state no size"),
    "one zero": ((60, 40), 1, size_xml(60, 0), BOX, BOX, "state no size"),
    "negative": ((60, 40), 1, size_xml(-60, 40), BOX, BOX, "state no size"),
    "NaN": ((60, 40), 1, size_xml("nan", 40), BOX, BOX, "state no size"),
    "huge": ((60, 40), 1, size_xml("9" * 500, 40), BOX, BOX, "state no size"),
    "words": ((60, 40), 1, size_xml("sixty", 40), BOX, BOX, "state no size"),
    "empty": ((60, 40), 1, size_xml("", ""), BOX, BOX, "state no size"),
    "a width alone": ((60, 40), 1, "<size><width>60</width></size>", BOX, BOX, "state no size"),
    "with fractions of zero": ((60, 40), 1, size_xml("60.0", "40.0"), BOX, BOX, None),
    "beyond the stored": ((60, 40), 6, size_xml(60, 40), (-5, -5, 80, 80), (0, 0, 40, 60),
                          "beyond"),
    "a squashed copy": ((60, 60), 1, size_xml(60, 40), BOX, "60 x 40", None),
    "a small squashed copy": ((256, 256), 1, size_xml(500, 375), BOX, "500 x 375", None),
    "a small copy turned for good": ((256, 341), 1, size_xml(500, 375), BOX, "500 x 375", None),
    "a small cropped copy": ((345, 256), 1, size_xml(500, 375), BOX, "500 x 375", None),
    "a turned picture's wrong size": ((60, 40), 6, size_xml(41, 70), BOX, "40 x 60 upright", None),
    "one pixel": ((60, 40), 1, size_xml(1, 1), BOX, "1 x 1", None),
}


@pytest.mark.parametrize("case", FRAMES)
def test_boxes_are_in_the_frame_that_an_xml_states(tmp_path, case):
    stored, orientation, size, box, right, note = FRAMES[case]
    make = lambda: one_picture(tmp_path, Image.new("RGB", stored, "red"), orientation,
                               xml("n01440764", box, size=size))
    if isinstance(right, str):
        error_of(make, "a.xml", right)
        return
    dataset = make()
    assert np.allclose(dataset[0]["boxes"].tolist(), [right], rtol=1e-6)
    assert len(dataset.notes) == (note is not None) and (note or "") in "".join(dataset.notes)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_lies_on_what_it_marks_however_a_picture_is_turned(tmp_path, orientation):
    """The white block of the stored picture, and its box there, are the same place upright."""
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[20:70, 10:50] = 255
    dataset = one_picture(tmp_path, Image.fromarray(pixels), orientation,
                          xml("n01440764", (10, 20, 50, 70), size=size_xml(120, 80)))
    white = np.asarray(data.open_image(dataset[0]["path"]))[..., 0] > 127
    rows, columns = np.nonzero(white)
    right, told = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], True
    if orientation in (2, 3, 4):  # no size tells them apart
        right, told = [10, 20, 50, 70], False
    assert dataset[0]["boxes"].tolist() == [right] and len(dataset.notes) == (not told)


@pytest.mark.parametrize("encoding, declared, name", [
    ("latin-1", "ISO-8859-1", "café"), ("cp1252", "windows-1252", "café"),
    ("utf-16", "UTF-16", "café"), ("utf-16-be", "utf-16", "café"), ("utf-8-sig", "utf-8", "猫"),
    ("utf-8", "UTF-16", "猫"), ("utf-8", "utf8", "猫"), ("gb2312", "gb2312", "猫"),
    ("gbk", "gb2312", "貓"), ("big5", "Big5", "貓"), ("shift_jis", "Shift_JIS", "猫"),
    ("euc-kr", "euc-kr", "고양이"), ("koi8-r", "KOI8-R", "кот"),
])
def test_an_xml_is_read_in_the_encoding_that_it_declares(tmp_path, encoding, declared, name):
    """Its class is recognised: the box of another one is not taken for the picture."""
    text = f'<?xml version="1.0" encoding="{declared}"?>\n' + xml(name, BOX).replace(
        "<object>", "<object><name>dog</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax>"
        "<ymax>9</ymax></bndbox></object><object>")
    touch(tmp_path / "a.xml", text.encode(encoding))
    assert read_objects(tmp_path / "a.xml")[0] == [("dog", (1, 1, 9, 9)), (name, BOX)]
    touch(tmp_path / "a.xml", text.replace(declared, "morse").encode("utf-8"))
    error_of(lambda: read_objects(tmp_path / "a.xml"), "a.xml", "morse")


# ---------------------------------------------------------------- ILSVRC without train/


@pytest.mark.parametrize("mapping, given, right", [
    (False, ["n01440764", "n01443537", "n02012849"], None),
    (False, ["n02012849", "n01440764", "n01443537"], None),  # in the checkpoint's order
    (True, ["crane", "goldfish, Carassius auratus", "tench, Tinca tinca"], None),
    (True, ["n01440764", "n01443537", "n02012849"], None),  # trained where no mapping was
    (True, ["other"], ["crane", "goldfish, Carassius auratus", "tench, Tinca tinca"]),
    (True, None, ["crane", "goldfish, Carassius auratus", "tench, Tinca tinca"]),
])
@pytest.mark.parametrize("flat", [True, False])
def test_ilsvrc_is_scored_without_train(tmp_path, mapping, given, right, flat):
    write_ilsvrc(tmp_path, tmp_path / "Annotations/val", flat,
                 tmp_path / "LOC_synset_mapping.txt" if mapping else None)
    wnids = {words: wnid for wnid, words in WNIDS.items()}

    def wnid_of(dataset):
        names = {sample["path"]: dataset.classes[sample["label"]] for sample in dataset}
        return {path: wnids.get(name, name) for path, name in names.items()}

    before = wnid_of(load("ilsvrc", tmp_path))
    shutil.rmtree(tmp_path / "train")
    dataset = load("ilsvrc", tmp_path, classes=given)
    assert dataset.classes == (right or given) and wnid_of(dataset) == before
    if not mapping:
        error_of(lambda: load("ilsvrc", tmp_path), tmp_path / "train")


def test_evaluate_needs_no_train_and_prints_notes(tmp_path, capsys, without_pictures):
    write_ilsvrc(tmp_path, tmp_path / "Annotations/val", True)
    touch(tmp_path / "Annotations/val/ILSVRC2012_val_00000001.xml",
          xml("n01440764", (1, 2, 3, 4), size="").encode())
    shutil.rmtree(tmp_path / "train")
    checkpoint = save_checkpoint(tmp_path / "best.pt", classes=sorted(WNIDS), data="ilsvrc",
                                 root=str(tmp_path))
    status, out, err = call(capsys, evaluate, "--checkpoint", checkpoint, "--device", "cpu")
    assert (status, err) == (0, "") and "note: 1 annotations state no size" in out


def test_two_annotations_of_one_image_are_an_error(tmp_path):
    write_ilsvrc(tmp_path, tmp_path / "Annotations/val", True)
    first = tmp_path / "Annotations/val/ILSVRC2012_val_00000001.xml"
    touch(first.parent / "old" / first.name, first.read_bytes())
    error_of(lambda: load("ilsvrc", tmp_path), first, first.parent / "old" / first.name)


# ---------------------------------------------------------------- boxes.csv


ROWS = {  # rows of boxes.csv, the boxes of test/cat/a.jpg, words of the note on the rows
    "relative": (["test/cat/a.jpg,1,2,30,40"], [[1, 2, 30, 40]], None),
    "absolute": (["{root}/test/cat/a.jpg,1,2,30,40"], [[1, 2, 30, 40]], None),
    "absolute with dots": (["{root}/train/../test//cat/./a.jpg,1,2,30,40"], [[1, 2, 30, 40]],
                           None),
    "both": (["{root}/test/cat/a.jpg,1,2,30,40", "test/cat/a.jpg,5,5,9,9"],
             [[1, 2, 30, 40], [5, 5, 9, 9]], None),
    "backslashes": ([r".\test\cat\a.jpg,1,2,30,40"], [[1, 2, 30, 40]], None),
    "another split's": (["train/cat/a.jpg,1,2,30,40"], [], None),
    "absolute elsewhere": (["/data/test/cat/a.jpg,1,2,30,40"], [], "1 rows"),
    "of a folder that only begins like root": (["{root}2/test/cat/a.jpg,1,2,30,40"], [],
                                               "1 rows"),
    "gone": (["test/cat/gone.jpg,1,2,30,40", "test/cat/gone2.jpg,1,2,3,4"], [], "2 rows"),
    "without its split": (["cat/a.jpg,1,2,30,40"], [], "line 1, 'cat/a.jpg'"),
    "with the folder's name": (["pets/test/cat/a.jpg,1,2,30,40"], [], "1 rows"),
    "in capitals": (["test/cat/A.JPG,1,2,30,40"], [], "1 rows"),
    "a folder": (["test/cat,1,2,30,40"], [], "1 rows"),
    "a file that is no picture": (["boxes.csv,1,2,30,40"], [], "1 rows"),
    "no name": ([",1,2,30,40"], [], "1 rows"),
    "a blank line before the header": (["", "path,xmin,ymin,xmax,ymax", "test/cat/a.jpg,1,2,30,40"],
                                       [[1, 2, 30, 40]], None),
    "a header below rows": (["test/cat/a.jpg,1,2,30,40", "path,xmin,ymin,xmax,ymax"], "boxes.csv:2",
                            None),
    "normalised": (["test/cat/a.jpg,0.1,0.2,0.5,1"], "normalised", None),
    "normalised, all": (["test/cat/a.jpg,0,0,1,1", "train/cat/a.jpg,0.5,0.25,1,1"], "normalised",
                        None),
    "normalised, of nothing": (["gone.jpg,0.1,0.2,0.5,1"], "normalised", None),
    "small but in pixels": (["test/cat/a.jpg,0,0,1,1", "test/cat/b.jpg,3,4,5,6"], [[0, 0, 1, 1]],
                            None),
    "blank rows": (["test/cat/a.jpg,1,2,30,40", "   ", ",,,,", ""], [[1, 2, 30, 40]], None),
    "accents in two characters": (["test/cat/e\u0301.jpg,1,2,30,40"],
                                  {"\xe9.jpg": [[1, 2, 30, 40]]}, None),
    "accents in two characters, of another split": (["train/cat/e\u0301.jpg,1,2,30,40"], [], None),
    "a line break in a name": (['"test/cat/a\nb.jpg",1,2,30,40'], {"a\nb.jpg": [[1, 2, 30, 40]]},
                               None),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_of_boxes_csv(cats, tmp_path, monkeypatch, case):
    rows, right, words = ROWS[case]
    for name in ("test/cat/\xe9.jpg", "train/cat/\xe9.jpg", "test/cat/a\nb.jpg"):
        picture(cats / name, (60, 40))
    (cats / "boxes.csv").write_text("\n".join(rows).format(root=cats))
    if isinstance(right, str):
        error_of(lambda: load("folder", cats), cats / "boxes.csv", right)
        return
    right = right if isinstance(right, dict) else {"a.jpg": right}
    monkeypatch.chdir(cats)
    for root in (cats, "."):
        dataset = load("folder", root)
        assert right.items() <= boxes_of(dataset).items()
        notes = [note for note in dataset.notes if "rows of" in note]
        assert len(notes) == (words is not None)
        assert words is None or words.format(root=root).replace("./", "") in notes[0]


@pytest.mark.parametrize("box, noted", [
    ((5, 5, 35, 55), 0),  # fits upright, 40 x 60
    ((5, 5, 55, 35), 1),  # fits as stored, 60 x 40
    ((5, 5, 35, 35), 0),  # fits both
    ((5, 5, 70, 70), 0),  # fits neither
])
def test_boxes_of_the_stored_picture_are_noted(cats, box, noted):
    x0, y0, x1, y1 = box
    (cats / "boxes.csv").write_text(f"test/cat/a.jpg,{x0},{y0},{x1},{y1}\n")
    picture(cats / "test/cat/a.jpg", (60, 40), exif=exif(6))
    dataset = load("folder", cats)
    notes = [note for note in dataset.notes if "as stored" in note]
    assert len(notes) == noted and all("test/cat/a.jpg" in note for note in notes)
    assert boxes_of(dataset)["a.jpg"] == [[min(x0, 40), min(y0, 60), min(x1, 40), min(y1, 60)]]


# ---------------------------------------------------------------- what is left out


LEFT_OUT = {  # files of test/, the reason, how many, the first
    "deeper": (["cat/more/1.jpg", "cat/more/deep/2.PNG", "dog/x/3.jpg", "dog/x/notes.txt"],
               folders.DEEPER, 3, "cat/more/1.jpg"),
    "heic": (["cat/1.heic", "cat/2.HEIC", "dog/3.heic"], folders.UNREADABLE, 3, "cat/1.heic"),
    "other endings": (["dog/1.cr2", "dog/2.svg", "dog/3.mp4", "dog/4.txt"], folders.UNREADABLE, 4,
                      "dog/1.cr2"),
    "no ending": (["cat/IMG_0001", "dog/IMG_0002"], folders.UNREADABLE, 2, "cat/IMG_0001"),
    "a name that ends in a dot": (["cat/picture."], folders.UNREADABLE, 1, "cat/picture."),
    "hidden": (["cat/.1.jpg", "cat/._2.jpg"], folders.HIDDEN, 2, "cat/.1.jpg"),
    "hidden folders": (["cat/.cache/1.jpg", ".git/config"], folders.HIDDEN, 2, ".git"),
    "outside the classes": (["1.jpg", "2.png"], folders.STRAY, 2, "1.jpg"),
    "of no picture outside the classes": (["labels.json"], folders.UNREADABLE, 1, "labels.json"),
    "folders beside the splits": (["../validation/cat/1.jpg", "../old/2.jpg", "../old/3.txt"],
                                  folders.BESIDE, 2, "../old/2.jpg"),
    "beside the splits": (["../1.jpg", "../old/2.jpg"], folders.BESIDE, 2, "../1.jpg"),
    "litter of file managers": (["cat/Thumbs.db", "cat/.DS_Store", "dog/desktop.ini",
                                 "__MACOSX/cat/._a.jpg", "dog/@eaDir/c.jpg/SYNOPHOTO_THUMB_M.jpg"],
                                None, 0, None),
    "a line break in a name": (["cat/a\nb.heic"], folders.UNREADABLE, 1, "cat/a\\nb.heic"),
    "an empty deeper folder": (["cat/more/.gitkeep"], None, 0, None),
}


@pytest.mark.parametrize("kind, case", [
    *(("folder", case) for case in LEFT_OUT),
    # ILSVRC's val may be flat, and has other folders beside it
    *(("ilsvrc", case) for case in LEFT_OUT if "outside" not in case and "beside" not in case)])
def test_what_is_left_out_is_noted(cats, kind, case):
    files, reason, count, first = LEFT_OUT[case]
    split = cats / ("test" if kind == "folder" else "val")
    (cats / "test").rename(split)
    for file in files:
        touch(split / file)
    dataset = load(kind, cats)
    assert len(dataset) == 3
    right = [f"{count} {reason} (the first: {os.path.normpath(split / first)})"] if count else []
    assert [os.path.normpath(note) for note in dataset.notes[:-1]] == list(
        map(os.path.normpath, right))
    assert dataset.notes[-1] == "3 of 3 test images have no box and are not scored"


@pytest.mark.parametrize("split", ["train", "test"])
def test_links_are_followed_and_noted_where_they_lead_nowhere(cats, tmp_path, split):
    shutil.move(cats / split / "cat", tmp_path / "elsewhere")
    link(cats / split / "cat", tmp_path / "elsewhere")
    link(cats / split / "dog/fine.jpg", "c.jpg")
    for name, target in (("cat/1.jpg", "gone.jpg"), ("cat/loop.jpg", "loop.jpg"),
                         ("dog/gone", "gone"), ("stray.jpg", "gone"), ("bird", "gone")):
        link(cats / split / name, target)
    os.mkfifo(cats / split / "dog/pipe.jpg")
    dataset = load("folder", cats, split)
    assert len(dataset) == 4
    assert f"1 {folders.UNREADABLE} (the first: {cats / split / 'dog/pipe.jpg'})" in dataset.notes
    assert dataset.notes[0] == f"5 {folders.DANGLING} (the first: {cats / split / 'bird'})"


# ---------------------------------------------------------------- layouts


def rename(old, new):
    return lambda root: (root / old).rename(root / new)


def remove(*names):
    return lambda root: [shutil.rmtree(root / name) for name in names]


def both(*changes):
    return lambda root: [change(root) for change in changes]


LAYOUT = "/train/<class>/<image> and test/<class>/<image>, or <class>/<image> alone"
FAULTS = {  # what is done to a folder, the split that is loaded, words of the error
    "a split's link leads nowhere": (
        lambda root: link(root / "val", "gone"), "val",
        ["val: No such file", "needs to be a folder"]),
    "boxes.csv is a link that leads nowhere": (
        lambda root: link(root / "boxes.csv", "gone"), "test", ["boxes.csv: no such file"]),
    "an empty class": (
        lambda root: (root / "train/bird").mkdir(), "train", ["train/bird: no images"]),
    "heic alone": (lambda root: touch(root / "train/bird/1.heic"), "train",
                   ["train/bird: no images", "1 files", "1.heic"]),
    "deeper images alone": (lambda root: touch(root / "train/bird/more/1.jpg"), "train",
                            ["train/bird: no images", "1 images lie deeper", "more/1.jpg"]),
    "dangling links alone": (lambda root: link(root / "train/bird/1.jpg", "gone"), "train",
                             ["train/bird: no images", "1 links"]),
    "hidden images alone": (lambda root: touch(root / "train/bird/.1.jpg"), "train",
                            ["train/bird: no images", "1 hidden"]),
    "only heic to test": (
        lambda root: both(remove("test"), lambda root: touch(root / "test/cat/1.heic"))(root),
        "test", ["no images for split 'test'", f"1 {folders.UNREADABLE}", "1.heic"]),
    "no test": (remove("test"), "test", ["test: no such folder", LAYOUT]),
    "no train": (remove("train"), "train", ["train: no such folder", LAYOUT]),
    "test is val": (rename("test", "val"), "test", ["test: no such folder", "train, val", LAYOUT]),
    "capitals": (both(rename("train", "Train"), rename("test", "Test")), "train",
                 ["no images in its folders", LAYOUT]),
    "nothing": (remove("train", "test"), "train", ["no class folders", LAYOUT]),
    "pictures alone": (both(remove("train", "test"), lambda root: picture(root / "1.jpg")),
                       "train", ["no class folders", LAYOUT]),
    "a level too high": (lambda root: shutil.move(root, root.parent / "x") and shutil.move(
        root.parent / "x", root / "pets"), "train", ["no images in its folders", LAYOUT]),
    "train is empty": (both(remove("train"), lambda root: (root / "train").mkdir()), "train",
                       ["no class folders", LAYOUT]),
    "train is a file": (both(remove("train"), lambda root: touch(root / "train")), "train",
                        ["train: Not a directory", "needs to be a folder"]),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_folder_that_is_laid_out_otherwise_is_an_error(cats, case):
    change, split, words = FAULTS[case]
    change(cats)
    error_of(lambda: load("folder", cats, split), *words)


def test_one_split_is_enough_where_the_other_is_not_needed(cats):
    shutil.rmtree(cats / "test")
    assert len(load("folder", cats, "train")) == 3
    (cats / "train").rename(cats / "test")
    labels = load("folder", cats, classes=["ant", "cat", "dog"]).labels
    assert list(labels) == [1, 1, 2]
    error_of(lambda: load("folder", cats, classes=["cat"]), cats / "test/dog", "1 classes")


NFC, NFD = (unicodedata.normalize(form, "été") for form in ("NFC", "NFD"))


@pytest.mark.parametrize("train_name, test_name", [(NFC, NFD), (NFD, NFC), (NFD, NFD)])
def test_a_class_has_one_name_in_either_form_of_unicode(tmp_path, train_name, test_name):
    """macOS writes an accented letter as two characters, and zip archives keep them."""
    for split, name in (("train", train_name), ("test", test_name)):
        for path in (f"{split}/{name}/a.jpg", f"{split}/zebra/b.jpg"):
            picture(tmp_path / path)
    (tmp_path / "boxes.csv").write_text(f"test/{train_name}/a.jpg,1,2,30,20\n")
    train, test = load("folder", tmp_path, "train"), load("folder", tmp_path)
    assert train.classes == test.classes == ["zebra", NFC]
    for dataset in (train, test, load("folder", tmp_path, classes=["zebra", NFD])):
        assert [(sample["label"], "zebra" in sample["path"]) for sample in dataset] == [
            (0, True), (1, False)]
    assert test[1]["boxes"].tolist() == [[1, 2, 30, 20]]
    path = save_checkpoint(tmp_path / "best.pt", classes=["zebra", test_name])
    assert lctr.load_checkpoint(path)[1]["classes"] == test.classes
    picture(tmp_path / "test" / (NFC if test_name == NFD else NFD) / "a.jpg")
    error_of(lambda: load("folder", tmp_path), "two Unicode forms")


def test_other_files_name_pictures_and_classes_in_either_form_of_unicode(tmp_path):
    root = make_cub(tmp_path / "CUB", classes=("001.a", f"002.{NFC}"))
    (root / f"images/002.{NFC}").rename(root / f"images/002.{NFD}")
    for file in (root / f"images/002.{NFD}").iterdir():
        file.rename(file.with_name(unicodedata.normalize("NFD", file.name)))
    assert [sample["label"] for sample in load("cub", root)] == [0, 0, 1, 1]
    write_ilsvrc(tmp_path, tmp_path / "Annotations/val", True)
    shutil.move(tmp_path / "val/ILSVRC2012_val_00000001.JPEG", tmp_path / f"val/{NFD}.JPEG")
    shutil.move(tmp_path / "Annotations/val/ILSVRC2012_val_00000001.xml",
                tmp_path / f"Annotations/val/{NFC}.xml")
    dataset = load("ilsvrc", tmp_path)
    assert len(dataset) == 6 and not dataset.notes


# ---------------------------------------------------------------- plain class folders


def plain(root, *counts, name="{}.png"):
    """Class folders alone with that many pictures each."""
    for label, count in enumerate(counts):
        for i in range(count):
            picture(root / f"class {label}" / name.format(i), (6, 4))
    return root


def names_of(dataset):
    return [os.fsdecode(path) for path in dataset.paths]


def test_plain_class_folders_are_split_by_name(tmp_path):
    root = plain(tmp_path / "plain", 150, 90, 60, name="image {}.png")
    splits = {split: load("folder", root, split) for split in ("train", "val", "test")}
    counts = {split: len(dataset) for split, dataset in splits.items()}
    assert sum(counts.values()) == 300
    assert abs(counts["train"] - 240) < 25 and abs(counts["val"] - 30) < 20
    note = (f"{root} has no train/ and test/: the images of its 3 classes are split 80 / 10 / 10 "
            "by a hash of their names, at least one each to train, into "
            f"{counts['train']} train, {counts['val']} val, {counts['test']} test")
    for split, dataset in splits.items():
        assert dataset.classes == ["class 0", "class 1", "class 2"] and dataset.notes[0] == note
        for name, label in zip(names_of(dataset), dataset.labels):
            place = folders.hash_of(name)
            assert name.startswith(f"class {label}/")
            assert split == ("train" if place < 0.8 else "val" if place < 0.9 else "test")
    assert data.has_split("folder", root, "val")


@pytest.mark.parametrize("counts", [(1, 1), (1, 5), (2, 2), (3, 1), (9, 2), (1,) * 40])
@pytest.mark.parametrize("name", ["{}.png", "1-{}.png", "2-{}.png"])
def test_few_pictures_leave_some_to_train_on_and_to_test(tmp_path, counts, name):
    root = plain(tmp_path / "plain", *counts, name=name)
    assert set(load("folder", root, "train").labels) == set(range(len(counts)))
    if max(counts) > 1:
        assert len(load("folder", root)) > 0
    else:
        error_of(lambda: load("folder", root), "no images for split 'test'", "at least one each "
                 f"to train, into {len(counts)} train, 0 val, 0 test")
    if data.has_split("folder", root, "val"):
        assert len(load("folder", root, "val")) > 0


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_a_class_may_be_named_like_a_split(tmp_path, name):
    root = plain(tmp_path / "plain", 20, 20)
    (root / "class 1").rename(root / name)
    dataset = load("folder", root, "train")
    assert dataset.classes == ["class 0", name] and "has no train/ and test/" in dataset.notes[0]
    assert len(dataset) + len(load("folder", root, "val")) + len(load("folder", root)) == 40


def test_plain_class_folders_with_boxes_and_a_checkpoints_classes(tmp_path):
    root = plain(tmp_path / "plain", 30, 30)
    (name, *_), (other, *_) = (names_of(load("folder", root, s)) for s in ("test", "train"))
    (root / "boxes.csv").write_text(f"{name},1,1,5,3\n{root}/{other},1,1,5,3\ngone.png,1,2,3,4\n")
    dataset = load("folder", root)
    assert dataset[0]["boxes"].tolist() == [[1, 1, 5, 3]] and dataset.annotated == 1
    assert dataset.notes[1].startswith(f"1 rows of {root / 'boxes.csv'} name no image")
    known = load("folder", root, classes=["class 0", "class 1", "class 2"])
    assert names_of(known) == names_of(dataset) and list(known.labels) == list(dataset.labels)
    error_of(lambda: load("folder", root, classes=["class 0"]), root / "class 1")


def test_runs_of_train_beside_class_folders_are_no_classes(tmp_path):
    root = plain(tmp_path / "plain", 30, 30)
    before = names_of(load("folder", root))
    picture(root / "runs/folder-cdm-seed0/gallery.png")  # of train.py, started in this folder
    picture(root / "first/gallery.png")  # and with --out
    touch(root / "first/.lock")
    for classes in (None, ["class 0", "class 1"]):
        assert names_of(load("folder", root, classes=classes)) == before
    picture(root / "runs/1.jpg")
    assert load("folder", root).classes == ["class 0", "class 1", "runs"]


# ---------------------------------------------------------------- scored pictures are decoded first


def half(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


@pytest.mark.parametrize("split, augment", [("test", None), ("val", None), ("train", False)])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_a_scored_picture_cut_in_half_shows_at_once(cats, split, augment, suffix):
    path = cats / split / "dog" / f"half.{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(0, (90, 70)).save(path)
    load("folder", cats, split, augment=augment)
    half(path)
    error_of(lambda: load("folder", cats, split, augment=augment), path, "cannot be read")


def test_a_broken_picture_with_a_line_break_in_its_name_is_one_line(cats):
    touch(cats / "test/dog/a\nb.jpg", b"")
    error_of(lambda: load("folder", cats), f"{cats}/test/dog/a\\nb.jpg", "cannot be read")


@pytest.mark.parametrize("cores", [1, 3])
def test_the_check_takes_all_cores_and_names_the_first(cats, monkeypatch, cores):
    monkeypatch.setattr(data, "_cores", lambda: cores)
    for i in range(501):
        noise(i, (8, 6)).save(cats / f"test/dog/{i:03}.png")
    (cats / "boxes.csv").write_text("".join(f"test/dog/{i:03}.png,{i % 5},1,8,6\n"
                                            for i in range(501)))
    dataset = load("folder", cats)
    assert dataset.annotated == 501 and dataset[9]["boxes"].tolist() == [[2, 1, 8, 6]]
    for i in (400, 500):
        half(cats / f"test/dog/{i}.png")
    error_of(lambda: load("folder", cats), cats / "test/dog/400.png")
