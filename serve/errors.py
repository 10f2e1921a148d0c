"""What a request can be refused for: what was asked, what was possible, what to change.

The wire's status codes are the front's business (`serve/api`).
"""


class RequestError(Exception):
    """A request that is not served; the server goes on."""


class InvalidRequest(RequestError):
    """The request can never be served as it stands."""


class DuplicateRequest(RequestError):
    """A request of this id is being served."""


class NotFound(RequestError):
    """There is no such thing, or none of this tenant."""


class Mismatch(RequestError):
    """Two engines that are to work together serve different things."""


class Overloaded(RequestError):
    """There is no room now, such as in the queue; the same request may be served later."""


class Unavailable(RequestError):
    """The engine is draining or has failed; another replica may serve the request."""
