"""Imported first by the data tools: Ctrl-C during their other imports ends in a sentence too, not in a traceback."""

import os
import sys

SENTENCE = "interrupted: run the same command again to go on"


def hook(kind, error, trace) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    print(SENTENCE, file=sys.stderr, flush=True)
    os._exit(130)


started = getattr(sys.modules["__main__"], "__file__", None) or ""
if os.path.dirname(os.path.realpath(started)) == os.path.dirname(os.path.realpath(__file__)):  # not in tests
    sys.excepthook = hook
