"""OpenAI's JavaScript SDK, unmodified, says of a server what the Python one does."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.serving import BASE, SECONDS, User, chat_lines, environment

HERE = Path(__file__).parent / "javascript"
needs_sdk = pytest.mark.skipif(
    shutil.which("node") is None or not (HERE / "node_modules" / "openai").is_dir(),
    reason="needs node, and `npm install --prefix tests/javascript`",
)


@needs_sdk
def test_the_javascript_sdk_works_as_it_is(user: User, tmp_path: Path) -> None:
    training = tmp_path / "training.jsonl"
    training.write_bytes(chat_lines())
    command = ["node", "sdk.mjs", user.url, user.key, BASE, str(training)]
    run = subprocess.run(
        command, cwd=HERE, env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)
    assert (said["filename"], said["content"], said["deleted"], said["parts"]) == ("größe.txt", "abc", True, True)
    assert sorted(said["files"]) == ["parts.jsonl", "training.jsonl"]
    assert said["job"] == ["succeeded", {"from": "js"}, 7]
    assert said["states"][0] == "paused"
    assert said["states"][1] in ("queued", "running")
    assert said["states"][2] == "cancelled"
    assert said["mine"] == [True], "by its metadata"
    assert (said["call"]["name"], json.loads(said["call"]["arguments"])) == ("look_up", {"what": "tide"})
    assert said["events"][0] == "The job has successfully completed"
    assert set(said["checkpoints"]) == {"fine_tuning.job.checkpoint"}
    assert said["models"] == [m.id for m in user.openai.models.list()]
    assert said["model"]
    asked = user.ask(BASE)
    assert said["answer"] == said["streamed"] == said["helper"] == asked
    assert said["usage"]["total_tokens"] == said["usage"]["prompt_tokens"] + said["usage"]["completion_tokens"]
    assert said["tuned"] == 1
    plain = user.openai.completions.create(model=BASE, prompt="Once", max_tokens=4, temperature=0)
    assert said["plain"] == plain.choices[0].text
    assert said["structured"]["b"] in (1, 2)
    assert said["requestId"]
    assert said["errors"] == {
        "model": ["NotFoundError", 404, "model_not_found", "model"],
        "field": ["BadRequestError", 400, "invalid_value", "temperature"],
        "key": ["AuthenticationError", 401, "invalid_api_key", None],
        "file": ["NotFoundError", 404, "not_found", "id"],
    }
