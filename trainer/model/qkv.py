"""What the MLA up-projections gave, made into queries, keys and values as the attention core takes them.

In torch, casts, products and concatenations move the heads a dozen times; on a GPU one kernel each way moves them once
(kernels/qkv.py), to the same queries and keys.

Legend: N = S * T tokens, S sequences, T positions, A heads, D = nope + rope a query's or key's width, V a value's, R
rope's. Before `assemble` heads lie side by side: q_ND is [N, A * D], and kv_NV [N, A * (nope + V)].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dryvine.comm.by_device import kernel_in
from dryvine.trainer.model.rope import rotate

Heads = tuple[Tensor, Tensor, Tensor]


@kernel_in("dryvine.trainer.model.kernels.qkv")
def assemble(
    q_ND: Tensor, kv_NV: Tensor, k_rope_NR: Tensor, table: tuple[Tensor, Tensor], sequences: int, heads: int
) -> Heads:
    """q [N, A * D] with nope before rope, kv [N, A * (nope + V)], the rope key that all heads share [N, R], and
    `Rope.table` of T -> q, k [S, A, T, D] and v [S, A, T, V or wider], rotated by each token's place in its sequence.

    q must be the caller's own: on CUDA it is rotated in place, and v is a view of kv.
    """
    q, kv = (t.view(sequences, -1, heads, t.shape[-1] // heads) for t in (q_ND, kv_NV))
    rope = k_rope_NR.shape[-1]
    nope = q.shape[-1] - rope
    q_nope, q_rope = q.split((nope, rope), -1)
    k_nope, v = kv.split((nope, kv.shape[-1] - nope), -1)
    k_rope = rotate(k_rope_NR.view(sequences, -1, 1, rope), *table).expand(-1, -1, heads, -1)
    q, k = torch.cat((q_nope, rotate(q_rope, *table)), -1), torch.cat((k_nope, k_rope), -1)
    # The CPU's fused core wants values as wide as queries; it is 1.5 times as fast as the unfused one and keeps no
    # T x T scores. (cuDNN takes both widths as they are; padding would cost it 1.6 times.)
    v = functional.pad(v, (0, max(q.shape[-1] - v.shape[-1], 0)))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
