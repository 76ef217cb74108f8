"""
Crash recovery. A run may end at any moment; the same command continues from its last saved state, bit for bit. (On a
GPU with --deterministic. Without it, gradients are added up in an order that varies, in attention and elsewhere, and two
runs from one state differ in the last bits.)

    out_dir/run.json                   settings, inputs, package versions, and whether the run is finished
    out_dir/log.jsonl                  one record per step
    out_dir/state/step_00000300.pt     the trainable parameters after step 300 in fp32, with Adam's two averages
    out_dir/lock                       marks the folder as train.py's own, and keeps a second run out
    out_dir/...                        the student as a Hugging Face folder

Files are written atomically (engine/files.py): under a temporary name, flushed to the disk, then renamed. A kill
leaves the old file or the new one, and perhaps a .tmp that the next start deletes. Disks fail too, so the newest
state is read through before it is trusted (the format has a checksum per tensor), and the newest two are kept.

A run is told by its settings and by the content of what it reads (data, student, teacher), not by names or times: these
files may move (image_dir and teacher_cache may not), but a state is continued only by the run that wrote it.

Why a run ends, and what it leaves:

    killed, power lost           the last state; at most `save_every` steps are run again
    SIGTERM, SIGINT (Ctrl-C)     the state of the current step: the ranks finish it, save, and stop
    disk full                    the last state, and a line that says how much room is missing
    loss not finite              the last state; the update that would have destroyed the weights is not made
    broken data, a dead worker   the state of the step before
    nothing reads the output     the state of the current step
"""
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from configurator import Config, Stopped, UserError, discard_output
from engine.files import atomic, check_owner, claim, disk_errors, read_json, read_text, sync, write_json, write_text
from model import Llava

OWNER = "train.py"


# -----------------------------------------------------------------------------
# Starting

def begin_or_resume(out_dir: Path, config: Config, may_change: list[str],
                    inputs: list[str] | None = None) -> tuple[bool, Path | None, str]:
    """-> (already finished, state to resume from, note for the user). UserError if the settings have changed.

    inputs: the settings that name what the run reads; `check_inputs` compares the content.
    """
    inputs = inputs or []
    check_owner(out_dir, OWNER, {key: config[key] for key in inputs})
    run = read_run(out_dir)
    if run is None:
        if saved_states(out_dir):
            raise UserError(f"{out_dir / 'run.json'}: no such file, but {out_dir / 'state'} holds states of a run; "
                            "choose another out_dir, or remove that folder")
        return False, None, ""
    before = run["config"]
    for key, value in config.items():
        same = bool(before.get(key)) == bool(value) if key in inputs else before.get(key) == value
        if key not in may_change and not same:
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


def read_run(out_dir: Path) -> dict | None:
    """What run.json says, None if there is none."""
    path = out_dir / "run.json"
    if not path.is_file():
        return None
    run = read_json(path)
    for key in ("config", "inputs"):
        if not isinstance(run.get(key), dict):
            raise UserError(f"{path}: has no \"{key}\"; choose another out_dir")
    return run


def check_inputs(out_dir: Path, config: Config, inputs: dict[str, str]) -> dict[str, str]:
    """`inputs`: a digest of what each setting names. UserError if the run in out_dir began with other content.

    -> all digests that are known; a teacher whose outputs are cached may be gone.
    """
    before = (read_run(out_dir) or {"inputs": {}})["inputs"]
    for key, value in inputs.items():
        if before.get(key, value) != value:
            raise UserError(f"{key}={config[key]}: has changed since the run in {out_dir} began; "
                            "restore it, or choose another out_dir")
    return before | inputs


def lock(out_dir: Path, step: int) -> None:
    """Keep other processes out of the folder until this one ends. `step`: of the state that this run starts from.

    While it loaded its model, another run may have ended there: then the folder is not what `begin_or_resume` saw.
    """
    claim(out_dir, OWNER)
    for path in saved_states(out_dir):
        if step_of(path) > step and not find_damage(path):
            raise UserError(f"{path}: another run has saved this state in the meantime; repeat the same command")


def go_back(out_dir: Path, step: int) -> None:
    """Undo what was written after `step`: later log records, damaged states, half-written files."""
    log, kept = out_dir / "log.jsonl", []
    with disk_errors(log, note=last_state(out_dir)):
        for path in [*out_dir.glob("*.safetensors.tmp"), *out_dir.glob("state/*.tmp")]:
            if OUR_TMP.fullmatch(path.name):                         # of the others, the next write takes the place
                path.unlink()
        for path in saved_states(out_dir):
            if step_of(path) > step:
                path.rename(path.with_suffix(".damaged"))
        if not log.is_file():
            return
        lines = log.read_bytes().decode(errors="replace").split("\n")
        for number, line in enumerate(lines, start=1):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError, RecursionError):
                if number < len(lines):                              # the last write may have been cut short
                    print(f"{log} line {number}: damaged, left out: {line[:60]!r}", file=sys.stderr)
        write_text(log, "".join(kept))


# -----------------------------------------------------------------------------
# States

