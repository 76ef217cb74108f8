"""
GQA, test-dev balanced: 12,578 questions; the answer has to equal the gold string.

    gqa/llava_gqa_testdev_balanced.jsonl            questions, with their prompt
    gqa/data/testdev_balanced_questions.json        gold answers and question types
    gqa/data/images/
"""
from collections import defaultdict

from benchmarks.common import Benchmark, Question, accuracy, mean, need
from configurator import UserError


class GQA(Benchmark):
    folder = "gqa"

    def load(self) -> list[Question]:
        questions = self.llava_questions("llava_gqa_testdev_balanced.jsonl", "data/images")
        file = "data/testdev_balanced_questions.json"
        golds = self.json(file, dict)
        for id, gold in golds.items():
            need(gold, "answer", str, f"{self.root / file} {id!r}")
        for question in questions:
            question.gold = golds.get(question.key)
            if question.gold is None:
                raise UserError(f"{question.where}: question_id {question.id!r} is not in {self.root / file}; "
                                "take both files of the same release")
        balanced = {id for id, gold in golds.items() if gold.get("isBalanced")}
        if not balanced:
            raise UserError(f'{self.root / file}: no question has "isBalanced": true, and the accuracy is over those; '
                            "take the official file")
        absent = balanced - {question.key for question in questions}
        if absent:
            raise UserError(f"{self.root / file}: {len(absent):,} balanced questions are not in the question file "
                            f"(first: {min(absent)}); take both files of the same release")
        return questions

    def score(self, texts: list[str]) -> tuple[dict, list[tuple]]:
        readings, by_type = [], defaultdict(list)
        for question, text in zip(self.questions, texts):
            parsed, gold = parse(text), question.gold["answer"]
            readings.append((parsed, gold, float(parsed == gold)))
            if question.gold.get("isBalanced"):
                types = question.gold.get("types")
                types = types if isinstance(types, dict) else {}
                for kind in ["all", "open" if types.get("structural") == "query" else "binary",
                             f"structural: {types.get('structural')}", f"semantic: {types.get('semantic')}"]:
                    by_type[kind].append(float(parsed == gold))
        balanced = by_type.pop("all")
        return {"accuracy": mean(balanced, 100), "correct": int(sum(balanced)), "balanced_rows": len(balanced),
                "by_type": {kind: accuracy(scores) for kind, scores in sorted(by_type.items())},
                "unparsed": sum(parsed == "" for parsed, _, _ in readings)}, readings


def parse(text: str) -> str:
    """
    Full stops at the end are dropped, and upper case, nothing else: "Yes." is yes, but "yes ." leaves "yes " and is
    wrong. The gold is not lower-cased: "TV" can never be matched.
    """
    return text.rstrip(".").lower()
