"""OpenAI's asynchronous client, unmodified: files, uploads in parts, jobs, models and answers."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import openai
import pytest

from adapterhub.config import MIB
from tests.serving import BASE, SECONDS, User, chat_lines

HELLO: list[Any] = [{"role": "user", "content": "Hello there"}]


def asked(user: User, use: Any) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{user.url}/v1", api_key=user.key, timeout=SECONDS) as client:
            await use(client)

    asyncio.run(run())


async def until(client: openai.AsyncOpenAI, job: str, *states: str) -> Any:
    async with asyncio.timeout(SECONDS):
        while (found := await client.fine_tuning.jobs.retrieve(job)).status not in states:
            await asyncio.sleep(0.05)
    return found


def test_files_come_whole_and_in_parts_and_go(user: User) -> None:
    content = chat_lines() * 400

    async def use(client: openai.AsyncOpenAI) -> None:
        made = await client.files.create(file=("a.jsonl", content), purpose="fine-tune")
        assert (await client.files.wait_for_processing(made.id)).status == "processed"
        assert (await client.files.content(made.id)).content == content
        upload = await client.uploads.upload_file_chunked(
            file=content,
            filename="b.jsonl",
            bytes=len(content),
            mime_type="text/jsonl",
            purpose="fine-tune",
            part_size=MIB // 8,
            md5=hashlib.md5(content, usedforsecurity=False).hexdigest(),
        )
        assert upload.file is not None
        assert [file.id async for file in client.files.list(limit=1)] == [upload.file.id, made.id]
        assert (await client.files.delete(made.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(made.id)

    asked(user, use)


def test_a_job_is_paused_resumed_followed_and_its_model_answers(user: User) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        jobs = client.fine_tuning.jobs
        file = await client.files.create(file=("a.jsonl", chat_lines()), purpose="fine-tune")
        told: dict[str, Any] = {"model": BASE, "training_file": file.id}
        made = await jobs.create(**told, suffix="me", metadata={"team": "a"}, hyperparameters={"n_epochs": 2})
        other = await jobs.create(**told, metadata={"team": "b"}, hyperparameters={"n_epochs": 50, "batch_size": 1})
        assert (await jobs.pause(other.id)).status == "paused"
        assert (await jobs.resume(other.id)).status in ("validating_files", "queued")
        assert (await jobs.cancel(other.id)).status == "cancelled"
        done = await until(client, made.id, "succeeded", "failed")
        assert done.status == "succeeded"
        events = [event async for event in jobs.list_events(made.id, limit=2)]  # page by page
        assert events[-1].message.startswith("Validating training file") or "Created" in events[-1].message
        assert len({event.id for event in events}) == len(events) > 4
        checkpoints = [c async for c in jobs.checkpoints.list(made.id)]
        assert all(c.fine_tuning_job_id == made.id for c in checkpoints)
        assert [job.id async for job in jobs.list(limit=1)] == [other.id, made.id]
        mine = await jobs.list(extra_query={"metadata[team]": "a"})
        assert [job.id for job in mine.data] == [made.id]
        assert done.fine_tuned_model in [model.id async for model in client.models.list()]
        answer = await client.chat.completions.create(model=done.fine_tuned_model, messages=HELLO, max_tokens=2)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 2 or answer.choices[0].finish_reason == "stop"
        assert (await client.models.delete(done.fine_tuned_model)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve(done.fine_tuned_model)

    asked(user, use)


def test_answers_are_streamed_side_by_side(user: User) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        async def chat() -> str:
            asked: Any = {"model": BASE, "messages": HELLO, "temperature": 0, "max_tokens": 6}
            whole = await client.chat.completions.create(**asked)
            async with client.chat.completions.stream(**asked) as stream:
                deltas = [event.delta async for event in stream if event.type == "content.delta"]
            assert "".join(deltas) == whole.choices[0].message.content
            return "".join(deltas)

        async def complete() -> str:
            asked: Any = {"model": BASE, "prompt": "Once", "temperature": 0, "max_tokens": 6}
            whole = await client.completions.create(**asked)
            chunks = [chunk async for chunk in await client.completions.create(**asked, stream=True)]
            assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
            return whole.choices[0].text

        chats, texts = await asyncio.gather(
            asyncio.gather(*(chat() for _ in range(4))), asyncio.gather(*(complete() for _ in range(4)))
        )
        assert len(set(chats)) == len(set(texts)) == 1

    asked(user, use)
