import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import fields

import pytest

from serve.client import AsyncClient, Client, RequestOptions
from serve.errors import DuplicateRequest, InvalidRequest, Overloaded, Unavailable
from serve.request import FinishReason, GenerateRequest, SamplingParams
from tests.serve.fake_engine import TIMEOUT_S, FakeEngine, FakeInfo, served, text_front
from tools.generate_proto import ROOT

NOWHERE = "127.0.0.1:1"
"""A port that nothing listens on."""


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    engine = FakeEngine()
    with (
        engine,
        served(text_front(engine)) as address,
        Client(address, timeout_s=TIMEOUT_S) as client,
    ):
        yield client


def test_options_are_what_a_request_has():
    sampling = {field.name for field in fields(SamplingParams)}
    request = {field.name for field in fields(GenerateRequest)} - {"prompt_ids", "sampling"}
    assert RequestOptions.__annotations__.keys() == sampling | request


def test_client_tells_model_and_load(client: Client):
    info = client.model_info()
    assert (info.name, info.vocab_size, info.max_context) == ("fake", 256, 4_096)
    assert info.mesh == {"data": 1, "stage": 1, "tensor": 1}
    assert (info.eos_ids, info.has_tokenizer, info.has_chat_template) == ((0,), True, True)
    load = client.load()
    assert (load.num_running, load.pages_total, load.draining) == (0, 64, False)
    assert client.flush_cache() == 7


def test_text_survives_the_way_to_ids_and_back(client: Client):
    assert client.tokenize("naïve") == [0, *"naïve".encode()]
    assert client.detokenize(client.tokenize("naïve 日本")) == "naïve 日本"
    assert client.tokenize([{"role": "user", "content": "hi"}]) == [*b"user:hi|"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([-1], "-1"),
        ([2**32], "4294967296"),
        (["word"], "'str' object cannot be interpreted as an integer"),
        ([{"rolle": "user"}], "rolle"),
        ("\ud800", "surrogates"),
    ],
)
def test_a_prompt_that_has_no_place_on_the_wire_is_refused(client: Client, prompt, message: str):
    with pytest.raises(InvalidRequest, match=message):
        client.generate(prompt)


def test_an_option_out_of_range_is_refused_before_it_is_sent():
    with Client(NOWHERE) as client, pytest.raises(InvalidRequest, match="top_p is 2"):
        client.generate("hi", top_p=2)


def test_none_is_the_default(client: Client):
    assert client.generate_text("hi", max_tokens=2, seed=None, logprobs=None) == "ab"


def test_a_server_that_is_not_there_is_unavailable():
    with Client(NOWHERE, timeout_s=TIMEOUT_S) as client:
        assert not client.is_serving()
        with pytest.raises(Unavailable, match=NOWHERE):
            client.load()
        with pytest.raises(Unavailable, match=NOWHERE):
            client.generate_text("hi")


def test_a_prompt_larger_than_a_message_may_be_is_refused(client: Client):
    with pytest.raises(InvalidRequest, match="larger than max"):
        client.generate_text("x" * 17 * 2**20)


def test_drain_refuses_what_comes():
    with FakeEngine() as engine, served(text_front(engine)) as address, Client(address) as client:
        assert client.is_serving()
        client.drain()
        assert not client.is_serving()
        assert client.load().draining
        with pytest.raises(Unavailable, match="draining"):
            client.generate_text("hi")


@asynccontextmanager
async def async_client(engine: FakeEngine) -> AsyncIterator[AsyncClient]:
    with engine, served(text_front(engine)) as address:
        async with AsyncClient(address, timeout_s=TIMEOUT_S) as client:
            yield client


def test_async_client_has_the_calls_of_client():
    async def main():
        engine = FakeEngine()
        async with async_client(engine) as client:
            assert await client.generate_text("hi", max_tokens=3) == "abc"
            chunks = [chunk async for chunk in client.generate([1], max_tokens=2, request_id="r")]
            assert {chunk.request_id for chunk in chunks} == {"r"}
            assert chunks[-1].finish_reason is FinishReason.LENGTH
            assert await client.tokenize("hi") == [0, 104, 105]
            assert await client.detokenize([104, 105]) == "hi"
            assert (await client.model_info()).name == "fake"
            assert (await client.load()).num_finished == 2
            assert await client.flush_cache() == 7
            assert await client.is_serving()
            await client.abort("unknown")
            with pytest.raises(InvalidRequest, match="outside the vocabulary"):
                await client.generate_text([256])
            await client.drain()
            assert not await client.is_serving()
            with pytest.raises(Unavailable, match="draining"):
                await client.generate_text("hi")

    asyncio.run(main())
    assert public(Client) - public(AsyncClient) == set()


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def test_closing_an_async_stream_leaves_the_engine():
    async def main():
        engine = FakeEngine(stepped=True)
        async with async_client(engine) as client:
            chunks = client.generate([1], request_id="r1")
            engine.allow(1)
            assert (await anext(chunks)).text == "a"
            with pytest.raises(DuplicateRequest):
                await client.generate_text([1], request_id="r1")
            await chunks.aclose()
            await asyncio.to_thread(engine.wait_empty)
            assert engine.aborted == ["r1"]

    asyncio.run(main())


def test_async_streams_run_side_by_side():
    async def main():
        engine = FakeEngine(max_queue=0, info=FakeInfo(max_batch=8), stepped=True)
        async with async_client(engine) as client:
            texts = [client.generate_text([1], max_tokens=2) for _ in range(9)]
            running = [asyncio.ensure_future(text) for text in texts]
            first, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            assert [type(task.exception()) for task in first] == [Overloaded]
            engine.allow(2)
            rest = await asyncio.gather(*running, return_exceptions=True)
            assert sorted(map(str, rest))[:8] == ["ab"] * 8

    asyncio.run(main())


def test_client_imports_neither_jax_nor_the_server():
    code = "import sys, serve.client; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    modules = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ours = {name for name in modules.split() if name.split(".")[0] in ("serve", "model", "cache")}
    assert {name for name in ours if not name.startswith("serve.client")} == {
        "serve",
        "serve.errors",
        "serve.pb",
        "serve.pb.inference_pb2",
        "serve.pb.inference_pb2_grpc",
        "serve.request",
    }
    assert "jax" not in modules.split()
