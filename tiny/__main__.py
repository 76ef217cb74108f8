"""
The embedded world: everything the recipe needs, drawn and trained from nothing in a few minutes.

    python -m tiny --out_dir=data/tiny                    all four parts, one after the other
    python -m tiny --out_dir=data/tiny --part=world       one part per process, in any order:
                                                          world, vision, llm_teacher or llm_student
    python -m tiny --report=out/tiny                      print what speedrun.sh has measured, make nothing
    python -m tiny --report=out/tiny --models=reverse,pd  the same of these runs below out/tiny
    python -m tiny --draw="red bottle, blue cup at 5"     draw this scene to scene.png, to talk about it (sample.py)

LLaVA-MoD starts from a CLIP tower, two language models, millions of captioned images and ten benchmarks.
This makes a miniature of each in the same file formats, so train.py and evaluate.py run on it unchanged.
--scale below 1 makes fewer scenes and takes fewer steps. --preset=study makes the world of tools/study.py
(study.py) instead of the speedrun's. What the world contains, and what it can show:
docs/tiny-world.md.

Reading order: scene.py (a scene, its picture), language.py (what is said about it, true and biased),
rows.py (training files), benchmarks.py, pretrain.py (the base checkpoints), report.py. things.py holds the
tables of strokes and colors.
"""
import os
import random
import shutil
import time
from pathlib import Path

from configurator import Config, UserError, check_uses, check_values, load_config, run
from engine.files import atomic, claim, disk_errors, lock, read_json, release, write_json
from tiny.benchmarks import write_benchmarks
from tiny.language import caption
from tiny.pretrain import make_language_model, make_vision
from tiny.report import print_report
from tiny.rows import save_png, write_training_files
from tiny.scene import draw_scene, parse_scene
from tiny.study import TEST_SPLIT, write_study_world

OWNER = "python -m tiny"
PARTS = ["world", "vision", "llm_teacher", "llm_student"]
DEFAULTS = dict(
    out_dir="data/tiny",
    part="all",          # or one of PARTS
    seed=0,
    scale=1.0,           # of the numbers of scenes and steps
    preset="",           # study | tuning: the world of tools/study.py
    report="",           # the folder of speedrun.sh's results
    models="",           # with --report: names of runs in it; empty: those of speedrun.sh
    draw="",             # a scene: COLOR THING, with "at CELL" (0 to 15, row by row) where it matters; "label 7" is a digit
    style="plain",       # with --draw: plain | unseen, the drawing style kept out of training
    out="scene.png",     # with --draw: the picture's file
)
SIZES = {                # scenes
    "teacher": 6000,     # the teacher's fine-tuning
    "student": 500,      # alignment, d2d, d2s and sft all draw from these
    "preference": 4000,  # one pair each
    "pope": 320, "gqa": 300, "objhal": 300,
    "unseen": 200,       # of each benchmark, in the drawing style that is kept out of training
}
SCALE = ("a positive number, at most 10", lambda scale: 0 < scale <= 10)


def main(argv: list[str]) -> None:
    config = load_config(DEFAULTS, argv)
    check_values(config, {"part": ["all", *PARTS], "scale": SCALE, "preset": ["", *TEST_SPLIT], "style": ["plain", "unseen"],
                          "out": ("a name that ends in .png", lambda out: out.endswith(".png"))})
    makes_parts = not config.report and not config.draw
    check_uses(config, DEFAULTS, [
        (["draw"], not config.report, "runs without --report"),
        (["models"], config.report, "--report"),
        (["style", "out"], config.draw, "--draw"),
        (["seed"], not config.report, "--draw and the making of a world"),
        (["out_dir", "part", "scale", "preset"], makes_parts, "the making of a world")])
    if config.report:
        print_report(Path(config.report), config.models)
    elif config.draw:
        draw(config)
    else:
        for part in PARTS if config.part == "all" else [config.part]:
            make(part, Path(config.out_dir), config.seed, config.scale, config.preset)


def draw(config: Config) -> None:
    rng = random.Random(config.seed)
    scene = parse_scene(config.draw, rng)
    with atomic(config.out) as tmp:
        save_png(draw_scene(scene, rng, config.style), tmp)
    print(f"{config.out}: {caption(scene)}")


def make(part: str, out_dir: Path, seed: int = 0, scale: float = 1.0, preset: str = "") -> None:
    """Make one part, unless it is there already.

    out_dir/PART.json, written last, records how it was made, how long it took and how good it is. Other parts may be
    made there at the same time; a process that makes the same one is waited for.
    """
    record, settings = out_dir / f"{part}.json", {"seed": seed, "scale": scale}
    if preset and part == "world":
        settings["preset"] = preset                              # the base models are the same in every world
    if made_earlier(part, record, settings):
        return
    claim(out_dir, OWNER, wait=True)
    release(out_dir)
    with lock(out_dir / f"{part}.lock", wait=True), disk_errors(out_dir):
        if made_earlier(part, record, settings):                     # while this process waited
            return
        start = time.time()
        if part == "world":
            result = make_world(out_dir, seed, scale, preset)
        elif part == "vision":
            result = make_vision(out_dir, seed, scale)
        else:
            result = make_language_model(part, out_dir, seed, scale)
        result = {"part": part, **settings, **result, "seconds": round(time.time() - start, 1)}
        write_json(record, result)
    print(f"{part}: " + ", ".join(f"{key} {value}" for key, value in result.items() if key != "part"))


def made_earlier(part: str, record: Path, settings: dict) -> bool:
    """Is the part there? UserError if it was made with other settings."""
    if not record.exists():
        return False
    found = read_json(record, hint=f"delete {record.parent}")
    for key in ("seed", "scale", "preset"):
        if found.get(key) != settings.get(key):
            raise UserError(f"{record}: {part} was made with {key}={found.get(key)}, this run has "
                            f"{key}={settings.get(key)}; delete {record.parent} or choose another --out_dir")
    print(f"{part}: made earlier, nothing to do")
    return True


def make_world(out_dir: Path, seed: int, scale: float, preset: str = "") -> dict:
    """Training files and benchmark files: written under world.tmp, then renamed."""
    sizes = {name: max(4, round(scale * n)) for name, n in SIZES.items()}
    unseen_sizes = {name: sizes["unseen"] for name in ("pope", "gqa", "objhal")}
    tmp = out_dir / "world.tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    if preset:
        sizes = write_study_world(tmp, preset, seed, scale)
    else:
        training_scenes = write_training_files(tmp / "train", sizes, seed)
        write_benchmarks(tmp / "bench", sizes, seed, "plain", training_scenes)
        write_benchmarks(tmp / "bench_unseen", unseen_sizes, seed, "unseen", training_scenes)
    os.sync()                                                        # thousands of small files, flushed at once
    for folder in sorted(tmp.iterdir()):                             # train, bench, bench_unseen; a study's has check, too
        shutil.rmtree(out_dir / folder.name, ignore_errors=True)
        os.replace(folder, out_dir / folder.name)
    tmp.rmdir()
    return {"scenes": sizes}


if __name__ == "__main__":
    run(main, __doc__, DEFAULTS)
