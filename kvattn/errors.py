"""The one error a user of kvattn should ever meet."""


class UserError(ValueError):
    """Bad input: one sentence naming the field, the value and the fix.

    Commands print it on one line and exit with code 2; library callers catch it as `ValueError`.
    """
