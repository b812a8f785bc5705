"""Loading and splitting, in process: the section that all scripts have in common."""

# ruff: noqa: D103 - the names of the tests are their docstrings

import itertools
import os
import re
import time
from argparse import Namespace
from pathlib import Path

import pypdf
import pytest
from conftest import write_pdf
from fake_llm import count_tokens
from semantic_text_splitter import TextSplitter

import rag_faiss_openai as rag


def load(*paths):
    return rag.load_documents([str(path) for path in paths])


def texts(chunks):
    return [chunk["text"] for chunk in chunks]


# --- load ---


def test_a_file_of_each_kind_is_read(samples):
    read = {Path(document["source"]).name: document["text"] for document in load(samples)}
    assert read["beavers.txt"] == "Beavers build dams. The dam at Aldermoor is 41 m long.\n"
    assert "rises for 19 hours" in read["bread.md"]
    assert "Quillet whistles in G major" in read["tea.rst"]
    assert re.search(r"Marrow\s+has 7 sleeping cars & a\xa0bar", read["trains.html"])
    assert not re.search("vermilion|tracker|</?[a-z]+>", read["trains.html"])
    assert re.search("212 plum trees.*Mirabelle.*330 baskets", read["orchard.docx"], re.S)
    assert "copper" in read["comet.pdf"]
    assert len(read) == 6


def test_the_pages_of_a_pdf_keep_their_numbers_even_after_a_blank_one(tmp_path):
    pages = load(write_pdf(tmp_path / "gaps.pdf", "First\0.", "", "Third."))
    chunks = rag.split_documents(pages, rag.SPLITTER)
    assert [(chunk["page"], chunk["text"]) for chunk in chunks] == [(1, "First\0."), (3, "Third.")]


def test_a_folder_is_read_with_its_subfolders_and_nothing_hidden(tmp_path, capsys):
    folder = tmp_path / ".notes"  # which is named, and so no longer hidden
    names = ["a.txt", "deep/er/UPPER.TXT", "a.py", ".hidden.txt", ".git/b.txt", "deep/.venv/c.md"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"I am {name}.")
    assert texts(load(folder)) == ["I am a.txt.", "I am deep/er/UPPER.TXT."]
    assert capsys.readouterr().err == ""
    named = load(folder / ".hidden.txt", folder / "a.py")  # of any kind
    assert texts(named) == ["I am .hidden.txt.", "I am a.py."]


def test_links_that_lead_back_are_not_followed(tmp_path):
    (tmp_path / "a.txt").write_text("Read once.")
    for name in ("one", "two"):  # a walk through both in turn would have no end
        (tmp_path / name).symlink_to(".")
    assert texts(load(tmp_path)) == ["Read once."]


@pytest.mark.parametrize("name", [b"a[1].txt", b"*.txt", b"two words.txt", b"caf\xe9.txt"])
def test_a_file_of_any_name_is_read_and_can_be_sent(tmp_path, name):
    folder = tmp_path / "notes [old]"
    folder.mkdir()
    path = folder / os.fsdecode(name)
    path.write_text("Some text.")
    sources = [document["source"] for document in load(path, folder)]
    assert sources == [str(path).replace("\udce9", "\ufffd")] * 2
    hits = [{"n": 1, **document} for document in load(folder)]
    messages = rag.build_prompt("Why?", hits, Namespace(show_prompt=False))
    assert messages[1]["content"].encode()


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Füße über naïve — €", "utf-8"),
        ("第一只海狸\r\n", "utf-8"),
        ("Füße", "utf-8-sig"),
        ("Füße über Grün", "latin-1"),
        ("a “quoted” price: 3 €", "cp1252"),
        ("Füße €", "utf-16"),
    ],
)
def test_text_in_other_encodings_is_read(tmp_path, text, encoding):
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert texts(load(tmp_path)) == [text]


def write_encrypted_pdf(path, password):
    writer = pypdf.PdfWriter(clone_from=write_pdf(path, "The comet Brindle."))
    writer.encrypt(password, "owner", algorithm="AES-256")
    writer.write(path)


BAD_FILES = {
    "empty.txt": lambda path: path.write_bytes(b""),
    "blank.md": lambda path: path.write_bytes(b" \n\t\n\xc2\xa0"),
    "broken.pdf": lambda path: path.write_bytes(b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog"),
    "text.pdf": lambda path: path.write_bytes(b"I am no PDF at all."),
    "scan.pdf": lambda path: write_pdf(path, "", ""),
    "locked.pdf": lambda path: write_encrypted_pdf(path, "secret"),
    "broken.docx": lambda path: path.write_bytes(b"PK\x03\x04 cut short"),
    "dangling.txt": lambda path: path.symlink_to("nowhere.txt"),
    "picture.png": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_without_readable_text_is_named_and_the_rest_is_read(tmp_path, capsys, name):
    BAD_FILES[name](tmp_path / name)
    (tmp_path / "good.txt").write_text("Something to read.")
    assert texts(load(tmp_path / name, tmp_path / "good.txt")) == ["Something to read."]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1, "a line for the file"
    assert told[0].startswith(f"skipped {tmp_path / name}: ")


def test_an_empty_folder_has_no_documents_and_an_empty_password_is_no_lock(tmp_path):
    assert load(tmp_path) == []
    write_encrypted_pdf(tmp_path / "open.pdf", "")
    assert "Brindle" in texts(load(tmp_path))[0]


# --- split ---

PROSE = "".join(f"Sentence {n} tells of the {n * 31 % 97}th beaver. " for n in range(300))
TEXTS = {
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


def split(text, limit=8_191):
    by_tokens = TextSplitter.from_tiktoken_model("text-embedding-3-small", limit)
    return rag.split_documents([{"text": text, "source": "a.txt", "page": 3}], by_tokens)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("limit", [40, 256, 8_191])
def test_no_chunk_is_longer_than_the_embedder_reads_and_no_text_is_lost(name, limit):
    text = TEXTS[name].replace("\ud83d", "?")
    chunks = split(TEXTS[name], limit)
    for chunk in chunks:
        assert 0 < len(chunk["text"]) <= 800
        assert count_tokens(chunk["text"]) <= limit
        assert chunk["text"] in text
        assert (chunk["source"], chunk["page"]) == ("a.txt", 3)
    assert set("".join(texts(chunks))) >= set("".join(text.split()))
    words = set(" ".join(texts(chunks)).split())
    assert set(text.split()) <= words or limit == 40 or len(text.split()) == 1


def test_sentences_stay_whole_and_neighbours_overlap():
    chunks = texts(split(PROSE))
    assert all(len(chunk) > 800 / 2 for chunk in chunks[:-1])
    assert all(any(s in chunk for chunk in chunks) for s in re.findall("Sentence[^.]+[.]", PROSE))
    for before, after in itertools.pairwise(chunks):
        shared = max(n for n in range(len(after)) if before.endswith(after[:n]))
        assert 0 < shared <= 100


def test_the_same_text_is_kept_once_and_the_first_place_counts():
    places = [("The same.", "a.txt"), (" The same.\n", "b.txt"), ("Other.", "b.txt")]
    documents = [{"text": text, "source": source, "page": None} for text, source in places]
    chunks = rag.split_documents(documents, rag.SPLITTER)
    assert chunks == [documents[0], documents[2]]


def test_two_megabytes_are_split_in_a_few_seconds():
    line = "The {} beaver of Aldermoor counted {} logs, and then it went to sleep. "
    text = "".join(line.format(n, n * 7) for n in range(28_000))
    start = time.process_time()
    assert len(split(text)) > 2_000_000 / 800
    assert time.process_time() - start < 4
