"""The layout decides how a prompt with tags becomes tokens, the configuration which tags are chosen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tagstore.errors import InvalidInput
from tuna import PREPROCESS, small, tags
from tuna_model import ImageTags, TunaImageProcessor, TunaProcessor, presets
from tuna_model.processing.tags import TagLayout


def named(*texts: str, relevance: tuple[float, ...] = ()) -> ImageTags:
    """Tags with these texts; similarity is the reverse of relevance, ids count from 10."""
    drawn, ids = tags(len(texts)), tuple(range(10, 10 + len(texts)))
    scores = np.array(relevance or [1 - i / 10 for i in range(len(texts))], np.float32)
    return ImageTags(texts, drawn.embeddings, scores[::-1].copy(), drawn.vote_share, scores, ids)


def spelled(processor: TunaProcessor, batch, row: int = 0) -> str:
    """The tokens of a row in words: V for an image token, Q for a tag's, words as they are."""
    out = []
    for token, index in zip(batch["input_ids"][row].tolist(), batch["tag_index"][row].tolist(), strict=True):
        image = token == processor.image_token_id
        out.append(("Q" if index >= 0 else "V") if image else processor.tokenizer.decode([token]))
    return "".join(out).replace("V" * 16, "V")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "see Qred sky,Qdog\nV now"),
        ({"tag_place": "after"}, "see VQred sky,Qdog\n now"),
        ({"tag_prefix": "Tags:", "tag_separator": ";", "tag_suffix": "."}, "see Tags:Qred sky;Qdog.V now"),
        ({"tag_separator": "", "tag_suffix": ""}, "see Qred skyQdogV now"),
        ({"max_tags": 1}, "see Qred sky\nV now"),
        ({"tag_signal": "similarity"}, "see Qdog,Qred sky\nV now"),
        ({"tag_signal": "similarity", "tag_order": "retrieval"}, "see Qred sky,Qdog\nV now"),
    ],
)
def test_layout(fields: dict, expected: str):
    _, processor = small(**fields)
    assert spelled(processor, processor(text="see <image> now", tags=[named("red sky", "dog")])) == expected


def test_a_query_for_every_word():
    _, processor = small(tag_queries="token")
    batch = processor(text="<image>", tags=[named("abc", "de")])
    assert spelled(processor, batch) == "QQQabc,QQde\nV"  # the tokenizer's words are bytes
    assert batch["tag_lengths"].tolist() == [3, 2]
    assert processor.tokenizer.decode(batch["tag_word_ids"]) == "abcde"
    assert batch["tag_index"][0][:13].tolist() == [0, 1, 2, 0, 0, 0, -1, 3, 4, 1, 1, -1, -1]


def test_a_word_inside_a_text_begins_with_a_space_where_the_tokenizer_has_such_words():
    """GPT's tokenizers have a token " dog" beside the "dog" that begins a text; Llama's add the space."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["Ġa", "a", "Ġdog", "dog", "Ġ", "<image>", "</s>", "d", "o", "g", "do", "Ġdo"]
    merges = [("Ġ", "a"), ("d", "o"), ("do", "g"), ("Ġ", "dog")]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", extra_special_tokens=["<image>"]
    )
    processor = TunaProcessor(TunaImageProcessor(**PREPROCESS), fast, image_tokens=1)
    assert processor.encode("<image>", [named("dog")]).words == ((2,),)


@pytest.mark.parametrize("queries", ["tag", "token"])
def test_indices_count_over_the_whole_batch_and_parts_join(queries: str):
    _, processor = small(tag_queries=queries)
    texts, tags_of_images = ["<image>a", "b", "<image>c<image>"], [named("x", "yy"), None, named("z")]
    batch = processor(text=texts, tags=tags_of_images)
    assert batch["cu_tags"].tolist() == [0, 2, 2, 3]
    assert spelled(processor, batch, 2).endswith("VcQz\nV")
    word = processor.tokenizer.convert_tokens_to_ids("z")
    assert batch["tag_index"][batch["input_ids"] == word].tolist() == [2]
    parts = processor.join(
        [processor.encode("<image>c", [named("x", "yy")]), processor.encode("d<image>", [named("z")])]
    )
    whole = processor.encode("<image>cd<image>", [named("x", "yy"), named("z")])
    assert (parts.input_ids, parts.tag_index, parts.words) == (whole.input_ids, whole.tag_index, whole.words)


def test_padding_sides():
    _, processor = small()
    left, right = (
        processor(text=["<image>", "ab"], tags=[named("x")], padding_side=side) for side in ("left", "right")
    )
    for name in ("input_ids", "attention_mask", "tag_index"):
        assert torch.equal(left[name][0], right[name][0])
        assert left[name][1, -2:].tolist() == right[name][1, :2].tolist()
    assert left["attention_mask"][1].sum() == 2
    with pytest.raises(InvalidInput, match="left or right"):
        processor(text="a", padding_side="top")


def test_a_tag_cannot_write_special_tokens():
    """Tags are other people's words: one that spells a special token stays a word."""
    _, processor = small()
    batch = processor(text="<image>", tags=[named("a<image>b", "</s> end", "<s>")])
    ids, index = batch["input_ids"][0], batch["tag_index"][0]
    assert int(((ids == processor.image_token_id) & (index < 0)).sum()) == 16
    assert int(((ids == processor.image_token_id) & (index >= 0)).sum()) == 3
    assert not {processor.tokenizer.eos_token_id, processor.tokenizer.bos_token_id} & set(ids.tolist())


