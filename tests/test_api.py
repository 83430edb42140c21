"""OpenAI's surface through OpenAI's own SDK, unmodified, and what AdapterHub adds to it."""

from __future__ import annotations

import asyncio
import copy
import io
import socket
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from peft import PeftModel
from safetensors.torch import load as load_safetensors
from transformers import AutoTokenizer, PreTrainedModel

from tests.serving import BASE, CONTEXT, SECONDS, PeftFiles, Server, User, chat_lines, counted
from tests.tiny import full_logits, greedy

HELLO: list[Any] = [{"role": "user", "content": "Hello there"}]
SHORT: dict[str, Any] = {"hyperparameters": {"n_epochs": 1}}


@pytest.fixture(scope="session")
def tokenizer(base_directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(base_directory)


@pytest.fixture(scope="session")
def hello(tokenizer: Any) -> list[int]:
    """The tokens of `HELLO` up to the reply, by transformers' own chat template."""
    return tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)


def streamed_lazily(client: openai.OpenAI, **options: Any) -> Any:
    fields = {"model": BASE, "messages": HELLO, "temperature": 0, "max_tokens": 12, **options}
    return client.chat.completions.create(stream=True, **fields)


def streamed(client: openai.OpenAI, **options: Any) -> list[Any]:
    return list(streamed_lazily(client, **options))


def text_of(chunks: list[Any]) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def test_a_server_that_serves_says_so_to_anybody(server: Server) -> None:
    answer = httpx.get(f"{server.url}/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


# -- files


def test_a_file_can_be_created_retrieved_read_and_deleted(user: User) -> None:
    content = chat_lines()
    made = user.openai.files.create(file=("märchen.jsonl", content), purpose="fine-tune")
    assert (made.object, made.bytes, made.filename, made.purpose) == (
        "file",
        len(content),
        "märchen.jsonl",
        "fine-tune",
    )
    assert user.openai.files.wait_for_processing(made.id).status == "processed"
    assert user.openai.files.retrieve(made.id) == made
    assert user.openai.files.content(made.id).read() == content
    deleted = user.openai.files.delete(made.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (made.id, "file", True)
    assert user.openai.files.list().data == []
    with pytest.raises(openai.NotFoundError):
        user.openai.files.content(made.id)


def test_files_are_listed_newest_first_by_page_order_and_purpose(user: User) -> None:
    made = [user.upload(b"x", name=f"{i}.txt", purpose="user_data") for i in range(5)]
    tune = user.upload(chat_lines())
    assert [f.id for f in user.openai.files.list()] == [tune, *made[::-1]]
    assert [f.id for f in user.openai.files.list(limit=2)] == [tune, *made[::-1]], "the SDK follows the pages"
    assert [f.id for f in user.openai.files.list(order="asc", limit=4)] == [*made, tune]
    assert [f.id for f in user.openai.files.list(purpose="fine-tune")] == [tune]
    first = user.openai.files.list(limit=2)
    assert first.has_more
    assert [f.id for f in first.data] == [tune, made[4]]
    last = user.openai.files.list(after=made[2], limit=2)
    assert not last.has_more
    assert [f.id for f in last.data] == [made[1], made[0]]


# -- jobs


def test_a_job_shows_what_was_asked_for_and_then_what_it_does(user: User) -> None:
    file = user.upload(chat_lines())
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": "auto"}}}
    made = user.openai.fine_tuning.jobs.create(
        model=BASE, training_file=file, suffix="tone", seed=5, method=method, metadata={"team": "a"}
    )
    assert made.object == "fine_tuning.job"
    assert made.status == "validating_files"
    assert (made.model, made.training_file, made.seed, made.metadata) == (BASE, file, 5, {"team": "a"})
    assert (made.organization_id, made.user_provided_suffix) == (user.owner, "tone")
    assert made.validation_file is None
    assert (made.fine_tuned_model, made.finished_at, made.error, made.result_files) == (None, None, None, [])
    assert made.hyperparameters.n_epochs == 1
    done = user.job(made.id, "succeeded")
    assert done.fine_tuned_model.startswith(f"ft:{BASE}:{user.owner}:tone:")
    assert done.method.type == "supervised"
    assert (done.hyperparameters.n_epochs, done.hyperparameters.batch_size) == (1, 4)
    assert done.created_at <= done.finished_at
    assert user.openai.fine_tuning.jobs.retrieve(made.id) == done


def test_the_deprecated_hyperparameters_at_the_top_count_too(user: User) -> None:
    job = user.openai.fine_tuning.jobs.create(
        model=BASE, training_file=user.upload(chat_lines()), hyperparameters={"n_epochs": 2, "batch_size": 12}
    )
    done = user.job(job.id, "succeeded")
    assert (done.hyperparameters.n_epochs, done.hyperparameters.batch_size) == (2, 12)
    assert done.fine_tuned_model.startswith(f"ft:{BASE}:{user.owner}:{job.id.removeprefix('ftjob-')[:8]}:")


def test_jobs_are_listed_newest_first_by_page_and_metadata(user: User) -> None:
    file = user.upload(chat_lines())
    jobs = user.openai.fine_tuning.jobs
    made = [
        jobs.create(model=BASE, training_file=file, hyperparameters={"n_epochs": 1}, metadata={"team": team}).id
        for team in ("a", "b", "a", "a")
    ]
    assert [j.id for j in jobs.list()] == made[::-1]
    assert [j.id for j in jobs.list(limit=1)] == made[::-1], "the SDK follows the pages"
    assert [j.id for j in jobs.list(metadata={"team": "b"})] == [made[1]]
    page = jobs.list(limit=2, metadata={"team": "a"})
    assert ([j.id for j in page.data], page.has_more) == ([made[3], made[2]], True)
    page = jobs.list(after=made[2], limit=2)
    assert ([j.id for j in page.data], page.has_more) == ([made[1], made[0]], False)
    plain = jobs.create(model=BASE, training_file=file, hyperparameters={"n_epochs": 1}).id
    assert [j["id"] for j in user.http.get("/v1/fine_tuning/jobs?metadata=null").json()["data"]] == [plain]
    for job in (*made, plain):
        user.job(job, "succeeded")


def test_a_dpo_job_learns_from_pairs_with_a_validation_file(user: User) -> None:
    pair = (
        '{"input": {"messages": [{"role": "user", "content": "Say %d"}]}, '
        '"preferred_output": [{"role": "assistant", "content": "Aye"}], '
        '"non_preferred_output": [{"role": "assistant", "content": "No"}]}'
    )
    training, validation = ("\n".join(pair % i for i in range(a, b)).encode() for a, b in ((0, 12), (12, 16)))
    method: Any = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 3}}}
    made = user.openai.fine_tuning.jobs.create(
        model=BASE, training_file=user.upload(training), validation_file=user.upload(validation), method=method
    )
    done = user.job(made.id, "succeeded")
    assert done.method is not None
    assert (done.method.type, done.validation_file) == ("dpo", made.validation_file)
    assert done.method.dpo is not None
    assert done.method.dpo.hyperparameters.beta == 0.2
    shown = user.http.get(f"/v1/fine_tuning/jobs/{made.id}").json()
    assert [shown["report"][part]["items"] for part in ("training", "validation")] == [12, 4]
    assert shown["estimate"]["tokens"] == shown["trained_tokens"]
    assert shown["proof"]["passed"]
    assert shown["proof"]["held_out"]


