"""Run every family in vLLM, dense and pruned, and write the table: ``python docs/measure_serving.py [FAMILY ...]``.

It needs the environment of ``make test-serve``. With names, the rows of the other families stay. A tiny random model of
each family is saved as it is, and pruned; vLLM's greedy tokens and the log-probabilities that it gives to the prompts
are compared with transformers'.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flapkit.model.plan import PruningPlan
    from flapkit.model.site import Site

PAGE = Path(__file__).parent / "serving.md"
BEGIN, END = "<!-- table -->", "<!-- end of the table -->"
FORMS = ("dense", "pruned")
TOLERANCE = 1e-3
"""Largest difference of a log-probability."""

TOKENS = 16
"""Tokens to generate."""

SIZES = {
    "vocab_size": 128,
    "hidden_size": 384,
    "word_embed_proj_dim": 384,
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
    "num_kv_heads": 3,
    "head_dim": 32,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "n_inner": 96,
    "rotary_dim": 16,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "kv_lora_rank": 512,
    "v_head_dim": 64,
    "query_pre_attn_scalar": 32,
    "num_hidden_layers": 2,
}
"""Sizes of the models: vLLM's attention on a CPU has heads of at least 32 channels, its latent attention 512 + 64."""


UNTRIED = ("granitemoehybrid", "nemotron_h", "qwen3_next")
"""Hybrids: sizes that vLLM takes do not fit their other layers as they are."""


@dataclass(frozen=True)
class Case:
    """A folder for vLLM, and what transformers computes from it.

    Args:
        folder: the model's folder.
        prompts: token ids.
        tokens: the greedy continuations.
        logprobs: the log-probability of each token of a prompt but the first.
        options: of ``vllm.LLM``.
    """

    folder: str
    prompts: Sequence[Sequence[int]]
    tokens: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[float]]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Served:
    """What vLLM made of a case: the largest difference of a log-probability, or the reason why it did not run."""

    difference: float | None
    same_tokens: bool
    error: str = ""

    @property
    def works(self) -> bool:
        """Whether tokens and log-probabilities are transformers'."""
        return self.same_tokens and self.difference is not None and self.difference <= TOLERANCE

    def __str__(self) -> str:
        """Return the cell of the table."""
        if self.error:
            return f"no: {reason(self.error)}"
        figure = f"{self.difference:.0e}"
        return figure if self.works else f"wrong: {figure}" + ("" if self.same_tokens else ", other tokens")


REASONS = {
    "is not compatible with vLLM": "its class does not use transformers' attention interface",
    "are not supported for now": "its class does not use transformers' attention interface",
    "Heterogeneous MLA": "vLLM's latent attention needs layers that do not differ",
    "intermediate_size' is a per-layer attribute": "vLLM's experts have the same width in all layers",
    "does not dispatch through": "a layer without attention",
    "from checkpoint: {": "vLLM does not load its projections of the type `Conv1D`",
}
"""Part of vLLM's message -> the reason on the page."""


def reason(error: str) -> str:
    """Name the reason of an error of vLLM's."""
    return next((text for part, text in REASONS.items() if part in error), error.splitlines()[0][:120])


def reference(model: Any, folder: Path, prompts: Sequence[Sequence[int]], **options: Any) -> Case:
    """Compute in transformers what vLLM is to compute.

    Attention is computed by transformers' plain code: the faster ones leave out the soft cap of Gemma 2. The greedy
    text goes on after an end token, as in vLLM with ``ignore_eos``.
    """
    import torch

    model.set_attn_implementation("eager")
    tokens, logprobs = [], []
    end, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            likely = model(ids).logits[0].float().log_softmax(-1)
            settings = {"do_sample": False, "max_new_tokens": TOKENS, "pad_token_id": 0}
            answer = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        tokens.append(answer[0, len(prompt) :].tolist())
        logprobs.append([float(likely[at, token]) for at, token in enumerate(prompt[1:])])
    model.generation_config.eos_token_id = end
    return Case(str(folder.resolve()), prompts, tokens, logprobs, options)


def tiny_cases(family: str, folder: Path) -> Iterator[tuple[str, Case]]:
    """Save tiny random models of a family: dense, and pruned with biases. Yield each with the name of its form."""
    import torch

    import flapkit
    from flapkit.model.surgery import Correction, apply_plan_
    from flapkit.model.tiny import tiny_config, tiny_model
    from flapkit.registry import ADAPTER, Registry

    names, values = tiny_config(family).attribute_map, tiny_config(family).to_dict()
    changes = {name: size for name, size in SIZES.items() if values.get(names.get(name, name)) is not None}
    if values.get("layer_types"):
        del changes["num_hidden_layers"]
    if values.get("kv_lora_rank"):
        changes["num_key_value_heads"] = changes["num_attention_heads"]
        changes |= {"head_dim": SIZES["qk_rope_head_dim"]} if "head_dim" in changes else {}
    model = tiny_model(tiny_config(family, **changes))
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, 128, (length,), generator=draw).tolist() for length in (9, 5)]
    model.save_pretrained(folder / "dense")
    yield "dense", reference(model, folder / "dense", prompts, model_impl="transformers")
    sites = Registry.load().create(ADAPTER, family).sites(model.config)
    biases = {site.name: Correction(bias=0.1 * torch.randn(site.out_features, generator=draw)) for site in sites}
    apply_plan_(model, sites, uneven_plan(sites), biases)
    flapkit.save(model, folder / "pruned")
    yield "pruned", reference(model, folder / "pruned", prompts)


