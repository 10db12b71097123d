"""What `instruct.py` asks: what captions, facts and tags of a picture answer; and plain text."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from instruct_pictures import COLOURS, Picture

PEOPLE = frozenset({
    "person", "people", "man", "men", "woman", "women", "boy", "boys", "girl", "girls", "child",
    "children", "kid", "kids", "baby", "toddler", "lady", "guy", "adult", "couple", "group", "crowd",
    "player", "players", "team", "friend", "friends", "someone", "family",
})  # fmt: skip
"""Words for people: photographs with one of them are not asked about another."""
NUMBERS = frozenset({
    "two", "three", "four", "five", "six",
})  # fmt: skip

CAPTION = (
    "Describe the image in one sentence.", "What is shown in this picture?", "Write a caption for the photo.",
    "What is happening in this image?", "Give a short description of the image.",
)  # fmt: skip
DETAIL = ("Describe the image in detail.", "Tell me more about this picture.")
LISTING = ("List what you see.", "What objects are in the image?", "Name the things in this photo.")
NAMING = (
    "What product is this?", "Which product is this?", "What is this?", "What is this product called?",
    "Name this product.", "What is the name of this item?", "Can you tell me what this is?",
    "Which item is in the picture?", "What product is shown here?", "What am I looking at?",
)  # fmt: skip
NAMED = ("This is {}.", "It is {}.", "{}.", "This is {}.")
UNKNOWN = "I do not know its name: nothing that I can look up fits this picture."
BRAND = ("Which brand is this?", "What brand is this?", "Who makes this product?", "What is the brand?")
COLOUR = ("What colour is it?", "What color is this?", "Which colour does it have?")
KIND = ("What kind of product is this?", "What type of item is this?", "Which category is it in?")
YES_NO = "Answer with yes or no."
HARD = 0.3
"""Share of the questions about an absent thing in which the neighbours' tags name the thing. A larger share
teaches the model that tags say nothing."""

LATER = 0.25
"""Chance that a fact is asked about whose tag is not the most relevant one of its column."""

Turns = list[tuple[str, str]]


def pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


class Photographs:
    """Asks about photographs what their captions answer."""

    def __init__(self, own: Sequence[frozenset[str]]) -> None:
        """
        Args:
            own: what the captions of each photograph name.
        """
        counts = Counter(tag for tags in own for tag in tags if re.fullmatch(r"[a-z]+( [a-z]+)?", tag))
        self.common = [tag for tag, count in counts.most_common(400) if tag.split()[-1] not in COLOURS]
        self.weights = np.array([counts[tag] for tag in self.common], float)
        self.balance: Counter[str] = Counter()
        """Questions about each thing that were answered yes, less those with no: kept near 0, so that the
        thing that is asked about tells nothing, and the model has to look."""

    def turns(
        self, picture: Picture, own: frozenset[str], objects: Sequence[str], found: Sequence[str],
        rng: np.random.Generator,
    ) -> Turns:  # fmt: skip
        """One to four questions with answers.

        Args:
            own: all tags of its captions.
            objects: those of kind object.
            found: the tags that it gets from its neighbours.
        """
        kinds: list[Callable[[], Turns]] = [
            lambda: [(pick(rng, CAPTION), pick(rng, picture.captions))],
            lambda: self._yes_no(own, objects, found, rng),
            lambda: self._yes_no(own, objects, found, rng),
            lambda: self._listing(objects, rng),
            lambda: self._counting(own, rng) or self._colour(own, rng),
            lambda: [(pick(rng, DETAIL), " ".join(sorted(picture.captions, key=len)[-2:]))],
        ]
        order = rng.choice(len(kinds), 4, replace=False, p=[0.3, 0.2, 0.2, 0.1, 0.12, 0.08])
        return [turn for i in order for turn in kinds[i]()]

    def _yes_no(
        self, own: frozenset[str], objects: Sequence[str], found: Sequence[str], rng: np.random.Generator
    ) -> Turns:
        words = {word for tag in own for word in tag.split()}
        present = [tag for tag in objects if tag not in PEOPLE and tag in self.common] or list(objects[:1])
        near = [tag for tag in found if tag in self.common]
        drawn = rng.choice(
            self.common, min(24, len(self.common)), replace=False, p=self.weights / self.weights.sum()
        )
        people = bool(words & PEOPLE)

        def absent(tag: str) -> bool:
            last = tag.split()[-1]
            return not ({last, last.rstrip("s"), last + "s"} & words) and not (people and last in PEOPLE)

        hard, easy = [t for t in near if absent(t)], [str(t) for t in drawn if absent(str(t))]
        if people and rng.random() < 0.15:
            present = ["person"]
        asked = []
        if present:
            asked.append((pick(rng, present), True))
        negatives = hard if hard and rng.random() < HARD else easy
        if negatives:
            asked.append((max(negatives, key=lambda tag: self.balance[tag]), False))
        self.balance.update({tag: 1 if yes else -1 for tag, yes in asked})
        rng.shuffle(asked)
        turns = []
        for tag, yes in asked:
            thing = tag if tag.endswith("s") and not tag.endswith("ss") else with_article(tag)
            verb = "Are" if thing == tag else "Is"
            question = f"{verb} there {thing} in the image?"
            if rng.random() < 0.7:
                turns.append((f"{question}\n{YES_NO}", "Yes" if yes else "No"))
            else:
                there = f"there {verb.lower()} {'' if yes else 'no '}{thing if yes else tag} in the image."
                turns.append((question, f"{'Yes' if yes else 'No'}, {there}"))
        return turns

    def _listing(self, objects: Sequence[str], rng: np.random.Generator) -> Turns:
        return [(pick(rng, LISTING), ", ".join(objects[:6]).capitalize() + ".")] if len(objects) > 1 else []

    def _counting(self, own: frozenset[str], rng: np.random.Generator) -> Turns:
        counted = [tag.split(" ", 1) for tag in sorted(own) if tag.split(" ")[0] in NUMBERS and " " in tag]
        if not counted:
            return []
        number, things = counted[int(rng.integers(len(counted)))]
        return [
            (
                f"How many {things} are there?",
                pick(rng, (f"{number.capitalize()}.", f"There are {number} {things}.")),
            )
        ]

    def _colour(self, own: frozenset[str], rng: np.random.Generator) -> Turns:
        of_thing: dict[str, set[str]] = {}
        for tag in own:
            colour, _, thing = tag.partition(" ")
            if colour in COLOURS and thing and " " not in thing:
                of_thing.setdefault(thing, set()).add(colour)
        sure = sorted((thing, *colours) for thing, colours in of_thing.items() if len(colours) == 1)
        if not sure:
            return []
        thing, colour = sure[int(rng.integers(len(sure)))]
        return [
            (
                f"What colour is the {thing}?",
                pick(rng, (f"{colour.capitalize()}.", f"The {thing} is {colour}.")),
            )
        ]


def product_turns(picture: Picture, found: Sequence[str], rng: np.random.Generator) -> Turns:
    """Questions about a product that its tags can answer; none if they hold nothing true of it.

    Args:
        found: its tags, the most relevant first. A fact that another tag of its column stands before is
            seldom asked about: nothing in the picture says more than the order does.
    """
    known = {text.casefold(): text for text in found}
    facts = {}
    for name, tag in picture.tags.items():
        label = picture.labels.get(name, "")
        column = [text for text in found if not label or text.startswith(f"{label}: ")]
        if tag.casefold() in known and (column[0].casefold() == tag.casefold() or rng.random() < LATER):
            facts[name] = picture.facts[name]
    turns: Turns = []
    if "name" in facts:
        turns.append((pick(rng, NAMING), pick(rng, NAMED).format(facts["name"])))
    if "kind" in facts and "name" not in picture.facts:
        colour = f"{facts['colour'].lower()} " if "colour" in facts else ""
        brand = f" by {facts['brand']}" if "brand" in facts else ""
        turns.append((pick(rng, NAMING), f"It is {with_article(colour + facts['kind'].lower())}{brand}."))
    for column, questions in (("brand", BRAND), ("colour", COLOUR), ("kind", KIND)):
        if column in facts:
            turns.append((pick(rng, questions), pick(rng, ("{}.", "It is {}.")).format(facts[column])))
    own = {tag.casefold() for tag in picture.tags.values()}
    others = [text.split(": ")[-1] for text in found if text.casefold() not in own]
    if facts:
        yes = rng.random() < 0.5 or not others
        asked = pick(rng, list(facts.values())) if yes else pick(rng, others)
        turns.append((f"Is this {asked}?\n{YES_NO}", "Yes" if yes else "No"))
    # the order is drawn, so that each kind of question stands first at times
    order = rng.permutation(len(turns))
    if "name" in facts and rng.random() < 0.5:
        order = np.concatenate([[0], order[order != 0]])
    return [turns[i] for i in order[:3]]


TASKS = (
    "Write a short story about {}.", "Explain {} to a child.", "What are three facts about {}?",
    "Write a polite email that asks about {}.", "Give me tips about {}.", "What is {}?",
    "Write a haiku about {}.", "How would you describe {} in one sentence?", "Why do people like {}?",
    "List five words that go with {}.", "Make a plan for a day about {}.",
    "What should a beginner know about {}?",
)  # fmt: skip
TOPICS = (
    "rain", "photosynthesis", "a good breakfast", "trains", "the moon", "friendship", "learning to cook",
    "maps",
    "computers", "a walk in the forest", "history", "music", "saving water", "sleep", "football", "the ocean",
    "writing letters", "bees", "mountains", "public libraries", "gardening", "winter", "bread", "volcanoes",
    "being patient", "bicycles", "planets", "paper", "a new job", "old books", "the heart", "painting",
)  # fmt: skip


def plain_text(count: int, rng: np.random.Generator, out: Path) -> list[tuple[str, str]]:
    """Instructions without a picture, answered by the decoder as it comes: it shall keep its language."""
    if not count:
        return []
    import torch

    from tuna_model.presets import smollm

    file = out / "plain.json"
    if file.exists():
        return [(question, answer) for question, answer in json.loads(file.read_text())]
    questions = [task.format(topic) for task in TASKS for topic in TOPICS]
    questions = [questions[i] for i in rng.permutation(len(questions))[:count]]
    model, tokenizer = smollm.load().eval(), smollm.tokenizer()
    tokenizer.padding_side = "left"
    answers = []
    for start in range(0, len(questions), 32):
        chats = [[{"role": "user", "content": question}] for question in questions[start : start + 32]]
        batch = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            ids = model.generate(**batch, max_new_tokens=80, do_sample=False)
        answers += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"plain text: {len(answers)} of {count}", flush=True)
    pairs = [(q, a.strip()) for q, a in zip(questions, answers, strict=True) if a.strip()]
    file.write_text(json.dumps(pairs))
    return pairs
