"""Contexts as they are served: named prompts, computed once and their pages kept until they end.

It does not know the wire (`serve/api`), or where pages are kept (`serve/pins.py`).
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from typing import NamedTuple, Protocol
from weakref import WeakValueDictionary

from cache.contexts.context import (
    Context,
    InvalidContext,
    Listing,
    Messages,
    NoSuchContext,
    NotSaved,
    TooManyContexts,
    page_keys,
)
from cache.contexts.registry import Contexts
from cache.keys import Key
from cache.pins import PinsExceedBudget
from serve import front
from serve.errors import InvalidRequest, NotFound, Overloaded, RequestError, Unavailable
from serve.front import Chat, Front, Prompt, check_names
from serve.request import FinishReason, SamplingParams
from serve.to_thread import to_its_end

log = logging.getLogger("weft")

EXPIRE_EVERY_S = 1.0


class Home(Protocol):
    """What keeps a context's pages."""

    def pin(self, keys: Sequence[Key]) -> None: ...
    def unpin(self, keys: Sequence[Key]) -> None: ...


class Engine(front.Engine, Protocol):
    def home(self, context: str) -> Home: ...


class Made(NamedTuple):
    """A context that was computed, and what that took."""

    context: Context
    cached_tokens: int
    """Those that had been computed before."""
    compute_s: float


