"""What every room needs of a run's configuration: the error for bad input."""


class UserError(ValueError):
    """Bad input by the user. The message is one line that says value, limit and remedy.

    The commands print it and exit with code 2; it never shows a traceback.
    """
