"""Lightning: the only place that imports it.

The callbacks do in a script of your own what ``flapkit run`` does.

Modules:
    callbacks: calibrate, evaluate, report progress, recover
    data: windows as data modules
    loggers: Lightning's loggers by name
    module: the language model as a LightningModule
    prune: prune and save
    trainer: build trainers, and let processes meet
"""
