"""Text: read documents, tokenise them, and make windows for calibration and evaluation.

Nothing here loads models. Text comes from local files, the Hugging Face hub or Python's standard library; the draws and
cuts are those of FLAP's released code, so that its published numbers can be compared.

- ``source``: what a recipe says about where text comes from; reads its documents.
- ``named``: the datasets that recipes can name.
- ``places``: where text lies: the standard library, local files, the hub.
- ``stdlib``: the sources of Python's standard library.
- ``files``: local files: formats, the splits of a folder, rows.
- ``mix``: text of several sources, in shares.
- ``conversations``: read conversations in their two common formats.
- ``tokenise``: tokenise long text in chunks.
- ``windows``: draw calibration windows, cut evaluation windows.
- ``overlap``: count evaluation tokens that are also in the calibration text.
"""
