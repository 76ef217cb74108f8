"""
sample.py: one answer equals greedy generation, a conversation remembers its turns, and bad input ends in one line.

    python -m pytest tests/test_sample.py
"""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample
from configurator import UserError
from data import load_image, render, transform_image
from model import Llava

SCRIPT = str(Path(sample.__file__))


def test_one_answer_is_the_greedy_one(world, capsys):
    sample.main([f"--model={world / 'sparse'}", f"--image={world / 'images' / '0.png'}", "--max_new_tokens=8",
                 "--prompt=what is in the image ?", "--device=cpu"])
    printed = capsys.readouterr().out.strip()
    llava = Llava.from_pretrained(world / "sparse")
    ids, _ = render([{"from": "human", "value": "<image>\nwhat is in the image ?"}], llava.tokenizer, "vicuna", 4)
    pixels = transform_image(load_image(str(world / "images" / "0.png")), 28)[None]
    expected = llava.generate(torch.tensor([ids]), pixels, max_new_tokens=8)[0].tolist()
    assert printed == llava.tokenizer.decode(expected, skip_special_tokens=True).strip() and printed


def test_a_conversation_keeps_its_turns(world, capsys, monkeypatch):
    seen, prompts = [], iter(["what is in the image ?", "a red cup ?", ""])

    def render_and_record(turns, *more):
        seen.append([dict(turn) for turn in turns])
        return render(turns, *more)

    monkeypatch.setattr(sample, "render", render_and_record)
    monkeypatch.setattr("builtins.input", lambda _: next(prompts))
    sample.main([f"--model={world / 'dense'}", f"--image={world / 'images' / '0.png'}", "--max_new_tokens=4",
                 "--device=cpu"])
    assert [len(turns) for turns in seen] == [1, 3]
    assert seen[1][0]["value"] == "<image>\nwhat is in the image ?" and seen[1][2]["value"] == "a red cup ?"
    assert seen[1][1]["value"] == capsys.readouterr().out.split("\n")[0].strip()


def test_a_conversation_ends_with_the_input(world, capsys, monkeypatch):
    def closed(_):
        raise EOFError
    monkeypatch.setattr("builtins.input", closed)
    sample.main([f"--model={world / 'dense'}", "--device=cpu"])
    assert capsys.readouterr().out == "\n"


def test_a_conversation_without_standard_input_ends(world, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)                             # as with <&-
    sample.main([f"--model={world / 'dense'}", "--device=cpu"])
    assert capsys.readouterr().out == "\n"


def test_bad_input(world):
    for wrong in ("--max_new_tokens=0", "--temperature=-1", "--device=gpu", "--model="):
        with pytest.raises(UserError, match=wrong.strip("-").split("=")[0]):
            sample.main([f"--model={world / 'dense'}", "--prompt=a", wrong])
    with pytest.raises(UserError, match="nowhere.png"):
        sample.main([f"--model={world / 'dense'}", "--image=nowhere.png", "--prompt=a"])
    with pytest.raises(UserError, match="nowhere"):
        sample.main(["--model=nowhere", "--prompt=a"])
    done = subprocess.run([sys.executable, SCRIPT, "--model=nowhere", "--prompt=a"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere/config.json") and done.stderr.count("\n") == 1
