"""The summary table that is printed at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from rich.table import Table

from dryvine.trainer.config import Config
from dryvine.trainer.run_rows import Figures


def final_table(config: Config, rows: Sequence[Figures]) -> Table:
    """The summary of a run. Rates are medians over steps, so that the first step's warm-up does not count."""
    p = config.parallel
    table = Table(title=config.run.name, show_header=False)
    table.add_row("layout", f"pp {p.pp} x dp {p.dp} x ep {p.ep}, {p.schedule}, overlap {p.overlap}, {config.run.dtype}")
    table.add_row("steps", f"{rows[-1]['step']:,}")
    table.add_row("tokens", f"{rows[-1]['tokens']:,}")
    table.add_row("loss", _first_last(rows, "loss"))
    table.add_row("validation loss", _first_last(rows, "val_loss"))
    if config.optim.ema:
        table.add_row("the same of averaged weights", _first_last(rows, "val_loss_ema"))
    table.add_row("tokens/s", f"{_median(rows, 'tokens_per_second'):,.0f}")
    table.add_row("bubble, worst rank", f"{_median(rows, 'bubble'):.1%}")
    table.add_row("overlapped forwards", f"{_median(rows, 'overlapped_share'):.1%}")
    table.add_row(
        "exposed all-to-all", f"{_median(rows, 'exposed_comm_ms'):.0f} ms ({_median(rows, 'exposed_comm_share'):.1%})"
    )
    if _known(rows, "exposed_zero_ms"):  # rows of earlier versions have none
        table.add_row("exposed sums and gathers", f"{_median(rows, 'exposed_zero_ms'):.0f} ms")
    table.add_row("wait for the slowest rank", f"{_median(rows, 'slowest_rank_ms'):.0f} ms")
    table.add_row("run folder", str(config.run.folder))
    return table


def _known(rows: Sequence[Figures], name: str) -> list[float]:
    return [value for row in rows if (value := row.get(name)) is not None]


def _first_last(rows: Sequence[Figures], name: str) -> str:
    """The first and the last finite value; others are null in the rows."""
    known = _known(rows, name)
    return f"{known[0]:.3f} -> {known[-1]:.3f}" if known else "at no step finite"


def _median(rows: Sequence[Figures], name: str) -> float:
    return median(_known(rows, name))
