"""The error that means: the input is wrong, not the program."""


class InputError(ValueError):
    """Input that breaks a rule, with the rule and the remedy in the message.

    The message reads `` `argument` must be <rule>, got <value>. <Remedy.>`` The
    command line prints it on one line and exits with code 2; any other exception is
    a bug and keeps its traceback.

    Example:
      >>> raise InputError("`density` must be in (0, 1], got 2.0.")
      Traceback (most recent call last):
      sparse_jax.errors.InputError: `density` must be in (0, 1], got 2.0.
    """
