"""The model once more in plain torch and autograd, written from the papers: no phases, closures or custom backward.

Slow and short: an explicit mask and softmax, complex numbers for rope, a loop over experts. Parameters come as a dict
by global name, with experts whole; the answer is the dict of weighted losses.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dryvine.trainer.model.shape import Shape, Yarn

Params = dict[str, Tensor]


def losses(p: Params, shape: Shape, tokens: Tensor) -> dict[str, Tensor]:
    """Every loss of `tokens` [S, T + 1 + mtp_depth], weighted as in training."""
    length = tokens.shape[1] - 1 - shape.mtp_depth
    found: dict[str, Tensor] = {}
    x = p["embed.weight"][tokens[:, :length]]
    for i in range(shape.layers):
        x = _layer(p, f"layers.{i}", f"layers.{i}", shape, x, i >= shape.first_dense, found)
    h = _norm(x, p["norm.weight"], shape)
    found["loss"] = _cross_entropy(h, p, tokens[:, 1 : length + 1])
    for k in range(1, shape.mtp_depth + 1):
        name = f"mtp.{k - 1}"
        e = p["embed.weight"][tokens[:, k : length + k]]
        both = (_norm(e, p[f"{name}.norm_e.weight"], shape), _norm(h, p[f"{name}.norm_h.weight"], shape))
        x = torch.cat(both, -1) @ p[f"{name}.project.weight"].T
        x = _layer(p, f"{name}.layer", name, shape, x, True, found)
        h = _norm(x, p[f"{name}.norm.weight"], shape)
        target = tokens[:, k + 1 : length + k + 1]
        found[name] = _cross_entropy(h, p, target) * shape.mtp_weight / shape.mtp_depth
    return found


def logprobs(p: Params, shape: Shape, tokens: Tensor, temperature: float, experts: Tensor | None) -> Tensor:
    """The log-probability of each of the tokens [T + 1] but the first, [T]. `experts`: [MoE layers, T, K] to take."""
    x = p["embed.weight"][tokens[None, :-1]]
    for i in range(shape.layers):
        given = None
        if experts is not None and i >= shape.first_dense:
            chosen = experts[i - shape.first_dense].long()
            given = torch.zeros(1, len(chosen), shape.routed, dtype=x.dtype).scatter_(2, chosen[None], 1)
        x = _layer(p, f"layers.{i}", f"layers.{i}", shape, x, i >= shape.first_dense, {}, given)
    logits = _norm(x[0], p["norm.weight"], shape) @ p["head.weight"].T
    return (logits / temperature).log_softmax(-1).gather(1, tokens[1:, None]).squeeze(1)


def _cross_entropy(h: Tensor, p: Params, target: Tensor) -> Tensor:
    return -(h @ p["head.weight"].T).log_softmax(-1).gather(-1, target.unsqueeze(-1)).mean()


def _norm(x: Tensor, weight: Tensor, shape: Shape) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + shape.norm_eps).sqrt() * weight


def _layer(
    p: Params, name: str, label: str, s: Shape, x: Tensor, is_moe: bool, found: dict[str, Tensor],
    given: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`given`: which experts each token takes, 0/1, instead of the gate's choice."""

    def get(part: str) -> Tensor:
        return p[f"{name}.{part}"]

    x = x + _attention(p, f"{name}.attention", s, _norm(x, get("attention_norm.weight"), s))
    n = _norm(x, get("ffn_norm.weight"), s)
    if not is_moe:
        return x + _ffn(n, get("ffn.gate_up.weight"), get("ffn.down.weight"))
    scores = n @ get("gate.weight").T
    scores = scores.sigmoid() if s.score == "sigmoid" else scores.softmax(-1)
    if s.balance_alpha:
        found[f"balance.{label}"] = torch.stack([_balance(one, s) for one in scores]).mean()
    out = _ffn(n, get("shared.gate_up.weight"), get("shared.down.weight")) if s.shared else torch.zeros_like(x)
    chosen = _chosen(scores.detach(), get("gate.bias"), s) if given is None else given
    weights = scores * chosen
    if s.normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    for e in range(s.routed):
        out = out + s.route_scale * weights[..., e, None] * _ffn(n, get("experts.gate_up")[e], get("experts.down")[e])
    return x + out


