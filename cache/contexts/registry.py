"""Which contexts there are, whose they are, and until when.

It does not know where their pages lie, or that requests use them.
"""

import time
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random, SystemRandom
from threading import Lock
from typing import NamedTuple

from cache.contexts.context import (
    Context,
    ContextLimits,
    InvalidContext,
    Listing,
    Messages,
    NoSuchContext,
    TooManyContexts,
    page_keys,
)
from cache.contexts.deadlines import Deadlines
from cache.contexts.folder import Folder
from cache.contexts.record import RecordFormat
from cache.tiers.counts import Miss

ID_BITS = 96
"""Nobody guesses one, and none comes twice."""


class Change(NamedTuple):
    before: Context
    after: Context


class _Entry(NamedTuple):
    context: Context
    end_s: float
    """By the clock that no one sets."""


class Contexts:
    """Any thread may call. Changes wait for each other and for the disk, `get` and `list` never.

    What remains of a context passes by the monotonic clock, so one who sets the wall clock neither
    shortens nor prolongs it; a restart takes what remains until its expire_time by the wall clock,
    but no more than remained at its last update, so that a clock set back keeps nothing for ever.

    A context that has expired is found by nobody, and takes room until `expire` returns it.
    """

    def __init__(
        self,
        limits: ContextLimits,
        page_size: int,
        directory: Path | None = None,
        fingerprint: bytes = b"",
        *,
        random: Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Without a directory a restart forgets all."""
        self.limits = limits
        self._page_size = page_size
        self._random = random or SystemRandom()
        self._clock, self._wall_clock = clock, wall_clock
        self._entries: dict[tuple[str, str], _Entry] = {}
        """By tenant and name: whoever asks for another's does what one does who asks for none."""
        self._names: dict[str, tuple[str, ...]] = {}
        """Of each tenant that has any, in order. Replaced, not changed: readers take no lock."""
        self._all_names: set[str] = set()
        self._ends = Deadlines[tuple[str, str]]()
        self._changing = Lock()
        self._folder = (
            Folder(directory, RecordFormat(fingerprint, page_size)) if directory else None
        )
        if self._folder:
            self._load(self._folder)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_tokens(self) -> int:
        """Of all contexts."""
        return sum(context.num_tokens for context in self.all())

    @property
    def skipped(self) -> Counter[Miss]:
        """Files that the start found and did not read."""
        return self._folder.skipped if self._folder else Counter()

    def create(
        self,
        tenant: str,
        token_ids: Sequence[int],
        *,
        name: str = "",
        messages: Messages = (),
        cache_salt: str = "",
        display_name: str = "",
        ttl_s: float | None = None,
        expire_time: float | None = None,
    ) -> Context:
        """`name` is one that `new_name` gave, if that has been asked.

        Raises InvalidContext, TooManyContexts and NotSaved.
        """
        if not len(token_ids):
            raise InvalidContext("the context is empty; send one token or more")
        self.limits.check_display_name(display_name)
        tokens = self.limits.checked_tokens(token_ids)
        keys = page_keys(tenant, cache_salt, tokens, self._page_size)
        with self._changing:
            now_s, wall_s = self._clock(), self._wall_clock()
            expire_time = self.limits.expire_time(ttl_s, expire_time, wall_s)
            self._check_room(tenant)
            context = Context(
                name=name or self.new_name(),
                tenant=tenant,
                cache_salt=cache_salt,
                display_name=display_name,
                create_time=wall_s,
                update_time=wall_s,
                expire_time=expire_time,
                token_ids=tokens,
                keys=keys,
                messages=messages,
            )
            self._save(context)
            self._add(_Entry(context, now_s + (expire_time - wall_s)))
            return context

    def get(self, tenant: str, name: str) -> Context:
        """Raises NoSuchContext."""
        return self._entry(tenant, name, self._clock()).context

    def check_end(self, ttl_s: float | None, expire_time: float | None) -> None:
        """Raises InvalidContext for what `update` would refuse."""
        self.limits.expire_time(ttl_s, expire_time, self._wall_clock())

    def update(
        self,
        tenant: str,
        name: str,
        token_ids: Sequence[int] = (),
        *,
        messages: Messages = (),
        ttl_s: float | None = None,
        expire_time: float | None = None,
    ) -> Change:
        """Appends the token ids, or sets another end, or both.

        With `messages`, which are then the whole chat, the ids are those of all of it.

        Raises NoSuchContext, InvalidContext and NotSaved.
        """
        with self._changing:
            now_s, wall_s = self._clock(), self._wall_clock()
            before, end_s = self._entry(tenant, name, now_s)
            if ttl_s is not None or expire_time is not None:
                expire_time = self.limits.expire_time(ttl_s, expire_time, wall_s)
                end_s = now_s + (expire_time - wall_s)
            elif len(token_ids):
                expire_time = wall_s + (end_s - now_s)
            else:
                raise InvalidContext(
                    f"the update of {name!r} changes nothing; send token ids, ttl or expire_time"
                )
            after = replace(before, update_time=wall_s, expire_time=expire_time)
            if messages:
                after = self._refilled(after, self.limits.checked_tokens(token_ids), messages)
            elif len(token_ids):
                more = self.limits.checked_tokens(token_ids, before.num_tokens)
                after = self._refilled(after, before.token_ids + more)
            self._save(after)
            self._entries[tenant, name] = _Entry(after, end_s)
            self._ends.set((tenant, name), end_s)
            return Change(before, after)

    def delete(self, tenant: str, name: str) -> Context:
        """Raises NoSuchContext."""
        with self._changing:
            self._entry(tenant, name, self._clock())
            self._ends.remove((tenant, name))
            return self._drop(tenant, name)

    def let_go(self, context: Context) -> bool:
        """Deletes it also where its time is over; False if it was gone already."""
        with self._changing:
            key = context.tenant, context.name
            if key not in self._entries:
                return False
            self._ends.remove(key)
            self._drop(*key)
            return True

    def expire(self) -> list[Context]:
        """Lets go those whose time is over, and tries again to delete what could not be deleted."""
        with self._changing:
            if self._folder:
                self._folder.retry_deletes()
            return [self._drop(*key) for key in self._ends.take_due(self._clock())]

    def all(self) -> list[Context]:
        """Of all tenants, those that expired and were not yet returned included."""
        with self._changing:
            return [entry.context for entry in self._entries.values()]

    def list(self, tenant: str, limit: int = 100, page_token: str = "") -> Listing:
        """Up to `limit` contexts by name, from where the listing ended that gave the token.

        What was created or deleted meanwhile doubles and hides no other. Raises InvalidContext.
        """
        if not 1 <= limit <= self.limits.max_listing:
            raise InvalidContext(
                f"a listing of {limit} contexts; it must be from 1 to {self.limits.max_listing}"
            )
        if page_token and not _is_name(page_token):
            raise InvalidContext(
                f"page_token is {page_token[:64]!r}; send none, or what the listing before gave"
            )
        now_s, found = self._clock(), list[Context]()
        names = self._names.get(tenant, ())
        for name in names[bisect_right(names, page_token) :]:
            entry = self._entries.get((tenant, name))
            if entry is None or entry.end_s <= now_s:
                continue
            if len(found) == limit:
                return Listing(found, found[-1].name)
            found.append(entry.context)
        return Listing(found, "")

    def _entry(self, tenant: str, name: str, now_s: float) -> _Entry:
        entry = self._entries.get((tenant, name))
        if entry is None or entry.end_s <= now_s:
            raise NoSuchContext(name)
        return entry

    def _load(self, folder: Folder) -> None:
        now_s, wall_s = self._clock(), self._wall_clock()
        for context in folder.load():
            expire_time = context.expire_time
            if wall_s < context.update_time:  # the clock was set back
                expire_time += wall_s - context.update_time
            if wall_s < expire_time:
                context = replace(context, expire_time=expire_time)
                self._add(_Entry(context, now_s + (expire_time - wall_s)))
            else:
                folder.delete(context.name)

    def _refilled(self, context: Context, tokens: array[int], messages: Messages = ()) -> Context:
        keys = page_keys(context.tenant, context.cache_salt, tokens, self._page_size)
        return replace(context, token_ids=tokens, keys=keys, messages=messages)

    def _check_room(self, tenant: str) -> None:
        limits, num_own = self.limits, len(self._names.get(tenant, ()))
        if num_own >= limits.max_tenant_contexts:
            raise TooManyContexts(
                f"the tenant has {num_own} contexts and may have {limits.max_tenant_contexts}; "
                "delete one or let one expire"
            )
        if len(self._entries) >= limits.max_contexts:
            raise TooManyContexts(
                f"this server has room for {limits.max_contexts} contexts and no more; try again "
                "when some have expired"
            )

    def new_name(self) -> str:
        """One that no context has."""
        while True:
            name = f"contexts/{self._random.getrandbits(ID_BITS):0{ID_BITS // 4}x}"
            if name not in self._all_names:  # a simulation's random numbers come again
                return name

    def _save(self, context: Context) -> None:
        if self._folder:
            self._folder.save(context)

    def _add(self, entry: _Entry) -> None:
        tenant, name = entry.context.tenant, entry.context.name
        self._entries[tenant, name] = entry
        names = self._names.get(tenant, ())
        at = bisect_left(names, name)
        self._names[tenant] = (*names[:at], name, *names[at:])
        self._all_names.add(name)
        self._ends.set((tenant, name), entry.end_s)

    def _drop(self, tenant: str, name: str) -> Context:
        context = self._entries.pop((tenant, name)).context
        names = self._names[tenant]
        at = bisect_left(names, name)
        self._names[tenant] = names[:at] + names[at + 1 :]
        if not self._names[tenant]:
            del self._names[tenant]
        self._all_names.remove(name)
        if self._folder:
            self._folder.delete(name)
        return context


def _is_name(text: str) -> bool:
    return text.startswith("contexts/") and text.removeprefix("contexts/").isalnum()
