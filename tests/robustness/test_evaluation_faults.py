"""
Evaluation under bad conditions: models that cannot be scored, changed or mixed models, two evaluations at once, full
disks, damaged answer files, servers that repeat a secret, Ctrl-C, means over nothing. Each ends in a correct number or
in one line, and what was answered before is kept.

    python -m pytest tests/robustness/test_evaluation_faults.py
"""
import base64
import io
import json
import os
import random
import resource
import shutil
from collections import defaultdict

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
import sample
from benchmarks import judge
from benchmarks.common import SHORT, mean, percent
from configurator import UserError
from conftest import as_variable
from engine import files
from test_evaluate import (FOLDERS, Scripted, endpoint, flags, gqa, lines, mmbench, mmhal, one_line,  # noqa: F401
                           picture, put, results, said, scripted, shell, vizwiz)
from test_ownership import contents


def script_of(answers):
    return {asked: row["text"] for asked, row in answers}


def answer_file(name, tmp_path, **columns):
    """A benchmark folder, and the flags that score a right answer file on it."""
    answers, expected = FOLDERS[name](tmp_path)
    put(tmp_path / f"{name}.jsonl", [row | columns for _, row in answers])
    return [f"--answers={tmp_path / name}.jsonl", *flags(name, tmp_path)], expected


def forked(work, *args):
    """Run work(*args) in a child process -> a function that waits for it and returns its exit code."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(work(*args) or 0)
        finally:
            os._exit(99)
    return lambda: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ----------------------------------------------------------------------------------------------------------------------
# Models


@pytest.fixture(scope="module")
def tiny_gqa(tmp_path_factory):
    """A GQA folder in the words of the tests' tokenizer."""
    root = tmp_path_factory.mktemp("gqa")
    question = {"question_id": "1", "image": "n.png", "text": "is there a red cup ?"}
    put(root / "gqa/llava_gqa_testdev_balanced.jsonl", [question])
    put(root / "gqa/data/testdev_balanced_questions.json", {"1": {"answer": "yes", "isBalanced": True}})
    put(root / "gqa/data/images/n.png", picture())
    return root


def evaluate_model(model, data, out, *more):
    return shell([f"--model={model}", "--benchmark=gqa", f"--data={data}", f"--out_dir={out}", "--device=cpu",
                  "--max_new_tokens=2", *more])


@pytest.mark.parametrize("value, dtype", [
    (torch.nan, "float32"), (torch.inf, "float32"), (-torch.inf, "bfloat16"), (1e6, "float16")])
