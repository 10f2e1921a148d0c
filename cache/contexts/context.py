"""What a context is, what it may be, and what a call is refused for.

It does not know which contexts there are.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from cache.keys import TOKEN, Key, PageNames, root_key


class ContextError(Exception):
    """A call that is refused; nothing has changed."""


class InvalidContext(ContextError):
    """What was asked can never be done."""


class NoSuchContext(ContextError):
    """Unknown, expired or another tenant's: the caller is not told which."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"no such context: {name[:64]!r}; use a name that create or list gave to this tenant, "
            "or create it again if its time is over"
        )


class TooManyContexts(ContextError):
    """There is no room until a context is deleted or expires."""


class NotSaved(ContextError):
    """The directory of contexts could not be written."""


type Messages = tuple[dict[str, str], ...]
"""Of a chat: {"role": ..., "content": ...} each."""


@dataclass(frozen=True)
class Context:
    """A prompt with a name. Times are seconds since 1970."""

    name: str
    """contexts/<id>."""
    tenant: str
    cache_salt: str
    display_name: str
    create_time: float
    update_time: float
    expire_time: float
    token_ids: array[int] = field(repr=False)
    keys: tuple[Key, ...] = field(repr=False)
    """The names of its full pages."""
    messages: Messages = field(default=(), repr=False)
    """What the token ids were made of, if that is a chat."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Listing:
    """Some of a tenant's contexts."""

    contexts: list[Context]
    next_page_token: str
    """Empty where there are no more."""


@dataclass(frozen=True)
class ContextLimits:
    max_tokens: int
    """Of one context."""
    max_contexts: int = 10_000
    max_tenant_contexts: int = 1_000
    default_ttl_s: float = 3600.0
    max_ttl_s: float = 7 * 24 * 3600.0
    """Pages are pinned as long: what nobody renews within a week is taken for forgotten."""
    max_display_name: int = 128
    """Characters."""
    max_listing: int = 1_000
    """Contexts that one call lists."""

    def expire_time(self, ttl_s: float | None, expire_time: float | None, now: float) -> float:
        """The end that was asked for in either way, or the default's."""
        if ttl_s is not None and expire_time is not None:
            raise InvalidContext(
                f"both ttl ({ttl_s} s) and expire_time ({expire_time}) are given; send one of them"
            )
        if expire_time is not None:
            if not now < expire_time <= now + self.max_ttl_s:
                raise InvalidContext(
                    f"expire_time is {expire_time}; it must be after now, {now:.3f}, and at most "
                    f"{self.max_ttl_s:.0f} s later"
                )
            return expire_time
        if ttl_s is None:
            ttl_s = min(self.default_ttl_s, self.max_ttl_s)
        if not 0 < ttl_s <= self.max_ttl_s:
            raise InvalidContext(
                f"ttl is {ttl_s} s; it must be above 0 and at most {self.max_ttl_s:.0f} s"
            )
        return now + ttl_s

    def checked_tokens(self, token_ids: Sequence[int], num_before: int = 0) -> array[int]:
        """The ids as an array, if as many may come after `num_before`."""
        num_tokens = num_before + len(token_ids)
        if num_tokens > self.max_tokens:
            raise InvalidContext(
                f"the context would have {num_tokens} tokens; at most {self.max_tokens} are "
                "possible; shorten it"
            )
        try:
            return array(TOKEN, token_ids)
        except (OverflowError, TypeError) as error:
            raise InvalidContext(
                f"the token ids can't be kept: {error}; send integers from 0 to 2**32 - 1"
            ) from error

    def check_display_name(self, display_name: str) -> None:
        if len(display_name) > self.max_display_name:
            raise InvalidContext(
                f"display_name has {len(display_name)} characters; at most "
                f"{self.max_display_name} are possible"
            )


def page_keys(
    tenant: str, cache_salt: str, token_ids: Sequence[int], page_size: int
) -> tuple[Key, ...]:
    names = PageNames(root_key(tenant, cache_salt), page_size)
    names.extend(token_ids)
    return tuple(names.keys)
