"""The dispatcher for GPUs that reach each other's memory: tokens are copied to every rank once, and distributed to
experts there.

With 8 choices nearly every token is needed on every rank of a small group: 0.998 of the tokens on each of 2 ranks, 0.92
on 4, 0.68 on 8. `flat` sends a row for each choice: for 2 ranks four times the bytes. Here each rank copies its rows as
they are, without packing, and the copy engines use no SM (`windows`). Which rows a rank needs follows from everybody's
choices (`token_plan`), so no counts are exchanged; where the host need not know the counts, choices go with the rows.

Experts' outputs are summed by token where they were computed, in FP32, and rounded; the ranks' sums are added in rank
order: within the tolerance of `hierarchical`, but not the same bits as `flat`. `Setup.by_choice` is for comparisons:
every choice's row returns and is added in flat's order, which takes top_k times the bytes back and as much memory.

In larger groups, copies to ranks that need few of the rows are wasteful; a push of the needed rows only, by a kernel,
would send 0.68 of them to 8 ranks. It would take 8 to 16 SMs (323 GB/s each way by 8 programs, 380 by copy engines), so
that 0.8 ms in the place of 1.1 for 4096 rows of 7168 would cost a tenth of the GPU meanwhile; where copies are hidden
behind compute, as in pairs, that is no gain. From 16 ranks on, which share no node today, it would be.
"""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import Tensor

from dryvine.comm.copy_links import expecting, open_links
from dryvine.comm.dispatch import flat, token_plan
from dryvine.comm.dispatch.api import AnyDispatcher
from dryvine.comm.dispatch.backends import WINDOW_SLOTS
from dryvine.comm.dispatch.by_rank import ByRank, gather_by_rank, sum_by_rank, sum_present
from dryvine.comm.dispatch.hierarchical import two_hops
from dryvine.comm.dispatch.payload import gather
from dryvine.comm.dispatch.setup import Setup
from dryvine.comm.dispatch.token_plan import PlanGroup, RowRoom, TokenHandle
from dryvine.comm.dispatch.windows import WindowRows, Windows, word_count
from dryvine.comm.integers import round_up
from dryvine.comm.mesh import Mesh
from dryvine.comm.pending import Pending


def build(setup: Setup) -> AnyDispatcher:
    """`flat` where there is one rank, or where the ranks cannot open their memory to each other; over several nodes
    `hierarchical`, with copies as its hop 2. Collective over the group, or over the world if that spans nodes."""
    topology, mesh = setup.group_topology, setup.mesh
    if len(topology.nodes) > 1:
        if setup.by_choice:
            raise ValueError("comm.sums = by_choice: between nodes rows travel as sums; use comm.dispatcher = flat")
        return two_hops(setup, by_copy=True)
    if mesh is None or mesh.experts is None:
        return flat.build(setup)
    size, near = slot_bytes(setup), tuple(range(topology.ranks))
    links = open_links(near, mesh.experts, WINDOW_SLOTS * size, word_count(len(near)), mesh.device)
    if links is None:
        if setup.rank == 0:
            logging.getLogger(__name__).warning("nvlink: no memory that the ranks could share; flat is used instead")
        return flat.build(setup)
    expect = expecting(mesh.watch, links.words)
    world_ranks = dist.get_process_group_ranks(mesh.experts)
    windows = Windows(setup.rank, links, size, setup.meter, setup.links, expect, world_ranks)
    group, room = PlanGroup(setup.experts, setup.alignment), RowRoom(setup.room, _zero(mesh))
    made = Nvlink(windows, group, setup.tokens, room, setup.by_choice)
    if mesh.device.type == "cuda":
        _load(setup, made)
    return made


def _zero(mesh: Mesh) -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device=mesh.device)


