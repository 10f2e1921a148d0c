import asyncio
import math
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from serve.api.grpc_server import MAX_MESSAGE_BYTES, GrpcServer
from serve.api.messages import MAX_POSITIONS
from serve.client import Chunk, Client
from serve.errors import DuplicateRequest, InvalidRequest, Overloaded, RequestError, Unavailable
from serve.front import Front
from serve.pb import inference_pb2 as pb
from serve.pb import inference_pb2_grpc as pb_grpc
from serve.request import FinishReason, Timings, Usage
from tests.serve.fake_engine import TIMEOUT_S, FakeEngine, FakeInfo, served, text_front
from tools.generate_proto import PACKAGE, ROOT, generate

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@contextmanager
def client_of(engine: FakeEngine) -> Iterator[Client]:
    with (
        engine,
        served(text_front(engine)) as address,
        Client(address, timeout_s=TIMEOUT_S) as client,
    ):
        yield client


@contextmanager
def channel_of(engine: FakeEngine) -> Iterator[grpc.Channel]:
    with (
        engine,
        served(text_front(engine)) as address,
        grpc.insecure_channel(address) as channel,
    ):
        yield channel


def text_of(chunks: Generator[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


# What a stream carries


def test_a_stream_carries_text_ids_usage_and_timings():
    engine = FakeEngine(stepped=True)
    with client_of(engine) as client:
        chunks = client.generate("hi", request_id="r1", max_tokens=3)
        for place in range(2):
            engine.step()
            chunk = next(chunks)
            assert (chunk.request_id, chunk.token_ids) == ("r1", (97 + place,))
            assert chunk.text == "ab"[place]
            assert (chunk.finish_reason, chunk.usage, chunk.timings) == (None, None, None)
        engine.step()
        (last,) = chunks
    assert (last.text, last.finish_reason) == ("c", FinishReason.LENGTH)
    assert last.usage == Usage(prompt_tokens=3, completion_tokens=3, cached_tokens=1)
    assert last.timings == Timings(1.0, 2.0, 3.0, num_preemptions=3)


def test_tokens_that_come_together_travel_together():
    with client_of(FakeEngine(burst=4)) as client:
        chunk, *_ = client.generate([1, 2], max_tokens=10)
    assert len(chunk.token_ids) >= 4
    assert chunk.text.startswith("abcd")


def test_prompt_may_be_text_ids_or_chat():
    engine = FakeEngine()
    with client_of(engine) as client:
        client.generate_text("hi", max_tokens=1)
        client.generate_text([0, 104, 105], max_tokens=1)
        client.generate_text([{"role": "user", "content": "hi"}], max_tokens=1)
    assert [request.prompt_ids for request in engine.submitted] == [
        (0, 104, 105),
        (0, 104, 105),
        tuple(b"user:hi|"),
    ]


def test_a_long_text_is_encoded_like_a_short_one():
    engine = FakeEngine()
    with client_of(engine) as client:
        client.generate_text("x" * 4_000, max_tokens=1)
        assert client.detokenize(client.tokenize("y" * 4_000)) == "y" * 4_000
    assert engine.submitted[0].prompt_ids == (0, *b"x" * 4_000)


def test_what_a_request_says_reaches_the_engine():
    engine = FakeEngine()
    options: dict[str, Any] = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.25,
        "min_p": 0.125,
        "seed": 2**63 - 1,
        "repetition_penalty": 1.5,
        "presence_penalty": -2.0,
        "frequency_penalty": 2.0,
        "max_tokens": 4,
        "min_tokens": 2,
        "stop": ("zz",),
        "stop_token_ids": (5, 6),
        "ignore_eos": True,
        "logprobs": 0,
        "prompt_logprobs": 20,
    }
    who: dict[str, Any] = {
        "request_id": "r",
        "tenant": "t",
        "session_id": "s",
        "cache_salt": "c",
        "priority": -3,
    }
    with client_of(engine) as client:
        client.generate_text([1], **options, **who)
        client.generate_text([1])
    given, default = engine.submitted
    assert vars(given.sampling) == options
    assert {name: getattr(given, name) for name in who} == who
    assert default.sampling == type(default.sampling)()


def test_zero_is_not_the_default():
    engine = FakeEngine()
    with client_of(engine) as client:
        client.generate_text([1], temperature=0.0, seed=0, logprobs=0, max_tokens=1)
    sampling = engine.submitted[0].sampling
    assert (sampling.temperature, sampling.seed, sampling.logprobs) == (0, 0, 0)


def test_a_stop_string_across_messages_ends_the_stream_and_the_request():
    engine = FakeEngine(stepped=True)
    with client_of(engine) as client:
        chunks = client.generate("hi", request_id="r1", stop=["cde"])
        engine.step(4)
        engine.allow(1)
        *_, last = received = list(chunks)
    assert "".join(chunk.text for chunk in received) == "ab"
    assert last.finish_reason is FinishReason.STOP
    assert last.usage == Usage(3, 5, cached_tokens=1)
    assert engine.aborted == ["r1"]


def test_no_message_ends_amid_a_character():
    answer = "naïve 日本語 🙂 text".encode()
    engine = FakeEngine(lambda _, place: answer[place], stepped=True)
    with client_of(engine) as client:
        chunks = client.generate([1], max_tokens=len(answer))
        texts: list[str] = []
        for _ in range(len(answer)):
            engine.step()
            texts.append(next(chunks).text)
    assert "".join(texts) == answer.decode()
    assert texts[answer.index("日".encode()) :][:3] == ["", "", "日"]


def test_logprobs_come_with_their_tokens():
    with client_of(FakeEngine(burst=3)) as client:
        chunks = list(client.generate([7, 8, 9], max_tokens=3, logprobs=2, prompt_logprobs=1))
    (chunk,) = chunks
    assert [position.token_id for position in chunk.logprobs] == [97, 98, 99]
    assert chunk.logprobs[0].top_ids == (0, 1)
    assert chunk.logprobs[0].top_logprobs == (0.0, -0.5)
    assert [position.token_id for position in chunk.prompt_logprobs] == [8, 9]


def test_prompt_logprobs_of_a_long_prompt_come_in_several_messages():
    prompt = [n % 256 for n in range(2 * MAX_POSITIONS + 10)]
    engine = FakeEngine(info=FakeInfo(max_context=10_000))
    with client_of(engine) as client:
        chunks = list(client.generate(prompt, max_tokens=1, prompt_logprobs=20))
    assert [len(c.prompt_logprobs) for c in chunks] == [MAX_POSITIONS, MAX_POSITIONS, 9]
    ids = [position.token_id for chunk in chunks for position in chunk.prompt_logprobs]
    assert ids == prompt[1:]
    assert [c.request_id for c in chunks] == [chunks[0].request_id] * 3
    assert chunks[-1].token_ids == (97,)


def test_64_streams_at_once_do_not_mix():
    with client_of(FakeEngine(lambda request, n: request.prompt_ids[0] + n % 3)) as client:
        streams = [client.generate([48 + n], max_tokens=30) for n in range(64)]
        with ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(text_of, streams))
    assert texts == ["".join(chr(48 + n + k % 3) for k in range(30)) for n in range(64)]


