"""Prompts and captions are what stands in the file, to the letter; what cannot be that is refused with its file and line."""

import json
import unicodedata

import pytest
from fake_data import make_folder, options_of, own_cache, pairs_of, picture, write_csv  # noqa: F401  (own_cache: a fixture)

from harness import data
from harness.api import ConfigError
from harness.data.text import MAX_CAPTION
from harness.trial.images import prompts_of

ODD = ["a\u2028b", "a\u2029b", "a\u0085b", "a\x0bb", "a\x0cb", "a\x1cb\x1db\x1eb", '"quoted', 'say "hi" to', "  two  spaces  ",
       "\u3000wide\u3000", "e\u0301 and \xe9", "\u200bzero\u200d", "\U0001f468\u200d\U0001f469", "'",
       "#no comment", "a,b", "\ufeffmark", "x" * MAX_CAPTION]
"""Prompts that a reader of lines, of csv or a trimmer would change."""


def captions_in(path):
    return list(pairs_of(options_of("prompts", path), "reference").values())


def content(kind, prompts, end):
    if kind == "jsonl":
        return "".join(json.dumps({"prompt": text}, ensure_ascii=False) + end for text in prompts)
    if kind == "csv":
        return "".join('"' + text.replace('"', '""') + '"' + end for text in ["prompt", *prompts])
    return "".join(text + end for text in [*(["prompt"] if kind == "tsv" else []), *prompts])


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("kind", ["txt", "tsv", "csv", "jsonl"])
def test_a_file_of_n_prompts_has_n_prompts_to_the_letter(tmp_path, kind, end, mark):
    path = tmp_path / f"p.{kind}"
    path.write_bytes((mark + content(kind, ODD, end)).encode())
    assert captions_in(path) == ODD
    assert sorted(prompts_of(options_of("prompts", path), range(len(ODD)))) == sorted(ODD)


@pytest.mark.parametrize("kind", ["txt", "tsv", "csv", "jsonl"])
def test_the_captions_of_a_folder_are_read_to_the_letter(tmp_path, kind):
    texts = [text for text in ODD if len(text) < 100]
    rows = [(f"{index:02d}.png", text) for index, text in enumerate(texts)]
    for index, (file, _) in enumerate(rows):
        picture(tmp_path / file, index)
    path = tmp_path / f"captions.{kind}"
    if kind == "csv":
        write_csv(path, rows)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"file": file, "caption": text}) + "\n" for file, text in rows), encoding="utf-8")
    else:
        path.write_bytes("".join(f"{a}\t{b}\n" for a, b in ([("file", "caption")] if kind == "tsv" else []) + rows).encode())
    assert list(pairs_of(options_of("folder", tmp_path), "reference").values()) == texts


def test_a_quoted_field_keeps_its_line_ends_and_separators(tmp_path):
    (tmp_path / "p.csv").write_bytes(b'prompt,n\n"two\nlines, and ""quotes""",1\n\nplain,2\n')
    assert captions_in(tmp_path / "p.csv") == ['two\nlines, and "quotes"', "plain"]


