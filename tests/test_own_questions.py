"""
Your own questions as a benchmark: what the model reads, what counts as right, and what a wrong file says.

    python -m pytest tests/test_own_questions.py
"""
import json
import shutil

import pytest

import evaluate
from benchmarks.common import SHORT
from test_evaluate import lines, one_line, picture, put, results, scripted, shell  # noqa: F401: scripted is a fixture

ROWS = [
    {"question_id": 1, "image": "cat.png", "text": f"What is on the mat?\n{SHORT}", "answer": "a cat"},
    {"question_id": "two", "images": ["cat.png", "dog.png"], "text": "Which is larger?", "answers": ["The first.", "first"]},
    {"question_id": 3, "text": "Name a color."},
    {"question_id": 4, "image": "sub/dog.png", "text": "How many?", "answer": 2},
    {"question_id": 5, "image": None, "text": "Yes?", "answer": "yes"},
]
SCRIPT = {f"<image>\nWhat is on the mat?\n{SHORT}": "The CAT.", "<image>\n<image>\nWhich is larger?": "first",
          "Name a color.": "red", "<image>\nHow many?": "two", "Yes?": "no"}


def folder(tmp_path, rows, name="mine.jsonl"):
    for image in ("cat.png", "dog.png", "sub/dog.png"):
        put(tmp_path / "photos" / image, picture("red" if "cat" in image else "blue"))
    text = "".join(json.dumps(row) + "\n" for row in rows) if name.endswith("l") else json.dumps(rows)
    put(tmp_path / name, text)
    return ["--benchmark=own", f"--questions={tmp_path / name}", f"--image_dir={tmp_path / 'photos'}", f"--out_dir={tmp_path / 'out'}"]


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.json"])
def test_answers_and_exact_match(scripted, tmp_path, name):  # noqa: F811
    """"The CAT." is "cat" after the normalizer, "two" is 2; the row without an answer does not count: 3 of 4."""
    code, model = scripted(SCRIPT, *folder(tmp_path, ROWS, name))
    assert code == 0 and sorted(model.asked) == sorted(SCRIPT)
    entry = results(tmp_path)["own"]
    assert (entry["accuracy"], entry["correct"], entry["rows_with_answer"], entry["rows"]) == (75.0, 3, 4, 5)
    scored = lines(tmp_path / "out/own/scored.jsonl")
    assert [each["score"] for each in scored] == [1.0, 1.0, None, 1.0, 0.0]
    assert [each["text"] for each in scored] == ["The CAT.", "first", "red", "two", "no"]      # the answers as they were
    assert [each["parsed"] for each in scored] == ["cat", "first", "red", "2", "no"]
    scripted(SCRIPT, *folder(tmp_path, ROWS, name))                     # again: nothing is answered twice
    answers = tmp_path / "out/own/answers.jsonl"
    assert shell([f"--answers={answers}", "--benchmark=own", f"--questions={tmp_path / name}",
                  f"--out_dir={tmp_path / 'scored'}"]) == 0             # scoring needs no images
    assert json.loads((tmp_path / "scored/results.json").read_text())["own"]["accuracy"] == 75.0


def test_other_pictures_of_the_same_names_are_noticed(scripted, tmp_path, capsys):  # noqa: F811
    command, settings = folder(tmp_path, ROWS), tmp_path / "out/own/settings.json"
    assert scripted(SCRIPT, *command)[0] == 0
    shutil.copytree(tmp_path / "photos", tmp_path / "moved")
    moved = [*command, f"--image_dir={tmp_path / 'moved'}"]
    assert scripted({}, *moved)[0] == 0                                 # moved: the same pictures
    put(tmp_path / "moved/sub/dog.png", picture("blue", size=(70, 90)))
    assert scripted({}, *moved)[0] == 2
    one_line(capsys, "out/own: holds answers made with images", "choose another --out_dir")
    own = evaluate.open_benchmark("own", evaluate.load_config(evaluate.DEFAULTS, command))
    put(tmp_path / "out/own/answers.partial.0.jsonl", [
        {"job": evaluate.job_id(question, own), "text": "red"} for question in own.questions])
    (tmp_path / "out/own/answers.jsonl").unlink()                       # as if the run had been interrupted:
    code, model = scripted(SCRIPT, *moved)                              # only the new picture is asked about again
    assert code == 0 and model.asked == ["<image>\nHow many?"]
    put(settings, {key: value for key, value in json.loads(settings.read_text()).items() if key != "images"})
    assert scripted({}, *moved)[0] == 0                                 # answered before the sizes were recorded


def test_without_any_answer_there_is_no_accuracy(scripted, tmp_path, capsys):  # noqa: F811
    rows = [{key: value for key, value in row.items() if not key.startswith("answer")} for row in ROWS]
    assert scripted(SCRIPT, *folder(tmp_path, rows))[0] == 0
    assert "own: no accuracy, since no row counts for it (5 rows, 0 unparsed)" in capsys.readouterr().out
    assert results(tmp_path)["own"]["accuracy"] is None


@pytest.mark.parametrize("change, says", [
    ({"question_id": None}, 'line 1: "question_id": found null, expected str or int'),
    ({"text": 5}, 'line 1: "text": found 5, expected str'),
    ({"image": "bird.png"}, "bird.png does not exist; check --image_dir and the row"),
    ({"image": 5}, 'line 1: "image": found 5, expected a text or a list of texts'),
    ({"images": ["cat.png"]}, 'line 1: found "image" and "images"; keep one of them'),
    ({"answer": {"a": 1}}, 'line 1: "answer": found'),
    ({"text": "<image> What?"}, "the question holds <image>, the place of an image; its image goes first, so remove it"),
    ({"question_id": "two"}, "line 2: question_id 'two' is already used in"),
])
def test_wrong_questions_end_in_one_line(scripted, tmp_path, capsys, change, says):  # noqa: F811
    assert scripted({}, *folder(tmp_path, [ROWS[0] | change, *ROWS[1:]]))[0] == 2
    one_line(capsys, says)


@pytest.mark.parametrize("flags, says", [
    (["--benchmark=own"], "--questions is missing"),
    (["--benchmark=own", "--questions=q.jsonl", "--data=d"], "data=d: belongs to the other benchmarks"),
    (["--benchmark=pope", "--questions=q.jsonl", "--data=d"], "questions=q.jsonl: belongs to own"),
    (["--benchmark=gqa", "--data=d", "--ocr=False"], "ocr=False: belongs to textvqa"),
    (["--benchmark=own", "--questions=no_such.jsonl"], "no_such.jsonl: no such file; check --questions"),
])
def test_wrong_flags(tmp_path, capsys, flags, says):
    assert shell([*flags, f"--model={tmp_path}", f"--out_dir={tmp_path / 'out'}"]) == 2
    one_line(capsys, says)


def test_vizwiz_without_gold_answers_is_no_zero(tmp_path, capsys):
    put(tmp_path / "vizwiz/val.json", [{"image": "a.png", "question": "What?", "answers": []}])
    put(tmp_path / "a.jsonl", [{"question_id": 0, "text": "x"}])
    assert shell([f"--answers={tmp_path / 'a.jsonl'}", "--benchmark=vizwiz", f"--data={tmp_path}", f"--out_dir={tmp_path / 'o'}"]) == 2
    one_line(capsys, 'val.json row 0: "answers": found [], expected ten of them')
