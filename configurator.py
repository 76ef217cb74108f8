"""
Settings from files and flags: `python train.py config/tiny/d2s.py --max_steps=20`.

A program states its defaults as one flat dict. A config file is plain Python that assigns to some of those keys, and a
flag assigns to one; whatever comes later wins:

    defaults  <  config files, in order  <  --key=value flags, in order     (--key alone sets a True/False key to True)

The default's type is the key's type. A mistyped key or value stops the run before it starts, instead of training for
a day with the default. In a config file, names that start with _ and imported modules are the file's own.

Also here, since every program needs it: what happens when the user made a mistake (`UserError`, `run`).
"""
import difflib
import json
import math
import os
import sys
import traceback
from collections.abc import Callable
from types import ModuleType


class UserError(ValueError):
    """
    A mistake that the user can mend. The message is one line: which file, row, key or flag; what was found; what was
    expected or what to do. `run` prints it without a traceback.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))                  # values quoted from a file may hold line breaks


class Stopped(Exception):
    """A run that ended early in good order, with the process's exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def expected(where: object, found: object, wanted: str) -> UserError:
    """The most frequent UserError: "WHERE: found FOUND, expected WANTED"."""
    return UserError(f"{where}: found {shorten(found)}, expected {wanted}")


def shorten(value: object) -> str:
    """A value as JSON, cut to what fits a one-line message."""
    return show(value, lambda value: json.dumps(value, default=repr, ensure_ascii=False))


def show(value: object, how: Callable = repr, limit: int = 60) -> str:
    """how(value), cut to what fits a one-line message. It may be a user's own code and fail in any way."""
    try:
        text = how(value)
    except RecursionError:
        text = f"a {type(value).__name__} nested hundreds of levels deep"
    except Exception:
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= limit else text[:limit - 3] + "..."


def run(main: Callable[[list[str]], object], doc: str, defaults: dict) -> None:
    """Run a program's main(argv).

    What the user or the machine did wrong ends the process with one line on stderr and exit code 2, never a traceback.
    """
    try:
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(doc.strip(), "\n\nSettings and their defaults:\n",
                  *(f"  --{key}={value}\n" for key, value in defaults.items()))
        else:
            main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as reason:
        print(reason, file=sys.stderr)
        sys.exit(reason.exit_code)
    except BrokenPipeError:                                          # the reader of our output has left: `| head -1`
        discard_output()
        sys.exit(141)
    except OSError as error:                                         # a disk, a permission
        discard_output()
        print(f"error: {error.filename or 'standard output'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)


def discard_output() -> None:
    """Send what is still to be printed nowhere, so that nothing fails once more when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def end_quietly(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """Ctrl-C while a program is imported, before `run`."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = end_quietly


class Config(dict):
    """A dict whose keys are also attributes: config.batch_size is config["batch_size"]."""
    __setattr__ = dict.__setitem__

    def __getattr__(self, key):
        if key not in self:
            raise AttributeError(f"the configuration has no key {key!r}")
        return self[key]


def load_config(defaults: dict, argv: list[str]) -> Config:
    """The defaults, overridden by what argv names: config files first, then --key=value flags."""
    config, flags_began = Config(defaults), False
    for arg in argv:
        if not arg.startswith("-"):
            if flags_began:
                raise UserError(f"{arg}: config files come before flags (a flag is written --key=value)")
            for key, value in run_config_file(arg).items():
                check_known(key, defaults, arg)
                config[key] = check_type(value, defaults[key], f"{arg}: {key}")
            continue

        flags_began = True
        flag, equals, text = arg.partition("=")
        key = flag.lstrip("-")
        check_known(key, defaults, flag)
        if isinstance(defaults[key], bool) and not equals:           # --dry_run means --dry_run=True
            equals, text = "=", "True"
        if flag != f"--{key}" or not equals:
            raise UserError(f"{arg}: write --{key}=value")
        config[key] = check_type(parse(text, defaults[key]), defaults[key], flag)
    return config


def run_config_file(path):
    """Execute a config file by itself and return the names that it sets."""
    names, hint = {"__file__": path}, "check the path (a setting is written --key=value)"
    try:
        if not os.path.isfile(path) and os.path.exists(path):        # reading a pipe or a device may never end
            raise OSError(0, "not a file")
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a config file ({error.strerror}); {hint}") from None
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as a config file ({error}); {hint}") from None
    try:
        exec(compile(text, path, "exec"), names)
        return {key: value for key, value in names.items()
                if not key.startswith("_") and not isinstance(value, ModuleType)}
    except KeyboardInterrupt:
        raise
    except SyntaxError as error:
        raise UserError(f"{path} line {error.lineno}: syntax error, {error.msg}") from None
    except BaseException as error:  # a program can fail or exit in any way; we blame the last of its own lines that ran
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        place = f"{path} line {lines[-1]}" if lines else path
        raise UserError(f"{place}: {type(error).__name__}, {show(error, str, limit=300)}") from None


def check_known(key, defaults, where):
    if key not in defaults:
        near = difflib.get_close_matches(key, defaults, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(defaults)}"
        raise UserError(f"{where}: unknown key {key!r}; {hint}")


def parse(text, default):
    """What a flag's text means, given the type of the key's default; text that means nothing there stays text."""
    if isinstance(default, bool):  # before int: True is an int in Python, but not here
        return {"True": True, "False": False}.get(text, text)
    if isinstance(default, (int, float)):
        try:
            return type(default)(text)
        except ValueError:
            return text
    return text  # str, or None for an optional str: as it stands, "=" and all


def check_type(value, default, where):
    """The value in the default's type: an int will do for a float, and nothing else is converted."""
    if type(value) is int and type(default) in (int, float) and abs(value) >= 2**31:
        raise UserError(f"{where}: found {show(value)}, expected a number below 2,147,483,648")
    if type(value) is str and ("\0" in value or value.encode(errors="ignore").decode() != value):
        raise UserError(f"{where}: found {show(value)}, expected UTF-8 text")
    if default is None:
        fits, expected = value is None or type(value) is str, "str or None"
    else:
        fits, expected = type(value) is type(default), type(default).__name__
    if type(default) is float and type(value) is int:
        fits, value = True, float(value)
    if not fits:
        choices = " (True or False)" if expected == "bool" else ""
        raise UserError(f"{where}: found {type(value).__name__} {show(value)}, expected {expected}{choices}")
    return value


# Intervals for `check_values`: the name that a message uses, and the test.
POSITIVE = ("a positive number", lambda x: 0 < x < math.inf)
NON_NEGATIVE = ("a non-negative number", lambda x: 0 <= x < math.inf)
FRACTION = ("a number from 0 to 1", lambda x: 0 <= x <= 1)
BELOW_ONE = ("a number from 0 to below 1", lambda x: 0 <= x < 1)


def check_values(config: Config, allowed: dict[str, list | tuple]) -> None:
    """Raise a UserError for the first key whose value is not allowed: a list of choices, or one of the intervals above."""
    for key, rule in allowed.items():
        if isinstance(rule, list):
            wanted, fits = "one of " + ", ".join(str(choice) for choice in rule if choice != ""), config[key] in rule
        else:
            wanted, fits = rule[0], rule[1](config[key])
        if not fits:
            raise UserError(f"{key} is {config[key]!r}, expected {wanted}")
