"""What goes wrong for reasons a user can mend. The command line prints these as one line, without a traceback."""


class LimbeckError(Exception):
    """A run failed for a reason that the message explains; exit status 1."""


class BadInput(LimbeckError, ValueError):
    """What the user gave cannot be used; exit status 2.

    The message says what was given, what was expected and what to do, in one line.
    """


class StaleCache(BadInput):
    """A teacher cache does not hold this recipe's answers, or not all of them."""


class NonFiniteLoss(BadInput):
    """A loss term became NaN or infinite: the data or the learning rate is at fault. Names the step, the terms and the samples."""
