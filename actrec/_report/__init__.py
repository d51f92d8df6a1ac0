"""A recording as one self-contained HTML page: it needs no server and no external scripts."""

from .report import report

__all__ = ["report"]
