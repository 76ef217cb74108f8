"""
POPE: "Is there a kite in the image?" In half of the questions there is. The absent objects are drawn at random
(random), from the most frequent ones (popular), or from those that often occur with what is there (adversarial).

    pope/llava_pope_test.jsonl                      8,910 questions, with their prompt
    pope/coco/coco_pope_SPLIT.json                  labels: adversarial, random, popular
    pope/val2014/                                   images of COCO

The headline is the mean of the three splits' F1, positive meaning yes.
"""
import difflib
import re
from collections import Counter, defaultdict

from benchmarks.common import Benchmark, Question, mean, need, percent, without_suffix
from configurator import UserError


class POPE(Benchmark):
    folder = "pope"

    def load(self) -> list[Question]:
        questions = self.llava_questions("llava_pope_test.jsonl", "val2014")
        labels = {}
        for question in questions:
            split = need(question.meta, "category", str, question.where)
            file = f"coco/coco_pope_{split}.json"
            if file not in self.files:
                for where, row in self.rows(file):
                    label = need(row, "label", str, where)
                    if label not in ("yes", "no"):
                        raise UserError(f'{where}: found the label {label[:40]!r}, expected "yes" or "no"')
                    labels[split, need(row, "image", str, where), need(row, "text", str, where)] = label
            # The random split was released twice, with different questions. The official scorer pairs answers and
            # labels by position, so the wrong release silently costs 40 points of F1. Here: by image and question.
            asked, image = without_suffix(question.prompt), question.meta["image"]
            question.gold = labels.get((split, image, asked))
            if question.gold is None:
                there = [text for part, name, text in labels if (part, name) == (split, image)]
                near = difflib.get_close_matches(asked, there, n=1, cutoff=0)
                hint = f"which asks {near[0]!r} there" if near else "which has nothing about that image"
                if split == "random" and self.files[file] == 3000:
                    hint = "the release of 3,000 rows; LLaVA's question file needs the one of 2,910"
                raise UserError(f"{question.where}: {asked!r} about {image} has no label in {self.root / file}, "
                                f"{hint}; both files have to be of one release and spelling")
        return questions

    def score(self, texts: list[str]) -> tuple[dict, list[tuple]]:
        readings, by_split = [], defaultdict(list)
        for question, text in zip(self.questions, texts):
            parsed = parse(text)
            readings.append((parsed, question.gold, float(parsed == question.gold)))
            by_split[question.meta["category"]].append((parsed, question.gold))
        splits = {name: rates(pairs) for name, pairs in by_split.items()}
        means = {rate: mean(split[rate] for split in splits.values())
                 for rate in ("f1", "accuracy", "precision", "recall", "yes_ratio", "gold_yes_ratio")}
        pooled = rates([pair for pairs in by_split.values() for pair in pairs])
        neither = sum(not re.search(r"\b(yes|no|not)\b", text.lower()) for text in texts)    # yes, by the rule
        self.protocol = {"headline": f"mean over {', '.join(splits)}", "labels": "joined on image and question"}
        return {**means, "splits": splits, "pooled": pooled, "unparsed": neither}, readings


def parse(text: str) -> str:
    """
    no, if No, no or not is among the words before the first full stop; else yes. Words are split at single spaces, and
    so "Not really", "NO", "No!", "isn't", "None" and an empty answer are yes.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def rates(pairs: list[tuple[str, str]]) -> dict:
    """
    [(parsed, gold)] -> accuracy, precision, recall, F1. By hand, for 3 true yes, 1 false yes, 2 false no, 4 true no:
    precision 3/4, recall 3/5, F1 = 2 * 3 / (2 * 3 + 1 + 2) = 2/3, accuracy 7/10. The official code divides by zero if
    nothing is read as yes; here the rates are 0 then.
    """
    count = Counter(pairs)
    tp, fp, fn, tn = (count[pair] for pair in [("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no")])
    return {"f1": percent(2 * tp, 2 * tp + fp + fn) or 0.0, "accuracy": percent(tp + tn, len(pairs)),
            "precision": percent(tp, tp + fp) or 0.0, "recall": percent(tp, tp + fn) or 0.0,
            "yes_ratio": percent(tp + fp, len(pairs)), "gold_yes_ratio": percent(tp + fn, len(pairs)),
            "true_yes": tp, "false_yes": fp, "false_no": fn, "true_no": tn, "rows": len(pairs)}