def uneven_plan(sites: Sequence[Site]) -> PruningPlan:
    """Keep random units; the layers differ in heads, if there are several with attention and more than two units."""
    from flapkit.model.verify import random_plan

    heads = [site.name for site in sites if site.kind == "attention"]
    plans = [random_plan(sites, seed) for seed in range(20)]
    return max(plans, key=lambda plan: len({len(plan.keep[name]) for name in heads}))


def serve(cases: Iterable[Case]) -> Iterator[Served]:
    """Run cases in vLLM, one after the other, in a process of its own that cannot import flapkit."""
    command = [sys.executable, __file__, "--worker"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    settings |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    with (
        tempfile.TemporaryDirectory() as home,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **settings, "HF_HOME": home},
        ) as worker,
    ):
        assert worker.stdin
        assert worker.stdout
        for case in cases:
            worker.stdin.write(json.dumps(asdict(case)) + "\n")
            worker.stdin.flush()
            line = next((line for line in worker.stdout if line.startswith("SERVED ")), None)
            if line is None:
                raise RuntimeError(f"{case.folder}: vLLM's process ended with exit code {worker.wait()}")
            yield Served(**json.loads(line.removeprefix("SERVED ")))
        worker.stdin.close()


def _work() -> None:
    """Run the cases that stdin names, one a line."""
    sys.modules["flapkit"] = None  # type: ignore[assignment]  # as if it were not installed
    from vllm.distributed import cleanup_dist_env_and_memory

    for line in sys.stdin:
        case = Case(**json.loads(line))
        try:
            served = _run(case)
        except Exception as error:  # noqa: BLE001 - vLLM may raise anything, and its message is the result
            served = Served(None, False, f"{type(error).__name__}: {error}")
        cleanup_dist_env_and_memory()
        print("SERVED", json.dumps(asdict(served)), flush=True)


def _run(case: Case) -> Served:
    from vllm import LLM, SamplingParams

    llm = LLM(
        case.folder,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=4,
        enforce_eager=True,
        trust_remote_code=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        **case.options,
    )
    settings = SamplingParams(
        temperature=0, max_tokens=TOKENS, ignore_eos=True, prompt_logprobs=0, logprobs=0, detokenize=False
    )
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in case.prompts], settings, use_tqdm=False)
    pairs = [
        (place[token].logprob, expected)
        for answer, likely in zip(answers, case.logprobs, strict=True)
        for place, token, expected in zip(answer.prompt_logprobs[1:], answer.prompt_token_ids[1:], likely, strict=True)
    ]
    tokens = [list(answer.outputs[0].token_ids) for answer in answers]
    return Served(max(abs(one - other) for one, other in pairs), tokens == case.tokens)


def families() -> list[str]:
    """List the families of language models that come with flapkit; with a vision tower, vLLM needs more than text."""
    from flapkit.model.tiny import tiny_config
    from flapkit.registry import ADAPTER, Registry

    names = [name for name in Registry.load().names(ADAPTER) if name not in ("auto", "vicuna", *UNTRIED)]
    return [name for name in names if (config := tiny_config(name)).get_text_config() is config]


def measure(names: Sequence[str]) -> Iterator[tuple[str, str, Served]]:
    """Yield each family, each of its forms, and what vLLM made of it."""
    made: list[tuple[str, str]] = []

    def cases(folder: Path) -> Iterator[Case]:
        for name in names:
            for form, case in tiny_cases(name, folder / name):
                made.append((name, form))
                yield case

    with tempfile.TemporaryDirectory() as temporary:
        for served in serve(cases(Path(temporary))):
            yield *made[-1], served


def row(name: str, outcomes: Mapping[str, Served]) -> str:
    """Write a family's row."""
    cells = [f"`{name}`", *(str(outcomes[form]) if form in outcomes else "" for form in FORMS)]
    return f"| {' | '.join(cells)} |"


def rows_of_page() -> dict[str, str]:
    """Read the rows of the page, by family."""
    table = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    return {line.split("`")[1]: line for line in table.splitlines() if line.startswith("| `")}


def write_page(rows: Mapping[str, str]) -> None:
    """Replace the page's table."""
    versions = ", ".join(f"{package} {version(package)}" for package in ("vllm-cpu", "transformers", "torch"))
    head = [BEGIN, "", f"With {versions}:", "", f"| family | {' | '.join(FORMS)} |", f"|{'---|' * (len(FORMS) + 1)}"]
    table = "\n".join([*head, *(rows[name] for name in families() if name in rows), "", END])
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + table + rest.partition(END)[2], encoding="utf-8")


def main(names: Sequence[str]) -> None:
    """Measure families, and write their rows."""
    warnings.simplefilter("ignore")
    rows, outcomes = rows_of_page(), dict[str, dict[str, Served]]()
    for name, form, served in measure(names or families()):
        outcomes.setdefault(name, {})[form] = served
        print(name, form, served, served.error[:300], flush=True)
        rows[name] = row(name, outcomes[name])
        write_page(rows)


if __name__ == "__main__":
    _work() if sys.argv[1:] == ["--worker"] else main(sys.argv[1:])
