"""The fused ops. Each module holds one op: what it computes, its plain-torch reference, fake and
autograd formula.
"""

from hf_fuse.ops.add_norm import add_norm
from hf_fuse.ops.bias_act import bias_act
from hf_fuse.ops.decode_add_norm import decode_add_norm
from hf_fuse.ops.decode_attention import decode_attention
from hf_fuse.ops.decode_embed import decode_embed
from hf_fuse.ops.decode_head_norm import decode_head_norm
from hf_fuse.ops.decode_layers import decode_layers
from hf_fuse.ops.decode_linear import decode_linear, decode_linear_sum, decode_linear_two
from hf_fuse.ops.decode_sample import decode_sample
from hf_fuse.ops.decode_select import decode_select
from hf_fuse.ops.decode_sinks import decode_sinks
from hf_fuse.ops.gated_act import gated_act
from hf_fuse.ops.rotary import rotary, rotary_, rotary_cache_

# What `patch(ops=...)` takes.
NAMES = ("add_norm", "rotary", "gated_act", "bias_act", "decode")

__all__ = [
    "NAMES",
    "add_norm",
    "bias_act",
    "decode_add_norm",
    "decode_attention",
    "decode_embed",
    "decode_head_norm",
    "decode_layers",
    "decode_linear",
    "decode_linear_sum",
    "decode_linear_two",
    "decode_sample",
    "decode_select",
    "decode_sinks",
    "gated_act",
    "rotary",
    "rotary_",
    "rotary_cache_",
]
