"""Answer queries from opened versions: neighbours, tag votes, filters, the leak guard."""
