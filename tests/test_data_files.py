"""Data sets from files as they are published: what is read, what a picture becomes, and what is refused."""

import json

import numpy as np
import pytest
from fake_data import make_coco, make_folder, make_mjhq, options_of, own_cache, pairs_of, picture, write_csv  # noqa: F401
from PIL import Image

from harness import data
from harness.api import ConfigError
from harness.data.images import ImageFile, LazyImages
from harness.trial.images import prompts_of

# ---------------------------------------------------------------------------------------------- pictures


def test_a_picture_of_the_right_size_is_left_as_it_is(tmp_path):
    pixels = picture(tmp_path / "a.png", size=(16, 16))
    assert np.array_equal(LazyImages([ImageFile(tmp_path / "a.png")], 16)[0], pixels)


def test_the_largest_centred_square_is_taken(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide.swapaxes(0, 1)).save(tmp_path / "tall.png")
    both = LazyImages([ImageFile(tmp_path / f"{name}.png") for name in ("wide", "tall")], 8)[:]
    assert both.shape == (2, 8, 8, 3) and (both == 255).all()


def test_shrinking_averages_over_pixels(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    Image.fromarray(stripes).save(tmp_path / "a.png")
    small = LazyImages([ImageFile(tmp_path / "a.png")], 8)[0]
    assert np.abs(small.astype(int) - 100).max() <= 12  # a filter without antialiasing gives 0 or 200


def test_transparency_is_white_grey_is_grey_and_exif_turns(tmp_path):
    clear = np.zeros((16, 16, 4), np.uint8)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    Image.fromarray(np.full((16, 16), 77, np.uint8)).save(tmp_path / "grey.png")
    halves = np.zeros((16, 16, 3), np.uint8)
    halves[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(halves).save(tmp_path / "turned.png", exif=exif)
    clear, grey, turned = LazyImages([ImageFile(tmp_path / f"{name}.png") for name in ("clear", "grey", "turned")], 16)[:]
    assert (clear == 255).all() and (grey == 77).all()
    assert (turned[:8] == 0).all() and (turned[8:] == 255).all()


def test_images_are_read_only_when_they_are_sliced(tmp_path, monkeypatch):
    files = [ImageFile(tmp_path / f"{index}.png") for index in range(5)]
    for index, file in enumerate(files):
        picture(file.path, index)
    seen, read = [], ImageFile.read
    monkeypatch.setattr(ImageFile, "read", lambda file: seen.append(file.path.stem) or read(file))
    images = LazyImages(files, 16)
    assert len(images) == 5 and images.shape == (5, 16, 16, 3) and not seen
    assert images[1:3].shape == (2, 16, 16, 3) and seen == ["1", "2"] and images[5:].shape == (0, 16, 16, 3)


@pytest.mark.parametrize("damage", ["text", "cut", "deep"])
def test_a_file_that_is_no_image_is_named(tmp_path, damage):
    make_folder(tmp_path, 3)
    path = tmp_path / "in" / "01.png"
    if damage == "text":
        path.write_text("not found")
    elif damage == "deep":
        Image.fromarray(np.zeros((4, 4), np.uint16)).save(path)
    else:
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ConfigError, match=r"data.*01.png.*(replace it|convert it)"):
        options_of("folder", tmp_path)  # before anything is computed


# ---------------------------------------------------------------------------------------------- the families


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "txt"])
def test_a_folder_reads_its_captions_in_each_format(tmp_path, kind):
    picture(tmp_path / "a.png"), picture(tmp_path / "sub" / "b.jpg", 1)
    rows = [("sub/b.jpg", 'a "big", dog'), ("a.png", "ein Fuß")]
    path = tmp_path / f"captions.{kind}"
    if kind == "csv":
        write_csv(path, rows)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"file": file, "caption": text}) + "\n" for file, text in rows))
    else:
        head = "file\tcaption\n" if kind == "tsv" else ""
        path.write_text(head + "".join(f"{file}\t{text}\n" for file, text in rows), encoding="utf-8")
    assert pairs_of(options_of("folder", tmp_path), "reference") == dict(rows)


def test_mjhq_is_read_as_it_is_published(tmp_path):
    make_mjhq(tmp_path)
    assert pairs_of(options_of("mjhq", tmp_path), "reference") == {f"{i:04x}": f"prompt {i}" for i in range(3)}
    animals = pairs_of(options_of("mjhq", tmp_path, category="animals"), "reference")
    assert animals == {"0000": "prompt 0", "0002": "prompt 2"}


@pytest.mark.parametrize(("year", "part"), [(2014, "val"), (2017, "train")])
def test_coco_gives_the_first_caption_of_each_image(tmp_path, year, part):
    make_coco(tmp_path, f"{part}{year}")
    found = pairs_of(options_of("coco", tmp_path, year=year, part=part), "reference")
    assert found == {f"{key:012d}": f"First of {key}." for key in range(40, 46)}
    assert data.load(options_of("coco", tmp_path, year=year, part=part), "reference").images[:].shape == (6, 16, 16, 3)


@pytest.mark.parametrize(("file", "text"), [
    ("PartiPrompts.tsv", "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tBiology\n"
                         "a sign that says \"Hi\"\tArts\tSymbols\t\n"),
    ("DrawBench.csv", "Prompts,Category\nbond,Colors\n\"a sign that says \"\"Hi\"\"\",Text\n"),
    ("list.txt", "bond\n\na sign that says \"Hi\"\n"),
    ("list.jsonl", '{"text": "bond"}\n{"text": "a sign that says \\"Hi\\""}\n')])
