"""Loading and splitting, in process: the section that all scripts have in common."""

# ruff: noqa: D103 - the names of the tests are their docstrings

import itertools
import os
import re
import time
from pathlib import Path

import pypdf
import pytest
from conftest import write_pdf
from fake_llm import count_tokens
from semantic_text_splitter import TextSplitter

import rag_faiss_openai as rag


def load(*paths):
    return rag.load_documents([str(path) for path in paths])


def texts(documents):
    return [document.text for document in documents]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- load ---


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("beavers.txt", ["Beavers build dams. The dam at Aldermoor is 41 m long."]),
        ("bread.md", ["# Bread", "rises for 19 hours"]),
        ("tea.rst", ["Quillet whistles in G major"]),
        ("trains.html", ["Trains", "The night train to", "Marrow", "7 sleeping cars & a\xa0bar."]),
        ("orchard.docx", ["212 plum trees", "Variety", "Mirabelle", "330 baskets"]),
    ],
)
def test_a_file_of_each_kind_is_read(samples, file, words):
    [document] = load(samples / file)
    assert (document.source, document.page) == (str(samples / file), None)
    for word in words:
        assert word in document.text
    assert not re.search("vermilion|tracker|</?[a-z]+>", document.text)


def test_the_pages_of_a_pdf_keep_their_numbers_even_after_a_blank_one(tmp_path):
    pages = load(write_pdf(tmp_path / "gaps.pdf", "First.", "", "Third."))
    chunks = rag.split_documents(pages, rag.EMBED_MODEL)
    assert [(chunk.page, chunk.text) for chunk in chunks] == [(1, "First."), (3, "Third.")]


def test_a_folder_is_read_with_its_subfolders_and_nothing_hidden(samples, capsys):
    (samples / "deep" / "er").mkdir(parents=True)
    write(samples / "deep" / "er" / "UPPER.TXT", "Capitals count too.")
    write(samples / "code.py", "print(1)")
    for hidden in (".git", "deep/.venv"):
        (samples / hidden).mkdir()
        write(samples / hidden / "secret.txt", "secret")
    write(samples / ".hidden.txt", "secret")
    (samples / "loop").symlink_to(samples, target_is_directory=True)
    found = {Path(document.source).relative_to(samples) for document in load(samples)}
    names = "beavers.txt bread.md tea.rst trains.html comet.pdf orchard.docx deep/er/UPPER.TXT"
    assert {str(path) for path in found if "loop" not in path.parts} == set(names.split())
    assert "left out" not in capsys.readouterr().err


def test_a_folder_under_a_hidden_one_and_a_hidden_file_are_read_when_named(tmp_path):
    folder = tmp_path / ".notes"
    folder.mkdir()
    write(folder / "a.txt", "Read me.")
    write(folder / ".b.txt", "And me.")
    assert texts(load(folder, folder / ".b.txt")) == ["Read me.", "And me."]


@pytest.mark.parametrize("name", ["a[1].txt", "*.txt", "two words.txt", "ö.txt", "x" * 250 + ".md"])
def test_a_file_of_any_name_is_read(tmp_path, name):
    folder = tmp_path / "notes [old]"
    folder.mkdir()
    path = write(folder / name, "Some text.")
    write(folder / "b.py", "")
    assert [document.source for document in load(path, folder)] == [str(path)] * 2


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("Füße über naïve — €".encode(), "Füße über naïve — €"),
        ("\ufeffFüße".encode(), "Füße"),
        ("Füße über Grün".encode("latin-1"), "Füße über Grün"),
        ("a “quoted” price: 3 €".encode("cp1252"), "a “quoted” price: 3 €"),
        ("Füße €".encode("utf-16"), "Füße €"),
        ("\ufeffFüße €".encode("utf-16-be"), "Füße €"),
        ("第一只海狸".encode(), "第一只海狸"),
        (b"one\r\ntwo\r\n", "one\r\ntwo\r\n"),
    ],
    ids=["utf-8", "utf-8-bom", "latin-1", "cp1252", "utf-16-le", "utf-16-be", "chinese", "crlf"],
)
def test_text_in_other_encodings_is_read(tmp_path, content, text):
    assert texts(load(write(tmp_path / "a.txt", content))) == [text]


def encrypted_pdf(path, password):
    writer = pypdf.PdfWriter(clone_from=write_pdf(path, "The comet Brindle."))
    writer.encrypt(password, "owner", algorithm="AES-256")
    writer.write(path)