def _ffn(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ down.T


def _chosen(scores: Tensor, bias: Tensor, s: Shape) -> Tensor:
    """0/1 of every token and expert, token by token."""
    mask = torch.zeros_like(scores)
    for token in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:2])).tolist():
        biased = (scores[tuple(token)] + bias).tolist()
        width = s.routed // s.groups
        groups = [range(g * width, (g + 1) * width) for g in range(s.groups)]
        best = 2 if s.score == "sigmoid" else 1
        rank = sorted(groups, key=lambda g: sum(sorted((biased[e] for e in g), reverse=True)[:best]), reverse=True)
        allowed = [e for g in rank[: s.group_limit] for e in g] if s.groups > 1 else range(s.routed)
        for e in sorted(allowed, key=lambda e: biased[e], reverse=True)[: s.top_k]:
            mask[(*token, e)] = 1
    return mask


def _balance(scores_TE: Tensor, s: Shape) -> Tensor:
    """Equations 17-20 for one sequence, as printed."""
    length = scores_TE.shape[0]
    best = scores_TE.topk(s.top_k, -1).indices
    f = torch.stack([(best == e).sum() * s.routed / (s.top_k * length) for e in range(s.routed)])
    mean = (scores_TE / scores_TE.sum(-1, keepdim=True)).mean(0)
    return s.balance_alpha * (f * mean).sum()


def _attention(p: Params, name: str, s: Shape, x: Tensor) -> Tensor:
    def get(part: str) -> Tensor:
        return p[f"{name}.{part}.weight"]

    q = x @ get("q").T if s.q_lora is None else _norm(x @ get("q_a").T, get("q_norm"), s) @ get("q_b").T
    q = q.unflatten(-1, (s.heads, s.qk_dim))
    c, k_rope = (x @ get("kv_a").T).split((s.kv_lora, s.rope_dim), -1)
    kv = (_norm(c, get("kv_norm"), s) @ get("kv_b").T).unflatten(-1, (s.heads, s.nope_dim + s.v_dim))
    turn, temperature = _turns(s, x.shape[1])
    q_rope, k_rope = _rotate(q[..., s.nope_dim :], turn), _rotate(k_rope.unsqueeze(2), turn).squeeze(2)
    scores = torch.einsum("sqad,skad->saqk", q[..., : s.nope_dim], kv[..., : s.nope_dim])
    scores = (scores + torch.einsum("sqad,skd->saqk", q_rope, k_rope)) * temperature / math.sqrt(s.qk_dim)
    scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -math.inf)
    out = torch.einsum("saqk,skad->sqad", scores.softmax(-1), kv[..., s.nope_dim :])
    return out.flatten(2) @ get("o").T


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def _turns(s: Shape, length: int) -> tuple[Tensor, float]:
    """Complex factor of each position and pair, [T, 1, rope_dim / 2], and what the softmax scale is raised by."""
    speeds = [s.rope_theta ** (-2 * i / s.rope_dim) for i in range(s.rope_dim // 2)]
    size, temperature = 1.0, 1.0
    if s.yarn:
        speeds = _slow(speeds, s, s.yarn)
        m, m_all = (0.1 * a * math.log(s.yarn.factor) + 1 for a in (s.yarn.mscale, s.yarn.mscale_all_dim))
        size, temperature = m / m_all, m_all**2
    angles = torch.outer(torch.arange(length).float(), torch.tensor(speeds)).unsqueeze(1)
    return torch.polar(torch.full_like(angles, size), angles), temperature


def _slow(speeds: list[float], s: Shape, y: Yarn) -> list[float]:
    def pair(turns: float) -> float:
        return s.rope_dim * math.log(y.original / (turns * 2 * math.pi)) / (2 * math.log(s.rope_theta))

    low, high = max(math.floor(pair(y.beta)), 0), min(math.ceil(pair(y.alpha)), s.rope_dim - 1)
    ramp = [min(max((i - low) / max(high - low, 0.001), 0), 1) for i in range(len(speeds))]
    return [v * (1 - r) + v / y.factor * r for v, r in zip(speeds, ramp, strict=True)]
