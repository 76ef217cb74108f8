"""
Settings from files and flags: `python train.py config/tiny/d2s.py --max_steps=20`.

A script states its defaults as one flat dict. A config file is plain Python that assigns to some of those keys, and a
flag assigns to one; whatever comes later wins:

    defaults  <  config files, in order  <  --key=value flags, in order     (--key alone turns a True/False key on)

The default's type is the key's type. A mistyped key or value stops the run before it starts, instead of training for
a day with a default that nobody wanted. In a config file, names that start with _ and imported modules are its own.
"""
import difflib
import traceback
from types import ModuleType


class ConfigError(ValueError):
    """The user's settings are wrong; one line says which file or flag, what was found and what was expected."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))             # whatever was found may hold several


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
                raise ConfigError(f"{arg}: config files come before flags (a flag is written --key=value)")
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
            raise ConfigError(f"{arg}: write --{key}=value")
        config[key] = check_type(parse(text, defaults[key]), defaults[key], flag)
    return config


def run_config_file(path):
    """Execute a config file by itself and return the names that it sets."""
    names = {"__file__": path}
    try:
        with open(path, encoding="utf-8") as file:
            exec(compile(file.read(), path, "exec"), names)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as a config file ({error.strerror}); "
                          "check the path (a setting is written --key=value)") from None
    except SyntaxError as error:
        raise ConfigError(f"{path} line {error.lineno}: syntax error, {error.msg}") from None
    except Exception as error:  # a program can fail in any way; we blame the last of its own lines that ran
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        place = f"{path} line {lines[-1]}" if lines else path
        raise ConfigError(f"{place}: {type(error).__name__}, {' '.join(str(error).split())}") from None
    return {key: value for key, value in names.items() if key[0] != "_" and not isinstance(value, ModuleType)}


def check_known(key, defaults, where):
    if key not in defaults:
        near = difflib.get_close_matches(key, defaults, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(defaults)}"
        raise ConfigError(f"{where}: unknown key {key!r}; {hint}")


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
    if type(default) is float and type(value) is int:
        fits, value = True, float(value)
    if not fits:
        choices = " (True or False)" if expected == "bool" else ""
        raise ConfigError(f"{where}: found {type(value).__name__} {value!r}, expected {expected}{choices}")
    return value
