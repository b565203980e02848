"""From a row to token ids and labels: which tokens are trained, exactly. Imports no torch.

Chats go through the tokenizer's chat template and are tokenized as one text, as ``apply_chat_template`` does.
The loss counts the assistant's turns from the end of the generation prompt through the end-of-turn token,
since that is what the model has to produce; whitespace that the template puts after the end-of-turn token is
not.

A template that marks its generations (``{% generation %}``) is believed. For the others the turns are found
by rendering: what stands before a turn is the rendering of the messages before it; the turn's content is
where the text changes when only the content changes; the end of turn is what follows the content both here
and when the turn is last.

A tokenizer without a chat template gets a plain one: ``User: …``, ``Assistant: …``, blank lines between the
messages and its end-of-sequence token after each assistant message. Raw text is tokenized with the
tokenizer's own special tokens and ends with the end-of-sequence token. A block of a running text does not
end: it is cut into pieces, each of which starts with the tokenizer's beginning-of-sequence token if it sets
one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from jinja2 import TemplateError

from chunkplan.engine.data.rows import Conversation, Message, RawText
from chunkplan.engine.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
"""Label of a token that is not trained."""

# A private-use character: no content starts or ends like it, so common prefixes and suffixes stop at the
# content.
_PLACEHOLDER = "\ue0f7"
_PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% if not loop.last %}{{ '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)


class Tokens(NamedTuple):
    """Holds the token ids of a row and their labels: the id where a token is trained, else -100 (not
    shifted).
    """

    input_ids: list[int]
    labels: list[int]


class Span(NamedTuple):
    """Characters [start, stop) of a text."""

    start: int
    stop: int


class Rendered(NamedTuple):
    """The text of one row, and which of its characters are trained."""

    text: str
    spans: tuple[Span, ...]
    add_special_tokens: bool
    ends: bool
    """The end-of-sequence token follows."""


class Encoder:
    """Turns rows into tokens with one tokenizer.

    Raises:
        InputError: for ``model``, if the tokenizer cannot say which characters a token stands for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise InputError("model", "its tokenizer is not a fast one (no tokenizer.json), so turns cannot be located")
        self.tokenizer = tokenizer
        template = tokenizer.chat_template
        self.template: str | None = template.get("default") if isinstance(template, dict) else template
        self._marks_generations = re.search(r"\{%-?\s*generation", self.template or "") is not None
        self._added_ids = frozenset(tokenizer.added_tokens_decoder)
        bos = tokenizer.bos_token_id
        self._start: list[int] = [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []

    def encode(self, content: Conversation | RawText) -> Tokens:
        """Token ids and labels of one row, not truncated.

        Raises:
            ValueError: the chat template refuses the conversation; the message says why.
        """
        return self.encode_all([self.render(content)])[0]

    def render(self, content: Conversation | RawText) -> Rendered | Tokens:
        """What :meth:`encode_all` takes: a text, or the tokens where the template makes them itself.

        Raises:
            ValueError: the chat template refuses the conversation; the message says why.
        """
        if isinstance(content, RawText):
            text = content.prompt + content.completion
            trained = Span(len(content.prompt), len(text))
            return Rendered(text, (trained,), add_special_tokens=not content.is_running, ends=not content.is_running)
        try:
            return self._render_conversation(content.messages)
        except TemplateError as error:
            raise ValueError(f"the model's chat template refuses this conversation: {error}") from error

    def encode_all(self, rows: Sequence[Rendered | Tokens]) -> list[Tokens]:
        """Token ids and labels of rendered rows, as if each were encoded alone, but several at a time."""
        result: dict[int, Tokens] = {i: row for i, row in enumerate(rows) if isinstance(row, Tokens)}
        for add_special_tokens in (False, True):
            chosen = [
                (i, row)
                for i, row in enumerate(rows)
                if isinstance(row, Rendered) and row.add_special_tokens == add_special_tokens
            ]
            if chosen:
                texts = [row.text for _, row in chosen]
                encoded = self.tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)
                for (i, row), encoding in zip(chosen, encoded.encodings, strict=True):
                    tokens = self._label(row.text, row.spans, encoding.ids, encoding.offsets)
                    result[i] = self._with_end_of_sequence(tokens) if row.ends else tokens
        return [result[i] for i in range(len(rows))]

    def pieces(self, tokens: Tokens, seq_len: int) -> list[Tokens]:
        """A block of a running text in pieces of at most ``seq_len`` tokens, which lose none."""
        length = max(1, seq_len - len(self._start))
        blank = [IGNORE_INDEX] * len(self._start)
        cuts = [slice(i, i + length) for i in range(0, len(tokens.input_ids), length)]
        return [Tokens(self._start + tokens.input_ids[cut], blank + tokens.labels[cut]) for cut in cuts]

    def _with_end_of_sequence(self, tokens: Tokens) -> Tokens:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            return tokens
        if tokens.input_ids[-1:] == [eos]:
            return Tokens(tokens.input_ids, [*tokens.labels[:-1], eos])
        return Tokens([*tokens.input_ids, eos], [*tokens.labels, eos])

    def _render_conversation(self, messages: Sequence[Message]) -> Rendered | Tokens:
        if self._marks_generations:
            return self._encode_marked(messages)
        text = self._render(messages)
        spans = [self._turn(text, messages, i) for i, message in enumerate(messages) if message.role == "assistant"]
        return Rendered(text, tuple(spans), add_special_tokens=self.template is None, ends=False)

    def _encode_marked(self, messages: Sequence[Message]) -> Tokens:
        encoded = self.tokenizer.apply_chat_template(
            [message._asdict() for message in messages], return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        return Tokens(ids, [token if trained else IGNORE_INDEX for token, trained in zip(ids, mask, strict=True)])

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        rendered = self.tokenizer.apply_chat_template(
            [message._asdict() for message in messages],
            chat_template=self.template or _PLAIN_TEMPLATE,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
        assert isinstance(rendered, str)
        return rendered

    def _turn(self, text: str, messages: Sequence[Message], index: int) -> Span:
        """Return where the assistant's message ``index`` begins and ends in ``text``, trained characters
        only.
        """
        blank = self._render([*messages[:index], Message("assistant", _PLACEHOLDER), *messages[index + 1 :]])
        start = _common_prefix(text, blank)
        stop = len(text) - _common_suffix(text[start:], blank[start:])
        tail = self._render([*messages[:index], Message("assistant", _PLACEHOLDER)]).rpartition(_PLACEHOLDER)[2]
        before = self._prompt(messages[:index])
        if before is not None and text.startswith(before):
            start = len(before)
        return Span(start, stop + _common_prefix(text[stop:], tail))

    def _prompt(self, messages: Sequence[Message]) -> str | None:
        """The text that the model is given to answer ``messages``; None where the template has none."""
        if not messages:
            return None
        try:
            return self._render(messages, add_generation_prompt=True)
        except TemplateError:
            return None

    def _label(self, text: str, spans: Sequence[Span], ids: list[int], offsets: Sequence[tuple[int, int]]) -> Tokens:
        labels = [IGNORE_INDEX] * len(ids)
        for span in spans:
            for position in self._trained(text, span, ids, offsets):
                labels[position] = ids[position]
        return Tokens(ids, labels)

    def _trained(self, text: str, span: Span, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> Sequence[int]:
        """Positions of the tokens of ``span``, less the template's whitespace after an end-of-turn token."""
        inside = [
            position
            for position, (start, stop) in enumerate(offsets)
            if span.start < stop <= span.stop and start < stop
        ]
        last = len(inside)
        while last and text[slice(*offsets[inside[last - 1]])].isspace():
            last -= 1
        ends_in_token = 0 < last < len(inside) and ids[inside[last - 1]] in self._added_ids
        return inside[:last] if ends_in_token else inside


def _common_prefix(a: str, b: str) -> int:
    """Return how many characters both begin with, by bisection: slices are compared far faster than
    characters.
    """
    known, limit = 0, min(len(a), len(b))
    while known < limit:
        middle = (known + limit + 1) // 2
        if a[known:middle] == b[known:middle]:
            known = middle
        else:
            limit = middle - 1
    return known


def _common_suffix(a: str, b: str) -> int:
    return _common_prefix(a[::-1], b[::-1])
