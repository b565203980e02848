"""Which tokens are trained, over the kinds of chat templates that models come with."""

import pytest

from chunkplan.engine.data.rows import Conversation, Message, RawText
from chunkplan.engine.data.tokens import IGNORE_INDEX, Encoder
from tests.support.tiny import tiny_tokenizer

CHAT = (
    Message("system", "Be brief."),
    Message("user", "hi"),
    Message("assistant", " Metal workers 🎉"),
    Message("user", "hi"),
    Message("assistant", "hi\n"),
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
    "{% elif m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% else %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
# Reasoning is shown in the last turn only, as Qwen3 does: earlier turns render differently when they are
# last.
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
DEFAULT = object()


def trained_runs(content, template=DEFAULT):
    """The trained tokens as text, one string for each unbroken run of them."""
    tokenizer = tiny_tokenizer() if template is DEFAULT else tiny_tokenizer(template)
    ids, labels = Encoder(tokenizer).encode(content)
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(ids, labels, strict=True))
    runs, previous = [], False
    for token, label in zip(ids, labels, strict=True):
        trained = label != IGNORE_INDEX
        if trained and not previous:
            runs.append([])
        if trained:
            runs[-1].append(token)
        previous = trained
    return [tokenizer.decode(run) for run in runs]


def test_smollm2_trains_each_answer_through_its_end_of_turn_token():
    assert trained_runs(Conversation(CHAT)) == [" Metal workers 🎉<|im_end|>", "hi\n<|im_end|>"]


def test_the_tokens_are_those_of_the_chat_template():
    tokenizer = tiny_tokenizer()
    expected = tokenizer.apply_chat_template([message._asdict() for message in CHAT], return_dict=True)["input_ids"]
    assert Encoder(tokenizer).encode(Conversation(CHAT)).input_ids == expected


def test_what_precedes_the_trained_tokens_is_the_generation_prompt():
    tokenizer = tiny_tokenizer()
    ids, labels = Encoder(tokenizer).encode(Conversation(CHAT[:3]))
    prompt = tokenizer.apply_chat_template(
        [message._asdict() for message in CHAT[:2]], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    first = next(position for position, label in enumerate(labels) if label != IGNORE_INDEX)
    assert ids[:first] == prompt


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (LLAMA2, CHAT[1:], [" Metal workers 🎉 <|im_end|>", " hi <|im_end|>"]),
        (PHI3, CHAT, [" Metal workers 🎉<|im_end|>", "hi\n<|im_end|>\n<|endoftext|>"]),
        (QWEN3, CHAT, [" Metal workers 🎉<|im_end|>", "<think>\n\n</think>\n\nhi\n<|im_end|>"]),
        (MARKED, CHAT, [" Metal workers 🎉<|im_end|>", "hi\n<|im_end|>"]),
        (None, CHAT, [" Metal workers 🎉<|im_end|>", " hi\n<|im_end|>"]),
    ],
    ids=["llama-2", "phi-3", "qwen3", "generation-marks", "no-template"],
)
def test_other_templates(template, messages, expected):
    runs = trained_runs(Conversation(messages), template)
    assert [run.lstrip(" ") for run in runs] == [text.lstrip(" ") for text in expected]


def test_a_chat_may_open_with_the_assistant_or_say_nothing():
    chat = (Message("assistant", "hello"), Message("user", "hi"), Message("assistant", ""))
    assert trained_runs(Conversation(chat)) == ["hello<|im_end|>", "<|im_end|>"]


def test_a_chat_without_an_answer_trains_nothing():
    assert trained_runs(Conversation(CHAT[:2])) == []


def test_a_refused_conversation_says_why():
    with pytest.raises(ValueError, match="chat template refuses this conversation: no system role"):
        trained_runs(Conversation(CHAT), LLAMA2)


def test_raw_text_trains_the_completion_and_the_end():
    assert trained_runs(RawText("title: ", "welder")) == [" welder<|im_end|>"]  # one token stands for both sides
    assert trained_runs(RawText("title:", " welder")) == [" welder<|im_end|>"]
    assert trained_runs(RawText("", "the welder")) == ["the welder<|im_end|>"]
