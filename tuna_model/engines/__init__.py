"""TUNA in engines that others wrote; nothing here is imported before such an engine asks for it."""
