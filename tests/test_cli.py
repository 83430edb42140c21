"""The `adapterhub` command as a user runs it, in a process of its own, against a real server."""

from __future__ import annotations

import json
import os
import pty
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel
from typer.testing import CliRunner

from adapterhub import __version__
from adapterhub.cli.main import app
from tests.serving import BASE, COMMAND, SECONDS, PeftFiles, Server, User, chat_lines, environment, run_cli


def ran(*arguments: str, said: str = "", user: User | None = None) -> str:
    """The standard output of a command that must succeed, and say nothing on stderr."""
    done = run_cli(*arguments, said=said, user=user)
    assert (done.returncode, done.stderr) == (0, ""), (done.stdout, done.stderr)
    return done.stdout


def failed(*arguments: str, said: str = "", user: User | None = None) -> str:
    """The one line on stderr of a command that must fail with status 1."""
    done = run_cli(*arguments, said=said, user=user)
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert re.fullmatch(r"error: \S.*\n", done.stderr), done.stderr
    return done.stderr


# -- the command itself


def test_it_says_its_version_and_what_each_command_does() -> None:
    assert ran("--version") == f"{__version__}\n"
    assert "adapterhub [OPTIONS] COMMAND" in ran("--help")
    for command in (
        ["serve"],
        ["doctor"],
        ["train"],
        ["chat"],
        *(["keys", c] for c in ("create",)),
        *(["jobs", c] for c in ("list", "show")),
        *(["adapters", c] for c in ("list", "show", "import", "export", "delete")),
    ):
        shown = CliRunner().invoke(app, [*command, "--help"], prog_name="adapterhub")
        assert shown.exit_code == 0
        assert f"Usage: adapterhub {' '.join(command)}".strip() in shown.stdout
    assert run_cli("nothing").returncode == 2


# -- keys


def test_keys_create_prints_the_key_alone_without_a_server_and_with_one(server: Server, tmp_path: Path) -> None:
    key = ran("keys", "create", "mira", "--data-dir", str(tmp_path / "new"))
    assert re.fullmatch(r"sk-ah-[\w-]{40,}\n", key)
    key = ran("keys", "create", "teo", "--data-dir", str(server.data_dir)).strip()
    assert server.as_user("teo", key).openai.models.list().data[0].id == BASE
    assert server.as_user("teo", key).http.get("/admin/tiers").status_code == 403
    key = ran("keys", "create", "root", "--admin", "--data-dir", str(server.data_dir)).strip()
    assert server.as_user("root", key).http.get("/admin/tiers").status_code == 200
    assert "not a valid owner" in failed("keys", "create", "a/b", "--data-dir", str(server.data_dir))


# -- adapters


def test_adapters_are_imported_listed_shown_and_deleted(user: User, adapter: PeftFiles) -> None:
    said = ran("adapters", "import", str(adapter.directory), "--name", "mine", user=user)
    assert said == f"Imported as {user.owner}/mine, version 1.\n"
    again = json.loads(ran("adapters", "import", str(adapter.directory), "--name", "mine", "--json", user=user))
    assert [v["number"] for v in again["versions"]] == [2, 1]
    [listed] = json.loads(ran("adapters", "list", "--json", user=user))
    assert (listed["name"], listed["rank"]) == ("mine", 4)
    assert listed["tier"] in ("disk", "device"), "another owner may use the very same block"
    table = ran("adapters", "list", user=user)
    assert all(text in table for text in (f"{user.owner}/mine", listed["tier"], "14.5 KiB", listed["id"]))
    for which in ("mine", f"{user.owner}/mine", listed["id"]):
        assert json.loads(ran("adapters", "show", which, "--json", user=user)) == listed
    shown = ran("adapters", "show", "mine", user=user)
    assert all(v["model"] in shown for v in listed["versions"])
    assert "import" in shown
    assert ran("adapters", "delete", "mine", "--yes", user=user) == f"Deleted {user.owner}/mine.\n"
    assert json.loads(ran("adapters", "list", "--json", user=user)) == []


def test_an_import_is_named_after_its_directory_unless_told_otherwise(user: User, adapter: PeftFiles) -> None:
    ran("adapters", "import", str(adapter.directory), user=user)
    [listed] = json.loads(ran("adapters", "list", "--json", user=user))
    assert listed["name"] == adapter.directory.name


def test_an_import_that_changes_nothing_warns(user: User, base_model: PreTrainedModel, tmp_path: Path) -> None:
    files = PeftFiles(base_model, tmp_path / "idle", size=0.0)
    assert "warning: All of its modules change nothing" in ran("adapters", "import", str(files.directory), user=user)


