"""
TextVQA, validation: 5,000 questions about text in photos, ten answers each.

    textvqa/llava_textvqa_val_v051_ocr.jsonl        questions, with their prompt and the reference OCR tokens
    textvqa/TextVQA_0.5.1_val.json                  gold answers
    textvqa/train_images/                           (train and val share this folder)

The prompt may list what an OCR program read in the image. LLaVA's does, and so does the paper's; without the tokens
(--ocr=False) scores fall by about ten points.
"""
import re

from benchmarks.common import Benchmark, Question, mean, need
from benchmarks.text import normalize, soft_accuracy
from configurator import UserError, expected

OCR_LINE = "Reference OCR token:"


class TextVQA(Benchmark):
    folder = "textvqa"

    def load(self) -> list[Question]:
        self.prompt_settings = {"ocr_tokens": self.config.ocr}
        file, golds = "TextVQA_0.5.1_val.json", {}
        for i, row in enumerate(need(self.json(file, dict), "data", list, str(self.root / file))):
            where = f"{self.root / file} row {i}"
            answers = need(row, "answers", list, where)
            if len(answers) != 10 or not all(isinstance(answer, str) for answer in answers):
                raise UserError(f"{where}: found {len(answers)} answers, expected ten strings")
            golds[str(need(row, "image_id", (str, int), where)), need(row, "question", str, where).lower()] = answers
        self.files[file] = len(golds)

        questions = self.llava_questions("llava_textvqa_val_v051_ocr.jsonl", "train_images")
        for question in questions:
            asked = question_in(question.prompt, question.where)
            question.key = (str(question.id), asked)                 # the id is the image's, so it is not enough
            question.gold = golds.get(question.key)
            if question.gold is None:
                raise UserError(f"{question.where}: image {question.id} with the question {asked!r} is not in "
                                f"{self.root / file}; take both files of the same release")
            if not self.config.ocr:
                lines = [line for line in question.prompt.split("\n") if not line.startswith(OCR_LINE)]
                question.prompt = question.model_prompt = "\n".join(lines)
        return questions

    def read_answer(self, row: object, where: str, index: int) -> tuple[object, str]:
        id, prompt = need(row, "question_id", (str, int), where), need(row, "prompt", str, where)
        return (str(id), question_in(prompt, where)), need(row, "text", str, where)

    def score(self, texts: list[str]) -> tuple[dict, list[tuple]]:
        readings = []
        for question, text in zip(self.questions, texts):
            parsed, golds = normalize(text), [normalize(answer) for answer in question.gold]
            readings.append((parsed, golds, soft_accuracy(parsed, golds)))
        return {"accuracy": mean((score for _, _, score in readings), 100),
                "unparsed": sum(parsed == "" for parsed, _, _ in readings)}, readings


def question_in(prompt: str, where: str) -> str:
    """The question, lower-cased: prompts have 3 lines if one has OCR tokens, 2 without, and there is a legacy form."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        legacy = re.search("Question: (.*?) Short answer:", prompt, re.DOTALL)
        if legacy:
            return legacy[1].lower()
    elif len(lines) == 3 and f"{OCR_LINE} " in prompt:
        return lines[1 if prompt.startswith(OCR_LINE) else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise expected(f"{where}: cannot tell the question in the prompt", prompt,
                   f'the question, perhaps a line "{OCR_LINE} ...", and the suffix')
