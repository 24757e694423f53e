"""Chat templates against transformers' `apply_chat_template`, and what a template or caller may not do."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from photon_grpc.errors import InvalidRequestError, ModelLoadError, RequestError, UnsupportedFeatureError
from photon_grpc.frontend.chat import ChatRenderer
from photon_grpc.frontend.tokenizer import Tokenizer
from photon_grpc.types import ChatInput, ChatMessage, Role
from tests.support.text_models import byte_fallback_bpe, byte_level_bpe, write_text_model
from tests.support.tiny_model import tiny_model_folder

HEADERS = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{%- if system_message %}<|turn|>system

{{ system_message }}<|end|>{%- endif %}
{%- for message in messages %}
    {{- '<|turn|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|turn|>assistant\\n\\n' }}{%- endif %}
"""

THINKING = """{% for message in messages %}
{% if message.role == 'tool' %}{% continue %}{% endif %}
<|turn|>{{ message.role }}
{{ message.content }}<|end|>
{% endfor %}
{% if add_generation_prompt %}<|turn|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>
{% endif %}{% endif %}"""

STRICT = """{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Roles must alternate user/assistant') }}{% endif %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"""

BLOCKS = """{%- set ns = namespace(count=0) %}{% for message in messages %}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{%- else %}{{ message | tojson }}{{ {'b': '<é>', 'a': [1, 2.5, none]} | tojson(indent=2, sort_keys=true) }}
{%- endif %}{% set ns.count = ns.count + 1 %}{% endfor %}{{ ns.count }} {{ tools is none }}{{ documents }}"""

TEMPLATES = {"headers": HEADERS, "thinking": THINKING, "strict": STRICT, "blocks": BLOCKS}

USER = ChatMessage(Role.USER, "  Wie heißt <du>? 😀 ")
CHATS = {
    "one": (USER,),
    "turns": (USER, ChatMessage(Role.ASSISTANT, "Ich bin\nes. "), ChatMessage(Role.USER, "ok")),
    "last assistant": (USER, ChatMessage(Role.ASSISTANT, "  Ich heiße ")),
    "special inside": (ChatMessage(Role.USER, "a<|end|>b <|turn|>system"),),
}

Build = Callable[..., tuple[ChatRenderer, Any]]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Our renderer and transformers' tokenizer over one folder."""

    def make(template: object, *, fallback: bool = False, **options: Any) -> tuple[ChatRenderer, Any]:
        backend = byte_fallback_bpe() if fallback else byte_level_bpe()
        folder = write_text_model(tmp_path / "model", backend, chat_template=template)
        return (
            ChatRenderer(Tokenizer.load(folder), **options),
            AutoTokenizer.from_pretrained(str(folder), local_files_only=True),
        )

    return make


def _dicts(messages: tuple[ChatMessage, ...]) -> list[dict[str, str]]:
    return [{"role": message.role.value, "content": message.content} for message in messages]


def _golden(reference: Any, messages: tuple[ChatMessage, ...], **options: Any) -> list[int]:
    ids: list[int] = reference.apply_chat_template(
        _dicts(messages), tokenize=True, return_dict=False, **options
    )
    return ids


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_equal_transformers(build: Build, name: str, chat: str) -> None:
    renderer, reference = build(TEMPLATES[name], fallback=name == "strict")
    ids = renderer.encode(ChatInput(CHATS[chat]))
    assert ids == _golden(reference, CHATS[chat], add_generation_prompt=True)
    if "bos_token" in TEMPLATES[name]:
        assert ids.count(reference.bos_token_id) == 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_final_message_is_continued_as_in_transformers(build: Build, name: str) -> None:
    renderer, reference = build(TEMPLATES[name])
    for content in ("  Ich heiße ", "plain", "with<|end|>inside", "END_OF_THE_FINAL_MESSAGE twice"):
        messages = (USER, ChatMessage(Role.ASSISTANT, content))
        ids = renderer.encode(ChatInput(messages, continue_final_message=True))
        assert ids == _golden(reference, messages, continue_final_message=True)


def test_template_args_reach_the_template(build: Build) -> None:
    renderer, reference = build(THINKING)
    for value in (True, False):
        ids = renderer.encode(ChatInput((USER,), {"enable_thinking": value}))
        assert ids == _golden(reference, (USER,), add_generation_prompt=True, enable_thinking=value)
    assert renderer.render(ChatInput((USER,), {"enable_thinking": False})).endswith("<think></think>\n")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_tiny_models_template(tmp_path: Path, family: str) -> None:
    folder = tiny_model_folder(tmp_path, family)
    reference = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    renderer = ChatRenderer(Tokenizer.load(folder))
    for messages in CHATS.values():
        assert renderer.encode(ChatInput(messages)) == _golden(
            reference, messages, add_generation_prompt=True
        )


def test_a_template_file_wins_over_the_config(tmp_path: Path) -> None:
    folder = write_text_model(tmp_path, byte_level_bpe(), chat_template="from the config")
    (folder / "chat_template.jinja").write_text("from the file")
    assert ChatRenderer(Tokenizer.load(folder)).render(ChatInput((USER,))) == "from the file"


def test_of_several_templates_the_default_is_used(build: Build) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": HEADERS}]
    renderer, reference = build(named)
    assert renderer.encode(ChatInput((USER,))) == _golden(reference, (USER,), add_generation_prompt=True)
    renderer, _ = build([{"name": "tool_use", "template": "tools"}])
    assert not renderer.is_supported


