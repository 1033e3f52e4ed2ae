"""The command line as tests call it."""

from __future__ import annotations

import sys
from functools import partial

import pytest

from limbeck.cli.main import main


@pytest.fixture
def command(monkeypatch):
    """Run one command in this process, under ``capsys`` or ``capfd``; returns (exit status, standard output, standard error)."""

    def call(capture, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["limbeck", *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as leave:
            status = leave.code or 0
        captured = capture.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def limbeck(command, capsys):
    """`command` with what Python prints."""
    return partial(command, capsys)
