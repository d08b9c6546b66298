"""What every other package stands on: errors, paths, JSON, progress, processes and the work folder.

Nothing here knows a model or a recipe. The package imports no other package of flapkit, and torch in
``float64`` alone.

Modules:
    errors: the tree of exceptions, and did-you-mean hints
    float64: where there is no float64, and float64 sums over weights without a whole copy
    imports: call a function once a module is imported
    json_files: read JSON of unknown origin
    paths: check paths of unknown origin
    processes: rank, broadcast and lost processes of a distributed run
    progress: stages, their events and their times
    sizes: numbers with a unit
    workdir: the work folder of an output: lock, atomic writes, resume
"""
