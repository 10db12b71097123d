"""From a recipe to a trained model: batches, the loop, checkpoints."""
