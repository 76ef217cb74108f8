"""
tools/answer.py: the answers are those of generating turn by turn, one row at a time; they do not depend on batches,
ranks and kills; the result trains; and bad input ends in one line.

    python -m pytest tests/test_answer.py
"""
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as torch_dist

import train
from configurator import UserError
from data import as_text, load_image, render, transform_image
from processes import FORK, ended, run, start
from model import Llava
from test_data import noise
from test_train import flags as train_flags, records as log_records
from tools import answer



@pytest.fixture(scope="module")
def world(world, tmp_path_factory):
    """The world of conftest.py, with a teacher that ends some of its answers early: where it would say "bus"."""
    folder = tmp_path_factory.mktemp("answer") / "world"
    shutil.copytree(world, folder)
    llava = Llava.from_pretrained(folder / "teacher")
    with torch.no_grad():
        llava.decoder.lm_head.weight[llava.config.eos_token_id] = 1.1 * llava.decoder.lm_head.weight[
            llava.tokenizer.token_to_id("bus")]
    llava.save_pretrained(folder / "teacher")
    return folder


def flags(world, out, **more):
    settings = dict(model=world / "teacher", data=world / "rows.json", image_dir=world / "images", out=out,
                    temperature=0, max_new_tokens=6, batch_size=4, device="cpu")
    return [f"--{key}={value}" for key, value in (settings | more).items()]


def load(path):
    text = Path(path).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def by_hand(world, rows, temperature=0.0, seed=0, max_new_tokens=6):
    """Each row by itself, without tools/answer.py -> the rows, and how many answers were cut off."""
    llava, unfinished = Llava.from_pretrained(world / "teacher"), 0
    end, answered = llava.config.eos_token_id, []
    assert isinstance(end, int)
    banned = llava.unanswerable_ids()
    for number, row in enumerate(rows):
        names = row.get("image", [])
        images = [transform_image(load_image(str(world / "images" / name)), 28)
                  for name in ([names] if isinstance(names, str) else names)]
        turns = []
        for i, question in enumerate(row["conversations"][0::2]):
            turns.append(question)
            ids, _ = render(turns, llava.tokenizer, "vicuna", 4)
            shown = sum(turn["value"].count("<image>") for turn in turns)
            uniforms = torch.from_numpy(np.random.default_rng([seed, number, i]).random(max_new_tokens))[None]
            new = llava.generate(torch.tensor([ids]), torch.stack(images[:shown]) if shown else None, max_new_tokens,
                                 temperature, uniforms=uniforms, banned=banned)[0].tolist()
            unfinished += end not in new
            new = new[:new.index(end)] if end in new else new
            turns.append({"from": "gpt", "value": llava.tokenizer.decode(new).strip()})
        answered.append(row | {"conversations": turns})
    return answered, unfinished


@pytest.fixture(scope="module")
def rows(world):
    return load(world / "rows.json")


@pytest.fixture(scope="module")
def greedy(world, rows):
    return by_hand(world, rows)


@pytest.fixture(scope="module")
def sampled(world, rows):
    return by_hand(world, rows, temperature=1.0, seed=3)


def test_answers_are_those_of_generating_turn_by_turn(world, rows, greedy, tmp_path, capsys):
    """The rows include text alone, one image, two images, and a second turn."""
    expected, unfinished = greedy
    answer.main(flags(world, tmp_path / "a.json"))
    assert load(tmp_path / "a.json") == expected
    answers = [turn["value"] for row in expected for turn in row["conversations"][1::2]]
    assert len(set(answers)) > 8                                     # else this test could not see a mix-up
    assert 0 < unfinished < len(answers)
    assert f"{unfinished} answers were cut off" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "a.json.settings.json"}


