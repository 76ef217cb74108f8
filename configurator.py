"""
Settings from files and flags: `python train.py config/tiny/d2s.py --max_steps=20`.

A program states its defaults as one flat dict. A config file is plain Python that assigns to some of those keys, and a
flag assigns to one; whatever comes later wins:

    defaults  <  config files, in order  <  --key=value flags, in order     (--key alone sets a True/False key to True)

The default's type is the key's type. A mistyped key or value stops the run before it starts, instead of training for
a day with the default. In a config file, names that start with _ and imported modules are the file's own.

Also here, since every program needs them: what happens when the user made a mistake (`UserError`, `run`), and the one way
to read a file that the user named (`user_file`).
"""
import difflib
import errno
import json
import math
import os
import re
import signal
import stat
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import BinaryIO


class UserError(ValueError):
    """
    A mistake that the user can mend. The message is one line: which file, row, key or flag; what was found; what was
    expected or what to do. `run` prints it without a traceback.
    """

    def __init__(self, message: str):
        super().__init__(hide_logins(" ".join(message.split())))     # values quoted from a file may hold line breaks


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
    try:
        text = json.dumps(value, default=repr, ensure_ascii=False)
    except RecursionError:
        text = f"a {type(value).__name__} nested hundreds of levels deep"
    except Exception:                                                # of its own __repr__
        text = f"a {type(value).__name__} that cannot be shown"
    return cut(text)


def spell(value: object, how: Callable[[object], str] = repr, length: int = 60) -> str:
    """A Python value or error on one line. A config file may hold any object, also one whose repr fails."""
    try:
        return cut(" ".join(how(value).split()), length)
    except Exception as error:
        return f"(its {how.__name__} fails: {type(error).__name__})"


def cut(text: str, length: int = 60) -> str:
    text = hide_logins(text)                                         # before its @ is cut off
    return text if len(text) <= length else text[:length - 3] + "..."


def hide_logins(text: str) -> str:
    """http://USER:PASSWORD@HOST in a message becomes http://***@HOST."""
    return re.sub(r"://\S*@", "://***@", text)


# -----------------------------------------------------------------------------
# Reading a file that the user named

@contextmanager
def user_file(path: str | Path, problem: str = "cannot be read", hint: str = "check the path") -> Iterator[BinaryIO]:
    """A file that the user named, opened for reading bytes; errors of the block that reads it are handled by `reading`."""
    with reading(path, problem, hint), open_regular(path) as file:
        yield file


@contextmanager
def reading(path: object, problem: str = "cannot be read", hint: str = "check the path") -> Iterator[None]:
    """Whatever goes wrong with the file while the block opens or reads it ends as one UserError: "PATH: PROBLEM (why); HINT"."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {hint}") from None
    except Exception as error:                                       # decoders and parsers raise nearly anything
        raise UserError(f"{path}: {problem} ({why_unreadable(path, error)}); {hint}") from None


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading; ~ is the home folder. A folder, or a pipe or device that could block, is an OSError."""
    path = os.path.expanduser(path)
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "a folder, not a file" if stat.S_ISDIR(mode) else "a pipe or a device, not a file")
    return open(path, "rb")


def why_unreadable(path: object, error: Exception) -> str:
    """In a few words: what the operating system said, what the file is instead, or what the parser said."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    with suppress(Exception), open_regular(path) as file:
        if found := stand_in(file.read(100)):
            return found
    lines = str(error).strip().splitlines()
    return cut(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__, 200)


def stand_in(start: bytes) -> str | None:
    """What a file is that begins like this, if it only takes the place of the real one."""
    start = start.lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself: git lfs pull fetches it"
    if start.startswith((b"<!doctype", b"<html")):
        return "a web page, not the file itself: fetch it again"
    return None


def require_memory(size: int, what: str, device) -> None:
    """UserError if `size` bytes are more than the machine, or its GPU, has at all: better than to wait for the failure."""
    if device.type == "cuda":
        import torch                                                 # here only: settings are read without it
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        with suppress(OSError, ValueError):                          # a container's limit; "max" if it has none
            total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    if device.type != "meta" and size > total:
        raise UserError(f"{what} would take {size / 1e9:,.1f} GB, and there are {total / 1e9:,.1f} GB of memory")


# -----------------------------------------------------------------------------
# Programs

# What writing fails with. Writing a file ends in a UserError that names it (engine/files.py); without a name it was printing.
OUTPUT_ERRORS = (errno.EBADF, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC)


def run(main: Callable[[list[str]], object], doc: str, defaults: dict) -> None:
    """Run a program's main(argv).

    What the user or the machine did wrong ends the process with one line on stderr and exit code 2, not a traceback.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):            # in any locale: what it cannot spell is escaped
        stream.reconfigure(errors="backslashreplace")
    try:
        if INTERRUPTS:
            raise KeyboardInterrupt
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(doc.strip(), "\n\nSettings and their defaults:\n",
                  *(f"  --{key}={value}\n" for key, value in defaults.items()))
        else:
            main(sys.argv[1:])
        print(end="", flush=True)                                    # what cannot be printed shows here
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
        place = error.filename or ("standard output" if error.errno in OUTPUT_ERRORS else None)
        reason = error.strerror or " ".join(str(error).split())
        print(f"error: {place}: {reason}" if place else f"error: {reason}", file=sys.stderr)
        sys.exit(2)


