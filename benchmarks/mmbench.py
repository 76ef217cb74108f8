"""
MMBench dev, English and Chinese: multiple choice, each question once for every rotation of its options.

    mmbench/mmbench_dev_en_20231003.tsv             the authors' file, 4,329 rows, 1,164 questions; or else
    mmbench/mmbench_dev_20230712.tsv                LLaVA's, 4,377 rows, 1,176 questions
    mmbench/mmbench_dev_cn_20231003.tsv             mmbench_cn
    (the images are in the tables, as base64)

Rows i, i + 1,000,000, i + 2,000,000 ... hold the rotations of one question; a question is right only if all of them
are. So one pass over the file is the "circular" evaluation.
"""
import csv
import io
import re
from collections import defaultdict

from benchmarks.common import HINT, LETTER, LETTER_CN, Benchmark, Question, accuracy, decode_base64, mean
from configurator import UserError
from engine.files import read_text

# What pandas reads as an empty cell, as the official code does. So an option "None" ends the list of options.
EMPTY = ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A",
         "NA", "NULL", "NaN", "None", "n/a", "nan", "null"]
FAILURE = "Failed to obtain answer via API"     # what the official code writes if a model on the web gives no answer
REFUSALS = ["Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer"]


class MMBench(Benchmark):
    folder = "mmbench"
    max_new_tokens = 1024
    suffix = LETTER
    releases = ["mmbench_dev_en_20231003.tsv", "mmbench_dev_20230712.tsv"]

    def load(self) -> list[Question]:
        file = next((name for name in self.releases if (self.root / name).exists()), self.releases[0])
        csv.field_size_limit(1 << 30)                                # a cell holds a whole image
        table = csv.DictReader(io.StringIO(read_text(self.root / file, HINT), newline=""), delimiter="\t")
        try:
            questions = [self.question(row, f"{self.root / file} row {i}") for i, row in enumerate(table, start=1)]
        except csv.Error as error:
            raise UserError(f"{self.root / file} line {table.line_num}: {error}; replace the file") from None
        self.files[file] = len(questions)
        return questions

    def question(self, row: dict, where: str) -> Question:
        for column in ("index", "question", "A", "B", "answer", "image"):
            if not row.get(column):
                raise UserError(f"{where}: the column {column} is missing or empty")
        if not re.fullmatch("[0-9]{1,15}", row["index"]):
            raise UserError(f"{where}: the index should be a whole number, found {row['index'][:40]!r}")
        options = {}
        for letter in "ABCD":
            if is_empty(row.get(letter)):
                break
            options[letter] = row[letter]
        if row["answer"] not in options:
            raise UserError(f"{where}: found the answer {row['answer'][:40]!r}, expected one of {', '.join(options)}")
        hint = [] if is_empty(row.get("hint")) else [row["hint"]]
        prompt = "\n".join(hint + [row["question"]] + [f"{letter}. {option}" for letter, option in options.items()])
        image = decode_base64(row.pop("image"), where)
        return Question(int(row["index"]), prompt, image, where, row["answer"], row | {"options": options},
                        f"{prompt}\n{self.suffix}")

    def score(self, texts: list[str]) -> tuple[dict, list[tuple]]:
        readings, vanilla, groups = [], [], defaultdict(list)
        for question, text in zip(self.questions, texts):
            parsed = parse(text, question.meta["options"])
            score = float(parsed == question.gold)
            readings.append((parsed, question.gold, score))
            groups[question.id % 1_000_000].append((question, score))
            if question.id < 1_000_000:
                vanilla.append(score)

        circular, parts = [], {"category": defaultdict(list), "l2-category": defaultdict(list)}
        for rotations in groups.values():
            circular.append(float(all(score for _, score in rotations)))
            for column, by_name in parts.items():
                by_name[rotations[0][0].meta.get(column)].append(circular[-1])
        self.protocol = {"accuracy": "circular, every rotation right", "vanilla_accuracy": "the first rotation alone"}
        return {"accuracy": mean(circular, 100), "correct": int(sum(circular)), "questions": len(circular),
                "vanilla_accuracy": mean(vanilla, 100), "vanilla_correct": int(sum(vanilla)),
                "vanilla_rows": len(vanilla),
                **{f"by_{column}": {name: accuracy(scores) for name, scores in by_name.items() if name}
                   for column, by_name in parts.items()},
                "unparsed": sum(parsed in (None, "Z") for parsed, _, _ in readings)}, readings

    def submission(self, texts: list[str]) -> dict[str, str]:
        """The table for the official server, which wants it as .xlsx: pandas.read_table(...).to_excel(...)."""
        dropped = ("hint", "category", "source", "comment", "l2-category", "options")
        columns = [name for name in self.questions[0].meta if name not in dropped]
        columns.insert(6, "prediction")
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, delimiter="\t", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for question, text in zip(self.questions, texts):
            writer.writerow(question.meta | {"prediction": text})
        return {"submission.tsv": table.getvalue()}


class MMBenchCN(MMBench):
    """The same in Chinese. The indices are those of the English file, so the two must not share answers."""
    suffix = LETTER_CN
    releases = ["mmbench_dev_cn_20231003.tsv"]


def is_empty(cell: str | None) -> bool:
    return cell is None or cell in EMPTY or cell.strip().lower() in ("nan", "none")


def parse(text: str, options: dict[str, str]) -> str | None:
    """
    The letter of an option, if exactly one occurs as a word of its own: "B", "(B)", "B: red". An article passes for the
    letter A, so "A red one, not B" has two. Otherwise, exactly one option's text in the answer decides. Else None; Z is
    a refusal.
    """
    tokens = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    letters = [letter for letter in options if letter in tokens]
    if FAILURE in text:
        tokens = letters = []                                        # but the texts of the options count
    elif any(refusal in text for refusal in REFUSALS):
        return "Z"
    if len(letters) == 1:
        return letters[0]
    if not letters and "Z" in tokens:
        return "Z"
    named = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return named[0] if len(named) == 1 else None
