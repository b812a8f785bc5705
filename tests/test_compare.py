"""rag_compare.py: what it measures, how it runs scripts, what it shows."""

# ruff: noqa: D103 - the names of the tests are their docstrings

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from argparse import Namespace
from pathlib import Path

import pytest
import pytrec_eval
from axe_playwright_python.sync_playwright import Axe
from conftest import ROOT, command, environment, needs_chromium

import rag_compare as rag

OFFLINE = {"UV_OFFLINE": "1"}  # the scripts that it runs must not ask an index
HOSTILE = "<script>document.title='broken'</script><img src=http://127.0.0.1:9/x> {{ 7 * 7 }} [/b]"

# Keeps the collection's command line; retrieves by shared words. --mode says what is wrong with it.
FAKE = "# " + "/// script\n# dependencies = []\n# ///"  # in two: a checker takes this for a script
FAKE += """
import argparse, json, os, pathlib, re, signal, subprocess, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("question", nargs="*")
parser.add_argument("--docs", action="append")
parser.add_argument("--index")
parser.add_argument("--top-k", type=int)
parser.add_argument("--retrieve-only", action="store_true")
parser.add_argument("--json", action="store_true")
parser.add_argument("--mode", default="good")
parser.add_argument("--model", default="gpt-4o")
args = parser.parse_intermixed_args()
kept, mode = pathlib.Path(args.index), args.mode
if mode == "no-key":
    print("error: NO_KEY is not set: export NO_KEY=...", file=sys.stderr)
    sys.exit(2)
if args.docs:
    files = [f for d in args.docs for f in sorted(pathlib.Path(d).rglob("*.md"))]
    kept.write_text(json.dumps([[str(f), f.read_text()] for f in files]))
texts = json.loads(kept.read_text())
words = lambda text: set(re.findall(r"\\w+", text.lower()))
if mode == "daemon":  # what it starts holds its pipes
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pathlib.Path("daemon.pid").write_text(str(child.pid))
for n, question in enumerate(args.question, 1 if args.docs else 2):
    if mode == "hangs" and n == 3:
        pathlib.Path("hangs.pid").write_text(str(os.getpid()))
        time.sleep(600)
    if mode == "killed" and n == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "rubbish" and n == 3:
        print("Loading the model ...")
    if mode == "fewer" and n == 3:
        break
    best = 1 if mode == "reversed" else -1
    found = sorted(texts, key=lambda t: best * len(words(t[1]) & words(question)))[: args.top_k]
    sources = [{"n": i, "source": s, "page": None, "score": 1 / i, "text": t}
               for i, (s, t) in enumerate(found, 1)]
    fails = mode == "errors" and n == 3
    answer = None if args.retrieve_only or fails else os.environ.get("ANSWER", found[0][1] + " [1]")
    refused = answer is not None and "lawyer" in question
    usage = {"input_tokens": 100, "output_tokens": 10} if answer else None
    asked = "Something else?" if mode == "order" and n == 3 else question
    seconds = {"load": 0.1, "index": 0.5 if args.docs else 0.0, "retrieve": 0.001 * n,
               "first_token": 0.002 if answer else None, "generate": 0.004 + 0.001 * n}
    print(json.dumps({"question": asked, "answer": answer, "refused": refused,
                      "error": "HTTP 500" if fails else None, "sources": sources,
                      "model": args.model, "embed_model": "words", "usage": usage,
                      "seconds": seconds}), flush=True)
sys.exit(1 if mode == "errors" and len(args.question) > 2 else 0)
"""
NOTES = {
    "notes/mill.md": "The wheel of the Halden mill has 32 oak paddles.",
    "notes/fox.md": f"The hostile fox says {HOSTILE} at noon.",
    "notes/sub/ferry.md": "The ferry to Tornby leaves at 9:40, with room for twelve cars.",
}
QUESTIONS = [
    {"question": "How many paddles has the wheel?", "relevant": ["mill.md"], "answer": "32 Oak"},
    {"question": "When does the ferry leave Tornby?", "relevant": [{"text": "Leaves at 9:40"}]},
    {"question": "What does the hostile fox say?", "relevant": ["fox.md"], "answer": "owl"},
    {"question": "-v and --json are options of what?"},
    {"question": "What is the lawyer called?", "relevant": []},
]
GIVEN = ["--docs", "notes", "--questions", "q.jsonl"]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A fake script, documents and questions, in a folder where the test runs."""
    monkeypatch.chdir(tmp_path)
    Path("fake.py").write_text(FAKE)
    for name, text in NOTES.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    Path("q.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))


@pytest.fixture
def compare(files, monkeypatch, capsys):
    """Compare, and return what is printed; with --json, the object."""
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "80")

    def compare(*args, code=0):
        capsys.readouterr()
        assert rag.main([*args, *GIVEN]) == code, capsys.readouterr()
        done = capsys.readouterr()
        assert done.err == ""
        return json.loads(done.out) if "--json" in args else done.out

    return compare


def only(told):
    [script] = told["scripts"]
    return script


def in_one_line(text):
    return " ".join(text.split())


# --- the figures ---


def sources(*names):
    return [rag.Source(source=name, text=f"The text of {name}.") for name in names]


def record(**changes):
    plain = {"question": "?", "answer": "A", "refused": False, "error": None, "sources": []}
    return rag.Record.model_validate(plain | {"seconds": {}} | changes)


def test_ranking_measures_are_those_of_trec_eval():
    dice = random.Random(0)
    names = [f"{n}.md" for n in range(20)]
    for _ in range(100):
        ranked = dice.sample(names, dice.randint(1, 10))
        relevant = dice.sample(names, dice.randint(1, 12))
        measures = {"recip_rank", "ndcg_cut_10", "success_10"}
        judge = pytrec_eval.RelevanceEvaluator({"q": dict.fromkeys(relevant, 1)}, measures)
        theirs = judge.evaluate({"q": {name: -place for place, name in enumerate(ranked)}})["q"]
        question = rag.Question(question="?", relevant=relevant)
        ours = rag.score(question, record(sources=sources(*ranked)), Namespace(top_k=10))
        assert ours["MRR@k"] == pytest.approx(theirs["recip_rank"])
        assert ours["nDCG@k"] == pytest.approx(theirs["ndcg_cut_10"])
        assert ours["hit@k"] == theirs["success_10"]


def test_a_document_counts_once_and_a_label_matches_the_end_of_its_path():
    found = sources("n/x/a.md", "n/xa.md", "n/x/a.md", "b.md")
    assert rag.rank(found, ["x/a.md"]) == [True, False, False]
    assert rag.is_named("notes\\a.md", "a.md")


def test_a_label_can_name_a_passage_and_then_passages_are_ranked():
    texts = ("one", "two", "Its wheel, with 32\n paddles, turns.")
    same_file = [rag.Source(source="a.md", text=text) for text in texts]
    assert rag.rank(same_file, [rag.Passage(text="The wheel with 32 paddles")]) == [0, 0, 1]
    assert rag.rank(same_file, [rag.Passage(text="33 paddles")]) == [0, 0, 0]


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("It is the QUARRY-meadow [1], I think.", "a quarry meadow", True),
        ("From 1911\u20131914, by \u201cEdda\u201d.", "1911", True),
        ("It was Rollo\u2019s.", "Rollo's", True),
        ("府的磨坊建于1764年。", "磨坊", True),
        ("それは１７６４年です。", "1764年", True),
        ("There are 32 [1].", "1", False),
        ("There are 132.", "32", False),
    ],
)
def test_an_answer_contains_the_expected_words_whole(answer, expected, right):
    assert rag.contains(answer, expected) == right


def test_token_f1_is_that_of_squad_and_counts_characters_where_nothing_divides_words():
    assert rag.token_f1("The quarry meadow.", "a Quarry Meadow") == 1
    assert rag.token_f1("in the quarry", "quarry meadow") == 0.5
    assert rag.token_f1("磨坊建于", "磨坊") == pytest.approx(2 / 3)
    assert rag.token_f1("", "elm") == 0


def test_an_interval_covers_its_mean_and_is_none_where_nothing_varies():
    found = rag.interval([0.0, 1.0, 1.0, 1.0] * 10)
    assert found
    assert found["mean"] == 0.75
    # The normal approximation: 0.75 -+ 1.96 * sqrt(0.75 * 0.25 / 40)
    assert found["low"] == pytest.approx(0.616, abs=0.04)
    assert found["high"] == pytest.approx(0.884, abs=0.04)
    assert rag.interval([1.0, 1.0]) == {"mean": 1.0, "questions": 2}
    assert rag.interval([]) is None


def test_figures_leave_out_cold_starts_and_are_none_where_not_known():
    seconds = {"retrieve": 0.5, "first_token": 0.25, "generate": 2.0}
    usage = {"input_tokens": 1_000, "output_tokens": 100}
    warm = record(seconds=seconds, usage=usage, model="gpt-4o")
    cold = record(seconds=seconds | {"retrieve": 9.0}, usage=usage, model="gpt-4o")
    refusal = record(seconds=seconds | {"retrieve": 1.0}, refused=True)  # asked no LLM
    failure = record(answer=None, error="HTTP 500")
    script = rag.Script("fake", "fake.py", [], starts=[20.0, 5.0])
    script.records = [cold, cold, warm, refusal, failure]
    found = rag.measure(script, Namespace(prices=rag.PRICES))
    assert (found["start and index s"], found["start s"]) == (20, 5)
    assert found["retrieve s"] == 0.75
    assert found["first token s"] == 1.0
    assert found["answer s"] == 2.75
    assert (found["tokens in"], found["tokens out"], found["errors"]) == (1_000, 100, 1)
    assert found["USD / 1,000 questions"] == pytest.approx((2.5 + 1.0) * 3 / 4)
    assert found["nDCG@k"] is None
    assert rag.measure(script, Namespace(prices={}))["USD / 1,000 questions"] is None


def test_the_better_script_is_named_only_where_the_questions_tell():
    def script(name, *values):
        scores = [{"nDCG@k": value} for value in values]
        figures = {"nDCG@k": rag.interval(list(values)), "expected in answer": None}
        return rag.Script(name, f"{name}.py", [], scores=scores, figures=figures)

    good, bad = script("good", *[1.0, 0.8] * 10), script("bad", *[0.5, 0.6] * 10)
    [line] = rag.compare_best([bad, good])
    told = r"By nDCG@k, good is better than bad: 0.35 \(0.2\d\.\.0.4\d\) on 20 questions\."
    assert re.fullmatch(told, line)
    close = script("close", 0.5, 1.0, *[1.0, 0.8] * 9)
    [line] = rag.compare_best([close, good])
    assert "good is not clearly better than close" in line


# --- running scripts ---


def test_scripts_are_compared_in_a_table(compare):
    text = compare("fake.py", "fake.py --mode reversed", "--top-k", "2")
    assert re.search(r"nDCG@k +1\.00 +0\.\d\d", text)
    assert re.search(r"errors +0 +0", text)
    assert "By nDCG@k, fake is not clearly better than fake --mode reversed" in in_one_line(text)
    assert max(map(len, text.splitlines())) <= 80


def test_json_has_all_that_was_asked_and_measured(compare, monkeypatch):
    monkeypatch.setattr(rag, "BATCH", 2)  # questions in a process
    told = compare("fake.py", "--json", "--top-k", "2")
    script = only(told)
    assert script["status"] == "ok"
    assert [r["question"].strip() for r in script["records"]] == [q["question"] for q in QUESTIONS]
    assert told["questions"][0]["relevant"] == ["mill.md"]
    figures = script["figures"]
    assert figures["hit@k"] == {"mean": 1.0, "questions": 3}
    assert figures["expected in answer"]["mean"] == 0.5
    refused = [figures[f"{kind}: refused"]["mean"] for kind in ("unanswerable", "answerable")]
    assert refused == [1, 0]
    assert (figures["LLM"], figures["embedder"]) == ("gpt-4o", "words")
    assert 0 < figures["start s"] < 20
    assert [len(r["sources"]) for r in script["records"]] == [2] * 5
    assert len(script["starts"]) == 3


def test_options_of_a_script_go_before_ours_and_given_prices_before_the_built_in(compare):
    names = ["fake.py --top-k 1", "fake.py --model mine", "fake.py --model other --retrieve-only"]
    told = compare(*names, "--json", "--price", "mine", "10", "20")["scripts"]
    assert [len(script["records"][0]["sources"]) for script in told] == [1, 3, 3]
    assert told[2]["figures"]["expected in answer"] is None
    costs = [script["figures"]["USD / 1,000 questions"] for script in told]
    built_in = 1_000 * (100 * 2.5 + 10 * 10) / 1e6
    assert costs == [pytest.approx(built_in), pytest.approx(1.2), None]


WRONG = {
    "hangs": "printed nothing for 5 s",
    "killed": "was killed by SIGKILL",
    "rubbish": "printed no record: Loading the model",
    "fewer": "ended after 2 records",
    "order": "answered what was not asked: Something else?",
}


def test_a_script_that_goes_wrong_says_so_and_does_not_stop_the_others(compare):
    names = [f"fake.py --mode {mode}" for mode in WRONG]
    told = compare(*names, "fake.py", "--json", "--timeout", "5", code=1)
    *wrong, right = told["scripts"]
    for script, reason in zip(wrong, WRONG.values(), strict=True):
        assert script["status"] == "failed"
        assert reason in script["reason"]
        assert len(script["records"]) == 2
    assert right["status"] == "ok"
    assert len(right["records"]) == 5


def test_a_script_that_cannot_take_part_is_a_line_that_says_why(compare):
    Path("other.py").write_text("print('usage: other')")
    text = in_one_line(compare("fake.py --mode no-key", "other.py", "fake.py"))
    assert "cannot run here: NO_KEY is not set: export NO_KEY=..." in text
    assert "other cannot run here: its --help names no --json" in text
    assert "NO_KEY" in compare("fake.py --mode no-key", code=2)


def test_questions_that_fail_are_counted_and_shown(compare):
    text = in_one_line(compare("fake.py --mode errors", code=1))
    assert "failed: 1 of 5 questions: HTTP 500" in text
    assert "errors 1" in text


def is_alive(pid):
    """Whether a process is there, and no zombie."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        time.sleep(0.05)
    return True


