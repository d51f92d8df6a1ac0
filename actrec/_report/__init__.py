"""A recording as one page of HTML, to be looked at, kept and sent: without a server, and without scripts from elsewhere."""

from .report import report

__all__ = ["report"]
