"""What a guard raises, so that the command says it in one message."""


class GuardError(RuntimeError):
    """Stops a run, on all ranks at once: the message says what was found and what to do."""
