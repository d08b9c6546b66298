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

if TYPE_CHECKING:
    from flapkit.run.bench import BenchResult


@app.command()
def bench(
    checkpoint: CheckpointArgument,
    against: Annotated[str | None, typer.Option(metavar="DENSE", help="The dense model, to time in turns.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that are then generated.")] = 64,
    repetitions: Annotated[int, typer.Option(min=1, help="How often each model is timed.")] = 7,
    warm_up: Annotated[int, typer.Option(min=0, help="Turns before, which do not count.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads on a CPU; torch's own choice if left out.")
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where.")] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"], typer.Option(help="Type of the weights of both models.")
    ] = "auto",
    compile_: Annotated[bool, typer.Option("--compile", help="Run the models through torch.compile.")] = False,
    as_json: AsJson = False,
    output: OutputFile = None,
) -> None:
    """Time a model: prefill, decode, first token, memory; against the dense one, and against what was promised."""
    import torch

    from flapkit.evaluation.speed import Workload, turns
    from flapkit.run.bench import bench as time_models
    from flapkit.system.progress import Progress

    set_logging(quiet=True, verbose=False)
    if output is not None:
        check_new(output)
    if threads is not None:
        torch.set_num_threads(threads)
    workload = Workload(batch_size, prompt, tokens, repetitions, warm_up)
    progress = Progress(progress_listener(quiet=as_json))
    with progress.stage("bench", turns(1 if against is None else 2, workload), "turns") as stage:
        found = time_models(
            checkpoint, against, workload, device=device, dtype=dtype, compiled=compile_, tick=stage.advance
        )
    if output is not None:
        write_new(output, found.to_json())
    sys.stdout.write(found.to_json()) if as_json else _print(found)


def _print(found: BenchResult) -> None:
    columns = ["dense", "checkpoint"] if found.against is not None else ["checkpoint"]
    title = found.checkpoint + (f" against {found.against}" if found.against is not None else "")
    table = Table("", *columns, *(["ratio", "promised"] if found.against is not None else []), title=title)
    speeds = [found.speeds[path] for path in (found.against, found.checkpoint) if path is not None]
    for label, name, show in _ROWS:
        ratio = f"{found.ratios[name]:.3f}" if name in found.ratios else ""
        promised = _promise(name, found.promised)
        table.add_row(label, *(show(speed) for speed in speeds), *([ratio, promised] if found.against else []))
    print_(table)
    where, work = found.environment, found.workload
    print_(
        f"{where['device']}, {where['threads']} threads of {where['processors']} processors, {where['dtype']}"
        f"{', compiled' if where['compiled'] else ''}; batch {work.batch_size}, prompt {work.prompt}, then "
        f"{work.tokens} tokens; medians [quartiles] of {work.repetitions} turns after {work.warm_up} of warm-up"
    )


def _promise(name: str, promised: float | None) -> str:
    if promised is None or name not in ("prefill", "decode", "first_token"):
        return ""
    return f"{promised if name != 'first_token' else 1 / promised:.3f}"


def _spread(spread: Any, scale: float = 1, digits: int = 1) -> str:
    median, low, high = (f"{scale * value:,.{digits}f}" for value in (spread.median, spread.low, spread.high))
    return f"{median} [{low}, {high}]"


_ROWS: tuple[tuple[str, str, Any], ...] = (
    ("parameters", "params", lambda speed: f"{speed.params:,}"),
    ("parameters that a token reads", "read_params", lambda speed: f"{speed.read_params:,}"),
    ("GMACs of the prompt", "prefill_macs", lambda speed: f"{speed.prefill_macs / 1e9:,.3f}"),
    ("GMACs of a token", "decode_macs", lambda speed: f"{speed.decode_macs / 1e9:,.4f}"),
    ("peak memory, MB", "peak", lambda speed: "unknown" if speed.peak is None else f"{speed.peak / 1e6:,.1f}"),
    ("prefill, tokens/s", "prefill", lambda speed: _spread(speed.prefill)),
    ("decode, tokens/s", "decode", lambda speed: _spread(speed.decode)),
    ("first token, ms", "first_token", lambda speed: _spread(speed.first_token, 1000)),
)
"""Label, name among the ratios, and how a model's figure is shown."""
