"""From files to batches: samples, length grouping, features, the leak guard, noise, labels, recipes."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from captioned import write_llava, write_shard
from tagstore.client import connect
from tagstore.errors import FingerprintMismatch, InvalidInput, NotFound
from tagstore.readers.samples import Turn, read_samples
from tuna_model import presets
from tuna_model.processing.data import batches, conversation
from tuna_model.processing.tags import ImageTags, TagLookup
from tuna_model.training.collator import IGNORED, Collator
from tuna_model.training.features import CachedFeatures, LiveFeatures, make_cache
from tuna_model.training.loader import Loader
from tuna_model.training.noise import TagPool, add_noise
from tuna_model.training.recipe import CONFIGS, NoiseRecipe, Recipe, TagRecipe
from tuna_model.training.schedule import learning_rate, parameter_groups
from tuna_model.training.tag_feed import TagFeed


@pytest.fixture(scope="module")
def tiny():
    return presets.load("tiny")


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return write_llava(tmp_path_factory.mktemp("llava"))


# samples


def test_llava_json_is_read_without_its_image_markers(llava: Path):
    sample = read_samples(llava)[7]
    turns = (Turn("user", "What is it?"), Turn("assistant", "A green square."))
    assert (sample.key, sample.turns) == ("7", turns)
    assert sample.images[0].read().startswith(b"\x89PNG")


def test_a_shard_is_read_in_place(tmp_path: Path):
    samples = read_samples(write_shard(tmp_path / "train-000.tar"), split="train")
    assert len(samples) == 12
    assert samples[0].captions == ("A red circle.", "One circle in red.")
    assert samples[3].images[0].read().startswith(b"\x89PNG")
    assert [sample.key for sample in read_samples(tmp_path)] == [
        sample.key for sample in read_samples(tmp_path / "train-000.tar")
    ]


def test_a_caption_is_drawn_by_the_generator(tmp_path: Path):
    sample = read_samples(write_shard(tmp_path / "a.tar"))[0]
    captions = {conversation(sample, np.random.default_rng(i), "What?")[1].text for i in range(20)}
    assert captions == set(sample.captions)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "record 0: a sample is an object"),
        ('[{"id": 1, "image": "a.png"}]', "record 0: neither conversations nor captions"),
        ('[{"conversations": [{"from": "human", "value": "?"}]}]', "has no answer"),
        ('[{"conversations": [{"from": "robot", "value": "?"}]}]', "'from': 'human' or 'gpt'"),
        ("{", "is no JSON"),
        ("{}", "a list of records"),
        ("[]", "has no sample"),
    ],
)
def test_what_is_no_sample_is_refused_by_place(tmp_path: Path, text: str, message: str):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(InvalidInput, match=message):
        read_samples(tmp_path / "data.json")


def test_missing_files_are_named(tmp_path: Path, llava: Path):
    with pytest.raises(NotFound, match=r"no data set at .*nowhere\.json"):
        read_samples(tmp_path / "nowhere.json")
    with pytest.raises(NotFound, match=r"holds no \.tar"):
        read_samples(tmp_path)
    with pytest.raises(InvalidInput, match="no sample of split 'val'"):
        read_samples(llava, split="val")


# batches


def test_an_epoch_holds_every_sample_once_and_the_same_ones_each_time():
    lengths = np.random.default_rng(0).integers(1, 100, 64).tolist()
    epoch = batches(lengths, 8, seed=1, epoch=0)
    assert sorted(i for batch in epoch for i in batch) == list(range(64))
    assert epoch == batches(lengths, 8, seed=1, epoch=0)
    assert epoch != batches(lengths, 8, seed=1, epoch=1)
    assert epoch != batches(lengths, 8, seed=2, epoch=0)


def test_grouping_by_length_pads_less():
    lengths = np.random.default_rng(0).integers(1, 100, 512).tolist()

    def padding(group: int) -> int:
        return sum(
            max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b)
            for b in batches(lengths, 8, seed=0, epoch=0, group=group)
        )

    assert padding(50) < padding(0) / 5


# features


def test_cached_features_are_the_live_ones_in_float16(tmp_path: Path, llava: Path, tiny):
    model, processor = tiny
    samples = read_samples(llava)
    live = LiveFeatures(model, processor.image_processor, samples)
    make_cache(tmp_path / "f", live, samples, encoder="abc", layer=-1)
    cached = CachedFeatures(tmp_path / "f", samples, encoder="abc", layer=-1)
    from_images, from_cache = live([3, 11]), cached([3, 11])
    assert torch.equal(from_images.grid.half(), from_cache.grid)
    assert torch.allclose(from_images.vectors, from_cache.vectors, atol=1e-6)
    assert from_images.identities == from_cache.identities
    with pytest.raises(FingerprintMismatch, match="of encoder abc"):
        CachedFeatures(tmp_path / "f", samples, encoder="other", layer=-1)
    with pytest.raises(InvalidInput, match="of other images"):
        CachedFeatures(tmp_path / "f", samples[1:], encoder="abc", layer=-1)


# tags


def feed_of(root: Path, tiny, **recipe):
    model, _ = tiny
    source = connect(f"file://{root}/shapes")
    tags = TagRecipe(f"file://{root}/shapes", **recipe)
    digest = model.config.encoder_digest
    return source, TagFeed({"": TagLookup(source, k=3)}, tags, fingerprint=digest, seed=0)


@pytest.fixture(scope="module")
def shapes_features(shapes_root: Path, tmp_path_factory, tiny):
    """Features of the very pictures that the store holds."""
    from pictures import write_shapes

    folder = write_shapes(tmp_path_factory.mktemp("again") / "shapes")
    records = [{"id": path.stem, "image": path.name, "caption": "x"} for path in sorted(folder.glob("*.png"))]
    (folder / "data.json").write_text(json.dumps(records))
    samples = read_samples(folder / "data.json")
    return samples, LiveFeatures(tiny[0], tiny[1].image_processor, samples)(range(len(samples)))


def test_the_leak_guard_is_on_unless_told(shapes_root: Path, tiny, shapes_features):
    _, features = shapes_features
    rows = range(18)
    source, guarded = feed_of(shapes_root, tiny)
    with source:
        nearest = [answer.neighbours[0].similarity for _, answer in guarded.answers(features, rows, 0)]
        assert max(nearest) < 0.9999
        source, leaky = feed_of(shapes_root, tiny, leak_guard=False)
        assert min(answer.neighbours[0].similarity for _, answer in leaky.answers(features, rows, 0)) > 0.999


def test_noise_depends_on_seed_epoch_and_sample_alone(shapes_root: Path, tiny, shapes_features):
    samples, features = shapes_features
    noise = NoiseRecipe(drop=0.3, wrong=0.3, none=0.1, shuffle=0.5)
    source, feed = feed_of(shapes_root, tiny, noise=noise)
    with source:
        together = [tags.texts for tags in feed(features, range(18), 4)]
        live = LiveFeatures(tiny[0], tiny[1].image_processor, samples)
        assert feed(live([5]), [5], 4)[0].texts == together[5]
        assert [tags.texts for tags in feed(features, range(18), 5)] != together


def some_tags(rng: np.random.Generator, n: int = 400) -> ImageTags:
    embeddings = rng.normal(size=(n, 8)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    signals = [rng.random(n).astype(np.float32) for _ in range(3)]
    return ImageTags(tuple(f"tag {i}" for i in range(n)), embeddings, *signals, tuple(range(n)))


def test_noise_rates_are_what_they_say(rng):
    tags, vector = some_tags(rng), np.eye(8, dtype=np.float32)[0]
    others = some_tags(np.random.default_rng(9), 50)
    pool = TagPool(tuple(f"other {i}" for i in range(50)), others.embeddings, tuple(range(1000, 1050)))
    assert len(add_noise(tags, NoiseRecipe(drop=0.25), rng, None, vector)) == pytest.approx(300, abs=40)
    wrong = add_noise(tags, NoiseRecipe(wrong=0.25), rng, pool, vector)
    swapped = [i for i, text in enumerate(wrong.texts) if text.startswith("other")]
    assert len(swapped) == pytest.approx(100, abs=40)
    assert np.array_equal(wrong.similarity, tags.similarity)
    assert np.allclose(wrong.relevance[swapped], wrong.embeddings[swapped] @ vector, atol=1e-6)
    shuffled = add_noise(tags, NoiseRecipe(shuffle=1.0), rng, None, vector)
    assert shuffled.texts == tags.texts
    assert sorted(shuffled.relevance) == sorted(tags.relevance)
    assert not np.array_equal(shuffled.relevance, tags.relevance)
    assert len(add_noise(tags, NoiseRecipe(none=1.0), rng, None, vector)) == 0
    assert add_noise(tags, NoiseRecipe(), rng, None, vector).texts == tags.texts


def test_changing_one_rate_leaves_the_other_draws_alone(rng):
    tags, vector = some_tags(rng), np.eye(8, dtype=np.float32)[0]
    dropped = add_noise(tags, NoiseRecipe(drop=0.5), np.random.default_rng(1), None, vector)
    shuffled = add_noise(tags, NoiseRecipe(drop=0.5, shuffle=1.0), np.random.default_rng(1), None, vector)
    assert dropped.texts == shuffled.texts


def test_wrong_tags_are_drawn_from_the_whole_vocabulary(shapes_root: Path):
    with connect(f"file://{shapes_root}/shapes") as source:
        everything = [tag.text for tag in source.vocabulary()]
        pool = TagPool.draw(source, 5, seed=1)
        assert len(pool.ids) == 5
        assert set(pool.texts) < set(everything)
        assert pool.texts == TagPool.draw(source, 5, seed=1).texts
        assert pool.texts != TagPool.draw(source, 5, seed=2).texts
        assert np.allclose(np.linalg.norm(pool.embeddings, axis=1), 1, atol=1e-2)


def test_captions_in_the_place_of_tags(shapes_root: Path, tiny, shapes_features):
    _, features = shapes_features
    model, processor = tiny
    with connect(f"file://{shapes_root}/shapes") as source:
        names = product(("red", "green", "blue"), ("circle", "square", "triangle"))
        captions = {f"{colour}-{shape}": [f"a {colour} {shape}"] for colour, shape in names}
        recipe = TagRecipe(content="captions")
        lookup = TagLookup(source, k=3)
        digest = model.config.encoder_digest
        feed = TagFeed({"": lookup}, recipe, fingerprint=digest, seed=0, captions=captions)
        texts = feed.captions(features, range(18), 0)
        assert any("a red square" in text for text in texts)
        assert texts == feed.captions(features, range(18), 0)
    turns = [Turn("user", "What?"), Turn("assistant", "That.")]
    text = Collator(processor).parts(turns, 1, "a red circle")[0][0]
    assert "<image>" in text
    assert text.index("a red circle") < text.index("What?")
    with pytest.raises(InvalidInput, match=r"tags\.captions"):
        TagFeed({"": lookup}, recipe, fingerprint="", seed=0)


# labels


def test_what_the_assistant_says_is_learnt_and_nothing_else(tiny):
    _, processor = tiny
    turns = [Turn("user", "One?"), Turn("assistant", "1"), Turn("user", "Two?"), Turn("assistant", "2")]
    encoded, labels = Collator(processor).encode(turns, [ImageTags.none(512)])
    assert len(labels) == len(encoded.input_ids)
    learnt = processor.tokenizer.decode([label for label in labels if label != IGNORED])
    assert learnt == " 1</s> 2</s>" or learnt.replace(" ", "") == "1</s>2</s>"
    assert all(label in (IGNORED, token) for label, token in zip(labels, encoded.input_ids, strict=True))


def test_labels_stand_at_the_end_of_a_batch_and_only_their_logits_are_kept(tiny):
    _, processor = tiny
    collate = Collator(processor, template="plain")
    turns = [[Turn("assistant", "x")], [Turn("assistant", "a longer one")]]
    batch = collate(["a", "b"], turns, [[ImageTags.none(512)]] * 2)
    length = batch["labels"].shape[1]
    first = int((batch["labels"] != IGNORED).any(0).nonzero()[0])
    assert batch["logits_to_keep"] == length - first + 1
    assert (batch["labels"][:, -1] != IGNORED).all()


def test_a_loss_of_the_last_logits_is_that_of_all(tiny):
    model, processor = tiny
    collate = Collator(processor, template="plain")
    batch = collate(["a"], [[Turn("assistant", "a dog")]], [[ImageTags.none(512)]])
    grid, vectors = torch.randn(1, 49, 1280), torch.nn.functional.normalize(torch.randn(1, 512), dim=-1)
    last = model(**batch, grid=grid, image_vectors=vectors).loss
    every = model(**{**batch, "logits_to_keep": 0}, grid=grid, image_vectors=vectors).loss
    assert torch.allclose(last, every, rtol=1e-6)


def test_a_sample_too_long_to_learn_from_is_named(tiny):
    _, processor = tiny
    with pytest.raises(InvalidInput, match="sample a: nothing is left to learn of it within 20 tokens"):
        Collator(processor, max_length=20)(["a"], [[Turn("user", "x" * 30), Turn("assistant", "y")]], [[]])


# shares


def test_processes_share_a_batch_and_see_what_one_process_sees(llava: Path, tiny):
    _, processor = tiny
    samples = read_samples(llava)
    recipe = Recipe(batch_size=6, micro_batch=2)
    live, collator = LiveFeatures(tiny[0], processor.image_processor, samples), Collator(processor)
    whole = Loader(recipe, samples, live, None, collator, rank=0, world=1).make(4)
    parts = [Loader(recipe, samples, live, None, collator, rank=rank, world=2).make(4) for rank in (0, 1)]
    assert whole.labels == sum(part.labels for part in parts)
    assert [len(part.parts) for part in (whole, *parts)] == [3, 2, 2]
    with pytest.raises(InvalidInput, match="cannot be shared by 4 processes"):
        Loader(recipe, samples, live, None, collator, rank=0, world=4)
    with pytest.raises(InvalidInput, match="the data set has 18"):
        Loader(Recipe(batch_size=20), samples, live, None, collator, rank=0, world=1)


def test_an_error_while_a_batch_is_made_reaches_the_loop(tmp_path: Path, tiny):
    samples = read_samples(write_llava(tmp_path / "gone"))
    (tmp_path / "gone" / "images" / "3.png").unlink()
    live = LiveFeatures(tiny[0], tiny[1].image_processor, samples)
    loader = Loader(Recipe(batch_size=18), samples, live, None, Collator(tiny[1]), rank=0, world=1)
    with pytest.raises(NotFound, match=r"3\.png"):
        list(loader.from_step(0))


# schedule


def test_the_rate_rises_and_falls():
    rates = [learning_rate(i, steps=100, warmup=10, floor=0.1) for i in range(100)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_parts_without_a_rate_are_frozen():
    parts = {"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)}
    groups = parameter_groups(parts, {"a": 0.1}, weight_decay=0.5)
    settings = [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups]
    assert settings == [(0.1, 0.5, 1), (0.1, 0.0, 1)]
    assert not any(p.requires_grad for p in parts["b"].parameters())
    with pytest.raises(InvalidInput, match="no part of the model is called c: it has a, b"):
        parameter_groups(parts, {"c": 0.1}, 0.0)
    with pytest.raises(InvalidInput, match="nothing to train"):
        parameter_groups(parts, {}, 0.0)


# recipes


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_named_recipes_are_read_and_survive_a_round_trip(path: Path):
    recipe = Recipe.read(path.stem)
    assert Recipe.of(recipe.to_dict()) == recipe
    assert recipe.stage in ("align", "finetune")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step = 3", "there is no 'step', did you mean 'steps'"),
        ("steps = 'many'", "'steps' is 'many': it is of type int"),
        ("steps = 0", "steps is 0: it must be at least 1"),
        ("[tags.noise]\ndorp = 0.1", "there is no 'tags.noise.dorp', did you mean 'tags.noise.drop'"),
        ("[tags.noise]\ndrop = 1.5", "it is a probability"),
        ("stage = 'middle'", "it is one of 'align', 'finetune'"),
        ("data = 3", "it is a table"),
        ("betas = [0.9]", r"'betas' is \[0.9\]: it is a list of 2"),
        ("[rates]\nconnector = 'fast'", "'rates.connector' is 'fast': it is of type float"),
        ("[lora]\ntargets = [1]", r"'lora.targets\[0\]' is 1: it is of type str"),
        ("steps = ", "Invalid"),
    ],
)
def test_a_recipe_with_a_mistake_is_refused_by_name(tmp_path: Path, text: str, message: str):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(InvalidInput, match=message):
        Recipe.read(tmp_path / "r.toml")


def test_values_from_the_command_line():
    values = "steps=7 tags.noise.drop=0.5 rates.connector=2e-3 tags.store=null:// data.template=plain"
    recipe = Recipe().with_values(values.split())
    assert (recipe.steps, recipe.tags.noise.drop) == (7, 0.5)
    assert (recipe.rates["connector"], recipe.data.template) == (2e-3, "plain")
    with pytest.raises(InvalidInput, match="write key=value"):
        recipe.with_values(["steps"])
    with pytest.raises(NotFound, match="there is no recipe 'nothing'"):
        Recipe.read("nothing")
