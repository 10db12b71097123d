"""The page that shows why: complete, self-contained, and about what really happened."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from pictures import picture
from tagstore.errors import InvalidInput
from tagstore.readers.samples import Place, Sample
from tuna_model.evaluation.explain import examine, explain
from tuna_model.inference.pipeline import Pipeline


@pytest.fixture(scope="module")
def tuna(shapes_root: Path):
    pipeline = Pipeline.load("tiny", store=f"file://{shapes_root}/shapes", max_tags=4)
    yield pipeline
    pipeline.source.close()


def test_what_is_shown_is_what_the_model_did(tuna: Pipeline):
    image = picture("red", "circle", size=90)
    examined = examine(tuna, image, "What is it?", max_new_tokens=4)
    answer = tuna.answer(image, "What is it?", max_new_tokens=4)
    assert examined.answers["with tags"] == answer.text
    weights = [[(tag.text, tag.weight) for tag in result.tags] for result in (examined, answer)]
    assert weights[0] == weights[1]
    assert examined.retrieval is not None
    assert [n.key for n in examined.retrieval.neighbours] == [n.key for n in answer.neighbours]
    for tag in examined.tags:
        assert tag.heat.shape == (7, 7)
        assert float(tag.heat.sum()) == pytest.approx(1, abs=1e-3)
        assert 0 < len(tag.neighbours) == round(tag.vote_share * 5)
    heaviest = max(examined.tags, key=lambda tag: tag.weight).text
    assert list(examined.answers) == ["with tags", "without tags", f"without the tag “{heaviest}”"]
    assert examined.seen.size == (224, 224)
    assert np.asarray(examined.seen)[112, 112].tolist() == pytest.approx([255, 0, 0], abs=3)


def test_a_tag_is_banned_by_name(tuna: Pipeline):
    image = picture("blue", "square")
    tag = examine(tuna, image, "What?", max_new_tokens=1).tags[-1].text
    assert f"without the tag “{tag}”" in examine(tuna, image, "What?", ban=[tag], max_new_tokens=1).answers
    with pytest.raises(InvalidInput, match="was not given the tag unicorn"):
        examine(tuna, image, "What?", ban=["unicorn"], max_new_tokens=1)


def test_the_page_needs_nothing_else_and_escapes_what_it_is_given(tuna: Pipeline, tmp_path: Path):
    (tmp_path / "n.png").write_bytes(picture("red", "circle"))
    samples = [Sample("red-circle", (Place(tmp_path / "n.png"),), captions=("A <b>red</b> circle.",))]
    image, options = picture("red", "circle", size=90), {"name": "tiny", "max_new_tokens": 4}
    page = explain(tuna, image, "Is 1 < 2 & why?", samples=samples, **options)
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "Is 1 &lt; 2 &amp; why?" in page
    assert "A &lt;b&gt;red&lt;/b&gt; circle." in page
    assert "shapes@1" in page
    assert re.search(r"“(red )?circle” in “A red circle on a white table in Paris.” · rules 0.9\d", page)
    assert page.count("<figure>") == 4 + 5
    assert page.count("data:image/png") == 4


def test_without_a_store_the_page_says_so(tuna: Pipeline):
    from tagstore.client import connect

    away = Pipeline(tuna.model, tuna.processor, connect("grpc://127.0.0.1:1/none?retries=0"))
    page = explain(away, picture("red", "circle"), "What?", max_new_tokens=2)
    assert "The store did not answer" in page
    assert "No tags were given." in page
