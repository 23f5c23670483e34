"""Lets what this pack says be seen in a script that has not set up logging."""

from __future__ import annotations

import logging

_ROOT = logging.getLogger()


def show_information() -> None:
    """Shows the pack's messages from INFO on, on stderr, where nobody has said what to do with them.

    Handlers of the user's, or of Axolotl's, stand as they are, and so does a level of the logger ``axolotl_dpo_ext``.
    """
    log = logging.getLogger("axolotl_dpo_ext")
    if log.hasHandlers():  # also those of the call before
        return
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("axolotl-dpo-ext %(levelname)s: %(message)s"))
    # A script that sets up logging later would show every line twice.
    handler.addFilter(lambda record: not _ROOT.handlers)
    log.addHandler(handler)
