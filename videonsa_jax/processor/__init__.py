"""The processor: conversations with text, images and videos to the arrays that the model reads."""

from videonsa_jax.processor.conversations import (
    Messages,
    Processor,
    ProcessorError,
    Prompt,
    check_visual_ids,
    is_conversation,
)
from videonsa_jax.processor.folder import load_processor, make_processor, save_processor

__all__ = [
    "Messages",
    "Processor",
    "ProcessorError",
    "Prompt",
    "check_visual_ids",
    "is_conversation",
    "load_processor",
    "make_processor",
    "save_processor",
]
