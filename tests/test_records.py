"""Every line of a training file is taken as it should be, or refused with its number and the reason."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.errors import InvalidTrainingFile
from adapterhub.train.dataset import Kind
from adapterhub.train.records import MAX_LINE_BYTES, Chat, Completion, Pair, Source, read_records
from tests.datasets import ASK, SAY, chat, lines, preference


def refused(tmp_path: Path, line: Any, kind: Kind = Kind.SUPERVISED, param: str = "training_file") -> str:
    """Why a third line is not taken."""
    path = tmp_path / "data.jsonl"
    good = chat(ASK, SAY) if kind is Kind.SUPERVISED else preference(ASK)
    path.write_bytes(lines(good, b"", line))
    records = read_records(Source(path, param), kind)
    assert next(records).line.number == 1
    with pytest.raises(InvalidTrainingFile) as caught:
        next(records)
    error = caught.value
    assert (error.param, error.code) == (param, f"invalid_{param}")
    begins = f"Line 3 of the {param.replace('_', ' ')} cannot be used: "
    assert error.message.startswith(begins)
    return error.message.removeprefix(begins)


def changed(record: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A copy with other fields; those that are None go."""
    return {k: v for k, v in {**record, **fields}.items() if v is not None}


PREFERENCE = preference(ASK)
BAD_PREFERENCES: dict[str, tuple[Any, str]] = {
    "no input": (changed(PREFERENCE, input=None), "has no 'input'"),
    "no preferred": (changed(PREFERENCE, preferred_output=None), "has no 'preferred_output'"),
    "no other": (changed(PREFERENCE, non_preferred_output=None), "has no 'non_preferred_output'"),
    "input a list": (changed(PREFERENCE, input=[ASK]), "'input' must be an object with 'messages'"),
    "no messages": (changed(PREFERENCE, input={}), "'input.messages' must be a list with at least one message"),
    "bad role": (changed(PREFERENCE, input={"messages": [{**ASK, "role": "boss"}]}), "input.messages[0] has the role"),
    "tools": (changed(PREFERENCE, input={"messages": [ASK], "tools": [{}]}), "'input' has 'tools', which cannot"),
    "calls": (changed(PREFERENCE, preferred_output=[{**SAY, "tool_calls": [{}]}]), "preferred_output[0] has 'tool_cal"),
    "empty": (changed(PREFERENCE, preferred_output=[]), "'preferred_output' must be a list with at least one"),
    "two": (changed(PREFERENCE, preferred_output=[SAY, SAY]), "'preferred_output' must be one assistant message"),
    "a user's": (changed(PREFERENCE, non_preferred_output=[ASK]), "'non_preferred_output' must be one assistant"),
    "unlearned": (changed(PREFERENCE, preferred_output=[{**SAY, "weight": 0}]), "whose weight is not 0"),
    "text": (changed(PREFERENCE, preferred_output="Aye."), "'preferred_output' must be a list"),
    "no text": (changed(PREFERENCE, preferred_output=[{"role": "assistant"}]), "preferred_output[0] needs a text"),
    "a chat": (chat(ASK, SAY), 'create the job with "method": {"type": "supervised"}'),
    "a completion": ({"prompt": "a", "completion": "b"}, 'create the job with "method": {"type": "supervised"}'),
}


@pytest.mark.parametrize("case", BAD_PREFERENCES)
def test_a_preference_that_is_none_is_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    line, words = BAD_PREFERENCES[case]
    assert words in refused(tmp_path, line, Kind.DPO)


def test_a_preference_in_a_supervised_job_is_refused_with_what_to_do(tmp_path: Path) -> None:
    assert 'create the job with "method": {"type": "dpo"}' in refused(tmp_path, PREFERENCE)


def test_a_line_of_a_validation_file_is_refused_as_that(tmp_path: Path) -> None:
    assert "not JSON" in refused(tmp_path, b"{", param="validation_file")


