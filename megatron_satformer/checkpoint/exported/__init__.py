"""The files of an exported folder, copied as they are: they import nothing of this package."""
