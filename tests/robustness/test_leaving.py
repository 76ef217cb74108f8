"""
How a program ends that is interrupted, that nothing listens to, or whose worker or config file fails: in one line, with
what was computed saved.

    python -m pytest tests/robustness/test_leaving.py
"""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data
import train
from configurator import UserError, load_config
from engine import resume
from kill_study import logged
from processes import ROOT, ended, start, train_py
from test_faults import same, wait_for
from test_train import flags, records


# -----------------------------------------------------------------------------
# Ctrl-C before there is anything to save

@pytest.mark.parametrize("program, seconds", [(["train.py", "--stage=sft"], 0.0), (["train.py", "--stage=sft"], 0.6),
                                              (["-m", "tiny", "--out_dir=/dev/null/x"], 0.2),
                                              (["-m", "tools.plan", "--stage=sft"], 0.3), (["data.py", "nowhere:1"], 0.3)])
def test_an_interrupt_while_torch_is_imported(program, seconds):
    process = subprocess.Popen([sys.executable, *program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "torch" in maps.read_text(), lambda: process.poll() is None)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    if not errors.startswith("error: "):                             # it had come to its arguments already
        assert errors in ("interrupted\n", "SIGINT before the first step: nothing to save\n")
        assert process.returncode == 130 and out == ""
    assert errors.count("\n") == 1


# -----------------------------------------------------------------------------
# Nothing reads what is printed

def ends_with_output_to(file, arguments, nproc=1):
    def work(rank):
        os.dup2(file, 1)
        sys.stdout = open(1, "w", closefd=False)
        train_py(arguments)(rank)
    return ended(start(nproc, work))


@pytest.mark.parametrize("kind, nproc, reason", [("closed pipe", 1, "Broken pipe"), ("closed pipe", 2, "Broken pipe"),
                                                 ("full disk", 1, "No space left on device")])
def test_a_run_whose_output_nothing_reads_saves_and_stops(world, tmp_path, kind, nproc, reason):
    """`| head -1`, or a log file on a full disk."""
    arguments = flags(world, "align", tmp_path / "out", max_steps=6, save_every=1000, log_every=2, micro_batch_size=4)
    if kind == "closed pipe":
        reader, file = os.pipe()
        os.close(reader)
    else:
        file = os.open("/dev/full", os.O_WRONLY)
    codes, errors = ends_with_output_to(file, arguments, nproc)
    os.close(file)
    assert codes == [2] * nproc and "".join(errors) == (
        f"error: standard output: {reason}; all steps are saved, the same command goes on from there\n")
    assert [path.name for path in resume.saved_states(tmp_path / "out")] == ["step_00000002.pt"]
    train.main(arguments)
    assert [record["step"] for record in records(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]
    if nproc == 1:
        train.main(flags(world, "align", tmp_path / "whole", max_steps=6, save_every=1000, micro_batch_size=4))
        same(tmp_path / "whole", tmp_path / "out")


PRINTING = """
import sys
from configurator import run
def main(argv):
    for i in range(int(argv[0])):
        print("a line of some length", i)
run(main, "A program.", {"key": 1})
"""


@pytest.mark.parametrize("lines", ["1", "100000", "--help"])
@pytest.mark.parametrize("target, code, said", [("pipe", 141, ""), ("/dev/full", 2, "error: standard output: No space left on device\n")])
def test_a_program_whose_output_nothing_reads_ends(lines, target, code, said):
    if target == "pipe":
        reader, file = os.pipe()
        os.close(reader)
    else:
        file = os.open(target, os.O_WRONLY)
    done = subprocess.run([sys.executable, "-c", PRINTING, lines], cwd=ROOT, stdout=file, stderr=subprocess.PIPE, text=True)
    os.close(file)
    assert (done.returncode, done.stderr) == (code, said)


WRITING = """
import sys
from configurator import run
from engine.files import atomic
def main(argv):
    with atomic(argv[0]) as tmp, open(tmp, "w") as file:
        for i in range(int(argv[1])):
            print("a line of some length", i, flush=argv[2:] == ["flush"])
        file.write("x")
run(main, "A program.", {"key": 1})
"""


@pytest.mark.parametrize("lines", [["1", "flush"], ["100000"]])
@pytest.mark.parametrize("target, code, said", [
    ("pipe", 141, ""), ("/dev/full", 2, "error: standard output: No space left on device\n")])
def test_an_error_of_the_output_is_not_blamed_on_the_file_that_is_written(tmp_path, lines, target, code, said):
    reader, file = os.pipe()
    os.close(reader)
    if target != "pipe":
        os.close(file)
        file = os.open(target, os.O_WRONLY)
    command = [sys.executable, "-c", WRITING, tmp_path / "a.txt", *lines]
    done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.PIPE, text=True)
    os.close(file)
    assert (done.returncode, done.stderr) == (code, said) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("error, line", [
    ("OSError(13, 'Permission denied', '/some/file')", "error: /some/file: Permission denied"),
    ("OSError(29, 'Illegal seek')", "error: Illegal seek"), ("OSError('no image\\nat all')", "error: no image at all"),
    ("OSError(28, 'No space left on device')", "error: standard output: No space left on device"),
    ("UserError('one\\ntwo')", "error: one two"), ("KeyboardInterrupt", "interrupted")])
def test_whatever_the_machine_refuses_is_one_line(error, line):
    script = f"from configurator import *\ndef main(argv): raise {error}\nrun(main, '', {{}})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == line + "\n" and done.returncode == (130 if line == "interrupted" else 2)


# -----------------------------------------------------------------------------
# Workers

def test_a_killed_data_worker_costs_no_step(world, tmp_path):
    """Killed in the middle of a step, where torch would raise; the loader finds it out, and the steps are saved first."""
    arguments = flags(world, "align", tmp_path / "out", max_steps=100_000, save_every=1_000_000, num_workers=2)

    def work(rank):
        data.GRACE_S = 1
        train_py(arguments)(rank)

    [rank] = ranks = start(1, work)
    wait_for(lambda: len(logged(tmp_path / "out")) >= 3, rank.is_alive)
    workers = Path(f"/proc/{rank.pid}/task/{rank.pid}/children").read_text().split()
    assert len(workers) == 2
    os.kill(int(workers[0]), signal.SIGKILL)
    [code], [error] = ended(ranks)
    assert code == 2 and error.startswith("error: a process that reads the data died (")
    assert error.count("\n") == 1
    last = len(logged(tmp_path / "out"))
    assert [path.name for path in resume.saved_states(tmp_path / "out")] == [f"step_{last:08d}.pt"]
    assert [record["step"] for record in records(tmp_path / "out")] == list(range(1, last + 1))


# -----------------------------------------------------------------------------
# Config files are programs

DEFAULTS = dict(steps=1, rate=0.1, name="", flag=False)
UNSHOWN = "class _Odd:\n    def __repr__(self): raise RuntimeError\n    __str__ = __repr__\n"
CONFIGS = {
    "import sys; sys.exit(0)": "line 1: SystemExit, 0",
    "raise SystemExit": "line 1: SystemExit",
    "exit()": "line 1: SystemExit",
    "quit(3)": "line 1: SystemExit, 3",
    "raise ExceptionGroup('several', [ValueError(1), OSError(2)])": "line 1: ExceptionGroup, several (2 sub-exceptions)",
    "raise BaseExceptionGroup('both', [SystemExit(1), ValueError(2)])": "line 1: BaseExceptionGroup, both",
    "raise GeneratorExit": "line 1: GeneratorExit",
    "class Mine(BaseException): pass\nraise Mine('x')": "line 2: Mine, x",
    "class Odd(Exception):\n    def __str__(self): raise RuntimeError\nraise Odd": "line 3: Odd, (its str fails: RuntimeError)",
    UNSHOWN + "steps = _Odd()": "steps: found _Odd (its repr fails: RuntimeError), expected int",
    UNSHOWN + "name = [_Odd()]": "name: found list (its repr fails: RuntimeError), expected str",
    "open('/no/such/file')": "line 1: FileNotFoundError",
    "raise ValueError('x' * 10_000)": "line 1: ValueError, xxx",
    "f = lambda: f()\nf()": "line 1: RecursionError",
    "globals()[3] = 4": "AttributeError",
    "globals()[''] = 4": "unknown key ''",
    "name = 'a\\0b'": "name: found 'a\\x00b', expected UTF-8 text",
    "name = '\\ud800'": "name: found '\\ud800', expected UTF-8 text",
    "steps = 10**20": "found int 100000000000000000000, expected int of at most 64 bits",
    "rate = 10**400": "expected float of at most 64 bits",
    "steps = " + "9" * 5000: "syntax error",
    "name = " + "(" * 1000: "syntax error",
    "name = 'x' * 10_000\nsteps = name": "found str 'xxx",
}


@pytest.mark.parametrize("text", CONFIGS, ids=lambda text: text[:30])
def test_a_config_file_may_fail_in_any_way(tmp_path, text):
    path = tmp_path / "config.py"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(DEFAULTS, [str(path)])
    message = str(caught.value)
    assert message.startswith(f"{path}") and CONFIGS[text] in message and "\n" not in message and len(message) < 600


def test_a_config_file_is_a_file_of_text(tmp_path):
    os.mkfifo(tmp_path / "pipe")                                     # reading it would never end
    (tmp_path / "latin").write_bytes("name = 'ä'".encode("latin-1"))
    for place in (tmp_path / "pipe", "/dev/zero", tmp_path, tmp_path / "latin", tmp_path / ("n" * 300), "a\0b"):
        with pytest.raises(UserError, match="check the path of the config file|line 1: syntax error"):
            load_config(DEFAULTS, [str(place)])
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbfsteps = 3")     # Windows' editors write a byte order mark
    assert load_config(DEFAULTS, [str(tmp_path / "marked")]).steps == 3


@pytest.mark.parametrize("flag", ["--steps=100000000000000000000", f"--steps={'9' * 5000}",
                                  "--name=a\udcffb", "--name=a\0b"])
def test_a_flag_that_no_number_or_text_holds(flag):
    with pytest.raises(UserError) as caught:
        load_config(DEFAULTS, [flag])
    assert str(caught.value).startswith(flag.split("=")[0]) and len(str(caught.value)) < 200


@pytest.mark.parametrize("key, value", [
    ("kd_weight", -1), ("kd_weight", "nan"), ("beta", 0), ("beta", -0.1), ("kd_temperature", "nan"), ("kd_temperature", -1),
    ("on_policy_temperature", "nan"), ("on_policy_temperature", -1), ("on_policy_temperature", 1e-42),
    ("on_policy_temperature", 1e300), ("kd_temperature", 1e-320), ("kd_temperature", 1e200),
    ("jsd_beta", "nan"), ("learning_rate", "inf"),
    ("max_length", 3_000_000_000), ("max_length", 0), ("num_workers", 100_000), ("num_workers", -1), ("seed", -1),
    ("seed", 10**20), ("warmup_ratio", "nan"), ("grad_clip", "nan"), ("eps", "1e-400"), ("beta2", 1.0), ("epochs", 0)])
def test_every_number_has_its_bounds(world, tmp_path, key, value):
    with pytest.raises(UserError) as caught:
        train.main(flags(world, "d2d", tmp_path / "out", **{key: value}))
    assert key in str(caught.value) and "expected" in str(caught.value) and not (tmp_path / "out").exists()