def test_a_slow_reader_gets_fewer_messages_and_holds_nobody_up():
    engine = FakeEngine(burst=8, info=FakeInfo(max_context=2**20))
    with client_of(engine) as client:
        slow = client.generate([1], max_tokens=60_000)
        assert len(text_of(client.generate([2], max_tokens=1_000))) == 1_000
        engine.wait_empty()
        chunks = list(slow)
    assert sum(len(chunk.token_ids) for chunk in chunks) == 60_000
    assert len(chunks) < 60_000 / 8


def test_a_reader_too_slow_is_refused_and_frees_the_engine():
    engine = FakeEngine(burst=1_000, info=FakeInfo(max_context=2**24))
    with client_of(engine) as client:
        slow = client.generate([1], request_id="slow", logprobs=20)
        engine.wait_for(lambda: "slow" in engine.aborted)
        engine.wait_empty()
        with pytest.raises(Overloaded, match="read the stream faster"):
            list(slow)


# Requests that leave


def test_a_cancelled_stream_leaves_the_engine():
    engine = FakeEngine(stepped=True)
    with client_of(engine) as client:
        chunks = client.generate([1], request_id="r1")
        engine.step()
        next(chunks)
        chunks.close()
        engine.wait_empty()
        assert engine.aborted == ["r1"]


def test_a_deadline_leaves_the_engine():
    engine = FakeEngine(stepped=True)
    with client_of(engine) as client, Client(client.address, timeout_s=0.2) as hasty:
        with pytest.raises(TimeoutError):
            list(hasty.generate([1], request_id="r1"))
        engine.wait_empty()
        assert engine.aborted == ["r1"]
        engine.allow(1)
        assert client.generate_text([1], max_tokens=1) == "a"


