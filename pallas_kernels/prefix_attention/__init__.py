"""Dense attention where each query sees a prefix of the keys."""
