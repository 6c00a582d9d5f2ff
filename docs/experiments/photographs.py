"""A set of photographs in CUB-200-2011's layout, made from three packages of Debian.

    apt-get download tuxpaint-stamps-default mate-backgrounds plasma-workspace-wallpapers
    for package in *.deb; do dpkg -x "$package" debian; done
    python docs/experiments/photographs.py --debian debian --out photographs   # a minute, 10 MB

Each picture is a photographed object, cut out by Tux Paint's stamps, on a crop of a wallpaper: 12
classes, of each 30 pictures to train on and 24 to test on. Every third object of a class and every
second wallpaper are in test pictures alone. The box is the object's. docs/results/photos.json holds
figures of this set; no picture of it belongs to this project.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from support.common import write_text

COUNTS = {"train": 30, "test": 24}  # pictures of a class
SIZES = ((256, 192), (192, 256), (224, 224))  # (width, height)
CLASSES = {  # {class: {folder of stamps: names}}
    "Songbird": {"animals/birds": "adelaide-rosella blackbird crow cuckoo lark magpie pigeon "
                                  "quetzal rainbow-lorikeet tucan"},
    "Water_bird": {"animals/birds": "drake duck gander heron_greatblue heron_greatblue_flying "
                                    "little-penguin magellanic_penguin pelican penguin "
                                    "pink_flamingo seagull silver-gull"},
    "Fowl": {"animals/birds": "chicken_profile guineafowl helmeted_guineafowl hen nandou ostrich "
                              "peacock rooster turkey"},
    "Fish": {"animals/fish": "bluegroper butterflyfish clownfish coraltrout dolphinfish lionfish "
                             "moonwrasse stripedfish"},
    "Insect": {"animals/insects": "bee fly grasshopper hornet hoverfly mantis xanthia"},
    "Bovine": {"animals/mammals/bovines": "bison bull cow cow_white gnu-baby gnu-sitting gnu-stand "
                                          "goat mountaingoat ram sheep yak zebu"},
    "Carnivore": {"animals/mammals/bears": "bear european-bear",
                  "animals/mammals/cats": "lion lion-2 tiger tiger_sumatran",
                  "animals/mammals/dogs": "dingo dog fox"},
    "Rodent": {"animals/mammals/rodents": "beaver capybara marmot mouse rabbit rabbit-2 rat "
                                          "squirrel"},
    "Fruit": {"food/fruit": "Apricot_whole Cherry_Stella Strawberry2 apricot avocado cherimoya "
                            "grapes kiwi lemon mandarine"},
    "Flower": {"plants/flowers": "adeenia anemone_red daffodil flower1 flower10 flower2 flower3 "
                                 "flower4 flower6 flower8 flower9 marigold pigface red-gazania "
                                 "rose"},
    "String_instrument": {"hobbies/music/string": "cello guitar2 guitar_classical guitar_electric "
                                                  "guitar_electric_bass violin"},
    "Road_vehicle": {"vehicles": "garbagetruck",
                     "vehicles/auto": "beetle sedan sportscar2 truck",
                     "vehicles/construction": "dumper",
                     "vehicles/emergency": "firetruck sedan_police",
                     "vehicles/masstransit": "green_korean_bus", "vehicles/race": "indycar"},
}
MATE = "Aqua Blinds Dune GreenMeadow RainDrops Storm Wood"
PLASMA = ("Altai Autumn BytheWater Canopee Cascade ColdRipple ColorfulCups DarkestHour EveningGlow "
          "FallenLeaf Grey IceCold OneStandsOut Opal PastelHills Path Volna summer_1am")


def stamps(share: Path, name: str) -> list[Path]:
    """The files of a class's objects."""
    return [share / "tuxpaint/stamps" / folder / f"{stamp}.png"
            for folder, names in CLASSES[name].items() for stamp in names.split()]


def wallpapers(share: Path) -> list[Path]:
    """The files of the backgrounds; of several sizes of one, that whose name sorts last."""
    plasma = [share / "wallpapers" / name / "contents/images" for name in PLASMA.split()]
    return ([share / f"backgrounds/mate/nature/{name}.jpg" for name in MATE.split()]
            + [max(folder.glob("*"), default=folder / "*") for folder in plasma])


