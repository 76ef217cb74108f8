"""
The paper's Tables of results (arXiv 2408.15881), and our numbers below them.

Comprehension first: seven benchmarks and their plain mean. Then hallucination, where the 1B students have no numbers.
"""
from benchmarks.common import mean

COLUMNS = {   # column of the paper -> (benchmark, key in results.json)
    "GQA": ("gqa", "accuracy"), "VizWiz": ("vizwiz", "val_accuracy"), "SQA-I": ("scienceqa", "accuracy"),
    "TextVQA": ("textvqa", "accuracy"), "MME": ("mme", "percentage"), "MMB": ("mmbench", "accuracy"),
    "MMB-CN": ("mmbench_cn", "accuracy"), "AVG": None,
    "ObjHal resp": ("objhal", "chair_s"), "ObjHal ment": ("objhal", "chair_i"), "POPE F1": ("pope", "f1"),
    "MMHal": ("mmhal", "score"), "MMHal hall": ("mmhal", "hallucination_rate"),
}
PAPER = {
    "teacher, Qwen-1.5-7B": "62.3 40.7 70.9 55.3 72.1 68.5 64.9 62.1 50.1 24.8 84.9 2.60 20.7",
    "teacher, Qwen-2-7B": "62.5 37.9 73.2 57.2 78.0 71.6 71.1 64.5 29.7 23.4 85.7 2.88 14.5",
    "2B, Qwen-1.5-1.8B": "58.7 39.2 68.0 58.5 66.7 66.3 61.9 59.9 11.4 7.2 87.0 2.76 17.2",
    "2B, Qwen-1.5-1.8B, mimic only": "59.3 40.0 68.4 58.7 68.4 65.1 61.5 60.2 39.1 22.6 86.7 2.75 17.8",
    "2B, Qwen-2-1.5B": "58.8 40.4 69.2 59.9 69.2 68.9 64.4 61.6 11.2 5.9 87.2 2.91 13.8",
    "1B, Qwen-1.5-0.5B": "56.2 31.6 62.8 53.9 65.3 58.8 50.4 54.1",
    "1B, Qwen-2-0.5B": "56.6 35.1 61.1 57.1 67.0 58.7 54.1 55.7",
}
OFFICIAL_ROWS = {"gqa": [12578], "vizwiz": [4319, 8000], "scienceqa": [4241], "textvqa": [5000], "mme": [2374], "mmbench": [4329, 4377],
                 "mmbench_cn": [4329, 4377], "objhal": [300], "pope": [8910, 9000], "mmhal": [96]}
NOTES = """\
MME is perception as a percentage of its maximum. ObjHal and MMHal hall: lower is better. The paper's VizWiz comes from
the official server (test-dev), ours is the local val score; in the paper's ObjHal a chat model extracts the objects, in
ours only with --objhal_extract=True. results.json has the protocol behind each of our numbers.
"""


def our_row(results: dict) -> dict[str, float]:
    """results.json -> {column: number}, for the benchmarks that have one; AVG once its seven columns are there."""
    row = {}
    for column, place in COLUMNS.items():
        if place:
            name, key = place
            entry = results.get(name, {})
            number = entry.get(f"{key}_extracted", entry.get(key))
            if number is not None:
                row[column] = number
    averaged = list(COLUMNS)[:list(COLUMNS).index("AVG")]
    if all(column in row for column in averaged):
        row["AVG"] = mean(row[column] for column in averaged)
    return row


def other_files(results: dict) -> str:
    """Why our numbers are not comparable with the paper's: the first benchmark that was not the official one; or ""."""
    if results.keys().isdisjoint(OFFICIAL_ROWS):
        return f"The paper has no numbers of {', '.join(name for name in results if name != 'average')}; ours are in results.json."
    for name, counts in OFFICIAL_ROWS.items():
        if name in results and results[name]["rows"] not in counts:
            return (f"{name} has {results[name]['rows']:,} questions here, and {' or '.join(f'{count:,}' for count in counts)} in the "
                    "official file: other questions, so the paper's numbers are not shown.")
    return ""


def markdown(row: dict[str, float], why_alone: str = "") -> str:
    """Our row below the paper's; alone, with the reason, where it is about other questions."""
    names = list(COLUMNS)
    text, cut = "", names.index("AVG") + 1
    for part in (slice(None, cut), slice(cut, None)) if row or not why_alone else ():   # comprehension, hallucination
        columns = names[part]
        text += f"| model | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}\n"
        for model, numbers in [] if why_alone else PAPER.items():
            if numbers.split()[part]:
                text += f"| paper: {model} | {' | '.join(numbers.split()[part])} |\n"
        ours = [f"{row[column]:.2f}" if column in row else "" for column in columns]
        text += f"| **ours** | {' | '.join(ours)} |\n\n"
    return text + (f"{why_alone}\n" if why_alone else NOTES)
