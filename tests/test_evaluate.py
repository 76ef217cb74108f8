"""
Every benchmark on a small folder made by hand, in its official layout, through the command line: once with an answer
file, once with a model that knows the answers by heart. The expected numbers are counted by hand, next to the answers.
"""
import base64
import http.server
import io
import json
import os
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import evaluate
from benchmarks import judge
from benchmarks.common import LETTER, LETTER_CN, SHORT
from benchmarks.paper import other_files
from configurator import run
from data import pad_right


def shell(argv):
    """evaluate.py as a shell runs it -> the exit code; what went wrong is on stderr."""
    before, sys.argv = sys.argv, ["evaluate.py", *argv]
    try:
        run(evaluate.main, evaluate.__doc__, evaluate.DEFAULTS)
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before
    return 0


def picture(color="red", size=(40, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix == ".jsonl" or "coco_pope" in path.name:
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    else:
        path.write_text(json.dumps(content), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# The folders. Each function writes one and returns [(the model's prompt, row of the answer file)] and the
# expected numbers. "<image>" at the start of a prompt means that an image goes with it.


def row(id, text, prompt):
    return {"question_id": id, "prompt": prompt, "text": text, "answer_id": "x", "model_id": "m", "metadata": {}}


def gqa(root):
    questions, golds, answers = [], {}, []
    for id, question, gold, structural, balanced, text in [
            ("201", "Is it red?", "yes", "verify", True, "Yes."),
            ("202", "Is it blue?", "yes", "verify", True, "yes ."),   # a full stop after a space: "yes " is wrong
            ("203", "What is it?", "mug", "query", True, "Mug.."),
            ("204", "What else?", "TV", "query", True, "tv"),         # the gold is not lower-cased: can never match
            ("205", "What not?", "cup", "query", False, "plate")]:    # not balanced: does not count
        questions.append({"question_id": id, "image": "n1.png", "text": f"{question}\n{SHORT}",
                          "category": "default"})
        types = {"structural": structural, "semantic": "attr"}
        golds[id] = {"question": question, "answer": gold, "isBalanced": balanced, "types": types}
        answers.append((f"<image>\n{question}\n{SHORT}", row(id, text, f"{question}\n{SHORT}")))
    put(root / "gqa/llava_gqa_testdev_balanced.jsonl", questions)
    put(root / "gqa/data/testdev_balanced_questions.json", golds)
    put(root / "gqa/data/images/n1.png", picture())
    return answers, {"accuracy": 50, "correct": 2, "balanced_rows": 4, "rows": 5, "missing": 0}


def vizwiz(root):
    suffix = f"\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT}"
    rows = [{"image": "VizWiz_val_1.png", "question": "What is it?", "answer_type": "other", "answerable": 1,
             "answers": [{"answer": each, "answer_confidence": "yes"} for each in ["Black."] * 3 + ["grey"] * 7]},
            {"image": "VizWiz_val_2.png", "question": "And this?", "answers": [{"answer": "unanswerable"}] * 10}]
    put(root / "vizwiz/val.json", rows)
    for each in rows:
        put(root / "vizwiz/val" / each["image"], picture())
    answers = [(f"<image>\n{each['question']}{suffix}", row(i, text, each["question"] + suffix))
               for i, (each, text) in enumerate(zip(rows, ["The black", "Unanswerable"]))]
    return answers, {"val_accuracy": 95.0, "rows": 2}  # 0.9 and 1


def scienceqa(root):
    questions, problems, answers = [], {}, []
    for id, has_image, choices, gold, text in [
            ("1", True, ["rock", "milk"], 0, "A. rock"), ("2", True, ["a", "b", "c"], 1, "B."),  # "B." is a failure
            ("3", False, ["a", "b"], 0, "C"),                                                    # beyond the choices
            ("4", False, ["a", "b"], 1, "The answer is Bananas"), ("5", False, ["a", "b", "c", "d", "e"], 4, "E")]:
        lettered = [f"{letter}. {choice}" for letter, choice in zip("ABCDE", choices)]
        asked = "\n".join([f"Context: hint {id}", "Which?"] + lettered)
        image = {"image": f"{id}/image.png"} if has_image else {}
        value = f"{asked}\n<image>" if has_image else asked  # wherever it is, the image goes first
        turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "A"}]
        questions.append({"id": id, **image, "conversations": turns})
        problems[id] = {"question": "Which?", "choices": choices, "answer": gold,
                        "image": "image.png" if has_image else None}
        first = "<image>\n" if has_image else ""
        answers.append((f"{first}{asked}\n{LETTER}", row(id, text, f"{first}{asked}\n{LETTER}")))
        if has_image:
            put(root / f"scienceqa/images/test/{id}/image.png", picture())
    put(root / "scienceqa/llava_test_CQM-A.json", questions)
    put(root / "scienceqa/problems.json", problems | {"99": {"split": "train"}})
    put(root / "scienceqa/pid_splits.json", {"test": list(problems), "train": ["99"]})
    return answers, {"accuracy": 50, "correct": 1, "image_rows": 2, "accuracy_all": 60, "beyond_choices": 1,
                     "unparsed": 1, "rows": 5}


def textvqa(root):
    questions, golds, answers = [], [], []
    for i, (question, tokens, golden, text) in enumerate([
            # two questions about one image, whose id is the question_id of both
            ("What is the Bus number?", "42, CITY", ["42"] * 10, "42"),
            ("Which city?", "", ["rome"] * 2 + ["paris"] * 8, "The Rome.")]):
        prompt = f"{question}\nReference OCR token: {tokens}\n{SHORT}"
        questions.append({"question_id": "00aa", "image": "00aa.png", "text": prompt, "category": "default"})
        golds.append({"question_id": 34602 + i, "image_id": "00aa", "question": question, "answers": golden})
        answers.append((f"<image>\n{prompt}", row("00aa", text, prompt)))
    put(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl", questions)
    put(root / "textvqa/TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": golds})
    put(root / "textvqa/train_images/00aa.png", picture())
    return answers, {"accuracy": 80.0, "rows": 2}  # 1 and 0.6


def mme(root):
    questions, answers = [], []
    release = root / "MME/MME_Benchmark_release_version"
    for category, image, spaces, pair in [
            ("existence", "existence/0001.png", " ",
             [("Is it 1?", "Yes", "yes"), ("Is it 2?", "No", "Nope")]),
            ("existence", "existence/0002.png", "  ",
             [("Is it 3?", "Yes", "The answer is yes"), ("Is it 4?", "No", "Not\tsure")]),
            ("scene", "scene/images/a.b.png", " ",
             [("Is it 5?", "Yes", "Yes!"), ("Is it 6?", "No", "no")]),
            ("code_reasoning", "code_reasoning/0001.png", " ",
             [("Is it 7?", "Yes", "no"), ("Is it 8?", "No", "yes")])]:
        put(release / image, picture())
        texts = (release / image.replace("images/", "questions_answers_YN/")).with_suffix(".txt")
        put(texts, "".join(f"{question}{spaces}Please answer yes or no.\t{gold}\n" for question, gold, _ in pair))
        for question, _, text in pair:
            questions.append({"question_id": image, "image": image, "text": f"{question}\n{SHORT}",
                              "category": category})
            answers.append((f"<image>\n{question}\n{SHORT}", row(image, text, f"{question}\n{SHORT}")))
    put(root / "MME/llava_mme.jsonl", questions)
    # existence: 3 of 4 questions and 1 of 2 images, 75 + 50; scene 200; code_reasoning 0
    return answers, {"perception": 325, "cognition": 0, "percentage": 81.25, "unparsed": 1, "rows": 8}


def mmbench(root, file="mmbench_dev_en_20231003.tsv", suffix=LETTER):
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source",
               "l2-category", "comment", "split"]
    lines, answers = [columns], []
    for index, hint, options, gold, text in [
            (1, "", ["red", "blue", "green", "grey"], "A", "A"),
            (1000001, "", ["blue", "green", "grey", "red"], "D", "D."),
            (2000001, "", ["green", "grey", "red", "blue"], "C", "(C)"),
            (3000001, "", ["grey", "red", "blue", "green"], "B", "red"),
            (2, "nan", ["one", "two", "", ""], "A", "A"),
            (1000002, "nan", ["two", "one", "", ""], "B", "A one"),            # the article passes for a letter
            (3, "Look closely", ["cat", "dog", "None", "cow"], "B", "B")]:     # "None" ends the options
        image = base64.b64encode(picture(size=(20 + index % 7, 30))).decode()
        lines.append([str(index), f"Which {index % 10}?", hint, *options, gold, "colour", image, "me", "attribute",
                      "", "dev"])
        kept = options[:2] if index % 10 > 1 else options
        prompt = "\n".join(([hint] if hint == "Look closely" else []) + [f"Which {index % 10}?"]
                           + [f"{letter}. {option}" for letter, option in zip("ABCD", kept)])
        answers.append((f"<image>\n{prompt}\n{suffix}", row(index, text, prompt)))
    put(root / "mmbench" / file, "".join("\t".join(line) + "\n" for line in lines))
    return answers, {"accuracy": 200 / 3, "correct": 2, "questions": 3, "vanilla_accuracy": 100, "vanilla_rows": 3,
                     "rows": 7}


