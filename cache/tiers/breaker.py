"""Switches off what keeps failing, each time for longer, and says each reason once.

It does not know what fails.
"""

import errno
import logging
import re
from collections import Counter
from threading import Lock

log = logging.getLogger("weft")

FAILURES = 3
"""In a row: one may be a page's own fault."""
FIRST_OFF_S = 1.0
LONGEST_OFF_S = 300.0
_ERRNO = re.compile(r"os_error_code='(\d+)'")
_STATUS = re.compile(r"([A-Z_]{3,}): ")


class Breaker:
    """Off for FIRST_OFF_S after FAILURES in a row, then after each further one twice as long.

    Any thread may call. `doing` is what fails, for the log.
    """

    def __init__(self, doing: str, longest_off_s: float = LONGEST_OFF_S) -> None:
        self.reasons: Counter[str] = Counter()
        """Of all failures."""
        self._doing, self._longest_off_s = doing, longest_off_s
        self._num_failures = 0
        self._off_until_s = 0.0
        self._lock = Lock()

    def is_off(self, now_s: float) -> bool:
        return self._num_failures >= FAILURES and now_s < self._off_until_s

    def succeeded(self) -> None:
        self._num_failures = 0

    def failed(self, error: BaseException, now_s: float) -> None:
        reason = reason_of(error)
        with self._lock:
            is_new = reason not in self.reasons
            self.reasons[reason] += 1
            if not self.is_off(now_s):  # else it was under way when it was switched off
                self._num_failures += 1
                doublings = min(max(self._num_failures - FAILURES, 0), 16)
                self._off_until_s = now_s + min(FIRST_OFF_S * 2**doublings, self._longest_off_s)
        if is_new:
            log.warning(
                "%s failed (%s): pages are computed instead; said once. %s",
                self._doing,
                reason,
                error,
            )


def reason_of(error: BaseException) -> str:
    """One of few words: the system's name of an error, the store's status, or the class."""
    if isinstance(error, TimeoutError):
        return "timeout"
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _ERRNO.search(str(error))):
        number = int(found[1])
    if number is not None:
        return errno.errorcode.get(number, str(number))
    status = _STATUS.match(str(error))
    return status[1] if status else type(error).__name__
