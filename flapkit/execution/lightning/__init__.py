"""Lightning: the only package that imports it.

With the callbacks, your own script can do what ``flapkit run`` does.

Modules:
    callbacks: calibrate, evaluate, report progress, recover
    data: windows as data modules
    loggers: Lightning's loggers by name
    module: the language model as a LightningModule
    prune: prune and save
    restore: prune again as a checkpoint's model was
    trainer: build trainers, and initialise processes
"""