def test_events_are_listed_newest_first_and_page_by_page(user: User) -> None:
    job = user.train(chat_lines(), n_epochs=1)
    user.job(job, "succeeded")
    jobs = user.openai.fine_tuning.jobs
    every = jobs.list_events(job, limit=100).data
    assert every[0].message == "The job has successfully completed"
    assert every[-1].message == f"Created fine-tuning job: {job}"
    assert all(e.object == "fine_tuning.job.event" and e.id.startswith("ftevent-") for e in every)
    assert list(jobs.list_events(job, limit=3)) == every, "the SDK follows the pages"
    page = jobs.list_events(job, after=every[1].id, limit=2)
    assert (page.data, page.has_more) == (every[2:4], True)


def test_a_retried_creation_makes_one_job_even_when_the_first_is_done(user: User) -> None:
    request: dict[str, Any] = {"model": BASE, "training_file": user.upload(chat_lines()), "suffix": "once", **SHORT}
    jobs = user.openai.fine_tuning.jobs
    retried = {"x-stainless-retry-count": "1"}
    made = jobs.create(**request)
    user.job(made.id, "succeeded")
    assert jobs.create(**request, extra_headers=retried).id == made.id
    assert jobs.create(**{**request, "suffix": "twice"}, extra_headers=retried).id != made.id
    assert jobs.create(**request).id != made.id, "the same again, on purpose"
    assert len(jobs.list().data) == 3


