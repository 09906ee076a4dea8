"""A shell lets its background processes ignore Ctrl-C, and what those start ignores it too: the tests of interruptions
would wait for ever."""
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
