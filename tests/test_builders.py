"""What drew the embedded data, once, by the maintainer."""

from harness.data import emoji, scene_plan
from harness.embedded import build_emoji, build_scenes


def test_what_draws_the_embedded_data_writes_where_it_is_read():
    assert build_emoji.FOLDER == emoji._FOLDER and build_scenes.FOLDER == scene_plan.FOLDER
    files = [build_emoji.FOLDER / build_emoji.SHEET_FILE, build_emoji.FOLDER / build_emoji.TABLE_FILE]
    assert all(file.is_file() for file in (*files, build_scenes.FOLDER / build_scenes.TABLE_FILE))
