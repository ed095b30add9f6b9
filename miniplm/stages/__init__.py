"""The stages: module = command = function. They meet in files on disk alone."""
