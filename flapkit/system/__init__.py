"""What every other package stands on: errors, paths, JSON, progress, processes and the work folder.

Nothing here knows a model or a recipe. The package imports no other package of flapkit, and torch only where a
process group already exists.

Modules:
    errors: the tree of exceptions, and did-you-mean hints
    json_files: read JSON of unknown origin
    paths: check paths of unknown origin
    processes: rank, broadcast and lost processes of a distributed run
    progress: stages, their events and their times
    workdir: the work folder of an output: lock, atomic writes, resume
"""
