"""What the documents say of commands and routes is what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from adapterhub.api.app import create_app
from adapterhub.base.model import Base
from adapterhub.cli.reference import OUT, commands, reference
from adapterhub.config import Config

COMMANDS = dict(commands())


def test_the_reference_of_the_command_line_is_up_to_date() -> None:
    assert OUT.read_text() == reference(), "run python -m adapterhub.cli.reference"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_argument_and_option_says_what_it_does(name: str) -> None:
    command: Any = COMMANDS[name]
    assert command.help, name
    without = [parameter.name for parameter in command.params if not parameter.help]
    assert without == []


def test_every_route_is_in_the_documentation_of_the_api_and_no_other(llama: Base, tmp_path: Path) -> None:
    paths = create_app(Config(data_dir=tmp_path), llama).openapi()["paths"]
    routes = {(method.upper(), _nameless(path)) for path, methods in paths.items() for method in methods}
    documented = set()
    for row in re.findall(r"^\| (`.*?) \| ", (OUT.parent / "api.md").read_text(), flags=re.MULTILINE):
        for methods, path in re.findall(r"`([A-Z\\|]+) (/\S+)`", row):
            documented |= {(method, _nameless(path)) for method in methods.split(r"\|")}
    assert documented == routes | {("GET", path) for path in ("/healthz", "/readyz", "/metrics")}


def test_every_test_that_holds_up_a_promise_of_security_exists() -> None:
    tests = Path(__file__).parent
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (OUT.parent / "security.md").read_text())
    assert len(named) > 20
    assert [(file, test) for file, test in named if f"def {test}(" not in (tests / file).read_text()] == []


def _nameless(path: str) -> str:
    return re.sub(r"{.*?}", "{}", path)
