"""The `neuroflow` command."""


class CommandError(ValueError):
    """The command cannot do what it was asked to. The message is one line and says what to do."""
