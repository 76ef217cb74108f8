"""
Kill a training run with SIGKILL again and again, and compare its end with that of an uninterrupted run.

    python tests/robustness/kill_study.py --kills=20

The run is dense-to-sparse distillation on a tiny student, two ranks over gloo. Each life ends with SIGKILL to both, at
a moment drawn from a seed: while it starts, during some step, or, by watching the folder, in the middle of a save. Then
the same command starts it again. At the end the weights must equal those of the uninterrupted run bit for bit, and
log.jsonl must hold every step once, with the same numbers.
"""
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conftest
from configurator import load_config, run
from processes import ended, start, train_py

DEFAULTS = dict(kills=20, seed=0)
STEPS_PER_LIFE = 12    # a life gets this far at most, so that the run lasts for all kills


def finish(arguments: list[str]) -> None:
    codes, errors = ended(start(2, train_py(arguments)), 300)
    assert codes == [0, 0], errors


def logged(out_dir: Path) -> list[dict]:
    """The records of log.jsonl but for its torn end, if it has one."""
    path = out_dir / "log.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def last_step(out_dir: Path) -> int:
    return (logged(out_dir) or [{"step": 0}])[-1]["step"]


def kill(ranks: list[multiprocessing.Process], out_dir: Path, kind: str, draw: random.Random) -> str:
    """Wait for a moment of this kind, then SIGKILL the group. Returns what was found in out_dir."""
    def alive() -> bool:
        return all(rank.exitcode is None for rank in ranks)

    if kind == "start":
        until = time.monotonic() + draw.uniform(0, 1)
        while alive() and time.monotonic() < until:
            time.sleep(0.001)
    else:
        before = len(logged(out_dir))
        while alive() and len(logged(out_dir)) == before:            # the log may be cut first: any change will do
            time.sleep(0.001)
        goal = max(4, last_step(out_dir) + draw.randrange(STEPS_PER_LIFE))
        while alive() and last_step(out_dir) < goal:
            time.sleep(0.001)
        if kind == "step":
            time.sleep(draw.uniform(0, 0.05))
        elif kind == "state":
            while alive() and not any(out_dir.glob("state/*.tmp")):
                pass                                                 # a tiny file is written in a millisecond
        else:
            states = os.listdir(out_dir / "state")
            while alive() and (os.listdir(out_dir / "state") == states or any(out_dir.glob("state/*.tmp"))):
                pass                                                 # a new state is there: next comes the folder
            time.sleep(draw.uniform(0, 0.01))
    found = "running" if alive() else "ended"
    os.killpg(ranks[0].group, signal.SIGKILL)
    for rank in ranks:
        rank.join()
    if any(out_dir.glob("state/*.tmp")):
        found += ", state half written"
    if any(out_dir.glob("*.tmp")):
        found += ", folder half written"
    return found


def settings_for(kills: int) -> dict:
    return dict(micro_batch_size=4, save_every=4, max_steps=(STEPS_PER_LIFE + 4) * kills)


def study(kills: int, flags, out: Path, seed: int = 0) -> list[tuple[str, str, int]]:
    """`flags(out_dir, **settings)`: the command line of a run. Returns (kind, what was found, last step) of each kill.

    The two runs are left in out/untouched and out/killed.
    """
    settings = settings_for(kills)
    finish(flags(out / "untouched", **settings))
    draw, lives = random.Random(seed), []
    for i in range(kills):
        kind = ("state", "step", "export", "start")[i % 4]
        ranks = start(2, train_py(flags(out / "killed", **settings)))
        found = kill(ranks, out / "killed", kind, draw)
        lives.append((kind, found, last_step(out / "killed")))
    finish(flags(out / "killed", **settings))

    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (out / "untouched" / name).read_bytes() == (out / "killed" / name).read_bytes(), f"{name} differs"
    times = ("tokens_per_s", "seconds")
    one, other = ([{key: value for key, value in record.items() if key not in times} for record in logged(out / name)]
                  for name in ("untouched", "killed"))
    steps = [record["step"] for record in other]
    assert steps == list(range(1, settings["max_steps"] + 1)), "log.jsonl has gaps or repeats"
    assert one == other, "log.jsonl differs"
    assert not list((out / "killed").rglob("*.tmp"))
    return lives


def make_world(folder: Path) -> None:
    """A sparse run needs little: a dense student, a teacher, and some rows of text and images."""
    from PIL import Image

    from model import Llava
    draw = random.Random(0)
    rows = []
    for i in range(32):
        Image.new("RGB", (30 + i, 40), (i * 8, 99, 255 - i * 8)).save(folder / f"{i}.png")
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": [
            {"from": "human", "value": "<image>\n" + " ".join(draw.choices(conftest.WORDS[:22], k=4))},
            {"from": "gpt", "value": " ".join(draw.choices(conftest.WORDS[:22], k=draw.randint(1, 9)))}]})
    (folder / "rows.json").write_text(json.dumps(rows))
    clip = conftest.make_clip(folder / "clip")
    Llava.from_parts(clip, conftest.make_qwen(folder / "qwen")).save_pretrained(folder / "dense")
    wider = conftest.make_qwen(folder / "wider", seed=1, hidden=48, layers=2)
    Llava.from_parts(clip, wider, seed=1).save_pretrained(folder / "teacher")


def main(argv: list[str]) -> None:
    config = load_config(DEFAULTS, argv)
    with tempfile.TemporaryDirectory() as folder:
        world, began = Path(folder), time.time()
        make_world(world)

        def flags(out_dir: Path, **more) -> list[str]:
            settings = dict(stage="d2s", student=world / "dense", teacher=world / "teacher", data=world / "rows.json",
                            image_dir=world, out_dir=out_dir, batch_size=8, learning_rate=1e-2, dtype="float32",
                            device="cpu")
            return [f"--{key}={value}" for key, value in (settings | more).items()]

        for i, (kind, found, step) in enumerate(study(config.kills, flags, world, config.seed), start=1):
            print(f"kill {i:3}  aimed at: {kind:6}  found: {found:42}  log reached step {step}")
        print(f"{config.kills} kills in {time.time() - began:.0f} s: the weights are bit for bit those of an "
              "uninterrupted run, and the log has every step once")


if __name__ == "__main__":
    run(main, __doc__, DEFAULTS)
