"""Collect cut-outs and photographs from freely licensed Debian packages into a small pool of images.

    for name in tuxpaint-stamps-default sweethome3d-furniture ...; do apt-get download $name; done
    for file in *.deb; do dpkg -x $file unpacked/${file%%_*}; done
    python -m training.materials --unpacked unpacked --pool .data/pool

`unpacked` holds one folder for each package, named after it. The pool has, in `train` and in `held`,
`cutouts/*.webp` and `renders/*.webp` (RGBA, at most 320 px; objects cut out of photographs, and rendered furniture and
people), `photographs/*.jpg` and `drawings/*.jpg` (at most 1024 px). Beside each but the drawings lies a `.parts.png`:
its division into a few regions of one colour, found without any learned model (see `regions.py`).
"""

import argparse
import hashlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from training.regions import divide_into_regions

CUTOUT_SIDE_PX = 320
PHOTOGRAPH_SIDE_PX = 1024
CUTOUT_PARTS = 5
PHOTOGRAPH_PARTS = 15

DRAWN_FOLDERS = (
    "cartoon",
    "symbols/alphabets",
    "symbols/math",
    "symbols/music",
    "symbols/shapes",
    "symbols/faces",
    "symbols/money/00_symbols",
    "naturalforces",
    "town/flags",
)
HELD_FOLDERS = (
    "food/vegetables",
    "household/dishes",
    "animals/mammals/rodents",
    "seasonal/hanukkah",
    "hobbies/music",
    "sports",
)
PHOTOGRAPH_PATTERNS = {
    "lomiri-wallpapers-16.04": "usr/share/backgrounds/*.jpg",
    "lomiri-wallpapers-20.04": "usr/share/backgrounds/*.jpg",
    "mate-backgrounds": "usr/share/backgrounds/mate/nature/*.jpg",
    "plasma-workspace-wallpapers": "usr/share/wallpapers/*/contents/images/*",
    "ukui-wallpapers": "usr/share/backgrounds/*",
    "gnome-backgrounds": "usr/share/backgrounds/gnome/*.webp",
    "tuxpaint-data": "usr/share/tuxpaint/templates/*.jpg",
    "palapeli-data": "usr/share/palapeli/collection/*.jpg",
}
DRAWN_WALLPAPERS = ("analogpattern", "umang", "Fossa", "Infinite-Sea", "Painting-Colors", "ukui-", "gnome-")
PHOTOGRAPHIC_PLASMA = ("Autumn", "BytheWater", "DarkestHour", "Path", "summer_1am", "Volna", "OneStandsOut")
HELD_PHOTOGRAPHS = ("Storm", "RainDrops", "OneStandsOut", "templates/sheep", "castle-maintenon", "seeding_by")
EVALUATED_PHOTOGRAPHS = ("european-honey-bee", "templates/lighthouse")


def read_cutouts(unpacked: Path) -> Iterator[tuple[str, bool, Image.Image]]:
    """Yield (name, held out of training, image with alpha) for each cut-out of the packages."""
    stamps = unpacked / "tuxpaint-stamps-default/usr/share/tuxpaint/stamps"
    for path in sorted(stamps.rglob("*.png")):
        folder = str(path.parent.relative_to(stamps))
        if not any(name in folder for name in DRAWN_FOLDERS):
            yield f"{folder}/{path.stem}", folder.startswith(HELD_FOLDERS), Image.open(path)
    for catalogue in sorted((unpacked / "sweethome3d-furniture").rglob("*.sh3f")):
        with zipfile.ZipFile(catalogue) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".png") and name.count("/") < 2:
                    held = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 12 == 0
                    yield f"{catalogue.stem}/{name}", held, Image.open(io.BytesIO(archive.read(name)))


def read_photographs(unpacked: Path, excluded: set[str]) -> Iterator[tuple[str, bool, Image.Image]]:
    """Yield (name, held out of training, image) for each wallpaper that is not named in `excluded`."""
    for package, pattern in PHOTOGRAPH_PATTERNS.items():
        banned_wallpapers = {line.split("/contents/")[0] for line in excluded if "/contents/" in line}
        for path in sorted((unpacked / package).glob(pattern)):
            name = str(path.relative_to(unpacked))
            wallpaper = name.split("/contents/")[0]
            banned = name in excluded or wallpaper in banned_wallpapers or any(e in name for e in EVALUATED_PHOTOGRAPHS)
            fit = path.suffix in (".jpg", ".png", ".webp") and not path.is_symlink() and path.stat().st_size > 1000
            if fit and not banned:
                yield name, any(held in name for held in HELD_PHOTOGRAPHS), Image.open(path)


