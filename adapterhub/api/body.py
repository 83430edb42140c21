"""What the JSON bodies of requests have in common."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, model_validator


class Body(BaseModel):
    """A body whose texts can be stored, tokenized and sent back: JSON can write half of a surrogate pair, which is no
    character. Unknown fields are ignored."""

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        if isinstance(data, bytes):
            raise ValueError("it is not JSON; send it with Content-Type: application/json")
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError) as error:
            raise ValueError(f"it cannot be read as text ({error})") from error
        return data
