"""Recipes: the YAML file that describes a run, and how it is read, checked and written.

A recipe is read as a tree that keeps positions, overridden from the command line, checked against its schema, and its
components are built; all problems are reported together, each with file, line and column.

Modules:
    plugin_files: load plugin files, in Python and YAML
    dump: write a recipe as YAML
    files: find recipes, the user's and those shipped with flapkit
    json_schema: the JSON schema of recipes
    load: `load_recipe`, from a file to a `LoadedRecipe` with its components
    nodes: YAML as a tree with positions
    overrides: `--set key=value`
    schema: the sections and keys of a recipe
    validation: check a tree against types, with readable problems
"""
