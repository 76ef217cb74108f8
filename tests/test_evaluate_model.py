"""
Answering: evaluate.py --model on a tiny random checkpoint and a POPE folder of one-color images, through the command
line.

What the answers are does not matter here (the weights are random); that they are the same whatever the batch size,
the number of processes and the interruptions is what is tested, and that they are the answers of generating one
question at a time.
"""
import json
import shutil

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen2ForCausalLM

import evaluate
from benchmarks.common import SHORT
from data import load_image, render, transform_image
from engine.files import write_lines
from model import Llava
from processes import run as forked

WORDS = "yes no not a is there in the image ? kite dog tall red blue answer question word . , user assistant :".split()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random LLaVA folder: 28-pixel images, 4 image tokens, two layers of width 16."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(3)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                              image_size=28, patch_size=14)
    CLIPVisionModel(vision).save_pretrained(folder / "vision")
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"] + WORDS
    # initializer_range 1: with the usual 0.02 every question would get the same answer
    text = Qwen2Config(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                       num_attention_heads=2,
                       num_key_value_heads=1, eos_token_id=0, bos_token_id=0, initializer_range=1.0)
    Qwen2ForCausalLM(text).save_pretrained(folder / "llm")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.save(str(folder / "llm" / "tokenizer.json"))
    llava = Llava.from_parts(folder / "vision", folder / "llm", seed=0)
    with torch.no_grad():
        for parameter in llava.adaptor.parameters():
            parameter.mul_(8)  # so that images matter
    llava.save_pretrained(folder / "llava")
    return folder / "llava"


@pytest.fixture(scope="module")
def pope(tmp_path_factory):
    """Ten images, two questions of unequal length about each, and in the second split the same ones again."""
    root = tmp_path_factory.mktemp("data")
    (root / "pope/val2014").mkdir(parents=True)
    (root / "pope/coco").mkdir()
    questions, labels = [], {"random": [], "popular": []}
    for i in range(10):
        Image.new("RGB", (20 + 3 * i, 30), (25 * i, 255 - 25 * i, 99)).save(root / f"pope/val2014/{i}.png")
        for split, first in (("random", 0), ("popular", 1000)):
            for j, text in enumerate(["Is there a kite in the image?",
                                      "Is there a tall dog, not red, not blue, in the image?"]):
                row = {"question_id": first + 2 * i + j, "image": f"{i}.png", "text": text}
                labels[split].append({**row, "label": ["yes", "no"][j]})
                questions.append({**row, "text": f"{text}\n{SHORT}", "category": split})
    write_lines(root / "pope/llava_pope_test.jsonl", questions)
    for split, rows in labels.items():
        write_lines(root / f"pope/coco/coco_pope_{split}.json", rows)
    return root


def run(checkpoint, data, out, *flags):
    evaluate.main([f"--model={checkpoint}", "--benchmark=pope", f"--data={data}", f"--out_dir={out}",
                   "--device=cpu", "--max_new_tokens=6", *flags])


def texts(out):
    return [json.loads(line)["text"] for line in (out / "pope/answers.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def expected(checkpoint, pope):
    """The answers, one question at a time, without evaluate's machinery."""
    llava = Llava.from_pretrained(checkpoint)
    answers = []
    for line in (pope / "pope/llava_pope_test.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids, _ = render([{"from": "human", "value": "<image>\n" + row["text"]}], llava.tokenizer, "vicuna", 4)
        pixels = transform_image(load_image(str(pope / "pope/val2014" / row["image"])), 28)
        new = llava.generate(torch.tensor([ids]), pixels[None], max_new_tokens=6)[0].tolist()
        new = new[:new.index(0)] if 0 in new else new
        answers.append(llava.tokenizer.decode(new).strip())
    return answers


def test_answers_do_not_depend_on_the_batch_size(checkpoint, pope, expected, tmp_path):
    assert len(set(expected)) > 5  # else this test could not see a mix-up
    for size in (1, 4, 16):
        run(checkpoint, pope, tmp_path / str(size), f"--batch_size={size}")
        assert texts(tmp_path / str(size)) == expected
        assert not list((tmp_path / str(size) / "pope").glob("*partial*"))


def test_a_rank_that_fails_ends_the_others_and_keeps_what_is_answered(checkpoint, pope, expected, tmp_path):
    """The damaged picture is in one rank's last batch; the other rank notices when it is done."""
    shutil.copytree(pope, tmp_path / "data")
    picture = tmp_path / "data/pope/val2014/9.png"
    whole = picture.read_bytes()
    picture.write_bytes(b"x" * len(whole))
    arguments = [f"--model={checkpoint}", "--benchmark=pope", f"--data={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}",
                 "--device=cpu", "--max_new_tokens=6", "--batch_size=4"]
    done = forked(arguments, nproc=2, program="evaluate.py")
    errors = sorted(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert done.returncode == 2 and "Traceback" not in done.stderr and len(errors) == 2
    assert "9.png: not a readable image" in errors[0] and "another rank is gone" in errors[1]
    answered = [line for path in (tmp_path / "out/pope").glob("answers.partial.*") for line in path.read_text().splitlines()]
    assert len(answered) >= 4
    picture.write_bytes(whole)
    assert forked(arguments, nproc=2, program="evaluate.py").returncode == 0 and texts(tmp_path / "out") == expected


def test_answers_do_not_depend_on_the_number_of_processes(checkpoint, pope, expected, tmp_path):
    arguments = [f"--model={checkpoint}", "--benchmark=pope", f"--data={pope}", f"--out_dir={tmp_path}", "--device=cpu",
                 "--max_new_tokens=6", "--batch_size=4"]
    done = forked(arguments, nproc=2, program="evaluate.py")
    assert done.returncode == 0, done.stderr
    assert texts(tmp_path) == expected
    assert done.stdout.count("40 questions, 20 distinct") == 1  # one rank speaks
