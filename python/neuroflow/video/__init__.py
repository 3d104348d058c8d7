"""Frames from files, directories and cameras to pixels, and results to files. Needs the `video` extra."""