def test_what_was_imported_is_exported_bit_for_bit(user: User, other_adapter: PeftFiles, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    ran("adapters", "import", str(other_adapter.directory), "--name", "mine", user=user)
    assert ran("adapters", "export", "mine", "--out", str(out), user=user) == f"Wrote {out}.\n"
    sent, found = (load_file(d / "adapter_model.safetensors") for d in (other_adapter.directory, out))
    assert found.keys() == sent.keys()
    for name, tensor in sent.items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor.view(torch.uint8), found[name].view(torch.uint8)), name
    asked, got = (json.loads((d / "adapter_config.json").read_text()) for d in (other_adapter.directory, out))
    assert got == asked
    assert "exists already" in failed("adapters", "export", "mine", "--out", str(out), user=user)


def test_delete_asks_and_takes_silence_for_a_no(user: User, adapter: PeftFiles) -> None:
    ran("adapters", "import", str(adapter.directory), "--name", "mine", user=user)
    for said in ("n\n", "\n", ""):
        done = run_cli("adapters", "delete", "mine", said=said, user=user)
        assert done.returncode == 1
        assert f"Delete {user.owner}/mine and its 1 version(s)? This cannot be undone." in done.stdout
        assert len(json.loads(ran("adapters", "list", "--json", user=user))) == 1
    assert "Deleted" in ran("adapters", "delete", "mine", said="y\n", user=user)
    assert json.loads(ran("adapters", "list", "--json", user=user)) == []


def test_an_admin_lists_everybodys_adapters(server: Server, user: User, adapter: PeftFiles) -> None:
    user.import_adapter(adapter, "mine")
    found = json.loads(ran("adapters", "list", "--all", "--json", user=server.admin))
    assert f"{user.owner}/mine" in [a["model"] for a in found]
    assert "admin key" in failed("adapters", "list", "--all", user=user)


# -- from a file to a conversation


