"""The one error a user is meant to read: a line that names what is wrong and what would be right."""


class WindquantError(Exception):
    """Bad input or an unusable environment; the message names the key or file and the remedy."""
