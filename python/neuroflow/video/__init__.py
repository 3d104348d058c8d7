"""From a file, a directory or a camera to pixels, and from results to files. Needs the `video` extra."""
