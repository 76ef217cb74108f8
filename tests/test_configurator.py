"""
configurator.py: what wins, which types pass, and what a mistake says. Run: python -m pytest tests/test_configurator.py

Everything is checked against values and messages written out by hand.
"""
import pytest

from configurator import Config, UserError, check_uses, expected, load_config

DEFAULTS = {"learning_rate": 1e-3, "batch_size": 32, "dry_run": False, "student": "out/align", "teacher": None,
            "max_steps": 0}


def write(folder, text, name="stage.py"):
    path = folder / name
    path.write_text(text)
    return str(path)


def message(argv):
    """The one line that a wrong argv is answered with."""
    with pytest.raises(UserError) as caught:
        load_config(DEFAULTS, argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_arguments_the_defaults_stand():
    config = load_config(DEFAULTS, [])
    assert config == DEFAULTS and config is not DEFAULTS
    assert isinstance(config, Config) and isinstance(config, dict)


def test_later_wins_files_in_order_then_flags(tmp_path):
    first = write(tmp_path, "batch_size = 64\nmax_steps = 5\nstudent = 'a'\n", "first.py")
    second = write(tmp_path, "max_steps = 6\nstudent = 'b'\n", "second.py")
    config = load_config(DEFAULTS, [first, second, "--student=c", "--student=d"])
    assert (config.batch_size, config.max_steps, config.student, config.learning_rate) == (64, 6, "d", 1e-3)
    assert DEFAULTS["batch_size"] == 32  # the caller's dict is left alone


def test_flags_are_parsed_by_the_type_of_the_default():
    flags = ["--learning_rate=1", "--batch_size=-8", "--dry_run=True", "--student=a=b", "--teacher=7"]
    config = load_config(DEFAULTS, flags)
    assert config == {"learning_rate": 1.0, "batch_size": -8, "dry_run": True, "student": "a=b", "teacher": "7",
                      "max_steps": 0}
    assert type(config.learning_rate) is float and type(config.teacher) is str
    assert load_config(DEFAULTS, ["--learning_rate=1e-4", "--dry_run=False", "--student="]).learning_rate == 1e-4


def test_a_bare_flag_turns_a_bool_on():
    assert load_config(DEFAULTS, ["--dry_run"]).dry_run is True
    assert load_config(DEFAULTS, ["--dry_run", "--dry_run=False"]).dry_run is False


def test_config_is_a_dict_with_attributes():
    config = load_config(DEFAULTS, [])
    config.batch_size = 4
    assert config["batch_size"] == config.batch_size == 4
    with pytest.raises(AttributeError, match="no key 'batchsize'"):
        config.batchsize


def test_config_files_may_compute(tmp_path):
    path = write(tmp_path, "import math\nfrom math import ceil as _ceil\n_gpus = 16\n"
                           "batch_size = 8 * _gpus\nmax_steps = _ceil(math.sqrt(10))\nlearning_rate = 1\nteacher = None\n"
                           "student = __file__\n")
    config = load_config(DEFAULTS, [path])
    assert (config.batch_size, config.max_steps, config.teacher, config.student) == (128, 4, None, path)
    assert type(config.learning_rate) is float and set(config) == set(DEFAULTS)


def test_config_files_run_in_an_empty_namespace(tmp_path):
    path = write(tmp_path, "batch_size = DEFAULTS['batch_size']\n")
    assert message([path]) == f"{path} line 1: NameError, name 'DEFAULTS' is not defined"
    first, second = write(tmp_path, "_n = 3\n", "first.py"), write(tmp_path, "batch_size = _n\n", "second.py")
    assert "name '_n' is not defined" in message([first, second])  # nor does one file see another's helpers


@pytest.mark.parametrize("argv, expected", [
    (["--learning_rat=1"], "--learning_rat: unknown key 'learning_rat'; did you mean learning_rate?"),
    (["--learning-rate=1"], "--learning-rate: unknown key 'learning-rate'; did you mean learning_rate?"),
    (["--xyz=1"], "--xyz: unknown key 'xyz'; known keys: learning_rate, batch_size, dry_run, student, teacher, max_steps"),
    (["--max_steps"], "--max_steps: write --max_steps=value"),
    (["-dry_run"], "-dry_run: write --dry_run=value"),
    (["--dry_run="], "--dry_run: found str '', expected bool (True or False)"),
    (["-batch_size=3"], "-batch_size: write --batch_size=value"),
    (["--batch_size=3.5"], "--batch_size: found str '3.5', expected int"),
    (["--batch_size=True"], "--batch_size: found str 'True', expected int"),
    (["--batch_size="], "--batch_size: found str '', expected int"),
    (["--learning_rate=fast"], "--learning_rate: found str 'fast', expected float"),
    (["--dry_run=true"], "--dry_run: found str 'true', expected bool (True or False)"),
    (["--dry_run=1"], "--dry_run: found str '1', expected bool (True or False)"),
])
def test_wrong_flags(argv, expected):
    assert message(argv) == expected


@pytest.mark.parametrize("text, expected", [
    ("batch_sise = 3", "unknown key 'batch_sise'; did you mean batch_size?"),
    ("Batch_Size = 3", "unknown key 'Batch_Size'; did you mean batch_size?"),
    ("def helper(): pass", "unknown key 'helper'"),
    ("batch_size = 3.0", "batch_size: found float 3.0, expected int"),
    ("batch_size = True", "batch_size: found bool True, expected int"),
    ("learning_rate = True", "learning_rate: found bool True, expected float"),
    ("learning_rate = '1e-4'", "learning_rate: found str '1e-4', expected float"),
    ("dry_run = 1", "dry_run: found int 1, expected bool (True or False)"),
    ("student = None", "student: found NoneType None, expected str"),
    ("teacher = 3", "teacher: found int 3, expected str or None"),
    ("max_steps = 1\nbatch_size = = 2", " line 2: syntax error, invalid syntax"),
    ("max_steps = 1\n\nbatch_size = 1 / 0", " line 3: ZeroDivisionError, division by zero"),
])
def test_wrong_files(tmp_path, text, expected):
    path = write(tmp_path, text)
    assert message([path]).startswith(path) and expected in message([path])


@pytest.mark.parametrize("address", ["http://me:Geheim@host/v1", "https://Geheim@host:80", "http://me:Ge/Geheim@host",
                                     "http://me:" + "Geheim" * 20 + "@host"])
def test_a_message_repeats_no_password(tmp_path, address):
    path = write(tmp_path, f"student = [{address!r}]\n")
    texts = [message([path]), message([address]), message(["--max_steps=1", address]), message([f"--{address}"]),
             message([f"--student={address}\udcff"]), str(expected("judge_url", address, "a host"))]
    with pytest.raises(UserError, match="student=.*would be ignored") as caught:
        check_uses(Config(DEFAULTS, student=address), DEFAULTS, [(["student"], False, "another stage")])
    for text in [*texts, str(caught.value)]:
        assert "Geheim" not in text and "://***@host" in text


def test_missing_file_misplaced_file_and_bare_setting(tmp_path):
    assert "no_such.py: no such file; check the path of the config file" in message(["no_such.py"])
    assert "a setting is written --key=value" in message(["batch_size=3"])
    path = write(tmp_path, "batch_size = 3")
    assert message(["--max_steps=1", path]).startswith(f"{path}: config files come before flags")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    assert message([str(tmp_path / "binary.py")]).startswith(str(tmp_path / "binary.py"))
