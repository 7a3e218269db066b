"""Pack the emoji sprites that the embedded data set needs into one PNG and one JSON.

python -m harness.embedded.build_emoji --source FOLDER

FOLDER is the unpacked npm package `emoji-datasource-google` (see harness/data/README.md, beside which the two files
are written). Run once by the maintainer; what it writes is committed, so nobody else needs the package.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from harness.data import emoji

FOLDER = Path(emoji.__file__).parent
CELL = 64
COLUMNS = 24
CATEGORIES = ("Smileys & Emotion", "Animals & Nature", "Food & Drink")
SHEET_FILE = "emoji_sheet.png"
TABLE_FILE = "emoji_table.json"

# Unicode names that nobody would type, in the words that everybody would.
PLAIN_NAMES = {
    "heavy black heart": "red heart",
    "slice of pizza": "pizza",
    "honeybee": "bee",
    "soft ice cream": "soft serve ice cream",
    "lady beetle": "ladybug",
    "extraterrestrial alien": "alien",
    "white smiling face": "smiling face",
    "heavy heart exclamation mark ornament": "heart exclamation",
    "hocho": "kitchen knife",
}


def plain_name(name: str) -> str:
    """The lower-cased Unicode name with hyphens opened: the words of a caption, letters and digits only."""
    name = name.lower()
    name = PLAIN_NAMES.get(name, name)
    return " ".join("".join(c if c.isalnum() else " " for c in name).split())


def read_sprites(source: Path) -> tuple[list[dict], list[np.ndarray]]:
    """The table rows and the RGBA sprites (64, 64, 4) of the chosen categories, in Unicode's own order."""
    entries = json.loads((source / "emoji.json").read_text(encoding="utf-8"))
    entries = [e for e in entries if e["category"] in CATEGORIES and e["has_img_google"]]
    entries.sort(key=lambda e: (CATEGORIES.index(e["category"]), e["sort_order"]))
    rows, sprites = [], []
    for entry in entries:
        sprite = np.asarray(Image.open(source / "img" / "google" / "64" / entry["image"]).convert("RGBA"))
        assert sprite.shape == (CELL, CELL, 4)
        sprites.append(np.where(sprite[..., 3:] > 0, sprite, 0).astype(np.uint8))
        rows.append({"name": plain_name(entry["name"]), "category": entry["category"],
                     "unicode": entry["unified"], "cell": len(rows)})
    names = [row["name"] for row in rows]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise SystemExit(f"two sprites share a name, so a caption would be ambiguous: {sorted(repeated)}")
    return rows, sprites


def main() -> None:
    """Write the sprite sheet and its table where the data set `emoji` reads them."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--source", type=Path, required=True, help="unpacked emoji-datasource-google package")
    source = parser.parse_args().source
    rows, sprites = read_sprites(source)
    num_lines = -(-len(sprites) // COLUMNS)
    sheet = np.zeros((num_lines * CELL, COLUMNS * CELL, 4), np.uint8)
    for i, sprite in enumerate(sprites):
        top, left = i // COLUMNS * CELL, i % COLUMNS * CELL
        sheet[top : top + CELL, left : left + CELL] = sprite
    Image.fromarray(sheet, "RGBA").save(FOLDER / SHEET_FILE, optimize=True)
    version = json.loads((source / "package.json").read_text(encoding="utf-8"))["version"]
    table = {"source": f"npm emoji-datasource-google {version}", "licence": "Apache-2.0 (Noto Emoji artwork)",
             "cell_px": CELL, "columns": COLUMNS, "sprites": rows}
    text = json.dumps(table, indent=0, ensure_ascii=False)
    (FOLDER / TABLE_FILE).write_text(text + "\n", encoding="utf-8")
    size = (FOLDER / SHEET_FILE).stat().st_size / 1e6
    Console().print(f"{len(rows)} sprites, {SHEET_FILE} {size:.2f} MB")


if __name__ == "__main__":
    main()
