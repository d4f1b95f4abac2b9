"""The one error type that speaks to the user instead of to a programmer."""


class UserError(Exception):
    """Something that the user can mend: the message is one sentence that names the key, file or value.

    Programs print the message alone, without a traceback, and end with exit status 2.
    """
