"""How tools are told to a base, and how it calls them: `<tool_call>` around a JSON object, as Hermes and Qwen write it.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

A chat template that writes calls this way is given the tools. For any other, the system message tells of them, calls
are part of what the assistant says, and results part of what the user says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]
Tool = dict[str, Any]  # as OpenAI writes it: {"type": "function", "function": {"name", "description", "parameters"}}
BEGIN = "<tool_call>"
END = "</tool_call>"
_TOLD = """# Tools

You can call functions to help with what the user asks. These are the functions, one JSON object a line:
<tools>
{tools}
</tools>

To call one, answer with a JSON object with its name and arguments within <tool_call></tool_call>:
<tool_call>
{{"name": <function-name>, "arguments": <arguments-as-an-object>}}
</tool_call>"""


def call_head(name: str) -> str:
    """What a call is written with, up to its arguments; a brace follows these."""
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '


def written_out(messages: Sequence[Message], tools: Sequence[Tool], *, system: bool) -> list[Message]:
    """The conversation with everything about tools in its texts. `system`: whether the template takes such a message;
    else the first message tells of the tools."""
    plain: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if plain and plain[-1].get("result"):
                plain[-1]["content"] += f"\n{result}"
            else:
                plain.append({"role": "user", "content": result, "result": True})
        elif calls := message.get("tool_calls"):
            parts = [message["content"]] if message["content"] else []
            plain.append({"role": message["role"], "content": "\n".join([*parts, *map(_call, calls)])})
        else:
            plain.append(message)
    plain = [{key: value for key, value in message.items() if key != "result"} for message in plain]
    if not tools:
        return plain
    told = _TOLD.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    first = plain[0] if plain else None
    if first is not None and first["role"] in ("system", "developer"):
        return [{**first, "content": f"{first['content']}\n\n{told}"}, *plain[1:]]
    if system or first is None:
        return [{"role": "system", "content": told}, *plain]
    return [{**first, "content": f"{told}\n\n{first['content']}"}, *plain[1:]]


def _call(call: dict[str, Any]) -> str:
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return f"{BEGIN}\n{call_head(name)}{arguments}}}\n{END}"
