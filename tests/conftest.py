"""
Tiny checkpoints that transformers itself made, for the tests to compare with. Every fixture writes into pytest's tmp folder.

A CLIP tower of 28x28 pixels and patch 14 has 4 patches; a Qwen2 of 2-3 layers has a tokenizer of 40 words.
"""
import json
import os
import sys
from pathlib import Path

# One thread here and in every process that a test starts: the order in which sums are added depends on the number of
# threads, and some tests compare bit for bit. Tiny shapes gain nothing by more.
for library in ("OMP", "MKL", "OPENBLAS"):
    os.environ[f"{library}_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)
TESTS = Path(__file__).resolve().parent
# A letter for names of files: not every name can be spelled where Python is kept from using UTF-8.
ODD_LETTER = "ä" if sys.getfilesystemencoding() == "utf-8" else "z"
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "robustness")]

WORDS = ("a the is there what do you see red blue green cup bus dog cat kite yes no two and in of image . ? , : USER ASSISTANT "
         "system user assistant you are helpful").split()


def as_variable(text):
    """How Python reads an environment variable of these characters, in whatever locale it was started."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(["<unk>", *WORDS, *specials]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(specials)
    return tokenizer


def make_clip(folder, seed=0, full=False):
    """`full`: a whole CLIP with its text tower, as openai publishes it; else the vision tower alone."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel
    torch.manual_seed(seed)
    config = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28,
                              patch_size=14)
    if full:
        small_text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=100)
        model = CLIPModel(CLIPConfig(vision_config=config.to_dict(), text_config=small_text))
    else:
        model = CLIPVisionModel(config)
    loud(model)
    model.save_pretrained(folder)
    return folder


def make_qwen(folder, seed=0, hidden=32, layers=3, heads=4, kv_heads=2, tied=True, shard="5GB", vocab=64):
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(seed)
    config = Qwen2Config(vocab_size=vocab, hidden_size=hidden, intermediate_size=48, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
                         rope_theta=1000.0, max_position_embeddings=512)
    model = loud(Qwen2ForCausalLM(config))
    model.save_pretrained(folder, max_shard_size=shard)
    make_tokenizer().save(str(Path(folder) / "tokenizer.json"))
    return folder


def loud(model):
    """Random weights at their usual scale give nearly constant output; larger ones make every comparison mean something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
            elif "norm" not in name:
                parameter.normal_(0, 0.3)
    return model.eval()


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory):
    return make_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def world(tmp_path_factory, clip_folder, qwen_folder):
    """A folder with images, instruction and preference rows, a dense student, a sparse student and a wider teacher."""
    import random

    from PIL import Image

    from model import Llava
    from moe import upcycle
    folder = tmp_path_factory.mktemp("world")
    draw = random.Random(0)
    (folder / "images").mkdir()
    for i in range(8):
        image = Image.new("RGB", (30 + i, 40 - i), tuple(draw.randrange(256) for _ in range(3)))
        image.putpixel((draw.randrange(30), draw.randrange(30)), (255, 255, 255))
        image.save(folder / "images" / f"{i}.png")

    def text(low, high):
        return " ".join(draw.choices(WORDS[:22], k=draw.randint(low, high)))

    rows, pairs = [], []
    for i in range(32):
        image = [] if i % 8 == 7 else [f"{draw.randrange(8)}.png"] * (2 if i % 8 == 3 else 1)   # also text-only, two images
        ask = {"from": "human", "value": "<image>\n" * len(image) + text(2, 6)}
        turns = [ask, {"from": "gpt", "value": text(1, 9)}]
        if i % 4 == 0:
            turns += [{"from": "human", "value": text(2, 4)}, {"from": "gpt", "value": text(1, 3)}]
        row = {"id": str(i), "conversations": turns}
        if image:
            row["image"] = image[0] if len(image) == 1 else image
        rows.append(row)
        pair = {"id": str(i), "chosen": [ask, {"from": "gpt", "value": text(1, 9)}],
                "rejected": [ask, {"from": "gpt", "value": text(1, 9)}]}
        pairs.append(pair | ({"image": row["image"]} if image else {}))
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "pairs.json").write_text(json.dumps(pairs))

    dense = Llava.from_parts(clip_folder, qwen_folder)
    dense.save_pretrained(folder / "dense")
    upcycle(dense, num_experts=4, top_k=2)
    dense.save_pretrained(folder / "sparse")
    wider = make_qwen(tmp_path_factory.mktemp("wider"), seed=1, hidden=48, layers=2, tied=False, vocab=128)
    Llava.from_parts(clip_folder, wider, seed=1).save_pretrained(folder / "teacher")
    return folder
