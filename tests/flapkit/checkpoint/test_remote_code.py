from __future__ import annotations

import copy

import pytest
import torch
from classifiers import classifiers
from runs import run_without_flapkit

import flapkit
from flapkit.checkpoint.load import load_tokenizer
from flapkit.model.tiny import tiny_config, tiny_model

SCRIPT = """
import copy, inspect, os, re, sys, torch, transformers
from transformers import AutoModel, AutoModelForCausalLM
sys.modules["flapkit"] = None  # as if it were not installed
heads = [folder for folder in sys.argv[1:] if os.path.exists(folder + "/auto")]
for folder in heads:
    auto = getattr(transformers, open(folder + "/auto").read())
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    probe, logits = torch.load(folder + "/probe.pt")
    assert torch.equal(copy.deepcopy(model)(probe, attention_mask=torch.ones_like(probe))[0], logits), folder
for folder in sys.argv[1 + len(heads):]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    probe, logits = torch.load(folder + "/probe.pt"), torch.load(folder + "/logits.pt")
    assert torch.equal(copy.deepcopy(model)(probe).logits, logits), folder
    backbone = AutoModel.from_pretrained(folder, trust_remote_code=True)
    for part in type(model), type(backbone):
        annotated = inspect.get_annotations(part.__init__)
        assert all(isinstance(annotation, type) for annotation in annotated.values()), annotated
    name = type(backbone).__name__
    assert name.startswith("Flapkit") and name.endswith("Model"), name

# What the card says to write in Python.
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, pipeline
card = open("carded/README.md").read()
exec(re.search("```python\\n(.*?)```", card, re.DOTALL)[1])
assert tokenizer.decode(tokenizer("def f").input_ids) == "def f"
codes = dict(re.findall(r"^\\| (.+) \\| `(.+)` \\|$", card, re.MULTILINE))
assert eval(codes["pipelines"])("def f", max_new_tokens=2)[0]["generated_text"].startswith("def f")
assert eval(codes["classifiers"])(torch.arange(4)[None], use_cache=False).logits.shape == (1, 2)
lora = get_peft_model(model, eval(codes["PEFT"]))
assert sum("lora_A" in name for name, _ in lora.named_parameters()) == 7 * model.config.num_hidden_layers
"""


def test_loads_without_flapkit(tmp_path):
    """Plain, with query heads picked from ALiBi, and with experts that have a bias; and classifiers.

    Some of these let an Auto class build their decoder.

    What the card says of other programs is true. Annotations of the constructors are types or absent: vLLM checks
    arguments against them by ``isinstance``.
    """
    tokens = torch.randint(2, 96, (64, 12), generator=torch.Generator().manual_seed(0))
    folders = save_classifiers(tmp_path, tokens)
    for model_type in ("llama", "bloom", "mixtral"):
        model = tiny_model(tiny_config(model_type))
        folders.append(tmp_path / model_type)
        flapkit.save(model, folders[-1], flapkit.prune_(model, tokens, ratio=0.4))
        torch.save(tokens[:2], folders[-1] / "probe.pt")
        torch.save(copy.deepcopy(model)(tokens[:2]).logits.detach(), folders[-1] / "logits.pt")
    save_with_card(tmp_path / "carded")
    run_without_flapkit(SCRIPT, folders)


def save_classifiers(folder, tokens):
    """Prune and save classifiers, each with the name of its Auto class, a text and its logits; return their folders."""
    folders = []
    for auto, model in classifiers():
        folders.append(folder / f"{len(folders)}")
        flapkit.prune_(model, tokens, ratio=0.4)
        flapkit.save(model, folders[-1])
        (folders[-1] / "auto").write_text(auto)
        logits = copy.deepcopy(model)(tokens[:2], attention_mask=torch.ones_like(tokens[:2]))[0].detach()
        torch.save((tokens[:2], logits), folders[-1] / "probe.pt")
    return folders


def save_with_card(folder):
    """Prune the bundled model, which has a tokenizer."""
    model = flapkit.load("builtin:tiny-llama")
    flapkit.prune_(model, torch.randint(2, 96, (64, 12), generator=torch.Generator().manual_seed(0)), ratio=0.2)
    flapkit.save(model, folder, tokenizer=load_tokenizer("builtin:tiny-llama"))


LM_EVAL = """
import re, sys
sys.modules["flapkit"] = None  # as if it were not installed
from lm_eval.models.huggingface import HFLM
arguments = re.search("--model_args ([^ ]+) ", open("carded/README.md").read())[1]
model = HFLM.create_from_arg_string(arguments, {"device": "cpu", "batch_size": 1})
assert model.loglikelihood_rolling([type("", (), {"args": ("def f(x):",)})()])[0] < 0
"""


@pytest.mark.slow
def test_the_cards_arguments_of_lm_eval(tmp_path):
    pytest.importorskip("lm_eval")
    save_with_card(tmp_path / "carded")
    run_without_flapkit(LM_EVAL, [tmp_path / "carded"])


def test_the_code_is_short_and_imports_little(tmp_path):
    """Whoever trusts it can read it first."""
    model = tiny_model(tiny_config("llama"))
    plan = flapkit.prune_(model, torch.arange(2, 66).view(8, 8), ratio=0.4)
    flapkit.save(model, tmp_path / "pruned", plan)
    lines = (tmp_path / "pruned" / "modeling_flapkit_llama.py").read_text().splitlines()
    assert len(lines) < 450
    imported = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imported == {"__future__", "functools", "huggingface_hub", "inspect", "torch", "transformers", "typing"}
