"""What is checked and timed on GPUs: every job of `benchmarks.on_gpus`, with the seconds that it takes, about."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

from benchmarks.support.corpus import corpus_folder
from benchmarks.support.jobs import Done, Job
from dryvine.parallel.schedule.table import SCHEDULES
from dryvine.trainer import run_rows

PYTEST = ("-m", "pytest", "-p", "no:cacheprovider")
CLI = ("-c", "from dryvine.launch.cli import main; main()")
RANK = "tests/trainer/test_one_rank_schedules.py"
TESTED = r"^E  |^FAILED|\d passed|\d failed|no tests ran"
SKIPPED = r"^\d+ skipped|no tests ran"  # and none passed
DEVIATING = r" in |rror|warning"  # a cell of verify's table that is out of bounds names its tensor
FAILED = r"no time left|not done in|^Traceback|RankFailed|rank \d+ of \d+ (failed|died)|at the deadline"
FAILED_PEER = FAILED + r"|^(dryvine|transformers)[\w ]*: \w*(Error|Exception)\b"
GENERATED = r'"(model|dryvine|transformers|same_tokens|ratio)'
WIDE = (  # FP8 on a GPU needs sizes that are multiples of 128
    "model.hidden=128", "model.ffn=256", "model.expert_ffn=128", "model.q_lora=64", "model.kv_lora=64",
    "model.nope_dim=64", "model.rope_dim=16", "model.v_dim=64",
)  # fmt: skip
BF16 = ("run.dtype=bf16", *WIDE)
FP8 = ("fp8.preset=deepseek_v3", *BF16)
VOCAB = 320  # of tests/tiny.toml
PRINTED = 1_000_000  # reports of racecheck, which by itself stops at 100
STEPS = 50  # of the loss curves
CURVE = 0.02  # the largest difference of two runs' losses in BF16, nats
SHARED = 2  # slots of a check of several GPUs: four take turns on them; 22 at once have no room in 80 GB


def bench(name: str, *words: str) -> tuple[str, ...]:
    return "-m", f"benchmarks.{name}", *words


def torchrun(ranks: int, name: str, *words: str) -> tuple[str, ...]:
    """On a port of its own: others run beside it."""
    run = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}")
    return *run, *bench(name, *words)


# ---- checks


def checks(out: Path) -> list[Job]:
    """`out` is the folder for what runs leave behind."""
    data = corpus_folder(out, VOCAB)
    return [*_kernels(), *_on_one_gpu(out), *_layouts(data), *_of_four(data), *_curves(out, data)]


def _kernels() -> list[Job]:
    every, shown = ("-m", "tests.spawned.kernels_sanitized"), r"kernels ran|SUMMARY|not run"
    memcheck, racecheck = (("compute-sanitizer", "--tool", tool) for tool in ("memcheck", "racecheck"))
    # Triton starts warps of their own by reads and writes that look like a race, as cuDNN does: docs/fp8.md. There are
    # hundreds of these, and what is not printed might be of another kernel.
    race = r"Race reported (?!.*(product_kernel|wgrad_kernel|cudnn|fmha|sdpa|flash))"
    race += rf"|SUMMARY: {PRINTED} hazards"
    limited = (*racecheck, "--print-limit", f"{PRINTED}")
    return [
        Job("racecheck", every, 110, shown, slots=1, wrong=race, under=limited),
        Job("memcheck", every, 80, shown, slots=1, under=(*memcheck, "--error-exitcode", "9")),
        Job(
            "casts and products", bench("fp8.kernels", "--section=check"), 80, r"^casts:|^products:|DIFFERS|WRONG",
            slots=1,
        ),
    ]  # fmt: skip


def _on_one_gpu(out: Path) -> list[Job]:
    documents = ("tests/trainer/test_documents.py", "tests/trainer/test_documents_kernel.py")
    tests: dict[str, tuple[float, tuple[str, ...]]] = {
        "model": (90, ("tests/trainer/test_model_cuda.py",)),
        "dispatch": (50, ("tests/comm/test_dispatch_cuda.py",)),
        "dispatch in FP8": (30, ("tests/trainer/test_fp8_dispatch.py", "-k", "a_gpu")),
        "FP8 engines": (60, ("tests/trainer/test_fp8_engines_cuda.py",)),
        "same bits twice": (90, (RANK, "-k", "same_run")),
        "same bits overlapped": (60, (RANK, "-k", "overlap_does")),
        "same bits by graphs": (120, (RANK, "-k", "graphs")),
        "every schedule": (90, (RANK, "-k", "not same_run and not overlap_does and not graphs")),
        "documents": (40, (*documents, "-k", "on_a_gpu or cuda")),
        "RL updates": (60, ("tests/trainer/test_rl_update.py", "-k", "on_a_gpu")),
        "sampling": (90, ("tests/trainer/test_generate_rounding.py", "tests/trainer/test_generate_replay.py")),
    }  # fmt: skip
    made = [
        Job(name, (*PYTEST, *words), seconds, TESTED, slots=1, wrong=SKIPPED)
        for name, (seconds, words) in tests.items()
    ]
    debug = ("-m", "dryvine.trainer", "configs/debug_1gpu.toml", f"run.out={out}")
    return [*made, Job("debug_1gpu", debug, 60, r"tokens/s|loss  ", slots=1)]


def _layouts(data: Path) -> list[Job]:
    """Every layout of two ranks against one GPU in FP32, and twice to the same bits in its own dtypes."""
    layouts = {f"{name} {overlap}": _pipeline(name, overlap) for name in SCHEDULES for overlap in ("on", "off")}
    layouts |= {f"ep 2 {way}": _experts(2, way) for way in ("flat", "hierarchical", "nvlink", "auto")}
    layouts["dp 2"] = ("parallel.dp=2", "parallel.schedule=one_f_one_b")
    for dtype, words in {"bf16": BF16, "fp8": FP8}.items():
        layouts[f"dualpipe {dtype}"] = (*_pipeline("dualpipe", "on"), *words)
        for way in ("flat", "nvlink"):
            layouts[f"ep 2 {way} {dtype}"] = (*_experts(2, way), *words)
    return [_verify(name, data, 2, words) for name, words in layouts.items()]


def _of_four(data: Path) -> list[Job]:
    """Four expert-parallel ranks as one node, and as two of two; pipelines of expert-parallel pairs."""
    two_nodes = "comm.topology.nodes=[2,2]"
    layouts: dict[str, tuple[str, ...]] = {}
    for dtype, words in {"fp32": (), "bf16": BF16, "fp8": FP8}.items():
        layouts[f"ep 4 nvlink {dtype}"] = (*_experts(4, "nvlink"), *words)
        layouts[f"ep 4 nvlink {dtype}, two nodes"] = (*_experts(4, "nvlink"), two_nodes, *words)
        layouts[f"pp 2 x ep 2 nvlink {dtype}"] = (
            "parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe", "comm.dispatcher=nvlink", *words,
        )  # fmt: skip
    layouts["ep 4 nvlink bf16, little room"] = (*_experts(4, "nvlink"), "parallel.graph_room=1", *BF16)
    return [_verify(name, data, 4, words) for name, words in layouts.items()]


def _pipeline(schedule: str, overlap: str) -> tuple[str, ...]:
    chunks = 2 if schedule == "interleaved" else 1
    return "parallel.pp=2", f"parallel.schedule={schedule}", f"parallel.chunks={chunks}", f"parallel.overlap={overlap}"


def _experts(ranks: int, dispatcher: str) -> tuple[str, ...]:
    return f"parallel.ep={ranks}", "parallel.schedule=dualpipev", f"comm.dispatcher={dispatcher}"


def _verify(name: str, data: Path, gpus: int, words: tuple[str, ...]) -> Job:
    verify = (*CLI, "verify", "tests/tiny.toml", "--device", "cuda", f"data.source={data}", *words)
    return Job(name, verify, 95 if gpus == 2 else 125, DEVIATING, gpus, SHARED, vocab=VOCAB)


def _curves(out: Path, data: Path) -> list[Job]:
    """`dryvine train` in BF16 by one GPU and in three layouts of two."""
    layouts: dict[str, tuple[str, ...]] = {
        "one": (), "pp": _pipeline("dualpipe", "on"), "ep": _experts(2, "auto"), "dp": ("parallel.dp=2",),
    }  # fmt: skip
    run = (f"run.out={out}", f"data.source={data}", f"run.steps={STEPS}", "run.device=cuda", "run.eval_every=1000")
    return [
        Job(
            f"curve {name}", (*CLI, "train", "tests/tiny.toml", f"run.name=curve_{name}", *run, *BF16, *words), 60,
            r"rror|warning|tokens/s", 2, SHARED, vocab=VOCAB,
        )
        for name, words in layouts.items()
    ]  # fmt: skip


def compare_curves(out: Path) -> list[Done]:
    """A row a layout: the largest difference of its losses to one GPU's."""
    losses = {folder.name: _losses(folder) for folder in sorted(out.glob("curve_*")) if folder.is_dir()}
    alone = losses.pop("curve_one", [])
    return [_compared(name, curve, alone) for name, curve in losses.items()]


