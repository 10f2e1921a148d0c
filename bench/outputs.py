"""Requests given to an engine one after another, and all that comes until each has ended.

It does not know what they are for.
"""

import queue
import time
from collections.abc import Sequence
from typing import Any

from serve.errors import RequestError
from serve.request import FinishReason, GenerateRequest, Output


def outputs_of(engine: Any, requests: Sequence[GenerateRequest]) -> list[tuple[float, Output]]:
    """Every output with the time it came, in order.

    Raises RequestError when one ends otherwise than by its length.
    """
    arrivals: queue.SimpleQueue[tuple[float, Output]] = queue.SimpleQueue()
    for request in requests:
        engine.submit(request, lambda output: arrivals.put((time.perf_counter(), output)))
    outputs: list[tuple[float, Output]] = []
    num_requests = len(requests)
    while num_requests:
        arrived_s, output = arrivals.get()
        outputs.append((arrived_s, output))
        if output.finish_reason is not None:
            num_requests -= 1
            if output.finish_reason is not FinishReason.LENGTH:
                raise RequestError(
                    f"request {output.request_id} ended by {output.finish_reason.value}, "
                    f"not by its length: {output.error or 'no reason given'}"
                )
    return outputs
