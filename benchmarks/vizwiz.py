"""
VizWiz-VQA: photos taken by blind people, ten answers each.

    vizwiz/val.json, vizwiz/val/                    --vizwiz_split=val (default): 4,319 questions, scored here
    vizwiz/llava_test.jsonl, vizwiz/test/           --vizwiz_split=test: 8,000 questions for the official server

The paper's number comes from that server, which alone has the answers to the test images. val is another split, so its
score has a name of its own, val_accuracy.
"""
import json

from benchmarks.common import SHORT, Benchmark, Question, mean, need
from benchmarks.text import normalize, soft_accuracy
from configurator import expected


class VizWiz(Benchmark):
    folder = "vizwiz"
    suffix = f"When the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT}"

    def load(self) -> list[Question]:
        self.prompt_settings = {"split": self.config.vizwiz_split}
        if self.config.vizwiz_split == "test":
            return self.llava_questions("llava_test.jsonl", "test")
        questions = []
        for i, (where, row) in enumerate(self.rows("val.json")):     # its rows have no id: they are numbered from 0
            prompt = f"{need(row, 'question', str, where)}\n{self.suffix}"
            image = self.root / "val" / need(row, "image", str, where)
            golds = [need(each, "answer", str, where) for each in need(row, "answers", list, where)]
            if not golds:
                raise expected(f'{where}: "answers"', golds, "ten of them")
            questions.append(Question(i, prompt, image, where, golds, row))
        return questions

    def score(self, texts: list[str]) -> tuple[dict, list[tuple]]:
        parsed = [normalize(text) for text in texts]
        numbers = {"unparsed": parsed.count("")}
        if self.config.vizwiz_split == "test":
            numbers["note"] = "no public answers, so no score; submit submission.json to the VizWiz server"
            return numbers, [(text, None, None) for text in parsed]
        readings = []
        for question, text in zip(self.questions, parsed):
            golds = [normalize(answer) for answer in question.gold]
            readings.append((text, golds, soft_accuracy(text, golds)))
        return numbers | {"val_accuracy": mean((score for _, _, score in readings), 100)}, readings

    def submission(self, texts: list[str]) -> dict[str, str]:
        """Normalized: the server normalizes by itself only where the ten answers are not all identical."""
        rows = [{"image": question.meta["image"], "answer": normalize(text)}
                for question, text in zip(self.questions, texts)]
        return {"submission.json": json.dumps(rows, ensure_ascii=False)}
