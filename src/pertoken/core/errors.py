"""Errors that several folders raise."""


class BadRequest(ValueError):
    """The request cannot be served; the message says what was given, what is allowed and what to do."""
