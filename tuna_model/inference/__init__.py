"""Questions to answers: the pipeline, `tuna serve`, contrastive decoding, prompts for other models."""
