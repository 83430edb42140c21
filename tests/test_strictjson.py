"""JSON bodies: what is let through, against a reader that goes letter by letter; and who waits while a large one is
read."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.api import envelope, strictjson
from adapterhub.api.strictjson import MAX_DEPTH, MAX_VALUES, check_json
from adapterhub.errors import BadRequest
from tests.serving import SECONDS, Server, User

TEXTS = st.text(alphabet='[]{},:"\\ \n\tä€a', max_size=8)
VALUES = st.recursive(
    st.none() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXTS, inner, max_size=5),
    max_leaves=40,
)


def shape(text: str) -> tuple[int, int]:
    """How deep a text nests, and how many brackets and commas it has, strings aside."""
    depth = deepest = marks = 0
    letters = iter(text)
    for letter in letters:
        if letter == '"':
            for inner in letters:
                if inner == "\\":
                    next(letters, "")
                elif inner == '"':
                    break
        elif letter in "[{":
            depth += 1
            deepest, marks = max(deepest, depth), marks + 1
        elif letter in "]}":
            depth -= 1
        elif letter == ",":
            marks += 1
    return deepest, marks


def refused(body: bytes) -> str | None:
    try:
        check_json(body)
    except BadRequest as error:
        return error.message
    return None


@given(VALUES, st.integers(0, 8), st.integers(0, 12))
def test_what_json_says_is_let_through_up_to_its_limits_and_no_further(value: Any, depth: int, more: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strictjson, "MAX_DEPTH", depth)
        patch.setattr(strictjson, "MAX_VALUES", depth + more)
        for escaped in (True, False):
            text = json.dumps(value, ensure_ascii=escaped)
            deepest, marks = shape(text)
            fits = deepest <= depth and marks <= depth + more
            assert (refused(text.encode()) is None) == fits, text


@given(st.text(alphabet='[]{},:"\\1', max_size=40))
def test_nothing_that_can_be_read_gets_past_the_limits(text: str) -> None:
    """Texts that are mostly no JSON: an unclosed string or a stray backslash hides nothing that is read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strictjson, "MAX_DEPTH", 2)
        patch.setattr(strictjson, "MAX_VALUES", 4)
        if refused(text.encode()) is None:
            assert shape(text)[0] <= 2
            assert shape(text)[1] <= 4


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"1," * MAX_VALUES + b"1]",
        b"[" + b"[]," * MAX_VALUES + b"[]]",
        b"[" + b'"",' * MAX_VALUES + b'""]',
        b"{" + b"".join(b'"%d":"a",' % i for i in range(MAX_VALUES)) + b'"a":1}',
        b"[" * 2**23,
    ],
)
def test_a_body_of_too_many_values_is_refused_before_any_of_them_is_made(
    body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strictjson.json, "loads", lambda *_, **__: pytest.fail("it was read"))
    assert "more than the 262144 values" in str(refused(body))


def test_as_many_values_as_are_taken_are_taken() -> None:
    assert refused(b"[" + b"1," * (MAX_VALUES - 1) + b"1]") is None
    text = json.dumps([{"[" * 1000 + '"\\' * 100_000: ["," * 300_000]}] * 2)
    assert refused(text.encode()) is None, "what is in strings does not count"
    assert refused(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH) is None


def test_others_are_answered_while_a_large_body_is_checked(
    server: Server, user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, served = threading.Event(), threading.Event()

    def slow(body: bytes) -> None:
        begun.set()
        assert served.wait(SECONDS), "nobody is answered while a body is checked"
        check_json(body)

    monkeypatch.setattr(envelope, "check_json", slow)
    answers: list[int] = []
    large = json.dumps({"model": "none", "messages": [{"role": "user", "content": "a" * 2**20}]})
    asking = threading.Thread(
        target=lambda: answers.append(
            user.http.post(
                "/v1/chat/completions", content=large, headers={"content-type": "application/json"}
            ).status_code
        )
    )
    asking.start()
    assert begun.wait(SECONDS)
    assert server.user().http.get("/v1/models").status_code == 200
    assert server.admin.http.get("/healthz").status_code == 200
    served.set()
    asking.join(SECONDS)
    assert answers == [404]