def test_the_sdks_own_retry_after_a_lost_answer_makes_one_job(user: User) -> None:
    file = user.upload(chat_lines())
    with losing_the_first_answer(user.url) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=user.key, max_retries=2, timeout=SECONDS)
        with client:
            job = client.fine_tuning.jobs.create(model=BASE, training_file=file, **SHORT)
    assert [j.id for j in user.openai.fine_tuning.jobs.list()] == [job.id]


@contextmanager
def losing_the_first_answer(url: str) -> Iterator[str]:
    """A proxy that passes requests on, but hangs up instead of giving the first answer back."""
    where = urlsplit(url)
    upstream = (where.hostname, where.port)
    listener = socket.create_server(("127.0.0.1", 0))
    lost = threading.Event()

    def pass_on(source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if answers and not lost.is_set():
                    lost.set()
                    break
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(upstream)
                with closing(client), closing(server):
                    back = threading.Thread(target=pass_on, args=(server, client, True))
                    back.start()
                    pass_on(client, server, False)
                    back.join()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(SECONDS)
    assert lost.is_set()


# -- models


def test_models_lists_the_base_first_then_ones_own_and_nothing_else(
    server: Server, user: User, adapter: PeftFiles
) -> None:
    server.user().import_adapter(adapter, "theirs")
    version = user.import_adapter(adapter, "mine")["versions"][0]["model"]
    assert [m.id for m in user.openai.models.list()] == [BASE, f"{user.owner}/mine", version]
    for name in (BASE, f"{user.owner}/mine", version):
        model = user.openai.models.retrieve(name)
        assert (model.id, model.object) == (name, "model")
        assert model.owned_by == ("adapterhub" if name == BASE else user.owner)


def test_deleting_a_version_gives_the_name_back_to_the_one_before(
    user: User, adapter: PeftFiles, other_adapter: PeftFiles
) -> None:
    alias = f"{user.owner}/mine"
    user.import_adapter(adapter, "mine")
    before = user.ask(alias)
    second = user.import_adapter(other_adapter, "mine")["versions"][0]["model"]
    assert user.ask(alias) != before
    deleted = user.openai.models.delete(second)
    assert (deleted.id, deleted.deleted) == (second, True)
    assert user.ask(alias) == before
    with pytest.raises(openai.NotFoundError):
        user.ask(second)


def test_deleting_a_name_deletes_all_its_versions_and_their_files(
    server: Server, user: User, base_model: PreTrainedModel, tmp_path: Path
) -> None:
    stored = server.stored()
    for seed in (31, 32):
        user.import_adapter(PeftFiles(base_model, tmp_path / str(seed), seed=seed), "mine")
    names = [m.id for m in user.openai.models.list()][1:]
    assert len(names) == 3
    assert len(server.stored() - stored) == 2
    user.openai.models.delete(f"{user.owner}/mine")
    assert [m.id for m in user.openai.models.list()] == [BASE]
    assert server.stored() == stored
    for name in names:
        with pytest.raises(openai.NotFoundError):
            user.openai.models.retrieve(name)


# -- chat completions


def test_a_chat_answer_is_what_transformers_generates(
    user: User, base_model: PreTrainedModel, tokenizer: Any, hello: list[int]
) -> None:
    answer = user.openai.chat.completions.create(model=BASE, messages=HELLO, temperature=0, max_tokens=12)
    choice = answer.choices[0]
    assert choice.message.content == tokenizer.decode(greedy(base_model, hello, 12))
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "length")
    assert (answer.object, answer.model) == ("chat.completion", BASE)
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(hello), 12)
    assert answer.usage.total_tokens == len(hello) + 12