OUR_TMP = re.compile(r"(step_\d{8,}\.pt|model(-\d{5}-of-\d{5})?\.safetensors)\.tmp")


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
        state, run = read_state(path), read_run(path.parent.parent)
        if state["step"] != step_of(path):
            return f"holds step {state['step']!r}"
        if run is not None and state["run"] != run["digest"]:
            return "of another run"
        tensors = {"weights": state["weights"], **state["adam"]}     # by name; Adam's by parameter and kind
        for name, group in tensors.items():
            for key, tensor in group.items():
                if not tensor.isfinite().all() or key == "step" and tensor != state["step"]:
                    return f"a wrong number in {name}, {key}"
    except Exception as error:                                       # zipfile and pickle raise nearly anything
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    return ""


def check_state(path: Path, state: dict, trainable: dict[str, nn.Parameter]) -> None:
    """UserError unless a state holds the trainable parameters and no others, in their shapes and dtype."""
    for name in trainable.keys() | state["weights"].keys() | state["adam"].keys():
        weight, adam, wanted = state["weights"].get(name), state["adam"].get(name, {}), trainable.get(name)
        found = [(t.shape, t.dtype) for t in (weight, adam.get("exp_avg"), adam.get("exp_avg_sq")) if t is not None]
        if wanted is None or "step" not in adam or found != [(wanted.shape, wanted.dtype)] * 3:
            raise UserError(f"{path}: {name} is missing, or is not what this run trains; remove the file to "
                            "continue from the state before")


def read_state(path: Path) -> dict:
    """The state with memory-mapped tensors: their bytes are read on use, and the ranks share one copy."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


# -----------------------------------------------------------------------------
# Writing

def write_state(out_dir: Path, state: dict) -> None:
    """`state`: step, weights and adam by parameter name. Frozen parameters are not in it."""
    path = out_dir / "state" / f"step_{state['step']:08d}.pt"
    size = sum(t.nbytes for tensors in (state["weights"], *state["adam"].values()) for t in tensors.values())
    with atomic(path, size, last_state(out_dir)) as tmp, open(tmp, "wb") as file:
        sync(out_dir / "log.jsonl")                                  # no state ahead of the log
        torch.save(state | {"run": read_run(out_dir)["digest"]}, file)   # given a path, it hides the system's error
    for old in saved_states(out_dir)[:-2]:
        old.unlink()


def write_model(out_dir: Path, student: Llava, dtype: torch.dtype, weights: dict[str, torch.Tensor]) -> None:
    """The student as a Hugging Face folder. `weights`: its full tensors by name."""
    size = sum(tensor.numel() * dtype.itemsize for tensor in weights.values())
    with disk_errors(out_dir / "model.safetensors", size, last_state(out_dir)):
        student.save_pretrained(out_dir, dtype, weights)


def write_run(out_dir: Path, config: Config, may_change: list[str], inputs: dict[str, str], world_size: int) -> None:
    """`may_change`: settings that do not tell one run from another. "digest" is of all that does."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "tokenizers", "safetensors", "pillow", "numpy", "einops"):
        versions[package] = importlib.metadata.version(package)
    settings = {key: value for key, value in config.items() if key not in may_change}
    digest = hashlib.sha256(json.dumps([settings, inputs], sort_keys=True).encode()).hexdigest()
    record = {"config": dict(config), "inputs": inputs, "digest": digest, "world_size": world_size,
              "versions": versions, "finished": False}
    with disk_errors(out_dir / "run.json", note=last_state(out_dir)):
        write_json(out_dir / "run.json", record)


def finish(out_dir: Path) -> None:
    with disk_errors(out_dir / "run.json", note=last_state(out_dir)):
        write_json(out_dir / "run.json", read_run(out_dir) | {"finished": True})


def first_losses(out_dir: Path, count: int) -> list[float]:
    """Of the first steps in the log; a record without one, which a user has edited, is skipped."""
    path = out_dir / "log.jsonl"
    lines = read_text(path).split("\n")[:count] if path.is_file() else []
    losses = [json.loads(line).get("loss") for line in lines if line]
    return [loss for loss in losses if isinstance(loss, float)]


def append_log(out_dir: Path, record: dict) -> None:
    path, line = out_dir / "log.jsonl", json.dumps(record) + "\n"
    with disk_errors(path, len(line), last_state(out_dir)), open(path, "a") as log:
        log.write(line)


# -----------------------------------------------------------------------------
# Stopping on a signal or an error

def defer_worker_deaths() -> None:
    """Let the data loader itself report a dead worker process, when its next batch is due.

    torch reports it from a signal handler, in the middle of whatever runs: a step, an update, a save.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


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
            defer_worker_deaths()
            yield item

    def say(self, line: str) -> None:
        """Print; a vote if that fails, as with `| head -1` or a full disk."""
        try:
            print(line, flush=True)
        except OSError as error:
            discard_output()
            self.error = UserError(f"standard output: {error.strerror}; all steps are saved, the same command goes "
                                   "on from there")

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
        if step == 0:
            raise Stopped(f"{number.name}: stopped before the first step; nothing to save", 128 + number)
        raise Stopped(f"{number.name}: stopped after step {step}, which is saved; the same command goes on from there",
                      128 + number)
