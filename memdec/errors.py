"""The error a user can cause: one line that says what was expected and what came."""


class MemdecError(Exception):
    """Bad input to a stage or a command. The command line prints it and exits with status 1."""
