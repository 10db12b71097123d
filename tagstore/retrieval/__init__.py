"""One version opened to answer, and all stores of a root: neighbours, tag votes, filters, the leak guard."""
