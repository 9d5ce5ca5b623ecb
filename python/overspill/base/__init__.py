"""What every other part stands on: checks of arguments, text, files, and the values that are handed out."""
