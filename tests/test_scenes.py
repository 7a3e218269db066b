"""The data set of scenes: what a caption promises is there, splits share nothing, numbers decide everything."""

import itertools

import numpy as np
import pytest

from harness import data
from harness.data import scene_plan
from harness.data.scene_plan import BACKGROUNDS, SIDE, SPLITS, all_words, caption_of, scene, split_of_pair, subjects
from harness.data.scenes import Scenes, load_scenes, render

NUM = 300


@pytest.fixture(scope="module")
def scenes():
    return {split: [scene(split, index) for index in range(NUM)] for split in SPLITS}


def _pairs(one):
    names = [placed.subject for placed in one.placed]
    return {tuple(sorted(pair)) for pair in itertools.combinations(names, 2)}


def test_a_scene_depends_on_its_split_and_number_alone():
    forth, back = [scene("train", i) for i in range(20)], [scene("train", i) for i in reversed(range(20))]
    assert forth == back[::-1]
    assert scene("train", 0) != scene("reference", 0)
    assert np.array_equal(load_scenes("train", 8).images[3:5], np.stack([load_scenes("train", 5).images[3],
                                                                         load_scenes("train", 5).images[4]]))


def test_no_pair_of_subjects_of_the_reference_is_ever_trained_on(scenes):
    shown = {split: set().union(*map(_pairs, some)) for split, some in scenes.items()}
    held_out = {split: {pair for pair in shown[split] if split_of_pair(*pair) == split} for split in ("validation", "reference")}
    assert held_out["reference"] and held_out["validation"]
    assert not shown["train"] & (held_out["reference"] | held_out["validation"])
    assert not shown["validation"] & held_out["reference"] and not shown["reference"] & held_out["validation"]
    for split, some in scenes.items():
        assert all(any(split_of_pair(*pair) == split for pair in _pairs(one)) for one in some if len(one.placed) > 1), split


def test_no_picture_is_in_two_splits(scenes):
    contents = {split: {one.content for one in some} for split, some in scenes.items()}
    assert all(len(found) == NUM for found in contents.values())
    assert not contents["train"] & contents["reference"] and not contents["train"] & contents["validation"]


def test_captions_name_the_subjects_and_use_known_words(scenes):
    words = set(all_words())
    for one in itertools.chain(*scenes.values()):
        assert set(one.caption.replace(",", " , ").split()) <= words, one.caption
        for name in one.subjects:
            plural = next(row["plural"] for row in scene_plan.table()["subjects"] if row["name"] == name)
            assert name in one.caption or plural in one.caption
    assert caption_of(("frog", "apple", "frog"), "green", "outlined") == "an apple and two frogs on green, outlined"


def test_a_caption_leaves_the_picture_open(scenes):
    same = [one for one in scenes["train"] if one.caption == "a dog"] or [scene("train", i) for i in range(2000)
                                                                         if scene("train", i).caption == "a dog"]
    places = {(one.placed[0].x, one.placed[0].artwork, one.background) for one in same[:5]}
    assert len(same) >= 2 and len(places) == len(same[:5])


def test_every_subject_and_background_occurs(scenes):
    some = scenes["train"] + [scene("train", NUM + i) for i in range(500)]
    assert {name for one in some for name in one.subjects} == set(subjects())
    assert {one.background for one in some} == {kind for kind, _ in BACKGROUNDS}


def test_masks_are_where_the_subjects_are_and_share_no_pixel(scenes):
    for one in scenes["reference"][:40]:
        picture, masks = render(one)
        assert picture.shape == (SIDE, SIDE, 3) and picture.dtype == np.uint8 and masks.shape == (len(one.placed), SIDE, SIDE)
        assert masks.sum(0).max() <= 1
        for placed, mask in zip(one.placed, masks, strict=True):
            rows, columns = np.where(mask)
            assert len(rows) > 30, f"{one.id}: {placed.subject} cannot be seen"
            assert abs(columns.mean() - placed.x) < placed.size / 2 and abs(rows.mean() - placed.y) < placed.size / 2


def test_the_picture_under_no_mask_is_the_background():
    one = next(one for one in (scene("train", i) for i in range(100)) if one.background == "plain")
    picture, masks = render(one)
    far = ~masks.any(0)
    edge = picture[far].astype(int) - np.asarray(one.colours[0])
    assert (np.abs(edge).max(1) == 0).mean() > 0.9


def test_the_data_set_is_registered_and_its_size_is_an_option():
    options = data.resolve({"name": "scenes", "num_reference": 12, "num_train": 20}, "data", 64)
    found = data.load(options, "reference")
    assert len(found) == 12 and found.images[0:2].shape == (2, 64, 64, 3) and len(data.load_training(options)) == 20
    assert options["fingerprint"]


def test_other_artwork_is_another_data_set(monkeypatch, tmp_path):
    before = Scenes(Scenes.Config()).fingerprint
    monkeypatch.setattr("harness.data.scenes.artworks", lambda: ("noto", "twemoji"))
    assert Scenes(Scenes.Config()).fingerprint != before
