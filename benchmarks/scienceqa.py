"""
ScienceQA: school questions with 2 to 5 choices. The test split has 4,241; the headline is the 2,017 with an image.

    scienceqa/llava_test_CQM-A.json                 questions, with their prompt
    scienceqa/problems.json                         choices and answers
    scienceqa/pid_splits.json                       which problems are the test split
    scienceqa/images/test/ID/image.png
"""
import re

from benchmarks.common import LETTER, Benchmark, Question, mean, need
from configurator import UserError


class ScienceQA(Benchmark):
    folder = "scienceqa"
    max_new_tokens = 1024
    suffix = LETTER

    def load(self) -> list[Question]:
        problems = self.json("problems.json", dict)
        splits = self.json("pid_splits.json", dict)
        test = set(map(str, need(splits, "test", list, str(self.root / "pid_splits.json"))))
        questions = []
        for where, row in self.rows("llava_test_CQM-A.json"):
            id = need(row, "id", (str, int), where)
            if str(id) not in problems or str(id) not in test:
                raise UserError(f"{where}: id {id!r} is no test problem of problems.json and pid_splits.json; "
                                "take all three files of the same release")
            questions.append(self.question(id, row, where, problems[str(id)]))
        absent = test - {question.key for question in questions}
        if absent:
            raise UserError(f"{self.root / 'llava_test_CQM-A.json'}: {len(absent):,} problems of the test split are "
                            f"not there (first: {min(absent)}); take all three files of the same release")
        return questions

    def question(self, id: str | int, row: dict, where: str, problem: dict) -> Question:
        turns = need(row, "conversations", list, where)
        asked = need(turns[0] if turns else {}, "value", str, where)
        model_prompt = asked.replace("<image>", "").strip() + f"\n{LETTER}"   # wherever it was, the image goes first
        prompt, image = model_prompt, None
        if row.get("image") is not None:
            prompt = f"<image>\n{model_prompt}"
            image = self.root / "images/test" / need(row, "image", str, where)

        in_problems = f"{self.root / 'problems.json'} {id!r}"
        choices, answer = need(problem, "choices", list, in_problems), need(problem, "answer", int, in_problems)
        if not 0 <= answer < len(choices) <= 5:
            raise UserError(f"{in_problems}: answer {answer} of {len(choices)} choices, expected at most 5")
        # The official scorer takes "has an image" from the answer's prompt, so that missing answers vanish from the
        # mean. Here it is a property of the problem.
        meta = {"choices": len(choices), "has_image": problem.get("image") is not None}
        return Question(id, prompt, image, where, "ABCDE"[answer], meta, model_prompt)

    def score(self, texts: list[str]) -> tuple[dict, list[tuple]]:
        readings, with_image, beyond_choices = [], [], 0
        for question, text in zip(self.questions, texts):
            parsed = parse(text)
            score = float(parsed == question.gold)
            readings.append((parsed, question.gold, score))
            if question.meta["has_image"]:
                with_image.append(score)
            if parsed is not None and ord(parsed) - ord("A") >= question.meta["choices"]:
                beyond_choices += 1
        all_scores = [score for _, _, score in readings]
        return {"accuracy": mean(with_image, 100), "correct": int(sum(with_image)), "image_rows": len(with_image),
                "accuracy_all": mean(all_scores, 100), "correct_all": int(sum(all_scores)),
                "beyond_choices": beyond_choices,
                "unparsed": sum(parsed is None for parsed, _, _ in readings)}, readings


def parse(text: str) -> str | None:
    """
    "A" and "A. rock" are A; "The answer is B." is B, and so is "The answer is Bananas". "A.", "(A)", "a", "A" with a
    space or newline around it, and a text with two verdicts are failures, None. A letter beyond the choices is simply
    wrong.
    """
    if re.fullmatch(r"[A-E](\. .*)?", text, re.DOTALL):
        return text[0]
    verdicts = re.findall(r"The answer is ([A-Z]).", text)
    return verdicts[0] if len(verdicts) == 1 else None