def trim_cutout(image: Image.Image) -> Image.Image | None:
    """Crop a cut-out to what can be seen of it and shrink it; None where it has no outline of its own."""
    rgba = image.convert("RGBA")
    alpha = np.asarray(rgba)[..., 3]
    box = Image.fromarray((alpha > 96).astype(np.uint8) * 255).getbbox()
    if box is None or min(box[2] - box[0], box[3] - box[1]) < 24:
        return None
    solid = (alpha[box[1] : box[3], box[0] : box[2]] > 96).mean()
    if not 0.04 < solid < 0.97:
        return None
    rgba = rgba.crop(box)
    rgba.thumbnail((CUTOUT_SIDE_PX, CUTOUT_SIDE_PX), Image.Resampling.LANCZOS)
    return rgba


def save_cutout(image: Image.Image, target: Path) -> None:
    pixels = np.asarray(image)
    parts = divide_into_regions(pixels[..., :3], CUTOUT_PARTS, mask=pixels[..., 3] > 96)
    image.save(target.with_suffix(".webp"), quality=85)
    Image.fromarray(parts).save(target.with_suffix(".parts.png"))


def is_drawing(name: str) -> bool:
    """Whether a wallpaper is a drawing: fit as a texture, not as a photograph with regions of its own."""
    if name.startswith("plasma"):
        return not any(f"/{wallpaper}/" in name for wallpaper in PHOTOGRAPHIC_PLASMA)
    return any(drawn in name for drawn in DRAWN_WALLPAPERS)


def save_photograph(image: Image.Image, target: Path, *, divide: bool) -> None:
    image = image.convert("RGB")
    image.thumbnail((PHOTOGRAPH_SIDE_PX, PHOTOGRAPH_SIDE_PX), Image.Resampling.LANCZOS)
    image.save(target.with_suffix(".jpg"), quality=85)
    if divide:
        Image.fromarray(divide_into_regions(np.asarray(image), PHOTOGRAPH_PARTS)).save(target.with_suffix(".parts.png"))


def build_pool(unpacked: Path, pool: Path, excluded: set[str]) -> dict[str, int]:
    """Write the pool; return how many images each of its folders holds."""
    counts: dict[str, int] = {}

    def place(kind: str, held: bool) -> Path:
        folder = f"{'held' if held else 'train'}/{kind}"
        (pool / folder).mkdir(parents=True, exist_ok=True)
        counts[folder] = counts.get(folder, 0) + 1
        return pool / folder / f"{counts[folder]:04d}"

    with (pool / "names.tsv").open("w") as names:
        for name, held, image in read_cutouts(unpacked):
            trimmed = trim_cutout(image)
            if trimmed is not None:
                target = place("renders" if name.endswith(".png") else "cutouts", held)
                save_cutout(trimmed, target)
                names.write(f"{target.relative_to(pool)}\t{name}\n")
        for name, held, image in read_photographs(unpacked, excluded):
            drawing = is_drawing(name)
            target = place("drawings" if drawing else "photographs", held)
            save_photograph(image, target, divide=not drawing)
            names.write(f"{target.relative_to(pool)}\t{name}\n")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unpacked", type=Path, required=True, help="one folder for each unpacked package")
    parser.add_argument("--pool", type=Path, required=True, help="folder to write the pool into")
    parser.add_argument(
        "--excluded",
        type=Path,
        default=Path(__file__).parent / "photographs/excluded.txt",
        help="paths never to train on, one a line: the photographs of the evaluation",
    )
    arguments = parser.parse_args()
    arguments.pool.mkdir(parents=True, exist_ok=True)
    excluded = {line.strip() for line in arguments.excluded.read_text().splitlines() if line.strip()}
    print(build_pool(arguments.unpacked, arguments.pool, excluded))


if __name__ == "__main__":
    main()
