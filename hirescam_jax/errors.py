"""The one exception for mistakes that the user can mend."""


class UserError(Exception):
    """Bad input: the message is one line that names the file, the field and the fix.

    The command line prints it without a traceback and exits with code 2.
    """