def test_train_follows_a_job_to_a_live_model_and_chat_talks_to_it(user: User, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(chat_lines(30))
    said = ran("train", str(file), "--name", "mine", user=user)
    model = user.openai.models.list().data[2].id
    assert f"Live as {model}" in said
    assert f"Try: adapterhub chat {user.owner}/mine" in said
    [job] = json.loads(ran("jobs", "list", "--json", user=user))
    assert (job["status"], job["fine_tuned_model"]) == ("succeeded", model)
    table = ran("jobs", "list", user=user)
    assert job["id"] in table
    assert "succeeded" in table
    shown = json.loads(ran("jobs", "show", job["id"], "--json", user=user))
    assert shown["events"][0]["message"] == f"Created fine-tuning job: {job['id']}"
    assert shown["events"][-1]["message"] == "The job has successfully completed"
    assert f"New fine-tuned model created: {model}" in ran("jobs", "show", job["id"], user=user)
    assert ran("chat", f"{user.owner}/mine", said="Say 3\n", user=user) == "Aye\n"


def test_train_says_why_a_job_failed(user: User, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(chat_lines(3))
    assert "has failed: Training file has 3 example(s)" in failed("train", str(file), "--name", "mine", user=user)
    assert "is not a file" in failed("train", str(tmp_path / "none.jsonl"), "--name", "mine", user=user)
    assert "not a valid suffix" in failed("train", str(file), "--name", "a/b", user=user)


def test_chat_answers_each_line_until_an_empty_one(user: User) -> None:
    turn = '{"role": "user", "content": "Say %d"}, {"role": "assistant", "content": "%s"}'
    lines = [f'{{"messages": [{turn % (i, "Aye")}, {turn % (i + 1, "Well")}]}}' for i in range(30)]
    user.job(user.train("\n".join(lines).encode(), suffix="mine"), "succeeded")
    said = ran("chat", f"{user.owner}/mine", said="Say 3\nSay 4\n\nSay 5\n", user=user)
    assert said == "Aye\nWell\n", "the second answer knows of the first"
    assert ran("chat", BASE, said="", user=user) == ""
    assert "does not exist" in failed("chat", "nobody/nothing", said="Hello\n", user=user)


def test_chat_shows_an_answer_as_it_comes(user: User) -> None:
    """On a terminal, where it also shows a prompt."""
    ours, theirs = pty.openpty()
    account = {"ADAPTERHUB_URL": user.url, "ADAPTERHUB_API_KEY": user.key}
    options: Any = {"stdin": theirs, "stdout": subprocess.PIPE, "text": False, "env": environment(**account)}
    with subprocess.Popen([str(COMMAND), "chat", BASE], **options) as process:
        os.write(ours, b"Hello\n")
        assert process.stdout is not None
        assert len(os.read(process.stdout.fileno(), 20)) > 0
        os.write(ours, b"\n")
        process.stdout.read()
        assert process.wait(SECONDS) == 0
    os.close(ours)
    os.close(theirs)


# -- doctor


def findings(*arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    done = run_cli("doctor", "--json", *arguments)
    assert done.stderr == ""
    return done.returncode, {f["check"]: f for f in json.loads(done.stdout)}


def test_doctor_is_content_with_good_data_and_names_a_damaged_block(
    server: Server, user: User, adapter: PeftFiles, base_model: PreTrainedModel, tmp_path: Path
) -> None:
    stored = server.stored()
    user.import_adapter(PeftFiles(base_model, tmp_path / "peft", seed=71), "mine")
    [name] = server.stored() - stored
    data = ("--data-dir", str(server.data_dir))
    table = ran("doctor", *data)
    assert "every digest right" in table
    assert "wrong" not in table
    block = server.data_dir / name
    whole = block.read_bytes()
    for damage in (whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        block.write_bytes(damage)
        status, found = findings(*data)
        assert status == 1
        assert [check for check, f in found.items() if not f["ok"]] == ["block files"]
        assert f"{user.owner}/mine, version 1, in {block}: " in found["block files"]["detail"]
    block.write_bytes(whole)


def test_doctor_names_a_database_that_is_none_and_needs_no_data(tmp_path: Path) -> None:
    status, found = findings("--data-dir", str(tmp_path))
    assert status == 0
    assert "holds no server's data yet" in found["data"]["detail"]
    assert list(tmp_path.iterdir()) == [], "it changes nothing"
    (tmp_path / "hub.db").write_bytes(b"not a database at all" * 100)
    status, found = findings("--data-dir", str(tmp_path))
    assert status == 1
    assert not found["database"]["ok"]
    assert "database" in failed("keys", "create", "mira", "--data-dir", str(tmp_path))


# -- errors


def test_errors_before_a_server_is_asked_are_one_line(tmp_path: Path) -> None:
    assert "ADAPTERHUB_API_KEY" in failed("adapters", "list")
    key = ("--api-key", "sk-ah-x")
    assert "adapterhub serve" in failed("jobs", "list", *key, "--url", "http://127.0.0.1:1")
    for url in ("nonsense", "http://[::1", "ftp://127.0.0.1"):
        failed("jobs", "list", *key, "--url", url)
    assert "--url" in failed("jobs", "list", "--api-key", "ключ")
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    assert "weights are a pickle" in failed("adapters", "import", str(tmp_path), *key)


def test_errors_of_the_server_are_its_own_message_in_one_line(user: User) -> None:
    assert "not valid" in failed("jobs", "list", "--api-key", "wrong", "--url", user.url)
    assert "no fine-tuning job 'nothing'" in failed("jobs", "show", "nothing", user=user)
    for name in ("nothing", "[/red]", "[bold]x"):
        assert f"You have no adapter '{name}'" in failed("adapters", "show", name, user=user)
        assert f"You have no adapter '{name}'" in failed("adapters", "delete", name, user=user)
        assert f"You have no adapter '{name}'" in failed("adapters", "export", name, "--out", "never", user=user)


@pytest.fixture
def stranger() -> Iterator[str]:
    """The URL of some other server."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"<html>Hello</html>"
            self.send_response(200 if "jobs" in self.path else 502)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{other.server_port}"
        other.shutdown()
        thread.join(SECONDS)


def test_a_server_that_is_something_else_is_told_from_ours(stranger: str) -> None:
    for command in (["jobs", "list"], ["adapters", "list"]):
        assert "Is it an AdapterHub server?" in failed(*command, "--api-key", "x", "--url", stranger)


def test_serve_says_in_one_line_why_it_cannot(base_directory: Path, tmp_path: Path) -> None:
    data = ("--data-dir", str(tmp_path / "data"))
    base = ("--base", str(base_directory))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"Cannot listen on 127.0.0.1:{port}" in failed("serve", *base, *data, "--port", port)
    assert "'lots' is not a size" in failed("serve", *base, *data, "--device-bytes", "lots")
    assert "cannot be loaded as a base" in failed("serve", "--base", str(tmp_path / "none"), *data, "--port", "0")
    assert "not a device" in failed("serve", *base, *data, "--port", "0", "--device", "abacus")
    (tmp_path / "file").touch()
    assert "file" in failed("serve", *base, "--data-dir", str(tmp_path / "file"), "--port", "0")
    for option in (("--port", "99999"), ("--port", "many"), ("--max-batch", "0"), ("--nothing",)):
        assert run_cli("serve", *base, *data, *option).returncode == 2
    assert not (tmp_path / "data").exists()
