"""A picture is read right or refused by name before anything is computed; every one is decoded to its end once."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from fake_data import make_folder, options_of, own_cache, picture  # noqa: F401  (own_cache: a fixture)
from PIL import Image, PngImagePlugin

from harness import data
from harness.api import ConfigError
from harness.data import hashes, images
from harness.data.images import ImageFile, square

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
RED = (200, 30, 40)


def encoded(image, kind="png", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width, height, depth, colour, rows):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def with_chunk(name, body, before=b"IDAT"):
    whole = encoded(Image.fromarray(PIXELS))
    at = whole.index(before) - 4
    return whole[:at] + chunk(name, body) + whole[at:]


def large_text():
    notes = PngImagePlugin.PngInfo()
    notes.add_text("prompt", "x" * 2**21, zip=True)
    return encoded(Image.fromarray(PIXELS), pnginfo=notes)


def flipped(whole, at):
    return whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1:]


def one_colour(mode, **options):
    return encoded(Image.new("RGB", (16, 16), RED).convert(mode), **options)


def palette_with_hole():
    image = Image.new("P", (16, 16), 0)
    image.putpalette([0, 0, 0, *RED])
    image.paste(1, (0, 8, 16, 16))
    return encoded(image, transparency=0)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    halves = np.zeros((16, 16, 3), np.uint8)
    halves[:8] = 255
    return encoded(Image.fromarray(halves), exif=exif)


def of(pixel):
    return lambda out: np.abs(out.astype(int) - np.array(pixel)).max() <= 3


GREY = 80
READ = {
    "png": (encoded(Image.fromarray(PIXELS)), lambda out: np.array_equal(out, PIXELS)),
    "png named jpg": (encoded(Image.fromarray(PIXELS)), lambda out: np.array_equal(out, PIXELS)),
    "jpeg": (one_colour("RGB", kind="jpeg"), of(RED)),
    "cmyk": (one_colour("CMYK", kind="jpeg", quality=95), of(RED)),
    "progressive": (one_colour("RGB", kind="jpeg", progressive=True), of(RED)),
    "webp": (one_colour("RGB", kind="webp", lossless=True), of(RED)),
    "bmp": (one_colour("RGB", kind="bmp"), of(RED)),
    "gif of one frame": (encoded(Image.new("RGB", (16, 16), RED).quantize(), "gif"), of(RED)),
    "palette": (encoded(Image.new("RGB", (16, 16), RED).quantize()), of(RED)),
    "palette with a hole": (palette_with_hole(), lambda out: of((255,) * 3)(out[:7]) and of(RED)(out[9:])),
    "grey": (encoded(Image.new("L", (16, 16), GREY)), of((GREY,) * 3)),
    "black and white": (encoded(Image.new("1", (16, 16), 1)), of((255,) * 3)),
    "grey with alpha": (encoded(Image.new("LA", (16, 16), (0, 0))), of((255,) * 3)),
    "grey with a clear value": (encoded(Image.new("L", (16, 16), 9), transparency=9), of((255,) * 3)),
    "colour with a clear value": (encoded(Image.new("RGB", (16, 16), RED), transparency=RED), of((255,) * 3)),
    "half clear": (encoded(Image.new("RGBA", (16, 16), (0, 0, 0, 128))), of((127,) * 3)),
    "upside down": (turned(3), lambda out: (out[:7] == 0).all() and (out[9:] == 255).all()),
    "on its side": (turned(6), lambda out: (out[:, :7] == 0).all() and (out[:, 9:] == 255).all()),
    "one pixel": (encoded(Image.new("RGB", (1, 1), RED)), of(RED)),
    "a long line": (encoded(Image.new("RGB", (5000, 1), RED)), of(RED)),
    "a short text": (with_chunk(b"tEXt", b"Comment\0hello"), lambda out: np.array_equal(out, PIXELS)),
    "bytes after its end": (encoded(Image.fromarray(PIXELS)) + b"trailing", lambda out: np.array_equal(out, PIXELS)),
}
WHOLE_PNG, WHOLE_JPEG = encoded(Image.fromarray(PIXELS)), encoded(Image.fromarray(PIXELS), "jpeg", quality=95)
FRAMES = [Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in (0, 99, 200)]
REFUSED = {
    "nothing": (b"", "empty"),
    "text": (b"<html>not found</html>", "not an image"),
    "a large text chunk": (large_text(), "not an image that can be read.*large"),
    "a large text chunk behind the pixels": (with_chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 2**21), b"IEND"), "large"),
    "an iTXt bomb": (with_chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(b"x" * 2**21)), "large"),
    "half a png": (WHOLE_PNG[: len(WHOLE_PNG) // 2], "replace it"),
    "a png without its end": (WHOLE_PNG[:-20], "replace it"),
    "half a jpeg": (WHOLE_JPEG[: len(WHOLE_JPEG) // 2], "[Tt]runcated"),
    "half a webp": (encoded(Image.fromarray(PIXELS), "webp")[:120], "replace it"),
    "a flipped bit": (flipped(WHOLE_PNG, len(WHOLE_PNG) - 30), "replace it"),
    "a flipped bit in the head": (flipped(WHOLE_PNG, 18), "replace it"),
    "16-bit grey": (png(4, 4, 16, 0, bytes(4 * 9)), "16 bits"),
    "16-bit colour": (png(4, 4, 16, 2, bytes(4 * 25)), "16 bits"),
    "16-bit colour with alpha": (png(4, 4, 16, 6, bytes(4 * 33)), "16 bits"),
    "float pixels": (encoded(Image.new("F", (8, 8)), "tiff"), "JPEG, PNG"),
    "16-bit tiff": (encoded(Image.new("I;16", (8, 8)), "tiff"), "JPEG, PNG"),
    "postscript": (encoded(Image.new("RGB", (8, 8)), "eps"), "JPEG, PNG"),
    "a moving gif": (encoded(FRAMES[0], "gif", save_all=True, append_images=FRAMES[1:]), "animation"),
    "a moving png": (encoded(FRAMES[0], "png", save_all=True, append_images=FRAMES[1:]), "animation"),
    "a moving webp": (encoded(FRAMES[0], "webp", save_all=True, append_images=FRAMES[1:]), "animation"),
    "a bomb": (png(60000, 60000, 8, 0, b""), "replace it|million"),
    "a small bomb": (png(10000, 8500, 8, 0, b""), "80 million"),
}


@pytest.mark.parametrize("case", READ)
def test_a_picture_is_read_right(case):
    content, right = READ[case]
    out = square(content, 16, case)
    assert out.shape == (16, 16, 3) and out.dtype == np.uint8 and right(out)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_a_picture_that_cannot_be_read_right_is_refused_before_anything_is_computed(tmp_path, case):
    content, says = REFUSED[case]
    make_folder(tmp_path, 2)
    (tmp_path / "in" / "01.png").write_bytes(content)
    with pytest.raises(ConfigError, match=f"data: .*01.png: .*({says})"):
        options_of("folder", tmp_path)


def test_every_picture_is_decoded_once_and_again_when_it_may_have_changed(tmp_path, monkeypatch):
    make_folder(tmp_path, 3)
    seen, check = [], hashes.check
    monkeypatch.setattr(hashes, "check", lambda content, name: seen.append(name[-6:]) or check(content, name))
    for expected in (["00.png", "01.png", "02.png"], []):
        data.forget()
        options_of("folder", tmp_path)
        assert seen == expected
        seen.clear()
    path, before = tmp_path / "in" / "01.png", os.stat(tmp_path / "in" / "01.png")
    content = path.read_bytes()
    path.write_bytes(flipped(content, len(content) - 30))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time: only ctime tells
    data.forget()
    with pytest.raises(ConfigError, match="01.png"):
        options_of("folder", tmp_path)
    path.write_bytes(content)
    monkeypatch.setattr(hashes, "CHECK", images.CHECK + 1)  # a stricter look takes nothing for seen
    seen.clear()
    options_of("folder", tmp_path)
    assert len(seen) == 3


def test_a_cache_of_hashes_that_is_something_else_is_made_again(tmp_path):
    make_folder(tmp_path, 2)
    first = options_of("folder", tmp_path)["fingerprint"]
    (file,) = hashes.cache_folder().glob("*.json")
    for text in ("[]", '{"a": 1}', "{", "[" * 10**5, '"\\ud800"', "\0"):
        file.write_text(text)
        data.forget()
        assert options_of("folder", tmp_path)["fingerprint"] == first


def test_a_picture_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "read_bytes", refuse)
    with pytest.raises(ConfigError, match=r"a\.png: cannot be read \(Permission denied\)"):
        ImageFile(tmp_path / "a.png").read()