def test_lines_of_spaces_and_tabs_are_no_prompts(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\n  \na\n\t\n\r\nb")
    assert captions_in(tmp_path / "p.txt") == ["a", "b"]


REFUSED = {
    "a quote that is never closed": ("csv", b'prompt\na\n"b\nc\nd\n', ["p.csv, line 3", "quote never closed"]),
    "a quote closed in mid-field": ("csv", b'prompt,n\n"a" b,1\n', ["p.csv, line 2", "quote"]),
    "a quote that swallows rows": ("csv", b'n,prompt\n1,"a\n2,"b"\n', ["p.csv, line 2", "quote"]),
    "a column twice": ("csv", b"prompt,prompt\na,b\n", ["line 1", "'prompt' is there twice"]),
    "too few fields": ("tsv", b"n\tprompt\n1\ta\n2\n", ["p.tsv, line 3", "1 fields and the header 2", "no quoting"]),
    "a tab too many": ("tsv", b"n\tprompt\n1\ta\tb\n", ["p.tsv, line 2", "3 fields"]),
    "a NUL": ("txt", b"a\nb\0c\n", ["p.txt, line 2", "NUL"]),
    "an escaped NUL": ("jsonl", b'{"prompt": "a"}\n{"prompt": "b\\u0000"}\n', ["line 2", "NUL"]),
    "half a character": ("jsonl", b'{"prompt": "a"}\n\n{"prompt": "b\\ud800"}\n', ["p.jsonl, line 3", "surrogates"]),
    "bytes of no text": ("txt", b"a\n\xff\xfe\n", ["p.txt", "not UTF-8", "save it as UTF-8"]),
    "another encoding": ("txt", "a\nb\n".encode("utf-16"), ["p.txt", "save it as UTF-8"]),
    "old line ends": ("txt", b"a\nb\rc\r", ["p.txt, line 2", "carriage return", "LF or CRLF"]),
    "a book in a line": ("txt", b"a\n" + b"x" * (MAX_CAPTION + 1), ["p.txt, line 2", "10001 characters", "shorten"]),
    "a field of a megabyte": ("csv", b"prompt\n" + b"x" * 2**21, ["p.csv, line 2", "field limit"]),
    "a number": ("jsonl", b'{"prompt": 3}\n', ["line 1", "'3' is no text"]),
    "a key twice": ("jsonl", b'{"prompt": "a", "prompt": "b"}\n', ["p.jsonl, line 1", "written twice"]),
    "no object": ("jsonl", b'{"prompt": "a"}\n[1]\n', ["p.jsonl, line 2", "expected an object"]),
    "deep nesting": ("jsonl", b'{"prompt": "a"}\n' + b"[" * 10**5 + b"\n", ["p.jsonl, line 2", "nested"]),
    "an empty field": ("csv", b'prompt\na\n""\n', ["1 of 2 captions", "empty"]),
    "nothing": ("txt", b"", ["holds nothing"]),
    "nothing but a header": ("tsv", b"prompt\n", ["no column"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_text_that_cannot_be_read_to_the_letter_is_refused(tmp_path, case):
    kind, written, words = REFUSED[case]
    (tmp_path / f"p.{kind}").write_bytes(written)
    with pytest.raises(ConfigError) as error:
        options_of("prompts", tmp_path / f"p.{kind}")
    assert all(word in str(error.value) for word in ["data", *words]) and len(str(error.value)) < 700, str(error.value)


def test_a_caption_in_two_unicode_forms_is_one_caption(tmp_path):
    forms = [unicodedata.normalize(form, "Café in Zürich") for form in ("NFC", "NFD")]
    assert forms[0] != forms[1]
    seen = []
    for folder, form in zip(("train", "test"), forms, strict=True):
        picture(tmp_path / folder / "in" / "00.png", len(seen))
        write_csv(tmp_path / folder / "captions.csv", [("in/00.png", form.upper() if seen else form)])
        seen.append(pairs_of(options_of("folder", tmp_path / folder), "reference"))
    assert seen[1]["in/00.png"] == forms[1].upper(), "the model is given the text as it stands"
    train = {"name": "folder", "path": str(tmp_path / "train")}
    with pytest.raises(ConfigError, match="1 training pairs leak.*has the caption of"):
        options_of("folder", tmp_path / "test", train=train)


def test_a_pair_falls_into_one_split_whatever_the_form_of_its_caption(tmp_path):
    splits = []
    for form in ("NFC", "NFD"):
        folder = make_folder(tmp_path / form, 40, unicodedata.normalize(form, "é {}"))
        options = options_of("folder", folder, reference_share=0.5)
        splits.append([pairs_of(options, split).keys() for split in ("train", "reference")])
    assert splits[0] == splits[1] and all(splits[0])


def test_a_file_is_found_by_its_name_in_another_unicode_form(tmp_path):
    picture(tmp_path / unicodedata.normalize("NFD", "café.png"))
    write_csv(tmp_path / "captions.csv", [(unicodedata.normalize("NFC", "café.png"), "a cup")])
    assert list(pairs_of(options_of("folder", tmp_path), "reference").values()) == ["a cup"]
    write_csv(tmp_path / "captions.csv", [(unicodedata.normalize(form, "café.png"), form) for form in ("NFC", "NFD")])
    data.forget()
    with pytest.raises(ConfigError, match="more than once"):
        options_of("folder", tmp_path)


def test_a_name_that_no_file_can_have_is_a_missing_image(tmp_path):
    make_folder(tmp_path, 1)
    write_csv(tmp_path / "captions.csv", [("x" * 300 + ".png", "a")])
    with pytest.raises(ConfigError, match="1 of 1 images.*missing"):
        options_of("folder", tmp_path)
    with pytest.raises(ConfigError, match="nothing at"):
        options_of("folder", tmp_path / ("y" * 300))


def test_a_fingerprint_tells_apart_what_tabs_and_line_ends_could_join(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x\\t\\n000001\\ty"}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
    found = [options_of("prompts", tmp_path / name)["fingerprint"] for name in ("a.jsonl", "b.jsonl")]
    assert found[0] != found[1]
