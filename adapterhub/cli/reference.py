"""Writes the reference of the command line, `docs/cli.md`, from the code: `python -m adapterhub.cli.reference`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from typer.main import get_command

import adapterhub
from adapterhub.cli.client import Json, Key, Url
from adapterhub.cli.main import app
from adapterhub.config import default_data_dir

OUT = Path(adapterhub.__file__).parent.parent / "docs" / "cli.md"
_DATA_DIR = "~/.local/share/adapterhub"
_COMMON = {option: get_args(kind)[1].help for option, kind in (("--json", Json), ("--url", Url), ("--api-key", Key))}
_INTRODUCTION = """\
# The command line

Written from the code by `python -m adapterhub.cli.reference`.

`adapterhub serve` runs on the machine with the data; `doctor`, `keys` and `policy simulate` look into its data
directory. All others speak to a server over HTTP and take these:

- `--url URL`: the server, by default `http://127.0.0.1:8000`; or the variable `ADAPTERHUB_URL`.
- `--api-key KEY`: who asks; or the variable `ADAPTERHUB_API_KEY`. A server writes its operator's to `admin.key` in the
  data directory.
- `--json`: JSON instead of a table.

Sizes are written as in 512MiB or 2GiB, with units of 1024. What cannot be undone asks first, unless `--yes` is given.
An error is one line on stderr, with exit status 1; a wrong option ends with status 2.
"""


def reference() -> str:
    """The whole file."""
    return "\n".join([_INTRODUCTION, *(_section(*found) for found in commands())])


def commands() -> Iterator[tuple[str, Any]]:
    """Every command that does something, by its full name, groups flattened."""
    yield from _below("adapterhub", get_command(app))


def _below(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", None)
    if inner is None or (command.invoke_without_command and name != "adapterhub"):
        yield name, command
    for each, child in (inner or {}).items():
        yield from _below(f"{name} {each}", child)


def _section(name: str, command: Any) -> str:
    context = command.make_context(name, [], resilient_parsing=True)
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    own = [p for p in options if _COMMON.get(p.opts[0]) != p.help]
    common = [name for name in _COMMON if name in {p.opts[0] for p in options} - {p.opts[0] for p in own}]
    usage = [name, *("[OPTIONS]" for _ in own[:1]), *(_usage(p) for p in arguments)]
    lines = [f"## `{name}`\n", f"`{' '.join(usage)}`\n", f"{_one_line(command.help)}\n"]
    lines += [f"- `{_usage(argument)}`: {argument.help}" for argument in arguments]
    for option in own:
        what, about = option.get_help_record(context)
        what = re.sub(r"<list\[(.*)]>", r"<\1>...", what)
        lines.append(f"- `{what}`: {_portable(_one_line(about))}")
    if common:
        names = ", ".join(f"`{name}`" for name in common)
        lines.append(f"- {names}: see above")
    return "\n".join(lines) + "\n"


def _usage(argument: Any) -> str:
    return f"{argument.name.upper()}{'...' if argument.nargs == -1 else ''}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _portable(text: str) -> str:
    """Without what is so on this machine only."""
    return text.replace(str(default_data_dir()), _DATA_DIR)


if __name__ == "__main__":
    OUT.write_text(reference())
