"""The fused ops. Each module holds one op: what it computes, its plain-torch reference, fake and
autograd formula.
"""

from hf_fuse.ops.add_norm import add_norm
from hf_fuse.ops.bias_act import bias_act
from hf_fuse.ops.gated_act import gated_act
from hf_fuse.ops.rotary import rotary, rotary_, rotary_cache_

# What `patch(ops=...)` takes.
NAMES = ("add_norm", "rotary", "gated_act", "bias_act")

__all__ = ["NAMES", "add_norm", "bias_act", "gated_act", "rotary", "rotary_", "rotary_cache_"]
