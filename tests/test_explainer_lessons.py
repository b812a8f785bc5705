"""The lessons of rag_explainer.py really happen: with these models, these sentences, greedily."""

# ruff: noqa: D103 - the names of the tests are their docstrings

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import rag_explainer as rag

pytestmark = pytest.mark.slow
Ask = Callable[[dict[str, Any], list[str]], str]
each_domain = pytest.mark.parametrize("domain", range(4), ids=[t.name for t in rag.TOPICS])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with threadpool_limits(1, "blas"):
        yield


@pytest.fixture(scope="module")
def llm() -> rag.SmolLM:
    return rag.SmolLM()


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    embedder = rag.MiniLM()
    return rag.collect([rag.build_space(topic, embedder) for topic in rag.TOPICS], embedder)


@pytest.fixture(scope="module")
def ask(llm: rag.SmolLM) -> Ask:
    """The answer, as `generate` makes it, but without what it tells beside, and up to where it is
    right: less than half the time.
    """

    @functools.cache
    def generate(text: str, sentences: tuple[str, ...], expected: str) -> str:
        answer, read, cache = [], rag.tokenize(text, list(sentences), llm)[0], None
        while len(answer) < rag.MAX_ANSWER and not holds(llm.tokenizer.decode(answer), expected):
            scores, _, cache = llm.read(read, cache)
            read = [int(scores[-1].argmax())]
            if read[0] in llm.ends or "\n" in llm.tokenizer.decode(read):
                break
            answer += read
        return llm.tokenizer.decode(answer).strip()

    def ask(question: dict[str, Any], sentences: list[str]) -> str:
        return generate(question["text"], tuple(sentences), question["expected"])

    return ask


def holds(answer: str, expected: str) -> bool:
    return expected.lower() in answer.lower()


def answer_of(part: dict[str, Any], data: dict[str, Any], ask: Ask) -> tuple[bool, str]:
    domain = data["domains"][part["domain"]]
    question = domain["questions"][part["question"]]
    answer = ask(question, [domain["sentences"][n] for n in part["on"]])
    return holds(answer, question["expected"]), answer


@each_domain
def test_without_context_every_answer_is_wrong(domain, data, ask):
    for question in data["domains"][domain]["questions"]:
        answer = ask(question, [])
        assert answer
        assert not holds(answer, question["expected"]), answer


@each_domain
def test_with_the_nearest_sentences_the_plain_question_is_answered(domain, data, ask):
    on = rag.choices(data["domains"][domain]["questions"][0], data["domains"][domain])["nearest"]
    right, answer = answer_of({"domain": domain, "question": 0, "on": on}, data, ask)
    assert right, answer


@each_domain
@pytest.mark.parametrize("lesson", rag.LESSONS)
def test_each_failure_happens_and_is_mended(domain, lesson, data, ask):
    [scene] = [
        scene
        for scene in data["scenes"]
        if scene["fails"]["domain"] == domain and scene["lesson"] == lesson
    ]
    right, answer = answer_of(scene["fails"], data, ask)
    assert not right, answer
    right, answer = answer_of(scene["works"], data, ask)
    assert right, answer


def test_the_copying_heads_look_at_the_token_they_copy(llm, data, ask):
    """They nearly always look most at the word that comes next; the mean of all heads seldom."""
    hits, mean_hits, total = np.zeros(len(rag.COPY_HEADS)), 0, 0
    for domain in data["domains"]:
        for q, choice in ((0, "nearest"), (1, "diverse"), (2, "evidence"), (3, "nearest")):
            question = domain["questions"][q]
            on = rag.choices(question, domain)[choice]
            sentences = [domain["sentences"][n] for n in on]
            answer = llm.tokenizer.encode(ask(question, sentences)).ids
            tokens, owners = rag.tokenize(question["text"], sentences, llm)
            _, attention, _ = llm.read([*tokens, *answer[:-1]], rows=len(answer))
            context = [place for place, owner in enumerate(owners) if owner >= 0]
            words = [llm.tokenizer.decode([tokens[place]]) for place in context]
            for row, token in enumerate(answer):
                word = llm.tokenizer.decode([token])
                if not word.strip() or word.strip().lower() not in question["expected"].lower():
                    continue  # names and numbers are copied; other words it may know
                same = [n for n, other in enumerate(words) if rag.alike(other, word)]
                look = attention[:, :, row][:, :, context]
                hits += [look[layer, head].argmax() in same for layer, head in rag.COPY_HEADS]
                mean_hits += look.mean((0, 1)).argmax() in same
                total += 1
    shares, mean_share = hits / total, mean_hits / total
    assert total > 30
    assert shares.min() > 0.75, shares
    assert shares.mean() > 0.85, shares
    assert mean_share < 0.6, mean_share
