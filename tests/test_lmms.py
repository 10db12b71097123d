"""The plugin of lmms-eval runs on a stand-in for lmms-eval, which would bring a hundred packages."""

from __future__ import annotations

import importlib
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from pictures import picture
from tagstore.errors import InvalidInput


@pytest.fixture
def registry(tmp_path: Path, monkeypatch):
    """Imitate `lmms_eval.api.model.lmms` and `registry.register_model` as its documentation says."""
    package = tmp_path / "lmms_eval" / "api"
    package.mkdir(parents=True)
    (tmp_path / "lmms_eval" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "model.py").write_text("class lmms:\n    def __init__(self):\n        self.task_dict = {}\n")
    (package / "registry.py").write_text(
        "REGISTRY = {}\ndef register_model(*names):\n    def add(cls):\n"
        "        REGISTRY.update(dict.fromkeys(names, cls))\n        return cls\n    return add\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [
        name for name in sys.modules if name.startswith(("lmms_eval", "tuna_model.evaluation.lmms"))
    ]:
        del sys.modules[name]


def test_lmms_eval_finds_and_drives_the_model(registry, shapes_root: Path):
    # what lmms_eval.models does with LMMS_EVAL_PLUGINS=tuna_model.evaluation.lmms
    available = importlib.import_module("tuna_model.evaluation.lmms.models").AVAILABLE_MODELS
    model_class = getattr(
        importlib.import_module("tuna_model.evaluation.lmms.models.tuna"), available["tuna"]
    )
    assert {"tuna": model_class} == importlib.import_module("lmms_eval.api.registry").REGISTRY

    model = model_class(pretrained="tiny", store=f"file://{shapes_root}/shapes", batch_size="2")
    documents = [
        {"image": Image.open(io.BytesIO(picture(colour, "circle")))} for colour in ("red", "blue", "green")
    ]
    model.task_dict = {"pope": {"test": documents}}

    def request(number: int, **settings):
        settings = {"max_new_tokens": 4, "until": [], **settings}
        place = (lambda document: [document["image"]], number, "pope", "test")
        return SimpleNamespace(args=("Is it red?", settings, *place))

    answers = model.generate_until([request(0), request(1, max_new_tokens=2), request(2)])
    alone = model.generate_until([request(2)])
    assert len(answers) == 3
    assert answers[2] == alone[0]
    likelihood = model.loglikelihood(
        [
            SimpleNamespace(
                args=("Is it red?", " yes", lambda document: [document["image"]], 0, "pope", "test")
            )
        ]
    )
    assert likelihood[0][0] < 0
    with pytest.raises(InvalidInput, match="without rounds"):
        model.generate_until_multi_round([])
    with pytest.raises(InvalidInput, match="has no colour"):
        model_class(pretrained="tiny", colour="red")
    model.pipeline.source.close()