ENDLESS = """
import sys
from serve.client import Client
for chunk in Client(sys.argv[1], timeout_s=float(sys.argv[2]) or None).generate([1]):
    print(chunk.text, flush=True)
"""


@contextmanager
def endless_client(address: str, timeout_s: float) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", ENDLESS, address, str(timeout_s)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_killed_client_leaves_the_engine():
    engine = FakeEngine(stepped=True)
    with client_of(engine) as client, endless_client(client.address, 0) as process:
        engine.step()
        assert process.stdout is not None
        assert process.stdout.readline() == "a\n"
        process.kill()
        engine.wait_empty()
        assert len(engine.aborted) == 1


def test_a_deadline_holds_for_a_client_that_hangs():
    engine = FakeEngine(stepped=True)
    with client_of(engine) as client, endless_client(client.address, 2.0) as process:
        engine.step()
        assert process.stdout is not None
        assert process.stdout.readline() == "a\n"
        process.send_signal(signal.SIGSTOP)
        engine.wait_empty()
        assert len(engine.aborted) == 1


def test_abort_ends_a_stream_as_cancelled():
    engine = FakeEngine(stepped=True)
    with client_of(engine) as client:
        chunks = client.generate([1], request_id="r1")
        engine.step()
        client.abort("r1")
        client.abort("unknown")
        assert list(chunks)[-1].finish_reason is FinishReason.CANCELLED
        with pytest.raises(InvalidRequest, match="request_id is empty"):
            client.abort("")


# Requests that are refused


def invalid(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="hi", sampling=pb.SamplingParams(**fields))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (pb.GenerateRequest(), "no prompt; set one of text, token_ids, chat"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "the prompt is empty"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**32 - 1])), "outside the vocabulary"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 4_096)), "shorten the prompt"),
        (pb.GenerateRequest(text="x" * 4_096), "a context of 4096 allows 4095"),
        (pb.GenerateRequest(chat=pb.Chat()), "no messages"),
        (pb.GenerateRequest(text="hi", request_id="x" * 257), "request_id has 257 characters"),
        (pb.GenerateRequest(text="hi", tenant="x" * 257), "tenant has 257"),
        (pb.GenerateRequest(text="hi", session_id="x" * 257), "session_id has 257"),
        (pb.GenerateRequest(text="hi", cache_salt="x" * 257), "cache_salt has 257"),
        (invalid(temperature=float("nan")), "temperature is nan"),
        (invalid(temperature=float("inf")), "temperature is inf"),
        (invalid(temperature=-1), "temperature is -1.0"),
        (invalid(top_p=0), "top_p is 0.0"),
        (invalid(top_p=2), "top_p is 2.0"),
        (invalid(min_p=-0.5), "min_p is -0.5"),
        (invalid(top_k=-1), "top_k is -1"),
        (invalid(max_tokens=0), "max_tokens is 0"),
        (invalid(max_tokens=1, min_tokens=2), "min_tokens is 2"),
        (invalid(seed=-1), "seed is -1"),
        (invalid(stop=[""]), "a stop string is ''"),
        (invalid(stop=[str(n) for n in range(10_000)]), "number of stop strings is 10000"),
        (invalid(stop=["x" * 1_001]), "length of a stop string is 1001"),
        (invalid(stop_token_ids=[256]), "stop token id 256"),
        (invalid(stop_token_ids=range(9)), "number of stop_token_ids is 9"),
        (invalid(repetition_penalty=0), "repetition_penalty is 0.0"),
        (invalid(presence_penalty=3), "presence_penalty is 3.0"),
        (invalid(frequency_penalty=float("nan")), "frequency_penalty is nan"),
        (invalid(logprobs=21), "logprobs is 21"),
        (invalid(prompt_logprobs=-1), "prompt_logprobs is -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_invalid_request_is_refused_and_the_server_goes_on(
    request_: pb.GenerateRequest, message: str, shared_channel: grpc.Channel
):
    inference = pb_grpc.InferenceStub(shared_channel)
    with pytest.raises(grpc.RpcError, match=message) as refused:
        list(inference.Generate(request_, timeout=TIMEOUT_S))
    assert status(refused.value) is grpc.StatusCode.INVALID_ARGUMENT
    good = pb.GenerateRequest(text="hi", sampling=pb.SamplingParams(max_tokens=1))
    assert [r.text for r in inference.Generate(good, timeout=TIMEOUT_S)] == ["a"]