def test_the_second_turn_reads_the_models_own_first_answer(world, rows, greedy):
    """With the data's first answer, the second one of some rows would be another."""
    two_turns = [i for i, row in enumerate(rows) if len(row["conversations"]) == 4]
    llava, different = Llava.from_pretrained(world / "teacher"), 0
    for i in two_turns:
        pixels = torch.stack([transform_image(load_image(str(world / "images" / rows[i]["image"])), 28)])
        ids, _ = render(rows[i]["conversations"][:3], llava.tokenizer, "vicuna", 4)
        new = llava.generate(torch.tensor([ids]), pixels, 6, banned=llava.unanswerable_ids())[0].tolist()
        text = llava.tokenizer.decode(new, skip_special_tokens=True).strip()
        different += text != greedy[0][i]["conversations"][3]["value"]
    assert different > 0


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_neither_batches_nor_the_order_of_work_change_what_is_sampled(world, sampled, tmp_path, batch_size):
    answer.main(flags(world, tmp_path / "a.json", temperature=1.0, seed=3, batch_size=batch_size))
    assert load(tmp_path / "a.json") == sampled[0]
    assert len({turn["value"] for row in sampled[0] for turn in row["conversations"][1::2]}) > 30


def test_in_a_row_without_images_the_placeholder_is_text(world, tmp_path):
    """Its question is kept as it is, and answered like one that says the same in other letters."""
    rows = [{"id": i, "conversations": [{"from": "human", "value": f"is {word} a word ?"}, {"from": "gpt", "value": ""}]}
            for i, word in enumerate(("<image>", as_text("<image>")))]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    answer.main(flags(world, tmp_path / "a.json", data=tmp_path / "rows.json"))
    plain, spelled = (row["conversations"] for row in load(tmp_path / "a.json"))
    assert plain[0]["value"] == "is <image> a word ?" and plain[1] == spelled[1] and plain[1]["value"]


def test_another_seed_samples_other_answers(world, sampled, tmp_path):
    answer.main(flags(world, tmp_path / "a.json", temperature=1.0, seed=4))
    assert load(tmp_path / "a.json") != sampled[0]


def test_two_ranks_give_the_same_file(world, tmp_path):
    """The same bytes, greedy and sampled."""
    def work(rank):
        answer.main(flags(world, tmp_path / "greedy-2.json"))
        answer.main(flags(world, tmp_path / "sampled-2.json", temperature=1.0, seed=3))
        torch_dist.destroy_process_group()

    codes, errors = ended(start(2, work))
    assert codes == [0, 0], errors
    answer.main(flags(world, tmp_path / "greedy-1.json"))
    answer.main(flags(world, tmp_path / "sampled-1.json", temperature=1.0, seed=3))
    for kind in ("greedy", "sampled"):
        assert (tmp_path / f"{kind}-2.json").read_bytes() == (tmp_path / f"{kind}-1.json").read_bytes()
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_stage_trains_on_the_result(world, tmp_path, name):
    answer.main(flags(world, tmp_path / name))
    train.main(train_flags(world, "sft", tmp_path / "sft", data=tmp_path / name, max_steps=2))
    assert [record["step"] for record in log_records(tmp_path / "sft")] == [1, 2]


