"""rag_compare.py: what it measures, how it runs scripts, what it shows."""

# ruff: noqa: D103 - the names of the tests are their docstrings

import functools
import json
import os
import random
import re
import signal
import subprocess
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
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
import argparse, json, os, pathlib, re, signal, sys, time
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
    kept.mkdir()
    kept.joinpath("all.json").write_text(json.dumps([[str(f), f.read_text()] for f in files]))
    print(f"index: {len(files)} chunks, {len(files)} of them new", file=sys.stderr)
texts = json.loads(kept.joinpath("all.json").read_text())
words = lambda text: set(re.findall(r"\\w+", text.lower()))
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
    {"question": "When does the ferry leave Tornby?", "relevant": ["sub/ferry.md"]},
    {"question": "What does the hostile fox say?", "relevant": ["fox.md"], "answer": "owl"},
    {"question": "-v and --json are options of what?"},
    {"question": "What is the lawyer called?", "relevant": []},
]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A fake script, documents and questions, in a folder where the test runs."""
    monkeypatch.chdir(tmp_path)
    Path("fake.py").write_text(FAKE)
    for name, text in NOTES.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    write_questions(*QUESTIONS)
    return tmp_path


def write_questions(*questions):
    Path("q.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))


GIVEN = ["--docs", "notes", "--questions", "q.jsonl", "--no-downloads"]


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


# --- the figures ----------------------------------------------------------------------------------


def test_ranking_metrics_are_those_of_trec_eval():
    dice = random.Random(0)
    names = [f"{n}.md" for n in range(20)]
    for _ in range(100):
        ranked = dice.sample(names, dice.randint(1, 10))
        relevant = dice.sample(names, dice.randint(1, 12))
        measures = {"recip_rank", "ndcg_cut_10", "success_10"}
        judge = pytrec_eval.RelevanceEvaluator({"q": dict.fromkeys(relevant, 1)}, measures)
        theirs = judge.evaluate({"q": {name: -place for place, name in enumerate(ranked)}})["q"]
        ours = [measure(ranked, relevant) for measure in (rag.reciprocal_rank, rag.ndcg, rag.hit)]
        expected = [theirs["recip_rank"], theirs["ndcg_cut_10"], theirs["success_10"]]
        assert ours == pytest.approx(expected)
    assert rag.reciprocal_rank([*map(str, range(10)), "z.md"], ["z.md"]) == 0, "beyond the tenth"


def test_passages_of_one_document_count_once_and_labels_match_by_the_end_of_a_path():
    sources = [rag.Source(source=s, text="") for s in ("n/x/a.md", "n/xa.md", "n/x/a.md", "a.md")]
    assert rag.rank_documents(sources, ["x/a.md"]) == ["x/a.md", "n/xa.md", "a.md"]
    assert rag.matches("./a.md", "notes\\a.md")


def test_an_interval_covers_its_mean_and_is_the_same_each_time():
    found = rag.interval([0.0, 1.0, 1.0, 1.0] * 10)
    assert found == rag.interval([0.0, 1.0, 1.0, 1.0] * 10)
    assert found
    assert found["mean"] == 0.75
    # The normal approximation: 0.75 -+ 1.96 * sqrt(0.75 * 0.25 / 40)
    assert found["low"] == pytest.approx(0.616, abs=0.03)
    assert found["high"] == pytest.approx(0.884, abs=0.03)
    assert rag.interval([]) is None


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("It is the QUARRY-meadow [1], I think.", "a quarry meadow", 1),
        ("From 1911\u20131914, by \u201cEdda\u201d.", "1911", 1),
        ("It was Rollo\u2019s.", "Rollo's", 1),
        ("It is the Quarry [1] meadow.", "The quarry meadow", 1),
        ("\u5e9c\u7684\u78e8\u574a\u5efa\u4e8e1764\u5e74\u3002", "\u78e8\u574a", 1),
        ("There are 32 [1].", "1", 0),
        ("There are 132.", "32", 0),
        (None, "32", 0),
    ],
)
def test_an_answer_contains_the_expected_words_whole(answer, expected, right):
    assert rag.contains(answer, expected) == right


def records(*changes):
    plain = {"question": "?", "answer": "A", "refused": False, "error": None, "sources": []}
    return [rag.Record.model_validate(plain | {"seconds": {}} | change) for change in changes]


def test_figures_of_a_script_are_worked_out_and_unknown_ones_are_none(files):
    script = rag.Script("fake.py", Path("fake.py"), "1.jsonl", first_answer=5.0, chunks=300)
    seconds = {"index": 12.0, "retrieve": 0.5, "first_token": 0.25, "generate": 2.0}
    usage = {"input_tokens": 1_000, "output_tokens": 100}
    script.opening = 2.0
    asked = {"seconds": seconds, "usage": usage, "model": "gpt-4o"}
    cold = asked | {"seconds": seconds | {"retrieve": 9.0}}  # the first of each process
    script.records = records(
        cold,
        cold,
        asked,
        {"seconds": seconds | {"retrieve": 1.0}, "usage": None, "refused": True},
        {"error": "HTTP 500", "answer": None},
    )
    questions = [
        rag.Question(question="?", answer="a b", relevant=r) for r in (None, None, None, [], ["x"])
    ]
    found = rag.work_out(script, questions, rag.PRICES, retrieve_only=False)
    assert found["chunks_per_s"] == 30
    assert found["first_token_s_p50"] == pytest.approx((0.75 + 1.25) / 2)
    assert found["answer_s_p95"] == pytest.approx(2.5 + 0.95 * 0.5)
    assert found["usd_per_1000"] == pytest.approx((2.5 + 1.0) * 3 / 4)  # a refusal asked nobody
    assert found["warm_start_s"] == pytest.approx(5.0 - 2.75)
    assert (found["retrieve_s"], found["wait_s"], found["rest_s"]) == (0.75, 0.25, 1.75)
    assert (found["answered"], found["errors"]) == (4, 1)
    assert (found["refused_unanswerable"], found["refused_answerable"]) == (1, None)
    assert found["ndcg_at_10"]["mean"] == 0
    assert rag.work_out(script, questions, {}, retrieve_only=False)["usd_per_1000"] is None
    script.chunks = 6
    assert rag.work_out(script, questions, {}, retrieve_only=False)["chunks_per_s"] is None


@pytest.fixture
def wheels(tmp_path):
    """The address of a folder of files, each of a million bytes, that is served."""
    for name in ("here", "other"):
        (tmp_path / f"{name}-1-py3-none-any.whl").write_bytes(bytes(1_000_000))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_download_is_that_of_the_wheels_for_this_machine(files, wheels, monkeypatch):
    def package(name, version, tags, size=""):
        wheel = f'url = "{wheels}/{name}-1-{tags}.whl", {size} hashes = {{sha256 = "00"}}'
        marker = f'marker = "python_version {version}"'
        return f'[[packages]]\nname = "{name}"\nversion = "1"\n{marker}\nwheels = [{{{wheel}}}]\n'

    def download(*packages):
        text = 'lock-version = "1.0"\ncreated-by = "test"\n' + "".join(packages)
        done = subprocess.CompletedProcess([], 0, text.encode(), b"")
        monkeypatch.setattr(rag.subprocess, "run", lambda *_, **__: done)
        rag.download_megabytes.cache_clear()
        return rag.download_megabytes(Path("fake.py"))

    here = package("here", ">= '3'", "py3-none-any")
    told = package("told", ">= '3'", "py3-none-any", "size = 500000,")
    other = package("other", "< '3'", "py3-none-any")
    assert download(here, told, other) == 1.5
    assert download(here, package("gone", ">= '3'", "py3-none-any")) is None
    assert download(here, package("here", ">= '3'", "cp27-none-any")) is None


def test_the_built_in_questions_fit_the_built_in_documents(tmp_path):
    args = rag.parse_arguments([])
    questions, documents = rag.prepare(args, tmp_path)
    assert sum(question.relevant == [] for question in questions) == 2
    for question in questions:
        for label in question.relevant or []:
            [document] = [d for d in documents if rag.matches(label, d)]
            assert rag.contains(Path(document).read_text(), question.answer or "")


# --- running scripts ------------------------------------------------------------------------------


def test_scripts_are_compared_in_a_table_with_their_differences_below(compare):
    text = compare("fake.py", "fake.py --mode reversed --top-k 2")
    assert re.search(r"nDCG@10 +1\.00 +0\.\d\d", text)
    assert re.search(r"answered / errors +5 / 0 +5 / 0", text)
    assert "How many paddles has the wheel?" in text
    assert "not all have:" in text
    assert max(map(len, text.splitlines())) <= 80


def test_json_tells_all_that_was_asked_and_measured(compare):
    told = compare("fake.py", "--json", "--top-k", "2")
    script = only(told)
    assert (script["status"], script["reason"]) == ("ok", None)
    assert [r["question"].strip() for r in script["records"]] == [q["question"] for q in QUESTIONS]
    assert told["questions"][0]["relevant"] == ["mill.md"]
    figures = script["figures"]
    assert figures["hit_at_k"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "questions": 3}
    assert figures["contains_expected"]["mean"] == 0.5
    assert (figures["refused_unanswerable"], figures["refused_answerable"]) == (1, 0)
    assert (figures["chunks"], figures["llm"], figures["download_mb"]) == (3, "gpt-4o", None)
    assert figures["usd_per_1000"] == pytest.approx(1_000 * (100 * 2.5 + 10 * 10) / 1e6)
    assert 0 < figures["warm_start_s"] < 20
    assert figures["lines_of_code"] > 20
    assert told["agreement"] == {"names": ["fake.py"], "overlap": [[1.0]]}
    assert [len(r["sources"]) for r in script["records"]] == [2] * 5
    script = only(compare("fake.py", "--json", "--retrieve-only"))
    assert {record["answer"] for record in script["records"]} == {None}
    assert script["figures"]["contains_expected"] is None


WRONG = {
    "hangs": "printed nothing for 3 s",
    "killed": "was killed by SIGKILL",
    "rubbish": "line 2 of its output is no record: Loading the model",
    "fewer": "ended after 2 answers, without an error",
    "order": "line 2 of its output answers 'Something else?'",
}


def test_a_script_that_goes_wrong_says_so_and_does_not_stop_the_others(compare):
    names = [f"fake.py --mode {mode}" for mode in WRONG]
    told = compare(*names, "fake.py", "--json", "--timeout", "3", code=1)
    *wrong, right = told["scripts"]
    for script, reason in zip(wrong, WRONG.values(), strict=True):
        assert script["status"] == "failed"
        assert reason in script["reason"]
        assert len(script["records"]) == 2
    assert right["status"] == "ok"
    assert len(right["records"]) == 5


def test_a_script_that_cannot_take_part_is_a_line_that_says_why(compare):
    Path("other.py").write_text("print('usage: other')")
    text = " ".join(compare("fake.py --mode no-key", "fake.py").split())
    assert "can't run here: NO_KEY is not set: export NO_KEY=..." in text
    alone = compare("fake.py --mode no-key", "other.py", code=2)
    assert "NO_KEY" in alone
    assert "--help names no --json" in alone


def test_questions_that_fail_are_counted_and_shown(compare):
    text = " ".join(compare("fake.py --mode errors", code=1).split())
    assert "1 questions failed, the first: HTTP 500" in text
    assert "answered / errors 4 / 1" in text


def is_alive(pid):
    """Whether a process is there, and no zombie."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_script_and_shows_what_was_measured(files, number):
    arguments = ["fake.py", "fake.py --mode hangs", "fake.py --mode reversed", *GIVEN]
    process = subprocess.Popen(
        command("rag_compare.py", *arguments),
        env=environment(OFFLINE),
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
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=30)
    assert process.returncode in (130, 143), err  # uv's own, where it was signalled too
    assert "Traceback" not in err
    assert not is_alive(int(pid.read_text()))
    assert re.search(r"answered / errors +5 / 0 +2 / 0", out)
    assert "was interrupted" in out
    assert "fake.py --mode reversed not run" in " ".join(out.split())


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("", "q.jsonl is empty"),
        ('{"question": "A?"}\n{"question": 3}', "line 2: question: Input should be a valid string"),
        ('{"question": "A?"}\n\n{"question": ', "line 3: Invalid JSON"),
        ('{"question": " "}', 'line 1: "question" is empty'),
        ('{"question": "A?", "relevent": []}', "line 1: relevent: Extra inputs"),
        ('{"question": "A?", "relevant": ["x.md"]}', "line 1: \"relevant\": 'x.md' names no docu"),
        ('{"question": "A?", "relevant": ["a.md"]}', "names 2 documents: write more of its path"),
        ('{"question": "A?", "relevant": [], "answer": "b"}', 'says that there is no "answer"'),
        ('{"question": "\\ud800"}', "line 1: Invalid JSON"),
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
        (["fake.py 'open", *GIVEN], "is no script with options"),
        (["fake.py", *GIVEN, "--report", "no/r.html"], "--report: no/r.html can't be written"),
        (["fake.py", *GIVEN, "--report", "notes"], "it is no file"),
        (["fake.py", *GIVEN, "--prices", "q.jsonl"], "the prices in q.jsonl can't be read"),
        (["fake.py", *GIVEN, "--trace", "fake.py"], "fake.py"),
        (["fake.py", "--docs", "no", "--questions", "q.jsonl"], "no such file or folder: no"),
        (["fake.py", "--docs", "notes", "--questions", "no.jsonl"], "the questions can't be read"),
        (["--docs", "notes"], "error: "),
        (["--timeout", "nan"], "error: "),
        (["--top-k", "0"], "error: "),
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


