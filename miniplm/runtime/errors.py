"""Errors whose text is one plain line for whoever runs a command."""


class UserError(ValueError):
    """A user's mistake: what is wrong, where, and what to do."""


class RunError(RuntimeError):
    """What failed through no mistake that a user could mend beforehand: what came, where, and what to do."""