def cut_out(path: Path) -> Image.Image:
    """The object, RGBA, cut to the pixels that are more than half opaque."""
    stamp = Image.open(path).convert("RGBA")
    return stamp.crop(stamp.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox())


def background(wallpaper: Image.Image, size: tuple[int, int], rng) -> Image.Image:
    """A window of half to all of the largest one that has the size's shape."""
    largest = min(wallpaper.width / size[0], wallpaper.height / size[1])
    scale = largest * rng.uniform(0.5, 1)
    left, top = (rng.uniform(0, full - scale * side) for full, side in zip(wallpaper.size, size))
    window = left, top, left + scale * size[0], top + scale * size[1]
    return wallpaper.resize(size, Image.Resampling.BICUBIC, window, reducing_gap=3)


def compose(stamp: Image.Image, wallpaper: Image.Image, rng) -> tuple[Image.Image, tuple]:
    """A picture, and its object's box: x, y, width, height."""
    picture = background(wallpaper, SIZES[rng.integers(len(SIZES))], rng)
    scale = rng.uniform(0.45, 0.9) * min(picture.size) / max(stamp.size)
    size = tuple(max(1, round(scale * side)) for side in stamp.size)
    stamp = stamp.resize(size, Image.Resampling.LANCZOS)
    if rng.random() < 0.5:
        stamp = ImageOps.mirror(stamp)
    corner = tuple(int(rng.integers(whole - part + 1))
                   for whole, part in zip(picture.size, size))
    picture.paste(stamp, corner, stamp)
    return picture, (*corner, *size)


def write_set(share: Path, out: Path) -> None:
    """All pictures and CUB's five lists; random choices are functions of class and number alone."""
    papers = [Image.open(path).convert("RGB") for path in wallpapers(share)]
    rows = []  # path, class, whether it is for training, box
    for number, name in enumerate(CLASSES, 1):
        folder = f"{number:03}.{name}"
        (out / "images" / folder).mkdir(parents=True)
        objects = [cut_out(path) for path in stamps(share, name)]
        test = objects[2::3]
        train = [one for i, one in enumerate(objects) if i % 3 != 2]
        for split, chosen, half in (("train", train, papers[::2]), ("test", test, papers[1::2])):
            for i in range(COUNTS[split]):
                rng = np.random.default_rng((number, split == "train", i))
                picture, box = compose(chosen[i % len(chosen)], half[rng.integers(len(half))], rng)
                path = f"{folder}/{name}_{split}_{i:02}.jpg"
                picture.save(out / "images" / path, quality=90)
                rows.append((path, number, int(split == "train"), box))

    lines = {"classes": [f"{i} {i:03}.{name}" for i, name in enumerate(CLASSES, 1)],
             "images": [], "image_class_labels": [], "train_test_split": [], "bounding_boxes": []}
    for i, (path, number, training, box) in enumerate(rows, 1):
        lines["images"].append(f"{i} {path}")
        lines["image_class_labels"].append(f"{i} {number}")
        lines["train_test_split"].append(f"{i} {training}")
        lines["bounding_boxes"].append(f"{i} {' '.join(f'{x:.1f}' for x in box)}")
    for name, text in lines.items():
        write_text(out / f"{name}.txt", "\n".join(text) + "\n")
    print(f"{len(rows)} photographs in {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--debian", type=Path, required=True,
                        help="folder that the packages are unpacked in, / where they are installed")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    flags = parser.parse_args()
    share = flags.debian / "usr/share"
    files = [*wallpapers(share), *(path for name in CLASSES for path in stamps(share, name))]
    missing = [path for path in files if not path.is_file()]
    if missing:
        sys.exit(f"photographs.py: error: {missing[0]}: missing, one of {len(missing)} files: "
                 "unpack the three packages in the folder of --debian")
    try:
        write_set(share, flags.out)
    except OSError as error:
        sys.exit(f"photographs.py: error: {error}")


if __name__ == "__main__":
    main()
