"""The command line as tests call it."""

from __future__ import annotations

import sys

import pytest

from limbeck.cli.main import main


@pytest.fixture
def limbeck(monkeypatch, capsys):
    """Run one command in this process; returns (exit status, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["limbeck", *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as leave:
            status = leave.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call
