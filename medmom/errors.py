class MedmomError(Exception):
    """What the user can mend: one line that names the place, the fact with its value, and the mend.

    The command line prints it without a traceback and ends with exit code 2; anything else that is
    raised is a bug of ours.
    """