def discard_output() -> None:
    """Send what is still to be printed nowhere, so that nothing fails once more when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


# Ctrl-C while a program is imported, before `run`. Libraries may turn the KeyboardInterrupt into an error of their own,
# or lose it, so it is remembered.
INTERRUPTS = []


def on_interrupt(number: int, frame: object) -> None:
    INTERRUPTS.append(number)
    raise KeyboardInterrupt


def end_quietly(kind: type[BaseException], error: BaseException, trace: object) -> None:
    if not INTERRUPTS:
        return sys.__excepthook__(kind, error, trace)
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, on_interrupt)
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
    return Config(defaults | given_settings(defaults, argv))


def given_settings(defaults: dict, argv: list[str]) -> dict:
    """The keys that argv sets, and their values; the last one wins."""
    given, flags_began = {}, False
    for arg in argv:
        if not arg.startswith("-"):
            if flags_began:
                raise UserError(f"{arg}: config files come before flags (a flag is written --key=value)")
            for key, value in run_config_file(arg).items():
                check_known(key, defaults, arg)
                given[key] = check_type(value, defaults[key], f"{arg}: {key}")
            continue

        flags_began = True
        flag, equals, text = arg.partition("=")
        key = flag.lstrip("-")
        check_known(key, defaults, flag)
        if isinstance(defaults[key], bool) and not equals:           # --dry_run means --dry_run=True
            equals, text = "=", "True"
        if flag != f"--{key}" or not equals:
            raise UserError(f"{flag}: write --{key}=value")               # without the value, which may be a secret
        given[key] = check_type(parse(text, defaults[key]), defaults[key], flag)

    for key, value in given.items():
        if isinstance(value, str) and key != "prompt":               # "~/data" is a path; a prompt may begin with anything
            given[key] = os.path.expanduser(value)
    return given


def run_config_file(path):
    """Execute a config file by itself and return the names that it sets."""
    names = {"__file__": path}
    with user_file(path, hint="check the path of the config file (a setting is written --key=value)") as file:
        source = file.read()
    try:
        exec(compile(source, path, "exec"), names)                   # from bytes: Python itself knows a byte order mark
        return {key: value for key, value in names.items()
                if not key.startswith("_") and not isinstance(value, ModuleType)}
    except KeyboardInterrupt:
        raise
    except SyntaxError as error:
        raise UserError(f"{path} line {error.lineno or 1}: syntax error, {error.msg}") from None
    except BaseException as error:  # a program can end in any way; we blame the last of its own lines that ran
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        place = f"{path} line {lines[-1]}" if lines else path
        raise UserError(f"{place}: {type(error).__name__}, {spell(error, str, 200)}") from None


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
    if default is None:
        fits, expected = value is None or type(value) is str, "str or None"
    else:
        fits, expected = type(value) is type(default), type(default).__name__
    if type(value) is int and abs(value) >= 2**63:
        fits, expected = False, f"{expected} of at most 64 bits"
    elif type(default) is float and type(value) is int:
        fits, value = True, float(value)
    if not fits:
        choices = " (True or False)" if expected == "bool" else ""
        raise UserError(f"{where}: found {type(value).__name__} {spell(value)}, expected {expected}{choices}")
    if type(value) is str and ("\0" in value or value.encode(errors="ignore").decode() != value):
        raise UserError(f"{where}: found {spell(value)}, expected UTF-8 text")
    return value


# Intervals for `check_values`: the name that a message uses, and the test.
POSITIVE = ("a positive number", lambda x: 0 < x < math.inf)
NON_NEGATIVE = ("a non-negative number", lambda x: 0 <= x < math.inf)
FRACTION = ("a number from 0 to 1", lambda x: 0 <= x <= 1)
BELOW_ONE = ("a number from 0 to below 1", lambda x: 0 <= x < 1)
# Logits are divided by a temperature; outside of these bounds the quotient, or its square, may be no number any more.
TEMPERATURE = ("a positive number from 0.001 to 1000", lambda x: 0.001 <= x <= 1000)
GREEDY_OR_TEMPERATURE = ("a non-negative number: 0, or from 0.001 to 1000", lambda x: x == 0 or 0.001 <= x <= 1000)


def check_values(config: Config, allowed: dict[str, list | tuple]) -> None:
    """Raise a UserError for the first key whose value is not allowed: a list of choices, or one of the intervals above."""
    for key, rule in allowed.items():
        if isinstance(rule, list):
            wanted, fits = "one of " + ", ".join(str(choice) for choice in rule if choice != ""), config[key] in rule
        else:
            wanted, fits = rule[0], rule[1](config[key])
        if not fits:
            raise UserError(f"{key} is {spell(config[key])}, expected {wanted}")


def check_uses(config: Config, defaults: dict, uses: list[tuple[list[str], object, str]]) -> None:
    """Raise a UserError for a setting that would be ignored: changed from its default where it has no effect.

    uses: (keys, whether they have an effect in this run, where they have one, in words).
    """
    for keys, has_effect, where in uses:
        for key in keys:
            if not has_effect and config[key] != defaults[key]:
                raise UserError(f"{key}={config[key]}: belongs to {where}; here it would be ignored: leave it out, or say "
                                f"--{key}={defaults[key]}")
