"""
What survives a crash. A run may end at any moment, and the same command goes on where it was saved last, bit for bit.

    out_dir/run.json                   settings, versions, and whether the run is finished
    out_dir/log.jsonl                  one record per step
    out_dir/state/step_00000300.pt     what learns after step 300, in fp32, with Adam's two averages; the newest two are kept
    out_dir/lock                       keeps a second run out
    out_dir/...                        the student as a Hugging Face folder

One rule makes this work: a file bears its name only when it is complete. It is written beside its place (.tmp), flushed to
the disk and then renamed, which happens entirely or not at all. So whoever kills the process leaves the old state, or the
new one, and perhaps a .tmp that the next start sweeps away. Disks fail too, so the newest state is read through before it is
trusted (the format has a checksum per tensor), and the one before it is the reserve.

Why a run ends, and what it leaves:

    killed, power lost           the last state; at most `save_every` steps are run again
    SIGTERM, SIGINT (Ctrl-C)     the state of the step that was running: the ranks finish it, save, and stop
    disk full                    the last state, and a line that says how much room is missing
    loss not a number            the last state; the step that would have spoilt the weights is not taken
    broken data                  the state of the step before
"""
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from configurator import Config, Stopped, UserError
from engine.files import read_json, write_text as write_file


# -----------------------------------------------------------------------------
# Beginning

def begin_or_resume(out_dir: Path, config: Config, may_change: list[str]) -> tuple[bool, Path | None, str]:
    """(finished already, the state to go on from, a line for the user). Raises if the settings are not those of before."""
    if not (out_dir / "run.json").is_file():
        if saved_states(out_dir):
            raise UserError(f"{out_dir / 'run.json'}: no such file, but {out_dir / 'state'} holds states of a run; choose "
                                  "another out_dir, or remove that folder")
        return False, None, ""
    run = read_json(out_dir / "run.json")
    before = run.get("config")
    if not isinstance(before, dict):
        raise UserError(f"{out_dir / 'run.json'}: has no \"config\"; choose another out_dir, or remove {out_dir}")
    for key, value in config.items():
        if key not in may_change and before.get(key) != value:
            raise UserError(f"{out_dir} holds a run with {key}={before.get(key)!r}, this one has "
                              f"{key}={value!r}; choose another out_dir, or repeat the command that began it")
    if run.get("finished") is True:
        return True, None, ""

    states, damaged = saved_states(out_dir), []
    for path in reversed(states):
        reason = find_damage(path)
        if not reason:
            return False, path, "".join(f"{bad}; continuing from step {step_of(path)}" for bad in damaged)
        damaged.append(f"{path} is damaged ({reason})")
    if damaged:
        raise UserError(f"{'; '.join(damaged)}: no state is left to continue from; remove {out_dir / 'state'} to start "
                              "again at step 0")
    return False, None, ""


HELD = []    # open files whose locks this process holds; closing one would give its lock up


