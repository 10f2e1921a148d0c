"""Chat templates: messages to the prompt text that a model was trained on.

It does not know tokens: its text, BOS included, goes to `Tokenizer.encode` with
`add_special_tokens=False`.
"""

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.tokenizer import Settings, read_json

Message = Mapping[str, Any]


class ChatTemplateError(ValueError):
    """A template that cannot be read, or that cannot or will not render what it was given."""


class ChatTemplate:
    """The templates of one checkpoint: `default`, perhaps `tool_use` and others.

    They run in Jinja's sandbox with what transformers gives them, and nothing else. The sandbox
    bounds a range to 100,000; time and memory it does not bound, so templates must come with the
    checkpoint, never with a request.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        special_tokens: Mapping[str, str] | None = None,
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`special_tokens` are variables such as bos_token; `clock` tells templates the date."""
        environment = _environment(clock)
        self._special_tokens = dict(special_tokens or {})
        self._templates: dict[str, jinja2.Template] = {}
        for name, source in sources.items():
            try:
                self._templates[name] = environment.from_string(source)
            except jinja2.TemplateSyntaxError as error:
                raise ChatTemplateError(
                    f"chat template {name}, line {error.lineno}: {error.message}"
                ) from error

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt for `messages`; `variables` are the template's own, such as enable_thinking.

        Arguments of tool calls are best given as objects: many templates write them as JSON.
        """
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise ChatTemplateError(
                f"no chat template named default; this model has {', '.join(self._templates)}"
            )
        given = {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._templates[name].render({**self._special_tokens, **given, **variables})
        except _RefusedError as error:
            raise ChatTemplateError(f"the chat template refuses: {error}") from error
        except Exception as error:  # a template is a program: it may fail in any way
            raise ChatTemplateError(
                f"chat template {name}{_line(error)} failed: {type(error).__name__}: {error};"
                " check that messages and tools are what this model's template expects"
            ) from error


def load_chat_template(
    directory: Path, clock: Callable[[], datetime] = datetime.now
) -> ChatTemplate | None:
    """The chat template in a checkpoint's directory; None where there is none (a base model)."""
    sources = _read_sources(directory)
    if not sources:
        return None
    try:
        return ChatTemplate(sources, Settings.read(directory).special_tokens, clock)
    except ChatTemplateError as error:
        raise ChatTemplateError(f"{directory}: {error}") from error


def _read_sources(directory: Path) -> dict[str, str]:
    """Templates by name. A file of its own wins over the settings' key, as in transformers."""
    path = directory / "tokenizer_config.json"
    match read_json(path).get("chat_template"):
        case None:
            sources = {}
        case str(source):
            sources = {"default": source}
        case [*entries] if all(_is_named_template(entry) for entry in entries):
            sources = {entry["name"]: entry["template"] for entry in entries}
        case _:
            raise ChatTemplateError(
                f"chat_template in {path} is neither a string nor a list of objects with name and"
                " template; fetch the file again, or put the template in chat_template.jinja"
            )
    if (path := directory / "chat_template.jinja").is_file():
        sources = {"default": path.read_text(encoding="utf-8")}
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        sources[path.stem] = path.read_text(encoding="utf-8")
    return sources


def _is_named_template(entry: object) -> bool:
    match entry:
        case {"name": str(), "template": str()}:
            return True
    return False


class _RefusedError(Exception):
    """A template called raise_exception."""


class _GenerationTag(Extension):
    """Lets `{% generation %}` pass, which marks for training what the model said."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment(clock: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    """What transformers gives to chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: clock().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own would escape for HTML, which models have not seen in training."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> NoReturn:
    raise _RefusedError(message)


def _line(error: Exception) -> str:
    """Where in the template: Jinja rewrites the traceback so that it passes through there."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
    return f", line {lines[-1]}," if lines else ""