def test_a_stream_says_the_same_piece_by_piece(user: User) -> None:
    whole = user.ask(BASE, max_tokens=12)
    chunks = streamed(user.openai)
    assert len(chunks) > 6
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert len({c.id for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert text_of(chunks) == whole
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_include_usage_adds_one_last_chunk_without_choices(user: User, hello: list[int]) -> None:
    chunks = streamed(user.openai, stream_options={"include_usage": True})
    assert all(c.usage is None and len(c.choices) == 1 for c in chunks[:-1])
    assert chunks[-1].choices == []
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (len(hello), 12)
    assert all(c.usage is None for c in streamed(user.openai))


def test_a_stream_ends_with_done(user: User) -> None:
    body = {"model": BASE, "messages": HELLO, "max_tokens": 3, "stream": True}
    answer = user.http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("\n\ndata: [DONE]\n\n")


def test_a_stop_string_ends_the_text_before_it_wherever_the_tokens_part(user: User) -> None:
    whole = user.ask(BASE, max_tokens=12)
    for at in range(5, 20, 3):
        stop = whole[at : at + 6]
        cut = whole[: whole.index(stop)]
        answer = user.openai.chat.completions.create(
            model=BASE, messages=HELLO, temperature=0, max_tokens=12, stop=stop
        )
        assert answer.choices[0].message.content == cut
        assert answer.choices[0].finish_reason == "stop"
        chunks = streamed(user.openai, stop=[stop])
        assert text_of(chunks) == cut, "nothing of the stop string may have been shown"
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_stop_string_that_comes_first_wins(user: User) -> None:
    whole = user.ask(BASE, max_tokens=12)
    stops = [whole[20:24], "never said", whole[8:12]]
    assert user.ask(BASE, max_tokens=12, stop=stops) == whole[: min(whole.index(s) for s in (stops[0], stops[2]))]


def test_text_held_back_for_a_stop_string_that_does_not_come_is_shown(user: User) -> None:
    whole = user.ask(BASE, max_tokens=12)
    almost = [whole[5:12] + "\0", whole[-4:] + "\0"]
    assert user.ask(BASE, max_tokens=12, stop=almost) == whole
    assert text_of(streamed(user.openai, stop=almost)) == whole


def test_a_seed_gives_the_same_answer_again_and_another_one_does_not(user: User) -> None:
    def ask(seed: int) -> str:
        return user.ask(BASE, temperature=1.5, top_p=0.9, seed=seed, max_tokens=16)

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(4)}) == 4


def test_several_answers_are_those_of_one_seed_after_the_other(user: User) -> None:
    sampled: dict[str, Any] = {"temperature": 2, "max_tokens": 8}
    alone = [user.ask(BASE, seed=seed, **sampled) for seed in (5, 6, 7)]
    answer = user.openai.chat.completions.create(model=BASE, messages=HELLO, n=3, seed=5, **sampled)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert [c.message.content for c in answer.choices] == alone
    assert len(set(alone)) == 3
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24
    chunks = streamed(user.openai, n=3, seed=5, **sampled)
    for index in range(3):
        mine = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == alone[index]
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + ["length"]


def test_log_probabilities_are_those_of_the_model(
    user: User, base_model: PreTrainedModel, tokenizer: Any, hello: list[int]
) -> None:
    tokens = greedy(base_model, hello, 6)
    expected = full_logits(base_model, hello + tokens).log_softmax(-1)[len(hello) - 1 : -1]
    best = expected.topk(5)
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "logprobs": True, "top_logprobs": 5}
    whole = user.openai.chat.completions.create(model=BASE, messages=HELLO, **asked).choices[0]
    chunks = streamed(user.openai, **asked)
    pieces = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs is not None]
    for content in (whole.logprobs.content, [entry for piece in pieces for entry in piece.content]):  # type: ignore[union-attr]
        assert [entry.token for entry in content] == [tokenizer.decode([t]) for t in tokens]
        assert [bytes(entry.bytes).decode() for entry in content] == [entry.token for entry in content]
        assert [entry.logprob for entry in content] == pytest.approx(
            [float(expected[i, t]) for i, t in enumerate(tokens)], abs=1e-3
        )
        for i, entry in enumerate(content):
            assert [b.token for b in entry.top_logprobs] == [tokenizer.decode([t]) for t in best.indices[i]]
            assert [b.logprob for b in entry.top_logprobs] == pytest.approx(best.values[i].tolist(), abs=1e-3)
    asked["top_logprobs"] = 0
    bare = user.openai.chat.completions.create(model=BASE, messages=HELLO, **asked).choices[0]
    assert [entry.top_logprobs for entry in bare.logprobs.content] == [[]] * 6  # type: ignore[union-attr]


