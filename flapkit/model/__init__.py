"""Models as flapkit prunes them: declarations of architectures, sites, plans, and the edits of weights.

Everything here works on transformers models and their configurations. Nothing here reads or writes checkpoints,
measures statistics or trains.

- ``component``: the base class of all components, and their option types.
- ``declaration``: an architecture as data (``Family``, ``Block``).
- ``adapter``: the interface of architecture adapters, and the adapter that reads a declaration.
- ``site``: ``Site`` and ``Coupling``: what can be removed, and what goes with it.
- ``layout``: the sites of a model from its declaration.
- ``positions``: how long a text a model can take.
- ``budget``: how much to remove: budgets, and the cost of each unit.
- ``costs``: parameters, bytes of weights, KV cache, parameters used for a token.
- ``plan``: which units stay.
- ``history``: the plan that a pruned model carries, and the plan of several prunings.
- ``surgery``: slice or mask a model's weights.
- ``resize``: the modeling code that every pruned checkpoint carries.
- ``classes``: transformers classes that load pruned models.
- ``empty``: models on the meta device.
- ``tiny``: tiny random models of any class.
- ``soundness``: refuse quantised weights and weights that are not finite.
- ``derive``: derive a declaration (``adapter: auto``).
- ``gradient_probe``: find what goes with a unit, by gradients.
- ``verify``: compare a sliced with a masked model.
"""
