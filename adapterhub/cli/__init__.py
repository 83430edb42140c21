"""The command line: `adapterhub serve`, administration of a running server, and commands for its users."""

from __future__ import annotations

from adapterhub.cli.main import app, main

__all__ = ["app", "main"]