def test_a_model_without_a_template_refuses_chat(build: Build) -> None:
    renderer, _ = build(None)
    assert not renderer.is_supported
    with pytest.raises(UnsupportedFeatureError) as caught:
        renderer.encode(ChatInput((USER,)), field_root="")
    assert caught.value.violations[0].field == "chat"


def test_the_date_is_todays(build: Build) -> None:
    template = "{{ strftime_now('%d %b %Y') }}"
    renderer, _ = build(template, now=lambda: datetime(2031, 2, 3))
    assert renderer.render(ChatInput((USER,))) == "03 Feb 2031"
    renderer, _ = build(template)
    assert str(datetime.now().year) in renderer.render(ChatInput((USER,)))


@pytest.mark.parametrize(
    "name",
    [
        "messages",
        "add_generation_prompt",
        "bos_token",
        "eos_token",
        "raise_exception",
        "strftime_now",
        "tools",
        "documents",
        "namespace",
        "nobody_reads_this",
        "self",
        "x",  # set by the template itself, not asked for
    ],
)
def test_template_args_replace_nothing_and_must_be_known(build: Build, name: str) -> None:
    template = (
        "{{ bos_token }}{{ messages }}{{ eos_token }}{{ tools }}{{ documents }}{{ wanted }}"
        "{% if add_generation_prompt %}{{ strftime_now('%Y') }}{% endif %}"
        "{% set x = namespace(a=1) %}{% if false %}{{ raise_exception('no') }}{% endif %}{{ x.a }}"
    )
    renderer, _ = build(template)
    with pytest.raises(InvalidRequestError) as caught:
        renderer.render(ChatInput((USER,), {name: "evil"}))
    assert [violation.field for violation in caught.value.violations] == ["spec.chat.template_args"]
    assert "wanted" in caught.value.message
    assert "evil" not in caught.value.message
    assert renderer.render(ChatInput((USER,), {"wanted": "W"}))


def test_a_literal_refusal_of_the_template_is_passed_on(build: Build) -> None:
    renderer, _ = build(STRICT)
    with pytest.raises(InvalidRequestError, match="Roles must alternate") as caught:
        renderer.render(ChatInput((USER, USER)))
    assert [violation.field for violation in caught.value.violations] == ["spec.chat"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no: ' + messages[0].content) }}",
        "{{ raise_exception(messages[0].content) }}",
        "{{ messages[0].content.nothing.at_all }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[0][messages[0].content].x }}",
        "{{ 1 / 0 }}{{ messages[0].content }}",
        "{{ messages[0].content | int('x') + [] }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}{{ messages[0].content.__class__.x }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ messages | tojson | attr('format') }}{{ range(10 ** 9) }}",
        "{{ messages[0].content.encode('ascii') }}",
    ],
)
def test_no_error_repeats_the_conversation(build: Build, template: str) -> None:
    renderer, _ = build(template)
    secret = "-".join(["canary", "é"])  # not spelt here: a traceback shows source lines
    with pytest.raises(RequestError) as caught:
        renderer.render(ChatInput((ChatMessage(Role.USER, secret),)))
    assert secret not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None


@pytest.mark.parametrize("where", ["append", "not there"])
def test_a_template_that_drops_the_final_message_cannot_continue_it(build: Build, where: str) -> None:
    renderer, _ = build("{{ messages[0].content }}" if where == "append" else "constant")
    with pytest.raises(InvalidRequestError) as caught:
        renderer.render(ChatInput((USER, ChatMessage(Role.ASSISTANT, "go")), continue_final_message=True))
    assert [v.field for v in caught.value.violations] == ["spec.chat.continue_final_message"]


def test_the_rendered_text_is_bounded_while_it_grows(build: Build) -> None:
    # Ten billion pieces: only a bound that is checked on the way comes back in time.
    endless = "{% for i in range(100000) %}{% for j in range(100000) %}{{ 'x' }}{% endfor %}{% endfor %}"
    renderer, _ = build(endless, max_rendered_chars=5000)
    with pytest.raises(InvalidRequestError, match="more than 5000 characters"):
        renderer.render(ChatInput((USER,)))
    renderer, _ = build("{{ messages[0].content }}", max_rendered_chars=5)
    assert renderer.render(ChatInput((ChatMessage(Role.USER, "12345"),))) == "12345"


def test_an_empty_chat_is_refused(build: Build) -> None:
    renderer, _ = build(HEADERS)
    with pytest.raises(InvalidRequestError) as caught:
        renderer.render(ChatInput(()))
    assert caught.value.violations[0].field == "spec.chat.messages"


def test_fault_09_lone_surrogates_in_a_message_are_refused(build: Build) -> None:
    renderer, _ = build(HEADERS)
    with pytest.raises(InvalidRequestError) as caught:
        renderer.encode(ChatInput((ChatMessage(Role.USER, "\ud800"),)))
    assert caught.value.violations[0].field == "spec.chat"


def test_a_broken_template_stops_the_start(tmp_path: Path) -> None:
    folder = write_text_model(tmp_path, byte_level_bpe(), chat_template="{% for %}")
    with pytest.raises(ModelLoadError, match="chat template, line 1"):
        ChatRenderer(Tokenizer.load(folder))
