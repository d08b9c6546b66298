"""The warnings of a run are collected."""

from __future__ import annotations

import logging
import pkgutil
from importlib import import_module

import pytest

from flapkit.registry import KINDS
from flapkit.run.captured import capture_warnings


def test_notes_warnings_while_it_lasts():
    log = logging.getLogger("flapkit.somewhere")
    with capture_warnings() as warnings:
        log.warning("%s is odd", "this")
        log.info("all is well")
    log.warning("too late")
    assert warnings == ["this is odd"]


def test_leaves_no_handler():
    handlers = list(logging.getLogger("flapkit").handlers)
    with pytest.raises(ValueError), capture_warnings():
        raise ValueError
    assert logging.getLogger("flapkit").handlers == handlers


def test_the_messages_of_plugins_are_heard_with_the_cores_own():
    packages = [import_module(kind.hook) for kind in KINDS]
    names = [f"{of.__name__}.{found.name}" for of in packages for found in pkgutil.iter_modules(of.__path__)]
    loggers = {name: module.log.name for name in names if hasattr(module := import_module(name), "log")}
    assert "flapkit_searchers.evolution" in loggers
    assert all(logger.startswith("flapkit.") for logger in loggers.values()), loggers
