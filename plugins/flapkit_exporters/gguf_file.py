"""GGUF: a pruned model for llama.cpp, with layers of different sizes."""

from __future__ import annotations

import logging
import math
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
from flapkit_exporters.gguf_families import (
    ARCHITECTURES,
    OPENELM,
    OWN,
    PAIRED,
    as_llama,
    check_family,
    check_openelm,
    fused,
    parts_of,
)
from flapkit_exporters.gguf_rope import add_rope
from flapkit_exporters.gguf_vocabulary import add_vocabulary, compare_vocabulary
from flapkit_exporters.llama_cpp_quiet import load_llama_cpp
from flapkit_exporters.padding import Sizes, padder, rounded_up, sizes_of

Type = Literal["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_M", "Q2_K", "Q4_0"]
UNQUANTISED = ("F32", "F16", "BF16")

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""transformers' modules -> GGUF's tensors; those of a layer go without its prefix."""

CONTEXT = 512
"""llama.cpp's context length in tokens when an export is verified."""

log = logging.getLogger("flapkit.exporters.gguf")


@dataclass(frozen=True)
class GGUF(Exporter):
    """A GGUF file for llama.cpp, in an architecture that allows layers of different sizes: `deci`; Qwen 3: `openelm`.

    Args:
        type: data type of the matrices; norms and biases stay in F32.
        pad_to: pad each layer's attention output and MLP with zeros to a multiple of this; the result is the same.
            llama.cpp's quantised types need rows of a multiple of 32 (Q8_0, Q4_0) or 256 (K) values.
        architecture: one of those, or `own` for that of the model, if all layers have the same size.
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
        Literal["auto", "own"],
        Field(
            description="`auto` is one that supports layers of different sizes; `own` is the model's own, which more "
            "programs read: it needs layers of equal size, and no bias that the model did not have."
        ),
    ] = "auto"
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
        """Refuse models that no architecture of llama.cpp with layers of different sizes can run."""
        check_family(prospect.family, prospect.config, own=self.architecture == "own")
        if prospect.without:
            raise ModelError(
                f"export gguf: {prospect.without}, all but its bias, and llama.cpp has no bias where it has no "
                "attention or MLP; export to hf, or prune with a searcher that leaves units everywhere (min_units: 1, "
                "not depth)"
            )
        if self._target(prospect) == OPENELM:
            check_openelm(prospect)
        self._warn(prospect)

    def _target(self, prospect: Prospect) -> str:
        """Return llama.cpp's name of the architecture to write."""
        return (OWN if self.architecture == "own" else ARCHITECTURES)[prospect.family]

    def write(self, checkpoint: Checkpoint, path: Path) -> None:
        """Write the file; quantised types are converted from F32."""
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
            raise ModelError("export gguf: every layer needs an attention and an MLP that keep at least one unit")
        own, target = self.architecture == "own", self._target(prospect)
        if own:
            _check_own(prospect.family, attention, mlp, open_weights(checkpoint.folder))
        writer = gguf.GGUFWriter(path, target, use_temp_file=True)
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
        padded = ((name, pad(name, tensor)) for name, tensor in open_weights(checkpoint.folder).items())
        llama = as_llama(prospect, padded, attention)
        for name, tensor in fused(llama) if target == OPENELM else llama:
            self._add(writer, name, tensor, attention if target in PAIRED else None, type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def _add(self, writer: Any, name: str, tensor: Tensor, paired: Sequence[Sizes] | None, type_: str) -> None:
        """Write a tensor under llama.cpp's name; with the heads of each layer, their rows are reordered in pairs."""
        import gguf

        layer, module, leaf = parts_of(name)
        if module not in NAMES:
            raise ModelError(f"export gguf: llama.cpp has no tensor for {name}")
        if paired is not None and layer is not None and module in ("self_attn.q_proj", "self_attn.k_proj"):
            tensor = _rotary_pairs(tensor, paired[layer]["H" if module.endswith("q_proj") else "K"])
        values = tensor.float().contiguous().numpy()
        kind = gguf.GGMLQuantizationType[type_ if tensor.dim() == 2 else "F32"]
        prefix = "" if layer is None else f"blk.{layer}."
        writer.add_tensor(f"{prefix}{NAMES[module]}.{leaf}", gguf.quantize(values, kind), raw_dtype=kind)

    def _warn(self, prospect: Prospect) -> None:
        """Warn about rows that llama.cpp cannot quantise to the chosen type, as they are or may be after a run."""
        block = 1 if self.type in UNQUANTISED else 256 if "_K" in self.type else 32
        for kind, what in (("mlp", "MLP widths"), ("attention", "attention outputs (heads times head size)")):
            widths = [self._width(site, prospect.multiple_of) for site in prospect.sites if site.kind == kind]
            odd = [width for width in widths if width % block]
            if odd and prospect.multiple_of is None:
                log.warning(
                    "export gguf: %d of %d %s are not multiples of %d: llama.cpp writes %d of these consumers in F16 "
                    "and the others in another type than %s; prune with budget.multiple_of, or set pad_to",
                    len(odd), len(widths), what, block, sum(1 for width in odd if width % 32), self.type,
                )  # fmt: skip
            elif odd:
                log.warning(
                    "export gguf: %s may not be multiples of %d, and llama.cpp writes such consumers in another type "
                    "than %s; set budget.multiple_of: %d, or the exporter's pad_to",
                    what, block, self.type, block,
                )  # fmt: skip
        hidden = dense_config(prospect.config).hidden_size
        if hidden % block:
            log.warning(
                "export gguf: the hidden size %d is not a multiple of %d: llama.cpp writes embeddings and projections "
                "in another type than %s", hidden, block, self.type,
            )  # fmt: skip

    def _width(self, site: Site, multiple_of: int | None) -> int:
        """Return a consumer's width; before a run, what divides all widths that it may have, and the whole one."""
        name, old = next(iter(sizes_of(site).items()))
        width = site.channels // old * rounded_up(site, self.pad_to)[name]
        if multiple_of is None:
            return width
        step = math.lcm(multiple_of, site.runs * site.channels_per_unit)
        return math.gcd(width, step if step % self.pad_to == 0 else self.pad_to)

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
            "export gguf: architecture `own` needs layers of equal size; prune with searcher ul_um, or leave `auto`"
        )
    biased = ("q_proj", "k_proj", "v_proj") if family == "qwen2" else ()
    added = [name for name in names if name.endswith(".bias") and name.split(".")[-2] not in biased]
    if added:
        raise ModelError(
            f"export gguf: architecture `own` has no {added[0]}; prune with compensator none, or "
            "{name: least_squares, intercept: false}, or leave `auto`"
        )


def _quantise(source: Path, path: Path, type_: str) -> None:
    """Quantise a file with llama.cpp."""
    llama_cpp = load_llama_cpp()
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type_}")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), options):
        raise RunError(f"export gguf: llama.cpp could not quantise the model to {type_}")
