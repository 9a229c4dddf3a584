"""Assembles queries, keys and values for the attention core from the outputs of the MLA up-projections.

In torch, casts, products and concatenations copy the heads a dozen times; on a GPU one kernel each way copies them once
(kernels/qkv.py), with the same queries and keys.

Legend: N = S * T tokens, S sequences, T positions, A heads; D = nope + rope the width of a query or key, V of a value,
R of rope; W = nope + V.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dryvine.comm.by_device import kernel_in
from dryvine.trainer.model.rope import rotate

Heads = tuple[Tensor, Tensor, Tensor]


@kernel_in("dryvine.trainer.model.kernels.qkv")
def assemble(q_NAD: Tensor, kv_NAW: Tensor, k_rope_NR: Tensor, table: tuple[Tensor, Tensor]) -> Heads:
    """q (nope part, then rope), kv (a key's nope part, then its value), the rope key that all heads share, and
    `Rope.table` of T positions -> q, k [S, A, T, D] and v [S, A, T, V or wider], rotated by each token's position in
    its sequence.

    On a GPU q is rotated in place, so nothing else may read it, and v is a view of kv.
    """
    length, heads, rope = len(table[0]), q_NAD.shape[1], k_rope_NR.shape[1]
    nope = q_NAD.shape[2] - rope
    q, kv, k_rope = (t.unflatten(0, (-1, length)) for t in (q_NAD, kv_NAW, k_rope_NR))
    q_nope, q_rope = q.split((nope, rope), -1)
    k_nope, v = kv.split((nope, kv.shape[-1] - nope), -1)
    k_rope = rotate(k_rope.unsqueeze(2), *table).expand(-1, -1, heads, -1)
    q, k = torch.cat((q_nope, rotate(q_rope, *table)), -1), torch.cat((k_nope, k_rope), -1)
    # The CPU's fused core needs values as wide as queries; it is 1.5 times as fast as the unfused one and keeps no
    # T x T scores. (cuDNN accepts different widths; padding would make it 1.6 times as slow.)
    v = functional.pad(v, (0, max(q.shape[-1] - v.shape[-1], 0)))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
