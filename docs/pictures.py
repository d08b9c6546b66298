"""Run the commands of docs/gallery.md for the bundled model, and the tutorial, and take the pictures.

``python docs/pictures.py``; ``--run``, ``--windows``, ``--compensation`` and ``--scoreboard`` are the folders of a run
of `smollm2-flap20` and of the sweeps `smollm2-windows`, `smollm2-compensation` and `scoreboard`, for their pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import jupytext
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from flapkit.recipe.files import find_sweep
from flapkit.run.sweep.load import load_sweep
from flapkit.run.sweep.plot import draw
from flapkit.run.sweep.results import Results

HERE = Path(__file__).resolve().parent
IMAGES = HERE / "images"
RUNS = Path("runs/gallery")
TEXTS = ("WikiText-2 test", "TinyStories")
"""What the sweeps of SmolLM2 measure, in this order; where the texts are local files, their names say less."""
COMPARED = ("FLAP", "least squares", "uniform, bias", "uniform, least squares")
"""The methods of the sweep `smollm2-compensation` that docs/presets.md shows."""
SCORED = ("layers", "Wanda-sp", "LLM-Pruner's taylor", "FLAP", "uniform", "least squares")
"""The methods of the scoreboard that docs/sweeps.md shows: without magnitude, whose perplexities are millions."""


def commands() -> list[list[str]]:
    """List the page's commands on the bundled model."""
    blocks = re.findall(
        r"^```\n(.*?)^```$", (HERE / "gallery.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    return [shlex.split(line) for block in blocks for line in block.splitlines() if "smollm2" not in line]


def sections(page: Page, report: Path, names: list[str], picture: str) -> None:
    """Take a picture of a report from the first of its parts to the last."""
    page.goto(report.resolve().as_uri())
    page.wait_for_selector(".chart svg")
    boxes = [page.locator(name).first.bounding_box() for name in names]
    top, bottom = min(box["y"] for box in boxes), max(box["y"] + box["height"] for box in boxes)
    clip = {"x": 0, "y": max(0, top - 16), "width": 1120, "height": bottom - max(0, top - 16) + 16}
    page.screenshot(path=IMAGES / picture, clip=clip, full_page=True)


def plot(sweep: str, folder: Path, picture: str, methods: Collection[str] = ()) -> None:
    """Draw the results of a sweep of SmolLM2 with the names of its texts; all methods, or those that are named."""
    loaded = load_sweep(find_sweep(sweep))
    rows = [row for row in Results(folder).rows.values() if not methods or row.method in methods]
    measured = dict.fromkeys(text for row in rows for text in row.perplexity)
    titles = {text: f"{name}, {text.partition(', ')[2]}" for text, name in zip(measured, TEXTS, strict=True)}
    titled = [replace(row, perplexity={titles[text]: value for text, value in row.perplexity.items()}) for row in rows]
    (IMAGES / picture).write_bytes(draw(titled, loaded.keys, loaded.file.plot, "png"))


def tutorial() -> None:
    """Run the tutorial, and keep its picture."""
    code = [cell.source for cell in jupytext.read(HERE / "tutorial.md").cells if cell.cell_type == "code"]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        exec("\n".join(code), {"__name__": "__main__"})
        shutil.copy("plan.png", IMAGES / "tutorial-plan.png")


def main() -> None:
    """Run what has not run yet, and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--windows", type=Path)
    parser.add_argument("--compensation", type=Path)
    parser.add_argument("--scoreboard", type=Path)
    given = parser.parse_args()
    flapkit = [sys.executable, "-m", "flapkit"]
    for _, *command in commands():
        output = Path(command[-1].removeprefix("output="))
        if output.suffix == ".html" or not output.exists():
            subprocess.run([*flapkit, *command], check=True)
    tutorial()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1120, "height": 900}, color_scheme="light")
        run = RUNS / "flap20" / "report.html"
        sections(page, run, ["header", "section:has(> #structure)"], "report.png")
        sections(page, run, ["section:has(> #errors)", "section:has(> #perplexity)"], "report-errors.png")
        both = ["section:has(> #tradeoff)", "section:has(> #structure)"]
        sections(page, RUNS / "comparison.html", both, "comparison.png")
        if given.run:
            report = RUNS / "30-layers.html"
            subprocess.run([*flapkit, "report", str(given.run), "-o", str(report)], check=True)
            sections(page, report, ["header", "section:has(> #structure)"], "report-30-layers.png")
        browser.close()
    if given.windows:
        plot("smollm2-windows", given.windows, "sweep.png")
    if given.compensation:
        plot("smollm2-compensation", given.compensation, "smollm2-compensation.png", COMPARED)
    if given.scoreboard:
        plot("scoreboard", given.scoreboard, "scoreboard.png", SCORED)
    for path in IMAGES.glob("*.png"):
        with Image.open(path) as image:
            image.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(path, optimize=True)


if __name__ == "__main__":
    main()
