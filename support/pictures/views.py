"""The network's view of a picture: a region, resized, and its pixels as a tensor."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from support.common import pair
from support.pictures.decode import Decoded, decode

MEAN = 255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # ImageNet's, for pixels in 0..255
STD = 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def random_view(size, img_size, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """The paper's augmentation as a region of the original: both sides resized to 256/224 of
    img_size (height, width), a random crop of img_size, mirrored half of the time (x0 > x1).
    """
    (width, height), (h, w) = size, img_size
    H, W = round(h * 256 / 224), round(w * 256 / 224)
    top, left = int(rng.integers(H - h + 1)), int(rng.integers(W - w + 1))
    x0, x1 = left * width / W, (left + w) * width / W
    y0, y1 = top * height / H, (top + h) * height / H
    return (x1, y0, x0, y1) if rng.random() < 0.5 else (x0, y0, x1, y1)


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


def load_image(
    path: str | Path, img_size, crop: int | None = None, rng: np.random.Generator | None = None
):
    """One file as the network's input: (image (3, H, W), view, size), seen through fixed_view, with
    an rng random_view. img_size is an int or (height, width).
    """
    img_size = pair(img_size)
    picture, size, *_ = decode(path, _least(img_size, crop, rng is not None))
    view = random_view(size, img_size, rng) if rng else fixed_view(size, img_size, crop)
    return normalise(resize_view(picture, size, view, img_size)), view, size


def check_images(paths: Iterable[str | Path], img_size, crop: int | None = None) -> list[Decoded]:
    """Each file decoded as load_image does to score it, without its picture. Raises DataError."""
    least = _least(pair(img_size), crop, False)
    return [decode(path, least)._replace(picture=None) for path in paths]


def _least(img_size, crop: int | None, augment: bool) -> tuple[int, int]:
    """The (width, height) below which a view of a picture would have to be enlarged."""
    if crop and not augment:
        return crop, crop
    h, w = img_size
    return (round(w * 256 / 224), round(h * 256 / 224)) if augment else (w, h)


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


def normalise(pixels: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32."""
    pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return torch.from_numpy(pixels).float().sub_(MEAN).div_(STD)


def denormalise(image: torch.Tensor) -> np.ndarray:
    """(3, H, W) or (B, 3, H, W), normalised -> (H, W, 3) or (B, H, W, 3) uint8, to look at."""
    pixels = image.detach().float().cpu() * STD + MEAN
    return pixels.round().clamp(0, 255).byte().movedim(-3, -1).numpy()


def clip_boxes(boxes: torch.Tensor, view) -> torch.Tensor:
    """(M, 4) xyxy cut to a view or to (0, 0, width, height). A box outside keeps its row, with no
    area: a sure miss.
    """
    x0, y0, x1, y1 = view
    return torch.stack((boxes[:, 0::2].clamp(x0, x1), boxes[:, 1::2].clamp(y0, y1)), 2).flatten(1)
