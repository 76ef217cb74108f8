"""
Crash recovery. A run may end at any moment; the same command continues from its last saved state, bit for bit.

    out_dir/run.json                   settings, package versions, and whether the run is finished
    out_dir/log.jsonl                  one record per step
    out_dir/state/step_00000300.pt     the trainable parameters after step 300 in fp32, with Adam's two averages
    out_dir/lock                       keeps a second run out
    out_dir/...                        the student as a Hugging Face folder

Files are written atomically (engine/files.py): under a temporary name, flushed to the disk, then renamed. A kill
leaves the old file or the new one, and perhaps a .tmp that the next start deletes. Disks fail too, so the newest
state is read through before it is trusted (the format has a checksum per tensor), and the newest two are kept.

Why a run ends, and what it leaves:

    killed, power lost           the last state; at most `save_every` steps are run again
    SIGTERM, SIGINT (Ctrl-C)     the state of the current step: the ranks finish it, save, and stop
    disk full                    the last state, and a line that says how much room is missing
    loss not finite              the last state; the update that would have destroyed the weights is not made
    broken data                  the state of the step before
"""
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import signal
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from configurator import Config, Stopped, UserError
from engine.files import atomic, disk_errors, read_json, write_json, write_text
from model import Llava


# -----------------------------------------------------------------------------
# Starting

def begin_or_resume(out_dir: Path, config: Config, may_change: list[str]) -> tuple[bool, Path | None, str]:
    """-> (already finished, state to resume from, note for the user). UserError if the settings have changed."""
    if not (out_dir / "run.json").is_file():
        if saved_states(out_dir):
            raise UserError(f"{out_dir / 'run.json'}: no such file, but {out_dir / 'state'} holds states of a run; "
                            "choose another out_dir, or remove that folder")
        return False, None, ""
    run = read_json(out_dir / "run.json")
    before = run.get("config")
    if not isinstance(before, dict):
        raise UserError(f"{out_dir / 'run.json'}: has no \"config\"; choose another out_dir, or remove {out_dir}")
    for key, value in config.items():
        if key not in may_change and before.get(key) != value:
            raise UserError(f"{out_dir} holds a run with {key}={before.get(key)!r}, this one has {key}={value!r}; "
                            "choose another out_dir, or repeat the command that began it")
    if run.get("finished") is True:
        return True, None, ""

    damaged = []
    for path in reversed(saved_states(out_dir)):
        reason = find_damage(path)
        if not reason:
            note = "".join(f"{line}; continuing from step {step_of(path)}" for line in damaged)
            return False, path, note
        damaged.append(f"{path} is damaged ({reason})")
    if damaged:
        raise UserError(f"{'; '.join(damaged)}: no state is left to continue from; remove {out_dir / 'state'} to "
                        "start again at step 0")
    return False, None, ""


LOCK_FILES = []    # kept open: closing a file releases its lock


