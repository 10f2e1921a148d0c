"""What a request can be refused for: what was asked, what was possible, what to change.

The wire's status codes are the front's business (`serve/api`).
"""


class RequestError(Exception):
    """A request that is not served; the server goes on."""


class InvalidRequest(RequestError):
    """The request can never be served as it stands."""


class DuplicateRequest(RequestError):
    """A request of this id is being served."""


class Overloaded(RequestError):
    """The queue is full; the same request may be served later."""


class Unavailable(RequestError):
    """The engine is draining or has failed; another replica may serve the request."""
