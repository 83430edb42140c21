"""The `adapterhub` command as a user runs it, in a process of its own, against a real server."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zipfile
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
from adapterhub.cli.curve import sparkline
from adapterhub.cli.main import app
from tests.serving import (
    BASE,
    COMMAND,
    SECONDS,
    PeftFiles,
    Server,
    User,
    chat_lines,
    environment,
    eventually,
    run_cli,
    running,
    small_config,
)


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
        ["top"],
        *(["keys", c] for c in ("create",)),
        *(["jobs", c] for c in ("list", "show", "pause", "resume", "cancel", "checkpoints", "curve")),
        *(["adapters", c] for c in ("list", "show", "import", "export", "pin", "unpin", "evict", "delete")),
        *(["tiers", *c] for c in ([], ["set"])),
        *(["policy", c] for c in ("show", "set", "simulate")),
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


def on_terminal(*arguments: str, said: str, user: User) -> subprocess.CompletedProcess[str]:
    """The command with a terminal as its standard input, on which somebody types `said`."""
    ours, theirs = pty.openpty()
    os.write(ours, said.encode())
    environ = environment(ADAPTERHUB_URL=user.url, ADAPTERHUB_API_KEY=user.key)
    try:
        return subprocess.run(
            [str(COMMAND), *arguments], stdin=theirs, capture_output=True, text=True, env=environ, timeout=SECONDS
        )
    finally:
        os.close(ours)
        os.close(theirs)


def listed(*options: str, user: User) -> list[dict[str, Any]]:
    return json.loads(ran("adapters", "list", "--json", *options, user=user))


def zip_of(path: Path, folders: dict[str, PeftFiles]) -> Path:
    """A zip with an adapter's files in each folder ("": at its root)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for folder, files in folders.items():
            archive.writestr(f"{folder}adapter_config.json", files.config)
            archive.writestr(f"{folder}adapter_model.safetensors", files.weights)
    return path


def test_adapters_are_imported_listed_shown_and_deleted(user: User, adapter: PeftFiles) -> None:
    said = ran("adapters", "import", str(adapter.directory), "--name", "mine", user=user)
    assert said == f"Imported as {user.owner}/mine, version 1.\n"
    again = json.loads(ran("adapters", "import", str(adapter.directory), "--name", "mine", "--json", user=user))
    assert again["failed"] == []
    [imported] = again["imported"]
    assert [v["number"] for v in imported["versions"]] == [2, 1]
    assert imported["source"] == str(adapter.directory)
    [found] = listed(user=user)
    assert (found["name"], found["rank"]) == ("mine", 4)
    assert found["tier"] == "disk"
    table = ran("adapters", "list", user=user)
    assert all(text in table for text in (f"{user.owner}/mine", found["tier"], "14.5 KiB", "never"))
    for which in ("mine", f"{user.owner}/mine", found["id"]):
        assert json.loads(ran("adapters", "show", which, "--json", user=user)) == found
    shown = ran("adapters", "show", "mine", user=user)
    assert all(
        text in shown for text in (found["id"], "import", "not pinned", *(v["model"] for v in found["versions"]))
    )
    assert ran("adapters", "delete", "mine", "--yes", user=user) == f"Deleted {user.owner}/mine.\n"
    assert listed(user=user) == []


def test_an_import_is_named_after_its_directory_unless_told_otherwise(user: User, adapter: PeftFiles) -> None:
    ran("adapters", "import", str(adapter.directory), user=user)
    assert [a["name"] for a in listed(user=user)] == [adapter.directory.name]


def test_an_import_that_changes_nothing_warns(user: User, base_model: PreTrainedModel, tmp_path: Path) -> None:
    files = PeftFiles(base_model, tmp_path / "idle", size=0.0)
    said = ran("adapters", "import", str(files.directory), user=user)
    assert f"warning: {user.owner}/idle: All of its modules change nothing: A or B is zero." in said


def test_directories_of_directories_and_zips_are_imported_at_once(
    user: User, adapter: PeftFiles, other_adapter: PeftFiles, tmp_path: Path
) -> None:
    many = tmp_path / "many"
    for name, files in (("first", adapter), ("second", other_adapter)):
        shutil.copytree(files.directory, many / name)
    (many / "notes").mkdir()
    zip_of(many / "third.zip", {"": adapter})
    several = zip_of(tmp_path / "several.zip", {"fourth/": adapter, "deep/fifth/": other_adapter})
    said = ran("adapters", "import", str(many), str(several), user=user)
    names = ["first", "second", "third", "fifth", "fourth"]
    lines = [f"Imported as {user.owner}/{name}, version 1." for name in names]
    assert said.splitlines() == [*lines, "5 imported, 0 failed."]
    found = {a["name"]: a["versions"][0]["digest"] for a in listed(user=user)}
    assert found["first"] == found["third"] == found["fourth"] != found["second"] == found["fifth"]


