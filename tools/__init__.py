"""Commands around the method: python -m tools.NAME"""
import configurator  # noqa: F401  (first: from here on, Ctrl-C ends in one line)
