"""The releases that NeuroFlow is tested with, to warn users of newer ones."""

import functools
import importlib.metadata
import re
import warnings

# The newest of each; `make lock` writes them.
TESTED = {"torch": "2.13.0", "transformers": "5.24.0", "timm": "1.0.31"}


@functools.cache
def warn_of_newer(library: str) -> None:
    """Warn once if the installed `library` is newer than the newest tested release."""
    if library not in TESTED:
        return
    installed = importlib.metadata.version(library)
    if _numbers(installed) > _numbers(TESTED[library]):
        warnings.warn(
            f"neuroflow: {library} {installed} is newer than {TESTED[library]}, the newest that NeuroFlow was tested "
            "with; if results are off, compare with that one",
            RuntimeWarning,
            stacklevel=2,
        )


def _numbers(version: str) -> list[int]:
    """[2, 14, 0] for 2.14.0a0+git."""
    return [int(number) for number in re.match(r"\d+(\.\d+)*", version)[0].split(".")]