def lock(out_dir: Path) -> None:
    """Keep other processes out of the folder until this one ends, however it ends."""
    with disk_errors(out_dir / "lock", note=last_state(out_dir)):
        out_dir.mkdir(parents=True, exist_ok=True)
        file = open(out_dir / "lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)             # the kernel releases it with the process
    except OSError:
        raise UserError(f"{out_dir}: another run is writing there; wait for it, end it, or choose another "
                        "out_dir") from None
    LOCK_FILES.append(file)


def go_back(out_dir: Path, step: int) -> None:
    """Undo what was written after `step`: later log records, damaged states, temporary files."""
    log, kept = out_dir / "log.jsonl", []
    with disk_errors(log, note=last_state(out_dir)):
        remove_tmp(out_dir)
        for path in saved_states(out_dir):
            if step_of(path) > step:
                path.rename(path.with_suffix(".damaged"))
        if not log.is_file():
            return
        for line in log.read_bytes().decode(errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                break                                                # the last write was cut short
        write_text(log, "".join(kept))


def remove_tmp(out_dir: Path) -> None:
    for path in [*out_dir.glob("*.tmp"), *out_dir.glob("state/*.tmp")]:
        path.unlink()


# -----------------------------------------------------------------------------
# States

def saved_states(out_dir: Path) -> list[Path]:
    """Complete states, the newest last."""
    paths = (out_dir / "state").glob("step_*.pt")
    return sorted(path for path in paths if re.fullmatch(r"step_\d{8,}\.pt", path.name))


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def last_state(out_dir: Path) -> str:
    """What to tell the user if a write fails."""
    states = saved_states(out_dir)
    intact = f"the state of step {step_of(states[-1])} is intact" if states else "no state was saved before"
    return f"{intact}: make room and repeat the same command"


def find_damage(path: Path) -> str:
    """What is wrong with a state file, or "". The file is a zip archive, which has a checksum for each tensor."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad:
            return f"checksum of {bad}"
        state = read_state(path)
    except Exception as error:                                       # zipfile and pickle raise nearly anything
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    if not isinstance(state, dict) or not {"step", "weights", "adam", "sampler"} <= state.keys():
        return "not a state of this program"
    return "" if state["step"] == step_of(path) else f"holds step {state['step']!r}"


def read_state(path: Path) -> dict:
    """The state with memory-mapped tensors: their bytes are read on use, and the ranks share one copy."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


# -----------------------------------------------------------------------------
# Writing

def write_state(out_dir: Path, state: dict) -> None:
    """`state`: step, weights and adam by parameter name, sampler. Frozen parameters are not in it."""
    path = out_dir / "state" / f"step_{state['step']:08d}.pt"
    size = sum(t.nbytes for tensors in (state["weights"], *state["adam"].values()) for t in tensors.values())
    with atomic(path, size, last_state(out_dir)) as tmp, open(tmp, "wb") as file:
        torch.save(state, file)                                      # given a path, it hides the system's error
    for old in saved_states(out_dir)[:-2]:
        old.unlink()


def write_model(out_dir: Path, student: Llava, dtype: torch.dtype, weights: dict[str, torch.Tensor]) -> None:
    """The student as a Hugging Face folder. `weights`: its full tensors by name."""
    size = sum(tensor.numel() * dtype.itemsize for tensor in weights.values())
    with disk_errors(out_dir / "model.safetensors", size, last_state(out_dir)):
        student.save_pretrained(out_dir, dtype, weights)


def write_run(out_dir: Path, config: Config, world_size: int, finished: bool) -> None:
    versions = {"python": platform.python_version()}
    for package in ("torch", "tokenizers", "safetensors", "pillow", "numpy", "einops"):
        versions[package] = importlib.metadata.version(package)
    record = {"config": dict(config), "world_size": world_size, "versions": versions, "finished": finished}
    with disk_errors(out_dir / "run.json", note=last_state(out_dir)):
        write_json(out_dir / "run.json", record)


def append_log(out_dir: Path, record: dict) -> None:
    path, line = out_dir / "log.jsonl", json.dumps(record) + "\n"
    with disk_errors(path, len(line), last_state(out_dir)), open(path, "a") as log:
        log.write(line)


# -----------------------------------------------------------------------------
# Stopping on a signal or an error

class Stop:
    """This rank's reasons to stop. All ranks stop after the same step: an all-reduce per step sums their votes.

    Before the first step there is nothing to save, and a signal ends the process at once; so does a second signal.
    """
    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.signal, self.since, self.error, self.can_wait = None, 0.0, None, False

    def listen(self) -> None:
        for number in self.SIGNALS:
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: object) -> None:
        # A launcher and the terminal may both pass on one Ctrl-C: two signals within a second count as one.
        second = self.signal is not None and time.monotonic() - self.since > 1
        if not self.can_wait or second:
            when = "again, ending at once" if second else "before the first step: nothing to save"
            if os.environ.get("RANK", "0") == "0":
                os.write(2, f"{signal.Signals(number).name} {when}\n".encode())
            os._exit(128 + number)
        if self.signal is None:
            self.signal, self.since = signal.Signals(number), time.monotonic()

    def watch(self, stream: Iterable[list]) -> Iterator[list]:
        """The items of `stream`; if it fails, an empty item and a vote, so that the other ranks stop too."""
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
        votes = {number.name: int(self.signal == number) for number in self.SIGNALS}
        return votes | {"error": int(self.error is not None)}

    def end(self, total: dict[str, int], step: int, rank: int) -> None:
        """End this process, after all ranks have saved the state of `step`. `total`: the votes of all ranks."""
        if self.error is not None:
            raise self.error
        if total["error"]:                                           # another rank's, which reports it
            raise SystemExit(2)
        number = next(number for number in self.SIGNALS if total[number.name])
        if rank != 0:
            raise SystemExit(128 + number)
        raise Stopped(f"{number.name}: stopped after step {step}, which is saved; the same command goes on from there",
                      128 + number)
