"""Pictures, prompts, tags and samples to the model's input tensors."""