@pytest.fixture(scope="module")
def shared_channel() -> Iterator[grpc.Channel]:
    with channel_of(FakeEngine()) as channel:
        yield channel


def status(error: Any) -> grpc.StatusCode:
    return error.code()


def test_tokenize_and_detokenize_refuse_what_they_cannot_do(shared_channel: grpc.Channel):
    inference = pb_grpc.InferenceStub(shared_channel)
    with pytest.raises(grpc.RpcError, match="set one of text, chat") as refused:
        inference.Tokenize(pb.TokenizeRequest())
    assert status(refused.value) is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError, match="token id 256 is outside the vocabulary") as refused:
        inference.Detokenize(pb.DetokenizeRequest(token_ids=[256]))
    assert status(refused.value) is grpc.StatusCode.INVALID_ARGUMENT


def test_a_message_of_64_mb_is_refused_and_the_server_goes_on(shared_channel: grpc.Channel):
    inference = pb_grpc.InferenceStub(shared_channel)
    with pytest.raises(grpc.RpcError, match=f"larger than max .* vs. {MAX_MESSAGE_BYTES}") as e:
        list(inference.Generate(pb.GenerateRequest(text="x" * 64_000_000), timeout=TIMEOUT_S))
    assert status(e.value) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert inference.Tokenize(pb.TokenizeRequest(text="hi")).token_ids == [0, 104, 105]


def test_an_id_that_is_being_served_is_refused():
    engine = FakeEngine(stepped=True)
    with client_of(engine) as client:
        first = client.generate([1], request_id="r1", max_tokens=1)
        engine.wait_for(lambda: len(engine.submitted) == 1)
        with pytest.raises(DuplicateRequest, match="r1 is being served"):
            client.generate_text([1], request_id="r1")
        engine.step()
        assert text_of(first) == "a"


def test_what_a_full_queue_has_no_room_for_is_refused():
    engine = FakeEngine(stepped=True, max_queue=100, info=FakeInfo(max_batch=4))
    with client_of(engine) as client:
        num_refused = 0

        def outcome(_: int) -> str:
            nonlocal num_refused
            try:
                return client.generate_text([1], max_tokens=1)
            except Overloaded:
                num_refused += 1
                if num_refused == 896:
                    engine.allow(math.inf)
                return "refused"

        # Threads enough that those whose requests wait leave some to send the others.
        with ThreadPoolExecutor(110) as pool:
            texts = list(pool.map(outcome, range(1_000)))
    assert texts.count("a") == 104
    assert texts.count("refused") == 896


# Health, drain, stop


def health_of(channel: grpc.Channel, service: str = "") -> int:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return stub.Check(health_pb2.HealthCheckRequest(service=service)).status


SERVICES = ["", "weft.v1.Inference", "weft.v1.Control"]


@pytest.mark.parametrize("service", SERVICES)
def test_draining_is_not_serving(service: str):
    engine = FakeEngine(stepped=True)
    with channel_of(engine) as channel:
        assert health_of(channel, service) == SERVING
        running = pb_grpc.InferenceStub(channel).Generate(
            pb.GenerateRequest(text="hi", sampling=pb.SamplingParams(max_tokens=2))
        )
        engine.step()
        pb_grpc.ControlStub(channel).Drain(pb.DrainRequest())
        assert health_of(channel, service) == NOT_SERVING
        with pytest.raises(grpc.RpcError, match="draining") as refused:
            list(pb_grpc.InferenceStub(channel).Generate(pb.GenerateRequest(text="hi")))
        assert status(refused.value) is grpc.StatusCode.UNAVAILABLE
        engine.step()
        assert "".join(response.text for response in running) == "ab"


def test_health_of_an_unknown_service_is_not_found(shared_channel: grpc.Channel):
    with pytest.raises(grpc.RpcError) as refused:
        health_of(shared_channel, "weft.v1.Nothing")
    assert status(refused.value) is grpc.StatusCode.NOT_FOUND