def test_one_that_cannot_be_imported_does_not_hold_up_the_others(
    user: User, adapter: PeftFiles, tmp_path: Path
) -> None:
    many = tmp_path / "many"
    for name in ("a", "b", "c d", "e"):
        shutil.copytree(adapter.directory, many / name)
    (many / "b" / "adapter_model.safetensors").rename(many / "b" / "adapter_model.bin")
    whole = zip_of(tmp_path / "whole.zip", {"": adapter}).read_bytes()
    broken = whole[:5000] + bytes(100) + whole[5100:]
    (many / "f.zip").write_bytes(broken)
    (many / "g.zip").write_text("no zip at all")
    done = run_cli("adapters", "import", str(many), user=user)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "2 imported, 4 failed."
    pickled, name, damaged, other = done.stderr.splitlines()
    assert pickled.startswith(f"error: {many}/b: ")
    assert "weights are a pickle" in pickled
    assert name.startswith(f"error: {many}/c d: 'c d' is not a valid name")
    assert damaged.startswith(f"error: {many}/f.zip: {many}/f.zip cannot be read")
    assert other.startswith(f"error: {many}/g.zip: {many}/g.zip is neither a directory nor a zip file")
    assert [a["name"] for a in listed(user=user)] == ["a", "e"]
    done = run_cli("adapters", "import", str(many), "--json", user=user)
    assert done.returncode == 1
    said = json.loads(done.stdout)
    assert [a["name"] for a in said["imported"]] == ["a", "e"]
    assert [f["source"] for f in said["failed"]] == [f"{many}/{name}" for name in ("b", "c d", "f.zip", "g.zip")]


