"""Files of pictures: decoded to the right pixels, upright, or one line; which files are taken."""

import os
import random
import struct
import subprocess
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

import data
from helpers import block_picture, error_of, exif, noise, picture, where_white
from support.pictures import folders
from support.pictures.decode import TURNS, decode
from support.pictures.views import check_images
from support.report.figures import write_png

# pytest undoes the filter of support/pictures/decode.py
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


# ---------------------------------------------------------------- pixels


def as_palette(image):
    return image.convert("P", palette=Image.Palette.ADAPTIVE)


@pytest.mark.parametrize("make, suffix, expected", [
    (lambda: Image.new("L", (4, 4), 77), "png", (77, 77, 77)),
    (lambda: Image.new("1", (4, 4), 1), "png", (255, 255, 255)),
    (lambda: Image.new("LA", (4, 4), (0, 51)), "png", (204, 204, 204)),  # on white
    (lambda: Image.new("RGBA", (4, 4), (10, 20, 30, 255)), "png", (10, 20, 30)),
    (lambda: Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "png", (255, 255, 255)),
    (lambda: as_palette(Image.new("RGB", (4, 4), (200, 100, 50))), "png", (200, 100, 50)),
    (lambda: as_palette(Image.new("RGB", (4, 4), (200, 100, 50))), "gif", (200, 100, 50)),
    (lambda: Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "jpg", (254, 0, 0)),
    (lambda: Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "tiff", (255, 0, 0)),
    (lambda: Image.fromarray(np.full((4, 4), 32896, np.uint16)), "png", (128, 128, 128)),
    # 16 bits, however dark
    (lambda: Image.fromarray(np.full((4, 4), 300, np.uint16)), "tiff", (1, 1, 1)),
    (lambda: Image.fromarray(np.full((4, 4), 32896, np.int32)), "tiff", (128, 128, 128)),
    (lambda: Image.fromarray(np.full((4, 4), 200, np.int32)), "tiff", (200, 200, 200)),
    (lambda: Image.fromarray(np.full((4, 4), 0.5, np.float32)), "tiff", (128, 128, 128)),
    (lambda: Image.fromarray(np.full((4, 4), 200, np.float32)), "tiff", (200, 200, 200)),
    (lambda: Image.fromarray(np.full((4, 4), np.nan, np.float32)), "tiff", (0, 0, 0)),
    (lambda: Image.new("YCbCr", (16, 16), (128, 128, 128)), "jpg", (128, 128, 128)),
    (lambda: Image.new("RGB", (1, 1), (9, 8, 7)), "png", (9, 8, 7)),
    (lambda: Image.new("RGB", (1, 9000), (9, 8, 7)), "png", (9, 8, 7)),
])
def test_any_mode_becomes_rgb(tmp_path, make, suffix, expected):
    image = make()
    image.save(tmp_path / f"a.{suffix}")
    read = data.open_image(tmp_path / f"a.{suffix}")
    assert read.mode == "RGB" and read.size == image.size
    assert np.abs(np.asarray(read, int) - expected).max() <= 3 * (suffix == "jpg")
    assert data.load_image(tmp_path / f"a.{suffix}", 16)[0].shape == (3, 16, 16)


def test_sixteen_bits_are_scaled_in_either_byte_order(tmp_path):
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "little.tiff")
    (tmp_path / "big.pgm").write_bytes(b"P5 8 8 65535\n" + ramp.astype(">u2").tobytes())
    for name in ("little.tiff", "big.pgm"):
        grey = np.asarray(data.open_image(tmp_path / name))[..., 0]
        assert np.abs(grey - ramp / 257).max() <= 0.5 + 1e-6


def png(width, height, bits, rows):
    """A PNG in RGB; Pillow writes none of 16 bits."""
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks)


@pytest.mark.parametrize("bits, dark", [(8, True), (10, True), (12, True), (14, False),
                                        (16, False)])
