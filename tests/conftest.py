"""A shell lets its background processes ignore Ctrl-C, nohup a closed terminal, and what those start ignores them too:
the tests of interruptions would wait for ever."""
import os
import signal

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def idle_machine(monkeypatch):
    """No warning about other work in what tests read."""
    if hasattr(os, "getloadavg"):
        monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
