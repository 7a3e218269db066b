"""Whatever a data file holds: it is read, or refused in words that name the file. Nothing else happens.

About 1,500 files of captions and 700 pictures, the same ones each time.
"""

import csv
import io
import json
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data_pictures import READ, REFUSED, chunk, encoded, png

from harness.api import DATASETS, ConfigError
from harness.data.images import square

COMMON = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
              phases=(Phase.generate, Phase.shrink))
PIECES = st.sampled_from(["a", "cat", " ", "\t", ",", '"', '""', "'", "\n", "\r\n", "\r", "\0", "\x0b", "\x0c", "\x1c", "\x85",
                          "\u2028", "\ufeff", "é", "e\u0301", "{", "}", "[", "]", ":", "\\", "\\u0000", "\\ud800", "null", "NaN",
                          "true",
                          "1e999", "file", "caption", "prompt", "a.png", "../a.png", "/etc", "x" * 300, "\U0001f600", "#",
                          "9" * 5000])
TEXTS = st.lists(PIECES, max_size=14).map("".join)
HEADS = st.sampled_from(["", "prompt\n", "prompt,n\n", "prompt\tn\n", "file,caption\n", "file\tcaption\n", "a.png\t", "a.png,",
                         '{"prompt": "a"}\n', '{"file": "a.png", "caption": "', "[" * 2000, '{"images": [], "annotations": ['])