def test_penalties_and_biases_change_the_choice_as_openai_describes(
    user: User, base_model: PreTrainedModel, tokenizer: Any, hello: list[int]
) -> None:
    """Against a loop over transformers' logits."""
    plain = greedy(base_model, hello, 10)
    bias = {plain[0]: -100, plain[3]: 30, 1000: 25}
    for frequency, presence, biases in ((2.0, 0.0, {}), (0.0, 2.0, {}), (-2.0, 1.5, bias)):
        tokens: list[int] = []
        for _ in range(10):
            logits = full_logits(base_model, hello + tokens)[-1]
            for token in set(tokens):
                logits[token] -= frequency * tokens.count(token) + presence
            for token, value in biases.items():
                logits[token] += value
            tokens.append(int(logits.argmax()))
        answer = user.ask(
            BASE,
            max_tokens=10,
            frequency_penalty=frequency,
            presence_penalty=presence,
            logit_bias={str(token): value for token, value in biases.items()},
        )
        assert answer == tokenizer.decode(tokens)
    assert tokens != plain


def test_both_names_of_the_token_limit_are_understood(user: User) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = user.openai.chat.completions.create(model=BASE, messages=HELLO, **{name: 5})
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 5
        assert answer.choices[0].finish_reason == "length"


def test_an_answer_ends_where_the_model_ends_its_turn_unless_told_otherwise(user: User) -> None:
    model = user.job(user.train(chat_lines()), "succeeded").fine_tuned_model

    def ask(**more: Any) -> Any:
        said: list[Any] = [{"role": "user", "content": "Say 3"}]
        return user.openai.chat.completions.create(model=model, messages=said, temperature=0, max_tokens=30, **more)

    answer = ask()
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Aye", "stop")
    assert answer.usage.completion_tokens < 10
    chunks = list(ask(stream=True))
    assert (text_of(chunks), chunks[-1].choices[0].finish_reason) == ("Aye", "stop")
    for load_generators in ({"ignore_eos": True}, {"min_tokens": 30}):
        longer = ask(extra_body=load_generators)
        assert longer.choices[0].finish_reason == "length"
        assert longer.usage.completion_tokens == 30


def test_without_a_limit_an_answer_goes_on_to_the_end_of_the_context(user: User) -> None:
    answer = user.openai.chat.completions.create(model=BASE, messages=HELLO, temperature=0)
    assert answer.usage is not None
    assert answer.usage.total_tokens == CONTEXT
    assert answer.choices[0].finish_reason == "length"


def test_content_in_parts_and_every_role_are_read_as_text(user: User, tokenizer: Any) -> None:
    parts: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "user", "content": "And now?"},
    ]
    plain = copy.deepcopy(parts)
    plain[1]["content"], plain[2]["content"] = "Hello there", "Hi"
    answers = [
        user.openai.chat.completions.create(model=BASE, messages=m, temperature=0, max_tokens=6) for m in (parts, plain)
    ]
    assert answers[0].choices == answers[1].choices
    assert answers[0].usage is not None
    plain[0]["role"] = "system"  # which is what this base calls it
    expected = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    assert answers[0].usage.prompt_tokens == len(expected)


def test_unknown_fields_and_those_that_ask_for_what_is_done_anyway_pass(user: User) -> None:
    user.ask(
        BASE,
        logprobs=False,
        response_format={"type": "text"},
        tool_choice="none",
        reasoning_effort="none",
        user="somebody",
        metadata={"a": "b"},
        extra_body={"something_new": {"deep": [1, 2]}},
    )


def test_several_streams_at_once_through_the_async_sdk(user: User, adapter: PeftFiles) -> None:
    user.import_adapter(adapter, "mine")
    models = [BASE, f"{user.owner}/mine"] * 3
    alone = {model: user.ask(model, max_tokens=12) for model in set(models)}

    async def ask(client: openai.AsyncOpenAI, model: str) -> str:
        stream = await client.chat.completions.create(
            model=model, messages=HELLO, temperature=0, max_tokens=12, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{user.url}/v1", api_key=user.key, timeout=SECONDS) as client:
            return await asyncio.gather(*(ask(client, model) for model in models))

    assert asyncio.run(together()) == [alone[model] for model in models]


# -- completions


def test_a_prompt_is_a_text_or_its_token_ids(user: User, base_model: PreTrainedModel, tokenizer: Any) -> None:
    text = "Once upon a time"
    ids = tokenizer(text).input_ids
    expected = tokenizer.decode(greedy(base_model, ids, 8))
    for prompt in (text, ids):
        answer = user.openai.completions.create(model=BASE, prompt=prompt, temperature=0, max_tokens=8)
        assert answer.object == "text_completion"
        assert answer.choices[0].text == expected
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 8)


