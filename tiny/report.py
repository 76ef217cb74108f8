"""
The report of speedrun.sh: two tables of what evaluate.py has measured, and the seconds of each step.
"""
from pathlib import Path

from configurator import UserError
from engine.files import read_json, read_text
from tiny.benchmarks import GQA_TYPES

MODELS = {"teacher": "teacher", "d2d": "student after d2d", "d2s": "student after d2s", "pd": "student after pd",
          "chosen_only": "control: pd replaced by cross-entropy on the chosen", "sft": "control: sft, dense",
          "sft_sparse": "control: sft, then sparse without a teacher"}
QUESTION_KINDS = {"existence": "exist", "colour": "color", "count": "count", "which": "which"}   # column -> kind
COLUMNS = ["POPE F1", "yes %", *QUESTION_KINDS, "mean of 4", "halluc. resp.", "halluc. ment.", "coverage"]
HINT = "run speedrun.sh, which evaluates every model"


def print_report(out_dir: Path, names: str = "") -> None:
    """Print what is under out_dir: judged/, judged_unseen/ and times.txt; or of the named runs, with commas, the first."""
    if names:
        print_table("Held-out scenes", out_dir / "judged", {name: name for name in names.split(",")})
        return
    print_table("Held-out scenes", out_dir / "judged", MODELS)
    print_table("Held-out scenes in a drawing style never trained on", out_dir / "judged_unseen", MODELS)
    steps = [line.split() for line in read_text(out_dir / "times.txt", HINT).splitlines()]
    print("\nSeconds of each step, two at a time: " + ", ".join(f"{name} {seconds}" for name, seconds in steps))
    print("POPE's truth is 50 % yes. Hallucination: % of captions, and of things named, that are not in the "
          "scene. Coverage: % of the scene's things that its caption names.")


def print_table(title: str, folder: Path, models: dict[str, str]) -> None:
    """models: the run's name -> what the table calls it."""
    print(f"\n{title}\n\n| model | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for name, words in models.items():
        path = folder / name / "results.json"
        if name not in MODELS and not path.is_file():
            raise UserError(f"{path}: no such file; run evaluate.py --model={folder.parent / name} --data=data/tiny/bench "
                            f"--out_dir={path.parent} --benchmark=pope,gqa,objhal --batch_size=256 --max_new_tokens=40")
        results = read_json(path, hint=HINT)
        pope, gqa, objhal = results["pope"], results["gqa"], results["objhal"]
        kinds = [gqa["by_type"][f"semantic: {GQA_TYPES[kind]}"] for kind in QUESTION_KINDS.values()]
        accuracy = [kind["accuracy"] for kind in kinds]
        numbers = [pope["f1"], pope["yes_ratio"], *accuracy, sum(accuracy) / len(accuracy),
                   objhal["chair_s"], objhal["chair_i"], objhal["recall"]]
        print(f"| {words} | {' | '.join(f'{number:.1f}' for number in numbers)} |")
    # The same questions for every model: their number, per column.
    rows = [pope["rows"]] * 2 + [kind["rows"] for kind in kinds] + [gqa["rows"]] + [objhal["rows"]] * 3
    print(f"| *questions* | {' | '.join(f'{n:,}' for n in rows)} |")
