"""The stages of a run, each a function of what the ones before it gave.

- ``target``: the model's sites, from its configuration alone.
- ``text``: all text, as tokens.
- ``loops``: calibration and evaluation, which run the model under Lightning.
- ``report``: the error of each site, and samples of text.
- ``log``: what the loggers are told.
- ``noted``: the warnings meanwhile.
- ``save``: the record of a run, and the output folder that is written from it.

Pruning itself is ``flapkit.pruning.prune_sites_``. ``flapkit.run`` puts the stages in a row. The callbacks in
``flapkit.callbacks`` do the same in a Lightning script of a user's own.
"""
