"""
MME: two questions about each of 1,187 images, one to answer with yes and one with no, in 14 categories.

    MME/llava_mme.jsonl                             questions, with their prompt
    MME/MME_Benchmark_release_version/CATEGORY/     NAME.png and NAME.txt; for artwork, celebrity, landmark, posters and
                                                    scene in the folders images/ and questions_answers_YN/
"""
from collections import defaultdict
from pathlib import Path

from benchmarks.common import HINT, Benchmark, Question, need, percent, without_suffix
from configurator import UserError
from engine.files import read_text

PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()
RELEASE = "MME_Benchmark_release_version"


class MME(Benchmark):
    folder = "MME"

    def load(self) -> list[Question]:
        questions = self.llava_questions("llava_mme.jsonl", RELEASE)
        golds = self.gold_answers({question.image.parent for question in questions})
        self.files[f"{RELEASE}/*/*.txt"] = len(golds)
        for question in questions:
            asked = without_suffix(question.prompt)
            question.key = (str(question.id), asked)                 # the id is the image's
            category = question.meta.get("category")
            if category not in PERCEPTION + COGNITION:
                raise UserError(f"{question.where}: found the category {category!r}, expected one of "
                                f"{', '.join(PERCEPTION + COGNITION)}")
            for spaces in (" ", "  "):    # the official question, in place of our suffix; some have two spaces
                official = f"{asked}{spaces}Please answer yes or no.".lower()
                question.gold = question.gold or golds.get((question.image.with_suffix(""), official))
            if question.gold is None:
                raise UserError(f'{question.where}: no line "{asked} Please answer yes or no." in the official text '
                                f"file of {question.image}; check the folder {RELEASE}")
        return questions

    def gold_answers(self, folders: set[Path]) -> dict[tuple[Path, str], str]:
        """{(image without extension, question): yes or no}, from lines "question<TAB>Yes"."""
        golds = {}
        for folder in folders:
            texts = folder.with_name("questions_answers_YN") if folder.name == "images" else folder
            for path in sorted(texts.glob("*.txt")):
                for number, line in enumerate(read_text(path, HINT).split("\n"), start=1):
                    asked, _, gold = line.strip().lower().partition("\t")
                    if line.strip() and gold not in ("yes", "no"):
                        raise UserError(f"{path} line {number}: found {line[:60]!r}, expected a question, a tab, "
                                        "and Yes or No")
                    golds[folder / path.stem, asked] = gold
        return golds

    def read_answer(self, row: object, where: str, index: int) -> tuple[object, str]:
        id, prompt = need(row, "question_id", (str, int), where), need(row, "prompt", str, where)
        return (str(id), without_suffix(prompt)), need(row, "text", str, where)

    def score(self, texts: list[str]) -> tuple[dict, list[tuple]]:
        """Per category: 100 * right questions / questions + 100 * images with both right / images, at most 200."""
        readings, by_category = [], defaultdict(lambda: defaultdict(list))
        for question, text in zip(self.questions, texts):
            parsed = parse(text)
            score = float(parsed == question.gold)
            readings.append((parsed, question.gold, score))
            by_category[question.meta["category"]][question.id].append(score)
        categories = {}
        for name, images in by_category.items():
            scores = [score for pair in images.values() for score in pair]
            right, rows, both = sum(scores), len(scores), sum(all(pair) for pair in images.values())
            categories[name] = {"score": percent(right, rows) + percent(both, len(images)),
                                "correct": int(right), "rows": rows, "both_correct": both, "images": len(images)}
        perception = [category["score"] for name, category in categories.items() if name in PERCEPTION]
        cognition = [category["score"] for name, category in categories.items() if name in COGNITION]
        # With all ten categories this is the paper's MME column, perception / 2000; cognition is not in it.
        self.protocol = {"percentage": f"perception of {len(perception)} categories / {200 * len(perception)}"}
        return {"percentage": percent(sum(perception), 200 * len(perception)),
                "perception": sum(perception) if perception else None,
                "cognition": sum(cognition) if cognition else None, "categories": categories,
                "unparsed": sum(parsed == "other" for parsed, _, _ in readings)}, readings

    def submission(self, texts: list[str]) -> dict[str, str]:
        """Files for the official tool, which splits lines at tabs."""
        files = defaultdict(str)
        for question, text in zip(self.questions, texts):
            cells = [question.image.stem + ".txt", question.key[1], question.gold.capitalize(), " ".join(text.split())]
            files[f"official/{question.meta['category']}.txt"] += "\t".join(cells) + "\n"
        return files


def parse(text: str) -> str:
    """
    The first four characters decide: "Nope", "None", "Not sure" and "Snow" are no; "Y", "Yeah" and "The answer is yes"
    are other, which is always wrong.
    """
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"