def mmbench_cn(root):
    return mmbench(root, "mmbench_dev_cn_20231003.tsv", LETTER_CN)


def pope(root):
    """random: true yes, true no, false yes; popular: true yes, false no, true no. The label files have more rows."""
    questions, answers, labels = [], [], {"random": [], "popular": []}
    for split, id, thing, label, text in [
            ("random", 10000001, "kite", "yes", "Yes"), ("random", 10000002, "dog", "no", "No, there is none."),
            ("random", 10000003, "cat", "no", "NO"),          # read as yes
            ("popular", 20000001, "kite", "yes", "Yes"),      # the same job as the first
            ("popular", 20000002, "cup", "yes", "There is not"), ("popular", 20000003, "car", "no", "no")]:
        text_asked = f"Is there a {thing} in the image?"
        questions.append({"question_id": id, "image": "1.png", "text": f"{text_asked}\n{SHORT}", "category": split})
        labels[split].insert(0, {"question_id": id + 7, "image": "1.png", "text": text_asked, "label": label})
        answers.append((f"<image>\n{text_asked}\n{SHORT}", row(id, text, f"{text_asked}\n{SHORT}")))
    for split, rows in labels.items():
        rows.insert(1, {"question_id": 5, "image": "2.png", "text": "Is there a kite in the image?", "label": "no"})
        put(root / f"pope/coco/coco_pope_{split}.json", rows)
    put(root / "pope/llava_pope_test.jsonl", questions)
    put(root / "pope/val2014/1.png", picture())
    return answers, {"f1": 200 / 3, "accuracy": 200 / 3, "precision": 75, "recall": 75, "yes_ratio": 50,
                     "gold_yes_ratio": 50, "rows": 6}


def objhal(root):
    questions, answers, instances, captions = [], [], [], []
    for image_id, gold, caption, text in [
            # 4 mentions, 1 wrong, of the true dog and bench; 1 mention of the true banana and person; none of a table
            (42, [18], "Two dogs near benches.", "A dog, a dog and a hot dog on a bench."),
            (43, [52, 1], "Nothing here.", "Assistant: People eat."),
            (44, [], "A table.", "It is nice.")]:
        image = base64.b64encode(picture(size=(image_id, 30))).decode()
        questions.append({"image_id": image_id, "image": image, "question": "Describe it."})
        instances += [{"image_id": image_id, "category_id": category} for category in gold]
        captions.append({"image_id": image_id, "caption": caption})
        answers.append(("<image>\nDescribe it.", row(image_id, text, "Describe it.") | {"image_id": image_id}))
    names = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}, {"id": 52, "name": "banana"}]
    put(root / "objhal/obj_halbench_300_with_image.jsonl", questions)
    for split, ids in (("train", [42]), ("val", [43, 44])):
        outlined = [each for each in instances if each["image_id"] in ids]
        told = [each for each in captions if each["image_id"] in ids] + [{"image_id": 7, "caption": "A cat."}]
        put(root / f"objhal/annotations/instances_{split}2014.json",
            {"categories": names, "images": [{"id": id} for id in ids], "annotations": outlined})
        put(root / f"objhal/annotations/captions_{split}2014.json", {"annotations": told})
    return answers, {"chair_s": 50, "chair_i": 20, "chair_s_all": 100 / 3, "recall": 60, "mean_words": 16 / 3,
                     "mentions": 5,
                     "hallucinated_mentions": 1, "responses_with_mention": 2, "hallucinated_responses": 1, "rows": 3}


