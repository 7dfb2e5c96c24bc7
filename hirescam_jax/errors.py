"""Errors of the user's making, and the one that asks for another run."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message is one line that names the file and field and says what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class StartError(UserError):
    """The other processes of a run did not come in time: worth another try, so exit code 1."""


class Preempted(Exception):  # noqa: N818 (not an error)
    """A signal stopped the training, which is saved: the message tells the step.

    The command line exits with code 75 (EX_TEMPFAIL): run again with --resume.
    """


def nearest(name: str, names: Iterable[str]) -> str:
    """' (did you mean X?)', or the list of valid names where none is close."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean '{close[0]}'?)" if close else f" (one of: {', '.join(names)})"
