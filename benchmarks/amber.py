"""
AMBER: 1,004 descriptions and 14,216 yes/no questions.

    AMBER/data/query/query_all.json                 questions
    AMBER/data/annotations.json                     gold answers, by position
    AMBER/data/relation.json                        words and the words associated with them
    AMBER/data/safe_words.txt
    AMBER/image/

The official scorer finds nouns with a tagger and takes two words for the same if their vectors are similar. Here every
word of the association lists is a noun, and two words are the same if equal or associated. So CHAIR is a little higher
than the official one and Cover lower; the yes/no part is identical. Neither lower-cases: "Ships" is no ship.
"""
from collections import Counter

from benchmarks.common import HINT, SHORT, Benchmark, Question, need
from benchmarks.objects import lemma, word_tokens
from configurator import UserError
from engine.files import read_text

KINDS = {  # reported kind -> types of annotations.json
    "existence": ["discriminative-hallucination"],
    "attribute": [f"discriminative-attribute-{each}" for each in ("state", "number", "action")],
    "state": ["discriminative-attribute-state"], "number": ["discriminative-attribute-number"],
    "action": ["discriminative-attribute-action"], "relation": ["discriminative-relation", "relation"],
}
COUNT = 0.001              # what every official count starts at


class AMBER(Benchmark):
    folder = "AMBER"
    max_new_tokens = 1024

    def load(self) -> list[Question]:
        self.associated = self.json("data/relation.json", dict)
        where = str(self.root / "data/relation.json")
        self.vocabulary = set(self.associated)
        for word in self.associated:
            self.vocabulary.update(need(self.associated, word, list, where))
        self.safe = set(read_text(self.root / "data/safe_words.txt", HINT).split())
        golds = self.rows("data/annotations.json")
        questions = []
        for where, row in self.rows("data/query/query_all.json"):
            id, query = need(row, "id", int, where), need(row, "query", str, where)
            if not 1 <= id <= len(golds):
                raise UserError(f"{where}: id {id} has no entry in data/annotations.json, of {len(golds):,}")
            gold_where, gold = golds[id - 1]                         # by position
            self.check_gold(gold, gold_where)
            model_prompt = query if gold["type"] == "generative" else f"{query}\n{SHORT}"
            image = self.root / "image" / need(row, "image", str, where)
            questions.append(Question(id, query, image, where, gold, model_prompt=model_prompt))
        return questions

    def check_gold(self, gold: object, where: str) -> None:
        if need(gold, "type", str, where) == "generative":
            for word in need(gold, "truth", list, where) + need(gold, "hallu", list, where):
                if word not in self.associated:
                    raise UserError(f"{where}: {word!r} has no entry in data/relation.json")
        elif need(gold, "truth", str, where) not in ("yes", "no"):
            raise UserError(f'{where}: "truth" should be yes or no, found {gold["truth"][:40]!r}')

    def read_answer(self, row: object, where: str, index: int) -> tuple[object, str]:
        if isinstance(row, dict) and "response" in row:              # the official format
            return str(need(row, "id", int, where)), need(row, "response", str, where)
        return super().read_answer(row, where, index)

    def clean(self, question: Question, text: str) -> str:
        """The scorer takes exactly "Yes" or "No", so the answer file gets one of the two if the text has it."""
        if question.gold["type"] == "generative":
            return text
        return "Yes" if "yes" in text.lower() else "No" if "no" in text.lower() else text

    def score(self, texts: list[str]) -> tuple[dict, list[tuple]]:
        total, readings = Counter(), []
        by_kind = {"all": [], **{kind: [] for kind in KINDS}}
        for question, text in zip(self.questions, texts):
            if question.gold["type"] == "generative":
                readings.append(self.score_description(question.gold, text, total))
                continue
            parsed, gold = {"Yes": "yes", "No": "no"}.get(text, "other"), question.gold["truth"]
            readings.append((parsed, gold, float(parsed == gold)))
            by_kind["all"].append(readings[-1])
            for kind, types in KINDS.items():
                if question.gold["type"] in types:
                    by_kind[kind].append(readings[-1])

        numbers = {"chair": None, "cover": None, "hal": None, "cog": None, "f1": None, "amber_score": None}
        if total["descriptions"]:
            numbers |= {"chair": rate(total["hallucinated"], total["nouns"]),
                        "cover": rate(total["covered"], total["truth"]),
                        "hal": round(100 - total["clean"] / (total["descriptions"] + COUNT) * 100, 1),
                        "cog": rate(total["remembered"], total["hallu"]), "counts": dict(total)}
        parts = {kind: score_choices(rows, nudge=0.001 if kind == "existence" else 0.0001,
                                     counts=3 if kind == "attribute" else 1)
                 for kind, rows in by_kind.items() if rows}       # attribute: the official code adds up three counts
        numbers |= parts.pop("all", {})
        if total["descriptions"] and by_kind["all"]:
            numbers["amber_score"] = (100 - numbers["chair"] + numbers["f1"]) / 2
        numbers |= {"by_type": parts, "unparsed": sum(parsed == "other" for parsed, _, _ in readings)}
        self.protocol = {"nouns": "words of relation.json, equal or associated"}
        return numbers, readings

    def score_description(self, gold: dict, text: str, total: Counter) -> tuple:
        """A noun is safe, or names a true object and covers it, or is hallucinated, perhaps one that was expected."""
        lemmas = [lemma(token, self.vocabulary) for token in word_tokens(text)]
        nouns = [noun for noun in lemmas if noun in self.vocabulary]
        covered, remembered, hallucinated = set(), set(), []
        for noun in nouns:
            if noun in self.safe:
                continue
            true = find(noun, gold["truth"], self.associated)
            expected = find(noun, gold["hallu"], self.associated)
            if true is not None:
                covered.add(true)
            else:
                hallucinated.append(noun)
                remembered |= {expected} - {None}
        total.update(nouns=len(nouns), hallucinated=len(hallucinated), covered=len(covered), truth=len(gold["truth"]),
                     remembered=len(remembered), hallu=len(gold["hallu"]), clean=not hallucinated, descriptions=1)
        return nouns, gold["truth"], float(not hallucinated)


def find(noun: str, objects: list[str], associated: dict[str, list[str]]) -> int | None:
    """
    The position of the object that a noun names, or None. All associations come before the objects themselves: of
    [boat, ship] with ship associated to boat, "ship" covers the boat, and the ship can never be covered.
    """
    for i, word in enumerate(objects):
        if noun in associated[word]:
            return i
    return objects.index(noun) if noun in objects else None


def rate(part: float, whole: int, counts: int = 1) -> float:
    """In percent. The official counts start at 0.001, what is counted of them at 0: 0 of 0 is 0, 1 of 1 is 99.9."""
    return round(part / (whole + counts * COUNT) * 100, 1)


def score_choices(rows: list[tuple], nudge: float, counts: int = 1) -> dict:
    """Accuracy, precision, recall, F1; positive means *no*. F1 is made of the rounded two, its divisor nudged."""
    right = sum(parsed == gold == "no" for parsed, gold, _ in rows)
    precision = rate(right, sum(parsed == "no" for parsed, _, _ in rows), counts)
    recall = rate(right, sum(gold == "no" for _, gold, _ in rows), counts)
    f1 = round(2 * (precision / 100) * (recall / 100) / (precision / 100 + recall / 100 + nudge) * 100, 1)
    return {"accuracy": rate(sum(score for _, _, score in rows), len(rows), counts), "precision": precision,
            "recall": recall, "f1": f1, "rows": len(rows)}
