"""The entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes."""

from __future__ import annotations

ARCHITECTURE = "TunaForConditionalGeneration"


def register() -> None:
    """Tell vLLM which class serves TUNA, by name, so that nothing of CUDA is touched here."""
    from vllm import ModelRegistry

    import tuna_model.processing.processor  # noqa: F401  transformers' Auto classes then know TUNA

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"tuna_model.engines.vllm_model:{ARCHITECTURE}")