def amber(root):
    put(root / "AMBER/data/relation.json", {"boat": ["ship"], "sky": [], "dog": ["puppy"], "cat": []})
    put(root / "AMBER/data/safe_words.txt", "sky\n")
    put(root / "AMBER/data/annotations.json", [
        {"id": 1, "type": "generative", "truth": ["boat", "cat"], "hallu": ["dog"]},
        {"id": 2, "type": "discriminative-hallucination", "truth": "no"},
        {"id": 3, "type": "discriminative-attribute-state", "truth": "yes"},
        {"id": 4, "type": "relation", "truth": "no"}])
    queries = ["Describe this image.", "Is there a dog?", "Is the boat red?", "Does the boat touch the sky?"]
    put(root / "AMBER/data/query/query_all.json",
        [{"id": id, "image": "AMBER_1.png", "query": query} for id, query in enumerate(queries, start=1)])
    put(root / "AMBER/image/AMBER_1.png", picture())
    texts = ["Some ships, a puppy, a sky and a zebra.", "No", "Maybe", "Yes"]
    answers = [(f"<image>\n{query}" + (f"\n{SHORT}" if id > 1 else ""), row(id, text, query))
               for id, (query, text) in enumerate(zip(queries, texts), start=1)]
    # 3 nouns, 1 hallucinated; 1 of 2 truths covered; the expected dog was named; 1 no of 1 right, of 2 gold; 1 of 3
    # right
    return answers, {"chair": 33.3, "cover": 50.0, "hal": 100.0, "cog": 99.9, "accuracy": 33.3, "precision": 99.9,
                     "recall": 50.0, "f1": 66.6, "amber_score": (100 - 33.3 + 66.6) / 2, "unparsed": 1, "rows": 4}


FOLDERS = {"gqa": gqa, "vizwiz": vizwiz, "scienceqa": scienceqa, "textvqa": textvqa, "mme": mme, "mmbench": mmbench,
           "mmbench_cn": mmbench_cn, "pope": pope, "objhal": objhal, "amber": amber}  # mmhal needs a judge: see below


# ----------------------------------------------------------------------------------------------------------------------
# A model that knows the answers by heart


class Scripted:
    """In place of a Llava: decodes the prompt from the ids, which are bytes, and replies what its script says."""

    def __init__(self, script):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        self.tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
        self.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.tokenizer.decoder = decoders.ByteLevel()
        self.tokenizer.add_special_tokens(["<|endoftext|>", "<image>", "<pad>"])
        self.config = SimpleNamespace(vision=SimpleNamespace(image_size=28), image_tokens=4, eos_token_id=256,
                                      image_token_id=257,
                                      pad_token_id=258, template="vicuna")
        self.script, self.asked, self.pixels = script, [], []

    def eval(self):
        return self

    def named_parameters(self):
        return []

    def generate(self, input_ids, pixel_values=None, max_new_tokens=128):
        replies = []
        for ids in input_ids.tolist():
            while ids[-1] == 258:
                ids.pop()
            prompt = self.tokenizer.decode(ids, skip_special_tokens=False)
            asked = prompt.split("USER: ")[1].removesuffix(" ASSISTANT:").replace("<image>" * 4, "<image>")
            self.asked.append(asked)
            replies.append(self.tokenizer.encode(f" {self.script[asked]} ").ids[:max_new_tokens] + [256])
        images = (input_ids == 257).sum().item() // 4
        assert (0 if pixel_values is None else len(pixel_values)) == images
        self.pixels.append(pixel_values)
        longest = max(map(len, replies))
        return torch.tensor([reply + [258] * (longest - len(reply)) for reply in replies])


def generate_plainly(model, prompts, images, pixels, max_new_tokens):
    stacked = [pixels[name] for names in images for name in names]
    return model.generate(pad_right(prompts, 258), torch.stack(stacked) if stacked else None, max_new_tokens)


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """answer(flags, script) runs evaluate.py with --model and a Scripted, which it returns with the exit code."""
    put(tmp_path / "checkpoint/config.json", {})
    put(tmp_path / "checkpoint/model.safetensors", b"weights")

    def answer(script, *flags):
        model = Scripted(script)
        monkeypatch.setattr(evaluate.Llava, "from_pretrained", lambda path, dtype, device: model)
        monkeypatch.setattr(evaluate.prefix, "generate", generate_plainly)     # tests/test_prefix.py has the real one
        code = shell([f"--model={tmp_path / 'checkpoint'}", "--device=cpu", "--batch_size=2", *flags])
        return code, model
    return answer


def flags(name, tmp_path):
    return f"--benchmark={name}", f"--data={tmp_path}", f"--out_dir={tmp_path / 'out'}"


def results(tmp_path):
    return json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ----------------------------------------------------------------------------------------------------------------------
# Both modes


@pytest.mark.parametrize("name", FOLDERS)
def test_score_an_answer_file(name, tmp_path):
    answers, expected = FOLDERS[name](tmp_path)
    for image in list(tmp_path.rglob("*.png")):
        image.unlink()  # scoring needs no image
    put(tmp_path / "mine.jsonl", [row for _, row in reversed(answers)])  # in any order
    assert shell([f"--answers={tmp_path / 'mine.jsonl'}", *flags(name, tmp_path)]) == 0
    entry = results(tmp_path)[name]
    assert {key: entry[key] for key in expected} == pytest.approx(expected)
    scored = lines(tmp_path / "out" / name / "scored.jsonl")
    assert [each["question_id"] for each in scored] == [row["question_id"] for _, row in answers]
    assert [each["text"] for each in scored] == [row["text"] for _, row in answers]
    assert all(list(each) == ["question_id", "text", "parsed", "gold", "score"] for each in scored)
    assert entry["missing"] == 0 and entry["protocol"]["files"] and "mine.jsonl" in entry["protocol"]["answers"]


@pytest.mark.parametrize("name", FOLDERS)
def test_paths_may_be_relative(name, tmp_path, monkeypatch):
    answers, _ = FOLDERS[name](tmp_path / "data")
    put(tmp_path / "mine.jsonl", [row for _, row in answers])
    monkeypatch.chdir(tmp_path)
    assert shell(["--answers=mine.jsonl", f"--benchmark={name}", "--data=data", "--out_dir=out"]) == 0
    assert results(tmp_path)[name]["missing"] == 0


