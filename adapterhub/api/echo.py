"""What an answer begins with when its prompt is echoed: the prompt's text, and where in it each token begins."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

from adapterhub.base.text import TextCodec


class Echo(NamedTuple):
    """`starts` [tokens]: how many characters of `text` come before each."""

    text: str
    starts: list[int]


def echo_of(codec: TextCodec, prompt: str | list[int]) -> Echo:
    """A text as it was given; tokens as the text that they are, without a last character that is not whole."""
    pieces = codec.pieces(prompt)
    starts = list(accumulate(map(len, pieces[:-1]), initial=0))
    return Echo(prompt if isinstance(prompt, str) else "".join(pieces), starts)
