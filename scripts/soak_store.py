"""`scripts/soak store`: a real server is killed with `kill -9` again and again, while users import, train, ask, delete
and export, and an operator evicts and pins: once with an object store, of which the disk is a small cache, and once
without.

After each start every version that was acknowledged must answer as it did before the kills, every deletion that was
acknowledged must have happened, no file and no object may lie there that no row names, and what `adapterhub doctor`
looks at must be whole. Every job must end, with one model, even if it was killed while it trained or published. A
request that was cut off may have been done or not, but not by half.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import re
import sqlite3
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from transformers import AutoModelForCausalLM

from adapterhub.cli.main import main
from adapterhub.swap.database import Database
from adapterhub.swap.repair import inspect
from tests.serving import BASE, PeftFiles, Process, User, chat_lines, environment, eventually, run_cli, save_base

OWNERS, NAMES, VARIANTS = 3, 4, 10
TOKENS = 8  # of an answer
LONGEST_LIFE = 1.5  # seconds under load, until a kill
DIES_YOUNG = 0.2  # of the servers: they are killed while they start
LONGEST_START = 1.5  # seconds until that
OUTAGE = 0.2  # of the lives: the store is gone for a part of them
TRAINED, KEPT = "trained", 4  # what jobs publish, and how many versions of it an owner keeps
DOCTOR = 25  # after so many kills the command itself looks, too
# a quarter of the device, which pins leave, holds the largest adapter
BUDGETS = ("--device-bytes", "96KiB", "--ram-bytes", "64KiB", "--kv-bytes", "4MiB")
DISK = ("--disk-bytes", "192KiB")  # of the cache: for about half of the variants
REFUSALS = {"store_unavailable", "disk_full", "storage_full"}  # what a store that is gone, or a full cache, may cause


_nursery = multiprocessing.get_context("forkserver")
_nursery.set_forkserver_preload(["__main__", "adapterhub.api.app", "transformers.models.llama.modeling_llama"])


class Forked(Process):
    """`adapterhub serve` in a process of its own, which begins as a copy of one that has imported all it needs: of
    what a start takes, imports are nine tenths."""

    _child: Any = None

    def begin(self) -> None:
        self._out = self.log.with_suffix(".out")
        self._out.write_bytes(b"")
        self.log.touch()
        self._child = _nursery.Process(target=_serve, args=(self.command, self._out, self.log))
        self._child.start()

    def start(self) -> Forked:
        self.begin()
        said = eventually(lambda: ("admin key" in (text := self._out.read_text()) and text) or self._child.exitcode)
        found = re.search(r"http://\S+(?=/v1)", str(said))
        assert found, f"the server did not start: {said}\n{self.log.read_text()}"
        self.url = found[0]
        return self

    def kill(self) -> None:
        self._child.kill()
        self._child.join()

    def close(self) -> None:
        self.kill()
        super().close()


def _serve(command: list[str], out: Path, log: Path) -> None:
    """What a new process does."""
    for path, descriptor in ((out, 1), (log, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment())
    sys.argv = command
    main()


@dataclass
class Variant:
    """An adapter, and what it says."""

    files: PeftFiles
    said: str = ""


@dataclass
class Account:
    """What one owner was told, by name: the versions (their model's name -> the variant), the current one last.
    `pending`: the name that a request was about when the server died, and the variant it imported. What its jobs
    published is apart: `trained` has what each such model said when it was asked first."""

    owner: str
    key: str
    file: str  # to train on
    names: dict[str, dict[str, int]] = field(default_factory=dict)
    pending: tuple[str, int | None] | None = None
    jobs: set[str] = field(default_factory=set)
    trained: dict[str, str] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)  # models of jobs


class Home:
    """A data directory with its server, its accounts and what was wrong."""

    def __init__(self, base: Path, directory: Path, variants: list[Variant], seed: int, *, store: bool) -> None:
        self.title = "with a store" if store else "without one"
        self.store = directory / "store" if store else None
        options = ("--store", f"file://{self.store}", *DISK) if store else ()
        self.server = Forked(base, directory / "data", *BUDGETS, *options)
        self.variants = variants
        self.faults: list[str] = []
        self.counts: Counter[str] = Counter()
        self.accounts: list[Account] = []
        self._choose = random.Random(seed)
        self._away = False

    def run(self, kills: int) -> None:
        """Ends early when something is wrong, so that it can be looked at."""
        self.server.start()
        for number in range(OWNERS):
            owner = f"owner-{number}"
            user = self.server.user(owner)
            self.accounts.append(Account(owner, user.key, user.upload(chat_lines())))
        try:
            self._learn()
            for number in range(1, kills + 1):
                self._live()
                self.after_kill()
                self._start_again()
                self._check()
                if number % DOCTOR == 0 or number == kills:
                    self._ask_doctor()
                    print(f"{self.title}: {number} kills", flush=True)
                if self.faults:
                    self.faults = [f"{self.title}, after kill {number}: {fault}" for fault in self.faults]
                    return
        finally:
            self.server.close()

    def after_kill(self) -> None:
        """Before the server starts again."""

    # -- a life

    def _learn(self) -> None:
        """What each variant says, of an adapter that nothing happens to."""
        user = self.server.user("oracle")
        for variant in self.variants:
            made = user.import_adapter(variant.files, "one")
            variant.said = _answer(user, made["versions"][0]["model"]).json()["choices"][0]["text"]
        user.http.delete(f"/v1/adapters/{made['id']}").raise_for_status()

    def _live(self) -> None:
        seeds = [self._choose.random() for _ in self.accounts]
        outage = self.store is not None and self._choose.random() < OUTAGE
        life = self._choose.uniform(0, LONGEST_LIFE)
        users = [User(self.server.url, account.owner, account.key) for account in self.accounts]
        admin = User(self.server.url, "admin", (self.server.data_dir / "admin.key").read_text().strip())
        work = [
            threading.Thread(target=Worker(self, account, user, admin, seed, may_fail=outage).run)
            for account, user, seed in zip(self.accounts, users, seeds, strict=True)
        ]
        for thread in work:
            thread.start()
        over = threading.Event()
        if outage:
            over.wait(life / 3)
            with self._store_gone():
                over.wait(life / 3)
        over.wait(life / 3 if outage else life)
        self.server.kill()
        for thread in work:
            thread.join()
        for user in (*users, admin):
            user.close()
        self.counts["kills"] += 1

    @contextmanager
    def _store_gone(self) -> Iterator[None]:
        """As when a network's file system is not there."""
        assert self.store is not None
        elsewhere = self.store.with_name("elsewhere")
        self.store.rename(elsewhere)
        try:
            yield
        finally:
            elsewhere.rename(self.store)
        self.counts["outages"] += 1

    def _start_again(self) -> None:
        while self._choose.random() < DIES_YOUNG:
            self.server.begin()
            threading.Event().wait(self._choose.uniform(0, LONGEST_START))
            self.server.kill()
            self.counts["killed while they started"] += 1
        self.server.start()

    # -- what must be true after it

    def _check(self) -> None:
        for account in self.accounts:
            with closing(User(self.server.url, account.owner, account.key)) as user:
                self._check_account(account, user)
        rows = self._rows("select distinct digest from versions")
        named = {f"{digest}.block" for (digest,) in rows}
        here = {path.name for path in (self.server.data_dir / "blobs").iterdir()}
        if here - named:
            self.faults.append(f"no row names {sorted(here - named)}")
        if self.store is None and named - here:
            self.faults.append(f"no file is there of {sorted(named - here)}")
        if self.store is not None:
            with suppress(AssertionError):  # what is wrong then is told below
                eventually(lambda: self._in_store() == named, seconds=60)
            if self._in_store() != named:
                self.faults.append(f"the store lacks {named - self._in_store()}, or has {self._in_store() - named}")
        if (quarantine := self.server.data_dir / "quarantine").exists():
            self.faults.append(f"set aside: {[path.name for path in quarantine.iterdir()]}")
        database = Database(self.server.data_dir / "hub.db")
        with closing(database):
            url = f"file://{self.store}" if self.store else None
            report = inspect(database, self.server.data_dir / "blobs", url, self.server.data_dir)
        self.faults += [str(fault) for fault in report.faults]
        if report.unnamed or report.unseen:
            self.faults.append(f"doctor finds {report}")

    def _check_account(self, account: Account, user: User) -> None:
        made = self._models_of_jobs(account, user)
        listed = user.http.get("/v1/adapters").raise_for_status().json()["data"]
        found = {a["name"]: {v["model"]: v["number"] for v in a["versions"]} for a in listed}
        self._check_trained(account, user, made, set(found.pop(TRAINED, ())))
        for adapter in listed:
            if adapter["name"] == TRAINED and len(account.trained) > KEPT:
                user.http.delete(f"/v1/adapters/{adapter['id']}").raise_for_status()
                account.deleted |= account.trained.keys()
                account.trained.clear()
        pending, imported = account.pending or ("", None)
        for name in found.keys() | account.names.keys():
            before, now = account.names.get(name, {}), found.get(name, {})
            fresh, gone = now.keys() - before.keys(), before.keys() - now.keys()
            if name != pending and (fresh or gone):
                self.faults.append(f"{account.owner}/{name}: {fresh} came and {gone} went")
            if name == pending and not self._may_be(imported, before, fresh, gone):
                self.faults.append(f"{account.owner}/{name}, half done: {fresh} came and {gone} went")
            left = {model: variant for model, variant in before.items() if model not in gone}
            left |= dict.fromkeys(fresh, -1 if imported is None else imported)
            account.names[name] = dict(sorted(left.items(), key=lambda item: now.get(item[0], 0)))
        account.names = {name: versions for name, versions in account.names.items() if versions}
        account.pending = None
        for name, versions in account.names.items():
            current = [*versions.values()][-1]
            for model, variant in {**versions, f"{account.owner}/{name}": current}.items():
                self.check_answer(_answer(user, model), model, variant)

    def _models_of_jobs(self, account: Account, user: User) -> set[str]:
        """What all jobs have made, once none is under way."""

        def under_way() -> dict[str, str]:
            states = {job.id: job.status for job in user.openai.fine_tuning.jobs.list()}
            return {identity: state for identity, state in states.items() if state not in ("succeeded", "failed")}

        with suppress(AssertionError):  # what is wrong then is told below
            eventually(lambda: not under_way())
        if left := under_way():
            self.faults.append(f"{account.owner}: jobs {left} do not end")
        jobs = [*user.openai.fine_tuning.jobs.list()]
        if lost := account.jobs - {job.id for job in jobs}:
            self.faults.append(f"{account.owner}: jobs {lost} are gone")
        for job in jobs:
            if job.status == "failed" and (self.store is None or job.error.code not in REFUSALS):
                self.faults.append(f"{account.owner}: {job.id} failed: {job.error}")
        return {str(job.fine_tuned_model) for job in jobs if job.status == "succeeded"}

    def _check_trained(self, account: Account, user: User, made: set[str], found: set[str]) -> None:
        """Each job that succeeded has one model, which says for ever what it said at first."""
        made = made - account.deleted
        if made != found:
            self.faults.append(f"{account.owner}: jobs made {made}, and there are {found}")
        for model in made & found:
            answer = _answer(user, model)
            if answer.is_error:
                self.faults.append(f"{model}: {answer.text}")
                continue
            said = answer.json()["choices"][0]["text"]
            if account.trained.setdefault(model, said) != said:
                self.faults.append(f"{model} says {said!r} instead of {account.trained[model]!r}")
            self.counts["answers of trained models checked"] += 1

    @staticmethod
    def _may_be(imported: int | None, before: dict[str, int], fresh: set[str], gone: set[str]) -> bool:
        """Whether a request that was cut off can have led to this: an import to one more, a deletion to one less, or
        to none."""
        if imported is not None:
            return len(fresh) <= 1 and not gone
        return not fresh and len(gone) in (0, 1, len(before))

    def check_answer(self, answer: httpx.Response, model: str, variant: int) -> None:
        if answer.is_error:
            self.faults.append(f"{model}: {answer.text}")
        elif (said := answer.json()["choices"][0]["text"]) != self.variants[variant].said:
            self.faults.append(f"{model} says {said!r} instead of {self.variants[variant].said!r}")
        else:
            self.counts["answers checked"] += 1

    def _ask_doctor(self) -> None:
        store = ("--store", f"file://{self.store}") if self.store else ()
        found = run_cli("doctor", "--data-dir", str(self.server.data_dir), *store)
        if found.returncode:
            self.faults.append(f"doctor: {found.stdout}{found.stderr}")
        self.counts["doctors"] += 1

    def _in_store(self) -> set[str]:
        assert self.store is not None
        return {path.name for path in self.store.glob("*/*")}

    def _rows(self, sql: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(f"file:{self.server.data_dir}/hub.db?mode=ro", uri=True)) as database:
            return database.execute(sql).fetchall()


class Worker:
    """One owner who does whatever comes to mind until the server is gone."""

    def __init__(self, home: Home, account: Account, user: User, admin: User, seed: float, *, may_fail: bool) -> None:
        self.home, self.account, self.user, self.admin = home, account, user, admin
        self._may_fail = may_fail
        self._may_train = True
        self._choose = random.Random(seed)

    def run(self) -> None:
        acts: list[Callable[[], None]] = [self._import] * 4 + [self._ask] * 6 + [self._delete] * 2
        acts += [self._delete_version, self._evict, self._pin, self._export, self._train]
        try:
            while True:
                self._choose.choice(acts)()
        except httpx.TransportError:  # the server is gone
            pass
        except Exception as error:
            self.home.faults.append(f"{self.account.owner}: {error!r}")

    def _import(self) -> None:
        name, variant = f"name-{self._choose.randrange(NAMES)}", self._choose.randrange(VARIANTS)
        self.account.pending = (name, variant)
        form = {"data": {"name": name}, "files": self.home.variants[variant].files.upload}
        answer = self.user.http.post("/v1/adapters", **form)  # type: ignore[arg-type]
        if self._accepted(answer, "imports"):
            made = answer.json()["versions"][0]["model"]
            self.account.names.setdefault(name, {})[made] = variant
        self.account.pending = None

    def _train(self) -> None:
        """Once in a life, so that what is under way at its end does not take long."""
        if not self._may_train:
            return
        self._may_train = False
        method = {
            "type": "supervised",
            "supervised": {"hyperparameters": {"rank": 4, "max_steps": 2, "keep_checkpoints": 0}},
        }
        body = {"model": BASE, "training_file": self.account.file, "suffix": TRAINED, "method": method}
        answer = self.user.http.post("/v1/fine_tuning/jobs", json=body)
        if self._accepted(answer, "jobs"):
            self.account.jobs.add(answer.json()["id"])

    def _ask(self) -> None:
        if (picked := self._pick()) is not None:
            _, model, variant = picked
            answer = _answer(self.user, model)
            if self._accepted(answer, "answers"):
                self.home.check_answer(answer, model, variant)

    def _delete(self) -> None:
        if (picked := self._pick()) is not None:
            name = picked[0]
            self.account.pending = (name, None)
            if self._accepted(self.user.http.delete(f"/v1/models/{self.account.owner}/{name}"), "deletions"):
                del self.account.names[name]
            self.account.pending = None

    def _delete_version(self) -> None:
        if (picked := self._pick()) is not None:
            name, model, _ = picked
            self.account.pending = (name, None)
            if self._accepted(self.user.http.delete(f"/v1/models/{model}"), "deletions of versions"):
                del self.account.names[name][model]
                if not self.account.names[name]:
                    del self.account.names[name]
            self.account.pending = None

    def _evict(self) -> None:
        if (identity := self._adapter()) is not None:
            tier = self._choose.choice([None, "device", "ram"])
            body = {} if tier is None else {"tier": tier}
            self._accepted(self.admin.http.post(f"/admin/adapters/{identity}/evict", json=body), "evictions")

    def _pin(self) -> None:
        if (identity := self._adapter()) is not None:
            verb = self._choose.choice(["pin", "unpin"])
            answer = self.admin.http.post(f"/admin/adapters/{identity}/{verb}")
            if answer.status_code != 400:  # more than the operator may pin
                self._accepted(answer, "pins")

    def _export(self) -> None:
        if (identity := self._adapter()) is not None:
            self._accepted(self.user.http.get(f"/v1/adapters/{identity}/download"), "exports")

    def _pick(self) -> tuple[str, str, int] | None:
        """A name, and one of its versions."""
        if not self.account.names:
            return None
        name = self._choose.choice(list(self.account.names))
        model, variant = self._choose.choice(list(self.account.names[name].items()))
        return name, model, variant

    def _adapter(self) -> str | None:
        listed = self.user.http.get("/v1/adapters").raise_for_status().json()["data"]
        return self._choose.choice(listed)["id"] if listed else None

    def _accepted(self, answer: httpx.Response, what: str) -> bool:
        """Whether it was done. What may not be refused is a fault."""
        if answer.is_success:
            self.home.counts[what] += 1
            return True
        code = answer.json()["error"]["code"]
        if self.home.store is None or code not in REFUSALS or (code == "store_unavailable" and not self._may_fail):
            self.home.faults.append(f"{answer.request.method} {answer.request.url.path}: {answer.text}")
        self.home.counts["refusals"] += 1
        return False


def _answer(user: User, model: str) -> httpx.Response:
    body = {"model": model, "prompt": [5, 6, 7], "max_tokens": TOKENS, "temperature": 0}
    return user.http.post("/v1/completions", json=body)


def make_variants(base: Path, directory: Path) -> list[Variant]:
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    ranks = [1, 2, 3, 4, 6]
    return [Variant(PeftFiles(model, directory / f"{n}", seed=n, r=ranks[n % len(ranks)])) for n in range(VARIANTS)]


def soak_store(options: argparse.Namespace) -> list[str]:
    """Runs it, prints what happened, and returns what was wrong."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        base = save_base(directory / "tiny")
        homes = []
        for store in (True, False):
            place = directory / ("with" if store else "without")
            (place / "store").mkdir(parents=True)
            homes.append(Home(base, place, make_variants(base, place / "peft"), options.seed, store=store))
        return run_homes(homes, options.kills)


def run_homes(homes: Sequence[Home], kills: int) -> list[str]:
    """All at once, each killed so many times."""
    with ThreadPoolExecutor(len(homes)) as threads:
        list(threads.map(lambda home: home.run(kills), homes))
    for home in homes:
        print(f"{home.title}: " + ", ".join(f"{count} {what}" for what, count in sorted(home.counts.items())))
    return [fault for home in homes for fault in home.faults]
