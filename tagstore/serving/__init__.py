"""What a server needs around the catalog: batches of concurrent work, callers and their rights, an audit log, metrics, spans."""
