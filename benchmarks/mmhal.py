"""
MMHal-Bench: 96 open questions. A chat model that cannot see the image, but reads a list of what is in it, rates each
answer from 0 to 6; below 3 means hallucinated.

    mmhal/response_template.json                    questions, image contents, human answers
    mmhal/images/                                   named as the last part of the template's image_src
    mmhal/judge_prompt.txt                          optional: replaces benchmarks/mmhal_prompt.txt, the same four {}

Ratings of two judges are not comparable, nor are short and long answers: the authors' script asks for short ones, the
original benchmark does not (--mmhal_short=False).
"""
from collections import defaultdict
from pathlib import Path

from benchmarks.common import SHORT, Benchmark, Question, mean, need, percent
from benchmarks.judge import ChatModel, fill, open_login
from engine.files import read_text

PROMPT = Path(__file__).with_name("mmhal_prompt.txt")


class MMHal(Benchmark):
    folder = "mmhal"
    max_new_tokens = 1024

    def load(self) -> list[Question]:
        self.suffix = SHORT if self.config.mmhal_short else ""
        path = self.root / "judge_prompt.txt"
        self.prompt_file = path if path.exists() else PROMPT
        self.judge_prompt = read_text(self.prompt_file)
        fill(self.judge_prompt, [""] * 4, self.prompt_file)          # what is wrong with the judge is said before answering
        open_login(self.config)
        questions = []
        for i, (where, row) in enumerate(self.rows("response_template.json")):   # rows have no id: the order is the key
            prompt = need(row, "question", str, where)
            name = need(row, "image_file" if "image_file" in row else "image_src", str, where).rsplit("/", 1)[-1]
            gold = {"contents": need(row, "image_content", list, where), "answer": need(row, "gt_answer", str, where),
                    "type": need(row, "question_type", str, where)}
            model_prompt = f"{prompt}\n{self.suffix}" if self.suffix else prompt
            questions.append(Question(i, prompt, self.root / "images" / name, where, gold, model_prompt=model_prompt))
        return questions

    def read_answer(self, row: object, where: str, index: int) -> tuple[object, str]:
        if isinstance(row, dict) and "model_answer" in row:          # the official template, filled in
            return str(index), need(row, "model_answer", str, where)
        return super().read_answer(row, where, index)

    def score(self, texts: list[str]) -> tuple[dict, list[tuple]]:
        prompts = []
        for question, text in zip(self.questions, texts):
            contents = ", ".join(map(str, question.gold["contents"]))
            values = [contents, question.prompt, question.gold["answer"], text]
            prompts.append(fill(self.judge_prompt, values, self.prompt_file))
        judge = ChatModel(self.config, Path(self.config.out_dir) / self.name / "judge.jsonl", temperature=0)
        pending = [prompt for prompt in prompts if prompt not in judge.replies]
        if pending and not judge.login:
            judge.write_pending(pending)
            note = (f"{len(pending)} answers wait to be judged: give --judge_url and --judge_model, or write each "
                    f'"reply" and the judge\'s name as "model" into {judge.path}; then run again')
            return {"note": note, "unparsed": 0}, [(None, question.gold["answer"], None) for question in self.questions]

        readings, by_type = [], defaultdict(list)
        for question, prompt in zip(self.questions, prompts):
            parsed = parse(judge.ask(prompt))
            readings.append((parsed, question.gold["answer"], float(parsed or 0)))   # an unclear reply counts as 0
            by_type[question.gold["type"]].append(readings[-1][2])
        ratings = [rating for _, _, rating in readings]
        self.protocol = {"judge": ", ".join(sorted({judge.replies[prompt][0] or "unnamed" for prompt in prompts})),
                         "judge_prompt": "built in" if self.prompt_file == PROMPT else self.prompt_file.name}
        hallucinated = sum(rating < 3 for rating in ratings)
        return {"score": mean(ratings), "hallucination_rate": percent(hallucinated, len(ratings)),
                "informativeness": 100 * mean(rating - 3 if rating >= 3 else rating for rating in ratings) / 3,
                "by_type": {kind: mean(ratings) for kind, ratings in by_type.items()},
                "unparsed": sum(parsed is None for parsed, _, _ in readings)}, readings


def parse(reply: str) -> int | None:
    """The one n of "rating: n" in the reply, 0 to 6; else None. "Rating:4" has none, and "Rating: 10" is 1."""
    ratings = [n for n in range(7) if f"rating: {n}" in reply.lower()]
    return ratings[0] if len(ratings) == 1 else None
