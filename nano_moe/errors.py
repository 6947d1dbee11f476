"""Errors that are the user's to mend: one line, no traceback, exit status 2."""

TRACEBACK = "NANO_MOE_TRACEBACK"  # set it to see where an unforeseen error came from


class UserError(Exception):
    """A fault in what the user gave; its text says what, where and what to do, in one line."""


class SaidElsewhere(UserError):
    """A fault that another process of the same training says."""
