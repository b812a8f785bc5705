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

Ask = Callable[[str, tuple[str, ...]], str]
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
    """The answer, as `generate` makes it, but without what it tells beside: half the time."""

    @functools.cache
    def ask(question: str, sentences: tuple[str, ...]) -> str:
        answer, read, cache = [], rag.tokenize(question, list(sentences), llm)[0], None
        while len(answer) < rag.MAX_ANSWER:
            scores, _, cache = llm.read(read, cache)
            read = [int(scores[-1].argmax())]
            if read[0] in llm.ends or "\n" in llm.tokenizer.decode(read):
                break
            answer += read
        return llm.tokenizer.decode(answer).strip()

    return ask


def is_right(question: dict[str, Any], answer: str) -> bool:
    return question["expected"].lower() in answer.lower()


def answer_of(part: dict[str, Any], data: dict[str, Any], ask: Ask) -> tuple[bool, str]:
    domain = data["domains"][part["domain"]]
    question = domain["questions"][part["question"]]
    answer = ask(question["text"], tuple(domain["sentences"][n] for n in part["on"]))
    return is_right(question, answer), answer


@each_domain
def test_without_context_every_answer_is_wrong(domain, data, ask):
    for question in data["domains"][domain]["questions"]:
        answer = ask(question["text"], ())
        assert answer
        assert not is_right(question, answer), answer


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


def test_the_copying_heads_look_at_the_token_they_copy(llm):
    """Of all 270 heads, those of COPY_HEADS: the others, and the mean of all, look elsewhere."""
    hits, mean_hits, total = np.zeros(len(rag.COPY_HEADS)), 0, 0
    for topic in rag.TOPICS:
        question = topic.questions[0]
        tokens, owners = rag.tokenize(question.text, list(topic.sentences), llm)
        [n] = question.evidence
        context = np.array([place for place, owner in enumerate(owners) if owner == n])
        # The sentence itself as the answer, from its second token on: each stands in the context.
        answer = [tokens[place] for place in context]
        _, attention, _ = llm.read([*tokens, *answer[:-1]], rows=len(answer) - 1)
        everything = [place for place, owner in enumerate(owners) if owner >= 0]
        for row, (token, place) in enumerate(zip(answer[1:], context[1:], strict=True)):
            look = attention[:, :, row][:, :, everything]
            at = everything.index(place)
            hits += [look[layer, head].argmax() == at for layer, head in rag.COPY_HEADS]
            mean_hits += look.mean((0, 1)).argmax() == at
            total += 1
            assert token == tokens[place]
    assert (hits / total).min() > 0.8, hits / total
    assert mean_hits / total < 0.5, mean_hits / total
