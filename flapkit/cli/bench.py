"""``flapkit bench``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from flapkit.cli.app import app
from flapkit.cli.options import AsJson, CheckpointArgument, OutputFile
from flapkit.cli.output import check_new, print_, set_logging, write_new
from flapkit.cli.progress import progress_listener
from flapkit.system.sizes import counted

if TYPE_CHECKING:
    from flapkit.evaluation.block_table import BlockTimes
    from flapkit.run.bench import BenchResult


@app.command()
def bench(
    checkpoint: CheckpointArgument,
    against: Annotated[str | None, typer.Option(metavar="DENSE", help="The dense model, timed in alternation.")] = None,
    engine: Annotated[
        Literal["transformers", "llama.cpp", "vllm"],
        typer.Option(help="The program that runs the models; llama.cpp runs GGUF files."),
    ] = "transformers",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 1,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens per prompt.")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
    repetitions: Annotated[int, typer.Option(min=1, help="Timed turns of each model.")] = 7,
    warm_up: Annotated[int, typer.Option(min=0, help="Turns of each model before the timed ones.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's default if not given.")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Device to use.")] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"], typer.Option(help="Type of both models' weights.")
    ] = "auto",
    blocks: Annotated[
        bool,
        typer.Option(
            "--blocks", help="Time blocks with fewer units instead, and store the table for `budget: {latency: ...}`."
        ),
    ] = False,
    compile_: Annotated[bool, typer.Option("--compile", help="Run the models through torch.compile.")] = False,
    as_json: AsJson = False,
    output: OutputFile = None,
) -> None:
    """Time a model, alone or in alternation with the dense model: prefill, decode, first token, memory."""
    import torch

    from flapkit.evaluation.speed import Workload, turns
    from flapkit.run.bench import bench as time_models
    from flapkit.run.block_times import time_blocks
    from flapkit.system.errors import InputError
    from flapkit.system.progress import Progress

    set_logging(quiet=True, verbose=False)
    if output is not None:
        check_new(output)
    if threads is not None:
        torch.set_num_threads(threads)
    workload = Workload(batch_size, prompt, tokens, repetitions, warm_up)
    progress = Progress(progress_listener(quiet=as_json))
    if blocks:
        if against is not None or compile_:
            raise InputError(
                "bench: --blocks times a single model without --compile; leave out --against and --compile"
            )
        with progress.stage("bench", None, "turns") as stage:
            times = time_blocks(checkpoint, workload, device=device, dtype=dtype, tick=stage.advance)
        if output is not None:
            write_new(output, times.to_json())
        sys.stdout.write(times.to_json()) if as_json else _print_blocks(times)
        return
    with progress.stage("bench", turns(1 if against is None else 2, workload), "turns") as stage:
        result = time_models(
            checkpoint,
            against,
            workload,
            engine=engine,
            device=device,
            dtype=dtype,
            compiled=compile_,
            tick=stage.advance,
        )
    if output is not None:
        write_new(output, result.to_json())
    sys.stdout.write(result.to_json()) if as_json else _print(result)


def _print(result: BenchResult) -> None:
    columns = ["dense", "checkpoint"] if result.against is not None else ["checkpoint"]
    title = result.checkpoint + (f" against {result.against}" if result.against is not None else "")
    table = Table("", *columns, *(["ratio", "expected"] if result.against is not None else []), title=title)
    speeds = [result.speeds[path] for path in (result.against, result.checkpoint) if path is not None]
    for label, name, show in _ROWS:
        ratio = f"{result.ratios[name]:.3f}" if name in result.ratios else ""
        expected = _expected(name, result.expected)
        table.add_row(label, *(show(speed) for speed in speeds), *([ratio, expected] if result.against else []))
    print_(table)
    where, work = result.environment, result.workload
    print_(
        f"{where['engine']}, {where['device']}, {where['threads']} threads on {where['processors']} processors, "
        f"{where['dtype']}"
        f"{', compiled' if where['compiled'] else ''}; batch {work.batch_size}, prompt {work.prompt}, then "
        f"{counted(work.tokens, 'token')}; medians [quartiles] of {counted(work.repetitions, 'turn')} after "
        f"{counted(work.warm_up, 'warm-up turn')}"
    )
    for line in result.reasons:
        print_(f"- {line}")


def _print_blocks(times: BlockTimes) -> None:
    table = Table("", "ms", *(f"us per unit of {name}" for name in times.named()), "half: by the table", "measured")
    for phase, of_phase in times.phases.items():
        units = [f"{1e6 * of_phase.units[site]:.3f}" for site in times.named().values()]
        checks = (f"{of_phase.predicted:.3f}", f"{of_phase.measured:.3f}")
        table.add_row(
            f"{phase} of one {'token' if phase == 'decode' else 'prompt'}",
            f"{1e3 * of_phase.total:,.2f}",
            *units,
            *checks,
        )
    print_(table)
    where = times.environment
    print_(
        f"{where['device']}, {where['threads']} threads, {where['dtype']}; batch {times.batch_size}, prompt "
        f"{times.prompt}; stored for `budget: {{latency: ...}}`. The last columns are the time of a model with half of "
        "its units over the dense model's."
    )


def _expected(name: str, expected: float | None) -> str:
    if expected is None or name not in ("prefill", "decode", "first_token"):
        return ""
    return f"{expected if name != 'first_token' else 1 / expected:.3f}"


def _macs(macs: int | None, digits: int) -> str:
    return "unknown" if macs is None else f"{macs / 1e9:,.{digits}f}"


def _quartiles(times: Any, scale: float = 1, digits: int = 1) -> str:
    median, low, high = (f"{scale * value:,.{digits}f}" for value in (times.median, times.low, times.high))
    return f"{median} [{low}, {high}]"


_ROWS: tuple[tuple[str, str, Any], ...] = (
    ("parameters", "params", lambda speed: f"{speed.params:,}"),
    ("parameters read per token", "read_params", lambda speed: f"{speed.read_params:,}"),
    ("GMACs per prompt", "prefill_macs", lambda speed: _macs(speed.prefill_macs, 3)),
    ("GMACs per token", "decode_macs", lambda speed: _macs(speed.decode_macs, 4)),
    ("peak memory, MB", "peak", lambda speed: "unknown" if speed.peak is None else f"{speed.peak / 1e6:,.1f}"),
    ("prefill, tokens/s", "prefill", lambda speed: _quartiles(speed.prefill)),
    ("decode, tokens/s", "decode", lambda speed: _quartiles(speed.decode)),
    ("first token, ms", "first_token", lambda speed: _quartiles(speed.first_token, 1000)),
)
"""Label of a row, its name among the ratios, and how a model's value is shown."""
