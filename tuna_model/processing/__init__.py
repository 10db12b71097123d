"""Pictures, prompts, tags and samples to what the model takes."""
