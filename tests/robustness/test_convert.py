"""data.py --convert: hand-made annotations of other tools, and the boxes.csv that they give."""

import csv
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
from helpers import call, exif, picture, script_error
from support.pictures.convert import convert

SIZE = "<size><width>60</width><height>40</height><depth>3</depth></size>"
A, B, C, E = "test/cat/a.jpg", "test/cat/b.png", "test/dog/c.jpg", "test/\xe9t\xe9/\xe9.jpg"
ODD = 'test/dog/"\xe4", \u732b 2.jpg'
CAT_AND_DOG = "0 .5 .5 .5 .5\n1 .1 .1 .1 .1"


@pytest.fixture
def pets(tmp_path):
    """A folder of one's own; all pictures are 60 x 40."""
    for name in (A, B, C, E, ODD, "train/cat/d.jpg", "train/dog/f.jpg", "train/\xe9t\xe9/g.jpg",
                 "root.jpg"):
        picture(tmp_path / "pets" / name, (60, 40))
    return tmp_path / "pets"


def voc(*objects, name="a.jpg", size=SIZE, folder="JPEGImages"):
    boxes = "".join(
        f"<object><name>{label}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax>"
        f"<ymax>{y1}</ymax></bndbox></object>" for label, x0, y0, x1, y1 in objects)
    return (f"<annotation><folder>{folder}</folder><filename>{name}</filename>{size}{boxes}"
            "</annotation>")


def coco(images, boxes, categories=("cat", "dog"), **more):
    """images: file names, or (file name, width, height); boxes: (image, x, y, w, h[, category])."""
    images = [image if isinstance(image, tuple) else (image, 60, 40) for image in images]
    return json.dumps({
        "images": [{"id": 100 + i, "file_name": name, "width": w, "height": h}
                   for i, (name, w, h) in enumerate(images)],
        "annotations": [{"id": i, "image_id": 100 + box[0], "bbox": list(box[1:5]),
                         "category_id": box[5] if len(box) > 5 else 0, **more}
                        for i, box in enumerate(boxes)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(categories)]})


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def run(capsys, pets, form, files):
    """The form's files beside the pictures' folder, converted: call()'s result."""
    source = pets.parent / "labels"
    source.mkdir(exist_ok=True)
    write(source, files)
    source = source / "a.json" if form == "coco" else source
    return call(capsys, data, "--convert", form, source, "--root", pets, "--out",
                pets.parent / "boxes.csv")


