"""`weft generate`: prompts from the command line or a file, answers on stdout in their order."""

import json
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from model.families import read_model_config
from model.tokenizer import Tokenizer
from serve.build import build_engine
from serve.commands.devices import ensure_devices, keep_compiled_programs
from serve.commands.text import load_text
from serve.config import ScheduleSection, ServeConfig, make_config
from serve.engine import ModelInfo
from serve.errors import InvalidRequest, RequestError
from serve.front import Front
from serve.progress import Progress
from serve.request import FinishReason, GenerateRequest, SamplingParams
from serve.text_stream import Delta
from serve.trace import traced
from sharding.mesh import parse_mesh

MAX_BATCH = 64

type Prompt = str | list[int]


@dataclass
class Answer:
    """What has come for one prompt."""

    prompt_ids: tuple[int, ...]
    token_ids: list[int] = field(default_factory=list[int])
    texts: list[str] = field(default_factory=list[str])
    finish_reason: FinishReason | None = None
    error: str = ""

    def add(self, delta: Delta) -> None:
        self.token_ids += delta.token_ids
        self.texts.append(delta.text)
        self.finish_reason, self.error = delta.finish_reason, delta.error


def run(
    model: Path,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    dtype: str = "auto",
    mesh: str = "",
    as_json: bool = False,
    profile: Path | None = None,
) -> None:
    """Prints each answer once it and those before it are whole. Raises RequestError.

    With `profile`, a directory, it leaves traces there and prints where steps' time went.
    """
    if profile is not None:
        # What can't be is told before the minutes that a large model takes to load.
        profile.mkdir(parents=True, exist_ok=True)
    text = load_text(model)
    token_ids: list[Sequence[int]] = []
    for place, prompt in enumerate(prompts):
        with _naming(place):
            token_ids.append(_encode(prompt, text.tokenizer, model))
    config = _config(model, token_ids, sampling, dtype, mesh)
    ensure_devices(config.mesh)
    keep_compiled_programs()
    engine = build_engine(
        config,
        Progress,
        compile_ahead=False,
        check=lambda info: _check_lengths(token_ids, sampling, info),
    )
    front = Front(engine, text.tokenizer)
    requests: list[GenerateRequest] = []
    for place, ids in enumerate(token_ids):
        with _naming(place):
            requests.append(front.prepare(ids, sampling))
    with traced(engine.profiles, profile) if profile else nullcontext():
        engine.start()
        try:
            _answer(front, requests, as_json)
        finally:
            engine.stop()


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts in a file of JSON lines. Raises InvalidRequest naming the line."""
    try:
        # Not splitlines, which also breaks at separators that may stand inside a JSON string.
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise InvalidRequest(f"{path} is not text in UTF-8; give JSON lines") from None
    prompts = [_read(line, f"{path}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise InvalidRequest(f'{path} has no prompt; give a line of {{"prompt": "..."}} or more')
    return prompts


def _read(line: str, where: str) -> Prompt:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise InvalidRequest(f"{where}: not JSON: {error}") from None
    match entry:
        case {"prompt": str(prompt)} if len(entry) == 1:
            return prompt
        case {"prompt_ids": list(ids)} if len(entry) == 1 and all(type(i) is int for i in ids):
            return ids
        case _:
            raise InvalidRequest(
                f"{where}: {line.strip()[:80]} is neither "
                '{"prompt": "..."} nor {"prompt_ids": [...]}'
            )


@contextmanager
def _naming(place: int) -> Generator[None]:
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(f"prompt {place}: {error}") from None


def _encode(prompt: Prompt, tokenizer: Tokenizer | None, model: Path) -> list[int]:
    if not prompt:
        raise InvalidRequest("the prompt is empty; give one token or more")
    if not isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        raise InvalidRequest(
            f'{model} has no tokenizer for a prompt of text; give {{"prompt_ids": [...]}} in a file'
        )
    try:
        return tokenizer.encode(prompt)
    except ValueError as error:
        raise InvalidRequest(str(error)) from None


def _config(
    model: Path, token_ids: Sequence[Sequence[int]], sampling: SamplingParams, dtype: str, mesh: str
) -> ServeConfig:
    """An engine no larger than these prompts need, since what it has is compiled and allocated."""
    options: dict[str, Any] = {"path": str(model.absolute()), "dtype": dtype}
    if sampling.max_tokens is not None:
        needed = max(map(len, token_ids)) + sampling.max_tokens
        options["max_context"] = min(needed, read_model_config(model).max_context)
    num_prompts = len(token_ids)
    max_batch = min(MAX_BATCH, 1 << (num_prompts - 1).bit_length())
    usual = ScheduleSection()
    prefill = sum(-(-len(ids) // usual.chunk) * usual.chunk for ids in token_ids)
    tables: Mapping[str, Any] = {
        "model": options,
        "mesh": asdict(parse_mesh(mesh)),
        "schedule": {
            "max_batch": max_batch,
            "max_queue": max(num_prompts, usual.max_queue),
            "token_budget": min(usual.token_budget, max_batch + max(prefill, usual.chunk)),
            "max_slowdown": math.inf,  # nobody watches streams
        },
    }
    return make_config(tables, "weft generate")


def _check_lengths(
    token_ids: Sequence[Sequence[int]], sampling: SamplingParams, info: ModelInfo
) -> None:
    """Refuses what the engine would, before the minutes that a large model takes to load."""
    context, held = info.max_context, info.num_pages * info.page_size
    for place, ids in enumerate(token_ids):
        with _naming(place):
            if len(ids) >= context:
                raise InvalidRequest(
                    f"the prompt has {len(ids):,} tokens; a context of {context:,} allows "
                    f"{context - 1:,} and a token of answer; shorten the prompt"
                )
            needed = min(len(ids) + (sampling.max_tokens or 1), context)
            if needed > held:
                raise InvalidRequest(
                    f"the prompt has {len(ids):,} tokens, {needed:,} with its answer, and beside "
                    f"the weights there is room for keys and values of {held:,}; shorten the "
                    "prompt, lower --max-tokens or take a larger --mesh"
                )


def _answer(front: Front, requests: Sequence[GenerateRequest], as_json: bool) -> None:
    answers = [Answer(request.prompt_ids) for request in requests]
    has_text = front.tokenizer is not None
    streams = has_text and not as_json and len(answers) == 1
    num_shown = 0
    for place, delta in front.generate_all(requests):
        answers[place].add(delta)
        if streams:
            print(delta.text, end="" if delta.finish_reason is None else "\n", flush=True)
            continue
        while num_shown < len(answers) and answers[num_shown].finish_reason is not None:
            show = _as_json if as_json else _as_text
            print(show(num_shown, answers[num_shown], has_text), flush=True)
            num_shown += 1
    failed = [(i, a) for i, a in enumerate(answers) if a.finish_reason is FinishReason.ERROR]
    if failed:
        place, answer = failed[0]
        raise RequestError(f"prompt {place} failed, {len(failed)} in all: {answer.error}")


def _as_json(index: int, answer: Answer, has_text: bool) -> str:
    assert answer.finish_reason is not None
    return json.dumps(
        {
            "index": index,
            "prompt_ids": answer.prompt_ids,
            "token_ids": answer.token_ids,
            "text": "".join(answer.texts) if has_text else None,
            "finish_reason": answer.finish_reason.value,
        }
    )


def _as_text(index: int, answer: Answer, has_text: bool) -> str:
    """Without a tokenizer an answer is shown as ids."""
    shown = "".join(answer.texts) if has_text else " ".join(map(str, answer.token_ids))
    return f"[{index}] {shown}"
