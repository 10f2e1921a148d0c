"""The client whose calls wait."""

from collections.abc import Generator, Mapping, Sequence
from typing import Any, Self, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.client.contexts import Contexts
from serve.client.messages import (
    cache_events,
    cache_events_request,
    chunk,
    detokenize_request,
    errors,
    generate_request,
    is_serving_response,
    load_response,
    model_info_response,
    tokenize_request,
)
from serve.client.values import CacheEvents, Chunk, ModelInfo, Prompt, RequestOptions
from serve.errors import Unavailable
from serve.pb import inference_pb2 as pb
from serve.pb import inference_pb2_grpc as pb_grpc
from serve.request import Load

DEFAULT_ADDRESS = "127.0.0.1:8500"
OPTIONS = (("grpc.max_receive_message_length", -1),)


class Client:
    """Blocking calls; threads may share a client.

    `timeout_s` bounds each call from its start to its end, streams included: one that takes
    longer raises TimeoutError. A call that the server refuses raises one of `serve.errors`,
    with the server's message.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, timeout_s: float | None = None):
        self.address = address
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(address, options=OPTIONS)
        self._inference = pb_grpc.InferenceStub(self._channel)
        self._control = pb_grpc.ControlStub(self._channel)
        self.contexts = Contexts(pb_grpc.ContextCacheStub(self._channel), address, timeout_s)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def generate(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Generator[Chunk]:
        """Sends the request at once and gives its chunks; closing the generator cancels it."""
        request = generate_request(prompt, options)
        return self._chunks(self._inference.Generate(request, timeout=self._timeout_s))

    def _chunks(self, call: Any) -> Generator[Chunk]:
        request_id = ""
        try:
            with errors(self.address):
                for message in call:
                    request_id = request_id or message.request_id
                    yield chunk(request_id, message)
        finally:
            call.cancel()

    def generate_text(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> str:
        return "".join(chunk.text for chunk in self.generate(prompt, **options))

    def tokenize(self, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
        """The ids that the server makes of a text or of chat messages."""
        return list(self._call(self._inference.Tokenize, tokenize_request(prompt)).token_ids)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        return self._call(self._inference.Detokenize, detokenize_request(token_ids)).text

    def model_info(self) -> ModelInfo:
        return model_info_response(self._call(self._control.GetModelInfo, pb.GetModelInfoRequest()))

    def load(self) -> Load:
        return load_response(self._call(self._control.GetLoad, pb.GetLoadRequest()))

    def abort(self, request_id: str) -> None:
        """Ends a request, whoever sent it; an id that is not being served is ignored."""
        self._call(self._control.Abort, pb.AbortRequest(request_id=request_id))

    def flush_cache(self) -> int:
        """Makes the server forget all cached prefixes; returns how many pages that freed."""
        return self._call(self._control.FlushCache, pb.FlushCacheRequest()).num_pages

    def cache_events(self, epoch: str = "", sequence_number: int = 0) -> Generator[CacheEvents]:
        """What the server's cache holds, and from then on each change; it ends only by an error.

        Given a `CacheView`'s, it goes on after them where that is possible. Overloaded: what came
        was read too slowly; ask again. Closing the generator ends the subscription.
        """
        request = cache_events_request(epoch, sequence_number)
        return self._cache_events(
            self._control.SubscribeCacheEvents(request, timeout=self._timeout_s)
        )

    def _cache_events(self, call: Any) -> Generator[CacheEvents]:
        try:
            with errors(self.address):
                for message in call:
                    yield cache_events(message)
        finally:
            call.cancel()

    def drain(self) -> None:
        """Makes the server refuse new requests; returns at once."""
        self._call(self._control.Drain, pb.DrainRequest())

    def is_serving(self) -> bool:
        """False also when no server can be reached."""
        try:
            return is_serving_response(
                self._call(self._health.Check, health_pb2.HealthCheckRequest())
            )
        except Unavailable:
            return False

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: Any, request: Any) -> Any:
        with errors(self.address):
            return method(request, timeout=self._timeout_s)
