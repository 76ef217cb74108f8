"""
What all benchmarks share: a question, and the frame that each benchmark fills in.

A benchmark is one file here with one class. Its `load` reads the official files and checks them row by row, since they
come from many places and releases; its `score` is the official rule. evaluate.py does everything else. The simplest
complete example is gqa.py.
"""
import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from configurator import Config, UserError, expected, shorten
from data import load_image
from engine.files import read_json, read_rows

HINT = "check --data; docs/benchmarks.md says which file goes where"

# Suffixes of the prompt, after a newline.
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"


@dataclass
class Question:
    id: str | int                  # copied to answers.jsonl unchanged: a number stays a number
    prompt: str                    # the question as answers.jsonl records it
    image: Path | bytes | None | list[Path]   # a file, the bytes of a file (benchmarks that ship base64), none, several
    where: str                     # file and row, for messages
    gold: object = None            # whatever the benchmark's rule compares with
    meta: dict | None = None       # whatever else the rule needs: category, group, ...
    model_prompt: str = ""         # what the model reads after the image; empty: the prompt
    key: object = None             # what answers are joined on; None: the id as a string
    official: bool = True          # read the image as the official scripts do: see data.load_image

    def __post_init__(self):
        self.model_prompt = self.model_prompt or self.prompt
        self.key = str(self.id) if self.key is None else self.key

    @property
    def images(self) -> list[Path | bytes]:
        return self.image if isinstance(self.image, list) else [] if self.image is None else [self.image]


class Benchmark:
    """
    A subclass sets the class attributes and defines
        load()       -> [Question], from the official files, with the gold answers
        score(texts) -> (numbers, [(parsed, gold, score)]), for one text per question, in the order of self.questions
    """
    folder = ""                    # below --data
    suffix = SHORT
    max_new_tokens = 128
    image_hint = "check --data"    # what to do if an image is not there

    def __init__(self, name: str, config: Config):
        self.name, self.config, self.root = name, config, Path(config.data) / self.folder
        self.max_new_tokens = config.max_new_tokens or self.max_new_tokens
        self.files = {}            # file -> number of rows
        self.prompt_settings = {}  # flags that change what the model reads
        self.protocol = {}         # what changes the score of an answer
        self.questions = self.load()
        first_at = {}
        for question in self.questions:
            if question.key in first_at:
                raise UserError(f"{question.where}: question_id {question.id!r} is already used in "
                                f"{first_at[question.key]}; every question needs its own")
            first_at[question.key] = question.where
        if not self.questions:
            raise UserError(f"{self.root}: the question file of {name} is empty; check --data")

    def load(self) -> list[Question]:
        raise NotImplementedError

    def score(self, texts: list[str]) -> tuple[dict, list[tuple]]:
        raise NotImplementedError

    # -- Reading --

    def json(self, name: str, kind: type) -> dict | list:
        content = read_json(self.root / name, kind, HINT)
        self.files[name] = len(content)
        return content

    def rows(self, name: str) -> list[tuple[str, object]]:
        """JSON Lines, or a JSON list -> [("FILE line N", row)]."""
        rows = read_rows(self.root / name, HINT)
        self.files[name] = len(rows)
        return rows

    def llava_questions(self, name: str, image_folder: str) -> list[Question]:
        """A question file of LLaVA's evaluation package; its texts already end with the suffix."""
        questions = []
        for where, row in self.rows(name):
            id, text = need(row, "question_id", (str, int), where), need(row, "text", str, where)
            image = self.root / image_folder / need(row, "image", str, where)
            questions.append(Question(id, text, image, where, meta=row))
        return questions

    # -- The answer file. Most benchmarks use the common format as it is. --

    def clean(self, question: Question, text: str) -> str:
        """The model's text -> the text in the answer file."""
        return text

    def extra_columns(self, question: Question) -> dict:
        """Columns of the official answer format in addition to the usual six."""
        return {}

    def read_answer(self, row: object, where: str, index: int) -> tuple[object, str]:
        """A row of an answer file -> (key of its question, text)."""
        return str(need(row, "question_id", (str, int), where)), need(row, "text", str, where)

    def submission(self, texts: list[str]) -> dict[str, str]:
        """{file name: content} for an official server or tool."""
        return {}


def need(row: object, key: str, kind: type | tuple, where: str):
    """row[key], which has to be present and of that type."""
    if not isinstance(row, dict):
        raise expected(where, row, f'a JSON object with "{key}"')
    if key not in row:
        raise UserError(f'{where}: the key "{key}" is missing in {shorten(row)}; correct the row')
    if not isinstance(row[key], kind) or isinstance(row[key], bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise expected(f'{where}: "{key}"', row[key], " or ".join(each.__name__ for each in kinds))
    if isinstance(row[key], str) and not row[key].isascii() and row[key].encode(errors="ignore").decode() != row[key]:
        raise expected(f'{where}: "{key}"', ascii(row[key]), "text without half a surrogate pair")
    return row[key]


def decode_base64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise UserError(f"{where}: the image should be base64, found {shorten(text)}; replace the file") from None


def decode_image(content: bytes, where: str) -> Image.Image:
    """A picture that came as base64, as RGB."""
    try:
        return load_image(io.BytesIO(content), official=True)
    except UserError:
        raise UserError(f"{where}: the base64 is not a readable image; replace the file") from None


def without_suffix(prompt: str) -> str:
    return prompt.removesuffix(SHORT).rstrip()


# -----------------------------------------------------------------------------
# Numbers. Over nothing there is none: None, not 0, which would be a result.

def percent(part: float, whole: float) -> float | None:
    return 100 * part / whole if whole else None


def mean(values: Iterable[float], scale: float = 1) -> float | None:
    values = list(values)
    return scale * (sum(values) / len(values)) if values else None


def accuracy(scores: list[float]) -> dict:
    return {"accuracy": mean(scores, 100), "correct": int(sum(scores)), "rows": len(scores)}
