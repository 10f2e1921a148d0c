import copy
import json
from datetime import datetime
from typing import Any

import pytest

from model.chat import ChatTemplate, ChatTemplateError, load_chat_template
from tests.assets import ASSETS, needs_assets

TEMPLATES = ASSETS / "chat_templates"
HI = [{"role": "user", "content": "hi"}]


def clock() -> datetime:
    return datetime(2031, 2, 3, 4, 5)


def template(source: str, **special_tokens: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, special_tokens, clock)


def golden() -> list[Any]:
    if not ASSETS.is_dir():
        return []
    rendered = json.loads((TEMPLATES / "rendered.json").read_text(encoding="utf-8"))
    return [
        pytest.param(
            result,
            rendered["cases_input"][result["case"]],
            id=f"{result['template'].removesuffix('.jinja')}-{result['case']}",
        )
        for result in rendered["results"]
    ]


@needs_assets
@pytest.mark.parametrize(("result", "given"), golden())
def test_renderings_are_the_golden_ones(result, given):
    chat = template(
        (TEMPLATES / result["template"]).read_text(encoding="utf-8"),
        bos_token=result["bos_token"],
        eos_token=result["eos_token"],
    )
    before = copy.deepcopy(given)
    if "error" in result:
        kind, _, message = result["error"].partition(": ")
        says = "refuses" if kind == "TemplateError" else f"failed: {kind}"
        with pytest.raises(ChatTemplateError) as caught:
            chat.render(**given)
        assert f"{says}: {message}" in str(caught.value)
    elif result.get("date_dependent"):
        assert "The current date is 2031-02-03." in chat.render(**given)
    else:
        assert chat.render(**given) == result["rendered"]
    assert given == before


@needs_assets
def test_a_template_has_its_own_variables():
    chat = template((TEMPLATES / "Qwen-Qwen3-0.6B.jinja").read_text(encoding="utf-8"))
    assert chat.render(HI).endswith("assistant\n")
    assert chat.render(HI, enable_thinking=False).endswith("<think>\n\n</think>\n\n")


def test_json_is_neither_escaped_nor_sorted():
    chat = template("{{ tools | tojson }}{{ tools | tojson(indent=1) }}")
    tools = [{"b": "<é&'>", "a": 1}]
    expected = '[{"b": "<é&\'>", "a": 1}]'
    assert chat.render(HI, tools) == expected + json.dumps(tools, ensure_ascii=False, indent=1)


def test_training_marks_and_loop_controls_pass():
    chat = template(
        "{% set x = 1 %}{% for m in messages %}{% generation %}{% set x = 2 %}"
        "{{ m.content }}{% endgeneration %}{{ x }}{% break %}{% endfor %}"
    )
    assert chat.render(HI * 2) == "hi1"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('no ' ~ messages[0].role) }}", "the chat template refuses: no user"),
        ("a\n{{ messages[0].x.y }}", r"default, line 2, failed: UndefinedError: .* 'x'"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{% for i in range(100001) %}{% endfor %}", "OverflowError: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ messages[0].update(a=1) }}", "SecurityError"),
        ("{{ messages.append.__globals__ }}", "SecurityError"),
        ("{% include 'a' %}", "TypeError: no loader"),
    ],
)
def test_a_template_that_fails_says_so(source, says):
    with pytest.raises(ChatTemplateError, match=says):
        template(source).render(HI)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("a\n{% if %}", "chat template default, line 2: Expected an expression"),
        ("{{ a | no_such_filter }}", "line 1: No filter named 'no_such_filter'"),
        ("{% generation %}a", "line 1: Unexpected end of template"),
    ],
)
def test_a_template_that_cannot_be_read_says_where(source, says):
    with pytest.raises(ChatTemplateError, match=says):
        template(source)


def test_a_base_model_has_no_template(tmp_path):
    assert load_chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": null}')
    assert load_chat_template(tmp_path) is None


def test_special_tokens_come_from_the_settings(tmp_path):
    config = {
        "chat_template": "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}",
        "bos_token": {"content": "<s>", "special": True},
        "eos_token": "</s>",
        "pad_token": None,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    chat = load_chat_template(tmp_path)
    assert chat is not None
    assert chat.render(HI) == "<s></s>False"
    assert chat.render(HI, bos_token="<b>") == "<b></s>False"


def test_a_template_file_wins_over_the_settings(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "settings"}')
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}")
    chat = load_chat_template(tmp_path, clock)
    assert chat is not None
    assert chat.render(HI) == "03 Feb 2031"


def test_tools_choose_the_template_named_for_them(tmp_path):
    entries = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entries}))
    chat = load_chat_template(tmp_path)
    assert chat is not None
    assert [chat.render(HI, tools) for tools in (None, [], [{}])] == ["d", "d", "t"]

    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("file")
    chat = load_chat_template(tmp_path)
    assert chat is not None
    assert chat.render(HI, [{}]) == "file"


def test_a_model_without_a_default_template_says_what_it_has():
    with pytest.raises(ChatTemplateError, match="named default; this model has rag"):
        ChatTemplate({"rag": ""}).render(HI)


@pytest.mark.parametrize("value", [1, [{"name": "default"}], ["a"]])
def test_a_template_of_the_wrong_kind_names_its_file(tmp_path, value):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(ChatTemplateError, match=r"tokenizer_config\.json is neither a string"):
        load_chat_template(tmp_path)


def test_a_broken_template_names_its_directory(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{")
    with pytest.raises(ChatTemplateError, match=rf"{tmp_path}: chat template default, line 1"):
        load_chat_template(tmp_path)
