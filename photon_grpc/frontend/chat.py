"""Conversations to token ids, through the chat template that comes with the model.

Templates are written for transformers' `apply_chat_template`, so the environment here is the same:
sandboxed Jinja with `raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, loop
controls, `{% generation %}` blocks, and the special tokens by name. The rendered text is encoded without
adding special tokens, since the template writes them itself: no second BOS. As in plain prompts, a
special token spelt inside a message is that token.

The template is the operator's file and may compute what it likes; what a caller can make of it is
bounded: the rendered text has a maximum length, and the caller's variables are plain data that never
replace what the server passes.

Must not know the transport or the engine. Thread-safe; used from the text pool.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from photon_grpc.errors import InvalidRequestError, ModelLoadError, UnsupportedFeatureError
from photon_grpc.frontend.tokenizer import Tokenizer
from photon_grpc.types import ChatInput

MAX_RENDERED_CHARS = 4 << 20

_SERVER_VARIABLES = frozenset(
    {"messages", "add_generation_prompt", "continue_final_message", "documents", "tools"}
)

# Put behind the final message so that the place where it ends is found in the rendered text; the space
# at its end shows whether the template strips messages.
_END_MARK = "END_OF_THE_FINAL_MESSAGE "

# What a template can raise by itself on data that it does not expect.
_RENDER_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class _RaisedByTemplate(jinja2.TemplateError):
    """The template called `raise_exception`."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is merely rendered.

    A call block, as in transformers, so that variables set inside stay inside.
    """

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    @staticmethod
    def _render(caller: Callable[[], str]) -> str:
        return caller()


def _raise_exception(message: object) -> None:
    raise _RaisedByTemplate(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class ChatRenderer:
    """One model's chat template and tokenizer; for a model without a template it refuses every chat."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_rendered_chars: int = MAX_RENDERED_CHARS,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`now` is what `strftime_now` tells the template. Raises ModelLoadError for a broken template."""
        self._tokenizer = tokenizer
        self._max_rendered_chars = max_rendered_chars
        self._template: jinja2.Template | None = None
        if tokenizer.chat_template is None:
            return
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda text: now().strftime(text)
        try:
            self._template = environment.from_string(tokenizer.chat_template)
            tree = environment.parse(tokenizer.chat_template)
        except jinja2.TemplateSyntaxError as error:
            raise ModelLoadError(f"chat template, line {error.lineno}: {error.message}") from error
        reserved = _SERVER_VARIABLES | tokenizer.special_tokens.keys() | environment.globals.keys()
        self._known_args = frozenset(jinja2.meta.find_undeclared_variables(tree)) - reserved
        self._own_messages = frozenset(_literal_messages(tree))

    @property
    def is_supported(self) -> bool:
        """Whether the model has a chat template."""
        return self._template is not None

    def encode(self, chat: ChatInput, *, field_root: str = "spec.") -> list[int]:
        """The prompt ids of a conversation; errors as `render`."""
        text = self.render(chat, field_root=field_root)
        return self._tokenizer.encode(text, add_special_tokens=False, field=f"{field_root}chat")

    def render(self, chat: ChatInput, *, field_root: str = "spec.") -> str:
        """The prompt text of a conversation, up to where the assistant is to go on.

        With `continue_final_message` it ends inside the final message, else after the generation
        prompt. Raises UnsupportedFeatureError without a template, and InvalidRequestError for what the
        template refuses; neither repeats any of the conversation.
        """
        field = f"{field_root}chat"
        if self._template is None:
            raise UnsupportedFeatureError(field, "the model has no chat template")
        if not chat.messages:
            raise InvalidRequestError.of(f"{field}.messages", "must not be empty")
        self._check_args(chat.template_args, f"{field}.template_args")
        messages = [{"role": message.role.value, "content": message.content} for message in chat.messages]
        if chat.continue_final_message:
            messages[-1]["content"] += _END_MARK
        text = self._run(
            {
                **self._tokenizer.special_tokens,
                **chat.template_args,
                "messages": messages,
                "tools": None,
                "documents": None,
                "add_generation_prompt": not chat.continue_final_message,
            },
            field,
        )
        if chat.continue_final_message:
            return _cut_at_mark(text, chat.messages[-1].content, f"{field}.continue_final_message")
        return text

    def _check_args(self, args: Mapping[str, Any], field: str) -> None:
        if not self._known_args.issuperset(args):
            known = ", ".join(sorted(self._known_args)) or "none"
            raise InvalidRequestError.of(
                field, f"the model's chat template has no such variable; those it has: {known}"
            )

    def _run(self, variables: Mapping[str, Any], field: str) -> str:
        assert self._template is not None
        parts: list[str] = []
        room = self._max_rendered_chars
        # The errors of a template may quote the conversation: none of them is chained or passed on.
        try:
            for part in self._template.generate(variables):
                parts.append(part)
                room -= len(part)
                if room < 0:
                    break
        except _RaisedByTemplate as error:
            message = error.message if error.message in self._own_messages else None
        except _RENDER_ERRORS:
            message = None
        else:
            if room < 0:
                raise InvalidRequestError.of(
                    field, f"renders to more than {self._max_rendered_chars} characters"
                )
            return "".join(parts)
        refusal = "the model's chat template does not accept this conversation"
        raise InvalidRequestError.of(field, f"{refusal}: {message}" if message else refusal)


def _literal_messages(tree: jinja2.nodes.Template) -> list[str]:
    """Messages that the template raises word for word, which thus hold nothing of a conversation."""
    messages = []
    for call in tree.find_all(jinja2.nodes.Call):
        match call:
            case jinja2.nodes.Call(
                node=jinja2.nodes.Name(name="raise_exception"), args=[jinja2.nodes.Const(value=str(message))]
            ):
                messages.append(message)
    return messages


def _cut_at_mark(text: str, final_message: str, field: str) -> str:
    """End `text` inside the final message, as transformers does."""
    place = text.rfind(_END_MARK.strip())
    if place < 0 or final_message.strip() not in text:
        raise InvalidRequestError.of(
            field, "the model's chat template does not keep the final message, so it cannot be continued"
        )
    if text.startswith(_END_MARK, place):
        return text[:place]
    return text[:place].rstrip()