def _load(setup: Setup, made: Nvlink) -> None:
    """Launch once what only recordings launch: no kernel may be loaded while a graph is recorded."""
    device = made.room.overflows.device
    ranks, choices = setup.group_topology.ranks, torch.arange(setup.top_k, dtype=torch.int32, device=device)
    every = choices.expand(ranks, setup.tokens, -1).contiguous()
    chosen = ByRank(every, every[setup.rank], setup.rank)
    token_plan.unread(chosen, every[0].to(torch.int64), made.group, made.room)
    made.room.overflows.zero_()


def slot_bytes(setup: Setup) -> int:
    """Room for the widest rows, and two values for each choice."""
    ranks, most = setup.group_topology.ranks, setup.tokens
    row = setup.row_bytes * (setup.top_k if setup.by_choice else 1)
    # Each of at most four tensors is rounded up by itself.
    return round_up(ranks * most * (row + 8 * setup.top_k), 1 << 12) + (1 << 12)


class Nvlink:
    """`Dispatcher` over windows. Ranks hold experts in equal, contiguous shares and dispatch at most `most` tokens.
    `room` is that of recorded ops; `by_choice` as in `Setup`."""

    def __init__(self, windows: Windows, group: PlanGroup, most: int, room: RowRoom, by_choice: bool = False) -> None:
        if group.experts % windows.ranks:
            raise ValueError(f"experts = {group.experts} do not divide over {windows.ranks} expert-parallel ranks")
        self.windows, self.meter = windows, windows.meter
        self.group, self.most, self.room, self.by_choice = group, most, room, by_choice

    def plan_routing(self, experts_TK: Tensor, label: str = "") -> Pending[TokenHandle]:
        """While ops are recorded no message: choices go with the rows that are dispatched by them."""
        handle = TokenHandle(label, experts_TK, token_plan.choices_to_send(experts_TK, self.most))
        if self.windows.live.recording:
            return Pending.done(handle)

        def read(came: list[ByRank]) -> TokenHandle:
            handle.known = token_plan.plan(came[0], experts_TK, self.group)
            return handle

        return self.windows.start(
            lambda _: (handle.sent,), (WindowRows.of(handle.sent, self.most),), read, f"routing of {label}"
        )

    def dispatch(
        self, rows: tuple[Tensor, ...], pairs: Tensor | None, handle: TokenHandle
    ) -> Pending[tuple[Tensor, ...]]:
        known, count = handle.known, len(rows)
        given = (*rows, *(() if pairs is None else (pairs,)), *(() if known else (handle.sent,)))
        sent = tuple(t.contiguous() for t in given)

        def read(came: list[ByRank]) -> tuple[Tensor, ...]:
            plan = known or token_plan.unread(came.pop(), handle.chosen, self.group, self.room)
            handle.known = plan
            spread = (gather_by_rank(tensor, plan.token) for tensor in came[:count])
            return (*spread, *(gather_by_rank(of.values(), plan.pair)[:, 0] for of in came[count:]))

        rooms = tuple(WindowRows.of(tensor, self.most) for tensor in sent)
        return self.windows.start(lambda _: sent, rooms, read, f"dispatch of {handle.label}")

    def combine(self, rows: Tensor, pairs: Tensor | None, handle: TokenHandle) -> Pending[tuple[Tensor, ...]]:
        plan = handle.plan
        returned = gather(rows, plan.row.flatten()) if self.by_choice else sum_present(rows, plan.row)
        parts = [returned.view(self.windows.ranks, -1, *rows.shape[1:])]
        if pairs is not None:
            answers = gather(pairs.unsqueeze(1), plan.row.flatten())
            parts.append(answers.view(self.windows.ranks, self.most, plan.row.shape[1]))

        def read(came: list[ByRank]) -> tuple[Tensor, ...]:
            values = (gather_by_rank(of.values(), plan.owner.flatten()).view_as(plan.owner) for of in came[1:])
            return (sum_by_rank(came[0], plan.owner if self.by_choice else plan.total), *values)

        rooms = tuple(WindowRows.of(part[0], part.shape[1]) for part in parts)
        return self.windows.start(
            lambda rank: tuple(part[rank] for part in parts), rooms, read, f"combine of {handle.label}"
        )
