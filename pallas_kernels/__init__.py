"""Sparse attention operations of VideoNSA, each in several implementations.

An operation's function has the name of its folder: import a folder's modules with `from pallas_kernels.NAME import
xla`, since the attribute `pallas_kernels.NAME` is the function.
"""

from pallas_kernels.block_selection.api import block_selection
from pallas_kernels.common import merge_by_lse
from pallas_kernels.compressed_attention.api import compressed_attention
from pallas_kernels.nsa import block_means, nsa_attention, nsa_attention_sharded
from pallas_kernels.prefix_attention.api import prefix_attention
from pallas_kernels.selected_attention.api import selected_attention
from pallas_kernels.window_attention.api import window_attention

__all__ = [
    "block_means",
    "block_selection",
    "compressed_attention",
    "merge_by_lse",
    "nsa_attention",
    "nsa_attention_sharded",
    "prefix_attention",
    "selected_attention",
    "window_attention",
]
