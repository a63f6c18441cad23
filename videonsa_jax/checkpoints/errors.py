"""What goes wrong with a checkpoint folder."""


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be read or written: its message names what was seen and expected."""
