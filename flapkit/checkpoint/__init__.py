"""Checkpoints on disk: load dense and pruned models, save pruned ones, publish and export them.

A checkpoint is a folder of safetensors and JSON that transformers loads. A pruned one also has a plan, a modeling file
and ``flapkit.json``. Output is written to a temporary folder and renamed when it is complete.

- ``load``: load a model, a configuration, a tokenizer or single tensors.
- ``save``: save a pruned model.
- ``folder``: write a folder or a file as a whole, or not at all.
- ``weights``: read and write safetensors files.
- ``consistency``: check that configuration, plan and tensors fit each other.
- ``sizes``: compare the sizes of the layers with those of the dense model.
- ``modeling_file``: check that the modeling file was not changed.
- ``card``: the model card.
- ``push``: upload to the Hugging Face hub.
- ``formats``: the interface of exporters.
- ``export``: export a checkpoint, and compare the result with the pruned model.
- ``expand``: map a LoRA, or a tensor, back to the dense model.
- ``bundled``: the tiny models that come with flapkit.
"""