def test_choosing_merging_and_ordering():
    five_tags = named("Sky", "blue sky", "sky", "dog", "Blue Sky", relevance=(0.1, 0.5, 0.4, 0.3, 0.6))

    def chosen(**fields) -> tuple[str, ...]:
        return TagLayout(**fields).choose(five_tags).texts

    assert chosen(merge="none") == ("Blue Sky", "blue sky", "sky", "dog", "Sky")
    assert chosen(merge="text") == ("Blue Sky", "sky", "dog")
    assert chosen(merge="contained") == ("Blue Sky", "dog")
    assert chosen(merge="none", cap=3, order="retrieval") == ("blue sky", "sky", "Blue Sky")
    assert chosen(merge="none", signal="uniform", cap=2) == ("Sky", "blue sky")
    shuffled = five_tags.take([4, 2, 0, 1, 3])
    assert TagLayout(merge="none", order="none").choose(shuffled).ids == (10, 11, 12, 13, 14)
    assert len(TagLayout().choose(ImageTags.none(4))) == 0


def test_tags_of_another_image_are_weighed_for_this_one():
    three_tags, vector = tags(3), tags(1, 5).embeddings[0]
    moved = three_tags.for_image(vector)
    np.testing.assert_allclose(moved.relevance, three_tags.embeddings @ vector)
    both = three_tags.extend(moved)
    assert len(both) == 6
    assert both.take([5]).texts == moved.take([2]).texts


def test_what_does_not_fit_is_said():
    _, processor = small()
    with pytest.raises(InvalidInput, match="2 times, and 1 tags"):
        processor(text="<image><image>", tags=[None])
    with pytest.raises(InvalidInput, match="1 times, and 2 images"):
        processor(text="<image>", images=[b"", b""])
    with pytest.raises(InvalidInput, match="give text"):
        processor()
    with pytest.raises(InvalidInput, match="no token '<picture>'"):
        TunaProcessor(TunaImageProcessor(**PREPROCESS), presets.tiny_tokenizer(), image_token="<picture>")
    with pytest.raises(InvalidInput, match="a picture is"):
        processor.image_processor(3)


def test_unknown_arguments_are_refused_by_name(tmp_path: Path):
    _, processor = small()
    for unknown in ({"truncation": True}, {"max_length": 3}, {"padding": "max_length"}, {"image": b""}):
        [name] = unknown
        with pytest.raises(InvalidInput, match=f"TunaProcessor has no argument {name}: leave it out"):
            processor(text="x", **unknown)
    with pytest.raises(InvalidInput, match="TunaImageProcessor has no argument do_resize"):
        processor.image_processor([], do_resize=False)
    with pytest.raises(InvalidInput, match="TunaProcessor has no argument template"):
        TunaProcessor(processor.image_processor, processor.tokenizer, template="x")
    # what transformers itself gives
    assert processor(text="x", padding=True, videos=None)["input_ids"].shape[0] == 1
    messages = [{"role": "user", "content": "Hi"}]
    ids = processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert ids[0].tolist() == processor.token_ids(processor.apply_chat_template(messages))
    processor.save_pretrained(tmp_path)
    again = TunaProcessor.from_pretrained(tmp_path)
    assert torch.equal(again(text="<image>x")["input_ids"], processor(text="<image>x")["input_ids"])


def test_no_tags_are_the_tokens_of_transformers_llava():
    from transformers import CLIPImageProcessor, LlavaProcessor

    _, processor = small()
    images = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    tokens = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    theirs = LlavaProcessor(images, presets.tiny_tokenizer(), patch_size=14, **tokens)
    pictures = [np.zeros((60, 70, 3), np.uint8)] * 2
    prompts = ["USER: <image>\nWhat is this?", "<image> x"]
    expected = theirs(images=pictures, text=prompts, padding=True, padding_side="left", return_tensors="pt")
    ours = processor(text=prompts)
    assert torch.equal(ours["input_ids"], expected["input_ids"])
    assert torch.equal(ours["attention_mask"], expected["attention_mask"])


def test_chat_template_takes_text_and_parts():
    _, processor = small()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": "Sure?"},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "Be brief. Q: <image>\nWhat is it? A: A dog.</s>Q: Sure? A:"
    picture = {"type": "image", "image": np.zeros((40, 50, 3), np.uint8)}
    batch = processor.apply_chat_template(
        [{"role": "user", "content": [picture]}], tokenize=True, return_dict=True
    )
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 16