@pytest.mark.parametrize("name", FOLDERS)
def test_answer_with_a_model(name, tmp_path, scripted):
    answers, expected = FOLDERS[name](tmp_path)
    script = {asked: row["text"] for asked, row in answers}
    if name == "objhal":  # one question about three images: the script has to look at the pixels
        texts = iter([row["text"] for _, row in answers])
        script = type("Script", (dict,), {"__missing__": lambda self, asked: next(texts)})()
    code, model = scripted(script, *flags(name, tmp_path))
    assert code == 0
    assert sorted(set(model.asked)) == sorted({asked for asked, _ in answers})
    entry = results(tmp_path)[name]
    assert {key: entry[key] for key in expected} == pytest.approx(expected)
    written = lines(tmp_path / "out" / name / "answers.jsonl")
    for column in ("question_id", "prompt"):
        assert [each[column] for each in written] == [row[column] for _, row in answers]
    assert set(written[0]) == set(answers[0][1])
    official = 128 if name in ("gqa", "vizwiz", "textvqa", "mme", "pope") else 1024
    assert entry["protocol"]["answers"]["max_new_tokens"] == official
    assert not list((tmp_path / "out").rglob("*partial*")) and not list((tmp_path / "out").rglob("*.tmp"))


def test_what_else_the_benchmarks_report(tmp_path):
    for name in ("gqa", "pope", "mme", "mmbench", "vizwiz"):
        put(tmp_path / "mine.jsonl", [row for _, row in FOLDERS[name](tmp_path)[0]])
        assert shell([f"--answers={tmp_path / 'mine.jsonl'}", *flags(name, tmp_path)]) == 0
    found, out = results(tmp_path), tmp_path / "out"
    assert found["gqa"]["by_type"]["open"] == {"accuracy": 50, "correct": 1, "rows": 2}
    splits = found["pope"]["splits"]
    assert splits["random"]["f1"] == splits["popular"]["f1"] == pytest.approx(200 / 3)
    assert splits["random"]["precision"] == 50 and splits["popular"]["precision"] == 100
    assert found["pope"]["pooled"]["rows"] == 6 and found["pope"]["pooled"]["true_yes"] == 2
    existence = {"score": 125, "correct": 3, "rows": 4, "both_correct": 1, "images": 2}
    assert found["mme"]["categories"]["existence"] == existence
    assert (out / "mme/official/existence.txt").read_text().splitlines()[3] == "0002.txt\tIs it 4?\tNo\tNot sure"
    assert found["mmbench"]["by_category"]["colour"]["correct"] == 2
    table = (out / "mmbench/submission.tsv").read_text().splitlines()
    assert table[0].split("\t") == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert table[4].split("\t")[6] == "red"
    assert json.loads((out / "vizwiz/submission.json").read_text()) == [
        {"image": "VizWiz_val_1.png", "answer": "black"}, {"image": "VizWiz_val_2.png", "answer": "unanswerable"}]
    assert "| **ours** | 50.00 | 95.00 |" in (out / "results.md").read_text()
    assert [each["parsed"] for each in lines(out / "pope/scored.jsonl")] == ["yes", "no", "yes", "yes", "no", "no"]


def test_the_average_appears_with_its_seventh_column(tmp_path):
    seven = ["gqa", "vizwiz", "scienceqa", "textvqa", "mme", "mmbench", "mmbench_cn"]
    for name in seven:
        assert "average" not in (results(tmp_path) if (tmp_path / "out/results.json").exists() else {})
        put(tmp_path / "mine.jsonl", [row for _, row in FOLDERS[name](tmp_path)[0]])
        assert shell([f"--answers={tmp_path / 'mine.jsonl'}", *flags(name, tmp_path)]) == 0
    assert results(tmp_path)["average"] == pytest.approx((50 + 95 + 50 + 80 + 81.25 + 200 / 3 + 200 / 3) / 7)


# ----------------------------------------------------------------------------------------------------------------------
# Switches


def test_textvqa_without_ocr_tokens(tmp_path, scripted):
    textvqa(tmp_path)
    script = {f"<image>\nWhat is the Bus number?\n{SHORT}": "42", f"<image>\nWhich city?\n{SHORT}": "paris"}
    code, _ = scripted(script, *flags("textvqa", tmp_path), "--ocr=False")
    assert code == 0 and results(tmp_path)["textvqa"]["accuracy"] == 100
    assert results(tmp_path)["textvqa"]["protocol"]["answers"]["ocr_tokens"] is False


def test_vizwiz_test_split_is_for_the_server(tmp_path):
    question = {"question_id": 7, "image": "VizWiz_test_7.jpg", "text": f"What?\n{SHORT}"}
    put(tmp_path / "vizwiz/llava_test.jsonl", [question])
    put(tmp_path / "mine.jsonl", [row(7, "It's 1,000.", "")])
    command = [f"--answers={tmp_path / 'mine.jsonl'}", *flags("vizwiz", tmp_path), "--vizwiz_split=test"]
    assert shell(command) == 0
    submission = json.loads((tmp_path / "out/vizwiz/submission.json").read_text())
    assert submission == [{"image": "VizWiz_test_7.jpg", "answer": "it 's 1000"}]
    assert "val_accuracy" not in results(tmp_path)["vizwiz"] and "server" in results(tmp_path)["vizwiz"]["note"]


def test_crop_or_pad(tmp_path, scripted):
    answers, _ = gqa(tmp_path)
    script = {asked: row["text"] for asked, row in answers}
    pads = []
    for crop in ("False", "True"):
        put(tmp_path / "gqa/data/images/n1.png", picture("black", (56, 28)))
        _, model = scripted(script, "--benchmark=gqa", f"--data={tmp_path}", f"--out_dir={tmp_path / crop}",
                            f"--crop={crop}")
        pads.append(model.pixels[0][0, 0, 0, 0].item())
    assert abs(pads[0]) < 0.1 and pads[1] < -1.5  # the mean color, which is about 0, and black


def test_an_answer_is_cut_at_max_new_tokens(tmp_path, scripted):
    answers, _ = gqa(tmp_path)
    scripted({asked: "abcdefgh" for asked, _ in answers}, *flags("gqa", tmp_path), "--max_new_tokens=5")
    assert {each["text"] for each in lines(tmp_path / "out/gqa/answers.jsonl")} == {"abcd"}  # and the space in front


def test_without_a_padding_token_rows_go_one_by_one(tmp_path, monkeypatch):
    answers, expected = gqa(tmp_path)
    put(tmp_path / "checkpoint/config.json", {})
    put(tmp_path / "checkpoint/model.safetensors", b"weights")
    model = Scripted({asked: row["text"] for asked, row in answers})
    model.config.pad_token_id = None
    monkeypatch.setattr(evaluate.Llava, "from_pretrained", lambda path, dtype, device: model)
    monkeypatch.setattr(evaluate.prefix, "generate", generate_plainly)
    assert shell([f"--model={tmp_path / 'checkpoint'}", "--device=cpu", *flags("gqa", tmp_path)]) == 0
    assert [len(pixels) for pixels in model.pixels] == [1] * 5
    assert results(tmp_path)["gqa"]["accuracy"] == expected["accuracy"]