def test_a_reader_that_has_seen_enough_is_no_error(files):
    process = subprocess.Popen(
        command("rag_compare.py", "fake.py", *GIVEN),
        env=environment(OFFLINE),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr
    assert process.stderr.read() == ""


# --- prices, traces -------------------------------------------------------------------------------


def test_prices_of_a_file_go_before_the_built_in_ones(compare):
    Path("prices.json").write_text('{"gpt-4o": [1, 2], "mine": [10, 20]}')
    names = ["fake.py", "fake.py --model mine", "fake.py --model other"]
    told = compare(*names, "--json", "--prices", "prices.json")
    costs = [script["figures"]["usd_per_1000"] for script in told["scripts"]]
    assert costs == [pytest.approx(0.12), pytest.approx(1.2), None]


def test_a_later_run_tells_what_changed_since(compare, monkeypatch):
    monkeypatch.setenv("ANSWER", "32 oak")
    first = compare("fake.py", "--json", "--trace", "kept")
    assert first["changes"] is None
    [folder] = Path("kept").iterdir()
    run = json.loads((folder / "run.json").read_text())
    lines = (folder / run["scripts"][0]["file"]).read_text().splitlines()
    assert [json.loads(line) for line in lines] == only(first)["records"]
    assert run["scripts"][0]["figures"] == only(first)["figures"]

    monkeypatch.setenv("ANSWER", "owl")
    second = compare("fake.py", "--json", "--trace", "kept")
    changed = second["changes"]["scripts"]["fake.py"]
    assert {(c["before"], c["now"]) for c in changed["answers"]} == {("32 oak", "owl")}
    assert changed["passages"] == []
    assert set(changed["figures"]) <= {"warm_start_s"}, "times alone: half are right"

    text = compare("fake.py", "--top-k", "1", "--trace", "kept")
    assert f"Since {second['started']}" in text
    assert "other passages for: How many paddles has the wheel?" in " ".join(text.split())
    Path("notes/mill.md").write_text("Other documents: there is nothing to compare with.")
    assert compare("fake.py", "--json", "--trace", "kept")["changes"] is None


# --- the collection's own scripts -----------------------------------------------------------------


def test_scripts_of_the_collection_are_compared(run, llm, files):
    names = ["rag_faiss_openai.py", "rag_async.py"]
    for name in names:
        command(name)  # makes its environment
    arguments = [*(str(ROOT / name) for name in names), "--no-downloads", "--json"]
    done = run("rag_compare.py", *arguments, env=OFFLINE)
    told = json.loads(done.stdout)
    assert [script["status"] for script in told["scripts"]] == ["ok", "ok"], told
    assert done.returncode == 0
    for script in told["scripts"]:
        figures = script["figures"]
        assert figures["hit_at_k"]["mean"] > 0.8
        assert figures["refused_unanswerable"] is not None
        assert figures["chunks"] == len(rag.DOCUMENTS)
        assert figures["usd_per_1000"] > 0
        assert 0 < figures["warm_start_s"] < 60
        assert script["records"][0]["sources"][0]["source"].startswith("built-in")
    assert told["agreement"]["overlap"][0][1] == 1, "the same chunks, the same embedder"
    assert len(llm.chat_requests) == 2 * len(rag.QUESTIONS), "each question is asked once"


# --- the page -------------------------------------------------------------------------------------


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
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        assert complaints == []
        assert page.locator("script, article img").count() == 0
        assert HOSTILE in page.locator("article .said").first.inner_text()
        assert page.locator("figure svg").count() == 4
        assert page.get_by_role("img", name="Quality against time").is_visible()
        assert page.locator("th[scope=row]", has_text="nDCG@10").count() == 1
        assert page.get_by_text("not all have this").count() > 0
        assert page.get_by_text("NO_KEY is not set").is_visible()
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        page.close()