def rows_of(pets):
    with open(pets.parent / "boxes.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["path", "xmin", "ymin", "xmax", "ymax"]
    return [(path, *map(float, box)) for path, *box in rows]


CASES = {  # form, files, rows of boxes.csv, words that are printed besides the count
    "coco": ("coco", {"a.json": coco(["a.jpg", "c.jpg"], [(0, 5, 10, 20, 15), (1, 0, 0, 60, 40, 1),
                                                          (0, 1.5, 2.25, 3, 4)])},
             [(A, 5, 10, 25, 25), (A, 1.5, 2.25, 4.5, 6.25), (C, 0, 0, 60, 40)], []),
    "coco: paths": ("coco", {"a.json": coco(["test/cat/a.jpg", "images/dog\\c.jpg"],
                                            [(0, 5, 10, 20, 15), (1, 1, 1, 2, 2, 1)])},
                    [(A, 5, 10, 25, 25), (C, 1, 1, 3, 3)], []),
    "coco: without sizes": ("coco", {"a.json": coco([("a.jpg", None, None)], [(0, 5, 10, 20, 15)])},
                            [(A, 5, 10, 25, 25)], ["1 annotations state no size"]),
    "coco: a size of text": ("coco", {"a.json": coco([("a.jpg", "wide", 4)], [(0, 5, 10, 20, 15)])},
                             [(A, 5, 10, 25, 25)], ["1 annotations state no size"]),
    "coco: of larger pictures": ("coco", {"a.json": coco([("a.jpg", 600, 400)],
                                                         [(0, 50, 100, 200, 150)])},
                                 [(A, 5, 10, 25, 25)], ["1 images have another size"]),
    "coco: crowds": ("coco", {"a.json": coco(["a.jpg", "b.png"], [(0, 5, 10, 20, 15)]).replace(
        '"category_id": 0}', '"category_id": 0}, {"id": 9, "image_id": 101, "iscrowd": 1, '
        '"bbox": [0, 0, 9, 9]}')}, [(A, 5, 10, 25, 25)], ["1 boxes have no area", "iscrowd"]),
    "coco: no area": ("coco", {"a.json": coco(["a.jpg"], [(0, 5, 10, 0, 15), (0, 1, 1, 2, 2)])},
                      [(A, 1, 1, 3, 3)], ["1 boxes have no area"]),
    "coco: no categories": ("coco", {"a.json": coco(["a.jpg"], [(0, 1, 1, 2, 2)], ())},
                            [(A, 1, 1, 3, 3)], []),
    "coco: another class's box": ("coco", {"a.json": coco(["a.jpg"], [(0, 1, 1, 2, 2, 0),
                                                                      (0, 9, 9, 2, 2, 1)])},
                                  [(A, 1, 1, 3, 3)], ["1 boxes are of another class"]),
    "coco: several other classes": (
        "coco", {"a.json": coco(["a.jpg"], [(0, 1, 1, 2, 2, 0), (0, 9, 9, 2, 2, 1)],
                                ("head", "tail"))},
        [(A, 1, 1, 3, 3), (A, 9, 9, 11, 11)], ["1 images have boxes of several classes"]),
    "coco: class names in other spellings": (
        "coco", {"a.json": coco(["a.jpg"], [(0, 1, 1, 2, 2, 0)], ("CAT", "dog"))},
        [(A, 1, 1, 3, 3)], []),
    "coco: pictures elsewhere": ("coco", {"a.json": coco(
        ["a.jpg", "x.jpg", "y.jpg"], [(0, 1, 1, 2, 2), (1, 1, 1, 2, 2), (2, 1, 1, 2, 2)])},
        [(A, 1, 1, 3, 3)], ["2 annotations have no image", "'x.jpg'"]),
    "coco: pictures of another folder": ("coco", {"a.json": coco(
        ["zoo/a.jpg", "cat/a.jpg"], [(0, 1, 1, 2, 2), (1, 5, 5, 2, 2)])},
        [(A, 5, 5, 7, 7)], ["1 annotations have no image", "'zoo/a.jpg'"]),
    "coco: pictures of another folder, later": ("coco", {"a.json": coco(
        ["cat/a.jpg", "zoo/a.jpg"], [(0, 5, 5, 2, 2), (1, 1, 1, 2, 2)])},
        [(A, 5, 5, 7, 7)], ["1 annotations have no image", "'zoo/a.jpg'"]),
    "coco: ids of text": ("coco", {"a.json": coco(["a.jpg"], [(0, 1, 1, 2, 2)]).replace(
        "100", '"one"')}, [(A, 1, 1, 3, 3)], []),

    "voc": ("voc", {"a.xml": voc(("cat", 6, 11, 25, 25)), "c.xml": voc(
        ("dog", 1, 1, 60, 40), ("dog", 2, 2, 2, 2), name="c.jpg")},
        [(A, 5, 10, 25, 25), (C, 0, 0, 60, 40), (C, 1, 1, 2, 2)], []),
    "voc: in folders": ("voc", {"cat/a.xml": voc(("cat", 6, 11, 25, 25)),
                                "dog/c.xml": voc(("dog", 1, 1, 60, 40))},
                        [(A, 5, 10, 25, 25), (C, 0, 0, 60, 40)], []),
    "voc: by <filename>": ("voc", {"0001.xml": voc(("cat", 6, 11, 25, 25))},
                           [(A, 5, 10, 25, 25)], []),
    "voc: <filename> without ending": ("voc", {"0001.xml": voc(("cat", 6, 11, 25, 25), name="a")},
                                       [(A, 5, 10, 25, 25)], []),
    "voc: a <filename> of old": ("voc", {"b.xml": voc(("cat", 6, 11, 25, 25), name="a.jpg")},
                                 [(B, 5, 10, 25, 25)], []),
    "voc: fractions": ("voc", {"a.xml": voc(("cat", 6.5, 11, 25.25, 25))},
                       [(A, 5.5, 10, 25.25, 25)], []),
    "voc: no <size>": ("voc", {"a.xml": voc(("cat", 6, 11, 25, 25), size="")},
                       [(A, 5, 10, 25, 25)], ["1 annotations state no size"]),
    "voc: another class's box": ("voc", {"a.xml": voc(("person", 1, 1, 9, 9), ("cat", 6, 11, 25, 25)
                                                      )},
                                 [(A, 5, 10, 25, 25)], ["1 boxes are of another class"]),
    "voc: nothing on it": ("voc", {"a.xml": voc(("cat", 6, 11, 25, 25)), "b.xml": voc()},
                           [(A, 5, 10, 25, 25)], []),

    "yolo": ("yolo", {"a.txt": "0 0.25 0.5 0.5 0.25\n",
                      "c.txt": "1 0.5 0.5 1 1\n\n1 0.1 0.1 0.2 0.1"},
             [(A, 0, 15, 30, 25), (C, 0, 0, 60, 40), (C, 0, 2, 12, 6)], []),
    "yolo: in folders": ("yolo", {"train/d.txt": "0 0.25 0.5 0.5 0.25", "val/a.txt": "0 .5 .5 1 1"},
                         [(A, 0, 0, 60, 40), ("train/cat/d.jpg", 0, 15, 30, 25)], []),
    "yolo: classes.txt": ("yolo", {"a.txt": "0 .25 .5 .5 .25\n2 .5 .5 1 1", "classes.txt":
                                   "cat\ndog\nperson\n"},
                          [(A, 0, 15, 30, 25)], ["1 boxes are of another class"]),
    "yolo: several without classes.txt": (
        "yolo", {"a.txt": "0 .25 .5 .5 .25\n2 .5 .5 1 1"},
        [(A, 0, 15, 30, 25), (A, 0, 0, 60, 40)], ["1 images have boxes of several classes"]),
    "yolo: beyond the edge": ("yolo", {"a.txt": "0 0.25 0.5 0.5000004 1\n0 0.9 0.5 0.4 0.5"},
                              [(A, 0, 0, 30.000012, 40), (A, 42, 10, 60, 30)],
                              ["1 boxes reach beyond their images"]),
    "yolo: nothing on it": ("yolo", {"a.txt": "0 .5 .5 1 1", "b.txt": ""},
                            [(A, 0, 0, 60, 40)], []),
    "yolo: blank lines alone": ("yolo", {"a.txt": "0 .5 .5 1 1", "b.txt": "\n \n"},
                                [(A, 0, 0, 60, 40)], []),
    "yolo: other text": ("yolo", {"a.txt": "0 .5 .5 1 1", "readme.txt": "about these labels"},
                         [(A, 0, 0, 60, 40)], ["1 boxes have no area", "readme.txt:1"]),
    "yolo: quotes, a comma and other alphabets in a name": (
        "yolo", {os.path.basename(ODD).replace(".jpg", ".txt"): "0 .5 .5 1 1"},
        [(ODD, 0, 0, 60, 40)], []),
    "yolo: with the picture's ending": ("yolo", {"a.jpg.txt": "0 .5 .5 1 1"},
                                        [(A, 0, 0, 60, 40)], []),

    # names of classes: the box of another class is not taken for the picture
    "yolo: the end of classes.txt is no class, even of a picture in no folder": (
        "yolo", {"root.txt": CAT_AND_DOG, "classes.txt": "cat\ndog\n"},
        [("root.jpg", 15, 10, 45, 30), ("root.jpg", 3, 2, 9, 6)],
        ["1 images have boxes of several classes"]),
    "yolo: classes.txt ends in blank lines": (
        "yolo", {"a.txt": CAT_AND_DOG, "classes.txt": "cat\r\ndog\r\n\r\n"}, [(A, 15, 10, 45, 30)],
        ["1 boxes are of another class"]),
    **{f"yolo: {name!r}": ("yolo", {"train/a.txt": CAT_AND_DOG, file: text}, [(A, 15, 10, 45, 30)],
                           ["1 boxes are of another class"])
       for file, text in [
           ("data.yaml", "names: [cat, dog]"), ("data.yaml", "names: ['cat', 'dog']\nnc: 2"),
           ("data.yaml", "nc: 2\nnames:\n- cat\n- 'dog'\nval: images"),
           ("data.yaml", "names:\n  0: cat # a cat\n\n  1: \"dog\"\nroboflow:\n  0: x"),
           ("data.yaml", "names: {0: cat, 1: dog}"), ("data.yaml", "names:\n  1: dog\n  0: cat"),
           ("pets.yml", "names:\n  [\n    'cat',\n    'dog'\n  ]\n"),
           ("../data.yaml", "names: [cat, dog]"), ("../classes.txt", "cat\ndog"),
           ("train/classes.txt", "cat\ndog\n")]
       for name in [f"{file} {text}"]},
    "coco: a picture and its category in another form of Unicode": (
        "coco", {"a.json": coco(
            ["e\u0301.jpg"], [(0, 1, 1, 2, 2, 0), (0, 9, 9, 2, 2, 1)],
            ("e\u0301te\u0301", "dog"))}, [(E, 1, 1, 3, 3)],
        ["1 boxes are of another class"]),
    "voc: a picture and its class in another form of Unicode": (
        "voc", {"e\u0301.xml": voc(("dog", 1, 1, 9, 9), ("e\u0301te\u0301", 6, 11, 25, 25))},
        [(E, 5, 10, 25, 25)], ["1 boxes are of another class"]),
    "yolo: a picture and its class in another form of Unicode": (
        "yolo", {"e\u0301.txt": CAT_AND_DOG, "classes.txt": "e\u0301te\u0301\ndog"},
        [(E, 15, 10, 45, 30)], ["1 boxes are of another class"]),

    # one line does not refuse a whole conversion
    "yolo: rounded beyond the edge": ("yolo", {"a.txt": "0 .5 .5 1.0004 1"}, [(A, 0, 0, 60, 40)],
                                      []),
    "yolo: a confidence": ("yolo", {"a.txt": "0 .5 .5 .5 .5 .93"}, [(A, 15, 10, 45, 30)], []),
    "yolo: polygons": ("yolo", {"a.txt": "0 .1 .1 .5 .1 .3 .6\n1 .5 .5 .6 .5 .6 .7 .5 .7"},
                       [(A, 6, 4, 30, 24), (A, 30, 20, 36, 28)],
                       ["1 images have boxes of several classes"]),
    "yolo: a class as a fraction": ("yolo", {"a.txt": "0.0 .5 .5 .5 .5"}, [(A, 15, 10, 45, 30)],
                                    []),
    **{f"yolo: one line is {line!r}": ("yolo", {"a.txt": f"0 .5 .5 1 1\n{line}"},
                                       [(A, 0, 0, 60, 40)], ["1 boxes have no area", "a.txt:2"])
       for line in ["0 .5 .5 0 1", "0 .5 .5 1 -1", "0 .5 .5 1", "cat .5 .5 1 1", "0 nan .5 .1 1",
                    "-1 .5 .5 1 1", "0.5 .5 .5 1 1", "0 30 20 10 10", "0,.5,.5,1,1", "0 .1 .2 .3",
                    "0", "inf .5 .5 1 1", "0 .5 .5 1 1 " + ".5 .5 2 " * 17]},
    "yolo: a class that classes.txt lacks": (
        "yolo", {"a.txt": "0 .5 .5 1 1\n1 .5 .5 1 1", "classes.txt": "cat"}, [(A, 0, 0, 60, 40)],
        ["1 boxes have no area"]),
    "yolo: a file that is no text": ("yolo", {"a.txt": "0 .5 .5 1 1", "b.txt": b"\xff\xff"},
                                     [(A, 0, 0, 60, 40)], ["1 files or images", "b.txt"]),
    "coco: polygons without a bbox": (
        "coco", {"a.json": coco(["a.jpg"], [(0, 1, 1, 2, 2)]).replace(
            '"bbox": [1, 1, 2, 2]', '"segmentation": [[9, 8, 20, 5, 30, 30], [40, 1, 50, 2, 45, 7]]'
        )}, [(A, 9, 1, 50, 30)], []),
    **{f"coco: one bbox is {bbox}": ("coco", {"a.json": coco(
        ["a.jpg"], [(0, 1, 1, 2, 2), (0, 5, 5, 5, 5)]).replace("[5, 5, 5, 5]", bbox)},
        [(A, 1, 1, 3, 3)], ["1 boxes have no area", "annotations[1]"])
       for bbox in ["[1, 1, -2, 2]", "[1, 1, 0, 2]", '["a", "1", "2", "2"]', "[1, 1, 2]", "null",
                    "[]", "3", "[1, NaN, 2, 2]", "[[1, 1, 2, 2]]", f"[1, 1, 1{'0' * 400}, 2]"]},
    "coco: an image in no list": ("coco", {"a.json": coco(["a.jpg"], [(0, 1, 1, 2, 2),
                                                                     (7, 1, 1, 2, 2)])},
                                  [(A, 1, 1, 3, 3)], ["1 boxes have no area", "[1]", "107"]),
    "coco: an image without a name": ("coco", {"a.json": coco(
        ["a.jpg", "c.jpg"], [(0, 1, 1, 2, 2)]).replace('"file_name": "c.jpg"', '"url": "c.jpg"')},
        [(A, 1, 1, 3, 3)], ["1 files or images", "images[1] needs an id and a file_name"]),
    "coco: one picture has another size": ("coco", {"a.json": coco(
        ["a.jpg", ("c.jpg", 50, 50)], [(0, 1, 1, 2, 2), (1, 1, 1, 2, 2)])},
        [(A, 1, 1, 3, 3)], ["1 files or images cannot be used", "50 x 50"]),
    "voc: one object has no box": ("voc", {"a.xml": voc(("cat", 6, 11, 25, 25),
                                                        ("cat", 9, 9, 5, 5))},
                                   [(A, 5, 10, 25, 25)], ["1 boxes have no area", "object 2"]),
    "voc: one file is broken": ("voc", {"a.xml": voc(("cat", 6, 11, 25, 25)), "b.xml": "<a"},
                                [(A, 5, 10, 25, 25)], ["1 files or images", "b.xml:1"]),

    # boxes beyond their picture
    "coco: a box beyond its picture": ("coco", {"a.json": coco(
        ["a.jpg"], [(0, 1, 1, 2, 2), (0, 50, 30, 20, 20), (0, 0, 0, 60.6, 40), (0, 3, 3, 3, 3)])},
        [(A, 1, 1, 3, 3), (A, 50, 30, 60, 40), (A, 0, 0, 60, 40), (A, 3, 3, 6, 6)],
        ["1 boxes reach beyond"]),
    "coco: a box outside its picture": ("coco", {"a.json": coco(
        ["a.jpg"], [(0, 1, 1, 2, 2), (0, 70, 1, 2, 2)])}, [(A, 1, 1, 3, 3)],
        ["1 boxes lie outside"]),
    "voc: a box beyond its picture": ("voc", {"a.xml": voc(("cat", 6, 11, 70, 25),
                                                           ("cat", 1, 1, 60, 40))},
                                      [(A, 5, 10, 60, 25), (A, 0, 0, 60, 40)],
                                      ["1 boxes reach beyond"]),
}


@pytest.mark.parametrize("case", CASES)
def test_annotations_of_other_tools_become_rows_of_boxes_csv(capsys, pets, case):
    form, files, right, words = CASES[case]
    status, out, err = run(capsys, pets, form, files)
    assert (status, err) == (0, "")
    rows = rows_of(pets)
    assert [row[0] for row in rows] == [row[0] for row in right]
    for row, expected in zip(rows, right):
        assert row[1:] == pytest.approx(expected[1:], abs=1e-4)
    assert f"{len(right)} boxes of {len({row[0] for row in right})} images" in out
    assert all(word in out for word in words)
    assert len(out.splitlines()) == 2 + bool(words)  # one note, the count, where it belongs
    os.replace(pets.parent / "boxes.csv", pets / "boxes.csv")
    dataset = data.load_dataset("folder", pets, "test", 16)  # what it was made for
    read = [box for sample in dataset for box in sample["boxes"].tolist()]
    assert read == [pytest.approx(box, abs=1e-4) for path, *box in right if path.startswith("test")]


@pytest.mark.parametrize("form, files, right", [
    ("coco", {"a.json": coco(["a.jpg"], [(0, 5, 10, 20, 25)])}, (5, 5, 30, 25)),
    ("coco", {"a.json": coco([("a.jpg", 40, 60)], [(0, 5, 10, 20, 25)])}, (5, 10, 25, 35)),
    ("coco", {"a.json": coco([("a.jpg", 120, 80)], [(0, 10, 20, 40, 50)])}, (5, 5, 30, 25)),
    ("voc", {"a.xml": voc(("cat", 6, 11, 25, 35))}, (5, 5, 30, 25)),
    ("yolo", {"a.txt": "0 .5 .25 .5 .5"}, (10, 0, 30, 30)),  # of the upright picture, always
])
def test_boxes_of_a_picture_that_exif_turns(capsys, pets, form, files, right):
    picture(pets / A, (60, 40), exif=exif(6))  # 40 x 60 upright
    assert run(capsys, pets, form, files)[0] == 0
    assert rows_of(pets) == [(A, *right)]


FAULTS = {  # form, files, words of the error: no box is left, or no rule says which is meant
    "coco: no file": ("coco", {}, ["a.json: no such file"]),
    "coco: no JSON": ("coco", {"a.json": "{"}, ["a.json: needs JSON"]),
    "coco: empty": ("coco", {"a.json": ""}, ["a.json: needs JSON"]),
    "coco: nested without end": ("coco", {"a.json": "[" * 100_000}, ["a.json"]),
    "coco: results": ("coco", {"a.json": "[]"}, ["lists of images"]),
    "coco: no annotations": ("coco", {"a.json": '{"images": []}'}, ["'annotations'"]),
    "coco: no file_name": ("coco", {"a.json": '{"images": [{"id": 1}], "annotations": []}'},
                           ["images[0] needs an id and a file_name"]),
    "coco: no bbox": ("coco", {"a.json": coco(["a.jpg"], [(0, 1, 1, 2, 2)]).replace(
        "bbox", "area")}, ["annotations[0]: ", "'area': [1, 1, 2, 2]"]),
    "coco: one id twice": ("coco", {"a.json": coco(["a.jpg", "c.jpg"], [(0, 1, 1, 2, 2)]).replace(
        "101", "100")}, ["images[1]", "100"]),
    "coco: one picture twice": ("coco", {"a.json": coco(["a.jpg", "a.jpg"], [(0, 1, 1, 2, 2),
                                                                             (1, 1, 1, 2, 2)])},
                                ["2 annotations have no image", "images[0] 'a.jpg'"]),
    "coco: negative": ("coco", {"a.json": coco(["a.jpg"], [(0, 1, 1, -2, 2)])},
                       ["annotations[0]", "[1, 1, -2, 2]"]),
    "coco: another picture's size": ("coco", {"a.json": coco([("a.jpg", 50, 50)],
                                                             [(0, 1, 1, 2, 2)])},
                                     ["images[0]", "50 x 50", "60 x 40"]),
    "coco: of no picture": ("coco", {"a.json": coco(["x.jpg"], [(0, 1, 1, 2, 2)])},
                            ["no box is of an image", "'x.jpg'"]),
    "coco: normalised": ("coco", {"a.json": coco(["a.jpg"], [(0, 0.1, 0.1, 0.5, 0.5)])},
                         ["a.json: all boxes lie within 0 and 1"]),
    "coco: another unit": ("coco", {"a.json": coco(["a.jpg"], [(0, 600, 400, 90, 90)])},
                           ["1 boxes lie outside", "another unit"]),
    "voc: no folder": ("voc", {}, ["labels: no .xml files"]),
    "voc: no box": ("voc", {"a.xml": "<annotation><object><name>cat</name></object></annotation>"},
                    ["a.xml: object 1"]),
    "voc: another picture's size": ("voc", {"a.xml": voc(("cat", 1, 1, 5, 5), size=SIZE.replace(
        "60", "70"))}, ["a.xml", "70 x 40", "60 x 40"]),
    "yolo: no files": ("yolo", {"a.xml": ""}, ["labels: no .txt files"]),
    "yolo: pixels": ("yolo", {"a.txt": "0 30 20 10 10"}, ["a.txt:1", "0 30 20 10 10"]),
}


@pytest.mark.parametrize("case", FAULTS)
def test_annotations_without_a_usable_box_are_an_error(capsys, pets, case):
    form, files, words = FAULTS[case]
    line = script_error(run(capsys, pets, form, files), data)
    assert all(word in line for word in words), line
    assert not (pets.parent / "boxes.csv").exists()


@settings(max_examples=100, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(form=st.sampled_from(["coco", "voc", "yolo"]), at=st.floats(0, 1), cut=st.integers(0, 12),
       put=st.binary(max_size=4) | st.sampled_from(
           [b'"', b"null", b"[", b"{}", b"nan", b"-", b"1e999", b"9" * 400, b"<", b"\\ud800"]))
def test_damaged_annotations_convert_or_say_so(pets, form, at, cut, put):
    name, text = {"coco": ("a.json", coco(["a.jpg", "c.jpg"], [(0, 5, 10, 20, 15)])),
                  "voc": ("a.xml", voc(("cat", 6, 11, 25, 25), ("cat", 1, 1, 60, 40))),
                  "yolo": ("a.txt", "0 0.25 0.5 0.5 0.25\n0 0.5 0.5 1 1\n")}[form]
    place, content = pets.parent / form, text.encode()
    place.mkdir(exist_ok=True)
    at = int(at * len(content))
    (place / name).write_bytes(content[:at] + put + content[at + cut:])
    try:
        convert(form, place / name if form == "coco" else place, pets)[0].encode()
    except data.DataError as error:
        assert str(place) in str(error) and "\n" not in str(error)


def test_names_that_do_not_tell_pictures_apart_are_left_out(capsys, pets):
    picture(pets / "test/dog/a.jpg", (60, 40))
    files = {"a.txt": "0 .5 .5 1 1", "dog/a.txt": "0 .5 .5 1 1", "cat/a.txt": "0 .25 .25 .5 .5"}
    status, out, _ = run(capsys, pets, "yolo", files)
    assert status == 0 and "1 annotations have no image" in out and "labels/a.txt" in out
    assert rows_of(pets) == [(A, 0, 0, 30, 20), ("test/dog/a.jpg", 0, 0, 60, 40)]


def test_corners_taken_for_widths_and_heights_are_noted(capsys, pets):
    """As are boxes in another unit: most of them do not lie within their pictures."""
    boxes = [(0, 10, 10, 55, 35), (0, 30, 20, 50, 30), (0, 1, 1, 8, 9), (0, 2, 2, 9, 9)]
    for given, beyond, wrong in ((boxes[:3], 2, True), (boxes, 2, False)):
        _, out, _ = run(capsys, pets, "coco", {"a.json": coco(["a.jpg"], given)})
        assert f"{beyond} boxes reach beyond their images" in out
        assert ("or corners where widths and heights are needed" in out) == wrong
        (pets.parent / "boxes.csv").unlink()


def test_a_picture_whose_name_is_no_utf8_is_named(capsys, pets):
    (pets / A).rename(os.fsdecode(os.fsencode(pets / "test/cat") + b"/\xff.jpg"))
    files = {os.fsdecode(b"\xff.txt"): "0 .5 .5 1 1"}
    assert "needs a name in UTF-8" in script_error(run(capsys, pets, "yolo", files), data)


@pytest.mark.parametrize("flags, words", [
    (["--convert", "pascal", "x", "--root", "{root}", "--out", "{new}"], ["--convert", "pascal"]),
    (["--convert", "voc", "--root", "{root}", "--out", "{new}"], ["--convert"]),
    (["--convert", "voc", "x", "--out", "{new}"], ["--root"]),
    (["--convert", "voc", "x", "--root", "{new}", "--out", "{new}"], ["--root"]),
    (["--convert", "voc", "x", "--root", "{root}"], ["--out"]),
    (["--convert", "voc", "x", "--root", "{root}", "--out", "{there}"], ["--out", "exists"]),
    (["--convert", "voc", "x", "--root", "{root}", "--out", "{root}"], ["--out", "exists"]),
    (["--convert", "voc", "x", "--root", "{root}", "--out", "{new}", "--data", "cub"],
     ["--convert"]),
    (["--convert", "voc", "x", "--root", "{root}", "--out", "{new}/a.csv"], ["--out", "new"]),
    (["--data", "folder", "--root", "{root}", "--out", "{there}"], ["--out", "exists"]),
    (["--data", "folder", "--root", "{new}", "--out", "{new}"], ["--root"]),
    (["--data", "folder", "--out", "{new}"], ["--root"]),
])
def test_wrong_flags_are_one_line_and_replace_nothing(capsys, pets, flags, words):
    (pets.parent / "there.csv").write_text("mine")
    places = {"root": pets, "new": pets.parent / "new", "there": pets.parent / "there.csv"}
    line = script_error(call(capsys, data, *(flag.format(**places) for flag in flags)), data, 2)
    assert all(word in line for word in words)
    assert (pets.parent / "there.csv").read_text() == "mine"
    assert not (pets.parent / "new").exists()
