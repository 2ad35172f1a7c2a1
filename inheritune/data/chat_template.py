"""Chats as text: a list of messages, rendered by the chat template of the tokenizer."""

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

DATE = datetime(2024, 7, 26)
"""The date for templates that ask for today's, so that the same chats give the same text on every day. Llama
3.1's template falls back to it."""
_DIRECTIVES = (*"aAbBcdfHIjmMpSyY", "-d", "-m", "-H", "-I")


class ChatText(str):
    """A rendered chat. Its special tokens are tokens, which they are in no other text."""


class ChatTemplate:
    """A tokenizer's chat template, rendered by transformers."""

    def __init__(
        self,
        template: str,
        special: dict[str, str],
        spelled: Mapping[str, bool],
        normalize: Callable[[str], str] | None = None,
    ):
        """`special` are the named special tokens, such as eos_token, that the template may use. `spelled` are
        all special tokens, and whether the tokenizer looks for them after it has applied `normalize` to a
        text."""
        self.template, self.special, self.spelled = fix_date(template), special, tuple(spelled)
        self.normalize = normalize or str
        self.normal = [self.normalize(token) for token, is_normalized in spelled.items() if is_normalized]

    def render(self, messages: list) -> ChatText:
        """Return the text of a chat, as transformers' `apply_chat_template` does without a generation prompt.

        Raises ValueError, with the kind of defect, if the template refuses the chat, or if a message spells a
        special token: it would become that token and end the message."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        if any(self._spells_token(text) for text in _list_texts(messages)):
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

    def _spells_token(self, text: str) -> bool:
        """Return whether a text holds the spelling of a special token, as it is or after normalization."""
        if any(token in text for token in self.spelled):
            return True
        normal = self.normalize(text) if self.normal else ""
        return any(token in normal for token in self.normal)


def fix_date(template: str) -> str:
    """Return a template in whose text today is DATE: a macro stands for `strftime_now`, which transformers
    gives to templates."""
    if "strftime_now" not in template:
        return template
    replaced = "".join(f" | replace('%{one}', '{DATE.strftime('%' + one)}')" for one in _DIRECTIVES)
    # an empty expression, since a line break right after a block is dropped
    macro = f"{{% macro strftime_now(format) -%}}{{{{ format{replaced} }}}}{{%- endmacro %}}"
    return macro + "{{ '' }}" + template


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


def read_chat_template(
    config: dict,
    jinja: str | None,
    spelled: Mapping[str, bool],
    normalize: Callable[[str], str] | None = None,
) -> ChatTemplate | None:
    """Return the template of a tokenizer: the text of its chat_template.jinja, else the default one in its
    tokenizer_config.json; None if it has neither. The rest is as for ChatTemplate."""
    template = jinja if jinja is not None else config.get("chat_template")
    if isinstance(template, list):  # several, as transformers 4 stored them
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str):
        return None
    tokens = {key: value for key, value in config.items() if key.endswith("_token") and value}
    special = {key: v["content"] if isinstance(v, dict) else v for key, v in tokens.items()}
    named = {key: value for key, value in special.items() if isinstance(value, str)}
    return ChatTemplate(template, named, spelled, normalize)