def test_a_model_of_wrong_numbers_is_not_scored(value, dtype, world, tiny_gqa, tmp_path, capsys):
    shutil.copytree(world / "sparse", tmp_path / "m")
    weights = load_file(tmp_path / "m/model.safetensors")
    name = random.Random(dtype).choice(sorted(key for key in weights if weights[key].numel()))
    weights[name].view(-1)[-1] = value
    save_file(weights, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    assert evaluate_model(tmp_path / "m", tiny_gqa, tmp_path / "out", f"--dtype={dtype}") == 2
    one_line(capsys, str(tmp_path / "m"))
    assert not (tmp_path / "out/results.json").exists()


def as_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_shards(folder, write=lambda tensors, path: save_file(tensors, path), kind="model-{}.safetensors",
              index="model.safetensors.index.json"):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = {kind.format(i): dict(list(sorted(tensors.items()))[i::2]) for i in (0, 1)}
    for name, half in halves.items():
        write(half, folder / name)
    put(folder / index, {"weight_map": {key: name for name, half in halves.items() for key in half}})


def as_pickled_shards(folder):
    as_shards(folder, torch.save, "pytorch_model-{}.bin", "pytorch_model.bin.index.json")


@pytest.mark.parametrize("change", [lambda folder: None, as_pickle, as_shards, as_pickled_shards])
def test_whatever_opens_elsewhere_opens_here(change, world, tiny_gqa, tmp_path):
    shutil.copytree(world / "dense", tmp_path / "m")
    change(tmp_path / "m")
    assert evaluate_model(tmp_path / "m", tiny_gqa, tmp_path / "out") == 0
    assert results(tmp_path)["gqa"]["rows"] == 1


def without_template(folder):
    config = json.loads((folder / "config.json").read_text())
    put(folder / "config.json", {key: value for key, value in config.items() if key != "template"})


@pytest.mark.parametrize("change", [
    lambda folder: (folder / "tokenizer.json").unlink(), without_template,
    lambda folder: (folder / "config.json").unlink(), lambda folder: (folder / "model.safetensors").unlink(), shutil.rmtree,
    lambda folder: put(folder / "config.json", "version https://git-lfs.github.com/spec/v1\n")])
def test_whatever_does_not_open_is_named_as_by_sample(change, world, tiny_gqa, tmp_path, capsys):
    shutil.copytree(world / "dense", tmp_path / "m")
    change(tmp_path / "m")
    with pytest.raises(UserError) as error:
        sample.main([f"--model={tmp_path / 'm'}", "--prompt=a", "--device=cpu"])
    assert evaluate_model(tmp_path / "m", tiny_gqa, tmp_path / "out") == 2
    one_line(capsys, str(error.value))


def test_what_counts_is_the_content_of_the_model(tmp_path, scripted, capsys):
    answers, _ = gqa(tmp_path)
    assert scripted(script_of(answers), *flags("gqa", tmp_path))[0] == 0
    (tmp_path / "checkpoint").rename(tmp_path / "moved")
    for path in (tmp_path / "moved").iterdir():
        path.touch()
    os.symlink(tmp_path / "moved", tmp_path / "checkpoint")
    code, model = scripted({}, *flags("gqa", tmp_path), f"--model={tmp_path / 'moved'}")
    assert code == 0 and model.asked == []                        # moved and touched: the same model


def test_two_models_are_not_one_row(tmp_path, scripted, capsys):
    script = script_of(gqa(tmp_path)[0] + vizwiz(tmp_path)[0])
    assert scripted(script, *flags("gqa", tmp_path))[0] == 0
    before = results(tmp_path)
    put(tmp_path / "other/config.json", {})
    put(tmp_path / "other/model.safetensors", b"other weights")
    assert scripted(script, *flags("vizwiz", tmp_path), f"--model={tmp_path / 'other'}")[0] == 2
    one_line(capsys, "holds gqa of the model", "/other", "another --out_dir")
    put(tmp_path / "checkpoint/model.safetensors", b"trained on")
    assert scripted(script, *flags("vizwiz", tmp_path))[0] == 2   # the same folder, another model
    one_line(capsys, "holds gqa of the model", "files have changed")
    assert results(tmp_path) == before
    put(tmp_path / "checkpoint/model.safetensors", b"weights")
    assert scripted(script, *flags("vizwiz", tmp_path))[0] == 0 and set(results(tmp_path)) == {"gqa", "vizwiz"}


def test_answer_files_of_two_models_are_not_one_row(tmp_path, capsys):
    first, _ = answer_file("gqa", tmp_path, model_id="a")
    second, _ = answer_file("vizwiz", tmp_path, model_id="b")
    unknown, _ = answer_file("mme", tmp_path, model_id="")
    assert shell(first) == 0 and shell(second) == 2
    one_line(capsys, "holds gqa of the model a, and vizwiz is of b")
    assert shell(unknown) == 0                                    # whose it is, we cannot know
    assert set(results(tmp_path)) == {"gqa", "mme"}
    assert shell(first) == 0


# ----------------------------------------------------------------------------------------------------------------------
# Two at once, full disks, Ctrl-C


def test_evaluations_at_once_lose_no_numbers(tmp_path):
    names = ["gqa", "vizwiz", "scienceqa", "textvqa", "mme", "mmbench", "pope", "amber"]
    commands = [answer_file(name, tmp_path)[0] for name in names]

    def score_often(part):
        for command in part * 3:
            if shell(command) != 0:
                return 1

    waits = [forked(score_often, commands[i::4]) for i in range(4)]
    assert [wait() for wait in waits] == [0] * 4
    assert set(results(tmp_path)) == set(names)


@pytest.mark.parametrize("out_dir", [".", "elsewhere"])
def test_answers_are_not_written_among_files_of_others(out_dir, tmp_path, scripted, capsys):
    """Not into the benchmark's own folder, nor into one where answers lie that evaluate.py did not write."""
    script = script_of(gqa(tmp_path)[0])
    put(tmp_path / "elsewhere/gqa/answers.jsonl", "mine\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, model = scripted(script, *flags("gqa", tmp_path)[:2], f"--out_dir={tmp_path / out_dir}")
    assert code == 2 and model.asked == []
    one_line(capsys, "gqa: holds files that evaluate.py did not write")
    kept = {path: path.read_bytes() for path in before}
    assert kept == before


@pytest.mark.parametrize("mode", ["answers", "model"])
@pytest.mark.parametrize("name", ["results.json", "results.md", "gqa/scored.jsonl", "gqa/thesis.tex"])
def test_results_are_not_written_over_files_of_others(name, mode, tmp_path, scripted, capsys):
    command, _ = answer_file("gqa", tmp_path)
    put(tmp_path / "out" / name, "{}\n")
    before = contents(tmp_path)
    assert (shell(command) if mode == "answers" else scripted({}, *flags("gqa", tmp_path))[0]) == 2
    one_line(capsys, "holds files that evaluate.py did not write")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("folder", ["out/gqa", "link"])
def test_what_a_run_reads_is_not_overwritten(folder, tmp_path, capsys):
    command, _ = answer_file("gqa", tmp_path)
    assert shell(command) == 0
    os.symlink(tmp_path / "out/gqa", tmp_path / "link")
    put(tmp_path / "out/own/scored.jsonl", [{"question_id": "201", "text": "What?", "answer": "a"}])
    before = contents(tmp_path)
    assert shell([*command, f"--answers={tmp_path / folder / 'scored.jsonl'}"]) == 2
    one_line(capsys, "out/gqa/scored.jsonl: is also the answers of this run")
    questions = tmp_path / folder / "../../out/own/scored.jsonl"
    assert shell([command[0], "--benchmark=own", f"--questions={questions}", command[-1]]) == 2
    one_line(capsys, "out/own/scored.jsonl: is also the questions of this run")
    assert contents(tmp_path) == before


def test_folders_of_evaluations_are_scored_into_again(tmp_path, scripted):
    """Whoever made them: a model, a scoring run, or a scoring run of a version that left no mark."""
    answers, expected = gqa(tmp_path)
    assert scripted(script_of(answers), *flags("gqa", tmp_path))[0] == 0
    made = tmp_path / "out/gqa/answers.jsonl"
    for out in ("out", "scored", "scored"):
        assert shell([f"--answers={made}", *flags("gqa", tmp_path)[:2], f"--out_dir={tmp_path / out}"]) == 0
    (tmp_path / "scored/gqa/lock").unlink()
    assert shell([f"--answers={made}", *flags("gqa", tmp_path)[:2], f"--out_dir={tmp_path / 'scored'}"]) == 0
    assert scripted({}, *flags("gqa", tmp_path))[0] == 0           # and the model's own run goes on
    for out in ("out", "scored"):
        assert json.loads((tmp_path / out / "results.json").read_text())["gqa"]["accuracy"] == expected["accuracy"]


@pytest.mark.parametrize("content", ['{"editor.fontSize": 12}', "[1]", "{ // of an editor\n}", '{"questions": 3}'])
def test_settings_of_other_programs_say_nothing_about_answers(content, tmp_path):
    command, _ = answer_file("gqa", tmp_path)
    put(tmp_path / "settings.json", content)
    assert shell(command) == 0
    assert results(tmp_path)["gqa"]["protocol"]["answers"] == f"{tmp_path / 'gqa.jsonl'}, made elsewhere"


def test_a_pipe_in_place_of_partial_answers(tmp_path, scripted, capsys):
    gqa(tmp_path)
    put(tmp_path / "out/gqa/lock", "evaluate.py\n")
    os.mkfifo(tmp_path / "out/gqa/answers.partial.0.jsonl")
    code, model = scripted({}, *flags("gqa", tmp_path))
    assert code == 2 and model.asked == []
    one_line(capsys, "answers.partial.0.jsonl: cannot be read (a pipe or a device, not a file)")


def test_a_folder_is_answered_into_by_one_evaluation(tmp_path, scripted, capsys):
    script = script_of(gqa(tmp_path)[0] + vizwiz(tmp_path)[0])
    (is_locked, tell), (wait_here, let_go) = os.pipe(), os.pipe()

    def hold():
        with files.lock(tmp_path / "out/gqa/lock"):
            os.write(tell, b".")
            os.close(let_go)
            os.read(wait_here, 1)

    wait = forked(hold)
    os.read(is_locked, 1)
    assert scripted(script, *flags("gqa", tmp_path))[0] == 2
    one_line(capsys, "out/gqa: another run is writing there")
    assert scripted(script, *flags("vizwiz", tmp_path))[0] == 0   # another benchmark may be answered meanwhile
    os.close(let_go)
    assert wait() == 0 and scripted(script, *flags("gqa", tmp_path))[0] == 0


@pytest.mark.parametrize("room", [0, 60, 300, 500, 1000])
def test_a_disk_without_room(room, tmp_path, scripted, capsys):
    answers, expected = gqa(tmp_path)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))       # no file grows beyond it: EFBIG
    try:
        code, model = scripted(script_of(answers), *flags("gqa", tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert code == 2
    one_line(capsys, "cannot be written (File too large)")
    code, again = scripted(script_of(answers), *flags("gqa", tmp_path))
    assert code == 0 and results(tmp_path)["gqa"]["accuracy"] == expected["accuracy"]
    assert len(again.asked) < 5 or not model.asked or room < 500  # complete lines were kept


@pytest.mark.parametrize("place", ["file", "file/deep", "/proc/nothing", "x" * 300])
def test_places_that_cannot_be_written(place, tmp_path, capsys):
    command, _ = answer_file("gqa", tmp_path)
    put(tmp_path / "file", "in the way")
    try:
        assert shell([*command[:-1], f"--out_dir={tmp_path / place}"]) == 2
        one_line(capsys, place)
    except OSError as error:                                      # one line where `run` says it
        assert error.filename and error.strerror


def test_judge_replies_on_a_full_disk(tmp_path, endpoint, capsys):
    command = mmhal(tmp_path) + [f"--judge_url={endpoint.url}", "--judge_model=m"]
    endpoint.replies = [said("Rating: 1"), said("Rating: 2"), said("Rating: 3"), said("Rating: 3"), said("Rating: 3")]
    assert shell(command[:-2] + ["--judge_url=" + endpoint.url, "--judge_model=m"]) == 0
    size = (tmp_path / "out/mmhal/judge.jsonl").stat().st_size
    shutil.rmtree(tmp_path / "out")
    endpoint.replies = [said("Rating: 1")] * 3
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        assert shell(command) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    one_line(capsys, "judge.jsonl", "File too large")
    kept = lines(tmp_path / "out/mmhal/judge.jsonl")
    assert len(kept) == 1 and kept[0]["reply"] == "Rating: 1"     # whole lines, and the next run goes on behind them
    endpoint.replies = [said("Rating: 5")] * 2
    assert shell(command) == 0 and results(tmp_path)["mmhal"]["score"] == pytest.approx(11 / 3)


def test_ctrl_c_keeps_the_answers(tmp_path, scripted, capsys, monkeypatch):
    answers, expected = gqa(tmp_path)
    generate = Scripted.generate

    def interrupted(self, *args):
        if len(self.asked) >= 2:
            raise KeyboardInterrupt
        return generate(self, *args)

    monkeypatch.setattr(Scripted, "generate", interrupted)
    code, _ = scripted(script_of(answers), *flags("gqa", tmp_path))
    said = capsys.readouterr().err
    assert code == 130 and said.count("\n") == 1 and "kept in" in said and "continues" in said
    monkeypatch.setattr(Scripted, "generate", generate)
    code, model = scripted(script_of(answers), *flags("gqa", tmp_path))
    assert code == 0 and len(model.asked) == 3 and results(tmp_path)["gqa"]["accuracy"] == expected["accuracy"]


def test_ctrl_c_while_a_judge_is_asked(tmp_path, endpoint, capsys, monkeypatch):
    command = mmhal(tmp_path) + [f"--judge_url={endpoint.url}", "--judge_model=m"]
    endpoint.replies = [said("Rating: 4")]
    post = judge.requests.post

    def interrupted(*args, **kwargs):
        if not endpoint.replies:
            raise KeyboardInterrupt
        return post(*args, **kwargs)

    monkeypatch.setattr(judge.requests, "post", interrupted)
    assert shell(command) == 130 and capsys.readouterr().err.count("\n") == 1
    assert [each["reply"] for each in lines(tmp_path / "out/mmhal/judge.jsonl")] == ["Rating: 4"]


def test_the_umask_decides_who_may_read(tmp_path):
    command, _ = answer_file("gqa", tmp_path)
    for umask, mode in ((0o027, 0o640), (0o002, 0o664), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            assert shell([*command[:-1], f"--out_dir={tmp_path / oct(umask)}"]) == 0
        finally:
            os.umask(before)
        files = [path for path in (tmp_path / oct(umask)).rglob("*") if path.is_file()]
        assert {path.stat().st_mode & 0o777 for path in files} == {mode} and len(files) >= 4


# ----------------------------------------------------------------------------------------------------------------------
# Damaged files

NO_ANSWERS = [b"5", b'"x"', b"{}", b"[]", b"null", b"[" * 100_000, b"7" * 5000,
              b'{"job": [1], "text": "a"}', b'{"job": "x"}', b'{"job": null, "text": "a"}', b'{"job": "JOB", "text": 5}',
              b'{"job": "JOB", "text": null}', b"\xff\xfe\x00", b"",
              b'{"job": "JOB", "te', b'{"job": "JOB", "text": "\\ud800"}', b"NaN", b"\xef\xbb\xbf{}"]


def test_lines_that_are_no_answers_are_done_again(tmp_path, scripted):
    answers, expected = gqa(tmp_path)
    benchmark = evaluate.open_benchmark("gqa", evaluate.load_config(evaluate.DEFAULTS, list(flags("gqa", tmp_path))))
    job = evaluate.job_id(benchmark.questions[0], benchmark).encode()
    bad = [line.replace(b"JOB", job) for line in NO_ANSWERS]
    good = json.dumps({"job": evaluate.job_id(benchmark.questions[1], benchmark), "text": "yes ."}).encode()
    put(tmp_path / "out/gqa/answers.partial.2.jsonl", b"\n".join([*bad, good, *bad]))
    put(tmp_path / "out/gqa/lock", "evaluate.py\n")
    code, model = scripted(script_of(answers), *flags("gqa", tmp_path))
    assert code == 0 and len(model.asked) == 4 and results(tmp_path)["gqa"]["accuracy"] == expected["accuracy"]


@pytest.mark.parametrize("line", NO_ANSWERS[:-3] + [b"NaN", b'{"question_id": "201", "text": "\\ud800"}'])
def test_answer_files_that_are_none(line, tmp_path, capsys):
    command, _ = answer_file("gqa", tmp_path)
    path = tmp_path / "gqa.jsonl"
    put(path, path.read_bytes().replace(b"\n", b"\n" + line + b"\n", 1) if line else b"")
    assert shell(command) == 2
    one_line(capsys, "gqa.jsonl")


def test_edited_answer_files_give_a_number_or_one_line(tmp_path, capsys):
    """1,000 mutations: bytes replaced, removed, doubled, swapped for pieces of JSON."""
    command, _ = answer_file("gqa", tmp_path)
    config = evaluate.load_config(evaluate.DEFAULTS, command)
    benchmark, path, draw = evaluate.open_benchmark("gqa", config), tmp_path / "gqa.jsonl", random.Random(0)
    original = path.read_bytes()
    pieces = [b"null", b"1e999", b"NaN", b"[]", b"{}", b'"', b"\\", b"\\ud800", b"\x00", b"\xff", b"\n",
              b",", b"-0", b"9" * 400, b"true"]
    ends = {"number": 0, "line": 0}
    for _ in range(1000):
        content = bytearray(original)
        for _ in range(draw.randint(1, 3)):
            i = draw.randrange(len(content))
            j = min(len(content), i + draw.choice([0, 1, 1, 4, 30]))
            content[i:j] = draw.choice([draw.choice(pieces), bytes([draw.randrange(256)]), content[i:j] * 2, b""])
        path.write_bytes(content)
        try:
            texts, _ = evaluate.read_answers(path, benchmark)
            benchmark.score([texts.get(question.key, "") for question in benchmark.questions])
            json.dumps(list(texts.values()), ensure_ascii=False).encode()
            ends["number"] += 1
        except UserError as error:
            assert "gqa.jsonl" in str(error) and "\n" not in str(error)
            ends["line"] += 1
    assert min(ends.values()) > 20


def test_a_bomb_in_a_table(tmp_path, scripted, capsys):
    answers, _ = mmbench(tmp_path)
    path, bomb = tmp_path / "mmbench/mmbench_dev_en_20231003.tsv", io.BytesIO()
    Image.new("1", (15_000, 15_000)).save(bomb, "PNG")            # 30 kB that would become 0.7 GB
    table = path.read_text().splitlines()
    cells = table[2].split("\t")
    cells[9] = base64.b64encode(bomb.getvalue()).decode()
    put(path, "\n".join([*table[:2], "\t".join(cells), *table[3:]]) + "\n")
    assert scripted(script_of(answers), *flags("mmbench", tmp_path))[0] == 2
    one_line(capsys, "mmbench_dev_en_20231003.tsv row 2", "not a readable image")


@pytest.mark.parametrize("change, needle", [
    (lambda t: t.replace("\n1\t", "\n²\t"), "row 1: the index"),
    (lambda t: t.replace("\n1\t", "\n" + "1" * 5000 + "\t"), "row 1: the index"),
    (lambda t: t.replace("iVBOR", "iV\0OR", 1), "row 1"), (lambda t: t.replace("Which 1?", '"Which 1?', 1), "tsv"),
    (lambda t: t.split("\n")[0] + "\n", "is empty"), (lambda t: "\n" + t, "is missing"), (lambda t: "", "is empty")])
def test_damaged_tables(change, needle, tmp_path, capsys):
    command, _ = answer_file("mmbench", tmp_path)
    path = tmp_path / "mmbench/mmbench_dev_en_20231003.tsv"
    put(path, change(path.read_text()))
    assert shell(command) == 2
    one_line(capsys, needle)


def test_an_annotation_of_an_unknown_category(tmp_path, capsys):
    command, _ = answer_file("objhal", tmp_path)
    path = tmp_path / "objhal/annotations/instances_train2014.json"
    put(path, path.read_text().replace('"category_id": 18', '"category_id": 99'))
    assert shell(command) == 2
    one_line(capsys, "instances_train2014.json: category_id 99")


@pytest.mark.parametrize("question", ["What is <image> here?", "<image>\n<image>\nWhat?", "Why?<image>"])
def test_an_image_typed_into_a_question_is_text(question, tmp_path, scripted):
    """The letters reach the model, never the image token, and the question's own image stays the only one."""
    gqa(tmp_path)
    path = tmp_path / "gqa/llava_gqa_testdev_balanced.jsonl"
    put(path, path.read_text().replace("Is it blue?", question.replace("\n", "\\n")))
    code, model = scripted(defaultdict(lambda: "Yes"), *flags("gqa", tmp_path))
    assert code == 0
    assert f"<image>\n{question}\n{SHORT}" in model.asked           # one image was counted for it, its own


# ----------------------------------------------------------------------------------------------------------------------
# The judge: secrets and braces

KEY = "sk-Geheim/4711+x"


def written(folder):
    return "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("replies, code", [
    ([(401, f"wrong key: Bearer {KEY}")], 2), ([(500, f"{KEY} " * 9)] * 5, 2),
    ([(200, json.dumps({"error": KEY}))] * 5, 2),
    ([said(f"I was asked with {KEY}. Rating: 4")] * 3, 0)])
def test_a_judge_that_repeats_the_key(replies, code, tmp_path, endpoint, capsys, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    endpoint.replies = list(replies)
    command = mmhal(tmp_path) + [f"--judge_url={endpoint.url}", "--judge_model=m", "--judge_key_env=MY_KEY"]
    assert shell(command) == code
    shown = capsys.readouterr()
    assert KEY not in shown.out + shown.err + written(tmp_path) and endpoint.requests[0][1] == f"Bearer {KEY}"
    assert code == 0 or "***" in shown.err


def test_a_password_in_the_judges_address(tmp_path, endpoint, capsys, monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    url = endpoint.url.replace("http://", "http://me:Geheim%2F1@")
    endpoint.replies = [(401, "no: me:Geheim/1")]
    assert shell(mmhal(tmp_path) + [f"--judge_url={url}", "--judge_model=m"]) == 2
    shown = capsys.readouterr()
    assert "Geheim" not in shown.out + shown.err + written(tmp_path)
    assert endpoint.requests[0][1] == "Basic " + base64.b64encode(b"me:Geheim/1").decode()
    for wrong in ("htp://me:Geheim@host", "me:Geheim@host/v1", "http://me:Geheim@", "http://me:Geheim@[::1",
                  "http://a:Geheim@b:99999"):
        assert shell(mmhal(tmp_path) + [f"--judge_url={wrong}", "--judge_model=m"]) == 2
        assert "Geheim" not in (line := capsys.readouterr().err) and "--judge_url" in line and line.count("\n") == 1


@pytest.mark.parametrize("key", ["sk-a\nb", "sk-a\r\nX-Evil: 1", "sk-€uro", "sk-“quoted”", "sk-\x7f", "sk-\udcff"])
def test_a_key_that_no_header_can_carry(key, tmp_path, endpoint, capsys, monkeypatch):
    monkeypatch.setenv("MY_KEY", as_variable(key))
    command = mmhal(tmp_path) + [f"--judge_url={endpoint.url}", "--judge_model=m", "--judge_key_env=MY_KEY"]
    assert shell(command) == 2 and endpoint.requests == []
    line = capsys.readouterr().err
    assert line.startswith("error: MY_KEY: ") and line.count("\n") == 1 and "sk-" not in line


def test_braces_in_a_judge_prompt_are_text(tmp_path, endpoint, capsys):
    command = mmhal(tmp_path) + [f"--judge_url={endpoint.url}", "--judge_model=m"]
    put(tmp_path / "mmhal/judge_prompt.txt", 'Reply {"rating": n} {0} {a}: {} | {} | {} | {}')
    endpoint.replies = [said("Rating: 1")] * 3
    assert shell(command) == 0
    prompts = [body["messages"][0]["content"] for _, _, body in endpoint.requests]
    assert prompts[0] == 'Reply {"rating": n} {0} {a}: Dog, Grass | What is 0? | A dog. | answer 0'
    for template in ("{} {} {}", "none", "{} {} {} {} {}"):
        put(tmp_path / "mmhal/judge_prompt.txt", template)
        assert shell(command) == 2
        one_line(capsys, f"judge_prompt.txt: has {template.count('{}')} places {{}}, expected 4")


def test_braces_in_an_answer_are_text(tmp_path, endpoint):
    command = mmhal(tmp_path) + [f"--judge_url={endpoint.url}", "--judge_model=m"]
    put(tmp_path / "filled.json", (tmp_path / "filled.json").read_text().replace("answer 0", "{} {x} }{"))
    endpoint.replies = [said("Rating: 1")] * 3
    assert shell(command) == 0
    assert endpoint.requests[0][2]["messages"][0]["content"].rstrip().endswith("{} {x} }{")


def test_replies_of_another_judge_stay(tmp_path, endpoint):
    command = mmhal(tmp_path)
    for name in ("a", "b"):
        endpoint.replies = [said(f"Rating: {len(name)}")] * 3
        assert shell(command + [f"--judge_url={endpoint.url}", f"--judge_model={name}"]) == 0
    assert [each["model"] for each in lines(tmp_path / "out/mmhal/judge.jsonl")] == ["a"] * 3 + ["b"] * 3


def test_lines_that_a_user_adds_to_the_judges_file_stay(tmp_path):
    command, path = mmhal(tmp_path), tmp_path / "out/mmhal/judge.jsonl"
    assert shell(command) == 0
    waiting = lines(path)
    mine = [{"prompt": "my notes", "reply": None, "note": "mine"}, waiting[0] | {"note": "not sure yet"}]
    put(path, mine + waiting)
    assert shell(command) == 0
    assert lines(path) == mine + waiting                          # and the empty lines are not doubled


# ----------------------------------------------------------------------------------------------------------------------
# Means over nothing


def edit(path, change):
    put(path, change(path.read_text()))


def test_nothing_has_no_mean():
    assert mean([]) is None and percent(0, 0) is None and mean([0.0]) == 0 and percent(0, 3) == 0


@pytest.mark.parametrize("name, without, number, others", [
    ("scienceqa", lambda root: edit(root / "scienceqa/problems.json", lambda text: text.replace(
        '"image": "image.png"', '"image": null')), "accuracy", {"accuracy_all": 60}),
    ("mmbench", lambda root: edit(root / "mmbench/mmbench_dev_en_20231003.tsv", lambda text: "\n".join(
        line for line in text.split("\n") if line[1:2] != "\t")), "vanilla_accuracy", {"questions": 2}),
    ("mme", lambda root: edit(root / "MME/llava_mme.jsonl", lambda text: "".join(
        line + "\n" for line in text.splitlines() if "code" in line)), "percentage", {"cognition": 0}),
    ("amber", lambda root: edit(root / "AMBER/data/query/query_all.json", lambda text: json.dumps(json.loads(text)[1:])),
     "chair", {"f1": 66.6}),
    ("amber", lambda root: edit(root / "AMBER/data/query/query_all.json", lambda text: json.dumps(json.loads(text)[:1])),
     "f1", {"chair": 33.3}),
])
def test_no_number_without_rows(name, without, number, others, tmp_path, capsys):
    command, _ = answer_file(name, tmp_path)
    without(tmp_path)
    questions = evaluate.open_benchmark(name, evaluate.load_config(evaluate.DEFAULTS, command)).questions
    keys = {question.key if isinstance(question.key, str) else question.key[0] for question in questions}
    answers = lines(tmp_path / f"{name}.jsonl")
    put(tmp_path / f"{name}.jsonl", [each for each in answers if str(each["question_id"]) in keys])
    assert shell(command) == 0
    entry = results(tmp_path)[name]
    assert entry[number] is None and {key: entry[key] for key in others} == others
    assert f"no {number}, since no row counts for it" in capsys.readouterr().out
    assert "None" not in (tmp_path / "out/results.md").read_text()


def test_a_model_that_names_no_object_has_no_hallucination_rate(tmp_path, capsys):
    command, _ = answer_file("objhal", tmp_path, text="It is nice.")
    assert shell(command) == 0
    entry = results(tmp_path)["objhal"]
    assert entry["chair_i"] is None and entry["chair_s"] is None and entry["recall"] == 0
    assert "no chair_s, since no row counts for it" in capsys.readouterr().out
