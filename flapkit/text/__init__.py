"""Text: read documents, tokenise them, and make windows for calibration and evaluation.

Nothing here loads models. Text comes from local files, the Hugging Face hub or Python's standard library; the draws and
cuts are those of FLAP's released code, so that its published numbers can be compared.

- ``source``: read documents from datasets, files and folders.
- ``files``: local files: formats, the splits of a folder, rows.
- ``conversations``: read conversations in their two common formats.
- ``tokenise``: tokenise long text in chunks.
- ``windows``: draw calibration windows, cut evaluation windows.
- ``overlap``: count evaluation tokens that are also in the calibration text.
"""
