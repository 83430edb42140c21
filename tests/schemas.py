"""Random small JSON schemas whose answers are short: nothing in them goes on for ever."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]
_PATTERNS = ["^[a-c]{1,4}$", "^(yes|no)+$", "^\\d{3}-\\d{2}$", "^[^x]{2,5}$", "^(a+)+b$", "^\\w{1,3}!?$", "^é?ß$"]
_FORMATS = ["date", "time", "date-time", "uuid", "ipv4"]
_NAMES = ["a", "b", "name", "the \"one\"", "été", "x-y", "", "a\\b", "日本"]  # fmt: skip


def _bounds(low: str, high: str, most: int) -> st.SearchStrategy[Schema]:
    pairs = st.tuples(st.integers(0, most), st.integers(0, most))
    return pairs.map(lambda pair: {low: min(pair), high: max(pair)})


_STRINGS = st.one_of(
    _bounds("minLength", "maxLength", 6).map(lambda b: {"type": "string", **b}),
    st.sampled_from(_PATTERNS).map(lambda p: {"type": "string", "pattern": p}),
    st.sampled_from(_FORMATS).map(lambda f: {"type": "string", "format": f}),
)
_NUMBERS = st.one_of(
    st.builds(
        lambda a, b: {"type": "integer", "minimum": min(a, b), "maximum": max(a, b)}, *[st.integers(-200, 200)] * 2
    ),
    st.builds(
        lambda n, k: {"type": "integer", "multipleOf": n, "minimum": 0, "maximum": n * k}, *[st.integers(1, 9)] * 2
    ),
    st.integers(-5, 5).map(lambda n: {"type": "integer", "exclusiveMinimum": n, "exclusiveMaximum": n + 40}),
)
# a base can say only what its tokens spell, and the embedded one has none for planes where nothing is assigned
_TEXT = st.text(st.characters(exclude_categories=["Cs", "Cn", "Co"]), max_size=4)
_VALUES = st.none() | st.booleans() | st.integers(-9, 9) | _TEXT | st.lists(st.integers(0, 3), max_size=2)
_FIXED = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}]),
    _VALUES.map(lambda value: {"const": value}),
    st.lists(_VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values}),
)


def _objects(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    def made(properties: dict[str, Schema], wanted: set[str]) -> Schema:
        required = [name for name in properties if name in wanted]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return st.builds(
        made, st.dictionaries(st.sampled_from(_NAMES), inner, max_size=4), st.sets(st.sampled_from(_NAMES))
    )


def _arrays(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    return st.builds(lambda items, b: {"type": "array", "items": items, **b}, inner, _bounds("minItems", "maxItems", 3))


def _nested(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    alternatives = st.lists(inner, min_size=1, max_size=3).map(lambda several: {"anyOf": several})
    return st.one_of(_objects(inner), _arrays(inner), alternatives)


def _with_reference(schema: Schema, target: Schema) -> Schema:
    return {"$defs": {"it": target}, "anyOf": [schema, {"$ref": "#/$defs/it"}]}


_TREES = st.recursive(st.one_of(_STRINGS, _NUMBERS, _FIXED), _nested, max_leaves=8)
schemas = st.one_of(_TREES, st.builds(_with_reference, _TREES, _TREES), _objects(_TREES))