def test_amber_answers_become_yes_and_no(tmp_path, scripted):
    answers, expected = amber(tmp_path)
    script = {asked: row["text"] for asked, row in answers} | {f"<image>\nIs there a dog?\n{SHORT}": "none, no"}
    scripted(script, *flags("amber", tmp_path))
    assert [each["text"] for each in lines(tmp_path / "out/amber/answers.jsonl")[1:]] == ["No", "Maybe", "Yes"]
    official = [{"id": row["question_id"], "response": row["text"]} for _, row in answers]
    put(tmp_path / "responses.json", official)
    assert shell([f"--answers={tmp_path / 'responses.json'}", *flags("amber", tmp_path)]) == 0
    assert results(tmp_path)["amber"]["chair"] == expected["chair"]


def test_synonyms_txt_takes_the_place_of_the_built_in_table(tmp_path):
    answers, _ = objhal(tmp_path)
    put(tmp_path / "objhal/synonyms.txt", "person, people\ndog, nice\nbench\n")
    put(tmp_path / "mine.jsonl", [row for _, row in answers])
    assert shell([f"--answers={tmp_path / 'mine.jsonl'}", *flags("objhal", tmp_path)]) == 0
    entry = results(tmp_path)["objhal"]
    assert entry["mentions"] == 6  # here "hot dog" is a dog, and "nice" is one
    assert entry["protocol"]["vocabulary"] == "synonyms.txt, 5 words"


# ----------------------------------------------------------------------------------------------------------------------
# Chat models: a small server that replies as told


@pytest.fixture
def endpoint(monkeypatch):
    """endpoint.replies: what comes next, (status, body) each; endpoint.requests: what was sent. No real sleeping."""
    told = SimpleNamespace(replies=[], requests=[], pauses=[])
    for name in [*os.environ]:                                    # whatever the caller's environment has
        if name.lower().endswith(("_proxy", "netrc")):
            monkeypatch.delenv(name)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told.requests.append((self.path, self.headers.get("Authorization"), body))
            status, text = told.replies.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    told.url = f"http://127.0.0.1:{server.server_port}/v1"
    monkeypatch.setattr(judge.time, "sleep", told.pauses.append)
    yield told
    server.shutdown()
    server.server_close()


def said(text):
    return 200, json.dumps({"choices": [{"message": {"content": text}}]})


def mmhal(root):
    rows = [{"question_type": kind, "question_topic": "outdoor", "image_src": f"http://example.com/x/{i}.png",
             "image_content": ["Dog", "Grass"], "question": f"What is {i}?", "gt_answer": "A dog.",
             "model_answer": f"answer {i}"}
            for i, kind in enumerate(["attribute", "counting", "attribute"])]
    put(root / "mmhal/response_template.json", [each | {"model_answer": ""} for each in rows])
    put(root / "filled.json", rows)
    for i in range(3):
        put(root / f"mmhal/images/{i}.png", picture())
    return [f"--answers={root / 'filled.json'}", *flags("mmhal", root)]


