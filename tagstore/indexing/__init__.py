"""From vectors to candidates: the index protocol, exact search, FAISS files and the GPU."""
