"""What a user can mend: one plain line, no traceback."""


class UserError(ValueError):
    """A user's mistake. Its text is one plain line: what is wrong, where, and what to do."""