def test_mmhal_with_a_judge(tmp_path, endpoint, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    command = mmhal(tmp_path) + [f"--judge_url={endpoint.url}", "--judge_model=judge-1", "--judge_key_env=MY_KEY"]
    endpoint.replies = [said("Good.\nRating: 5"), (503, "busy"), (429, "slow down"), said("Rating: 2"),
                        said("Rating:4")]
    assert shell(command) == 0
    entry = results(tmp_path)["mmhal"]
    assert entry["score"] == pytest.approx(7 / 3)  # 5, 2, and 0 for the unclear reply
    assert entry["hallucination_rate"] == pytest.approx(200 / 3)
    assert entry["informativeness"] == pytest.approx((2 + 2 + 0) / 9 * 100)
    assert entry["by_type"] == {"attribute": 2.5, "counting": 2} and entry["unparsed"] == 1
    assert entry["protocol"]["judge"] == "judge-1"
    assert endpoint.pauses == [1, 2]
    path, key, body = endpoint.requests[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert (body["model"], body["temperature"]) == ("judge-1", 0)
    prompt = body["messages"][0]["content"]
    assert prompt.rstrip().endswith("Image contents: Dog, Grass\nQuestion: What is 0?\n"
                                    "Person's answer: A dog.\nAnswer to judge: answer 0")

    assert shell(command) == 0 and len(endpoint.requests) == 5  # nothing is paid for twice


@pytest.mark.parametrize("replies, message", [
    ([(500, "broken")] * 5, "HTTP 500"),
    ([(401, "bad key")], "HTTP 401"),
    ([(200, "<html>")] * 5, "no chat completion"),
    ([(200, '{"choices": []}')] * 5, "no chat completion"),
    ([(200, '{"choices": [{"message": {"content": null}}]}')] * 5, "no chat completion")])
def test_mmhal_with_a_broken_judge_keeps_what_it_has(replies, message, tmp_path, endpoint, capsys):
    command = mmhal(tmp_path) + [f"--judge_url={endpoint.url}", "--judge_model=judge-1"]
    endpoint.replies = [said("Rating: 5"), *replies]
    assert shell(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and "1 replies are kept" in error and "judge.jsonl" in error
    endpoint.replies = [said("Rating: 3"), said("Rating: 4")]
    assert shell(command) == 0 and results(tmp_path)["mmhal"]["score"] == 4
    assert results(tmp_path)["mmhal"]["hallucination_rate"] == 0  # 3 is not informative, but without hallucination


def test_mmhal_with_a_judge_that_never_replies(tmp_path, endpoint, capsys, monkeypatch):
    def timeout(*args, **kwargs):
        raise judge.requests.Timeout
    with monkeypatch.context() as patch:
        patch.setattr(judge.requests, "post", timeout)
        assert shell(mmhal(tmp_path) + [f"--judge_url={endpoint.url}", "--judge_model=m"]) == 2
    assert "no reply within 60 s" in capsys.readouterr().err and endpoint.pauses == [1, 2, 4, 8]
    assert shell(mmhal(tmp_path) + ["--judge_url=http://127.0.0.1:1", "--judge_model=m"]) == 2
    assert "ConnectionError" in capsys.readouterr().err
    assert shell(mmhal(tmp_path) + ["--judge_url=nonsense", "--judge_model=m"]) == 2
    one_line(capsys, '--judge_url: found "nonsense", expected http(s)://HOST')


def test_mmhal_without_a_judge_says_how_to_go_on(tmp_path, capsys):
    command = mmhal(tmp_path)
    assert shell(command) == 0
    assert "3 answers wait to be judged" in capsys.readouterr().out and "score" not in results(tmp_path)["mmhal"]
    waiting = lines(tmp_path / "out/mmhal/judge.jsonl")
    assert [each["reply"] for each in waiting] == [None] * 3
    filled = [each | {"model": "by hand", "reply": f"Rating: {i}"} for i, each in enumerate(waiting)]
    put(tmp_path / "out/mmhal/judge.jsonl", filled)
    assert shell(command) == 0
    entry = results(tmp_path)["mmhal"]
    assert entry["score"] == 1 and entry["protocol"]["judge"] == "by hand"


@pytest.mark.parametrize("short", [True, False])
def test_mmhal_asks_for_short_answers_or_not(short, tmp_path, scripted):
    mmhal(tmp_path)
    suffix = f"\n{SHORT}" if short else ""
    script = {f"<image>\nWhat is {i}?{suffix}": f"answer {i}" for i in range(3)}
    code, _ = scripted(script, *flags("mmhal", tmp_path), f"--mmhal_short={short}")
    assert code == 0
    assert [each["text"] for each in lines(tmp_path / "out/mmhal/answers.jsonl")] == [f"answer {i}" for i in range(3)]


def test_objhal_with_extraction(tmp_path, endpoint, capsys):
    answers, _ = objhal(tmp_path)
    put(tmp_path / "mine.jsonl", [row for _, row in answers])
    command = [f"--answers={tmp_path / 'mine.jsonl'}", *flags("objhal", tmp_path), "--objhal_extract=True",
               f"--judge_url={endpoint.url}", "--judge_model=m"]
    # One reply for three answers: the other two have at most three words.
    endpoint.replies = [said('Here: ["dog", "dogs", "hot dog", "office chair", "wooden bench"]')]
    assert shell(command) == 0
    entry = results(tmp_path)["objhal"]
    assert entry["chair_i_extracted"] == pytest.approx(100 / 3) and entry["chair_s_extracted"] == 100
    assert "chair_i" not in entry  # another way of counting, another name
    assert len(endpoint.requests) == 1 and endpoint.requests[0][2]["temperature"] == 0.2
    assert "| 100.00 | 33.33 |" in (tmp_path / "out/results.md").read_text()

    (tmp_path / "out/objhal/extracted.jsonl").unlink()
    endpoint.replies = [said("no list at all")]
    assert shell(command) == 2
    assert "image_id 42 should be a JSON list" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Interruptions and mistakes


def one_line(capsys, *needles):
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    for needle in needles:
        assert needle in error, error


def test_an_interrupted_run_continues(tmp_path, scripted, capsys):
    answers, expected = gqa(tmp_path)
    script = {asked: row["text"] for asked, row in answers}
    broken = dict(list(script.items())[:3])
    with pytest.raises(KeyError):  # like a crash in the second or third batch
        scripted(broken, *flags("gqa", tmp_path))
    done = lines(tmp_path / "out/gqa/answers.partial.0.jsonl")
    assert 0 < len(done) < 5
    with open(tmp_path / "out/gqa/answers.partial.0.jsonl", "a") as file:
        file.write('{"job": "torn')
    # as if another rank had written it
    os.rename(tmp_path / "out/gqa/answers.partial.0.jsonl", tmp_path / "out/gqa/answers.partial.3.jsonl")
    code, model = scripted(script, *flags("gqa", tmp_path))
    assert code == 0 and len(model.asked) == 5 - len(done)
    assert f"{len(done)} of them answered earlier" in capsys.readouterr().out
    assert results(tmp_path)["gqa"]["accuracy"] == expected["accuracy"]

    code, model = scripted({}, *flags("gqa", tmp_path))  # finished: nothing is generated again
    assert code == 0 and model.asked == [] and "already answered" in capsys.readouterr().out


def test_a_truncated_image_keeps_the_answers_before_it(tmp_path, scripted, capsys):
    answers, _ = scienceqa(tmp_path)
    script = {asked: row["text"] for asked, row in answers}
    put(tmp_path / "scienceqa/images/test/2/image.png", picture()[:60])
    code, _ = scripted(script, *flags("scienceqa", tmp_path), "--batch_size=1")
    assert code == 2
    one_line(capsys, "2/image.png", "not a readable image")
    put(tmp_path / "scienceqa/images/test/2/image.png", picture())
    code, model = scripted(script, *flags("scienceqa", tmp_path), "--batch_size=1")
    assert code == 0 and results(tmp_path)["scienceqa"]["accuracy_all"] == 60


def test_answers_of_other_weights_questions_or_settings_are_not_reused(tmp_path, scripted, capsys):
    answers, _ = gqa(tmp_path)
    script = {asked: row["text"] for asked, row in answers}
    assert scripted(script, *flags("gqa", tmp_path))[0] == 0
    assert scripted(script, *flags("gqa", tmp_path), "--max_new_tokens=9")[0] == 2
    one_line(capsys, "max_new_tokens 128, this run has 9", "choose another --out_dir")
    weights = tmp_path / "checkpoint/model.safetensors"
    os.utime(weights, (1, 1))                                     # what counts is the content
    assert scripted(script, *flags("gqa", tmp_path))[0] == 0
    put(weights, b"WEIGHTS")
    os.utime(weights, (1, 1))
    assert scripted(script, *flags("gqa", tmp_path))[0] == 2
    one_line(capsys, "model_digest")
    put(weights, b"weights")
    put(tmp_path / "checkpoint/config.json", {"rope_theta": 1})
    assert scripted(script, *flags("gqa", tmp_path))[0] == 2
    one_line(capsys, "model_digest")


def test_missing_answers_refuse_the_headline(tmp_path, capsys):
    answers, _ = pope(tmp_path)
    put(tmp_path / "mine.jsonl", [row for _, row in answers[:4]])
    assert shell([f"--answers={tmp_path / 'mine.jsonl'}", *flags("pope", tmp_path)]) == 2
    one_line(capsys, "mine.jsonl: 2 of 6 questions have no answer (first: question_id 20000002)")
    entry = results(tmp_path)["pope"]
    assert entry["missing"] == 2 and entry["rows"] == 6 and "f1" not in entry
    assert "**ours**" not in (tmp_path / "out/results.md").read_text()


def test_official_files_are_those_of_every_official_split():
    for name, rows in (("vizwiz", 4319), ("vizwiz", 8000), ("mmbench", 4377), ("pope", 8910)):
        assert other_files({name: {"rows": rows}}) == ""
    assert "other questions" in other_files({"vizwiz": {"rows": 8001}})


MISTAKES = {  # name -> (benchmark, file, change, what the line has to say)
    "file missing": ("gqa", "gqa/data/testdev_balanced_questions.json", None,
                     "testdev_balanced_questions.json: no such file"),
    "labels missing": ("pope", "pope/coco/coco_pope_popular.json", None, "coco_pope_popular.json: no such file"),
    "malformed line": ("pope", "pope/llava_pope_test.jsonl", lambda t: t.replace('"text"', '"te', 1),
                       "llava_pope_test.jsonl line 1: malformed"),
    "malformed json": ("scienceqa", "scienceqa/problems.json", lambda t: t[:-1],
                       "problems.json line 1: malformed JSON"),
    "wrong kind": ("scienceqa", "scienceqa/problems.json", lambda t: "[]",
                   "problems.json: found [], expected a JSON object"),
    "column missing": ("gqa", "gqa/llava_gqa_testdev_balanced.jsonl", lambda t: t.replace('"image"', '"imag"', 1),
                       'line 1: the key "image" is missing'),
    "row is no object": ("pope", "pope/llava_pope_test.jsonl", lambda t: t + "7\n",
                         'line 7: found 7, expected a JSON object with "question_id"'),
    "duplicate question": ("gqa", "gqa/llava_gqa_testdev_balanced.jsonl", lambda t: t + t.splitlines()[0] + "\n",
                           "line 6: question_id '201' is already used in"),
    "empty": ("pope", "pope/llava_pope_test.jsonl", lambda t: "", "question file of pope is empty"),
    "gqa release": ("gqa", "gqa/llava_gqa_testdev_balanced.jsonl", lambda t: t.replace("201", "999", 1),
                    "question_id '999' is not in"),
    "gqa lacks rows": ("gqa", "gqa/llava_gqa_testdev_balanced.jsonl", lambda t: "\n".join(t.splitlines()[1:]),
                       "1 balanced questions are not"),
    "pope release": ("pope", "pope/coco/coco_pope_random.json", lambda t: t.replace("a cat", "a cow"),
                     "which asks 'Is there a cow in the image?' there; both files have to be of one release"),
    "pope newer release": ("pope", "pope/coco/coco_pope_random.json",
                           lambda t: t.replace("a cat", "a cow") + "".join(
                               json.dumps({"image": f"{i}", "text": "?", "label": "no"}) + "\n" for i in range(2996)),
                           "the release of 3,000 rows; LLaVA's question file needs the one of 2,910"),
    "pope other image": ("pope", "pope/coco/coco_pope_random.json", lambda t: t.replace('"1.png"', '"3.png"'),
                         "which has nothing about that image"),
    "gqa nothing balanced": ("gqa", "gqa/data/testdev_balanced_questions.json",
                             lambda t: t.replace('"isBalanced": true', '"isBalanced": false'),
                             'testdev_balanced_questions.json: no question has "isBalanced": true'),
    "pope label": ("pope", "pope/coco/coco_pope_random.json", lambda t: t.replace('"no"', '"nope"', 1),
                   "found the label 'nope'"),
    "scienceqa lacks rows": ("scienceqa", "scienceqa/pid_splits.json", lambda t: t.replace('["1"', '["7", "1"'),
                             "1 problems of the test split"),
    "scienceqa not test": ("scienceqa", "scienceqa/pid_splits.json", lambda t: t.replace('["1", ', "["),
                           "id '1' is no test problem"),
    "scienceqa answer": ("scienceqa", "scienceqa/problems.json", lambda t: t.replace('"answer": 4', '"answer": 5'),
                         "answer 5 of 5 choices"),
    "textvqa nine answers": ("textvqa", "textvqa/TextVQA_0.5.1_val.json", lambda t: t.replace('["42", ', "[", 1),
                             "row 0: found 9 answers, expected ten"),
    "textvqa release": ("textvqa", "textvqa/TextVQA_0.5.1_val.json", lambda t: t.replace("Which city", "What city"),
                        "'which city?' is not in"),
    "mme category": ("mme", "MME/llava_mme.jsonl", lambda t: t.replace('"scene"', '"scenes"'),
                     "found the category 'scenes'"),
    "mme text": ("mme", "MME/MME_Benchmark_release_version/existence/0001.txt", None,
                 'no line "Is it 1? Please answer yes or no."'),
    "mme gold": ("mme", "MME/MME_Benchmark_release_version/existence/0001.txt", lambda t: t.replace("Yes", "Maybe"),
                 "expected a question, a tab"),
    "mmbench answer": ("mmbench", "mmbench/mmbench_dev_en_20231003.tsv",
                       lambda t: t.replace("\tB\tcolour", "\tC\tcolour"), "found the answer 'C', expected one of"),
    "mmbench index": ("mmbench", "mmbench/mmbench_dev_en_20231003.tsv", lambda t: t.replace("\n2\t", "\nx2\t"),
                      "row 5: the index should be"),
    "mmbench image": ("mmbench", "mmbench/mmbench_dev_en_20231003.tsv", lambda t: t.replace("iVBOR", "iVB?OR", 1),
                      "row 1: the image should be base64"),
    "mmbench column": ("mmbench", "mmbench/mmbench_dev_en_20231003.tsv", lambda t: t.replace("question", "quest", 1),
                       "the column question is missing"),
    "mmbench missing": ("mmbench", "mmbench/mmbench_dev_en_20231003.tsv", None,
                        "mmbench_dev_en_20231003.tsv: no such file"),
    "objhal annotation": ("objhal", "objhal/annotations/captions_val2014.json", None,
                          "captions_val2014.json: no such file"),
    "objhal unknown image": ("objhal", "objhal/obj_halbench_300_with_image.jsonl",
                             lambda t: t.replace("44,", "45,", 1), "image_id 45 is among the images of neither"),
    "amber gold": ("amber", "AMBER/data/annotations.json", lambda t: t.replace('"no"', '"nay"', 1),
                   '"truth" should be yes or no'),
    "amber relation": ("amber", "AMBER/data/annotations.json", lambda t: t.replace('"dog"', '"emu"', 1),
                       "'emu' has no entry"),
    "amber id": ("amber", "AMBER/data/query/query_all.json", lambda t: t.replace('"id": 4', '"id": 40'),
                 "id 40 has no entry"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_benchmark_files(mistake, tmp_path, capsys):
    name, file, change, needle = MISTAKES[mistake]
    answers, _ = FOLDERS[name](tmp_path)
    put(tmp_path / "mine.jsonl", [row for _, row in answers])
    if change is None:
        (tmp_path / file).unlink()
    else:
        before = (tmp_path / file).read_text()
        assert change(before) != before
        (tmp_path / file).write_text(change(before))
    assert shell([f"--answers={tmp_path / 'mine.jsonl'}", *flags(name, tmp_path)]) == 2
    one_line(capsys, needle)


@pytest.mark.parametrize("change, needle", [
    (lambda rows: rows + [rows[0]], "mine.jsonl line 7: question 10000001 has its answer in"),
    (lambda rows: rows + [rows[0] | {"question_id": 5}], "line 7: question 5 is none of the 6 of pope"),
    (lambda rows: rows[:1] + [rows[1] | {"text": None}] + rows[2:],
     'line 2: "text": found null, expected str'),
    (lambda rows: rows[:1] + [{"text": "yes"}] + rows[2:], 'line 2: the key "question_id" is missing'),
])
def test_mistakes_in_answer_files(change, needle, tmp_path, capsys):
    answers, _ = pope(tmp_path)
    put(tmp_path / "mine.jsonl", change([row for _, row in answers]))
    assert shell([f"--answers={tmp_path / 'mine.jsonl'}", *flags("pope", tmp_path)]) == 2
    one_line(capsys, needle)


def test_a_missing_image_is_named_before_the_model_is_loaded(tmp_path, scripted, capsys):
    answers, _ = gqa(tmp_path)
    (tmp_path / "gqa/data/images/n1.png").unlink()
    code, model = scripted({}, *flags("gqa", tmp_path))
    assert code == 2 and model.asked == []
    one_line(capsys, "llava_gqa_testdev_balanced.jsonl line 1: image", "n1.png does not exist")


def test_a_base64_text_that_is_no_image(tmp_path, scripted, capsys):
    answers, _ = mmbench(tmp_path)
    path = tmp_path / "mmbench/mmbench_dev_en_20231003.tsv"
    path.write_text(path.read_text().replace("iVBOR", "AAAAA"))
    assert scripted({asked: "A" for asked, _ in answers}, *flags("mmbench", tmp_path))[0] == 2
    one_line(capsys, "mmbench_dev_en_20231003.tsv row", "not a readable image")


@pytest.mark.parametrize("argv, needle", [
    ([], "--benchmark"), (["--benchmark=pop", "--data=x", "--out_dir=o", "--model=m"], "did you mean pope?"),
    (["--benchmark=pope", "--data=x", "--out_dir=o"], "either --model=DIR"),
    (["--benchmark=pope", "--data=x", "--out_dir=o", "--model=m", "--answers=a"], "either --model=DIR"),
    (["--benchmark=pope,gqa", "--data=x", "--out_dir=o", "--answers=a"], "--answers belongs to one benchmark"),
    (["--benchmark=pope", "--data=x", "--out_dir=o", "--model=m", "--batchsize=3"],
     "--batchsize: unknown key 'batchsize'; did you mean batch_size?"),
    (["--benchmark=pope", "--data=x", "--out_dir=o", "--model=m", "--crop=yes"],
     "--crop: found str 'yes', expected bool (True or False)"),
    (["--benchmark=pope", "--data=x", "--out_dir=o", "--model=m", "--batch_size=0"],
     "batch_size is 0, expected a positive number"),
    (["--benchmark=mmhal", "--data=x", "--out_dir=o", "--model=m", "--judge_url=u"], "go together"),
    (["--benchmark=objhal", "--data=x", "--out_dir=o", "--model=m", "--objhal_extract=True"], "needs the chat model"),
    (["--benchmark=pope", "--data=x", "--out_dir=o", "--model=m", "--dtype=int8"],
     "dtype is 'int8', expected one of float32, bfloat16, float16"),
    (["--benchmark=pope", "--data=x", "--out_dir=o", "--model=m", "--vizwiz_split=train"],
     "vizwiz_split is 'train', expected one of val, test"),
    (["--benchmark=pope", "--data=x", "--out_dir=o", "--model=m", "--max_new_tokens=-1"], "max_new_tokens is -1"),
    (["--benchmark=pope", "--out_dir=o", "--model=m"], "--data is missing"),
    (["--benchmark=pope", "--data=x", "--model=m"], "--out_dir is missing"),
    (["--benchmark=pope", "--data=nowhere", "--out_dir=o", "--model=m"], "llava_pope_test.jsonl: no such file"),
])
def test_mistakes_on_the_command_line(argv, needle, capsys):
    assert shell(argv) == 2
    one_line(capsys, needle)


def test_a_judge_key_that_is_not_set(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert shell(mmhal(tmp_path) + ["--judge_url=http://x", "--judge_model=m",
                                            "--judge_key_env=NO_SUCH_KEY"]) == 2
    one_line(capsys, "NO_SUCH_KEY is not set")


@pytest.mark.parametrize("name", ["mmhal", "pope"])
@pytest.mark.parametrize("key", ["sk-Geheim", "Geheim.1", "Ge heim", "1Geheim"])
def test_a_judge_key_in_place_of_its_variables_name_is_not_shown(name, key, capsys):
    assert shell([f"--benchmark={name}", "--data=x", "--out_dir=o", "--model=m", f"--judge_key_env={key}"]) == 2
    shown = capsys.readouterr().err
    assert key not in shown and shown.startswith("error: --judge_key_env: expected the name of an environment variable")


@pytest.mark.parametrize("more, template, needle", [
    (["--judge_url=localhost:8000"], None, "--judge_url: found"),
    (["--judge_url=http://x", "--judge_key_env=NO_SUCH_KEY"], None, "NO_SUCH_KEY is not set"),
    ([], "no places", "judge_prompt.txt: has 0 places {}, expected 4")])
def test_mistakes_about_the_judge_are_said_before_answering(more, template, needle, tmp_path, scripted, capsys, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    mmhal(tmp_path)
    if template:
        put(tmp_path / "mmhal/judge_prompt.txt", template)
    code, model = scripted({}, *flags("mmhal", tmp_path), *more, *["--judge_model=m"] * bool(more))
    assert code == 2 and model.asked == [] and not (tmp_path / "out").exists()
    one_line(capsys, needle)


def test_a_folder_that_is_no_checkpoint(tmp_path, capsys):
    gqa(tmp_path)
    assert shell([f"--model={tmp_path}", *flags("gqa", tmp_path)]) == 2
    one_line(capsys, f"{tmp_path}/config.json: no such file; is {tmp_path} a Hugging Face checkpoint folder?")
