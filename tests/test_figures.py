"""Pictures: what can be computed of them. Each was looked at besides."""

import numpy as np
import pytest
from PIL import Image

from support.report import figures


def luminance(colour):
    """Relative luminance of an sRGB colour."""
    c = np.asarray(colour) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


def test_the_two_boxes_differ_in_lightness():
    """Which every reader sees, colour-blind or not; for the red-blind the red is darker still."""
    assert (luminance(figures.CYAN) + 0.05) / (luminance(figures.RED) + 0.05) > 2.5


def test_heat_colours_grow_lighter():
    values = figures.heat_colours(np.linspace(0, 1, 50)).astype(float)
    assert (np.diff(values @ (0.299, 0.587, 0.114)) > 0).all()


def test_a_picture_written_here_is_known_again(tmp_path):
    picture = Image.new("RGB", (9, 9))
    figures.write_png(tmp_path / "ours.png", picture)
    picture.save(tmp_path / "theirs.png")
    (tmp_path / "text.png").write_text("no picture")
    found = [figures.is_ours(tmp_path / f"{name}.png") for name in ("ours", "theirs", "text", "no")]
    assert found == [True, False, False, False]


@pytest.mark.parametrize("name, written", [
    ("red finch", "red finch"), ("001.Black_footed_Albatross", "001.Black_footed_Albatross"),
    ("caf\u00e9", "cafe"), ("cafe\u0301", "cafe"),  # Pillow's font has ASCII alone
    ("two\nlines\tof  text", "two lines of text"),
    ("猫", "class 17"), ("Щегол", "class 17"), ("猫 cat", "class 17"), ("", "class 17"),
    ("\U000f0000", "class 17"), ("\udcff.jpg", "class 17"), ("\x07bell", "class 17"),
])
def test_a_class_is_written_in_ascii_or_by_its_number(name, written):
    assert figures.class_name({17: name}, 17) == written


def test_other_text_is_escaped_and_shortened():
    assert figures.fit_text("r\u00e9sum\u00e9: 猫", 13, 300) == "resume: \\u732b"
    assert figures.fit_text("x" * 99, 13, 60).endswith("x...")


STEPS = [{"phase": "main", "step": s, "loss": 2 / s} for s in range(1, 40)]
EPOCHS = [{"phase": "main", "step": s, "mean_loss": 3 / s} for s in (10, 20, 30)]


@pytest.mark.parametrize("rows", [
    [], STEPS[:1], EPOCHS, [row | {"phase": "pretrain"} for row in STEPS] + STEPS + EPOCHS,
    [{"phase": "main", "step": 1, "loss": float("nan")}],
    [{"phase": "main", "step": 1, "loss": 0.0}, {"phase": "main", "step": 2, "loss": 1e9}],
])
def test_any_loss_is_drawn(rows):
    assert figures.draw_loss(rows).size == (860, 520)


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3), (4000, 3000), (60, 40), (1600, 200)])
def test_overlays_of_any_size_fit_their_sheet(size):
    picture = Image.new("RGB", size, (90, 120, 60))
    heat = np.linspace(0, 1, 64).reshape(8, 8)
    sheet = figures.draw_own(picture, (0, 0, *size), [("LCTR", "M^r")] * 2, np.stack([heat] * 2),
                             [(0, 0, size[0], size[1] / 2)] * 2, "finch 90 %", "threshold 0.2")
    assert max(sheet.size) < 1800


@pytest.mark.parametrize("high, expected", [
    (10, [0, 2, 4, 6, 8, 10]), (2.3, [0, 0.5, 1, 1.5, 2]), (0.1, [0, 0.02, 0.04, 0.06, 0.08, 0.1]),
    (12345, [0, 5000, 10000]),
])
def test_ticks_are_round(high, expected):
    assert figures.ticks(high) == pytest.approx(expected)


def test_pictures_with_class_names_of_several_scripts():
    """What no font has beside the other name becomes its number; nothing fails."""
    classes = ["été", "猫", "Щегол", "عربى", "two\nlines", "x" * 99, "", "\udcff"]
    n = len(classes)
    examples = figures.Examples(
        np.zeros((n, 16, 16, 3), np.uint8), [(0, 0, 30, 20)] * n, list(range(n)),
        [*range(1, n), 0], [np.array([[1, 1, 9, 9]])] * n, np.zeros((n, 1, 16, 16)),
        np.array([[[0, 0, 4, 4]]] * n), np.zeros((n, 1)))
    titles = [[("LCTR", "ReLU(class map) * M^r")]]
    gallery = figures.draw_gallery([examples], titles, classes, "note " * 60)
    assert gallery.width < 700 and gallery.height > n * figures.CELL * 20 / 30
    groups = [("wrong class " * 20, examples)]
    assert figures.draw_failures(groups, classes, "note").width > n * figures.CELL
    assert figures.draw_failures([], classes, "note").height < 150  # empty kinds are left out
