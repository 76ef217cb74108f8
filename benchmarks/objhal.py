"""
Object HalBench: CHAIR on 300 COCO images. Which objects does a description name that are not in the image?

    objhal/obj_halbench_300_with_image.jsonl                      questions, images as base64 (RLHF-V, RLAIF-V)
    objhal/annotations/{instances,captions}_{train,val}2014.json  COCO 2014
    objhal/synonyms.txt                                           optional: replaces benchmarks/coco_synonyms.txt

An object is in the image if it was annotated there or one of the image's captions names it. Lower is better, and a
model that says little scores well: recall and length are reported with it.
"""
from collections import Counter
from pathlib import Path

from benchmarks.common import Benchmark, Question, decode_base64, mean, need, percent
from benchmarks.judge import ChatModel, fill, open_login
from benchmarks.objects import SYNONYMS, CocoWords
from configurator import UserError
from engine.files import parse_json, read_text

EXTRACTION_PROMPT = read_text(Path(__file__).with_name("objhal_prompt.txt")).removesuffix("\n")


class ObjHal(Benchmark):
    folder = "objhal"
    max_new_tokens = 1024
    suffix = ""

    def load(self) -> list[Question]:
        if self.config.objhal_extract:
            open_login(self.config)                                  # what is wrong with it is said before answering
        path = self.root / "synonyms.txt"
        self.coco = CocoWords(read_text(path if path.exists() else SYNONYMS))
        source = "synonyms.txt" if path.exists() else "built in"
        self.protocol["vocabulary"] = f"{source}, {len(self.coco.category)} words"

        questions = []
        for where, row in self.rows("obj_halbench_300_with_image.jsonl"):
            id, prompt = need(row, "image_id", int, where), need(row, "question", str, where)
            image = decode_base64(need(row, "image", str, where), where)
            questions.append(Question(row.get("question_id", id), prompt, image, where, gold=set(), key=str(id)))
        golds, annotated = {question.key: question.gold for question in questions}, set()
        for split in ("train2014", "val2014"):
            annotated |= self.add_instances(f"annotations/instances_{split}.json", golds)
            self.add_captions(f"annotations/captions_{split}.json", golds)
        for question in questions:
            if question.key not in annotated:
                raise UserError(f"{question.where}: image_id {question.key} is among the images of neither "
                                f"instances_train2014.json nor instances_val2014.json of {self.root}/annotations")
        return questions

    def add_instances(self, file: str, golds: dict[str, set]) -> set[str]:
        """Add the annotated objects to the gold sets; return the ids of all images that were annotated."""
        content, where = self.json(file, dict), str(self.root / file)
        names = {need(row, "id", int, where): need(row, "name", str, where)
                 for row in need(content, "categories", list, where)}
        for row in need(content, "annotations", list, where):
            gold = golds.get(str(need(row, "image_id", int, where)))
            category = need(row, "category_id", int, where)
            if category not in names:
                raise UserError(f"{where}: category_id {category} is none of the file's categories; fetch it again")
            if gold is not None:
                gold.add(names[category])
        self.files[file] = len(content["annotations"])
        return {str(need(row, "id", int, where)) for row in need(content, "images", list, where)}

    def add_captions(self, file: str, golds: dict[str, set]) -> None:
        content, where = self.json(file, dict), str(self.root / file)
        for row in need(content, "annotations", list, where):
            gold = golds.get(str(need(row, "image_id", int, where)))
            if gold is not None:
                gold.update(self.coco.in_text(need(row, "caption", str, where)))
        self.files[file] = len(content["annotations"])

    def extra_columns(self, question: Question) -> dict:
        return {"image_id": int(question.key)}

    def read_answer(self, row: object, where: str, index: int) -> tuple[object, str]:
        key = "image_id" if isinstance(row, dict) and "image_id" in row else "question_id"
        return str(need(row, key, (int, str), where)), need(row, "text", str, where)

    def score(self, texts: list[str]) -> tuple[dict, list[tuple]]:
        chat, kind = None, ""         # two ways to find the objects, two names for the result
        if self.config.objhal_extract:
            path = Path(self.config.out_dir) / self.name / "extracted.jsonl"
            chat, kind = ChatModel(self.config, path, temperature=0.2), "_extracted"
        readings, total, lengths = [], Counter(), []
        for question, text in zip(self.questions, texts):
            text = text.replace("Assistant:", "")
            mentions = self.coco.in_list(extract(chat, question, text)) if chat else self.coco.in_text(text)
            wrong = [mention for mention in mentions if mention not in question.gold]
            total.update(mentions=len(mentions), hallucinated_mentions=len(wrong),
                         responses_with_mention=len(mentions) > 0, hallucinated_responses=len(wrong) > 0,
                         gold_objects=len(question.gold), found_objects=len(question.gold & set(mentions)))
            lengths.append(len(text.split()))
            readings.append((mentions, sorted(question.gold), float(not wrong)))
        self.protocol["objects"] = f"listed by {self.config.judge_model}" if chat else "words of the response"
        # chair_i sums mentions over the data set; chair_s is a share of the responses with a mention, as in the paper.
        return {f"chair_s{kind}": percent(total["hallucinated_responses"], total["responses_with_mention"]),
                f"chair_i{kind}": percent(total["hallucinated_mentions"], total["mentions"]),
                f"chair_s_all{kind}": percent(total["hallucinated_responses"], len(texts)),
                f"recall{kind}": percent(total["found_objects"], total["gold_objects"]), "mean_words": mean(lengths),
                **total, "unparsed": len(texts) - total["responses_with_mention"]}, readings


def extract(chat: ChatModel, question: Question, text: str) -> list[str]:
    """The objects that a chat model finds in the response: the paper's way, with a model that has been retired."""
    if len(text.split()) <= 3:
        return []
    reply = chat.ask(fill(EXTRACTION_PROMPT, [question.prompt, text], "objhal_prompt.txt"))
    try:
        objects = parse_json(reply[reply.index("["):reply.rindex("]") + 1], "")
    except ValueError:                                               # UserError included
        objects = None
    if not isinstance(objects, list) or not all(isinstance(name, str) for name in objects):
        raise UserError(f"{chat.path}: the reply for image_id {question.key} should be a JSON list of strings, found "
                        f"{reply[:60]!r}; remove its line and run again, or take another --judge_model")
    return objects
