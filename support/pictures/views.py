"""The network's view of a picture: a region, resized, and its pixels as a tensor."""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from support.common import pair
from support.pictures.decode import Decoded, decode

MEAN = 255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # ImageNet's, for pixels in 0..255
STD = 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def whole_size(img_size) -> tuple[int, int]:
    """(H, W) to which the paper resizes a training picture before it crops img_size (h, w)."""
    return tuple(round(side * 256 / 224) for side in img_size)


def fixed_view(size, img_size, crop: int | None = None) -> tuple[float, float, float, float]:
    """The whole picture, or with crop=SIZE its centre: img_size (height, width), the shorter side
    resized to SIZE.
    """
    (width, height), (h, w) = size, img_size
    if crop is None:
        return 0.0, 0.0, float(width), float(height)
    W, H = crop * width // min(size), crop * height // min(size)
    left, top = round((W - w) / 2), round((H - h) / 2)
    return left * width / W, top * height / H, (left + w) * width / W, (top + h) * height / H


def load_image(path: str | Path, img_size, crop: int | None = None):
    """One file as the network sees it: (image (3, H, W) uint8, view, size), through fixed_view.

    img_size is an int or (height, width). Raises DataError.
    """
    img_size = pair(img_size)
    picture, size, *_ = decode(path, (crop, crop) if crop else img_size[::-1])
    view = fixed_view(size, img_size, crop)
    return as_tensor(resize_view(picture, size, view, img_size)), view, size


def load_whole(path: str | Path, img_size) -> tuple[np.ndarray, tuple[int, int]]:
    """The whole picture resized to img_size (H, W): (H, W, 3) uint8; and its own (width, height).
    """
    picture, size, *_ = decode(path, img_size[::-1])
    return resize_view(picture, size, (0, 0, *size), img_size), size


def load_wholes(paths: Iterable[str | Path], img_size) -> np.ndarray:
    """load_whole's of several files: (n, H, W, 3) uint8."""
    return np.stack([load_whole(path, img_size)[0] for path in paths])


def check_images(paths: Iterable[str | Path], img_size, crop: int | None = None) -> list[Decoded]:
    """Each file decoded as load_image does to score it, without its picture, but with whether it is
    nearly black. Raises DataError.
    """
    least, checked = (crop, crop) if crop else pair(img_size)[::-1], []
    for path in paths:
        decoded = decode(path, least)
        brightest = max(high for _, high in decoded.picture.getextrema())  # of 255
        checked.append(decoded._replace(picture=None, dark=brightest <= 16))
    return checked


def resize_view(picture: Image.Image, size, view, img_size) -> np.ndarray:
    """(H, W, 3) uint8: the view of a picture, mirrored where x0 > x1. The view is in pixels of an
    original of `size`, of which the picture may be a reduced copy.
    """
    sx, sy = picture.width / size[0], picture.height / size[1]
    left, right = sorted((view[0], view[2]))
    right, bottom = min(right * sx, picture.width), min(view[3] * sy, picture.height)  # rounding
    box = left * sx, view[1] * sy, right, bottom
    pixels = np.asarray(picture.resize(img_size[::-1], Image.Resampling.BILINEAR, box))
    return pixels[:, ::-1] if view[0] > view[2] else pixels


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    """(H, W, 3) -> (3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def normalise(images: torch.Tensor) -> torch.Tensor:
    """(..., 3, H, W) uint8 -> float32 by ImageNet's mean and standard deviation, on their device.

    Raises ValueError for pixels of another dtype.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images: got {images.dtype}, need torch.uint8 pixels in 0 .. 255")
    mean, std = statistics(images.device)
    return images.float().sub_(mean).div_(std)


@lru_cache
def statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """MEAN and STD on a device: copied once, for a copy makes the host wait."""
    return MEAN.to(device), STD.to(device)


def clip_boxes(boxes: torch.Tensor, view) -> torch.Tensor:
    """(M, 4) xyxy cut to a view or to (0, 0, width, height). A box outside keeps its row, with no
    area: a sure miss.
    """
    x0, y0, x1, y1 = view
    return torch.stack((boxes[:, 0::2].clamp(x0, x1), boxes[:, 1::2].clamp(y0, y1)), 2).flatten(1)
