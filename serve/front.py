"""Text around an engine: prompts become requests of token ids, outputs become text.

It keeps nothing between requests. It does not know the wire (`serve/api`) or how tokens are made.
"""

import asyncio
import queue
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from cache.contexts.context import Context, NoSuchContext
from cache.contexts.registry import Contexts
from cache.events import EventLog
from cache.retention import DEFAULT_TTL, InvalidRetention, Retention
from model.chat import ChatTemplate
from model.tokenizer import Tokenizer
from serve.bridge import Bridge, Mailbox
from serve.errors import InvalidRequest, NotFound, Overloaded
from serve.request import GenerateRequest, Load, Output, SamplingParams
from serve.text_stream import Delta, TextStream


@dataclass(frozen=True)
class Chat:
    messages: tuple[dict[str, str], ...]
    """{"role": ..., "content": ...} each."""


type Prompt = str | Sequence[int] | Chat

MAX_NAME_LENGTH = 256
"""Characters of a request id, tenant, session id or cache salt: they are keys, kept and logged."""


class ModelInfo(Protocol):
    """What an engine says of its model; `serve.engine.ModelInfo` has it."""

    @property
    def name(self) -> str: ...
    @property
    def architecture(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_context(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def mesh(self) -> Mapping[str, int]: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def max_batch(self) -> int: ...
    @property
    def eos_ids(self) -> Sequence[int]: ...


class Engine(Protocol):
    """What the front needs of `serve.engine.Engine`; all of it may be called from any thread."""

    @property
    def info(self) -> ModelInfo: ...
    @property
    def failure(self) -> BaseException | None: ...
    @property
    def cache_events(self) -> EventLog: ...
    def submit(self, request: GenerateRequest, sink: Callable[[Output], None]) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def load(self) -> Load: ...
    def flush_cache(self) -> int: ...
    def drain(self) -> None: ...


class Front:
    """The text side of one engine. A model without a tokenizer is served by token ids."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None = None,
        chat_template: ChatTemplate | None = None,
        contexts: Contexts | None = None,
    ):
        """Without `contexts` none can be named by a request."""
        self.contexts = contexts
        self.engine = engine
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self._bridge: Bridge | None = None

    def context(self, tenant: str, name: str) -> Context:
        """The tenant's context of that name. Raises NotFound."""
        if self.contexts is None:
            raise InvalidRequest(
                f"model {self.engine.info.name} is served without contexts; send the whole prompt, "
                "or set cache.prefix_caching = true"
            )
        check_names(tenant=tenant)
        try:
            return self.contexts.get(tenant, name)
        except NoSuchContext as error:
            raise NotFound(str(error)) from None

    def encode(self, text: str, after: Context | None = None) -> tuple[int, ...]:
        """The ids of a prompt, with the tokenizer's usual first token; `after` a context of text or
        ids, those of both."""
        tokenizer = self._need_tokenizer("a prompt of text")
        with _as_invalid_request():
            if after is None:
                return tuple(tokenizer.encode(text))
            return self.join(after, tokenizer.encode(text, add_special_tokens=False))

    def join(self, after: Context, token_ids: Sequence[int]) -> tuple[int, ...]:
        """The ids of a context of text or ids, and what comes after it."""
        if after.messages:
            raise InvalidRequest(
                f"{after.name} is of chat messages, and text or token ids can't go on after it; "
                "send chat messages"
            )
        return (*after.token_ids, *token_ids)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        after: Context | None = None,
        opened: bool = True,
    ) -> tuple[int, ...]:
        """The ids of a conversation, opened for the assistant's answer; `after` a context of chat
        messages, of all of it."""
        tokenizer = self._need_tokenizer("a prompt of chat messages")
        if self.chat_template is None:
            raise InvalidRequest(
                f"model {self.engine.info.name} has no chat template; "
                "send the prompt as text or token ids"
            )
        if not messages:
            raise InvalidRequest("the chat has no messages; send one or more")
        if after is not None:
            if not after.messages:
                raise InvalidRequest(
                    f"{after.name} is of text or token ids, and chat messages can't go on after "
                    "it; send text or token ids"
                )
            messages = [*after.messages, *messages]
        with _as_invalid_request():
            text = self.chat_template.render(messages, add_generation_prompt=opened)
            return tuple(tokenizer.encode(text, add_special_tokens=False))

    def encode_prompt(
        self, prompt: Prompt, after: Context | None = None, opened: bool = True
    ) -> tuple[int, ...]:
        """The ids of a prompt, or of a context and what goes on `after` it; a chat `opened` for the
        assistant's answer."""
        if isinstance(prompt, str):
            return self.encode(prompt, after)
        if isinstance(prompt, Chat):
            return self.encode_chat(prompt.messages, after, opened)
        return self.join(after, prompt) if after is not None else tuple(prompt)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids."""
        tokenizer = self._need_tokenizer("text of token ids")
        with _as_invalid_request():
            return tokenizer.decode(token_ids)

    def prepare(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        request_id: str = "",
        tenant: str = "",
        session_id: str = "",
        cache_salt: str = "",
        priority: int = 0,
        context: Context | None = None,
        keep: Sequence[tuple[int, str]] = (),
    ) -> GenerateRequest:
        """A request that fits the model; an empty id makes a new one. Raises InvalidRequest.

        With a `context` the prompt is token ids that begin with its own. `keep` has positions, 0
        for the prompt's end, and "5m" or "1h".
        """
        check_names(
            request_id=request_id, tenant=tenant, session_id=session_id, cache_salt=cache_salt
        )
        if context is not None:
            if cache_salt not in ("", context.cache_salt):
                raise InvalidRequest(
                    f"cache_salt is not that of {context.name}; leave it out, and the request has "
                    "the context's"
                )
            cache_salt = context.cache_salt
        sampling = sampling or SamplingParams()
        if sampling.stop:
            self._need_tokenizer("stop strings", "use stop_token_ids")
        self._check_ids(sampling.stop_token_ids, "stop token id")
        if len(prompt) == 0:  # a text, too: its tokens would be the tokenizer's own first one
            raise InvalidRequest("the prompt is empty; send one token or more")
        prompt_ids = self.encode(prompt) if isinstance(prompt, str) else tuple(prompt)
        self.check_prompt(prompt_ids)
        return GenerateRequest(
            request_id or uuid.uuid4().hex,
            prompt_ids,
            sampling,
            tenant,
            session_id,
            cache_salt,
            priority,
            context.name if context else "",
            _retention(keep, len(prompt_ids)),
        )

    def generate_all(
        self, requests: Iterable[GenerateRequest]
    ) -> Generator[tuple[int, Delta], None, None]:
        """Deltas of all the requests as they come, each with its request's place in the list.

        Requests enter the engine as its queue has room. Closing the generator aborts what runs.
        """
        waiting = deque(enumerate(requests))
        running: dict[int, tuple[GenerateRequest, TextStream]] = {}
        arrived: queue.SimpleQueue[tuple[int, Output]] = queue.SimpleQueue()

        def submit_waiting() -> None:
            while waiting:
                place, request = waiting[0]
                try:
                    self.engine.submit(request, lambda output, p=place: arrived.put((p, output)))
                except Overloaded:
                    if not running:
                        raise
                    return
                running[place] = request, TextStream(request, self.tokenizer)
                waiting.popleft()

        try:
            submit_waiting()
            while running:
                place, output = arrived.get()
                request, stream = running[place]
                delta = stream.push(output)
                if output.finish_reason is not None:
                    del running[place]
                elif delta is not None and stream.stopped:
                    self.engine.abort(request.request_id)
                if delta is not None:
                    yield place, delta
                submit_waiting()
        finally:
            for request, _ in running.values():
                self.engine.abort(request.request_id)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """Deltas of one request; what comes while the reader is busy is joined into one delta.

        Leaving early, by `aclose` or cancellation, aborts the request in the engine. Raises what
        `submit` raises, and Overloaded when the reader is too slow (`serve.bridge`).
        """
        stream = TextStream(request, self.tokenizer)
        mailbox = Mailbox(self._bridge_here(), lambda: self.engine.abort(request.request_id))
        self.engine.submit(request, mailbox.put)
        try:
            while True:
                output = await mailbox.take()
                delta = stream.push(output)
                if output.finish_reason is None and delta is not None and stream.stopped:
                    self.engine.abort(request.request_id)
                if delta is not None:
                    yield delta
                if output.finish_reason is not None:
                    return
        finally:
            # An ended request is left alone: another may be running under its id by now.
            if not mailbox.ended:
                self.engine.abort(request.request_id)

    def _bridge_here(self) -> Bridge:
        loop = asyncio.get_running_loop()
        if self._bridge is None or self._bridge.loop is not loop:
            self._bridge = Bridge(loop)
        return self._bridge

    def _need_tokenizer(self, what: str, instead: str = "use token ids") -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequest(
                f"model {self.engine.info.name} has no tokenizer for {what}; {instead}"
            )
        return self.tokenizer

    def _check_ids(self, token_ids: Sequence[int], what: str) -> None:
        size = self.engine.info.vocab_size
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < size):
            place, bad = next((n, i) for n, i in enumerate(token_ids) if not 0 <= i < size)
            raise InvalidRequest(
                f"{what} {bad}, at place {place}, is outside the vocabulary: "
                f"ids go from 0 to {size - 1}"
            )

    def check_prompt(self, prompt_ids: Sequence[int]) -> None:
        context = self.engine.info.max_context
        if len(prompt_ids) >= context:
            raise InvalidRequest(
                f"the prompt has {len(prompt_ids)} tokens; a context of {context} allows "
                f"{context - 1} and a token of answer; shorten the prompt"
            )
        self._check_ids(prompt_ids, "prompt token id")


def check_names(**names: str) -> None:
    """Refuses a request id, tenant, session id or cache salt that is too long."""
    for name, value in names.items():
        if len(value) > MAX_NAME_LENGTH:
            raise InvalidRequest(
                f"{name} has {len(value)} characters; at most {MAX_NAME_LENGTH} are allowed"
            )


def _retention(keep: Sequence[tuple[int, str]], num_tokens: int) -> Retention | None:
    if not keep:
        return None
    try:
        return Retention.parse(
            [(position or num_tokens, ttl or DEFAULT_TTL) for position, ttl in keep], num_tokens
        )
    except InvalidRetention as error:
        raise InvalidRequest(str(error)) from None


@contextmanager
def _as_invalid_request() -> Generator[None]:
    """Tokenizers and chat templates say by ValueError what they cannot take."""
    try:
        yield
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
