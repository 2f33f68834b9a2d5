"""What a task in another process came to: its result, or an error of ours as it was raised."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

Task = TypeVar("Task")
OURS = Path(__file__).parent


class Outcome(NamedTuple):
    """Errors that our own checks raise travel as values: raised over there, they would come back as a library's."""

    result: Any
    error: ValueError | FileNotFoundError | None = None


def outcome(function: Callable[[Task], Any], task: Task) -> Outcome:
    """Other errors, which are no user's, are raised."""
    try:
        return Outcome(function(task))
    except (ValueError, FileNotFoundError) as error:
        if OURS not in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parents:
            raise
        return Outcome(None, error)


def result(outcome: Outcome) -> Any:
    """Raises the error, so that it is raised here."""
    if outcome.error is not None:
        raise outcome.error
    return outcome.result
