"""Between the messages of gRPC and the types and errors of the code."""
