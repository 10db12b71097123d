"""`tuna serve`: OpenAI's chat completions over a pipeline."""
