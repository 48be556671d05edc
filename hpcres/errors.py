"""Errors that end a stage; only `cli` turns them into exit statuses."""


class InputError(ValueError):
    """The user's input is wrong; exit status 2.

    The message is one line with the place, the value, the consequence and the remedy.
    """


class Unfinished(RuntimeError):
    """The stage ran to its end, but some tiles or chunks failed; exit status 3.

    The message lists what failed.
    """


class Stopped(RuntimeError):
    """A signal stopped the stage after it saved; exit status 75.

    The same command continues from there.
    """
