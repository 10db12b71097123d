"""Questions to answers: the pipeline, contrastive decoding, prompts for other models, the server."""
