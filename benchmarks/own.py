"""
Your own questions, in one file of JSON Lines or a JSON list:

    {"question_id": 1, "image": "cat.jpg", "text": "What is on the mat?", "answer": "a cat"}
    {"question_id": 2, "images": ["a.jpg", "b.jpg"], "text": "Which is larger?", "answers": ["the first", "first"]}
    {"question_id": 3, "text": "Name a color."}

    python evaluate.py --model=DIR --out_dir=OUT --benchmark=own --questions=FILE --image_dir=FOLDER

The model reads `text` as it stands, in the checkpoint's template, after its images; end it with "\n" and common.SHORT for
the short answers of the VQA benchmarks. A text is right if it equals one of the row's answers after the VQA normalizer
(text.py). Rows without an answer are answered and not scored.
"""
from pathlib import Path

from benchmarks.common import Benchmark, Question, mean, need
from benchmarks.text import normalize
from configurator import UserError, expected
from data import IMAGE
from engine.files import read_rows


class Own(Benchmark):
    suffix = ""
    image_hint = "check --image_dir and the row"

    def load(self) -> list[Question]:
        self.root = Path(self.config.image_dir)
        rows = read_rows(self.config.questions, "check --questions")
        self.files[self.config.questions] = len(rows)
        return [self.question(where, row) for where, row in rows]

    def question(self, where: str, row: object) -> Question:
        id, text = need(row, "question_id", (str, int), where), need(row, "text", str, where)
        if IMAGE in text:                                            # as in training rows, where it is an image's place
            raise UserError(f"{where}: the question holds {IMAGE}, the place of an image; its image goes first, so remove it")
        both = [key for key in ("image", "images", "answer", "answers") if key in row and f"{key}s" in row]
        if both:
            raise UserError(f'{where}: found "{both[0]}" and "{both[0]}s"; keep one of them')
        images = self.list_of(row, "image", (str,), where)
        if images and self.config.model and not self.config.image_dir:
            raise UserError(f"{where}: names an image, and --image_dir is missing; give --image_dir=FOLDER")
        golds = [str(gold) for gold in self.list_of(row, "answer", (str, int, float), where)]
        return Question(id, text, [self.root / name for name in images], where, golds, official=False)

    def list_of(self, row: dict, key: str, kinds: tuple, where: str) -> list:
        """The row's "image" or "images", "answer" or "answers": absent or null, one, or a list."""
        key = f"{key}s" if f"{key}s" in row else key
        value = row.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(each) in kinds for each in values):
            raise expected(f'{where}: "{key}"', value, "a text or a list of texts")
        return values

    def score(self, texts: list[str]) -> tuple[dict, list[tuple]]:
        readings = []
        for question, text in zip(self.questions, texts):
            parsed, golds = normalize(text), [normalize(gold) for gold in question.gold]
            readings.append((parsed, golds or None, float(parsed in golds) if golds else None))
        scores = [score for _, _, score in readings if score is not None]
        return {"accuracy": mean(scores, 100), "correct": int(sum(scores)), "rows_with_answer": len(scores),
                "unparsed": sum(parsed == "" for parsed, _, _ in readings)}, readings