def lock(out_dir: Path) -> None:
    """Keep other processes out of the folder for as long as this one lives."""
    file = open(out_dir / "lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)             # the kernel's: it goes when the process does
    except OSError:
        raise UserError(f"{out_dir}: another run is writing there; wait for it, end it, or choose another out_dir") from None
    HELD.append(file)


def saved_states(out_dir: Path) -> list[Path]:
    """Complete states, the newest last."""
    return sorted(path for path in (out_dir / "state").glob("step_*.pt") if re.fullmatch(r"step_\d{8,}\.pt", path.name))


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def find_damage(path: Path) -> str:
    """What is wrong with a state file, or "". The file is a zip archive: it carries a checksum of each tensor."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad:
            return f"checksum of {bad}"
        state = read_state(path)
    except Exception as error:   # damaged bytes make zipfile and pickle raise nearly anything
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    if not isinstance(state, dict) or not {"step", "weights", "adam", "sampler"} <= state.keys():
        return "not a state of this program"
    return "" if state["step"] == step_of(path) else f"holds step {state['step']!r}"


def read_state(path: Path) -> dict:
    """The state without its tensors' bytes: those are read when they are used, so that ranks do not each hold a copy."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def go_back(out_dir: Path, step: int) -> None:
    """Make the folder what it was after `step`: later log records, damaged states and unfinished files go."""
    for leftover in [*out_dir.glob("*.tmp"), *out_dir.glob("state/*.tmp")]:
        leftover.unlink()
    for path in saved_states(out_dir):
        if step_of(path) > step:
            path.rename(path.with_suffix(".damaged"))
    log, kept = out_dir / "log.jsonl", []
    if log.is_file():
        for line in log.read_bytes().decode(errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                break                                                # torn in the middle of a write
        write_file(log, "".join(kept))


def write_run(out_dir: Path, config: Config, world_size: int, finished: bool) -> None:
    packages = ["torch", "tokenizers", "safetensors", "pillow", "numpy", "einops"]
    versions = {"python": platform.python_version()}
    versions |= {package: importlib.metadata.version(package) for package in packages}
    record = {"config": dict(config), "world_size": world_size, "versions": versions, "finished": finished}
    write_file(out_dir / "run.json", json.dumps(record, indent=2))


# -----------------------------------------------------------------------------
# Writing

def write_state(out_dir: Path, state: dict) -> None:
    """`state`: step, weights and adam by parameter name, sampler. Only what learns: the rest is where it came from."""
    path = out_dir / "state" / f"step_{state['step']:08d}.pt"
    beside = path.with_name(path.name + ".tmp")
    size = sum(t.nbytes for tensors in (state["weights"], *state["adam"].values()) for t in tensors.values())
    with writing(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        folder = os.open(path.parent, os.O_RDONLY)                   # the rename itself, on the disk
        os.fsync(folder)
        os.close(folder)
    for old in saved_states(out_dir)[:-2]:
        old.unlink()


def append_log(out_dir: Path, record: dict) -> None:
    line = json.dumps(record) + "\n"
    with writing(out_dir / "log.jsonl", len(line)):
        with open(out_dir / "log.jsonl", "a") as log:
            log.write(line)


@contextmanager
def writing(path: Path, size: int) -> Iterator[None]:
    """Turn the many ways in which a disk says no into a UserError, and remove what is half written beside `path`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = disk_error(error)
        if reason is None:
            raise
        for leftover in path.parent.glob("*.tmp"):
            leftover.unlink()
        out_dir = path.parent.parent if path.parent.name == "state" else path.parent
        states = saved_states(out_dir)
        intact = f"the state of step {step_of(states[-1])} is intact" if states else "no state was saved before"
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        raise UserError(f"{path}: cannot be written ({reason}); it needs {readable(size)}, {readable(free)} are free there; "
                        f"{intact}: make room and repeat the same command") from None


def disk_error(error: BaseException | None) -> str | None:
    """The operating system's words behind an error, if it is what made the write fail."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return os.strerror(error.errno)
        number = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
        if number:
            return os.strerror(int(number[1]))
        error = error.__context__                                    # torch.save fails again while it closes the archive
    return None


def readable(size: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


# -----------------------------------------------------------------------------
# Stopping in good order

class Stop:
    """What this rank knows of reasons to stop. Dist stop together, so it only votes; the votes ride on an all-reduce.

    Before the first step there is nothing to save, and a signal ends the process at once; so does a second one.
    """
    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.signal, self.since, self.error, self.can_wait = None, 0.0, None, False

    def listen(self) -> None:
        for number in self.SIGNALS:
            signal.signal(number, self.hear)

    def hear(self, number: int, frame: object) -> None:
        # A launcher and the terminal may both pass on one Ctrl-C: within a second two signals are one.
        second = self.signal is not None and time.monotonic() - self.since > 1
        if not self.can_wait or second:
            when = "again, ending at once" if second else "before the first step: nothing to save"
            if os.environ.get("RANK", "0") == "0":
                os.write(2, f"{signal.Signals(number).name} {when}\n".encode())
            os._exit(128 + number)
        if self.signal is None:
            self.signal, self.since = signal.Signals(number), time.monotonic()

    def watch(self, stream: Iterable[list]) -> Iterator[list]:
        """The items of `stream`. If one cannot be had, an empty one and a vote: the other ranks do not know of it."""
        stream = iter(stream)
        while True:
            try:
                item = next(stream)
            except StopIteration:
                return
            except Exception as error:
                self.error, item = error, []
            yield item

    def votes(self) -> dict[str, int]:
        return {number.name: int(self.signal == number) for number in self.SIGNALS} | {"error": int(self.error is not None)}

    def end(self, total: dict[str, int], step: int, rank: int) -> None:
        """All ranks are here, with the sum of the votes, and the state of `step` is saved."""
        if self.error is not None:
            raise self.error
        if total["error"]:                                           # another rank's, which says why
            raise SystemExit(2)
        number = next(number for number in self.SIGNALS if total[number.name])
        if rank != 0:
            raise SystemExit(128 + number)
        raise Stopped(f"{number.name}: stopped after step {step}, which is saved; the same command goes on from there",
                      128 + number)