def test_several_prompts_get_the_answers_they_get_alone(user: User, tokenizer: Any) -> None:
    texts = ["Once upon a time", "In the beginning", "Call me"]
    alone = [user.openai.completions.create(model=BASE, prompt=t, temperature=0, max_tokens=6) for t in texts]
    for prompts in (texts, [tokenizer(t).input_ids for t in texts]):
        answer = user.openai.completions.create(model=BASE, prompt=prompts, temperature=0, max_tokens=6)
        assert [(c.index, c.text) for c in answer.choices] == [(i, a.choices[0].text) for i, a in enumerate(alone)]
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 18


def test_a_completion_streams_and_has_sixteen_tokens_by_default(user: User) -> None:
    whole = user.openai.completions.create(model=BASE, prompt="Once", temperature=0)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 16
    stream = user.openai.completions.create(
        model=BASE, prompt="Once", temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == "length"
    assert counted(chunks[-1].usage) == counted(whole.usage)


def test_several_prompts_and_answers_are_streamed_side_by_side(user: User) -> None:
    asked: dict[str, Any] = {"model": BASE, "prompt": ["Once", "Call me"], "n": 2, "seed": 1, "max_tokens": 5}
    whole = user.openai.completions.create(**asked)
    assert [c.index for c in whole.choices] == [0, 1, 2, 3]
    texts = [""] * 4
    for chunk in user.openai.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [c.text for c in whole.choices]


def test_log_probabilities_of_a_completion_come_with_the_offsets_of_their_tokens(
    user: User, base_model: PreTrainedModel, tokenizer: Any
) -> None:
    prompt = tokenizer("Once upon a time").input_ids
    tokens = greedy(base_model, prompt, 5)
    expected = full_logits(base_model, prompt + tokens).log_softmax(-1)[len(prompt) - 1 : -1]
    answer = user.openai.completions.create(model=BASE, prompt=prompt, temperature=0, max_tokens=5, logprobs=2)
    choice: Any = answer.choices[0]
    assert choice.logprobs.tokens == [tokenizer.decode([t]) for t in tokens]
    assert choice.logprobs.token_logprobs == pytest.approx(
        [float(expected[i, t]) for i, t in enumerate(tokens)], abs=1e-3
    )
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        assert choice.text[offset:].startswith(token)
    assert [set(b) for b in choice.logprobs.top_logprobs] == [
        {tokenizer.decode([t]) for t in row} for row in expected.topk(2).indices
    ]


def test_any_tokens_at_all_become_text(user: User) -> None:
    """Random tokens are mostly pieces of words, and often pieces of characters."""
    for seed in range(20):
        prompt = [(seed * 7919 + i * 104729) % 49152 for i in range(1 + seed)]
        answer = user.openai.completions.create(model=BASE, prompt=prompt, temperature=2, seed=seed, max_tokens=24)
        assert answer.choices[0].finish_reason in ("length", "stop")


# -- where an answer comes from


def test_every_answer_says_which_version_in_which_tier_made_it(server: Server, user: User, adapter: PeftFiles) -> None:
    imported = user.import_adapter(adapter, "mine")
    server.evict(imported["id"])
    seen = []
    for model in (BASE, f"{user.owner}/mine", imported["versions"][0]["model"]):
        raw = user.openai.chat.completions.with_raw_response.create(model=model, messages=HELLO, max_tokens=1)
        answer = raw.parse()
        seen.append((raw.headers["x-adapterhub-version"], raw.headers["x-adapterhub-tier"], answer.system_fingerprint))
        assert float(raw.headers["x-adapterhub-load-ms"]) >= 0
        assert raw.headers["x-request-id"].startswith("req-")
        assert answer._request_id == raw.headers["x-request-id"]
    version, fingerprint = imported["current"], server.hub.base.fingerprint[:10]
    digest = imported["versions"][0]["digest"][:10]
    assert seen == [
        ("base", "base", f"fp_{fingerprint}"),
        (version, "disk", f"fp_{fingerprint}_{digest}"),
        (version, "device", f"fp_{fingerprint}_{digest}"),
    ]


def test_a_streamed_answer_says_so_before_its_first_chunk(server: Server, user: User, adapter: PeftFiles) -> None:
    imported = user.import_adapter(adapter, "mine")
    server.evict(imported["id"])
    raw = user.openai.chat.completions.with_raw_response.create(
        model=f"{user.owner}/mine", messages=HELLO, max_tokens=3, stream=True
    )
    assert (raw.headers["x-adapterhub-tier"], raw.headers["x-adapterhub-version"]) == ("disk", imported["current"])
    chunks = list(raw.parse())
    assert {c.system_fingerprint for c in chunks} == {chunks[0].system_fingerprint}


def test_an_evicted_adapter_comes_from_disk_and_then_from_the_device(
    server: Server, user: User, adapter: PeftFiles
) -> None:
    imported = user.import_adapter(adapter, "mine")
    alias = f"{user.owner}/mine"
    user.ask(alias)
    assert user.http.get("/v1/adapters").json()["data"][0]["tier"] == "device"
    answer = server.admin.http.post(f"/admin/adapters/{imported['id']}/evict").json()
    assert answer == {"id": imported["id"], "object": "adapter", "evicted": True, "in_use": 0}
    assert user.http.get(f"/v1/adapters/{imported['id']}").json()["tier"] == "disk"
    assert [user.tier(alias), user.tier(alias)] == ["disk", "device"]


def test_an_admin_sees_the_tiers_and_everybodys_adapters(server: Server, user: User, adapter: PeftFiles) -> None:
    imported = user.import_adapter(adapter, "mine")
    found = server.admin.http.get("/admin/adapters").json()["data"]
    assert imported["id"] in [a["id"] for a in found]
    tiers = server.admin.http.get("/admin/tiers").json()
    assert tiers["base"]["name"] == BASE
    assert tiers["tiers"]["device"]["budget_bytes"] == server.hub.config.device_bytes
    assert 0 < tiers["tiers"]["disk"]["used_bytes"] <= tiers["tiers"]["disk"]["budget_bytes"]


# -- adapters in and out


def test_an_imported_adapter_answers_as_peft_does(
    user: User, adapter: PeftFiles, other_adapter: PeftFiles, tokenizer: Any, hello: list[int]
) -> None:
    for files, name in ((adapter, "one"), (other_adapter, "two")):
        imported = user.import_adapter(files, name)
        assert imported["warnings"] == []
        for model in (f"{user.owner}/{name}", imported["versions"][0]["model"]):
            assert user.ask(model, max_tokens=12) == tokenizer.decode(greedy(files.model, hello, 12))
    assert user.ask(f"{user.owner}/one") != user.ask(f"{user.owner}/two") != user.ask(BASE)


def test_what_is_downloaded_is_what_was_imported_bit_for_bit(user: User, adapter: PeftFiles) -> None:
    imported = user.import_adapter(adapter, "mine")
    answer = user.http.get(f"/v1/adapters/{imported['id']}/download")
    assert answer.headers["content-disposition"] == 'attachment; filename="mine-v1.zip"'
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert sorted(archive.namelist()) == ["adapter_config.json", "adapter_model.safetensors"]
        found, sent = load_safetensors(archive.read("adapter_model.safetensors")), load_safetensors(adapter.weights)
    assert found.keys() == sent.keys()
    assert all(found[key].equal(sent[key]) and found[key].dtype == sent[key].dtype for key in sent)


def test_a_trained_adapter_loads_in_peft_and_says_the_same_there(
    user: User, base_model: PreTrainedModel, tokenizer: Any, hello: list[int], tmp_path: Path
) -> None:
    model = user.job(user.train(chat_lines(), suffix="mine"), "succeeded").fine_tuned_model
    [shown] = user.http.get("/v1/adapters").json()["data"]
    archive = user.http.get(f"/v1/adapters/{shown['id']}/download").content
    zipfile.ZipFile(io.BytesIO(archive)).extractall(tmp_path)
    wrapped = PeftModel.from_pretrained(copy.deepcopy(base_model), tmp_path).eval()
    answer = user.ask(model, max_tokens=12)
    assert answer == tokenizer.decode(greedy(wrapped, hello, 12))
    assert answer != user.ask(BASE, max_tokens=12)


def test_a_new_version_takes_the_name_over_and_the_old_one_still_serves(
    user: User, adapter: PeftFiles, other_adapter: PeftFiles
) -> None:
    alias = f"{user.owner}/mine"
    first = user.import_adapter(adapter, "mine")
    old = first["versions"][0]["model"]
    said = user.ask(alias)
    second = user.import_adapter(other_adapter, "mine")
    assert second["id"] == first["id"]
    assert [v["number"] for v in second["versions"]] == [2, 1]
    assert second["current"] == second["versions"][0]["id"]
    assert user.ask(alias) == user.ask(second["versions"][0]["model"]) != said
    assert user.ask(old) == said
    assert len(user.http.get("/v1/adapters").json()["data"]) == 1


@pytest.mark.parametrize("change", ["delete", "replace", "evict"])
def test_a_stream_goes_on_with_the_version_it_began_with(
    server: Server, user: User, adapter: PeftFiles, other_adapter: PeftFiles, change: str
) -> None:
    alias = f"{user.owner}/mine"
    imported = user.import_adapter(adapter, "mine")
    whole = user.ask(alias, max_tokens=200)
    chunks = iter(streamed_lazily(user.openai, model=alias, max_tokens=200))
    begun = [next(chunks) for _ in range(3)]
    if change == "delete":
        assert user.http.delete(f"/v1/adapters/{imported['id']}").is_success
    elif change == "replace":
        user.import_adapter(other_adapter, "mine")
    else:
        server.evict(imported["id"])
    assert text_of([*begun, *chunks]) == whole
    if change == "delete":
        with pytest.raises(openai.NotFoundError):
            user.ask(alias)
    else:
        assert (user.ask(alias, max_tokens=200) == whole) is (change == "evict")


def test_many_owners_at_once_do_not_disturb_one_another(
    server: Server, adapter: PeftFiles, other_adapter: PeftFiles
) -> None:
    users = [server.user() for _ in range(8)]
    expected = {}
    for files in (adapter, other_adapter):
        users[0].import_adapter(files, "first")
        expected[files] = users[0].ask(f"{users[0].owner}/first")

    def work(at: int) -> None:
        user, files = users[at], (adapter, other_adapter)[at % 2]
        for i in range(4):
            name = f"mine-{i % 2}"
            identity = user.import_adapter(files, name)["id"]
            file = user.upload(bytes([at]) * 1000, purpose="user_data")
            assert user.ask(f"{user.owner}/{name}") == expected[files]
            assert user.openai.files.content(file).read() == bytes([at]) * 1000
            if i % 2:
                user.openai.files.delete(file)
                assert user.http.delete(f"/v1/adapters/{identity}").is_success
        assert [a["name"] for a in user.http.get("/v1/adapters").json()["data"]] == ["first", "mine-0"][at > 0 :]
        assert len(user.openai.files.list().data) == 2

    with ThreadPoolExecutor(len(users)) as pool:
        list(pool.map(work, range(len(users))))


def test_an_adapter_can_be_deleted_and_its_name_used_again(user: User, adapter: PeftFiles) -> None:
    first = user.import_adapter(adapter, "mine")
    user.ask(f"{user.owner}/mine")
    answer = user.http.delete(f"/v1/adapters/{first['id']}").json()
    assert answer == {"id": first["id"], "object": "adapter", "deleted": True}
    assert user.http.get(f"/v1/adapters/{first['id']}").status_code == 404
    again = user.import_adapter(adapter, "mine")
    assert again["id"] != first["id"]
    assert [v["number"] for v in again["versions"]] == [1]
    assert user.ask(f"{user.owner}/mine")


def test_the_same_adapter_is_one_file_of_an_owner_and_another_of_somebody_else(
    server: Server, user: User, base_model: PreTrainedModel, tmp_path: Path
) -> None:
    files = PeftFiles(base_model, tmp_path / "one", seed=41)
    stored = server.stored()
    other = server.user()
    mine, same = (user.import_adapter(files, name) for name in ("mine", "same"))
    assert len(server.stored() - stored) == 1
    theirs = other.import_adapter(files, "theirs")
    assert len(server.stored() - stored) == 2
    said = user.ask(f"{user.owner}/mine")
    user.http.delete(f"/v1/adapters/{mine['id']}")
    assert user.ask(f"{user.owner}/same") == said
    user.http.delete(f"/v1/adapters/{same['id']}")
    assert len(server.stored() - stored) == 1
    assert other.ask(f"{other.owner}/theirs") == said
    other.http.delete(f"/v1/adapters/{theirs['id']}")
    assert server.stored() == stored


def test_an_adapter_that_changes_nothing_is_imported_with_a_warning(
    user: User, base_model: PreTrainedModel, tmp_path: Path
) -> None:
    imported = user.import_adapter(PeftFiles(base_model, tmp_path, size=0.0), "mine")
    assert imported["warnings"] == ["All of its modules change nothing: A or B is zero"]
    assert user.ask(f"{user.owner}/mine") == user.ask(BASE)
