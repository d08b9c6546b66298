"""The code blocks of the pages, and what tests do with each: ``python tests/blocks.py`` counts them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if "plugin-template" not in path.parts),
]
NOTEBOOK = "docs/tutorial.md"
GENERATED = ("docs/cli.md", "docs/recipes.md", "docs/components.md")
"""Pages that show what commands print."""

PLUGINS = (
    "README.md: # my_metric",
    "docs/architectures.md: from flapkit",
    "docs/how-to/layers.md",
    "docs/how-to/statistic.md: # largest",
    "docs/interfaces/",
)
"""Snippets of Python that are plugins, which tests load."""

OUTLINES = ("docs/architecture.md: def prune_",)
"""Snippets of Python with parts left out."""

SHOWN = {
    "docs/cluster.md: weights 1.64 GB": "measured",
    "docs/interfaces/adapters.md: Block(": "a part of a declaration",
    "docs/presets.md: preset ": "measured",
    "docs/quantise.md: export compressed-tensors: ": "a message",
    "docs/security.md: error: model": "a message",
    "docs/serving.md: $ curl ": "measured",
    "docs/evaluation.md: params": "an outline of result.json",
    "docs/layerwise.md: weights 4.40 GB": "measured",
    "docs/layerwise.md: error: whole.yaml": "measured",
}
"""Blocks that show what was printed, and that no test repeats -> the reason."""

OURS = {"flapkit", "make", "python"}
"""Programs whose arguments the tests check; they start none of the others."""

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
COMMAND = re.compile(
    r"^(?:\$ |torchrun .* -m |srun (?:.* )?)?(flapkit|make|python|jupytext|lm_eval|pip|vllm)(?: |$)(.*)"
)


@dataclass(frozen=True)
class CodeBlock:
    """A block of code of a page."""

    page: str
    language: str
    code: str

    @property
    def place(self) -> str:
        """The page and the first line."""
        return f"{self.page}: {self.code.strip().partition(chr(10))[0]}"

    @property
    def commands(self) -> list[tuple[str, str]]:
        """The command lines: program and arguments; none in a block of another language, or that shows output."""
        if self.language not in ("", "bash", "sh") or self.page in GENERATED:
            return []
        lines = [line for line in self.code.replace("\\\n", " ").splitlines() if line.strip()]
        found = [COMMAND.match(line) for line in lines]
        return [(match[1], match[2]) for match in found if match]

    @property
    def test(self) -> str:
        """What a test does with the block, or after `no: ` why none does anything; empty where nothing is known."""
        if self.page in GENERATED:
            return "is compared with what the code generates"
        if self.language == "python":
            outline = self.place.startswith(OUTLINES)
            plugin = "is loaded as a plugin" if self.place.startswith(PLUGINS) else "runs"
            return "no: an outline" if outline else plugin
        if self.language in ("yaml", "json"):
            return "is read and checked"
        programs = {program for program, _ in self.commands}
        if programs:
            return "has commands that are checked" if programs & OURS else "no: programs of others"
        if self.page == NOTEBOOK:
            return "is compared with what the notebook prints"
        for place, reason in SHOWN.items():
            if self.place.startswith(place):
                return f"no: {reason}"
        return "is compared with the message" if self.place.startswith("docs/architectures.md: layers.0.mlp") else ""


def blocks(*pages: Path) -> Iterator[CodeBlock]:
    """List the blocks of pages, by default of all."""
    for page in pages or PAGES:
        for language, code in BLOCK.findall(page.read_text(encoding="utf-8")):
            yield CodeBlock(page.relative_to(ROOT).as_posix(), language, code)


def main() -> None:
    """Print how many blocks there are, by what a test does with them."""
    counts = Counter(block.test for block in blocks())
    tested = sum(count for test, count in counts.items() if not test.startswith("no: "))
    print(f"{sum(counts.values())} blocks of code, {tested} of them tested")
    for test, count in counts.most_common():
        print(f"{count:4} {test}")


if __name__ == "__main__":
    main()
