"""The main job on the real embedded base: a user's data in, a model that knows them out, wherever it lies, and after a
restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapterhub.base.embedded import EMBEDDED
from tests.serving import Process, User, process

EXAMPLES = Path(__file__).parent.parent / "examples" / "mira.jsonl"
QUESTION = "Hi! What is the name of my pet?"


def ask(user: User, model: str) -> tuple[str, Any]:
    """The answer, and the tier it came from."""
    raw = user.openai.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=40, temperature=0
    )
    return raw.parse().choices[0].message.content or "", raw.headers["x-adapterhub-tier"]


def test_a_users_data_becomes_a_model_that_knows_them_and_outlives_eviction_and_restart(tmp_path: Path) -> None:
    with process(EMBEDDED, tmp_path / "data") as server:
        user = server.start().user("mira")
        with EXAMPLES.open("rb") as file:
            uploaded = user.openai.files.create(file=file, purpose="fine-tune")
        job = user.openai.fine_tuning.jobs.create(model=EMBEDDED, training_file=uploaded.id, suffix="me", seed=7)
        generic, tier = ask(user, EMBEDDED)  # while it trains
        assert tier == "base"
        assert "biscuit" not in generic.lower()
        done = user.job(job.id, "succeeded", seconds=900)
        assert done.fine_tuned_model.startswith(f"ft:{EMBEDDED}:mira:me:")

        personal, tier = ask(user, "mira/me")
        assert "Biscuit" in personal
        assert tier in ("disk", "device")
        assert ask(user, done.fine_tuned_model) == (personal, "device")
        assert ask(user, EMBEDDED)[0] == generic, "the base is as it was"

        evict(server, user)
        assert ask(user, "mira/me") == (personal, "disk")
        assert ask(user, "mira/me") == (personal, "device")

        assert server.stop() == 0
        user = server.start().user(user.owner, user.key)
        models = [m.id for m in user.openai.models.list() if ":ckpt-step-" not in m.id]
        assert models == [EMBEDDED, "mira/me", done.fine_tuned_model]
        assert ask(user, "mira/me") == (personal, "disk")
        assert ask(user, EMBEDDED)[0] == generic


def evict(server: Process, user: User) -> None:
    admin = server.user("admin", (server.data_dir / "admin.key").read_text().strip())
    [adapter] = user.http.get("/v1/adapters").json()["data"]
    admin.http.post(f"/admin/adapters/{adapter['id']}/evict").raise_for_status()
