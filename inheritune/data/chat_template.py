"""Chats as text: a list of messages, rendered by the chat template of the tokenizer."""

from collections.abc import Iterable, Iterator
from typing import Any


class ChatText(str):
    """A rendered chat. Its special tokens are tokens, which they are in no other text."""


class ChatTemplate:
    """A tokenizer's chat template, rendered by transformers."""

    def __init__(self, template: str, special: dict[str, str], spelled: Iterable[str]):
        """`special` are the named special tokens, such as eos_token, that the template may use; `spelled` are
        all special tokens."""
        self.template, self.special, self.spelled = template, special, tuple(spelled)

    def render(self, messages: list) -> ChatText:
        """Return the text of a chat, as transformers' `apply_chat_template` does without a generation prompt.

        Raises ValueError, with the kind of defect, if the template refuses the chat, or if a message spells a
        special token: it would become that token and end the message."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        if any(token in text for text in _list_texts(messages) for token in self.spelled):
            raise ValueError("chat that spells a special token")
        chat = [_drop_missing(message) for message in messages]
        if any(isinstance(message, dict) and _is_empty(message) for message in chat):
            raise ValueError("chat with a message that has no content")
        try:
            named: dict[str, Any] = {**self.special}
            rendered = render_jinja_template([chat], chat_template=self.template, **named)[0]
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
            raise ValueError("chat that the template refuses") from None
        contents = [message.get("content") for message in chat if isinstance(message, dict)]
        if any(isinstance(content, list | dict) and str(content) in rendered[0] for content in contents):
            raise ValueError("chat whose content is a list, which the template prints as Python does")
        return ChatText(rendered[0])


def _list_texts(value: Any) -> Iterator[str]:
    """Yield every text in a chat, at any depth, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value  # its keys
        for inner in value.values():
            yield from _list_texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _list_texts(inner)


def _is_empty(message: dict) -> bool:
    """Return whether a message has neither content nor anything else beside its role, such as tool calls.
    Templates print None for it, or nothing."""
    return message.get("content") is None and not message.keys() - {"role", "content"}


def _drop_missing(message: Any) -> Any:
    """Return a message without the keys that an Arrow table adds because other messages have them."""
    if not isinstance(message, dict):
        return message
    return {key: value for key, value in message.items() if value is not None or key in ("role", "content")}


def read_chat_template(config: dict, jinja: str | None, spelled: Iterable[str]) -> ChatTemplate | None:
    """Return the template of a tokenizer: the text of its chat_template.jinja, else the default one in its
    tokenizer_config.json; None if it has neither."""
    template = jinja if jinja is not None else config.get("chat_template")
    if isinstance(template, list):  # several, as transformers 4 stored them
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    if not isinstance(template, str):
        return None
    tokens = {key: value for key, value in config.items() if key.endswith("_token") and value}
    special = {key: v["content"] if isinstance(v, dict) else v for key, v in tokens.items()}
    return ChatTemplate(template, {k: v for k, v in special.items() if isinstance(v, str)}, spelled)
