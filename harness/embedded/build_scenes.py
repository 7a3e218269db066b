"""Draw the artwork that the scenes are put together from: one PNG sheet for each source, and one table.

python -m harness.embedded.build_scenes --source FOLDER

FOLDER holds the unpacked npm packages of `PACKAGES`, each in a folder of its package's name without the scope, such as
FOLDER/noto/icons.json. Needs `pip install resvg-py`. Run once by the maintainer; the files that it writes are committed.
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from harness.data.scene_plan import FOLDER

CELL, DRAWN = 96, 288
"""Pixels of a side of a stored sprite, and of the drawing that it is scaled down from."""
MARGIN = 2
TABLE_FILE = "artwork.json"
PACKAGES = {"noto": ("@iconify-json/noto", "Apache-2.0", "Google Inc"),
            "fluent": ("@iconify-json/fluent-emoji", "MIT", "Microsoft Corporation"),
            "fluent-flat": ("@iconify-json/fluent-emoji-flat", "MIT", "Microsoft Corporation"),
            "twemoji": ("@iconify-json/twemoji", "CC-BY-4.0", "Twitter, Inc and other contributors"),
            "openmoji": ("@iconify-json/openmoji", "CC-BY-SA-4.0", "OpenMoji")}
"""Artwork -> npm package, licence (SPDX), author."""
SUBJECTS = {  # name in captions -> (plural, name in every package)
    "dog": ("dogs", "dog-face"), "cat": ("cats", "cat-face"), "mouse": ("mice", "mouse-face"),
    "rabbit": ("rabbits", "rabbit-face"),
    "fox": ("foxes", "fox"), "bear": ("bears", "bear"), "panda": ("pandas", "panda"), "koala": ("koalas", "koala"),
    "tiger": ("tigers", "tiger-face"), "lion": ("lions", "lion"), "cow": ("cows", "cow-face"), "pig": ("pigs", "pig-face"),
    "frog": ("frogs", "frog"), "monkey": ("monkeys", "monkey-face"), "chicken": ("chickens", "chicken"),
    "penguin": ("penguins", "penguin"), "owl": ("owls", "owl"), "turtle": ("turtles", "turtle"), "fish": ("fish", "fish"),
    "octopus": ("octopuses", "octopus"), "butterfly": ("butterflies", "butterfly"), "ladybug": ("ladybugs", "lady-beetle"),
    "snail": ("snails", "snail"), "elephant": ("elephants", "elephant"), "apple": ("apples", "red-apple"),
    "banana": ("bananas", "banana"), "strawberry": ("strawberries", "strawberry"), "pear": ("pears", "pear"),
    "watermelon": ("watermelons", "watermelon"), "pineapple": ("pineapples", "pineapple"), "carrot": ("carrots", "carrot"),
    "eggplant": ("eggplants", "eggplant"), "pizza": ("pizzas", "pizza"), "hamburger": ("hamburgers", "hamburger"),
    "doughnut": ("doughnuts", "doughnut"), "cookie": ("cookies", "cookie"), "cake": ("cakes", "birthday-cake"),
    "ice cream": ("ice creams", "soft-ice-cream"), "sunflower": ("sunflowers", "sunflower"), "cactus": ("cacti", "cactus"),
    "mushroom": ("mushrooms", "mushroom"), "tree": ("trees", "evergreen-tree"), "car": ("cars", "automobile"),
    "rocket": ("rockets", "rocket"), "sailboat": ("sailboats", "sailboat"), "house": ("houses", "house"),
    "balloon": ("balloons", "balloon"), "umbrella": ("umbrellas", "umbrella"), "guitar": ("guitars", "guitar"),
    "teddy bear": ("teddy bears", "teddy-bear"), "robot": ("robots", "robot"), "ball": ("balls", "soccer-ball")}


def svg_of(icons: dict, name: str) -> str:
    """The drawing of `name` as an SVG document."""
    while name in icons.get("aliases", {}):
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}">{icon["body"]}</svg>')


def sprite_of(svg: str) -> Image.Image:
    """The drawing (CELL, CELL) RGBA: cut to what is seen, its longer side CELL - 2 MARGIN pixels, in the middle."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=DRAWN, height=DRAWN))
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
    rows, columns = np.where(pixels[..., 3] > 8)
    cut = Image.fromarray(pixels[rows.min():rows.max() + 1, columns.min():columns.max() + 1]).convert("RGBa")
    scale = (CELL - 2 * MARGIN) / max(cut.size)
    small = cut.resize(tuple(max(1, round(side * scale)) for side in cut.size), Image.Resampling.LANCZOS).convert("RGBA")
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(small, ((CELL - small.width) // 2, (CELL - small.height) // 2))
    return cell


def main() -> None:
    """Write FOLDER/<artwork>.png and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder of the unpacked packages")
    source = parser.parse_args().source
    FOLDER.mkdir(exist_ok=True)
    artworks = []
    for artwork, (package, licence, author) in PACKAGES.items():
        folder = source / package.split("/")[1]
        icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        sheet = Image.new("RGBA", (CELL * len(SUBJECTS), CELL))
        for place, (_, name) in enumerate(SUBJECTS.values()):
            sheet.paste(sprite_of(svg_of(icons, name)), (place * CELL, 0))
        sheet.save(FOLDER / f"{artwork}.png", optimize=True)
        version = json.loads((folder / "package.json").read_text(encoding="utf-8"))["version"]
        artworks.append({"name": artwork, "source": f"npm {package} {version}", "licence": licence, "author": author})
        Console().print(f"{artwork}: {(FOLDER / f'{artwork}.png').stat().st_size / 1e6:.2f} MB")
    subjects = [{"name": name, "plural": plural, "drawing": drawing} for name, (plural, drawing) in SUBJECTS.items()]
    table = {"cell_px": CELL, "artworks": artworks, "subjects": subjects}
    (FOLDER / TABLE_FILE).write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