def test_what_is_in_a_record_comes_through_and_other_fields_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    parts = [{"type": "text", "text": "A ship's "}, {"type": "text", "text": "cat."}]
    path.write_bytes(
        lines(
            chat({**ASK, "name": "x", "weight": None}, {**SAY, "weight": 0}, {"role": "assistant", "content": parts})
            | {"id": 5},
            {"prompt": "", "completion": "b", "weight": 3},
        )
    )
    one, two = read_records(Source(path, "training_file"), Kind.SUPERVISED)
    assert isinstance(one, Chat)
    assert one.messages == [ASK, SAY, SAY]
    assert one.learned == [False, False, True]
    path.write_bytes(lines(chat(ASK, {**SAY, "weight": None})))
    [unweighed] = read_records(Source(path, "training_file"), Kind.SUPERVISED)
    assert unweighed.learned == [False, True]
    assert isinstance(two, Completion)
    assert (two.prompt, two.completion, two.line.number) == ("", "b", 2)
    path.write_bytes(lines(PREFERENCE))
    [pair] = read_records(Source(path, "training_file"), Kind.DPO)
    assert isinstance(pair, Pair)
    assert (pair.messages, pair.preferred["content"], pair.non_preferred["content"]) == ([ASK], "Aye, captain.", "No.")


# -- anything at all

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_odd = _json | st.sampled_from(["user", "assistant", 0, 1, 0.5, True, "\ud83d", "x" * 1000, [], {}, [{"text": "a"}]])


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a record something can be put in another's place."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, v in inner for place in _places(v, (*at, key)))]


@st.composite
def almost(draw: st.DrawFn) -> bytes:
    """A good record of either kind after a few accidents, in its fields or its bytes."""
    weighed = chat(ASK, {**SAY, "weight": 0}, ASK, SAY)
    record = draw(st.sampled_from([weighed, {"prompt": "a", "completion": "b"}, preference(ASK, SAY, ASK)]))
    record = json.loads(json.dumps(record))
    for _ in range(draw(st.integers(0, 2))):
        *path, last = draw(st.sampled_from([p for p in _places(record) if p]))
        inner = record
        for key in path:
            inner = inner[key]
        if draw(st.booleans()):
            inner[last] = copy.deepcopy(draw(_odd))
        else:
            del inner[last]
        if not record:
            break
    text = json.dumps(record).encode()
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.binary(max_size=3)) + text[at + draw(st.integers(0, 3)) :]
    return text.replace(b"\n", b" ")


@given(line=almost() | _json.map(lambda v: json.dumps(v).encode()) | st.binary(max_size=60), kind=st.sampled_from(Kind))
def test_any_line_is_taken_or_refused_with_its_number(
    tmp_path_factory: pytest.TempPathFactory, line: bytes, kind: Kind
) -> None:
    line = line.replace(b"\n", b" ")
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    good = lines(chat(ASK, SAY) if kind is Kind.SUPERVISED else preference(ASK))
    path.write_bytes(good + line + b"\n" + good)
    source = Source(path, "training_file")
    message = None
    try:
        records = list(read_records(source, kind))
    except InvalidTrainingFile as error:
        message = error.message
    if message is not None:
        assert re.match(r"Line 2 of the training file cannot be used: .{5,400}\.$", message, re.DOTALL)
        message.encode()  # it is shown, so it must be text
        return
    assert [r.line.number for r in records] == ([1, 2, 3] if line.strip() else [1, 3])
    for record in records:
        match record:
            case Chat(_, messages, learned):
                assert kind is Kind.SUPERVISED
                assert any(learned)
                texts = [m["content"] for m in messages]
            case Completion(_, prompt, completion):
                assert kind is Kind.SUPERVISED
                assert completion
                texts = [prompt, completion]
            case Pair(_, messages, preferred, other):
                assert kind is Kind.DPO
                texts = [m["content"] for m in (*messages, preferred, other)]
        for text in texts:
            assert isinstance(text, str)
            text.encode()


@pytest.mark.parametrize("size", [MAX_LINE_BYTES - 1, MAX_LINE_BYTES])
def test_a_line_of_the_largest_size_is_taken(tmp_path: Path, size: int) -> None:
    frame = len(json.dumps({"prompt": "", "completion": "a"})) + 1  # with the end of the line
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines({"prompt": "x" * (size - frame), "completion": "a"}))
    assert path.stat().st_size == size
    assert len(list(read_records(Source(path, "training_file"), Kind.SUPERVISED))) == 1
    path.write_bytes(lines({"prompt": "x" * (MAX_LINE_BYTES - frame + 1), "completion": "a"}))
    with pytest.raises(InvalidTrainingFile, match="longer than 4194304 bytes"):
        list(read_records(Source(path, "training_file"), Kind.SUPERVISED))
