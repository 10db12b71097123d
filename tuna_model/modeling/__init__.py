"""The model of transformers and its parts: configuration, connector, tag encoder, weight tuner, LoRA."""
