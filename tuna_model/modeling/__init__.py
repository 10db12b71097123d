"""The parts of TUNA, and the model of transformers that they make."""
