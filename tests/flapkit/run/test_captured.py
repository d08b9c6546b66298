"""The warnings of a run are collected."""

from __future__ import annotations

import logging

import pytest

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
