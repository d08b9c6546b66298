"""GGUF: a pruned model for llama.cpp, with layers of different sizes."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from flapkit.interfaces import (
    Checkpoint,
    Count,
    Exporter,
    ModelError,
    Prospect,
    RunError,
    Runner,
    Site,
    dense_config,
    open_weights,
)
from flapkit_exporters.gguf_rope import add_rope
from flapkit_exporters.gguf_vocabulary import add_vocabulary, compare_vocabulary
from flapkit_exporters.llama_cpp_quiet import load_llama_cpp
from flapkit_exporters.padding import Sizes, padder, rounded_up, sizes_of

Type = Literal["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_M", "Q2_K", "Q4_0"]
UNQUANTISED = ("F32", "F16", "BF16")

FAMILIES = ("llama", "mistral", "qwen2", "seed_oss")
"""Families that compute what llama.cpp's architecture ``deci`` computes, but for the order of q's and k's rows."""

OWN = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
"""Families whose own architecture can be written -> llama.cpp's name of it."""

PAIRED = ("llama",)
"""Architectures of llama.cpp whose rotary embedding turns pairs of rows, not halves."""

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""transformers' modules -> GGUF's tensors; those of a layer go without its prefix."""

CONTEXT = 512
"""llama.cpp's context length in tokens when an export is verified."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GGUF(Exporter):
    """A GGUF file for llama.cpp, in its architecture `deci`, which supports layers of different sizes.

    Args:
        type: data type of the matrices; norms and biases stay in F32.
        pad_to: pad each layer's attention output and MLP with zeros to a multiple of this; the result is the same.
            llama.cpp's quantised types need rows of a multiple of 32 (Q8_0, Q4_0) or 256 (K) values.
        architecture: llama.cpp's `deci`, or `own` for that of the model, if all layers have the same size.
        pre: llama.cpp's name of the pre-tokenizer of a byte-level BPE tokenizer.
    """

    name = "gguf"
    suffix = ".gguf"
    extra = "gguf"

    type: Annotated[Type, Field(description="Data type of the matrices; norms and biases stay in F32.")] = "F16"
    pad_to: Annotated[
        Count,
        Field(
            ge=1,
            description="Pad attention outputs and MLPs with zeros to a multiple of this; use 32 or 256 for quantised "
            "types.",
        ),
    ] = 1
    architecture: Annotated[
        Literal["deci", "own"],
        Field(
            description="`deci` supports layers of different sizes; `own` is the model's own, which more programs "
            "read: it needs layers of equal size, and no bias that the model did not have."
        ),
    ] = "deci"
    pre: Annotated[
        str | None, Field(description="llama.cpp's name of a BPE tokenizer's pre-tokenizer; detected by default.")
    ] = None

    @property
    def packages(self) -> Sequence[str]:
        """gguf; and llama-cpp-python to quantise, or to verify the export."""
        return ["gguf", "llama_cpp"] if self.verify or self.type not in UNQUANTISED else ["gguf"]

    @property
    def label(self) -> str:
        """The name with the data type: one file per type."""
        return f"{self.name}-{self.type}"

    @property
    def tolerance(self) -> float | None:
        """The effect of rounding to 24, 11 or 8 bits; for quantised types the difference is reported only."""
        return {"F32": 1e-4, "F16": 2e-2, "BF16": 8e-2}.get(self.type)

    def check(self, prospect: Prospect) -> None:
        """Refuse models that llama.cpp's `deci` architecture cannot run."""
        config = prospect.config
        if prospect.family not in FAMILIES:
            raise ModelError(
                f"export gguf: llama.cpp has no architecture with layers of different sizes for "
                f"{prospect.family!r} models (known: {', '.join(FAMILIES)}); if all layers have the same size, export "
                "to hf-stock and convert the result with llama.cpp's convert_hf_to_gguf.py"
            )
        if prospect.removed:
            raise ModelError(
                f"export gguf: {prospect.removed[0]} is gone altogether, all but its bias, and llama.cpp's `deci` has "
                "no bias where it has no attention or MLP; export to hf, or prune with searcher.min_units 1"
            )
        if self.architecture == "own" and prospect.family not in OWN:
            raise ModelError(
                f"export gguf: architecture `own` is written for {', '.join(OWN)}, not for {prospect.family!r}"
            )
        if config.hidden_act not in ("silu", "swish"):
            raise ModelError(f"export gguf: llama.cpp's `deci` supports silu only, not {config.hidden_act}")
        window = getattr(config, "sliding_window", None)
        if window and getattr(config, "use_sliding_window", True):
            raise ModelError(
                f"export gguf: llama.cpp's `deci` has no sliding window (here {window} tokens); set sliding_window to "
                "null in config.json and use texts shorter than the window"
            )

    def write(self, checkpoint: Checkpoint, path: Path) -> None:
        """Write the file; quantised types are converted from F32."""
        self._warn(checkpoint.prospect.sites)
        if self.type in UNQUANTISED:
            self._write(checkpoint, path, self.type)
        else:
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                self._write(checkpoint, Path(folder) / "F32.gguf", "F32")
                _quantise(Path(folder) / "F32.gguf", path, self.type)
        if self.verify and checkpoint.tokenizer is not None:
            compare_vocabulary(path, checkpoint.tokenizer)

    def _write(self, checkpoint: Checkpoint, path: Path, type_: str) -> None:
        import gguf

        prospect = checkpoint.prospect
        config = dense_config(prospect.config)
        sizes = {site.name: rounded_up(site, self.pad_to) for site in prospect.sites}
        attention = [sizes[site.name] for site in prospect.sites if site.kind == "attention"]
        mlp = [sizes[site.name] for site in prospect.sites if site.kind == "mlp"]
        if not (
            len(attention) == len(mlp) == config.num_hidden_layers and all(all(s.values()) for s in sizes.values())
        ):
            raise ModelError("export gguf: every layer needs an attention and an MLP that keep something")
        own = self.architecture == "own"
        if own:
            _check_own(prospect.family, attention, mlp, open_weights(checkpoint.folder))
        writer = gguf.GGUFWriter(path, OWN[prospect.family] if own else "deci", use_temp_file=True)
        writer.add_name(checkpoint.folder.resolve().name)
        writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if type_ == "F32" else f"MOSTLY_{type_}"))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_block_count(len(mlp))
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_vocab_size(config.vocab_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_head_count(attention[0]["H"] if own else [layer["H"] for layer in attention])
        writer.add_head_count_kv(attention[0]["K"] if own else [layer["K"] for layer in attention])
        writer.add_feed_forward_length(mlp[0]["I"] if own else [layer["I"] for layer in mlp])
        width = next(site.channels // site.heads for site in prospect.sites if site.heads)
        writer.add_key_length(width)
        writer.add_value_length(width)
        writer.add_rope_dimension_count(width)
        add_rope(writer, config, width)
        add_vocabulary(writer, checkpoint.tokenizer, config.vocab_size, self.pre)
        pad = padder(prospect, sizes)
        for name, tensor in open_weights(checkpoint.folder).items():
            pairs = not own or OWN[prospect.family] in PAIRED
            self._add(writer, name, pad(name, tensor), attention if pairs else None, type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def _add(self, writer: Any, name: str, tensor: Tensor, attention: Sequence[Sizes] | None, type_: str) -> None:
        import gguf

        module, _, leaf = name.rpartition(".")
        if module.startswith("model.layers."):
            layer, _, module = module.removeprefix("model.layers.").partition(".")
            prefix = f"blk.{layer}."
            if attention is not None and module in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = attention[int(layer)]
                tensor = _rotary_pairs(tensor, heads["H" if module.endswith("q_proj") else "K"])
        else:
            prefix = ""
        if module not in NAMES:
            raise ModelError(f"export gguf: llama.cpp's `deci` has no tensor for {name}")
        values = tensor.float().contiguous().numpy()
        kind = gguf.GGMLQuantizationType[type_ if tensor.dim() == 2 else "F32"]
        writer.add_tensor(f"{prefix}{NAMES[module]}.{leaf}", gguf.quantize(values, kind), raw_dtype=kind)

    def _warn(self, sites: Sequence[Site]) -> None:
        """Warn about rows that llama.cpp cannot quantise to the chosen type."""
        block = 1 if self.type in UNQUANTISED else 256 if "_K" in self.type else 32
        for kind, what in (("mlp", "MLP widths"), ("attention", "attention outputs (heads times head size)")):
            widths = [
                site.channels // old * rounded_up(site, self.pad_to)[name]
                for site in sites
                for name, old in [next(iter(sizes_of(site).items()))]
                if site.kind == kind
            ]
            odd = [width for width in widths if width % block]
            unquantised = sum(1 for width in odd if width % 32)
            if odd:
                log.warning(
                    "export gguf: %d of %d %s are not multiples of %d: llama.cpp writes %d of these consumers in F16 "
                    "and the others in another type than %s; prune with budget.multiple_of, or set pad_to",
                    len(odd), len(widths), what, block, unquantised, self.type,
                )  # fmt: skip

    @contextmanager
    def open(self, path: Path) -> Iterator[Runner]:
        """Load the file in llama.cpp, with a float32 KV cache."""
        llama_cpp = load_llama_cpp()
        model = llama_cpp.Llama(
            str(path),
            n_ctx=CONTEXT,
            n_gpu_layers=0,
            logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            yarn_attn_factor=-1.0,
            verbose=False,
        )

        def run(tokens: Tensor) -> Tensor:
            model.reset()
            model.eval(tokens.tolist())
            return torch.tensor(model.scores[: len(tokens)])

        try:
            yield run
        finally:
            model.close()


def _rotary_pairs(tensor: Tensor, heads: int) -> Tensor:
    """Reorder each head's rows from transformers' rotary halves to llama.cpp's rotary pairs."""
    pairs: Tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return pairs


def _check_own(family: str, attention: Sequence[Sizes], mlp: Sequence[Sizes], names: Iterable[str]) -> None:
    """Raise ``ModelError`` if a model is not of its family's own architecture."""
    if any(dict(sizes) != dict(kind[0]) for kind in (attention, mlp) for sizes in kind):
        raise ModelError(
            "export gguf: architecture `own` needs layers of equal size; prune with searcher ul_um, or leave `deci`"
        )
    biased = ("q_proj", "k_proj", "v_proj") if family == "qwen2" else ()
    added = [name for name in names if name.endswith(".bias") and name.split(".")[-2] not in biased]
    if added:
        raise ModelError(
            f"export gguf: architecture `own` has no {added[0]}; prune with compensator none, or "
            "{name: least_squares, intercept: false}, or leave `deci`"
        )


def _quantise(source: Path, path: Path, type_: str) -> None:
    """Quantise a file with llama.cpp."""
    llama_cpp = load_llama_cpp()
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type_}")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), options):
        raise RunError(f"export gguf: llama.cpp could not quantise the model to {type_}")
