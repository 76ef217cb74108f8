"""
Checkpoint folders as others write them, checked against transformers: several sets of weights in one folder, configs
that leave out what equals a default, end tokens in generation_config.json, and files that are no weights at all.

    python -m pytest tests/robustness/test_checkpoints.py
"""
import json
import os
import pickle
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2MoeConfig

import engine.hf as hf
import sample
from configurator import UserError
from engine.hf import assemble_llava, describe_llava, read_decoder_config, read_llava_config, require_tokenizer, weight_files
from model import Llava
from test_user_files import line_of


@pytest.fixture
def folder(world, tmp_path):
    """A copy of the dense student."""
    return shutil.copytree(world / "dense", tmp_path / "m")


def edit(path, **changes):
    """Set keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_text_config(folder, **changes):
    edit(folder / "config.json", text_config=json.loads((folder / "config.json").read_text())["text_config"] | changes)


# -----------------------------------------------------------------------------
# Several sets of weights

ORDER = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]


def write_set(folder, name, tensors):
    """One set of weights under its usual names; a sharded one has two shards."""
    save, ending = (save_file, "safetensors") if "safetensors" in name else (torch.save, "bin")
    if not name.endswith(".json"):
        return save(tensors, folder / name)
    keys, stem = list(tensors), name.split(".")[0]
    weight_map = {key: f"{stem}-0000{1 + i % 2}-of-00002.{ending}" for i, key in enumerate(keys)}
    for shard in set(weight_map.values()):
        save({key: tensors[key] for key in keys if weight_map[key] == shard}, folder / shard)
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("present", [ORDER[i:j] for i in range(4) for j in range(i + 1, 5)])
def test_of_several_sets_the_one_that_transformers_reads(qwen_folder, clip_folder, tmp_path, present):
    tensors = load_file(qwen_folder / "model.safetensors")
    shutil.copytree(qwen_folder, tmp_path / "q", ignore=shutil.ignore_patterns("*.safetensors"))
    for i, name in enumerate(present):
        write_set(tmp_path / "q", name, {key: tensor + i for key, tensor in tensors.items()})
    ours = assemble_llava(clip_folder, tmp_path / "q", 0, "vicuna").decoder.norm.weight
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q").model.norm.weight
    assert torch.equal(ours, tensors["model.norm.weight"]) and torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_stale_indexes(folder, kind):
    tensors = load_file(folder / "model.safetensors")
    index = folder / ("model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json")
    index.write_text(json.dumps({"weight_map": {key: f"gone.{kind}" for key in tensors}}))
    Llava.from_pretrained(folder)                                    # the single file counts
    (folder / "model.safetensors").unlink()
    assert f"gone.{kind}: no such file" in line_of(Llava.from_pretrained, folder)
    write_set(folder, index.name, tensors)
    Llava.from_pretrained(folder)

    shards = json.loads(index.read_text())["weight_map"]
    first, last, *_ = shards                                         # of two shards
    index.write_text(json.dumps({"weight_map": shards | {last: shards[first]}}))
    assert f"has no tensor {last}, though the index" in line_of(Llava.from_pretrained, folder)
    index.write_text(json.dumps({"weight_map": {key: name for key, name in shards.items() if key != last}}))
    Llava.from_pretrained(folder)                                    # as in transformers, a shard counts as a whole
    names = sorted(set(shards.values()))
    shutil.copyfile(folder / names[0], folder / names[1])            # a shard of an older save
    assert f"{names[1]}: holds tensor " in line_of(Llava.from_pretrained, folder)
    for odd in (["a"], "text", {first: 3}, {first: ""}, {first: "../x"}, {first: "x" * 300}, {first: "a\0"}, {first: "\ud800"}, {}):
        index.write_text(json.dumps({"weight_map": odd}))
        assert str(folder) in line_of(Llava.from_pretrained, folder)


# -----------------------------------------------------------------------------
# What is in a weight file

KEY = "language_model.model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "bool", "complex64", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_only_floating_point_weights_load(folder, dtype, name):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_set(folder, name, tensors | {KEY: tensors[KEY].to(getattr(torch, dtype))})
    assert f"{name}: tensor {KEY} is {dtype}, " in line_of(Llava.from_pretrained, folder)


def test_half_and_double_precision_still_load_and_numbers_that_are_none_do_not(folder):
    tensors = load_file(folder / "model.safetensors")
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, folder / "model.safetensors")
        assert Llava.from_pretrained(folder).adaptor.linear_1.weight.dtype == torch.float32
    for number in (float("nan"), float("inf"), -float("inf")):
        tensors[KEY][3, 4] = number
        save_file(tensors, folder / "model.safetensors")
        assert f"tensor {KEY} holds NaN or infinite numbers" in line_of(Llava.from_pretrained, folder)


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch /tmp/this_must_not_exist",)


@pytest.mark.parametrize("content, expected", [
    ([torch.ones(2)], "other things than tensors"), (torch.ones(2), "other things than tensors"), (3, "other things than tensors"),
    ({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, "other things than tensors"), (None, "other things than tensors"),
    ({3: torch.ones(2)}, "other things than tensors"), ({KEY: torch.eye(32).to_sparse()}, ": "), (RunsCode(), "cannot be read"),
    ({"a": RunsCode()}, "cannot be read"),
])
def test_a_bin_file_that_is_no_state_dict(folder, content, expected):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if isinstance(content, dict) and KEY in content:
        content = tensors | content
    torch.save(content, folder / "pytorch_model.bin")
    line = line_of(Llava.from_pretrained, folder)
    assert "pytorch_model.bin: " in line and expected in line and len(line) < 500
    assert not os.path.exists("/tmp/this_must_not_exist")
    with open(folder / "pytorch_model.bin", "wb") as file:           # as pickle writes it, without torch's zip
        pickle.dump(content, file)
    assert "pytorch_model.bin: " in line_of(Llava.from_pretrained, folder)


@pytest.mark.parametrize("name", ORDER + ["config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["pointer", "folder", "pipe", "page"])
def test_other_things_under_the_names_of_a_checkpoint(folder, name, kind):
    if name in ORDER:
        (folder / "model.safetensors").unlink()
    else:
        (folder / name).unlink()
    if kind == "folder":
        (folder / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 13\n" if kind == "pointer"
                                   else "<!doctype html><html></html>")
    line = line_of(Llava.from_pretrained, folder)
    assert line.startswith(f"{folder / name}")
    if name in ("model.safetensors", "pytorch_model.bin"):
        assert {"pointer": "git lfs pull", "folder": "a folder", "pipe": "a pipe", "page": "a web page"}[kind] in line


# -----------------------------------------------------------------------------
# Configs

@pytest.mark.parametrize("kind, config_class", [("qwen2", Qwen2Config), ("qwen2_moe", Qwen2MoeConfig)])
@pytest.mark.parametrize("changes", [
    {}, {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16}, {"num_key_value_heads": None}, {"vocab_size": 152064},
    {"num_hidden_layers": 5, "tie_word_embeddings": True}, {"rope_theta": 1e6}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    {"rope_scaling": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rope_scaling": {"type": "default"}, "rope_theta": 3e4},
    {"rope_scaling": {"rope_type": "default", "rope_theta": 7e4}, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 2e4}, {"unheard_of": [1]},
])
def test_a_missing_key_means_what_it_means_in_transformers(kind, config_class, changes, tmp_path):
    if kind == "qwen2_moe":
        changes = changes | {"shared_expert_intermediate_size": 0, "moe_intermediate_size": 5632}
    ours = read_decoder_config(tmp_path / "config.json", {"model_type": kind, **changes})
    theirs = config_class.from_dict({"model_type": kind, **changes})
    assert (ours.vocab_size, ours.n_embd, ours.n_layer, ours.n_head, ours.n_kv_head, ours.n_ffn) == (
        theirs.vocab_size, theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads,
        theirs.num_key_value_heads or theirs.num_attention_heads, theirs.intermediate_size)
    assert (ours.norm_eps, ours.tied, ours.max_positions) == (theirs.rms_norm_eps, theirs.tie_word_embeddings, theirs.max_position_embeddings)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    if kind == "qwen2_moe":
        assert (ours.num_experts, ours.top_k, ours.norm_topk) == (theirs.num_experts, theirs.num_experts_per_tok, theirs.norm_topk_prob)
        assert ours.sparse_layers == list(range(ours.n_layer))


@pytest.mark.parametrize("scaling", [{"type": "yarn", "factor": 4.0}, {"rope_type": "linear", "factor": 2.0}, {"type": "mrope"}])
def test_scaled_positions_are_refused_wherever_they_are(tmp_path, scaling):
    plain = {"rope_type": "default", "rope_theta": 1e6}
    for rope in ({"rope_scaling": scaling}, {"rope_parameters": scaling}, {"rope_scaling": scaling, "rope_parameters": plain}):
        assert "rope_type: found " in line_of(read_decoder_config, tmp_path / "config.json", {"model_type": "qwen2", **rope})


def test_a_saved_default_config_opens(folder, tmp_path):
    """What transformers writes for a LLaVA whose parts have their default sizes, as older releases cut it."""
    edit(folder / "config.json", text_config={"model_type": "qwen2", "rope_theta": 1e6, "vocab_size": 151936}, tokenizer=None)
    (folder / "tokenizer.json").unlink()
    decoder = describe_llava(folder).config.decoder
    assert (decoder.n_embd, decoder.n_layer, decoder.n_head, decoder.n_kv_head, decoder.n_ffn) == (4096, 32, 32, 32, 22016)


@pytest.mark.parametrize("ends, generation, expected", [
    (3, {"eos_token_id": [5, 3]}, [5, 3]), (3, {"eos_token_id": 5}, 5), (3, {"eos_token_id": None}, 3), (3, {}, 3), (3, None, 3),
    ([3, 4], {}, [3, 4]), (None, {"eos_token_id": [5]}, [5]),
])
def test_end_tokens_are_those_of_generation_config(folder, ends, generation, expected):
    edit(folder / "config.json", eos_token_id=ends)
    edit_text_config(folder, eos_token_id=ends)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    llava = Llava.from_pretrained(folder)
    assert llava.config.eos_token_id == expected
    llava.save_pretrained(folder)
    assert read_llava_config(folder / "config.json").eos_token_id == expected
    token = json.loads((folder / "tokenizer_config.json").read_text())["eos_token"]
    assert token == llava.tokenizer.id_to_token(expected[0] if isinstance(expected, list) else expected)
    ids = torch.tensor([[5, 6, 7, 8]])
    ended = llava.generate(ids, max_new_tokens=1)[0, 0].item()
    edit(folder / "generation_config.json", eos_token_id=[1, ended])
    assert Llava.from_pretrained(folder).generate(ids, max_new_tokens=9).shape == (1, 1)


def added(content, name):
    return next(token for token in content["added_tokens"] if token["content"] == name)


def only_a_word(content, name):
    """In the vocabulary, where no pretokenizer leaves it whole, and no added token."""
    token = added(content, name)
    content["model"]["vocab"][name] = token["id"]
    content["added_tokens"].remove(token)


# What is wrong with the tokens of a checkpoint, and what is said: nothing of it raises an error by itself.
TOKENS = {
    "an end token of the vocabulary only": (lambda c: only_a_word(c, "<|endoftext|>"), "reads <|endoftext|> in a text as other"),
    "an image token of the vocabulary only": (lambda c: only_a_word(c, "<image>"), "reads <image> in a text as other tokens"),
    "no special end token": (lambda c: added(c, "<|endoftext|>").update(special=False),
                             "<|endoftext|> would stay in the text of answers"),
    "no special padding": (lambda c: added(c, "<pad>").update(special=False), "<pad> would stay in the text of answers"),
}


@pytest.mark.parametrize("kind", TOKENS)
def test_tokens_that_would_train_or_print_something_else(folder, kind):
    change, said = TOKENS[kind]
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    line = line_of(require_tokenizer, describe_llava(folder), folder)
    assert line.startswith(f"{folder}/tokenizer.json: ") and said in line
    assert line == line_of(sample.main, [f"--model={folder}", "--prompt=a", "--device=cpu"])


@pytest.mark.parametrize("ends", [[5], [5, 6], []])
def test_an_answer_that_would_never_end(folder, ends):
    end = describe_llava(folder).tokenizer.token_to_id("<|endoftext|>")
    for path in (folder / "config.json", folder / "generation_config.json"):
        edit(path, eos_token_id=ends)
    line = line_of(require_tokenizer, describe_llava(folder), folder)
    assert f"eos_token_id is {ends}, and answers of template vicuna end with <|endoftext|>, id {end};" in line
    edit(folder / "generation_config.json", eos_token_id=[*ends, end])                         # others besides are fine
    require_tokenizer(describe_llava(folder), folder)


def test_the_padding_token_may_be_in_generation_config(folder):
    pad = read_llava_config(folder / "config.json").pad_token_id
    edit(folder / "config.json", pad_token_id=None)
    edit_text_config(folder, pad_token_id=None)
    assert read_llava_config(folder / "config.json").pad_token_id == pad
    for wrong in (-1, 10**9, "x", [1], True):
        edit(folder / "generation_config.json", pad_token_id=wrong)
        assert f"{folder}/generation_config.json: pad_token_id" in line_of(Llava.from_pretrained, folder)


@pytest.mark.parametrize("changes", [{"pad_token_id": 36}, {"eos_token_id": 36}, {"eos_token_id": [1, 36]}])
def test_the_image_token_is_no_other(folder, changes):
    image = read_llava_config(folder / "config.json").image_token_id
    changes = json.loads(json.dumps(changes).replace("36", str(image)))
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", **changes)
    [key] = changes
    assert f"config.json: {key}: found {image}, expected another id than image_token_index's" in line_of(Llava.from_pretrained, folder)


@pytest.mark.parametrize("part", ["llava", "qwen"])
def test_tokens_beyond_the_vocabulary(folder, world, clip_folder, qwen_folder, tmp_path, part):
    if part == "qwen":
        folder = shutil.copytree(qwen_folder, tmp_path / "q")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["beyond"] = 1_000_000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="tokenizer.json: found 1000000, expected token ids below the vocab_size of config.json, 64"):
        Llava.from_pretrained(folder) if part == "llava" else Llava.from_parts(clip_folder, folder)


SIZES = [{"num_hidden_layers": 1000, "hidden_size": 2**26, "num_attention_heads": 2**20, "num_key_value_heads": 2**20},
         {"intermediate_size": 10**8, "hidden_size": 2**26}, {"vocab_size": 10**8, "hidden_size": 2**26}]


@pytest.mark.parametrize("changes", SIZES)
def test_a_config_of_billions_says_what_it_would_take(folder, changes):
    edit_text_config(folder, **changes)
    started = time.process_time()
    line = line_of(Llava.from_pretrained, folder)
    assert line.startswith(f"{folder}: the model that its config.json describes would take ") and "GB of memory" in line
    assert time.process_time() - started < 20


@pytest.mark.parametrize("changes", [{"num_experts": 100_000}, {"num_experts": 10**30}, {"num_experts": 1000, "num_hidden_layers": 1000},
                                     {"num_hidden_layers": 10**6}, {"num_experts": 0}, {"num_experts": 1.5}])
def test_impossible_numbers_of_experts_and_layers(world, tmp_path, changes):
    folder = shutil.copytree(world / "sparse", tmp_path / "m")
    edit_text_config(folder, mlp_only_layers=[], **changes)
    started = time.process_time()
    [key, *_] = changes
    assert f"config.json: {key}: found " in line_of(Llava.from_pretrained, folder)
    assert time.process_time() - started < 20


@pytest.mark.parametrize("changes", [{"image_size": 10**8, "patch_size": 1}, {"image_size": 9999, "patch_size": 1},
                                     {"hidden_size": 2**26, "num_attention_heads": 4}, {"num_hidden_layers": 1000, "hidden_size": 2**20}])
def test_impossible_vision_towers(folder, changes):
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", vision_config=config["vision_config"] | changes)
    assert str(folder) in line_of(Llava.from_pretrained, folder)


@pytest.mark.parametrize("changes", [
    {"image_mean": [0.5, 0.5, 0.5]}, {"image_std": [0.5, 0.5, 0.5]}, {"image_mean": [1, 0, 0]}, {"image_mean": "imagenet"},
    {"image_mean": 0.5}, {"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5}])
@pytest.mark.parametrize("kind", ["llava", "clip"])
def test_a_tower_that_was_trained_on_other_pixels_is_refused(folder, clip_folder, qwen_folder, tmp_path, kind, changes):
    place = folder if kind == "llava" else shutil.copytree(clip_folder, tmp_path / "clip")
    load = (lambda: Llava.from_pretrained(place)) if kind == "llava" else (lambda: Llava.from_parts(place, qwen_folder))
    path = place / "preprocessor_config.json"
    if not path.exists():                                            # CLIP's as it is published, digits and all
        path.write_text(json.dumps({"do_normalize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
                                    "image_std": [0.26862954, 0.26130258, 0.27577711]}))
    load()
    edit(path, **changes)
    assert f"preprocessor_config.json: {next(iter(changes))}" in line_of(load)
    (place / "processor_config.json").write_text(json.dumps({"image_processor": json.loads(path.read_text())}))
    path.unlink()
    assert f"/processor_config.json: {next(iter(changes))}" in line_of(load)


def test_describing_a_folder_allocates_nothing(folder, monkeypatch):
    monkeypatch.setattr(hf, "require_memory", lambda size, what, device: pytest.fail("asked"))
    describe_llava(folder)
    assert len(weight_files(folder)) > 10
