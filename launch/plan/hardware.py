"""The rates of a GPU, its node and its network: a TOML file for each kind, in `machines/` or the user's own.

Kernel rates are those that published or measured kernels reach at the sizes of a large MoE, and each file gives the
source of each number. They are never tuned to make a run's time come out: a fitted prediction says nothing about the
next run. The usual shortcut, one efficiency for everything, hides that FP8 weight gradients run at a third of the speed
of the other products, which dominates DeepSeek-V3's step.
"""

from __future__ import annotations

import difflib
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from dryvine.comm.topology import Link, Topology, by_sizes
from dryvine.trainer.config import ConfigError, explain

FOLDER = Path(__file__).parent / "machines"
# Peak rates, and what kernels make of them, are in FLOP/s and bytes/s once they are read.
TERA, GIGA = 1e12, 1e9


def _has_a_rate(link: Link) -> Link:
    if link.gigabytes <= 0:
        raise ValueError(f'{link.gigabytes:g} GB/s: write the kind of link and its rate, such as ["NVLink", 160]')
    return link


RatedLink = Annotated[Link, AfterValidator(_has_a_rate)]


class KernelRates(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """TFLOPS that kernels reach with the whole device. Accumulation and operand formats are the recipe's."""

    fp32: PositiveFloat  # products of a run in FP32
    bf16: PositiveFloat  # dense products, F, I and W
    bf16_grouped: PositiveFloat  # of experts
    fp8: PositiveFloat  # dense products, F and I
    fp8_grouped: PositiveFloat
    fp8_wgrad: PositiveFloat  # 1x128 tiles both ways, added to FP32
    attention: PositiveFloat  # causal core, forward; the masked half is not counted
    attention_backward: PositiveFloat


class Host(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """A GPU's share of its host, for what is kept off the GPU. By default that of a node of 8 H100 (NVIDIA's data sheet
    of DGX H100: 2 TB; two sockets of eight DDR5-4800 channels, 614 GB/s; PCIe 5 x16, 50 of 64 GB/s a guess)."""

    memory_gb: PositiveFloat = 250
    bandwidth: PositiveFloat = 60  # GB/s of memory: of 77, a guess
    link: PositiveFloat = 50  # GB/s each way between GPU and host memory


class Machine(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """A kind of machine. `dollars` is for an hour of one GPU."""

    name: str
    gpus_per_node: PositiveInt = 8
    memory_gb: PositiveFloat  # of one GPU, 10^9 bytes, as CUDA reports them: "80 GB" are nearer to GiB
    reserved_gb: float = Field(default=2.0, ge=0)  # CUDA's context, NCCL's buffers, cuBLAS's workspaces
    peak_bf16: PositiveFloat  # TFLOPS, dense: what MFU is measured against
    memory_bandwidth: PositiveFloat  # GB/s
    streaming: float = Field(gt=0, le=1)  # share of it that elementwise kernels reach
    intra: RatedLink  # inside a node, GB/s a GPU and way that messages reach
    inter: RatedLink  # between nodes
    latency_us: PositiveFloat = 20.0  # of one all-to-all or message, without its bytes
    sms: PositiveInt
    comm_sms: int = Field(default=0, ge=0)  # taken from arithmetic while an all-to-all runs beside it
    casts: float = Field(ge=0, lt=1)  # share of FP8's arithmetic time that goes into casts and transposes
    tflops: KernelRates
    host: Host = Host()
    dollars: float = Field(default=2.0, ge=0)
    cuda: bool = True

    @model_validator(mode="after")
    def _leaves_something(self) -> Self:
        if self.comm_sms >= self.sms:
            raise ValueError(f"comm_sms = {self.comm_sms} leave none of sms = {self.sms} to arithmetic; lower comm_sms")
        if self.reserved_gb >= self.memory_gb:
            raise ValueError(
                f"reserved_gb = {self.reserved_gb:g} leave nothing of memory_gb = {self.memory_gb:g}; lower reserved_gb"
            )
        return self

    @cached_property
    def beside_comm(self) -> float:
        """Factor on arithmetic time while an all-to-all occupies its SMs."""
        return self.sms / (self.sms - self.comm_sms)

    @property
    def usable_bytes(self) -> float:
        return (self.memory_gb - self.reserved_gb) * GIGA

    def topology(self, ranks: int) -> Topology:
        """A cluster of `ranks` ranks, with nodes filled one after the other."""
        full, rest = divmod(ranks, self.gpus_per_node)
        sizes = [self.gpus_per_node] * full + ([rest] if rest else [])
        made = by_sizes(sizes, self.name)
        return Topology(made.nodes, self.intra, self.inter, self.name)


def names() -> list[str]:
    """The kinds that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_hardware(name: str) -> Machine:
    """A machine by name, or from a TOML file. Raises ConfigError with the fix."""
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    try:
        return Machine.model_validate(tomllib.loads(path.read_text()))
    except FileNotFoundError:
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names())}, or a TOML file of your own"
        raise ConfigError(f"hardware {name!r}: no such kind; {hint}") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, Machine)}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from None