def test_other_keys_stay_and_questions_without_an_answer_get_one(world, tmp_path):
    """Also images of two questions, a question at the end, and text beyond ASCII."""
    rows = [{"source": {"name": "é 图"}, "id": 7, "image": ["0.png", "1.png"], "weight": 0.5, "conversations": [
                {"from": "human", "value": "<image>\nwhat is there ?", "lang": "en"},
                {"from": "gpt", "value": "a cup", "score": 1},
                {"from": "human", "value": "and <image> ?"}]},
            {"conversations": [{"from": "human", "value": "is 图 red ?"}], "image": None}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer.main(flags(world, tmp_path / "a.jsonl", data=tmp_path / "rows.jsonl"))
    new = load(tmp_path / "a.jsonl")
    rows[1].pop("image")
    expected, _ = by_hand(world, rows)
    assert new[0] == expected[0] and list(new[0]) == list(rows[0])
    assert new[1] == expected[1] | {"image": None}
    assert "é 图" in (tmp_path / "a.jsonl").read_text(encoding="utf-8")


def test_conversations_end_where_max_length_is_reached(world, rows, greedy, tmp_path, capsys):
    """The first question of some rows does not fit, the second one of others; with the questions go their images."""
    rows = rows + [{"id": "late", "image": ["0.png", "1.png"], "conversations": [
        {"from": "human", "value": "<image>\na"}, {"from": "gpt", "value": "a"},
        {"from": "human", "value": "<image>\n" + "red " * 20}, {"from": "gpt", "value": "a"}]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    full, _ = by_hand(world, rows)
    llava, expected, ended_early = Llava.from_pretrained(world / "teacher"), [], 0
    lengths = [len(render(row["conversations"][:1], llava.tokenizer, "vicuna", 4)[0]) for row in full]
    limit = sorted(lengths)[len(lengths) * 3 // 4]
    for row in full:
        turns = row["conversations"]
        while turns and len(render(turns[:-1], llava.tokenizer, "vicuna", 4)[0]) > limit:
            turns = turns[:-2]
        if turns:
            ended_early += len(turns) < len(row["conversations"])
            expected.append(row | {"conversations": turns} | ({"image": ["0.png"]} if row["id"] == "late" else {}))
    assert 0 < len(expected) < len(full) and ended_early > 1 and expected[-1]["id"] == "late"
    answer.main(flags(world, tmp_path / "a.json", data=tmp_path / "rows.json", max_length=limit + 6))
    assert load(tmp_path / "a.json") == expected
    assert f"{ended_early} rows end early and {len(full) - len(expected)} are left out" in capsys.readouterr().out


class Spelling:
    """A tokenizer that decodes everything to the same text."""

    def __init__(self, tokenizer):
        self.encode, self.token_to_id = tokenizer.encode, tokenizer.token_to_id
        self.get_vocab_size = tokenizer.get_vocab_size

    def decode(self, ids, skip_special_tokens):
        return " see <image> <<image>> "


def test_an_answer_never_contains_the_image_placeholder(world, rows, tmp_path):
    """Several tokens can spell it. The next turn could then not be rendered, and no stage could train on the row."""
    config = answer.load_config(answer.DEFAULTS, flags(world, tmp_path / "a.json"))
    llava = Llava.from_pretrained(world / "teacher")
    llava.tokenizer = Spelling(llava.tokenizer)
    pixels = {name: answer.load_pixels(rows, config, 28, name, 0) for name in answer.image_names(rows[0].get("image"))}
    [record] = answer.answer_batch(llava, rows, [0], pixels, config)
    assert [turn["value"] for turn in record["conversations"][1::2]] == ["see (image) <(image)>"] * 2


# -----------------------------------------------------------------------------
# Interruptions

def interrupt(world, out, monkeypatch, after=3, **more):
    """A run that ends after so many batches."""
    def answer_batch(*arguments, calls=[]):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(1)
        return original(*arguments)

    original = answer.answer_batch
    with monkeypatch.context() as patch:
        patch.setattr(answer, "answer_batch", answer_batch)
        with pytest.raises(KeyboardInterrupt):
            answer.main(flags(world, out, **more))


def test_a_killed_run_continues_and_ends_with_the_same_file(world, tmp_path, monkeypatch):
    """SIGKILL to two ranks, then to three, at random moments; then one rank answers what is missing, and only that."""
    settings, draw, finished = dict(temperature=1.0, seed=3, max_new_tokens=24, batch_size=1), random.Random(0), 0
    answer.main(flags(world, tmp_path / "whole.json", **settings))
    for nproc in (2, 3):
        ranks = start(nproc, lambda rank: answer.main(flags(world, tmp_path / "killed.json", **settings)))
        goal = finished + draw.randint(2, 8)
        config = answer.load_config(answer.DEFAULTS, flags(world, tmp_path / "killed.json"))
        while len(answer.read_partial_files(config)) < goal:
            assert all(rank.exitcode is None for rank in ranks)
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        os.killpg(ranks[0].group, signal.SIGKILL)
        for rank in ranks:
            rank.join()
        finished = len(answer.read_partial_files(config))
        assert goal <= finished < 32
    torn = tmp_path / "killed.json.partial.0.jsonl"
    torn.write_text(torn.read_text()[:-9])                           # as if the last write had ended halfway
    finished = len(answer.read_partial_files(config))

    batches, original = [], answer.answer_batch
    monkeypatch.setattr(answer, "answer_batch", lambda llava, rows, batch, *more: (
        batches.append(batch), original(llava, rows, batch, *more))[1])
    answer.main(flags(world, tmp_path / "killed.json", **settings))
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert sum(map(len, batches)) == 32 - finished
    assert not list(tmp_path.glob("*partial*"))


def test_a_finished_run_says_so_and_does_nothing(world, tmp_path, monkeypatch, capsys):
    answer.main(flags(world, tmp_path / "a.json"))
    before = (tmp_path / "a.json").stat().st_mtime_ns
    (tmp_path / "a.json.partial.0.jsonl").write_text("\n")           # killed before this file was removed
    monkeypatch.setattr(Llava, "from_pretrained", None)
    answer.main(flags(world, tmp_path / "a.json"))
    assert "finished already" in capsys.readouterr().out
    assert (tmp_path / "a.json").stat().st_mtime_ns == before
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.parametrize("change", ["temperature", "seed", "max_new_tokens", "max_length", "model", "data"])
@pytest.mark.parametrize("finished", [False, True])
def test_a_run_with_other_settings_is_refused(world, tmp_path, monkeypatch, change, finished):
    out = tmp_path / "a.json"
    if finished:
        answer.main(flags(world, out))
    else:
        interrupt(world, out, monkeypatch)
    (tmp_path / "rows.json").write_text((world / "rows.json").read_text() + "\n")
    value = {"temperature": 0.5, "seed": 1, "max_new_tokens": 5, "max_length": 99, "model": world / "dense",
             "data": tmp_path / "rows.json"}[change]
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=f"a.json.*was made with {change}=.*, this run has .*choose another --out"):
        answer.main(flags(world, out, **{change: value}))
    assert files == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_changed_weights_and_changed_rows_are_noticed(world, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    for path in (world / "teacher").iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "rows.json").write_text((world / "rows.json").read_text())
    own = dict(model=tmp_path / "model", data=tmp_path / "rows.json")
    interrupt(world, tmp_path / "a.json", monkeypatch, **own)

    (tmp_path / "rows.json").write_text((world / "rows.json").read_text().replace("red", "blue"))
    with pytest.raises(UserError, match="was made with data_sha256="):
        answer.main(flags(world, tmp_path / "a.json", **own))
    (tmp_path / "rows.json").write_text((world / "rows.json").read_text())
    Llava.from_pretrained(world / "teacher", torch.bfloat16).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="was made with model_digest="):
        answer.main(flags(world, tmp_path / "a.json", **own))


def test_other_pictures_under_the_same_names_are_noticed(world, rows, tmp_path, monkeypatch):
    """Rows that were answered with the old ones are answered again; a finished file is not taken for one of the new ones."""
    shutil.copytree(world / "images", tmp_path / "others")
    for name in ("0.png", "1.png", "2.png"):
        noise("RGB", 20, 10, seed=0).save(tmp_path / "others" / name)
    out, whole, others = tmp_path / "a.json", tmp_path / "whole.json", dict(image_dir=tmp_path / "others")
    answer.main(flags(world, whole, **others))
    interrupt(world, out, monkeypatch, after=7)
    (tmp_path / "a.json.partial.3.jsonl").write_bytes((tmp_path / "a.json.partial.0.jsonl").read_bytes())
    answer.main(flags(world, out, **others))
    assert load(out) == load(whole) and not list(tmp_path.glob("*partial*"))
    answer.main(flags(world, tmp_path / "old.json"))
    assert load(tmp_path / "old.json") != load(whole)
    refused(world, tmp_path, "a.json: was made with image_sizes=.*choose another --out")
    assert load(out) == load(whole)


def test_lines_of_a_partial_file_that_are_no_records(world, greedy, tmp_path, monkeypatch):
    interrupt(world, tmp_path / "a.json", monkeypatch, after=2)
    whole = {"row": 0, "image_sizes": [], "conversations": [], "unfinished": 0}
    odd = [5, "x", {}, [1], {"row": [1]}, *(whole | {"row": row} for row in (77, -1, True)), whole | {"unfinished": None}]
    odd += [whole | {"conversations": turns} for turns in ("junk", [1], [{"from": "human"}], [{"from": "gpt", "value": ""}])]
    for rank in (0, 1):
        with open(tmp_path / f"a.json.partial.{rank}.jsonl", "ab") as file:
            file.write(b"\n\xff\n[[[\n" + "".join(json.dumps(line) + "\n" for line in odd).encode())
    answer.main(flags(world, tmp_path / "a.json"))
    assert load(tmp_path / "a.json") == greedy[0]


def test_one_run_at_a_time(world, greedy, tmp_path):
    config = answer.load_config(answer.DEFAULTS, flags(world, tmp_path / "a.json"))
    began, over = FORK.Event(), FORK.Event()

    def work(rank):
        with answer.open_record(config):
            began.set()
            over.wait(60)

    ranks = start(1, work)
    assert began.wait(60)
    refused(world, tmp_path, "a.json: another run is writing there; wait for it, end it, or choose another place")
    answer.main(flags(world, tmp_path / "b.json"))                   # another file in the same folder
    over.set()
    assert ended(ranks)[0] == [0]
    answer.main(flags(world, tmp_path / "a.json"))
    assert load(tmp_path / "a.json") == load(tmp_path / "b.json") == greedy[0]


# -----------------------------------------------------------------------------
# Mistakes

def refused(world, tmp_path, message, **more):
    with pytest.raises(UserError, match=message) as error:
        answer.main(flags(world, **{"out": tmp_path / "a.json"} | more))
    assert "\n" not in str(error.value)


def test_bad_settings_end_in_one_line(world, tmp_path):
    refused(world, tmp_path, "--model is missing", model="")
    refused(world, tmp_path, "--data: found '', expected FILE.json or FILE.jsonl", data="")
    refused(world, tmp_path, "--out: found .*a.txt", out=tmp_path / "a.txt")
    refused(world, tmp_path, "--out: the folder .*/none does not exist; create it", out=tmp_path / "none/a.json")
    refused(world, tmp_path, "temperature is -1.0, expected a non-negative number", temperature=-1)
    refused(world, tmp_path, "max_new_tokens is 64, expected less than max_length", max_new_tokens=64, max_length=64)
    refused(world, tmp_path, "none/config.json: no such file", model=tmp_path / "none")
    refused(world, tmp_path, "none.json: no such file", data=tmp_path / "none.json")
    assert not list(tmp_path.iterdir())


def test_bad_rows_end_in_one_line_before_the_model_is_loaded(world, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(Llava, "from_pretrained", None)
    data = tmp_path / "rows.json"

    def with_row(row):
        data.write_text(json.dumps([rows[0], row]))
        return dict(data=data)

    ask = [{"from": "human", "value": "<image>\nwhat ?"}]
    refused(world, tmp_path, 'rows.json row 1 id "x": image .*/none.png. does not exist; check image_dir',
            **with_row({"id": "x", "image": "none.png", "conversations": ask}))
    refused(world, tmp_path, "rows.json row 1 id 7: 1 <image> in the text but 0 images",
            **with_row({"id": 7, "conversations": ask}))
    refused(world, tmp_path, 'rows.json row 1 id null: no "conversations"', **with_row({}))
    refused(world, tmp_path, 'rows.json row 1 id null: turn 0 is from "gpt"',
            **with_row({"conversations": [{"from": "gpt", "value": "a cup"}]}))
    refused(world, tmp_path, r"rows.json row 1 id null: .*can't encode character '.ud800'.*surrogates not allowed",
            **with_row({"conversations": [{"from": "human", "value": "a"}], "note": "\ud800"}))
    data.write_text("[]")
    refused(world, tmp_path, "rows.json: has no rows", data=data)
    assert {path.name for path in tmp_path.iterdir()} == {"rows.json"}


def test_files_that_are_not_ours_are_left_alone(world, tmp_path):
    for name in ("a.json", "a.json.partial.0.jsonl"):
        (tmp_path / name).write_text("[1]")
        refused(world, tmp_path, f"{name}: exists without a.json.settings.json.*choose another --out")
        assert (tmp_path / name).read_text() == "[1]"
        (tmp_path / name).unlink()


@pytest.mark.parametrize("content", ["my own settings", '{"editor.fontSize": 12}', "[1]", "5"])
def test_settings_that_are_not_ours_are_left_alone(world, tmp_path, content):
    (tmp_path / "a.json.settings.json").write_text(content)
    refused(world, tmp_path, "a.json.settings.json.*(was not written by this program; choose another --out|malformed JSON)")
    assert (tmp_path / "a.json.settings.json").read_text() == content and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["a.json", "a.json.settings.json", "a.json.partial.0.jsonl"])
def test_what_is_no_file_in_the_place_of_one(world, tmp_path, name):
    if "partial" in name:
        answer.main(flags(world, tmp_path / "a.json"))
        (tmp_path / "a.json").unlink()
    os.mkfifo(tmp_path / name)
    refused(world, tmp_path, f"{name}: (is there already, and is not a file|cannot be read .a pipe or a device, not a file)")


def test_an_input_is_never_the_output(world, tmp_path):
    data = tmp_path / "a.json"
    data.write_bytes((world / "rows.json").read_bytes())
    (tmp_path / "link.json").symlink_to(data)
    for out in (data, tmp_path / "link.json"):
        refused(world, tmp_path, "is also the data of this run, and would be overwritten", data=data, out=out)
    assert data.read_bytes() == (world / "rows.json").read_bytes()


def test_weights_that_overflow_give_no_answers(world, tmp_path):
    llava = Llava.from_pretrained(world / "teacher")
    with torch.no_grad():
        llava.adaptor.linear_1.bias[3] = 1e6
    llava.save_pretrained(tmp_path / "large")
    refused(world, tmp_path, "large: adaptor.linear_1.bias is not finite in float16; .*another --dtype",
            model=tmp_path / "large", dtype="float16")
    assert not list(tmp_path.glob("*partial*"))


def test_a_folder_that_cannot_be_written(world, tmp_path, monkeypatch):
    """/proc is read-only even for root."""
    monkeypatch.setattr(Llava, "from_pretrained", None)
    refused(world, tmp_path, "/proc/a.json.settings.json: cannot be written", out="/proc/a.json")


def test_a_damaged_image_is_named_and_the_rows_before_it_are_kept(world, rows, tmp_path):
    (tmp_path / "images").mkdir()
    for path in (world / "images").iterdir():
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())
    name = rows[-2]["image"]
    (tmp_path / "images" / name).write_bytes(b"no image")
    refused(world, tmp_path, f"rows.json row .*{name}: not a readable image", image_dir=tmp_path / "images",
            batch_size=1)
    (tmp_path / "images" / name).write_bytes((world / "images" / name).read_bytes())
    answer.main(flags(world, tmp_path / "a.json", image_dir=tmp_path / "images", batch_size=1))
    assert len(load(tmp_path / "a.json")) == 32


def test_the_command_line(world, tmp_path):
    """As users run it, with the checkpoint of a sparse student; an error is one line and exit code 2."""
    arguments = flags(world, tmp_path / "a.jsonl", model=world / "sparse")
    done = run(arguments, program="tools/answer.py")
    assert done.returncode == 0, done.stderr
    assert "32/32 rows answered" in done.stdout and "rows/s" in done.stdout and "left" in done.stdout
    assert len(load(tmp_path / "a.jsonl")) == 32
    done = run([*arguments, "--seed=9"], program="tools/answer.py")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