def _losses(run: Path) -> list[float]:
    """Of each step, up to one whose loss is not finite."""
    return list(takewhile(lambda loss: loss is not None, (row["loss"] for row in run_rows.read(run))))


def _compared(name: str, curve: list[float], alone: list[float]) -> Done:
    fine, note = False, f"finite losses of {len(curve)} steps, of {len(alone)} on one GPU; {STEPS} are needed"
    if len(curve) == len(alone) == STEPS:
        largest = max(abs(a - b) for a, b in zip(alone, curve, strict=True))
        fine, note = largest <= CURVE, f"loss {curve[0]:.3f} to {curve[-1]:.3f}, at most {largest:.4f} from one GPU's"
    return Done(Job(f"{name}, compared", (), 0, ""), "right" if fine else "WRONG", 0, [note])


# ---- times


def times(out: Path) -> list[Job]:
    return [*_times_of_one(out), *_times_of_several(out)]


def _times_of_one(out: Path) -> list[Job]:
    table = r"│"
    peer = bench("model.peer", "--device=cuda", "--deadline=230", "--sequences=1", "--microbatches=8", "--moments=fp32")
    contenders = ("dryvine", "dryvine fp8", "transformers grouped_mm", "transformers grouped_mm compiled")
    variants = ("plain", "documents", "documents, no graphs")
    return [
        Job(
            "host", bench("host", "--deadline=90", "--ways", "on", "off", f"--json={out / 'host.json'}"), 225,
            r"ms, busy|different bits|│ ", wrong=FAILED,
        ),
        Job(
            "peer, 1 x 8", (*peer, f"--json={out / 'peer_1_x_8.json'}", *(f"--contender={c}" for c in contenders)),
            220, r"│ ", wrong=FAILED_PEER,
        ),
        Job("planner, one GPU", bench("planner_gpu", "--gpus=1", "--deadline=300"), 220, r"│ |planned", wrong=FAILED),
        Job(
            "step variants",
            bench("step_variants", "--deadline=200", f"--out={out / 'step_variants.json'}", "--variants", *variants),
            80, table, wrong=FAILED,
        ),
        Job("layer", bench("model.layer", "--device=cuda", f"--json={out / 'layer.json'}"), 50, r"a microbatch, ideal"),
        Job("overlap", bench("overlap.pairs", "--device=cuda", "--phase-ms=3"), 60, r"host time|(FB|FF|BB|FW|IW) "),
        Job("FP8 products", bench("fp8.kernels", "--section=product"), 70, r"^limits|^  \d"),
        Job("FP8 weight gradients", bench("fp8.kernels", "--section=wgrad"), 30, r"^  \d", wrong=r"rror: "),
        Job("FP8 casts", bench("fp8.kernels", "--section=casts"), 30, r"^  \w|%", wrong=r"rror: "),
        Job("memory", bench("model.memory", "--device=cuda"), 40, r"layers\.\d"),
        Job(
            "generate", bench("generate", "--device=cuda", "--sequences=64", "--new=128", "--dtype=bfloat16"), 90,
            GENERATED,
        ),
        Job("saves", bench("saves", "--device=cuda", "--mib=1024", "--rounds=3"), 50, r"stall|copy|│"),
        Job("dispatch alone", bench("comm.cuda"), 40, r" ms"),
    ]  # fmt: skip


