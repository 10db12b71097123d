"""The gRPC server: batches of concurrent work, callers and their rights, an audit log, metrics and spans."""