def test_a_script_whose_child_holds_its_pipes_has_ended_and_so_has_the_child(compare):
    script = only(compare("fake.py --mode daemon", "--json", "--timeout", "3"))
    assert script["status"] == "ok"
    assert not is_alive(int(Path("daemon.pid").read_text()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_script_and_shows_what_was_measured(files, number):
    arguments = ["fake.py", "fake.py --mode hangs", "fake.py --mode reversed", *GIVEN]
    _, *rest = command("rag_compare.py", *arguments)
    process = subprocess.Popen(
        [shutil.which("uv") or "uv", *rest],
        env=environment(OFFLINE | {"PATH": "/usr/bin:/bin"}),  # `uv run` says where uv is
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pid, end = Path("hangs.pid"), time.monotonic() + 60
    while not (pid.exists() and pid.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.5)  # the record printed just before is read
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=30)
    assert process.returncode in (130, 143), err  # uv's own, where it was signalled too
    assert "Traceback" not in err
    assert not is_alive(int(pid.read_text()))
    assert re.search(r"hit@k +1\.00 +1\.00", out)
    assert "fake --mode hangs interrupted: after 2 records" in in_one_line(out)
    assert "fake --mode reversed not run: Ctrl-C came before" in in_one_line(out)


def test_an_interrupt_leaves_the_signals_as_they_were(files, monkeypatch):
    monkeypatch.setattr(rag, "run_all", lambda *_: signal.raise_signal(signal.SIGINT))
    before = [signal.getsignal(number) for number in rag.SIGNALS]
    assert rag.main(["fake.py", *GIVEN]) == 130
    assert [signal.getsignal(number) for number in rag.SIGNALS] == before
    assert signal.SIG_IGN not in before


# --- bad input ---


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("", "line 1: Invalid JSON"),
        ('{"question": "A?"}\n{"question": 3}', "line 2: question Input should be a valid string"),
        ('{"question": " "}', "line 1: question String should have at least 1 char"),
        ('{"question": "A?", "relevent": []}', "line 1: relevent Extra inputs"),
        ('{"question": "A?", "relevant": ["x.md"]}', "line 1: x.md names 0 files in"),
        ('{"question": "A?", "relevant": ["a.md"]}', "line 1: a.md names 2 files in"),
    ],
)
def test_a_bad_line_of_the_questions_is_named(files, capsys, lines, told):
    for name in ("notes/a.md", "notes/sub/a.md"):
        Path(name).write_text("A")
    Path("q.jsonl").write_text(lines)
    assert rag.main(["fake.py", *GIVEN]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["no.py", *GIVEN], "no such script: no.py"),
        (["fake.py 'open", *GIVEN], "No closing quotation"),
        (["fake.py", *GIVEN, "--report", "no/r.html"], "no/r.html"),
        (["fake.py", *GIVEN, "--price", "gpt-5", "1", "x"], "could not convert string to float"),
        (["fake.py", "--docs", "no", "--questions", "q.jsonl"], "mill.md names 0 files in ['no']"),
        (["fake.py", "--docs", "notes", "--questions", "no.jsonl"], "no.jsonl"),
        (["--docs", "notes"], "go together"),
        (["--top-k", "0"], "--top-k must be 1 or more"),
    ],
)
def test_what_the_user_can_mend_is_told_before_anything_runs(
    files, capsys, monkeypatch, arguments, told
):
    monkeypatch.setattr(rag, "run_all", lambda *_: pytest.fail("it ran"))
    try:
        code = rag.main(arguments)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert told in capsys.readouterr().err


