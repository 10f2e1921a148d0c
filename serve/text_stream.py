"""One request's tokens to text as they come, ended at a stop string.

It does not know the engine or the wire.
"""

from dataclasses import dataclass, replace

from model.detokenizer import Detokenizer, StopStrings
from model.tokenizer import Tokenizer
from serve.request import (
    FinishReason,
    GenerateRequest,
    Output,
    Timings,
    TokenLogprobs,
    Usage,
)


@dataclass(frozen=True, slots=True)
class Delta:
    """What came of one request since the delta before.

    `text` is not that of `token_ids`: characters come when whole, and what may begin a stop
    string waits.
    """

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    """With the finish reason; so are timings and, when that is ERROR, error."""
    timings: Timings | None = None
    error: str = ""


class TextStream:
    """Turns one request's outputs into deltas.

    At a stop string `stopped` becomes true and later tokens are dropped: the caller then aborts
    the request in the engine, and makes the engine's last output the last delta.
    """

    def __init__(self, request: GenerateRequest, tokenizer: Tokenizer | None):
        self.stopped = False
        self._detokenizer = Detokenizer(tokenizer, request.prompt_ids) if tokenizer else None
        self._stops = StopStrings(request.sampling.stop) if request.sampling.stop else None
        self._min_tokens = request.sampling.min_tokens
        self._num_prompt_tokens = len(request.prompt_ids)
        self._num_tokens = 0

    def push(self, output: Output) -> Delta | None:
        """None when there is nothing to tell, as between a stop string and the last output."""
        is_last = output.finish_reason is not None
        if self.stopped and not is_last:
            return None
        token_ids, text = ((), "") if self.stopped else self._read(output)
        if is_last and not self.stopped:
            text += self._flush()
        delta = Delta(token_ids, text, output.logprobs[: len(token_ids)], output.prompt_logprobs)
        if not is_last:
            return delta
        if self.stopped:
            usage = output.usage or Usage(self._num_prompt_tokens, 0)
            usage = replace(usage, completion_tokens=self._num_tokens)
            return replace(
                delta, finish_reason=FinishReason.STOP, usage=usage, timings=output.timings
            )
        return replace(
            delta,
            finish_reason=output.finish_reason,
            usage=output.usage,
            timings=output.timings,
            error=output.error,
        )

    def _read(self, output: Output) -> tuple[tuple[int, ...], str]:
        """The ids as far as the end of a stop string, and the text that they make final."""
        token_ids = output.token_ids
        # The id that ended the request is reported; its text, if it has any, is not the answer's.
        num_spoken = len(token_ids) - (output.finish_reason is FinishReason.STOP)
        if self._detokenizer is None or self._stops is None:
            self._num_tokens += len(token_ids)
            return token_ids, self._detokenizer.push(
                token_ids[:num_spoken]
            ) if self._detokenizer else ""
        texts: list[str] = []
        for num_read, token_id in enumerate(token_ids, start=1):
            text = self._detokenizer.push((token_id,) if num_read <= num_spoken else ())
            self._num_tokens += 1
            texts.append(self._stops.push(text) if self._num_tokens > self._min_tokens else text)
            if self._stops.stop is not None:
                self.stopped = True
                return token_ids[:num_read], "".join(texts)
        return token_ids, "".join(texts)

    def _flush(self) -> str:
        """What was held back and is final now that no token follows."""
        text = self._detokenizer.flush() if self._detokenizer else ""
        if self._stops is None:
            return text
        text = self._stops.push(text) + self._stops.flush()
        self.stopped = self._stops.stop is not None
        return text
