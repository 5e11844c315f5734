"""The one error that the user can mend."""


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line that names it and says what is expected."""


class Diverged(InputError):
    """Training has spoilt the model: a loss or a weight is not finite."""