def test_prompt_lists_are_read_as_they_are_published(tmp_path, file, text):
    (tmp_path / file).write_text(text)
    options = options_of("prompts", tmp_path / file)
    assert list(pairs_of(options, "reference").values()) == ["bond", 'a sign that says "Hi"']
    assert set(prompts_of(options, range(4))) == {"bond", 'a sign that says "Hi"'}
    assert data.load(options, "reference").images is None


def test_numbers_of_classes_stay_text(tmp_path):
    (tmp_path / "classes.txt").write_text("207\n0\n999\n")
    assert set(prompts_of(options_of("prompts", tmp_path / "classes.txt"), range(3))) == {"207", "0", "999"}


def test_a_hub_data_set_is_read_as_files_are(tmp_path):
    datasets = pytest.importorskip("datasets")
    for index in range(3):
        picture(tmp_path / "set" / "train" / f"{index}.png", index)
    write_csv(tmp_path / "set" / "train" / "metadata.csv", [(f"{i}.png", f"text {i}") for i in range(3)], ("file_name", "text"))
    datasets.config.HF_DATASETS_CACHE = str(tmp_path / "cache")
    written = {"name": "hub", "id": str(tmp_path / "set"), "part": "train", "caption_column": "text", "resolution": 16}
    options = data.resolve(written, "data", None)
    found = data.load(options, "reference")
    assert found.captions == ["text 0", "text 1", "text 2"] and found.images[:2].shape == (2, 16, 16, 3)
    prompts = data.resolve({**written, "image_column": None}, "data", None)
    assert data.load(prompts, "reference").images is None and prompts["fingerprint"] != options["fingerprint"]


# ---------------------------------------------------------------------------------------------- what is refused


CASES = ("no folder", "no resolution", "no column", "unknown option", "share", "limit", "stray image", "image twice",
         "two captions files", "empty captions", "missing image", "no annotations", "year", "not mjhq", "two columns", "ragged",
         "prompts to train on", "train of train", "train without name")


def broken(tmp_path):
    """name -> (data options, what the message must say)."""
    folder, coco = make_folder(tmp_path / "f", 3), make_coco(tmp_path / "c", count=3)
    (coco / "val2014" / f"COCO_val2014_{41:012d}.jpg").unlink()
    more = make_folder(tmp_path / "more", 3)
    picture(more / "stray.jpeg")
    double = make_folder(tmp_path / "double", 2)
    write_csv(double / "captions.csv", [("in/00.png", "a"), ("in/00.png", "b"), ("in/01.png", "c")])
    both = make_folder(tmp_path / "both", 2)
    (both / "captions.txt").write_text("in/00.png\ta\n")
    blank = make_folder(tmp_path / "blank", 2, "  ")
    (tmp_path / "p.txt").write_text("a dog\n")
    (tmp_path / "p.csv").write_text("text,prompt\na,b\n")
    (tmp_path / "ragged.csv").write_text("prompt\na,b\n")
    folder, coco = ({"name": name, "path": str(path), "resolution": 16} for name, path in (("folder", folder), ("coco", coco)))
    return {
        "no folder": ({**folder, "path": str(tmp_path / "no")}, ["data.path", "nothing at", "relative path"]),
        "no resolution": ({**folder, "resolution": None}, ["data.resolution", "64", "backbone.resolution"]),
        "no column": ({**folder, "caption_column": "captoin"}, ["data.caption_column", "Did you mean 'caption'"]),
        "unknown option": ({**folder, "pth": "x"}, ["unknown option 'pth'", "Did you mean 'path'"]),
        "share": ({**folder, "reference_share": 1.5}, ["reference_share", "[0, 1]", "1.5"]),
        "limit": ({**folder, "limit": 0}, ["limit", "at least one"]),
        "stray image": ({**folder, "path": str(more)}, ["1 of 4 images", "no caption", "stray.jpeg"]),
        "image twice": ({**folder, "path": str(double)}, ["data.captions", "more than once"]),
        "two captions files": ({**folder, "path": str(both)}, ["captions.csv and captions.txt", "name the one"]),
        "empty captions": ({**folder, "path": str(blank)}, ["2 of 2 captions", "empty", "in/00.png"]),
        "missing image": (coco, ["1 of 3 images", "missing", "000000000041.jpg", "unpack"]),
        "no annotations": ({**coco, "year": 2017}, ["no file at", "captions_val2017.json"]),
        "year": ({**coco, "year": 2015}, ["data.year", "2015", "2017"]),
        "not mjhq": ({**folder, "name": "mjhq"}, ["no file at", "meta_data.json"]),
        "two columns": ({"name": "prompts", "path": str(tmp_path / "p.csv")}, ["data.column", "several", "text, prompt"]),
        "ragged": ({"name": "prompts", "path": str(tmp_path / "ragged.csv")}, ["line 2", "2 fields and the header 1"]),
        "prompts to train on": ({**folder, "train": {"name": "prompts", "path": str(tmp_path / "p.txt")}},
                                ["data.train", "'prompts' has no images"]),
        "train of train": ({**folder, "train": {**folder, "train": folder}}, ["data.train.train", "remove it"]),
        "train without name": ({**folder, "train": {"path": "x"}}, ["data.train", "needs a name"]),
    }


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_read_is_refused_with_a_remedy(tmp_path, case):
    options, words = broken(tmp_path)[case]
    with pytest.raises(ConfigError) as error:
        data.resolve(options, "s.yaml: data", None)
    assert str(error.value).startswith("s.yaml: data") and all(word in str(error.value) for word in words), str(error.value)