def test_an_engine_that_fails_ends_its_streams_and_is_not_serving():
    engine = FakeEngine(stepped=True)
    with client_of(engine) as client:
        chunks = client.generate([1])
        engine.step()
        assert next(chunks).text == "a"
        engine.fail(RuntimeError("the device is lost"))
        with pytest.raises(RequestError, match="INTERNAL: the device is lost"):
            next(chunks)
        assert not client.is_serving()
        with pytest.raises(Unavailable):
            client.generate_text([1])


def test_those_who_watch_health_hear_of_a_failure():
    engine = FakeEngine()
    with channel_of(engine) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watched = stub.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        assert next(watched).status == SERVING
        engine.fail(RuntimeError("the device is lost"))
        assert next(watched).status == NOT_SERVING
        watched.cancel()


def test_reflection_lists_the_services(shared_channel: grpc.Channel):
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(shared_channel)
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = stub.ServerReflectionInfo(iter([question]))
    assert {service.name for service in answer.list_services_response.service} == {
        "weft.v1.Inference",
        "weft.v1.Control",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def start_at(address: str) -> None:
    asyncio.run(GrpcServer(text_front(FakeEngine()), address).start())


def test_a_taken_port_is_refused():
    with (
        served(text_front(FakeEngine())) as address,
        pytest.raises(OSError, match=f"cannot listen on {address}: .*in use.*; choose"),
    ):
        start_at(address)


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(OSError, match=r"cannot listen on 192.0.2.1:8500: .*; choose"):
        start_at("192.0.2.1:8500")


@pytest.mark.parametrize("address", ["127.0.0.1:70000", "127.0.0.1:http", "8500", ":8500", ""])
def test_an_address_that_is_none_is_refused(address: str):
    with pytest.raises(ValueError, match=f"cannot listen on '{address}'; give HOST:PORT"):
        start_at(address)


@contextmanager
def served_in_process() -> Iterator[tuple[subprocess.Popen[str], Client]]:
    """A server in a process of its own, that steps with each line it is sent."""
    command = [sys.executable, "-W", "error", "-m", "tests.serve.fake_engine"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            with Client(f"127.0.0.1:{port}", timeout_s=TIMEOUT_S) as client:
                yield process, client
        finally:
            process.kill()


def step(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def wait_until_draining(client: Client) -> None:
    while client.is_serving():
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_runs_refuses_what_comes_and_exits_0(number: signal.Signals):
    with served_in_process() as (process, client):
        chunks = client.generate([1], max_tokens=2)
        step(process)
        assert next(chunks).text == "a"
        process.send_signal(number)
        wait_until_draining(client)
        with pytest.raises(Unavailable, match="draining"):
            client.generate_text([1])
        assert process.poll() is None
        step(process)
        (last,) = chunks
        assert (last.text, last.finish_reason) == ("b", FinishReason.LENGTH)
        assert process.wait(TIMEOUT_S) == 0


def test_a_second_signal_ends_what_runs():
    with served_in_process() as (process, client):
        chunks = client.generate([1], max_tokens=2)
        step(process)
        assert next(chunks).text == "a"
        process.terminate()
        wait_until_draining(client)
        process.terminate()
        (last,) = chunks
        assert last.finish_reason is FinishReason.CANCELLED
        assert process.wait(TIMEOUT_S) == 0


def test_the_generated_code_is_that_of_the_proto(tmp_path: Path):
    generate(tmp_path)
    written = sorted((tmp_path / PACKAGE).iterdir())
    assert [path.name for path in written] == [
        "inference_pb2.py",
        "inference_pb2.pyi",
        "inference_pb2_grpc.py",
    ]
    for path in written:
        committed = (ROOT / PACKAGE / path.name).read_text()
        assert path.read_text() == committed, "run python -m tools.generate_proto"


def test_a_client_that_asks_often_whether_the_server_is_there_keeps_its_connection():
    """gRPC takes it for abuse unless told otherwise, and hangs up ("too_many_pings")."""
    options = (
        ("grpc.keepalive_time_ms", 100),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    )
    states: list[grpc.ChannelConnectivity] = []
    with (
        FakeEngine() as engine,
        served(Front(engine)) as address,
        grpc.insecure_channel(address, options=options) as channel,
    ):
        channel.subscribe(states.append, try_to_connect=True)
        grpc.channel_ready_future(channel).result(TIMEOUT_S)
        time.sleep(3.5)  # gRPC sends no more than one a second
        assert states[-1] is grpc.ChannelConnectivity.READY
        assert states.count(grpc.ChannelConnectivity.READY) == 1
