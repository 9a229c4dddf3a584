"""`dryvine launch slurm`: a run as a SLURM job. Needs no torch, since login nodes often have none."""

from __future__ import annotations

import shutil
import subprocess
from typing import Annotated

import typer

from dryvine.launch.files import write_file
from dryvine.launch.options import ConfigFile, Overrides
from dryvine.launch.slurm.job import JobError, SlurmJob
from dryvine.launch.slurm.render import render
from dryvine.trainer.config import Config
from dryvine.trainer.run_plan import load_plan

app = typer.Typer(no_args_is_help=True, help="Start a run on a cluster.")


@app.callback()
def _launch() -> None:
    """An empty callback: it makes typer keep the name of the only command."""


@app.command()
def slurm(
    config: ConfigFile,
    overrides: Overrides = None,
    *,
    nodes: Annotated[int, typer.Option(help="nodes of the job")],
    gpus_per_node: Annotated[int, typer.Option(help="GPUs, and so ranks, on each; ranks if run.device is cpu")],
    partition: Annotated[str, typer.Option()] = "",
    time: Annotated[str, typer.Option(help="limit of one start, as SLURM writes it; the run goes on in the next")] = "",
    account: Annotated[str, typer.Option()] = "",
    qos: Annotated[str, typer.Option()] = "",
    reservation: Annotated[str, typer.Option()] = "",
    constraint: Annotated[str, typer.Option()] = "",
    exclude: Annotated[str, typer.Option(help="nodes not to use, as doctor named them")] = "",
    name: Annotated[str, typer.Option(help="of the job; empty: run.name")] = "",
    array: Annotated[int, typer.Option(help="so many starts, one after the other, in place of requeueing")] = 0,
    cpus_per_rank: Annotated[int, typer.Option(help="CPUs to bind each rank to; 0: nodes are taken whole")] = 0,
    interface: Annotated[str, typer.Option(help="network interfaces between nodes, for NCCL and gloo, e.g. ib0")] = "",
    ib_hca: Annotated[str, typer.Option(help="InfiniBand devices for NCCL, as NCCL_IB_HCA takes them")] = "",
    container: Annotated[str, typer.Option(help="pyxis:IMAGE or apptainer:IMAGE")] = "",
    mounts: Annotated[str, typer.Option(help="HOST:CONTAINER[,...] besides the working folder")] = "",
    per_rank: Annotated[bool, typer.Option("--per-rank", help="srun starts each rank, without torchrun")] = False,
    check: Annotated[bool, typer.Option(help="run `dryvine doctor --before-run` on every node first")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the script and submit nothing")] = False,
) -> None:
    """Render a batch script for CONFIG and submit it. Submitted again, or requeued by SLURM, the run resumes."""
    resolved = load_plan(config, overrides or ()).config
    job = SlurmJob(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        name=name or resolved.run.name,
        partition=partition,
        account=account,
        qos=qos,
        reservation=reservation,
        constraint=constraint,
        exclude=exclude,
        time=time,
        array=array,
        cpus_per_rank=cpus_per_rank,
        interface=interface,
        ib_hca=ib_hca,
        container=container,
        mounts=mounts,
        per_rank=per_rank,
        check=check,
    )
    script = render(resolved, [str(config), *(overrides or ())], job)
    if dry_run:
        typer.echo(script, nl=False)
    else:
        _submit(script, resolved)


def _submit(script: str, config: Config) -> None:
    """Save the script in the run folder, where SLURM also writes the job's output, and submit it by sbatch."""
    if shutil.which("sbatch") is None:
        raise JobError("sbatch is not on this machine's PATH: log in where it is, or see the script with --dry-run")
    folder = config.run.folder
    path = folder / "pretrain.sbatch"
    write_file(path, script)
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise JobError(f"sbatch refuses {path}: {' '.join(done.stderr.split())}")
    number = done.stdout.strip().partition(";")[0]
    typer.echo(f"job {number}: output in {folder}/slurm-{number}.out; squeue -j {number}, scancel {number}")