# --- the collection's own scripts ---


def test_scripts_of_the_collection_are_compared_on_the_built_in_questions(run, llm):
    names = ["rag_faiss_openai.py", "rag_async.py"]
    for name in names:
        command(name)  # makes its environment
    done = run("rag_compare.py", *(str(ROOT / name) for name in names), "--json", env=OFFLINE)
    told = json.loads(done.stdout)
    assert [script["status"] for script in told["scripts"]] == ["ok", "ok"], told
    assert done.returncode == 0
    for script in told["scripts"]:
        figures = script["figures"]
        assert figures["hit@k"]["mean"] == 1
        assert figures["unanswerable: refused"] is not None
        assert figures["USD / 1,000 questions"] > 0
        assert figures["answer s"] > figures["retrieve s"] > 0
        assert 0 < figures["start s"] < 60
    assert len(llm.chat_requests) == 2 * len(told["questions"]), "each question is asked once"


# --- the page and the file ---


@needs_chromium
def test_the_report_is_one_page_that_asks_nothing_and_shows_hostile_text_as_text(
    compare, monkeypatch, browser
):
    monkeypatch.setenv("ANSWER", f"The fox says {HOSTILE}")
    names = ["fake.py", f"fake.py --mode reversed --model '{HOSTILE}'", "fake.py --mode no-key"]
    compare(*names, "--top-k", "1", "--report", "r.html")
    for width, scheme in ((1280, "light"), (390, "dark")):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        asked, complaints = [], []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.on("console", lambda told, said=complaints: said.append(told.text))
        page.goto(Path("r.html").absolute().as_uri())
        assert page.title() == "RAG scripts side by side"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert [url for url in asked if not url.startswith("file:")] == []
        assert complaints == []
        assert page.locator("script, article img").count() == 0
        assert HOSTILE in page.locator("article .said").first.inner_text()
        for name in ("nDCG@k against retrieve s", "expected in answer against answer s"):
            assert page.get_by_role("img", name=name).locator("circle").count() == 2
        assert page.locator("th[scope=row]", has_text="nDCG@k").count() == 1
        assert page.locator(".missed", has_text="not found by all").count() > 0
        assert page.locator("summary", has_text="relevant").count() > 0
        assert page.get_by_text("NO_KEY is not set").is_visible()
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        page.close()


def test_the_file_has_at_most_700_lines():
    assert len((ROOT / "rag_compare.py").read_text().splitlines()) <= 700
