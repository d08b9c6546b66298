from __future__ import annotations

import math

import pytest

from flapkit.recipe.nodes import Node, Position, parse, resolve


def read(text: str) -> tuple[Node | None, list[str]]:
    node, problems = parse(text, lambda line, column: Position("r.yaml", line, column))
    return node, [str(problem) for problem in problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("1.", 1.0),
        ("+.inf", math.inf),
        ("-.INF", -math.inf),
        ("12", 12),
        ("-12", -12),
        ("012", 12),
        ("0o17", 15),
        ("0xff", 255),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("Off", "Off"),
        ("y", "y"),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("0b1", "0b1"),
        ("nan", "nan"),
        ("inf", "inf"),
    ],
)
def test_plain_scalars_are_yaml_1_2(text: str, value: object) -> None:
    assert resolve(text) == value
    assert type(resolve(text)) is type(value)


def test_nan() -> None:
    value = resolve(".nan")
    assert isinstance(value, float)
    assert math.isnan(value)


def test_a_number_of_very_many_digits_is_no_crash() -> None:
    assert resolve("9" * 5000) == math.inf


def test_quoted_scalars_are_text() -> None:
    node, problems = read("a: \"1e-4\"\nb: 'true'\nc: |\n  5\n")
    assert not problems
    assert node is not None
    assert node.plain() == {"a": "1e-4", "b": "true", "c": "5\n"}


def test_every_value_and_key_has_its_position() -> None:
    node, _ = read("a:\n  - b: 1\n    ü: {c: x}\n")
    assert node is not None
    entry = node.child("a").child(0)  # type: ignore[union-attr]
    inner = entry.child("ü").child("c")  # type: ignore[union-attr]
    assert str(entry.position) == "r.yaml:2:5"  # type: ignore[union-attr]
    assert str(inner.position) == "r.yaml:3:12"  # type: ignore[union-attr]
    assert str(inner.key_position) == "r.yaml:3:9"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\na: 2\n", "r.yaml:2:1: a: repeated key; first used at r.yaml:1:1"),
        ("a: {b: 1, b: 1}\n", "r.yaml:1:11: a.b: repeated key; first used at r.yaml:1:5"),
        ("a: &x 1\n", "r.yaml:1:4: a: anchors such as &x are not supported; remove it"),
        ("a: [*x]\n", "r.yaml:1:5: a.0: aliases such as *x are not supported; write the value out"),
        ("a:\n  <<: {b: 1}\n", "r.yaml:2:3: a: merge keys (<<) are not supported; write the values out"),
        ("a: !!str 1\n", "r.yaml:1:4: a: tags such as tag:yaml.org,2002:str are not supported; remove it"),
        ("a: !!python/object:os.system 1\n", "r.yaml:1:4: a: tags such as"),
        ("!x a: 1\n", "r.yaml:1:1: a: tags such as !x are not supported"),
        ("a: 1\n---\nb: 1\n", "r.yaml:2:1: a second document starts here; a recipe is one document"),
        ("? [a, b]\n: 1\n", "r.yaml:1:3: a key must be a name"),
        ("a: [1\nb: 2\n", "r.yaml:2:2: not YAML: while parsing a flow sequence (which starts at r.yaml:1:4) expected"),
        ("a: b: c\n", "r.yaml:1:5: not YAML: mapping values are not allowed here"),
        ("a: 1\n\tb: 2\n", "r.yaml:2:1: not YAML: while scanning for the next token"),
        ("a: 1\nb: \x00\n", "r.yaml:2:4: not YAML: the character U+0000 is not allowed"),
        ('a: "\\UFFFFFFFF"\n', "r.yaml:1:1: not YAML: "),
        ('a: "\\ud800"\n', "r.yaml:1:4: a: half of a surrogate pair is not a character"),
        ("a: " + "[" * 30 + "]" * 30, "r.yaml:1:24: not YAML: nested over 20 levels deep"),
    ],
)
def test_what_a_recipe_may_not_hold(text: str, problem: str) -> None:
    _, problems = read(text)
    assert len(problems) == 1
    assert problems[0].startswith(problem)


def test_all_problems_of_form_are_found_at_once() -> None:
    node, problems = read("a: &x 1\nb: *x\na: 2\n")
    assert node is not None
    assert [problem.split(": ")[0] for problem in problems] == ["r.yaml:1:4", "r.yaml:2:4", "r.yaml:3:1"]