def _times_of_several(out: Path) -> list[Job]:
    made = [
        Job(
            "planner, two GPUs", bench("planner_gpu", "--gpus=2", "--deadline=400"), 260, r"│ |planned", 2,
            wrong=FAILED,
        ),
        Job(
            "overlap with graphs", bench("overlap.graphed", f"--json={out / 'overlap_with_graphs.json'}"), 100,
            r"^(BF16|FP8)", 2, wrong=FAILED,
        ),
        Job("pipelines", bench("two_gpus", "pipelines", f"--out={out / 'pipelines'}"), 260, r"│ |^--", 2, wrong=FAILED),
    ]  # fmt: skip
    for ranks in (2, 4):
        layout = (f"parallel.ep={ranks}", "comm.dispatcher=nvlink", "parallel.schedule=dualpipev")
        even = bench("host", "--even", "--ways", "on", f"--json={out / f'host_ep_{ranks}.json'}", "--set", *layout)
        made += [
            Job(f"host, ep {ranks}", even, 90, r"ms, busy|│ ", ranks, wrong=FAILED),
            Job(f"nvlink, ep {ranks}", torchrun(ranks, "comm.nvlink", "--rounds=100"), 50, r"rounds|│ ", ranks),
            Job(f"hop 2, ep {ranks}", torchrun(ranks, "comm.hop2", "--rounds=60"), 35, r"exchanges|│ ", ranks),
        ]
    return made


