"""Draw the picture of the method, in light and in dark colours; ``docs/generate.py`` writes the files."""

from __future__ import annotations

WIDTH = 440
BAND = 14
"""Width of the weights of one head or neuron in the picture."""

LIGHT = {
    "text": "#1b2433",
    "soft": "#55617a",
    "line": "#8b97ad",
    "kept": "#dbe4fb",
    "gone": "#f2a65a",
    "site": "#f6f8fc",
}
DARK = {
    "text": "#eceff6",
    "soft": "#b3bccd",
    "line": "#7683a0",
    "kept": "#3a4a78",
    "gone": "#d9822b",
    "site": "#262b3a",
}

STEPS = [
    ("calibrate", "statistics of the inputs of each consumer"),
    ("score", "a metric: how much each channel matters"),
    ("plan", "a searcher: the units to keep, within the budget"),
    ("repair", "a compensator: new weights of the consumers"),
    ("slice", "smaller tensors, and a checkpoint that loads"),
]


def method(colours: dict[str, str]) -> str:
    """Draw two sites of a layer with a unit of each, and the stages that prune them."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 574" font-family="sans-serif" font-size="13" '
        'role="img" aria-label="The two sites of a decoder layer. At the attention a unit is a key/value head with its '
        "query heads, at the MLP an intermediate channel: rows of the projections before, and columns of the consumer. "
        'Below, the stages: calibrate, score, plan, repair, slice.">',
        *_site(6, 198, "site: the attention of a layer", colours),
        *_matrices(48, {"q_proj": (6, [2, 3]), "k_proj": (3, [1]), "v_proj": (3, [1])}, ("o_proj", 6, [2, 3]), colours),
        _text(20, 190, "unit: a key/value head with its query heads", colours["text"], mark=colours["gone"]),
        *_site(212, 192, "site: the MLP of a layer", colours),
        *_matrices(254, {"gate_proj": (6, [4]), "up_proj": (6, [4])}, ("down_proj", 6, [4]), colours),
        _text(20, 390, "unit: an intermediate channel", colours["text"], mark=colours["gone"]),
        *_stages(426, colours),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _site(top: int, height: int, title: str, colours: dict[str, str]) -> list[str]:
    return [
        f'<rect x="6" y="{top}" width="{WIDTH - 12}" height="{height}" rx="8" fill="{colours["site"]}" '
        f'stroke="{colours["line"]}"/>',
        _text(20, top + 24, title, colours["text"], bold=True),
    ]


def _matrices(
    top: int,
    producers: dict[str, tuple[int, list[int]]],
    consumer: tuple[str, int, list[int]],
    colours: dict[str, str],
) -> list[str]:
    """Draw the projections before, whose rows belong to units, and the consumer, whose columns do."""
    lines, tall = [], 6 * BAND
    for index, (name, (bands, gone)) in enumerate(producers.items()):
        x = 20 + 72 * index
        for band in range(bands):
            lines.append(_cell(x, top + band * BAND, 58, BAND, band in gone, colours))
        lines.append(_text(x + 29, top + tall + 18, name, colours["soft"], middle=True))
    name, bands, gone = consumer
    x, y = 318, top + 14
    for band in range(bands):
        lines.append(_cell(x + band * BAND, y, BAND, 56, band in gone, colours))
    lines.append(_text(x + bands * BAND / 2, top + tall + 18, name, colours["soft"], middle=True))
    lines.append(_text(x + bands * BAND / 2, top + 4, "consumer", colours["text"], middle=True))
    end = 20 + 72 * len(producers)
    lines += [
        f'<path d="M{end} {top + 42}H{x - 14}" stroke="{colours["line"]}" stroke-width="2"/>',
        f'<path d="M{x - 16} {top + 36}l10 6l-10 6z" fill="{colours["line"]}"/>',
        _text((end + x - 14) / 2, top + 34, "channels", colours["soft"], middle=True),
    ]
    return lines


def _stages(top: int, colours: dict[str, str]) -> list[str]:
    lines = []
    for index, (name, meaning) in enumerate(STEPS):
        y = top + 33 * index
        lines += [
            f'<circle cx="20" cy="{y}" r="11" fill="{colours["kept"]}" stroke="{colours["line"]}"/>',
            _text(20, y + 4.5, str(index + 1), colours["text"], middle=True),
            _text(40, y + 4.5, name, colours["text"], bold=True),
            _text(118, y + 4.5, meaning, colours["soft"]),
        ]
        if index:
            lines.append(f'<path d="M20 {y - 22}v11" stroke="{colours["line"]}" stroke-width="2"/>')
    return lines


def _cell(x: float, y: float, width: float, height: float, gone: bool, colours: dict[str, str]) -> str:
    fill = colours["gone" if gone else "kept"]
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" stroke="{colours["line"]}"/>'


def _text(
    x: float, y: float, words: str, colour: str, *, bold: bool = False, middle: bool = False, mark: str = ""
) -> str:
    square = f'<rect x="{x}" y="{y - 10}" width="11" height="11" fill="{mark}"/>' if mark else ""
    style = ' font-weight="bold"' * bold + ' text-anchor="middle"' * middle
    return f'{square}<text x="{x + 18 * bool(mark)}" y="{y}" fill="{colour}"{style}>{words}</text>'
