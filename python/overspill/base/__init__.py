"""Checks of arguments, units, text, files, the host, and the values that are handed out: below all other packages."""