def lost(out: Path) -> list[Job]:
    """Ranks lost and runs resumed: alone on their GPUs, since they wait for deadlines."""
    made = []
    for section, seconds in (("ops", 240), ("resume", 220)):
        folder = out / f"faults-{section}"
        words = bench("faults", f"--section={section}", "--deadline=12", "--together=3", f"--out={folder}")
        made.append(Job(f"lost ranks, {section}", words, seconds, r"│ |as they should", 2))
    return made


def slow(out: Path) -> list[Job]:
    """What takes long, or has not changed for long."""
    return [
        Job("experts", bench("two_gpus", "experts", f"--out={out / 'experts'}"), 420, r"│ |^--", 2, wrong=FAILED),
        Job(
            "beside transformers",
            bench("model.peer", "--device=cuda", "--deadline=400", f"--json={out / 'beside_transformers.json'}"),
            280, r"│ ", wrong=FAILED_PEER,
        ),
        Job(
            "offload", bench("step_variants", "--deadline=400", "--variants", "plain", "offload"), 150, r"│",
            wrong=FAILED,
        ),
        Job("RL", bench("rl_gpu", "--warm=150", "--rollouts=3", f"--out={out / 'RL.json'}"), 300, r"│ |lower"),
        Job(
            "generate in FP32",
            bench("generate", "--device=cuda", "--sequences=64", "--new=128", "--dtype=float32", "--models", "1m"),
            80, GENERATED,
        ),
    ]  # fmt: skip


PARTS = {"checks": checks, "times": times, "lost": lost, "slow": slow}
