"""Every kind of fault that a schema can find is told in words of ours."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from miniplm.runtime.errors import UserError
from miniplm.runtime.schema import Count, Figure, Record, read_record


class Inner(Record):
    flag: bool = True
    name: str = ""


class Schema(Record):
    count: Count = 0
    figure: Figure = 0
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    pair: Annotated[list[int], Field(min_length=2, max_length=2)] = Field(default_factory=lambda: [1, 2])
    kind: Literal["a", "b"] = "a"
    parts: dict[str, Inner] = Field(default_factory=dict)
    nothing: None = None
    word: Annotated[str, Field(pattern="^w")] = "w"
    needed: int


FAULTS = [
    ([], "an object is expected"),
    ({}, "needed: it is missing"),
    ({"needed": "1"}, "needed: a whole number is expected"),
    ({"needed": True}, "needed: a whole number is expected"),
    ({"needed": 1, "count": -1}, "count: at least 0 is expected"),
    ({"needed": 1, "count": 2**63}, f"count: less than {2**63} is expected"),
    ({"needed": 1, "share": 0.0}, "share: more than 0.0 is expected"),
    ({"needed": 1, "share": 1.5}, "share: at most 1.0 is expected"),
    ({"needed": 1, "share": "x"}, "share: a number is expected"),
    ({"needed": 1, "pair": [1]}, "pair: at least 2 entries are expected"),
    ({"needed": 1, "pair": [1, 2, 3]}, "pair: at most 2 entries are expected"),
    ({"needed": 1, "pair": {}}, "pair: a list is expected"),
    ({"needed": 1, "kind": "c"}, "kind: 'a' or 'b' is expected"),
    ({"needed": 1, "parts": []}, "parts: an object is expected"),
    ({"needed": 1, "parts": {"{x}": 1}}, "parts.{x}: an object is expected"),
    ({"needed": 1, "parts": {"x": {"flag": 1}}}, "parts.x.flag: true or false is expected"),
    ({"needed": 1, "parts": {"x": {"name": 1}}}, "parts.x.name: text is expected"),
    ({"needed": 1, "nothing": 1}, "nothing: null is expected"),
    ({"needed": 1, "word": "{gt} %s"}, "word: not what it should be"),
]


@pytest.mark.parametrize(("value", "reason"), FAULTS)
def test_reasons(value, reason):
    with pytest.raises(UserError) as caught:
        read_record(Schema, value, "x.json is damaged", "make it again")
    assert str(caught.value) == f"x.json is damaged ({reason}): make it again"


def test_a_figure_is_finite():
    with pytest.raises(UserError, match="a finite number is expected"):
        read_record(Schema, {"needed": 1, "figure": float("nan")}, "x", "y")
