"""TUNA: a multimodal model that grounds its answers in the tags of similar images."""
