"""Vectors to candidates: what an index must do, exact search, FAISS files, a GPU."""
