"""A picture's file, decoded to upright RGB. Anything wrong is a DataError that names the file."""

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from support.common import printable

TURNS = dict(enumerate((  # EXIF's orientations from 2 on, and what makes them upright
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90), 2))
warnings.filterwarnings("ignore", module="PIL")  # what matters arrives as an exception

# Pillow's formats that hold a picture in pixels: a file is opened as one of them, whatever its
# name. Left out are documents (PostScript would start Ghostscript), films, and data that Pillow
# only recognises (HDF5, GRIB).
Image.init()
FORMATS = [name for name in (
    "JPEG PNG GIF BMP PPM WEBP TIFF AVIF JPEG2000 PSD QOI DDS ICNS ICO CUR DIB DCX PCX SGI SUN "
    "BLP FTEX GBR IM MSP PIXAR XBM XPM TGA").split() if name in Image.OPEN]


class DataError(ValueError):
    """A file of a data set is wrong. The message is one line, even where a name has line breaks;
    out of a DataLoader worker's traceback, its last one.
    """

    def __init__(self, message: str):
        if message.startswith("Caught DataError in "):
            message = message.strip().splitlines()[-1].removeprefix(f"{__name__}.DataError: ")
        super().__init__(printable(message))


class Decoded(NamedTuple):
    """What a file holds."""

    picture: Image.Image | None  # upright, in RGB, perhaps reduced; None where it is not needed
    size: tuple[int, int]  # (width, height) of the upright original
    stored: tuple[int, int]  # its size as the file has it, before EXIF's orientation
    orientation: int  # EXIF's, 1 to 8: above 4 rows and columns are swapped
    dark: bool = False  # see check_images


def open_image(path: str | Path) -> Image.Image:
    """The picture in a file of one of FORMATS, upright (EXIF) and in RGB: its first frame, on white
    where it is transparent, 16-bit and float pixels scaled to 8 bits. Raises DataError naming
    the file.
    """
    return decode(path).picture


def decode(path, at_least=None, header_only=False) -> Decoded:
    """The upright picture; at_least=(width, height) lets a JPEG come at 1/2, 1/4 or 1/8 of its
    size, which is cheap to decode, but no smaller than that.
    """
    try:
        # a file, not its name: by name Pillow maps grey TIFFs into memory, and turns them wrongly
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            orientation, turned = _orientation(image), image.format == "TIFF"  # by Pillow, on load
            stored, sideways = image.size, orientation > 4
            size = stored[::-1] if sideways else stored
            if turned:
                size, stored = stored, size
            if header_only:
                return Decoded(None, size, stored, orientation)
            if at_least:
                image.draft(None, at_least[::-1] if sideways else at_least)
            image.load()
            upright = image if turned or orientation == 1 else image.transpose(TURNS[orientation])
            return Decoded(_rgb(upright), size, stored, orientation)
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: cannot be read as an image (of no kind that is read here)"
                        ) from error
    # Pillow's plugins raise nearly anything on a broken file
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read as an image ({reason[:200]})") from error


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 where there is none: all else in EXIF, however odd, leaves a picture as it is."""
    try:
        orientation = image.getexif().get(0x0112)
        return int(orientation) if orientation in TURNS else 1
    except Exception:
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    # 16-bit, 32-bit and float grey: Pillow would clip at 255
    if image.mode[0] in "IF":
        pixels = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
        ranges = (1, 255, 65535) if image.mode == "F" else (255, 65535)
        ranges = (65535,) if image.mode.startswith("I;16") else ranges
        top = next((r for r in ranges if pixels.max() <= r), pixels.max())
        image = Image.fromarray(np.clip(pixels * (255 / top), 0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