def test_many_imports_end_with_the_first_that_no_server_answers(adapter: PeftFiles, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        shutil.copytree(adapter.directory, tmp_path / name)
    done = run_cli("adapters", "import", str(tmp_path), "--api-key", "x", "--url", "http://127.0.0.1:1")
    assert done.returncode == 1
    assert done.stdout == "0 imported, 1 failed, 2 not tried.\n"
    assert len(done.stderr.splitlines()) == 1


def test_what_is_no_adapter_is_refused_before_anything_is_imported(
    user: User, adapter: PeftFiles, tmp_path: Path
) -> None:
    for folder in ("one", "two"):
        shutil.copytree(adapter.directory, tmp_path / folder / "final")
    text = tmp_path / "text.zip"
    text.write_text("not a zip")
    empty = zip_of(tmp_path / "empty.zip", {})
    good = str(adapter.directory)
    for paths, message in (
        ([str(tmp_path / "none")], "none does not exist"),
        ([good, str(tmp_path)], "no adapter_config.json, and no directory or zip in it that has one"),
        ([good, str(text)], "neither a directory nor a zip file"),
        ([good, str(empty)], "is a zip without an adapter_config.json"),
        ([str(tmp_path / "one"), str(tmp_path / "two")], "2 of these would be called 'final'"),
        ([good, str(tmp_path / "one"), "--name", "mine"], "--name is for one adapter, and these are 2"),
    ):
        if message.startswith("no adapter_config"):
            text.unlink()
            empty.unlink()
            assert message in failed("adapters", "import", *paths, user=user)
            text.write_text("not a zip")
            zip_of(empty, {})
        else:
            assert message in failed("adapters", "import", *paths, user=user)
    assert listed(user=user) == []


def test_what_was_imported_is_exported_bit_for_bit(user: User, other_adapter: PeftFiles, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    ran("adapters", "import", str(other_adapter.directory), "--name", "mine", user=user)
    assert ran("adapters", "export", "mine", "--out", str(out), user=user) == f"Wrote {out}.\n"
    assert [p.name for p in out.parent.iterdir()] == ["out"], "nothing else is left"
    sent, found = (load_file(d / "adapter_model.safetensors") for d in (other_adapter.directory, out))
    assert found.keys() == sent.keys()
    for name, tensor in sent.items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor.view(torch.uint8), found[name].view(torch.uint8)), name
    asked, got = (json.loads((d / "adapter_config.json").read_text()) for d in (other_adapter.directory, out))
    assert got == asked
    assert "exists already" in failed("adapters", "export", "mine", "--out", str(out), user=user)
    zipped = tmp_path / "out.zip"
    said = json.loads(ran("adapters", "export", "mine", "--out", str(zipped), "--json", user=user))
    assert said["out"] == str(zipped)
    with zipfile.ZipFile(zipped) as archive:
        assert sorted(archive.namelist()) == sorted(p.name for p in out.iterdir())
    ran("adapters", "import", str(zipped), "--name", "again", user=user)
    again, mine = listed(user=user)
    assert again["versions"][0]["digest"] == mine["versions"][0]["digest"]


def test_delete_asks_once_about_all_and_takes_silence_for_a_no(user: User, adapter: PeftFiles) -> None:
    for name in ("one", "two", "two"):
        user.import_adapter(adapter, name)
    for said in ("n\n", "\n"):
        done = on_terminal("adapters", "delete", "one", "two", f"{user.owner}/one", said=said, user=user)
        assert done.returncode == 1
        question = f"Delete {user.owner}/one, {user.owner}/two (3 versions)? This cannot be undone. [y/n] (n): "
        assert done.stdout == f"{question}Nothing was done.\n"
        assert len(listed(user=user)) == 2
    done = on_terminal("adapters", "delete", "one", "two", said="y\n", user=user)
    assert done.stdout.endswith(f"Deleted {user.owner}/one.\nDeleted {user.owner}/two.\n")
    assert listed(user=user) == []


def test_delete_never_asks_where_nobody_can_answer(user: User, adapter: PeftFiles) -> None:
    user.import_adapter(adapter, "mine")
    for said in ("y\n", ""):
        assert "give --yes" in failed("adapters", "delete", "mine", said=said, user=user)
    assert "no adapter 'none'" in failed("adapters", "delete", "mine", "none", "--yes", user=user)
    assert len(listed(user=user)) == 1, "nothing goes when one of them is not there"
    [answer] = json.loads(ran("adapters", "delete", "mine", "--yes", "--json", user=user))
    assert answer["deleted"] is True


def test_lists_are_filtered_sorted_and_cut(user: User, adapter: PeftFiles, other_adapter: PeftFiles) -> None:
    for files, name in ((adapter, "big-1"), (other_adapter, "small"), (adapter, "big-2")):
        user.import_adapter(files, name)

    def names(*options: str) -> list[str]:
        return [a["name"] for a in listed(*options, user=user)]

    assert names() == ["big-1", "big-2", "small"]
    assert names("--reverse") == ["small", "big-2", "big-1"]
    assert names("--sort", "bytes") == ["small", "big-1", "big-2"]
    assert names("--name", "BIG") == ["big-1", "big-2"]
    cut = run_cli("adapters", "list", "--json", "--limit", "2", user=user)
    assert [a["name"] for a in json.loads(cut.stdout)] == ["big-1", "big-2"]
    assert cut.stderr == "2 of 3; --limit 0 shows all.\n"
    assert names("--limit", "0") == ["big-1", "big-2", "small"]
    assert "2 of 3; --limit 0 shows all." in ran("adapters", "list", "--limit", "2", user=user)
    assert run_cli("adapters", "list", "--sort", "colour", user=user).returncode == 2


def test_an_admin_sees_steers_and_deletes_everybodys_adapters(
    server: Server, user: User, adapter: PeftFiles, tmp_path: Path
) -> None:
    imported = user.import_adapter(adapter, "mine")
    alias = f"{user.owner}/mine"
    assert [a["model"] for a in listed("--owner", user.owner, user=server.admin)] == [alias]
    assert alias in [a["model"] for a in listed("--all", "--limit", "0", user=server.admin)]
    for which in (alias, imported["id"]):
        assert json.loads(ran("adapters", "show", which, "--json", user=server.admin))["model"] == alias
    assert "no adapter 'mine'" in failed("adapters", "show", "mine", user=server.admin), "a bare name is one's own"
    ran("adapters", "export", alias, "--out", str(tmp_path / "out"), user=server.admin)
    user.ask(alias)
    assert user.tier(alias) == "device"
    assert ran("adapters", "evict", alias, user=server.admin) == f"Evicted {alias}.\n"
    assert user.tier(alias) == "disk"
    ran("adapters", "evict", alias, "--tier", "ram", user=server.admin)
    assert user.tier(alias) == "device"
    assert "no object store" in failed("adapters", "evict", alias, "--tier", "disk", user=server.admin)
    for options in (["--all"], ["--owner", user.owner]):
        assert "admin key" in failed("adapters", "list", *options, user=user)
    assert "admin key" in failed("adapters", "evict", "mine", user=user)
    stranger = server.user()
    for command in (["show"], ["evict"], ["delete", "--yes"], ["export", "--out", "never"]):
        for which in (alias, imported["id"]):
            assert f"You have no adapter '{which}'" in failed("adapters", *command, which, user=stranger)
    assert ran("adapters", "delete", alias, "--yes", user=server.admin) == f"Deleted {alias}.\n"
    assert listed(user=user) == []


def test_owners_pin_and_unpin_their_own_and_an_operator_anybodys(
    server: Server, user: User, adapter: PeftFiles
) -> None:
    for name in ("a", "b"):
        user.import_adapter(adapter, name)
    both = [f"{user.owner}/{name}" for name in ("a", "b")]
    assert ran("adapters", "pin", "a", "b", user=user) == f"Pinned {both[0]}.\nPinned {both[1]}.\n"
    assert "by owner" in ran("adapters", "list", "--pinned", user=user)
    [answer] = json.loads(ran("adapters", "pin", both[1], "--json", user=server.admin))
    assert (answer["name"], answer["pinned"]) == ("b", "admin")
    assert "pinned by admin" in ran("adapters", "show", "b", user=user)
    assert "only they can unpin it" in failed("adapters", "unpin", "b", user=user)
    assert ran("adapters", "unpin", "a", user=user) == f"Unpinned {both[0]}.\n"
    assert ran("adapters", "unpin", *both, user=server.admin).count("Unpinned") == 2
    assert listed("--pinned", user=user) == []
    assert "You have no adapter" in failed("adapters", "pin", both[0], user=server.user())


# -- tiers, policy, top


@pytest.fixture(scope="module")
def own_server(base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One whose budgets and rules no other test counts on."""
    with running(small_config(base_directory, tmp_path_factory.mktemp("own") / "data")) as started:
        yield started


def test_tiers_are_shown_and_their_budgets_set(own_server: Server, adapter: PeftFiles) -> None:
    user, admin = own_server.user(), own_server.admin
    user.tier(user.import_adapter(adapter, "mine")["model"])
    table = ran("tiers", user=admin)
    for text in ("device", "8.0 MiB", "ram", "disk", "Hit ratio", "Read p99", " ms", "fragmentation 0.0%"):
        assert text in table
    said = r"From when an adapter was asked for until it was on the device: from disk p50 [\d.]+ ms, p99 [\d.]+ ms\."
    assert re.search(said, table)
    assert json.loads(ran("tiers", "--json", user=admin))["tiers"]["device"]["budget_bytes"] == 8 * 1024**2
    said = json.loads(ran("tiers", "set", "--device", "4MiB", "--ram", "1MiB", "--json", user=admin))
    assert [said["tiers"][t]["budget_bytes"] for t in ("device", "ram", "disk")] == [4 << 20, 1 << 20, 64 << 30]
    assert "2.0 GiB" in ran("tiers", "set", "--disk", "2G", user=admin)
    assert "at least one of --device, --ram and --disk" in failed("tiers", "set", user=admin)
    assert "'lots' is not a size" in failed("tiers", "set", "--ram", "lots", user=admin)
    assert "cannot be evicted" in failed("tiers", "set", "--disk", "1K", user=admin)
    for command in (["tiers"], ["tiers", "set", "--ram", "0"], ["policy", "show"], ["top", "--once"]):
        assert "admin key" in failed(*command, user=user)


def test_the_policy_is_shown_tried_and_set(own_server: Server, other_adapter: PeftFiles) -> None:
    user, admin = own_server.user(), own_server.admin
    ran("tiers", "set", "--ram", "1MiB", user=admin)
    alias = user.import_adapter(other_adapter, "mine")["model"]
    user.tier(alias)
    unset = {"policy": "lru", "ttl_seconds": None, "owners": {}}
    assert json.loads(ran("policy", "show", "--json", user=admin)) == {"device": unset, "ram": unset, "disk": unset}

    said = ran("policy", "set", "--owner", user.owner, "--ceiling", "1K", "--dry-run", user=admin)
    assert alias in said
    assert "would leave the device: 1 (11.0 KiB), RAM: 1 (11.0 KiB), and the disk: 0 (0 B)." in said
    assert "Nothing was changed." in said
    plan = json.loads(ran("policy", "set", "--owner", user.owner, "--ceiling", "1K", "--dry-run", "--json", user=admin))
    assert plan["device"][0]["models"] == [alias]
    assert user.tier(alias) == "device"

    ran("policy", "set", "--policy", "gdsf", user=admin)
    ran("policy", "set", "--tier", "ram", "--ttl", "1.5h", user=admin)
    ran("policy", "set", "--tier", "device", "--owner", "ada", "--floor", "2M", "--priority", "high", user=admin)
    said = ran("policy", "set", "--tier", "device", "--owner", "ada", "--ceiling", "3M", "--json", user=admin)
    rule = {"floor_bytes": 2 << 20, "ceiling_bytes": 3 << 20, "priority": 2}
    assert json.loads(said) == {
        "device": {"policy": "gdsf", "ttl_seconds": None, "owners": {"ada": rule}},
        "ram": {"policy": "gdsf", "ttl_seconds": 5400, "owners": {}},
        "disk": unset,
    }
    shown = ran("policy", "show", user=admin)
    for text in ("gdsf", "1.5 h", "ada", "2.0 MiB", "3.0 MiB", "high"):
        assert text in shown
    ran("policy", "set", "--owner", "ada", "--reset", "--ttl", "none", user=admin)
    assert "ada" not in ran("policy", "show", user=admin)

    assert "Give what to change" in failed("policy", "set", user=admin)
    for wrong in (["--floor", "1K"], ["--owner", "ada"], ["--reset"], ["--owner", "ada", "--reset", "--floor", "1"]):
        assert "--owner goes with" in failed("policy", "set", *wrong, user=admin)
    assert "is not a duration" in failed("policy", "set", "--ttl", "soon", user=admin)
    assert "ceiling of 1 bytes" in failed("policy", "set", "--owner", "x", "--floor", "2", "--ceiling", "1", user=admin)


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_top_looks_once_or_goes_on(own_server: Server, adapter: PeftFiles) -> None:
    user, admin = own_server.user(), own_server.admin
    alias = user.import_adapter(adapter, "mine")["model"]
    user.tier(alias)
    for options in ([], ["--once"]):
        said = ran("top", *options, user=admin)
        assert all(text in said for text in (BASE, "0 running, 0 waiting", "KV cache", alias, "Evictions"))
    seen = json.loads(ran("top", "--once", "--json", "--rows", "1", user=admin))
    assert [a["model"] for a in seen["adapters"]] == [alias]
    account = environment(ADAPTERHUB_URL=admin.url, ADAPTERHUB_API_KEY=admin.key)
    options = ["--json", "--interval", "0.1"]
    command = [str(COMMAND), "top", *options]
    # a shell's background job hands on that it ignores Ctrl-C
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=account, preexec_fn=_heed_interrupts
    ) as process:
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(SECONDS) == 0
    assert lines[0]["per_second"] is None
    assert lines[1]["per_second"].keys() == {"tokens", "hits", "loads"}


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
    told = ran("jobs", "show", job["id"], user=user)
    assert f"New fine-tuned model created: {model}" in told
    assert told.count("Step ") == 1, "the last one alone"
    assert ran("chat", f"{user.owner}/mine", said="Say 3\n", user=user) == "Aye\n"


def test_train_says_why_a_job_failed(user: User, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(chat_lines(3))
    assert "has failed: Training file has 3 example(s)" in failed("train", str(file), "--name", "mine", user=user)
    assert "is not a file" in failed("train", str(tmp_path / "none.jsonl"), "--name", "mine", user=user)
    assert "not a valid suffix" in failed("train", str(file), "--name", "a/b", user=user)


def test_train_measures_on_a_file_and_goes_on_from_what_an_adapter_has_learned(user: User, tmp_path: Path) -> None:
    first, second, held_out = (tmp_path / f"{name}.jsonl" for name in ("first", "second", "held"))
    first.write_bytes(chat_lines(30))
    second.write_bytes(chat_lines(12))
    held_out.write_bytes(b"".join(chat_lines(40).splitlines(keepends=True)[-3:]))
    none = failed("train", str(second), "--name", "mine", "--continue", user=user)
    assert "no adapter 'mine' to go on from" in none
    ran("train", str(first), "--name", "mine", user=user)
    said = ran("train", str(second), "--name", "mine", "--continue", "--validation", str(held_out), user=user)
    assert f"on {user.owner}/mine" in said
    [job, _] = json.loads(ran("jobs", "list", "--json", user=user))
    assert job["model"] == f"{user.owner}/mine"
    assert job["proof"]["held_out"]
    assert "is not a file" in failed("train", str(first), "--name", "x", "--validation", str(tmp_path), user=user)


def test_train_takes_all_that_a_job_can_be_asked_for(user: User, tmp_path: Path) -> None:
    pair = {
        "input": {"messages": [{"role": "user", "content": "Deck?"}]},
        "preferred_output": [{"role": "assistant", "content": "Aye"}],
        "non_preferred_output": [{"role": "assistant", "content": "No"}],
    }
    pairs = [{**pair, "input": {"messages": [{"role": "user", "content": f"Deck {i}?"}]}} for i in range(10)]
    file = tmp_path / "likes.jsonl"
    file.write_text("\n".join(map(json.dumps, pairs)))
    asked = ("--set", "max_steps=2", "--set", 'targets=["q_proj", "v_proj"]', "--set", "schedule=cosine")
    train = ("train", str(file), "--name", "mine", "--method", "dpo")
    ran(*train, *asked, "--seed", "5", "--priority", "high", user=user)
    [job] = json.loads(ran("jobs", "list", "--json", user=user))
    assert (job["method"]["type"], job["seed"], job["priority"]) == ("dpo", 5, "high")
    shown = job["hyperparameters"]
    assert [shown[n] for n in ("max_steps", "targets", "schedule")] == [2, ["q_proj", "v_proj"], "cosine"]
    assert "--set 'rank': write NAME=VALUE" in failed(*train, "--set", "rank", user=user)
    assert "hyperparameters.rank is 99; it must be" in failed(*train, "--set", "rank=99", user=user)
    assert "hyperparameters.rnk is not known" in failed(*train, "--set", "rnk=9", user=user)


def test_a_job_is_paused_resumed_and_cancelled_and_its_checkpoints_and_curve_are_shown(
    user: User, tmp_path: Path
) -> None:
    job = user.train(chat_lines(20), suffix="mine", batch_size=1, n_epochs=100, early_stopping=0, held_out=0.2)
    eventually(lambda: user.openai.fine_tuning.jobs.checkpoints.list(job).data)
    for command, state in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        assert ran("jobs", command, job, user=user) == f"{job} is {state}\n"
    assert "already cancelled; it cannot be paused" in failed("jobs", "pause", job, user=user)
    [*_, first] = json.loads(ran("jobs", "checkpoints", job, "--json", user=user))
    assert first["fine_tuned_model_checkpoint"] in ran("jobs", "checkpoints", job, user=user)
    shown = ran("jobs", "curve", job, user=user)
    assert re.search(r"training loss +[▁-█]{60} \d", shown)
    assert "validation loss" in shown
    metrics = json.loads(ran("jobs", "curve", job, "--json", user=user))
    assert [m["step"] for m in metrics] == list(range(1, len(metrics) + 1))
    png = tmp_path / "curve.png"
    ran("jobs", "curve", job, "--png", str(png), user=user)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "should end in .png" in failed("jobs", "curve", job, "--png", str(tmp_path / "c.gif"), user=user)


def test_a_curve_needs_a_step(user: User) -> None:
    job = user.train(chat_lines(1))
    user.job(job, "failed")
    assert "has not trained a step yet" in failed("jobs", "curve", job, user=user)


@pytest.mark.parametrize(
    ("values", "bars"),
    [([3.0], "▁"), ([1.0, 1.0], "▁▁"), ([0.0, 7.0, 3.5], "▁█▅"), (list(range(120)), None)],
)
def test_a_sparkline_is_as_long_as_its_values_up_to_sixty(values: list[float], bars: str | None) -> None:
    line = sparkline(values)
    assert line == bars if bars else (len(line), line[0], line[-1]) == (60, "▁", "█")


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


FROZEN = """
import atexit, gc
from adapterhub.cli import main
atexit.register(lambda: print(f"left out of collections: {gc.get_freeze_count()}"))
main()
"""


def test_what_a_server_has_once_it_is_started_is_left_out_of_garbage_collections(
    base_directory: Path, tmp_path: Path
) -> None:
    options = ["serve", "--base", str(base_directory), "--data-dir", str(tmp_path / "data"), "--port", "0"]
    command = [sys.executable, "-c", FROZEN, *options, "--device-bytes", "8MiB", "--kv-bytes", "8MiB"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if "admin key" in line)  # it has started
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=SECONDS)[0]
    assert int(re.findall(r"left out of collections: (\d+)", said)[0]) > 100_000
