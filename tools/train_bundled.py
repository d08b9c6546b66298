"""Train the bundled ``tiny-llama`` on the Python standard library: ``python tools/train_bundled.py OUTPUT``.

A killed run that is started again with the same OUTPUT goes on from its last checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flapkit.execution.lightning.module import CausalLM, Optimization
from flapkit.text.stdlib import stdlib_documents

WINDOW = 256
BATCH = 32
STEPS = 3000


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of 2048 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def tiny_llama() -> LlamaForCausalLM:
    """Build the untrained model: 6 layers of 6 heads of 32, MLP 512, tied embeddings, 3.05 M parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def windows(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """Cut all documents, joined by the end token, into windows [count, WINDOW]."""
    tokens: list[int] = []
    for document in documents:
        tokens += [*tokenizer.encode(document), tokenizer.eos_token_id]
    count = len(tokens) // WINDOW
    return torch.tensor(tokens[: count * WINDOW]).view(count, WINDOW)


def collate(rows: list[tuple[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack windows into a batch of full attention."""
    tokens = torch.stack([row[0] for row in rows])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def main(output: Path) -> None:
    """Train, and write the model in float16 with its tokenizer into OUTPUT/tiny-llama."""
    seed_everything(0)
    tokenizer = train_tokenizer(stdlib_documents("train"))
    train, heldout = (windows(tokenizer, stdlib_documents(split)) for split in ("train", "heldout"))
    print(f"{train.numel():,} training tokens, {heldout.numel():,} held-out tokens", flush=True)
    module = CausalLM(tiny_llama(), Optimization(lr=2e-3, weight_decay=0.1))
    trainer = Trainer(
        max_steps=STEPS,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        val_check_interval=250,
        check_val_every_n_epoch=None,
        limit_val_batches=20,
        logger=CSVLogger(output, name="logs"),
        callbacks=[ModelCheckpoint(output / "checkpoints", save_last=True, every_n_train_steps=100)],
        enable_progress_bar=False,
    )
    last = output / "checkpoints" / "last.ckpt"
    trainer.fit(
        module,
        DataLoader(TensorDataset(train), BATCH, shuffle=True, collate_fn=collate),
        DataLoader(TensorDataset(heldout), BATCH, collate_fn=collate),
        ckpt_path=last if last.exists() else None,
    )
    model = module.model.half()
    model.save_pretrained(output / "tiny-llama")
    tokenizer.save_pretrained(output / "tiny-llama")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
