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
QUESTION_KINDS = {"existence": "exist", "color": "color", "count": "count", "which": "which"}   # column -> kind
COLUMNS = ["POPE F1", "yes %", *QUESTION_KINDS, "mean of 4", "halluc. resp.", "halluc. ment.", "coverage"]
HINT = "run speedrun.sh, which evaluates every model"


def print_report(out_dir: Path, names: str = "") -> None:
    """Print what is under out_dir: judged/, judged_unseen/ and times.txt; or of the named runs, with commas, the first."""
    if names:
        print(table("Held-out scenes", out_dir / "judged", {name: name for name in names.split(",")}))
        return
    tables = [table("Held-out scenes", out_dir / "judged", MODELS),
              table("Held-out scenes in a drawing style never trained on", out_dir / "judged_unseen", MODELS)]
    steps = read_text(out_dir / "times.txt", HINT).splitlines()      # "NAME SECONDS"
    print(*tables, sep="\n")
    print("\nSeconds of each step, two at a time: " + ", ".join(steps))
    print("POPE's truth is 50 % yes. Hallucination: % of captions, and of things named, that are not in the "
          "scene. Coverage: % of the scene's things that its caption names.")


def table(title: str, folder: Path, models: dict[str, str]) -> str:
    """models: the run's name -> what the table calls it."""
    lines = ["", title, "", f"| model | {' | '.join(COLUMNS)} |", f"|{'---|' * (len(COLUMNS) + 1)}"]
    for name, words in models.items():
        path = folder / name / "results.json"
        if name not in MODELS and not path.is_file():
            raise UserError(f"{path}: no such file; run evaluate.py --model={folder.parent / name} --data=data/tiny/bench "
                            f"--out_dir={path.parent} --benchmark=pope,gqa,objhal --batch_size=256 --max_new_tokens=40")
        results = read_json(path, hint=HINT)
        try:
            numbers, rows = columns(results)
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"{path}: lacks a number of pope, gqa or objhal ({type(error).__name__}: {error}); evaluate all "
                            "three, with --benchmark=pope,gqa,objhal") from None
        lines.append(f"| {words} | {' | '.join(numbers)} |")
    # The same questions for every model: their number, per column.
    return "\n".join([*lines, f"| *questions* | {' | '.join(rows)} |"])


def columns(results: dict) -> tuple[list[str], list[str]]:
    """results.json -> the cells of a model, "–" for a mean over nothing, and the number of questions behind each."""
    pope, gqa, objhal = results["pope"], results["gqa"], results["objhal"]
    kinds = [gqa["by_type"][f"semantic: {GQA_TYPES[kind]}"] for kind in QUESTION_KINDS.values()]
    accuracy = [kind["accuracy"] for kind in kinds]
    average = None if None in accuracy else sum(accuracy) / len(accuracy)
    numbers = [pope["f1"], pope["yes_ratio"], *accuracy, average,
               objhal["chair_s"], objhal["chair_i"], objhal["recall"]]
    rows = [pope["rows"]] * 2 + [kind["rows"] for kind in kinds] + [gqa["rows"]] + [objhal["rows"]] * 3
    return ["–" if number is None else f"{number:.1f}" for number in numbers], [f"{n:,}" for n in rows]
