"""How a stage ends other than well. `cli` alone turns these into exit statuses."""


class InputError(ValueError):
    """The user's input is wrong: one line with the place, the value, the consequence and the remedy. Exit 2."""


class Unfinished(RuntimeError):
    """The stage ran to its end, but some tiles or chunks failed; the message lists them. Exit 3."""


class Stopped(RuntimeError):
    """A signal stopped the stage after it saved; the same command goes on from there. Exit 75."""
