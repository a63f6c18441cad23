"""What goes wrong with a checkpoint folder."""


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be read or written: the message names the file or key, what was seen and expected."""