def test_few_bits_in_a_file_of_sixteen_are_noted_as_nearly_black(tmp_path, bits, dark):
    grey, colour = tmp_path / "grey.png", tmp_path / "colour.png"
    Image.fromarray(np.full((4, 6), 2**bits - 1, np.uint16)).save(grey)
    colour.write_bytes(png(6, 4, 16, (b"\0" + struct.pack(">H", 2**bits - 1) * 18) * 4))
    assert [decoded.dark for decoded in check_images([grey, colour], 16)] == [dark, dark]


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for name in ("a.gif", "a.png", "a.webp", "a.tiff"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert np.abs(np.asarray(data.open_image(tmp_path / name), int) - (255, 0, 0)).max() < 8


# ---------------------------------------------------------------- EXIF's orientation

INVERSE = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Transposes


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
def test_exif_orientation_is_undone(tmp_path, orientation, suffix):
    """A JPEG is decoded at reduced scale, whose sides must not be mixed up."""
    upright, path = block_picture((400, 240), (40, 24, 160, 96)), tmp_path / f"a.{suffix}"
    stored = upright.transpose(INVERSE[orientation]) if orientation > 1 else upright
    stored.save(path, exif=exif(orientation))
    read = data.open_image(path)
    assert read.size == (400, 240)
    assert np.abs(np.asarray(read, int) - np.asarray(upright)).mean() < 2
    image, view, size = data.load_image(path, (24, 40))
    assert size == (400, 240) and view == (0, 0, 400, 240)
    assert np.abs(where_white(image) - (4, 2.4, 16, 9.6)).max() < 1
    assert suffix != "jpg" or decode(path, (100, 30)).picture.size == (100, 60)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_grey_tiffs_are_turned(tmp_path, orientation, dtype, compression):
    """Of those without compression Pillow maps some into memory, at the wrong width."""
    stored = np.zeros((24, 40), dtype)
    stored[2:10, 4:16] = 65535 if dtype == np.uint16 else 255
    Image.fromarray(stored).save(tmp_path / "a.tif", exif=exif(orientation),
                                 compression=compression)
    turned = Image.fromarray((stored > 0).astype(np.uint8) * 255)
    turned = turned.transpose(TURNS[orientation]) if orientation > 1 else turned
    decoded = decode(tmp_path / "a.tif")
    assert np.array_equal(np.asarray(decoded.picture)[..., 0], np.asarray(turned))
    assert decoded[1:4] == (turned.size, (40, 24), orientation)


def exif_bytes(orientation, tag, kind, value, orientation_kind=3):
    """EXIF of an orientation and one other tag, byte by byte, so that it can be wrong."""
    orientation = struct.pack("<HHI", 0x0112, orientation_kind, 1) + struct.pack("<I", orientation)
    other = struct.pack("<HHII", tag, kind, 1, 38)
    rows = b"".join(sorted((orientation, other), key=lambda row: struct.unpack("<H", row[:2])))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + rows + bytes(4) + value + bytes(32)


ODD_EXIF = {  # EXIF, and whether its orientation 6 counts
    "-1/0": (exif_bytes(6, 0x011A, 10, struct.pack("<ii", -1, 0)), True),
    "0/0": (exif_bytes(6, 0x011A, 5, bytes(8)), True),
    "a resolution that is NaN": (exif_bytes(6, 0x011A, 12, b"\xff" * 8), True),
    "an exposure of -1/0": (exif_bytes(6, 0x829A, 10, struct.pack("<ii", -1, 0)), True),
    "a GPS block that lies nowhere": (exif_bytes(6, 0x8825, 4, bytes(8)), True),
    "a tag of an unknown type": (exif_bytes(6, 0x9999, 77, bytes(8)), True),
    "an orientation of four bytes": (exif_bytes(6, 0x011A, 5, bytes(8), 4), True),
    "orientation 0": (exif_bytes(0, 0x011A, 5, bytes(8)), False),
    "orientation 9": (exif_bytes(9, 0x011A, 5, bytes(8)), False),
    "an orientation of letters": (exif_bytes(6, 0x011A, 5, bytes(8), 2), False),
    "cut": (exif_bytes(6, 0x011A, 10, struct.pack("<ii", -1, 0))[:20], False),
    "no EXIF inside": (b"Exif\0\0" + b"x" * 40, False),
    "nothing inside": (b"Exif\0\0", False),
}


@pytest.mark.parametrize("case", ODD_EXIF)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_picture_is_turned_by_its_orientation_however_odd_its_exif(tmp_path, case, suffix):
    exif, counts = ODD_EXIF[case]
    stored = block_picture((400, 240), (40, 24, 160, 96))
    stored.save(tmp_path / f"a.{suffix}", exif=exif)
    expected = stored.transpose(Image.Transpose.ROTATE_270) if counts else stored
    read = data.open_image(tmp_path / f"a.{suffix}")
    assert read.size == expected.size
    assert np.abs(np.asarray(read, int) - np.asarray(expected)).mean() < 2


# ---------------------------------------------------------------- files large, broken or none


def test_jpegs_are_decoded_at_reduced_scale_but_not_below_the_target(tmp_path):
    noise(0, (5, 4)).resize((1000, 750), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg",
                                                                       quality=95)
    sizes = {n: decode(tmp_path / "a.jpg", (n, n)).picture.size
             for n in (64, 93, 94, 224, 376, 800)}
    assert sizes == {64: (125, 94), 93: (125, 94), 94: (250, 188), 224: (500, 375),
                     376: (1000, 750), 800: (1000, 750)}
    reduced = data.load_image(tmp_path / "a.jpg", 96)[0].permute(1, 2, 0).numpy().astype(float)
    full = data.open_image(tmp_path / "a.jpg").resize((96, 96), Image.Resampling.BILINEAR)
    assert np.abs(reduced - np.asarray(full, float)).mean() < 1.5


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
NO_PICTURES = {
    "nothing": b"", "a JPEG's first bytes": b"\xff\xd8", "a page": b"<!DOCTYPE html><html></html>",
    "a GIF's first bytes": b"GIF89a", "any bytes": bytes(range(256)),
    "a huge picture": png(30_000, 30_000, 8, bytes(1000)),
    "PostScript": POSTSCRIPT,
    "PostScript with a preview": struct.pack("<I6IH", 0xC6D3D0C5, 30, len(POSTSCRIPT), 0, 0, 0, 0,
                                             65535) + POSTSCRIPT,
    "PDF": b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n%%EOF\n",
    "MPEG": b"\0\0\1\xb3\x14\x00\xf0\x13" + bytes(99), "MP4": b"\0\0\0\x18ftypmp42" + bytes(99),
    "FITS": b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(99), "GRIB": b"GRIB\0\0\0\1" + bytes(99),
    "BUFR": b"BUFR\0\0\0\1" + bytes(99),
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hH", 0, 0, 90, 90, 96) + bytes(6)
           + b"\1\0\t\0" + bytes(99),
    "EMF": b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(99), "SVG": b"<svg xmlns='http://a'/>",
    "FLI": struct.pack("<IHHHHHH", 128, 0xAF11, 1, 9, 9, 8, 3) + bytes(112),
    "a zip archive": b"PK\3\4" + bytes(99),
}


@pytest.mark.parametrize("case", NO_PICTURES)
def test_what_holds_no_picture_is_named_and_starts_no_program(tmp_path, monkeypatch, case):
    """Pillow would start Ghostscript, where it is installed, for PostScript of any name."""
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    for name in ("Popen", "check_call", "run"):
        monkeypatch.setattr(subprocess, name, lambda *_, **__: pytest.fail("a program was started"))
    file = tmp_path / "odd name é.JPG"
    file.write_bytes(NO_PICTURES[case])
    error_of(lambda: data.open_image(file), file, "cannot be read as an image")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp", "bmp"])
def test_a_picture_that_is_missing_a_folder_or_cut_in_half_is_named(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    error_of(lambda: data.open_image(path), path, "no such image")
    error_of(lambda: data.open_image(tmp_path), tmp_path)
    noise(0, (60, 60)).save(path)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    error_of(lambda: data.open_image(path), path)


@settings(max_examples=100, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.integers(1, 12),
       st.sampled_from(["jpg", "png", "gif", "tiff", "webp"]))
def test_a_damaged_picture_loads_or_is_named(tmp_path, seed, edits, suffix):
    rng, file = random.Random(seed), tmp_path / f"a.{suffix}"
    pixels = np.arange(40 * 30 * 3, dtype=np.uint8).reshape(30, 40, 3)
    Image.fromarray(pixels).save(file, exif=exif(6))
    content = bytearray(file.read_bytes())
    for _ in range(edits):
        at = rng.randrange(min(len(content), 400) if rng.random() < 0.5 else len(content))
        content[at] = rng.randrange(256)
    file.write_bytes(content[:rng.randrange(len(content))] if rng.random() < 0.2 else content)
    try:
        assert data.load_image(file, 16)[0].shape == (3, 16, 16)
    except data.DataError as error:
        assert str(file) in str(error) and "\n" not in str(error)


# ---------------------------------------------------------------- pictures in folders (--images)


def test_folders_give_the_same_pictures_to_evaluate_as_to_training(tmp_path):
    """However deep and through links, but once; what is left out is noted, not tried."""
    photos = tmp_path / "photos"
    pictures = ["a.jpg", "B.PNG", "trip/c.webp", "trip/deep/d.jp2", "e.psd"]
    hidden = [".thumbnails/a.jpg", "._a.jpg", "trip/.cache/c.jpg"]
    unread = ["f.HEIC", "g.pdf", "trip/h.mpg", "i.mp4", "j.eps", "k.cr2", "notes.txt"]
    litter = ["@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "Thumbs.db", "__MACOSX/._a.jpg",
              "#recycle/z.jpg", "trip/.DS_Store"]
    for name in (*pictures, *hidden, *unread, *litter):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(b"x")
    picture(tmp_path / "elsewhere/linked.jpg")
    (photos / "album").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(photos)
    (photos / "gone.jpg").symlink_to("nowhere.jpg")
    (photos / "same.jpg").symlink_to("a.jpg")
    write_png(photos / "ours.png", Image.new("RGB", (4, 4)))  # as evaluate.py writes it
    given = [str(photos), str(tmp_path / "missing.heic"), str(photos / "ours.png")]
    paths, notes = folders.find_images(given)
    assert [os.path.relpath(path, photos) for path in paths[:-2]] == sorted(
        [*pictures, "album/linked.jpg", "same.jpg"], key=lambda name: name.split("/"))
    assert list(map(str, paths[-2:])) == given[1:]  # as they are given
    assert sorted(note.split(" (")[0] for note in notes) == sorted([
        f"3 {folders.HIDDEN}", f"7 {folders.UNREADABLE}", f"1 {folders.DANGLING}"])
