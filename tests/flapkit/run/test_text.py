"""How evaluations are named, and prompts become text."""

from __future__ import annotations

import json

import pytest
from conftest import write_recipe
from flapkit_adapters.vicuna import SYSTEM, Vicuna

from flapkit.checkpoint.load import load, load_tokenizer
from flapkit.evaluation.samples import write_samples
from flapkit.pruning.components import recovery_of
from flapkit.recipe.load import load_recipe
from flapkit.recipe.schema import Evaluate, Perplexity, Samples
from flapkit.run.check import check
from flapkit.run.pipeline import run
from flapkit.run.text import (
    check_evaluation,
    check_text,
    name_evaluations,
    recovery_source,
    render_prompts,
    renderer,
)
from flapkit.system.errors import DataError, RecipeError

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
MESSAGES = [{"role": "user", "content": "What?"}]


@pytest.fixture
def tokenizer():
    """The bundled model's, with a chat template."""
    made = load_tokenizer("builtin:tiny-llama")
    made.chat_template = TEMPLATE
    return made


def samples(*prompts):
    return Samples.model_validate_json(json.dumps({"prompts": prompts, "tokens": 4}))


def test_names_say_what_is_measured():
    texts = [
        Perplexity(dataset="stdlib", split="heldout", length=64),
        Perplexity(dataset="stdlib", length=64, stride=32),
    ]
    assert list(name_evaluations(texts)) == ["stdlib heldout, 64 tokens", "stdlib, 64 tokens, stride 32"]


def test_a_missing_file_is_named_with_its_key_and_folder(home):
    missing = home / "none.txt"
    with pytest.raises(DataError, match=f"^evaluate.perplexity.1: {missing}: file or folder not found"):
        check_evaluation(Evaluate(perplexity=(Perplexity(dataset="stdlib"), Perplexity(dataset="./none.txt"))))
    with pytest.raises(DataError, match=f"^calibration: {missing}: file or folder not found"):
        check_text(load_recipe(write_recipe(home), ["calibration.dataset=none.txt"]).recipe)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("dataset: none.txt", "recovery text"),
        ("dataset: stdlib, validation: {dataset: none.txt}", "validation text of the recovery"),
    ],
)
def test_a_missing_recovery_text_is_named_before_anything_runs(home, options, text):
    recipe = load_recipe(write_recipe(home), [f"compensator=[bias, {{name: lora, {options}}}]"])
    with pytest.raises(DataError, match=f"^{text}: {home / 'none.txt'}: file or folder not found"):
        recovery_source(recovery_of(recipe.compensators).training, recipe.recipe)


def test_equal_names_are_numbered():
    texts = [Perplexity(dataset="stdlib", batch_size=size) for size in (1, 2, 3)]
    names = name_evaluations(texts)
    assert list(names) == ["stdlib, 128 tokens", "stdlib, 128 tokens #2", "stdlib, 128 tokens #3"]
    assert [text.batch_size for text in names.values()] == [1, 2, 3]


def test_a_conversation_ends_where_the_answer_begins(tokenizer):
    assert render_prompts(samples("def", MESSAGES), None, tokenizer) == ["def", "<s>user\nWhat?</s><s>assistant\n"]
    assert render_prompts(None, None, tokenizer) == []


def test_an_answered_conversation_begins_with_its_prompt(tokenizer):
    """What calibration reads and what samples continue is one format."""
    answered = [*MESSAGES, {"role": "assistant", "content": "That."}]
    for adapter in (None, Vicuna()):
        (prompt,) = render_prompts(samples(MESSAGES), adapter, tokenizer)
        assert renderer(adapter, tokenizer)(answered).startswith(prompt)


def test_the_adapters_format_comes_first(tokenizer):
    (prompt,) = render_prompts(samples(MESSAGES), Vicuna(), tokenizer)
    assert prompt == f"<s>{SYSTEM} USER: What? ASSISTANT:"


def test_a_rendered_prompt_has_one_start_token(tokenizer):
    seen = []
    model = load("builtin:tiny-llama", "float32")
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    tokenizer.add_bos_token = True
    (prompt,) = render_prompts(samples(MESSAGES), None, tokenizer)
    list(write_samples(model, tokenizer, [prompt], tokens=1))
    assert seen[0][0].tolist() == tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_a_model_without_a_format_refuses_before_it_runs(home):
    recipe = load_recipe(write_recipe(home, evaluate={"samples": {"prompts": [MESSAGES], "tokens": 4}}))
    for command in (check, run):
        with pytest.raises(DataError, match=r"evaluate.samples.prompts: the model has no format for conversations"):
            command(recipe)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([{"role": "robot", "content": "x"}], "prompts"),
        ([{"role": "user"}], "content"),
        ([*MESSAGES, {"role": "assistant", "content": "x"}], "the last message of a prompt has to be the user's"),
        ([], "prompts"),
    ],
)
def test_what_is_no_conversation(home, prompt, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write_recipe(home, evaluate={"samples": {"prompts": [prompt]}}))


def test_a_run_answers_conversations(home, tokenizer):
    load("builtin:tiny-llama").save_pretrained(home / "chat")
    tokenizer.save_pretrained(home / "chat")
    evaluate = {"samples": {"prompts": ["def", MESSAGES], "tokens": 4}}
    record = run(load_recipe(write_recipe(home, model={"path": "./chat"}, evaluate=evaluate)))
    assert [sample.prompt for sample in record.samples] == ["def", "user: What?"]
    assert all(sample.dense and sample.pruned for sample in record.samples)