BAD_FILES = {
    "empty.txt": lambda path: write(path, b""),
    "blank.md": lambda path: write(path, b" \n\t\n\xc2\xa0"),
    "broken.pdf": lambda path: write(path, b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog"),
    "text.pdf": lambda path: write(path, b"I am no PDF at all."),
    "scan.pdf": lambda path: write_pdf(path, "", ""),
    "locked.pdf": lambda path: encrypted_pdf(path, "secret"),
    "broken.docx": lambda path: write(path, b"PK\x03\x04 cut short"),
    "dangling.txt": lambda path: path.symlink_to("nowhere.txt"),
    "picture.png": lambda path: write(path, b"\x89PNG\r\n\x1a\n" + bytes(100)),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_without_readable_text_is_named_and_the_rest_is_read(tmp_path, capfd, caplog, name):
    BAD_FILES[name](tmp_path / name)
    good = write(tmp_path / "good.txt", "Something to read.")
    assert texts(load(tmp_path / name, good)) == ["Something to read."]
    err = capfd.readouterr().err
    assert err.startswith(f"left out: {tmp_path / name}: ")
    assert (len(err.splitlines()), caplog.records) == (1, [])


def test_a_pdf_with_an_empty_password_is_read(tmp_path):
    encrypted_pdf(tmp_path / "open.pdf", "")
    assert "Brindle" in load(tmp_path / "open.pdf")[0].text


def test_an_empty_folder_has_no_documents(tmp_path):
    assert load(tmp_path) == []


def test_a_file_name_that_is_no_utf_8_is_read(tmp_path):
    raw = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    Path(os.fsdecode(raw)).write_text("Some text.")
    [document] = load(tmp_path)
    assert rag.build_prompt("Why?", [document]).encode()


# --- split ---

PROSE = "".join(
    f"Sentence {n} tells of the {n * 31 % 97}th beaver. " + "\n\n" * (n % 7 == 0)
    for n in range(300)
)
DENSE = {
    "prose": PROSE,
    "table": "\n".join(f"{n}|{n * n:x}|{n / 7:.6f}|§¶•" for n in range(600)),
    "code": "".join(f"x{n}=(a[{n}]<<{n % 8})&~0xFF;//{'=' * (n % 40)}\n" for n in range(400)),
    "chinese": "".join(f"第{n}只海狸在河边修建了一座水坝。" for n in range(400)),
    "no spaces": "".join(chr(0x3042 + n % 80) for n in range(9_000)),
    "one word": "x" * 10_000,
    "emoji": "👩🏽‍🚀🦫🪵" * 700,
    "lines": "\n" * 3_000 + "a" + "\n" * 3_000,
    "half characters": "half \ud83d done",
}


def split(text):
    return rag.split_documents([rag.Document(text, "a.txt", 3)], rag.EMBED_MODEL)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("max_tokens", [40, 256, 8_191])
def test_no_chunk_is_longer_than_the_embedder_reads_and_no_text_is_lost(
    monkeypatch, name, max_tokens
):
    splitter = TextSplitter.from_tiktoken_model("text-embedding-3-small", max_tokens)
    monkeypatch.setattr(rag, "token_splitter", lambda embed_model: splitter)
    text = DENSE[name].replace("\ud83d", "?")
    chunks = split(DENSE[name])
    for chunk in chunks:
        assert 0 < len(chunk.text) <= rag.CHUNK_CHARACTERS
        assert count_tokens(chunk.text) <= max_tokens
        assert chunk.text in text
        assert (chunk.source, chunk.page) == ("a.txt", 3)
    assert set("".join(texts(chunks))) >= set("".join(text.split()))
    if name in ("prose", "code") and max_tokens > 40:
        assert set(text.split()) <= {word for chunk in chunks for word in chunk.text.split()}


def test_the_openai_splitter_keeps_to_what_the_service_takes():
    chunks = rag.token_splitter(rag.EMBED_MODEL).chunks("beaver dam " * 9_000)
    assert 8_000 < max(map(count_tokens, chunks)) <= 8_191


def test_sentences_stay_whole_and_neighbours_overlap():
    text = PROSE.replace("\n\n", "")
    chunks = texts(split(text))
    assert all(len(chunk) > rag.CHUNK_CHARACTERS / 2 for chunk in chunks[:-1])
    for sentence in re.findall(r"Sentence[^.]+\.", text):
        assert any(sentence in chunk for chunk in chunks), sentence
    for before, after in itertools.pairwise(chunks):
        shared = max(n for n in range(len(after)) if before.endswith(after[:n]))
        assert 0 < shared <= rag.CHUNK_OVERLAP


def test_the_same_text_is_kept_once_and_the_first_place_counts():
    places = [("The same.", "a.txt"), (" The same.\n", "b.txt"), ("Other.", "b.txt")]
    documents = [rag.Document(text, source) for text, source in places]
    chunks = rag.split_documents(documents, rag.EMBED_MODEL)
    assert [chunk[:2] for chunk in chunks] == [("The same.", "a.txt"), ("Other.", "b.txt")]


def test_two_megabytes_are_split_in_a_few_seconds():
    line = "The {} beaver of Aldermoor counted {} logs, and then it went to sleep. "
    text = "".join(line.format(n, n * 7) for n in range(28_000))
    assert len(text) > 2_000_000
    start = time.process_time()
    assert len(split(text)) > 2_500
    assert time.process_time() - start < 10
