"""The choice of blocks by compressed attention's probabilities."""
