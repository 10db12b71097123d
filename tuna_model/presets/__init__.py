"""Models by name: `presets.load("smol")`, or by directory: `presets.load("DIR")`."""

from tuna_model.presets.loading import (
    GUESSES,
    PLAIN,
    load,
    load_llava,
    paper_config,
    processor_for,
    tiny_config,
    tiny_tokenizer,
)

__all__ = [
    "GUESSES", "PLAIN", "load", "load_llava", "paper_config", "processor_for", "tiny_config",
    "tiny_tokenizer",
]  # fmt: skip