BYTES = st.one_of(st.builds(lambda head, text: (head + text).encode(), HEADS, TEXTS), st.binary(max_size=40),
                  st.builds(lambda text, kind: text.encode(kind, "replace"), TEXTS, st.sampled_from(["utf-16", "latin-1"])))
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-3, 10**20), st.floats(), st.text(max_size=5), st.just("a.png"))
TREES = st.recursive(LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(
    ["images", "annotations", "id", "image_id", "file_name", "caption", "category", "prompt", "1", "a"]), inner, max_size=4)),
    max_leaves=12)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a picture."""
    folder = tmp_path_factory.mktemp("fuzz")
    Image.new("RGB", (16, 16)).save(folder / "a.png")
    (folder / "annotations").mkdir()
    (folder / "val2014").mkdir()
    Image.new("RGB", (16, 16)).save(folder / "val2014" / "a.png")
    return folder


def read(name, file, content, monkeypatch, **options):
    """The pairs of a data set whose one file has `content`, or the message of the refusal, which names the file."""
    file.write_bytes(content)
    try:
        found = DATASETS.build(name, options, "data")._pairs
    except ConfigError as error:
        said = str(error)
        assert file.name in said or str(file.parent) in said, said
        assert len(said) < 3000
        return said
    finally:
        file.unlink()
    for pair in found:
        assert pair.caption.strip() and pair.caption.encode() and "\0" not in pair.caption
    return [pair.caption for pair in found]


def lines(content):
    """What a txt says, by the rule, written down once more."""
    text = content.decode().removeprefix("\ufeff")
    return [line for line in (one.removesuffix("\r") for one in text.split("\n")) if line.strip(" \t")]


@settings(max_examples=800, **COMMON)
@given(content=BYTES, kind=st.sampled_from(["txt", "csv", "tsv", "jsonl"]))
def test_any_file_of_prompts_is_read_or_refused(place, monkeypatch, content, kind):
    found = read("prompts", place / f"p.{kind}", content, monkeypatch, path=str(place / f"p.{kind}"))
    if isinstance(found, list) and kind == "txt":
        assert found == lines(content)
    if isinstance(found, list) and kind == "tsv":
        assert all(caption in content.decode() for caption in found)


@settings(max_examples=400, **COMMON)
@given(content=BYTES, kind=st.sampled_from(["txt", "csv", "tsv", "jsonl"]))
def test_any_file_of_captions_is_read_or_refused(place, monkeypatch, content, kind):
    read("folder", place / f"captions.{kind}", content, monkeypatch, path=str(place), resolution=16)


@settings(max_examples=300, **COMMON)
@given(tree=TREES, name=st.sampled_from(["coco", "mjhq"]))
def test_any_json_of_a_published_data_set_is_read_or_refused(place, monkeypatch, tree, name):
    file = place / ("annotations/captions_val2014.json" if name == "coco" else "meta_data.json")
    read(name, file, json.dumps(tree).encode(), monkeypatch, path=str(place), resolution=16)


@settings(max_examples=150, **COMMON)
@given(prompts=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1, max_size=12)
                        .filter(lambda text: text.strip()), min_size=1, max_size=6))
def test_what_python_writes_as_csv_and_jsonl_is_read_back_to_the_letter(place, monkeypatch, prompts):
    stream = io.StringIO(newline="")
    csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([["prompt"], *([text] for text in prompts)])
    written = {"csv": stream.getvalue(), "jsonl": "".join(json.dumps({"prompt": text}) + "\n" for text in prompts)}
    for kind, text in written.items():
        assert read("prompts", place / f"p.{kind}", text.encode(), monkeypatch, path=str(place / f"p.{kind}")) == prompts


# ---------------------------------------------------------------------------------------------- pictures

SEEDS = [content for content, _ in READ.values()] + [content for content, _ in REFUSED.values() if len(content) < 10**5]
SEEDS += [encoded(Image.fromarray(np.zeros((9, 7, 3), np.uint8)), kind) for kind in ("tiff", "ppm", "ico", "tga", "jpeg2000")]
NAMES = st.sampled_from([b"IHDR",
                         b"IDAT", b"IEND", b"tEXt", b"zTXt", b"iTXt", b"tRNS", b"PLTE", b"gAMA", b"iCCP", b"eXIf", b"acTL",
                         b"fcTL", b"fdAT", b"pHYs", b"abcd"])
BODIES = st.one_of(st.binary(max_size=30), st.sampled_from([b"", b"a\0\0" + zlib.compress(b"y" * 2**21), b"\0" * 13,
                                                             b"MM\0*\0\0\0\x08\xff"]))


@st.composite
def damaged(draw):
    """The bytes of a picture with pieces cut out, put in, or put for others, or chunks between its chunks."""
    content = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, min(len(content), 400)))
        what = draw(st.sampled_from(["cut", "flip", "chunk", "insert"]))
        if what == "cut":
            content = content[:at]
        elif what == "flip":
            content = content[:at] + draw(st.binary(min_size=1, max_size=4)) + content[at + 4:]
        elif what == "chunk":
            place = content.find(draw(st.sampled_from([b"IDAT", b"IEND"]))) - 4
            content = content[:max(place, 0)] + chunk(draw(NAMES), draw(BODIES)) + content[max(place, 0):]
        else:
            content = content[:at] + draw(st.binary(max_size=6)) + content[at:]
    return content


def look(content):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            out = square(content, 8, "x.png")
        except ConfigError as error:
            assert "x.png" in str(error) and len(str(error)) < 500
            return None
    assert out.shape == (8, 8, 3) and out.dtype == np.uint8
    return out


@settings(max_examples=500, **COMMON)
@given(content=damaged())
def test_any_damaged_picture_is_read_or_refused(content):
    look(content)


@settings(max_examples=200, **COMMON)
@given(width=st.sampled_from([0, 1, 2, 7, 40, 2**31]), height=st.sampled_from([0, 1, 3, 40, 2**16]),
       depth=st.sampled_from([0, 1, 2, 4, 8, 16, 32]), colour=st.integers(0, 7), rows=st.binary(max_size=60))
def test_any_head_of_a_png_is_read_or_refused(width, height, depth, colour, rows):
    look(png(width, height, depth, colour, rows))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp", "gif"])
def test_a_picture_cut_anywhere_is_refused(kind):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 24, 3), np.uint8))
    whole = encoded(image, kind)
    assert look(whole) is not None
    needed = len(whole) - {"png": 0, "jpeg": 2, "webp": 1, "bmp": 0, "gif": 2}[kind]  # an end mark, or padding, may lack
    for length in range(0, needed, max(1, needed // 60)):
        assert look(whole[:length]) is None, length