class ContextCache:
    """Made before the engine is started, so that its tiers keep what was loaded; used on one event
    loop. Raises what `serve.errors` has."""

    def __init__(self, front: Front, engine: Engine, contexts: Contexts) -> None:
        self._front, self._engine, self._contexts = front, engine, contexts
        self._turns = WeakValueDictionary[tuple[str, str], asyncio.Lock]()
        """Who extends a context waits for who does so already."""
        for context in contexts.all():
            try:
                self._home(context).pin(context.keys)
            except PinsExceedBudget as error:
                log.warning(
                    "%s (%s), %d tokens, is dropped: %s",
                    context.name,
                    context.display_name,
                    context.num_tokens,
                    error,
                )
                contexts.let_go(context)

    async def create(
        self,
        tenant: str,
        prompt: Prompt,
        *,
        cache_salt: str = "",
        display_name: str = "",
        ttl_s: float | None = None,
        expire_time: float | None = None,
    ) -> Made:
        """Returns when it has been computed; whatever fails before leaves nothing behind."""
        check_names(tenant=tenant, cache_salt=cache_salt)

        def begin() -> Context:
            tokens = self._encode(prompt)
            size = self._engine.info.page_size
            keys, name = page_keys(tenant, cache_salt, tokens, size), self._contexts.new_name()
            home = self._engine.home(name)
            home.pin(keys)
            try:
                return self._contexts.create(
                    tenant,
                    tokens,
                    name=name,
                    messages=_messages(prompt),
                    cache_salt=cache_salt,
                    display_name=display_name,
                    ttl_s=ttl_s,
                    expire_time=expire_time,
                )
            except BaseException:
                home.unpin(keys)
                raise

        with _as_request_errors():
            context = await to_its_end(begin)
            try:
                return await self._compute(context)
            except BaseException:
                if await to_its_end(lambda: self._contexts.let_go(context)):
                    self._home(context).unpin(context.keys)
                raise

    async def update(
        self,
        tenant: str,
        name: str,
        prompt: Prompt | None = None,
        *,
        ttl_s: float | None = None,
        expire_time: float | None = None,
    ) -> Made:
        """Appends a prompt of the context's kind, or sets another end, or both; all or nothing."""

        def change(tokens: Sequence[int] = (), messages: Messages = ()) -> Context:
            end = {"ttl_s": ttl_s, "expire_time": expire_time}
            return self._contexts.update(tenant, name, tokens, messages=messages, **end).after

        async with self._turn(tenant, name):
            before = self.get(tenant, name)
            with _as_request_errors():
                self._contexts.check_end(ttl_s, expire_time)
                if prompt is None:
                    return Made(await to_its_end(change), 0, 0.0)
                longer = await to_its_end(lambda: self._longer(before, prompt))
                home, tokens = self._home(before), longer.token_ids
                if not longer.messages:
                    tokens = tokens[before.num_tokens :]
                try:
                    made = await self._compute(longer)
                    context = await to_its_end(lambda: change(tokens, longer.messages))
                except BaseException:
                    home.unpin(longer.keys)
                    raise
                home.unpin(before.keys)
                return made._replace(context=context)

    def get(self, tenant: str, name: str) -> Context:
        return self._front.context(tenant, name)

    def list(self, tenant: str, limit: int, page_token: str) -> Listing:
        check_names(tenant=tenant)
        with _as_request_errors():
            return self._contexts.list(tenant, limit, page_token)

    async def delete(self, tenant: str, name: str) -> None:
        check_names(tenant=tenant)
        with _as_request_errors():
            context = await to_its_end(lambda: self._contexts.delete(tenant, name))
        self._home(context).unpin(context.keys)

    async def expire(self) -> None:
        """Lets go of contexts whose time is over."""
        for context in await to_its_end(self._contexts.expire):
            self._home(context).unpin(context.keys)

    @asynccontextmanager
    async def expiring(self) -> AsyncGenerator[None]:
        """Contexts end when their time is over, as long as this lasts."""

        async def expire_for_ever() -> None:
            while True:
                await asyncio.sleep(EXPIRE_EVERY_S)
                await self.expire()

        task = asyncio.create_task(expire_for_ever())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    def _home(self, context: Context) -> Home:
        return self._engine.home(context.name)

    def _turn(self, tenant: str, name: str) -> asyncio.Lock:
        return self._turns.setdefault((tenant, name), asyncio.Lock())

    def _encode(self, prompt: Prompt, after: Context | None = None) -> tuple[int, ...]:
        """The ids of a context, or of one that goes on after another, checked."""
        if not prompt:
            raise InvalidRequest("the prompt is empty; send one token or more")
        tokens = self._front.encode_prompt(prompt, after, opened=False)
        self._contexts.limits.checked_tokens(tokens)
        self._front.check_prompt(tokens)
        return tokens

    def _longer(self, before: Context, prompt: Prompt) -> Context:
        """What the context will be, its pages pinned."""
        tokens = self._encode(prompt, before)
        page_size = self._engine.info.page_size
        longer = replace(
            before,
            token_ids=self._contexts.limits.checked_tokens(tokens),
            keys=page_keys(before.tenant, before.cache_salt, tokens, page_size),
            messages=before.messages + _messages(prompt),
        )
        self._home(before).pin(longer.keys)
        return longer

    async def _compute(self, context: Context) -> Made:
        """Has the engine compute it as any request; to leave early aborts that."""
        request = self._front.prepare(
            context.token_ids,
            SamplingParams(temperature=0.0, max_tokens=1),
            tenant=context.tenant,
            context=context,
        )
        async with aclosing(self._front.generate(request)) as deltas:
            async for delta in deltas:
                if delta.finish_reason is FinishReason.ERROR:
                    raise RequestError(delta.error)
                if delta.finish_reason is FinishReason.CANCELLED:
                    raise Unavailable("the server stops; create the context on another replica")
                if delta.usage is not None and delta.timings is not None:
                    return Made(context, delta.usage.cached_tokens, delta.timings.finished_s)
        raise AssertionError("a request ends with its usage")


def _messages(prompt: Prompt) -> Messages:
    return prompt.messages if isinstance(prompt, Chat) else ()


@contextmanager
def _as_request_errors() -> Generator[None]:
    try:
        yield
    except NoSuchContext as error:
        raise NotFound(str(error)) from None
    except InvalidContext as error:
        raise InvalidRequest(str(error)) from None
    except (TooManyContexts, PinsExceedBudget) as error:
        raise Overloaded(str(error)) from None
    except NotSaved as error:
        raise Unavailable(str(error)) from None
