"""Conversations through chat templates of every kind: lists or texts, with a system turn or without."""

from __future__ import annotations

import pytest

from tagstore.errors import InvalidInput
from tagstore.readers.samples import Turn
from tuna import small
from tuna_model import presets
from tuna_model.inference.conversations import Reader, user_message
from tuna_model.presets.loading import CHATML, PLAIN, VICUNA
from tuna_model.processing.chat_template import render
from tuna_model.training.collator import Collator

TEXT_ONLY = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
"""As SmolLM2's own: adds a content to a text."""
TRIMMED = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] | trim }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""As Llama 3's: writes a list as Python shows it, without an error."""
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles alternate') }}"
    "{% endif %}<{{ message['role'] }}>{{ message['content'] | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""As Gemma's."""
PARTS_ONLY = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""As llava-hf's: reads nothing of a content that is text."""
TEMPLATES = {
    "chatml": CHATML, "vicuna": VICUNA, "plain": PLAIN, "text": TEXT_ONLY, "trimmed": TRIMMED,
    "no_system": NO_SYSTEM, "parts": PARTS_ONLY,
}  # fmt: skip


@pytest.fixture(params=TEMPLATES)
def processor(request):
    _, processor = small()
    processor.chat_template = TEMPLATES[request.param]
    return processor


def test_system_turns_work_with_every_template_as_text_and_as_parts(processor):
    parts = [{"type": "text", "text": "Be brief."}]
    texts = {
        render(
            processor,
            [{"role": "system", "content": content}, user_message("Hi")],
            add_generation_prompt=True,
        )
        for content in ("Be brief.", parts)
    }
    [text] = texts
    assert text.index("Be brief.") < text.index("Hi")
    assert "{" not in text


def test_pictures_stand_where_the_message_has_them(processor):
    parts = [{"type": "image"}, {"type": "text", "text": "first"}, {"type": "image"}]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "second"}]}]
    text = render(processor, messages)
    assert text.count("<image>") == 2
    assert text.index("<image>") < text.index("first") < text.index("second")
    prompt = Reader(processor, 2048).read([b""] * 0, [user_message("Hi")])
    assert prompt.token_ids.count(processor.image_token_id) == 0


def test_a_sample_with_a_system_turn_is_learnt_as_it_is_asked(processor):
    turns = (Turn("system", "Be brief."), Turn("user", "Who?"), Turn("assistant", "A dog."))
    encoded, labels = Collator(processor).encode(turns, [])
    asked = render(
        processor,
        [{"role": "system", "content": "Be brief."}, user_message("Who?")],
        add_generation_prompt=True,
    )
    prompt = processor.token_ids(asked)
    assert encoded.input_ids[: len(prompt)] == prompt
    learnt = [token for token, label in zip(encoded.input_ids, labels, strict=True) if label != -100]
    assert "A dog." in processor.tokenizer.decode(learnt)


def test_what_a_template_refuses_is_named():
    _, processor = small()
    processor.chat_template = NO_SYSTEM
    with pytest.raises(InvalidInput, match="refuses these messages: roles alternate"):
        render(processor, [user_message("a"), user_message("b")])


def test_a_template_that_loses_pictures_is_named():
    _, processor = small()
    processor.chat_template = CHATML.replace(
        "'<image>\n' if part['type'] == 'image' else part['text']", "part['text']"
    )
    with pytest.raises(InvalidInput, match="writes 0 image tokens for 1 pictures"):
        Reader(processor, 2048).read([None], [user_message("Who?", 1)])


def test_content_must_be_there():
    _, processor = small()
    with pytest.raises(InvalidInput, match="never None"):
        Reader(processor, 2048).read([], [{"role": "user", "content": None}])


def test_smols_own_template_of_its_decoder_is_read_as_text():
    """The template that SmolLM2 comes with adds content to a text: lists failed there."""
    _, processor = small()
    processor.chat_template = presets.smollm.tokenizer().chat_template
    assert "Be brief." in render(
        processor,
        [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, user_message("Hi")],
    )
