"""Boxes in the right frame, and nothing of a folder left out without a word: tables of cases, each
with its right value.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import evaluate
import train
from helpers import (WNIDS, call, error_of, make_cub, noise, picture, save_checkpoint,
                     script_error, write_ilsvrc, xml)
from support.pictures import folders, views

BOX = (5, 10, 25, 35)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


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


@pytest.fixture
def one_picture(tmp_path):
    """A function that writes one picture of ILSVRC and loads it: (boxes, notes)."""
    write_ilsvrc(tmp_path, tmp_path / "Annotations/val", False)
    shutil.rmtree(tmp_path / "val")
    shutil.rmtree(tmp_path / "Annotations")

    def make(stored, orientation, size, box=BOX):
        picture(tmp_path / "val/n01440764/a.JPEG", stored, exif=exif(orientation))
        (tmp_path / "Annotations/val").mkdir(parents=True)
        (tmp_path / "Annotations/val/a.xml").write_text(xml("n01440764", box, size=size))
        dataset = load("ilsvrc", tmp_path)
        return [tuple(box) for box in dataset[0]["boxes"].tolist()], dataset.notes

    return make


FRAMES = {  # stored size, EXIF's orientation, <size>, box, the right box, words of the note
    "as stated": ((60, 40), 1, size_xml(60, 40), BOX, BOX, None),
    "upright": ((60, 40), 6, size_xml(40, 60), BOX, BOX, None),
    "stored, 5": ((60, 40), 5, size_xml(60, 40), BOX, (10, 5, 35, 25), None),
    "stored, 6": ((60, 40), 6, size_xml(60, 40), BOX, (5, 5, 30, 25), None),
    "stored, 7": ((60, 40), 7, size_xml(60, 40), BOX, (5, 35, 30, 55), None),
    "stored, 8": ((60, 40), 8, size_xml(60, 40), BOX, (10, 35, 35, 55), None),
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
    "empty": ((60, 40), 1, size_xml("", ""), BOX, BOX, "state no size"),
    "a width alone": ((60, 40), 1, "<size><width>60</width></size>", BOX, BOX, "state no size"),
    "with fractions of zero": ((60, 40), 1, size_xml("60.0", "40.0"), BOX, BOX, None),
    "beyond the stored": ((60, 40), 6, size_xml(60, 40), (-5, -5, 80, 80), (0, 0, 40, 60),
                          "beyond"),
}


@pytest.mark.parametrize("case", FRAMES)
def test_frame_of_an_xml(one_picture, case):
    stored, orientation, size, box, right, words = FRAMES[case]
    boxes, notes = one_picture(stored, orientation, size, box)
    assert np.allclose(boxes, [right], rtol=1e-6)
    assert len(notes) == (words is not None) and (words is None or words in notes[0])


@pytest.mark.parametrize("stored, orientation, size, words", [
    ((60, 60), 1, size_xml(60, 40), "60 x 40"),
    ((256, 256), 1, size_xml(500, 375), "500 x 375"),
    ((256, 341), 1, size_xml(500, 375), "500 x 375"),  # turned for good, and made smaller
    ((345, 256), 1, size_xml(500, 375), "500 x 375"),
    ((60, 40), 6, size_xml(41, 70), "40 x 60 upright"),
    ((60, 40), 1, size_xml(-60, 40), "-60 x 40"),
    ((60, 40), 1, size_xml("nan", 40), "nan"),
    ((60, 40), 1, size_xml("inf", 40), "inf"),
    ((60, 40), 1, size_xml("60.5", 40), "60.5"),
    ((60, 40), 1, size_xml("sixty", 40), "sixty"),
    ((60, 40), 1, size_xml("9" * 500, 40), "999"),
    ((60, 40), 1, size_xml(1, 1), "1 x 1"),
])
def test_frames_that_no_rule_has(one_picture, stored, orientation, size, words):
    error_of(lambda: one_picture(stored, orientation, size), "a.xml", words)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_lies_on_what_it_marks_however_a_picture_is_turned(tmp_path, orientation):
    """The white block of the stored picture, and its box there, are the same place upright."""
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[20:70, 10:50] = 255
    path = tmp_path / "val/n01440764/a.JPEG"
    write_ilsvrc(tmp_path, tmp_path / "Annotations/val", False)
    shutil.rmtree(tmp_path / "val")
    path.parent.mkdir(parents=True)
    Image.fromarray(pixels).save(path, exif=exif(orientation), quality=95)
    for file in (tmp_path / "Annotations/val").iterdir():
        file.unlink()
    (tmp_path / "Annotations/val/a.xml").write_text(
        xml("n01440764", (10, 20, 50, 70), size=size_xml(120, 80)))
    dataset = load("ilsvrc", tmp_path)
    white = np.asarray(data.open_image(path))[..., 0] > 127
    rows, columns = np.nonzero(white)
    seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    if orientation > 4 or orientation == 1:
        assert dataset[0]["boxes"].tolist() == [seen] and not dataset.notes
    else:  # the size cannot tell
        assert dataset[0]["boxes"].tolist() == [[10, 20, 50, 70]] and len(dataset.notes) == 1


def test_what_several_pictures_have_in_common_is_one_note(tmp_path):
    write_ilsvrc(tmp_path, tmp_path / "Annotations/val", False)
    for i, size in enumerate([size_xml(100, 80), size_xml(25, 20), "", "", "", size_xml(50, 40)]):
        file = sorted((tmp_path / "Annotations/val").iterdir())[i]
        file.write_text(file.read_text().replace(size_xml(50, 40).replace(
            "<depth>3</depth>", ""), size))
    scaled, unstated, clipped = load("ilsvrc", tmp_path).notes
    assert scaled.startswith("2 images have another size") and "00000001.xml" in scaled
    assert unstated.startswith("3 annotations state no size") and "00000003.xml" in unstated
    assert clipped.startswith("1 boxes reach beyond")


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
    before = {sample["path"]: sample["label"] for sample in load("ilsvrc", tmp_path)}
    names = load("ilsvrc", tmp_path).classes
    shutil.rmtree(tmp_path / "train")
    dataset = load("ilsvrc", tmp_path, classes=given)
    assert dataset.classes == (right or given)
    wnids = {"crane": "n02012849", "goldfish, Carassius auratus": "n01443537",
             "tench, Tinca tinca": "n01440764"}
    for sample in dataset:
        was, now = names[before[sample["path"]]], dataset.classes[sample["label"]]
        assert wnids.get(was, was) == wnids.get(now, now)


@pytest.mark.parametrize("kind", ["ilsvrc", "folder"])
def test_evaluate_needs_no_train_and_prints_notes(tmp_path, capsys, cats, without_pictures, kind):
    root, classes, note = cats, ("cat", "dog"), "3 of 3 test images have no box"
    if kind == "ilsvrc":
        root, classes, note = tmp_path, sorted(WNIDS), "1 annotations state no size"
        write_ilsvrc(tmp_path, tmp_path / "Annotations/val", True)
        file = sorted((tmp_path / "Annotations/val").iterdir())[0]
        file.write_text(xml("n01440764", (1, 2, 3, 4), size=""))
    shutil.rmtree(root / "train")
    checkpoint = save_checkpoint(tmp_path / "best.pt", classes=classes, data=kind, root=str(root))
    status, out, err = call(capsys, evaluate, "--checkpoint", checkpoint, "--device", "cpu")
    assert (status, err) == (0, "") and f"note: {note}" in out


def test_two_annotations_of_one_image(tmp_path):
    write_ilsvrc(tmp_path, tmp_path / "Annotations/val", True)
    first = tmp_path / "Annotations/val/ILSVRC2012_val_00000001.xml"
    (tmp_path / "Annotations/val/old").mkdir()
    shutil.copy(first, first.parent / "old")
    error_of(lambda: load("ilsvrc", tmp_path), first, first.parent / "old" / first.name)


def test_ilsvrc_without_train_mapping_and_classes(tmp_path):
    write_ilsvrc(tmp_path, tmp_path / "Annotations/val", True)
    shutil.rmtree(tmp_path / "train")
    error_of(lambda: load("ilsvrc", tmp_path), tmp_path / "train")
    error_of(lambda: load("ilsvrc", tmp_path, classes=["crane", "tench"]), ".xml", "n01440764")


# ---------------------------------------------------------------- boxes.csv


ROWS = {  # rows of boxes.csv, the boxes of test/cat/a.jpg, words of the note on the rows
    "relative": (["test/cat/a.jpg,1,2,30,40"], [[1, 2, 30, 40]], None),
    "absolute": (["{root}/test/cat/a.jpg,1,2,30,40"], [[1, 2, 30, 40]], None),
    "absolute through a link": (["{link}/test/cat/a.jpg,1,2,30,40"], [[1, 2, 30, 40]], None),
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
    "twice the same one": (["gone.jpg,1,2,30,40", "gone.jpg,1,2,3,4"], [], "2 rows"),
    "without its split": (["cat/a.jpg,1,2,30,40"], [], "line 1, 'cat/a.jpg'"),
    "with the folder's name": (["pets/test/cat/a.jpg,1,2,30,40"], [], "1 rows"),
    "in capitals": (["test/cat/A.JPG,1,2,30,40"], [], "1 rows"),
    "a folder": (["test/cat,1,2,30,40"], [], "1 rows"),
    "a file that is no picture": (["boxes.csv,1,2,30,40"], [], "1 rows"),
    "a picture of no class": (["test/stray.jpg,1,2,30,40"], [], "1 rows"),
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
                            "1 rows of {root}/boxes.csv lie within 0 and 1"),
    "blank rows": (["test/cat/a.jpg,1,2,30,40", "   ", ",,,,", ""], [[1, 2, 30, 40]], None),
    "accents in two characters": (["test/cat/e\u0301.jpg,1,2,30,40"],
                                  {"\xe9.jpg": [[1, 2, 30, 40]]}, None),
    "accents in two characters, of another split": (["train/cat/e\u0301.jpg,1,2,30,40"], [], None),
    "a line break in a name": (['"test/cat/a\nb.jpg",1,2,30,40'], {"a\nb.jpg": [[1, 2, 30, 40]]},
                               None),
    "of a linked class": (["test/linked/a.jpg,1,2,30,40", "train/linked/a.jpg,1,2,30,40"],
                          [[1, 2, 30, 40]], None),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_of_boxes_csv(cats, tmp_path, case):
    rows, right, words = ROWS[case]
    link(tmp_path / "link", cats)
    for name in ("test/stray.jpg", "test/cat/\xe9.jpg", "train/cat/\xe9.jpg", "test/cat/a\nb.jpg"):
        picture(cats / name, (60, 40))
    if "linked" in case:
        picture(tmp_path / "elsewhere/a.jpg", (60, 40))
        for split in ("train", "test"):
            link(cats / split / "linked", tmp_path / "elsewhere")
            (cats / split / "cat/a.jpg").unlink()
    (cats / "boxes.csv").write_text("\n".join(rows).format(root=cats, link=tmp_path / "link"))
    if isinstance(right, str):
        error_of(lambda: load("folder", cats), cats / "boxes.csv", right)
        return
    dataset = load("folder", cats)
    right = right if isinstance(right, dict) else {"a.jpg": right}
    assert right.items() <= boxes_of(dataset).items()
    notes = [note for note in dataset.notes if "rows of" in note]
    assert len(notes) == (words is not None)
    assert words is None or words.format(root=cats) in notes[0]


def test_a_link_to_boxes_that_leads_nowhere(cats):
    link(cats / "boxes.csv", "gone.csv")
    error_of(lambda: load("folder", cats), cats / "boxes.csv", "no such file")


def test_an_absolute_root_may_be_named_by_a_relative_one(cats, monkeypatch):
    (cats / "boxes.csv").write_text(f"{cats}/test/cat/a.jpg,1,2,30,40\n")
    monkeypatch.chdir(cats)
    assert boxes_of(load("folder", "."))["a.jpg"] == [[1, 2, 30, 40]]


@pytest.mark.parametrize("box, noted", [
    ((5, 5, 35, 55), 0),  # fits upright, 40 x 60
    ((5, 5, 55, 35), 1),  # fits as stored, 60 x 40
    ((5, 5, 35, 35), 0),  # fits both
    ((5, 5, 70, 70), 0),  # fits neither
])
@pytest.mark.parametrize("kind", ["folder", "cub"])
def test_boxes_of_the_stored_picture_are_noted(cats, tmp_path, kind, box, noted):
    root, x0, y0, x1, y1 = cats, *box
    if kind == "folder":
        place = "test/cat/a.jpg"
        (cats / "boxes.csv").write_text(f"{place},{x0},{y0},{x1},{y1}\n")
    else:
        root = make_cub(tmp_path / "CUB")
        lines = (root / "bounding_boxes.txt").read_text().split("\n")
        lines[1] = f"2 {x0} {y0} {x1 - x0} {y1 - y0}"
        (root / "bounding_boxes.txt").write_text("\n".join(lines))
        place = "images/" + (root / "images.txt").read_text().split("\n")[1].split()[1]
    picture(root / place, (60, 40), exif=exif(6))
    notes = [note for note in load(kind, root).notes if "as stored" in note]
    assert len(notes) == noted and all(place in note for note in notes)
    upright = [[min(x0, 40), min(y0, 60), min(x1, 40), min(y1, 60)]]
    assert boxes_of(load(kind, root))[Path(place).name] == upright


# ---------------------------------------------------------------- what is left out


LEFT_OUT = {  # files of test/, the reason, how many, the first
    "deeper": (["cat/more/1.jpg", "cat/more/deep/2.PNG", "dog/x/3.jpg", "dog/x/notes.txt"],
               folders.DEEPER, 3, "cat/more/1.jpg"),
    "heic": (["cat/1.heic", "cat/2.HEIC", "dog/3.heic"], folders.UNREADABLE, 3, "cat/1.heic"),
    "other endings": (["dog/1.cr2", "dog/2.svg", "dog/3.mp4", "dog/4.txt"], folders.UNREADABLE, 4,
                      "dog/1.cr2"),
    "no ending": (["cat/IMG_0001", "dog/IMG_0002"], folders.NO_ENDING, 2, "cat/IMG_0001"),
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
    if kind == "ilsvrc":
        (cats / "test").rename(cats / "val")
    split = cats / ("test" if kind == "folder" else "val")
    for file in files:
        touch(split / file)
    dataset = load(kind, cats)
    assert len(dataset) == 3
    right = [f"{count} {reason} (the first: {os.path.normpath(split / first)})"] if count else []
    assert [os.path.normpath(note) for note in dataset.notes[:-1]] == list(
        map(os.path.normpath, right))
    assert dataset.notes[-1] == "3 of 3 test images have no box and are not scored"


@pytest.mark.parametrize("split", ["train", "test"])
def test_links_that_lead_nowhere_are_noted(cats, split):
    link(cats / split / "cat/1.jpg", "gone.jpg")
    link(cats / split / "cat/loop.jpg", "loop.jpg")
    link(cats / split / "dog/gone", "gone")
    link(cats / split / "stray.jpg", "gone")
    link(cats / split / "dog/fine.jpg", "c.jpg")
    dataset = load("folder", cats, split)
    assert len(dataset) == 4
    note = f"4 {folders.DANGLING} (the first: {cats / split / 'stray.jpg'})"
    assert dataset.notes[0] == note


def test_deeper_pictures_are_found_through_links_but_not_without_end(cats, tmp_path):
    picture(tmp_path / "more/1.jpg")
    link(cats / "test/cat/more", tmp_path / "more")
    link(cats / "test/cat/up", "..")
    link(tmp_path / "more/again", "../pets/test/cat/more")
    note = load("folder", cats).notes[0]
    # more/1.jpg, and a, b, more/1 and c through up
    assert note == f"5 {folders.DEEPER} (the first: {cats / 'test/cat/more/1.jpg'})"


def test_each_reason_has_its_own_note(cats):
    for name in ("cat/1.heic", "cat/2", "cat/.3.jpg", "cat/deep/4.jpg", "5.jpg"):
        touch(cats / "train" / name)
    os.mkfifo(cats / "train/cat/6.jpg")
    notes = load("folder", cats, "train").notes
    assert sorted(note.split(" (")[0] for note in notes) == sorted(f"1 {reason}" for reason in (
        folders.UNREADABLE, folders.NO_ENDING, folders.HIDDEN, folders.DEEPER, folders.STRAY,
        folders.SPECIAL))


def test_a_flat_val_of_ilsvrc_notes_what_it_leaves_out(tmp_path):
    write_ilsvrc(tmp_path, tmp_path / "val", True)
    for name in ("1.heic", "2", ".3.JPEG", "more/4.JPEG"):
        touch(tmp_path / "val" / name)
    notes = load("ilsvrc", tmp_path).notes
    assert sorted(note.split(" (")[0] for note in notes) == sorted(f"1 {reason}" for reason in (
        folders.UNREADABLE, folders.NO_ENDING, folders.HIDDEN, folders.DEEPER))


def test_jpeg_2000_and_other_endings_that_pillow_reads_are_read(cats):
    for ending in ("jp2", "tga", "pbm", "dib", "jfif", "apng", "qoi"):
        mode = "1" if ending == "pbm" else "RGB"
        form = {"apng": "PNG", "pbm": "PPM"}.get(ending)
        noise(0).convert(mode).save(cats / f"test/cat/x.{ending}", form)
    dataset = load("folder", cats)
    assert len(dataset) == 10 and len(dataset.notes) == 1


# ---------------------------------------------------------------- layouts


CLASS_FAULTS = {  # what is done to train/, words of the error
    "a link that leads nowhere": (lambda train: link(train / "bird", "gone"),
                                  ["train/bird", "link"]),
    "a link to itself": (lambda train: link(train / "bird", "bird"), ["train/bird", "link"]),
    "a dangling link with a dot in its name": (lambda train: link(train / "003.Bird", "gone"),
                                               ["train/003.Bird", "link"]),
    "empty": (lambda train: (train / "bird").mkdir(), ["train/bird: no images"]),
    "heic alone": (lambda train: touch(train / "bird/1.heic"),
                   ["train/bird: no images", "1 files", "1.heic"]),
    "deeper alone": (lambda train: touch(train / "bird/more/1.jpg"),
                     ["train/bird: no images", "1 images lie deeper", "more/1.jpg"]),
    "dangling links alone": (lambda train: link(train / "bird/1.jpg", "gone"),
                             ["train/bird: no images", "1 links"]),
    "hidden alone": (lambda train: touch(train / "bird/.1.jpg"),
                     ["train/bird: no images", "1 hidden"]),
}


@pytest.mark.parametrize("case", CLASS_FAULTS)
def test_a_class_without_images_is_an_error(cats, case):
    change, words = CLASS_FAULTS[case]
    change(cats / "train")
    error_of(lambda: load("folder", cats, "train"), *words)


def test_a_class_folder_that_dangles_is_an_error_in_every_split(cats):
    link(cats / "train/bird", "gone")
    error_of(lambda: load("folder", cats), cats / "train/bird", "link")  # not two classes of three
    (cats / "train/bird").unlink()
    link(cats / "test/bird", "gone")
    error_of(lambda: load("folder", cats), cats / "test/bird", "link")
    (cats / "test/bird").unlink()
    link(cats / "val", "gone")
    error_of(lambda: load("folder", cats), cats / "val", "link")
    assert not data.has_split("folder", cats, "val")


def test_links_to_folders_and_pictures_are_followed(cats, tmp_path):
    shutil.move(cats / "train/cat", tmp_path / "cat")
    link(cats / "train/cat", tmp_path / "cat")
    link(cats / "train/dog/again.jpg", "c.jpg")
    assert len(load("folder", cats, "train")) == 4


def rename(old, new):
    return lambda root: (root / old).rename(root / new)


LAYOUT_FAULTS = {  # what is done to a folder, the split asked for, words of the error
    "no test": (lambda root: shutil.rmtree(root / "test"), "test", ["test: no such folder"]),
    "no train": (lambda root: shutil.rmtree(root / "train"), "train", ["train: no such folder"]),
    "no train, for its classes": (lambda root: shutil.rmtree(root / "train"), "test",
                                  ["train: no such folder"]),
    "test is named otherwise": (rename("test", "testing"), "test", ["test: no such folder"]),
    "test is val": (rename("test", "val"), "test", ["test: no such folder", "train, val"]),
    "capitals": (lambda root: (rename("train", "Train")(root), rename("test", "Test")(root)),
                 "train", ["no images in its folders"]),
    "nothing": (lambda root: [shutil.rmtree(root / name) for name in ("train", "test")], "train",
                ["no class folders"]),
    "pictures alone": (lambda root: (shutil.rmtree(root / "train"), shutil.rmtree(root / "test"),
                                     picture(root / "1.jpg")), "train", ["no class folders"]),
    "a level too high": (lambda root: shutil.move(root, root.parent / "x") and shutil.move(
        root.parent / "x", root / "pets"), "train", ["no images in its folders"]),
    "train is empty": (lambda root: (shutil.rmtree(root / "train"), (root / "train").mkdir()),
                       "train", ["no class folders"]),
    "train is a file": (lambda root: (shutil.rmtree(root / "train"), touch(root / "train")),
                        "train", ["train: no such folder"]),
}


@pytest.mark.parametrize("case", LAYOUT_FAULTS)
def test_a_missing_layout_is_shown(cats, case):
    change, split, words = LAYOUT_FAULTS[case]
    change(cats)
    error_of(lambda: load("folder", cats, split), *words,
             f"{cats}/train/<class>/<image> and test/<class>/<image>, or <class>/<image> alone")


def test_one_split_is_enough_where_the_other_is_not_needed(cats):
    shutil.rmtree(cats / "test")
    assert len(load("folder", cats, "train")) == 3
    (cats / "train").rename(cats / "test")
    assert [sample["label"] for sample in load("folder", cats, classes=["ant", "cat", "dog"])] == [
        1, 1, 2]
    error_of(lambda: load("folder", cats, classes=["cat"]), cats / "test/dog", "1 classes")


# ---------------------------------------------------------------- plain class folders


@pytest.fixture
def plain(tmp_path):
    """A function that makes class folders alone with that many pictures each."""

    def make(*counts, name="{}.png"):
        for label, count in enumerate(counts):
            for i in range(count):
                picture(tmp_path / "plain" / f"class {label}" / name.format(i), (6, 4))
        return tmp_path / "plain"

    return make


def names_of(dataset):
    return [os.fsdecode(path) for path in dataset.paths]


def test_plain_class_folders_are_split_by_name(plain):
    root = plain(150, 90, 60, name="image {}.png")
    splits = {split: load("folder", root, split) for split in ("train", "val", "test")}
    counts = {split: len(dataset) for split, dataset in splits.items()}
    assert sum(counts.values()) == 300
    assert abs(counts["train"] - 240) < 25 and abs(counts["val"] - 30) < 20
    every = [name for dataset in splits.values() for name in names_of(dataset)]
    assert len(set(every)) == 300
    note = (f"{root} has no train/ and test/: the images of its 3 classes are split 80 / 10 / 10 "
            f"by a hash of their names, into {counts['train']} train, {counts['val']} val, "
            f"{counts['test']} test")
    for split, dataset in splits.items():
        assert dataset.classes == ["class 0", "class 1", "class 2"] and dataset.notes[0] == note
        for name, label in zip(names_of(dataset), dataset.labels):
            folder, file = name.split("/")
            place = folders.place_of(file)
            assert folder == f"class {label}"
            assert split == ("train" if place < 0.8 else "val" if place < 0.9 else "test")
    assert data.has_split("folder", root, "val")


def test_a_new_picture_moves_no_other(plain):
    before = {split: set(names_of(load("folder", plain(60, 40), split)))
              for split in ("train", "val", "test")}
    after = {split: set(names_of(load("folder", plain(80, 70, 50), split)))
             for split in ("train", "val", "test")}
    assert all(before[split] <= after[split] for split in before)


@pytest.mark.parametrize("counts", [(1, 1), (1, 5), (2, 2), (3, 1), (5, 5), (9, 2), (30, 1)])
def test_few_pictures_leave_some_to_train_on_and_to_test(plain, counts):
    for attempt in range(12):
        root = plain(*counts, name=f"{attempt}-{{}}.png")
        train = load("folder", root, "train")
        assert set(train.labels) == set(range(len(counts)))
        if max(counts) > 1:
            assert len(load("folder", root)) > 0
        else:
            error_of(lambda: load("folder", root), "no images for split 'test'")
        if not data.has_split("folder", root, "val"):
            error_of(lambda: load("folder", root, "val"), "no split 'val'")
        else:
            assert len(load("folder", root, "val")) > 0
        shutil.rmtree(root)


def test_plain_class_folders_with_boxes_and_a_checkpoints_classes(plain):
    root = plain(30, 30)
    name = names_of(load("folder", root))[0]
    other = names_of(load("folder", root, "train"))[0]
    (root / "boxes.csv").write_text(f"{name},1,1,5,3\n{root}/{other},1,1,5,3\ngone.png,1,2,3,4\n")
    (root / "readme.txt").write_text("about")
    dataset = load("folder", root)
    assert dataset[0]["boxes"].tolist() == [[1, 1, 5, 3]] and dataset.annotated == 1
    assert [note.split(" (")[0] for note in dataset.notes[1:3]] == [
        f"1 {folders.UNREADABLE}", f"1 rows of {root / 'boxes.csv'} name no image"]
    known = load("folder", root, classes=["class 0", "class 1", "class 2"])
    assert names_of(known) == names_of(dataset) and list(known.labels) == list(dataset.labels)
    error_of(lambda: load("folder", root, classes=["class 0"]), root / "class 1")
    picture(root / "runs/folder-cdm-seed0/gallery.png")  # of train.py, started in this folder
    assert names_of(load("folder", root)) == names_of(dataset)
    assert names_of(load("folder", root, classes=["class 0", "class 1"])) == names_of(dataset)
    (root / "empty").mkdir()
    error_of(lambda: load("folder", root), root / "empty", "no images")
    (root / "empty").rmdir()
    picture(root / "runs/1.jpg")
    assert load("folder", root).classes == ["class 0", "class 1", "runs"]


# ---------------------------------------------------------------- scored pictures are decoded first


def half(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


@pytest.mark.parametrize("split, augment", [("test", None), ("val", None), ("train", False)])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp"])
def test_a_scored_picture_cut_in_half_shows_at_once(cats, split, augment, suffix):
    path = cats / split / "dog" / f"half.{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(0, (90, 70)).save(path)
    load("folder", cats, split, augment=augment)
    half(path)
    error_of(lambda: load("folder", cats, split, augment=augment), path, "cannot be read")


def test_a_scored_jpeg_cut_in_half_ends_a_run_before_its_first_step(cats, tmp_path, capsys):
    flags = ("--img-size 16 --patch-size 8 --embed-dim 12 --depth 1 --num-heads 2 --batch-size 3 "
             "--epochs 1 --device cpu --data folder").split()
    noise(0, (90, 70)).save(cats / "test/dog/half.jpg")
    half(cats / "test/dog/half.jpg")
    result = call(capsys, train, *flags, "--root", cats, "--out", tmp_path / "run")
    assert str(cats / "test/dog/half.jpg") in script_error(result, train)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_with_a_line_break_in_its_name(cats, workers):
    path = cats / "test/dog/a\nb.jpg"
    path.write_bytes(b"")
    name = str(path).replace("\n", "\\n")
    error_of(lambda: load("folder", cats), name, "cannot be read")
    path.rename(cats / "train/dog/a\nb.jpg")
    batches = data.loader(load("folder", cats, "train"), [[0, 1, 2, 3]], workers)
    error_of(lambda: list(batches), name.replace("/test/", "/train/"), "cannot be read")


@pytest.mark.parametrize("cores", [1, 3])
def test_the_check_takes_all_cores_and_names_the_first(cats, monkeypatch, cores):
    monkeypatch.setattr(data, "_cores", lambda: cores)
    for i in range(600):
        noise(i, (8, 6)).save(cats / f"test/dog/{i:03}.png")
    (cats / "boxes.csv").write_text("".join(f"test/dog/{i:03}.png,{i % 5},1,8,6\n"
                                            for i in range(600)))
    dataset = load("folder", cats)
    assert dataset.annotated == 600 and dataset[9]["boxes"].tolist() == [[2, 1, 8, 6]]
    for i in (400, 555):
        half(cats / f"test/dog/{i}.png")
    error_of(lambda: load("folder", cats), cats / "test/dog/400.png")


def test_the_check_decodes_as_scoring_does(cats, monkeypatch):
    """The same reduced JPEG: the same parts of a file are read."""
    asked, decode = [], views.decode
    monkeypatch.setattr(views, "decode", lambda *a: asked.append(a) or decode(*a))
    for crop in (None, 20):
        dataset = load("folder", cats, crop=crop)
        checked = asked[:]
        asked.clear()
        for i in range(3):
            dataset[i]
        assert [(str(path), least) for path, least in checked] == [
            (str(path), least) for path, least in asked] and len(asked) == 3
        asked.clear()
