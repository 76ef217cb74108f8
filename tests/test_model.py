"""
model.py against transformers on tiny random checkpoints, in fp32 at 1e-4, and the folder format both ways.

    python -m pytest tests/test_model.py
"""
import dataclasses
import json
import shutil

import pytest
import torch
from conftest import loud, make_clip, make_qwen
from PIL import Image
from transformers import AutoProcessor, CLIPVisionModel, LlavaForConditionalGeneration, Qwen2ForCausalLM

from configurator import UserError
from data import render, transform_image
from engine.hf import published_tensors, require_tokenizer, save_tensors
from model import Llava, LlavaConfig, VisionConfig, rope_angles
from moe import upcycle
from tools.plan import DECODERS

TOLERANCE = dict(atol=1e-4, rtol=1e-4)


def batch_of(llava, seed=0):
    """Three rows: two images with text between, text only, one image; padded on the right. (ids, pixels, lengths)"""
    torch.manual_seed(seed)
    image, P = [llava.config.image_token_id], llava.config.image_tokens
    rows = [[5, 6] + image * P + [7, 8, 9] + image * P + [10, 11], [6, 9, 12, 7], [4] + image * P + [8, 8, 9, 5, 13, 6]]
    T = max(map(len, rows))
    ids = torch.tensor([row + [llava.config.pad_token_id] * (T - len(row)) for row in rows])
    return ids, torch.randn(3, 3, 28, 28), [len(row) for row in rows]


def valid_positions(lengths, T):
    return torch.arange(T)[None] < torch.tensor(lengths)[:, None]


# -----------------------------------------------------------------------------
# Each part

@pytest.mark.parametrize("full", [False, True])
def test_clip_features(tmp_path, qwen_folder, full):
    make_clip(tmp_path, seed=3, full=full)
    theirs = CLIPVisionModel.from_pretrained(tmp_path)
    ours = Llava.from_parts(tmp_path, qwen_folder)
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = theirs(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]   # feature layer -2, CLS dropped
    torch.testing.assert_close(ours.encode_images(pixels), expected, **TOLERANCE)


def test_clip_from_a_pickled_checkpoint(tmp_path, clip_folder, qwen_folder):
    """openai/clip-vit-large-patch14-336 has only pytorch_model.bin; older ones also carry position_ids."""
    theirs = CLIPVisionModel.from_pretrained(clip_folder)
    state = {f"vision_model.{key}": value for key, value in theirs.state_dict().items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    torch.save(state, tmp_path / "pytorch_model.bin")
    shutil.copy(clip_folder / "config.json", tmp_path)
    pixels = torch.randn(1, 3, 28, 28)
    torch.testing.assert_close(Llava.from_parts(tmp_path, qwen_folder).encode_images(pixels),
                               Llava.from_parts(clip_folder, qwen_folder).encode_images(pixels), atol=0, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_qwen_logits(tmp_path, clip_folder, tied, kv_heads, shard):
    make_qwen(tmp_path, seed=5, kv_heads=kv_heads, tied=tied, shard=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    theirs = Qwen2ForCausalLM.from_pretrained(tmp_path).eval()
    ours = Llava.from_parts(clip_folder, tmp_path)
    ids = torch.randint(4, 36, (2, 17))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, **TOLERANCE)


# -----------------------------------------------------------------------------
# The whole model, dense and sparse, opened by transformers

def saved(tmp_path, clip_folder, qwen_folder, kind):
    llava = Llava.from_parts(clip_folder, qwen_folder)
    loud(llava.adaptor)
    if kind != "dense":
        upcycle(llava, num_experts=4, top_k=1 if kind == "sparse-top1" else 2, norm_topk=kind != "sparse-raw", seed=1)
        for parameter in llava.decoder.parameters():                 # let the experts differ
            parameter.data += 0.05 * torch.randn_like(parameter)
        for i in llava.config.decoder.sparse_layers:                    # and the routers choose clearly
            llava.decoder.blocks[i].ffn.router.weight.data *= 4
    llava.save_pretrained(tmp_path)
    return llava


@pytest.mark.parametrize("kind", ["dense", "sparse", "sparse-raw"])
def test_transformers_opens_our_folder(tmp_path, clip_folder, qwen_folder, kind):
    torch.manual_seed(0)
    ours = saved(tmp_path, clip_folder, qwen_folder, kind)
    theirs, report = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, pixels, lengths = batch_of(ours)
    valid = valid_positions(lengths, ids.shape[1])
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids, pixel_values=pixels, attention_mask=valid.long()).logits
        torch.testing.assert_close(ours(ids, pixels)[valid], expected[valid], **TOLERANCE)
        again = Llava.from_pretrained(tmp_path)
        torch.testing.assert_close(again(ids, pixels), ours(ids, pixels), atol=0, rtol=0)

    # Greedy text, token by token: ours for the whole batch at once, theirs row by row.
    new = ours.generate(ids, pixels, max_new_tokens=12)
    assert len(set(new.flatten().tolist())) > 4, "text too uniform to compare anything"
    images = iter(pixels)
    for row, length in enumerate(lengths):
        n_images = int((ids[row] == ours.config.image_token_id).sum()) // ours.config.image_tokens
        its = {"pixel_values": torch.stack([next(images) for _ in range(n_images)])} if n_images else {}
        reference = theirs.generate(input_ids=ids[row:row + 1, :length], max_new_tokens=12, do_sample=False,
                                    attention_mask=torch.ones(1, length, dtype=torch.long), **its)[0, length:]
        mine = new[row, :len(reference)]
        assert mine.tolist() == reference.tolist()
        assert (new[row, len(reference):] == ours.config.pad_token_id).all()


def test_older_and_newer_key_layouts(tmp_path, clip_folder, qwen_folder):
    ours = saved(tmp_path / "ours", clip_folder, qwen_folder, "sparse")
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")                      # vision_tower.encoder.…, as transformers 5 writes
    newest = {key: value.contiguous() for key, value in renamed(ours).items()}
    (tmp_path / "newest").mkdir()
    save_tensors(newest, tmp_path / "newest")                        # model.language_model.layers.…, as held in memory
    for name in ("theirs", "newest"):
        shutil.copy(tmp_path / "ours" / "config.json", tmp_path / name)
        shutil.copy(tmp_path / "ours" / "tokenizer.json", tmp_path / name)
        loaded = Llava.from_pretrained(tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), loaded.parameters(), strict=True))


def renamed(llava):
    moves = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head.",
             "vision_tower.vision_model.": "model.vision_tower.vision_model.", "multi_modal_projector.":
             "model.multi_modal_projector."}
    result = {}
    for key, tensor in published_tensors(llava).items():
        old = next(prefix for prefix in moves if key.startswith(prefix))
        result[key.replace(old, moves[old], 1)] = tensor
    return result


def test_shards_and_index(tmp_path, clip_folder, qwen_folder):
    ours = saved(tmp_path, clip_folder, qwen_folder, "dense")
    save_tensors(published_tensors(ours), tmp_path, max_shard_bytes=50_000)
    names = sorted(path.name for path in tmp_path.glob("model*.safetensors"))
    assert len(names) > 2 and "model.safetensors" not in names
    theirs, report = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    loaded = Llava.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), loaded.parameters(), strict=True))
    ours.save_pretrained(tmp_path)                                   # back to one file: the shards are gone
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("content", ["string", "list"])
@pytest.mark.parametrize("template", ["vicuna", "chatml"])
def test_auto_processor_gives_our_ids_and_pixels(tmp_path, clip_folder, qwen_folder, template, content):
    llava = Llava.from_parts(clip_folder, qwen_folder, template=template)
    llava.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    images = [Image.linear_gradient("L").resize((50, 31)), Image.radial_gradient("L").resize((20, 45))]
    images = [image.convert("RGB") for image in images]
    turns = [{"from": "human", "value": "<image>\nwhat is the red cup ?"}, {"from": "gpt", "value": "a dog"},
             {"from": "human", "value": "<image>\n and the blue bus ?"}]
    messages = as_messages(turns, content)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    theirs = processor(text=text, images=images, return_tensors="pt")
    ids, _ = render(turns, llava.tokenizer, template, llava.config.image_tokens)
    assert theirs["input_ids"][0].tolist() == ids
    ours = torch.stack([transform_image(image, size=28) for image in images])
    assert (ours - theirs["pixel_values"]).abs().max() * max(0.26862954, 0.26130258, 0.27577711) <= 1 / 255
    assert processor.tokenizer.eos_token_id == llava.config.eos_token_id
    assert processor.tokenizer.pad_token_id == llava.config.pad_token_id


def as_messages(turns, content):
    """Turns in the form of chat templates, whose content is a string or a list of parts."""
    messages = []
    for turn in turns:
        role, value = {"human": "user", "gpt": "assistant"}[turn["from"]], turn["value"]
        if content == "list":
            n_images = value.count("<image>\n")
            value = [{"type": "image"}] * n_images + [{"type": "text", "text": value.replace("<image>\n", "")}]
        messages.append({"role": role, "content": value})
    return messages


# A question and an answer, then a question without the request for an answer, which vicuna's layout cannot tell apart.
RENDERED = {
    "vicuna": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
              "detailed, and polite answers to the user's questions. "
              "USER: <image>\nwhat 'is' {it} ? ASSISTANT: a \\ dog<|endoftext|>USER: no ASSISTANT:",
    "chatml": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
              "<|im_start|>user\n<image>\nwhat 'is' {it} ?<|im_end|>\n<|im_start|>assistant\na \\ dog<|im_end|>\n"
              "<|im_start|>user\nno<|im_end|>\n",
}


@pytest.mark.parametrize("content", ["string", "list"])
@pytest.mark.parametrize("template", ["vicuna", "chatml"])
def test_chat_template_to_the_letter(tmp_path, clip_folder, qwen_folder, template, content):
    Llava.from_parts(clip_folder, qwen_folder, template=template).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    turns = [{"from": "human", "value": "<image>\nwhat 'is' {it} ?"}, {"from": "gpt", "value": "a \\ dog"},
             {"from": "human", "value": "no"}]
    messages = as_messages(turns, content)
    assert processor.apply_chat_template(messages) == RENDERED[template]
    generation_prompt = {"vicuna": "", "chatml": "<|im_start|>assistant\n"}[template]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == RENDERED[template] + generation_prompt
    with pytest.raises(Exception, match="roles user and assistant only"):
        processor.apply_chat_template([{"role": "system", "content": "no"}])


def test_a_folder_without_tokenizer_or_template_is_named(world):
    llava = Llava.from_pretrained(world / "dense")
    require_tokenizer(llava, "folder")
    llava.config.template = None
    with pytest.raises(UserError, match='folder: config.json .*template.*"vicuna" or "chatml"'):
        require_tokenizer(llava, "folder")
    llava.tokenizer = None
    with pytest.raises(UserError, match="folder: has no tokenizer.json"):
        require_tokenizer(llava, "folder")


# -----------------------------------------------------------------------------
# Sizes

# The paper's tables: LLM parameters in billions, adaptor in millions; E4T2 in every second layer: total and active, in
# billions.
PUBLISHED = {
    "Qwen/Qwen1.5-0.5B": (0.464, 2.10, 0.775, 0.568), "Qwen/Qwen1.5-1.8B": (1.837, 6.30, 3.054, 2.243),
    "Qwen/Qwen1.5-4B": (3.950, 9.18, None, None), "Qwen/Qwen1.5-7B": (7.721, 20.98, None, None),
    "Qwen/Qwen2-0.5B": (0.494, 1.72, 0.965, 0.651), "Qwen/Qwen2-1.5B": (1.544, 3.94, 3.278, 2.122),
    "Qwen/Qwen2-7B": (7.616, 16.52, None, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_real_widths_have_the_published_parameter_counts(name):
    """Built on the meta device: no memory, real shapes. 0.1 %, or the last digit that the table prints."""
    llm, adaptor, total, active = PUBLISHED[name]

    def build(text):
        with torch.device("meta"):
            return Llava(LlavaConfig(VisionConfig(), text, 151646, 151647, 151643, "vicuna")).count_parameters()

    def agrees(count, printed, unit, digits):
        return abs(count / unit - printed) <= max(0.001 * printed, 0.5 * 10 ** -digits + 1e-9)

    dense = build(DECODERS[name])
    assert agrees(dense["vision"], 0.304, 1e9, 3)
    assert agrees(dense["decoder"], llm, 1e9, 3) and dense["decoder"] == dense["decoder_active"]
    assert agrees(dense["adaptor"], adaptor, 1e6, 2)
    if total is not None:
        layers = list(range(0, DECODERS[name].n_layer, 2))
        sparse = build(dataclasses.replace(DECODERS[name], num_experts=4, top_k=2, sparse_layers=layers))
        assert agrees(sparse["decoder"], total, 1e9, 3) and agrees(sparse["decoder_active"], active, 1e9, 3)


# -----------------------------------------------------------------------------
# Invariants

def test_future_tokens_and_padding_change_nothing(clip_folder, qwen_folder):
    llava = Llava.from_parts(clip_folder, qwen_folder)
    upcycle(llava, 4, 2)
    ids, pixels, lengths = batch_of(llava)
    logits = llava(ids, pixels)
    changed = ids.clone()
    changed[0, 13:15] = torch.tensor([20, 21])                       # the text after row 0's second image
    torch.testing.assert_close(llava(changed, pixels)[0, :13], logits[0, :13], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(llava(changed, pixels)[0, 13:], logits[0, 13:], atol=1e-2)
    longer = torch.cat([ids, ids.new_full((3, 7), llava.config.pad_token_id)], dim=1)
    valid = valid_positions(lengths, ids.shape[1])
    torch.testing.assert_close(llava(longer, pixels)[:, :ids.shape[1]][valid], logits[valid], atol=1e-5, rtol=1e-5)
    alone = llava(ids[1:2, :lengths[1]])                             # the text-only row by itself
    torch.testing.assert_close(alone[0], logits[1, :lengths[1]], atol=1e-5, rtol=1e-5)


def test_gradient_reaches_past_positions_only(clip_folder, qwen_folder):
    llava = Llava.from_parts(clip_folder, qwen_folder)
    x = torch.randn(1, 9, 32, requires_grad=True)
    hidden, _ = llava.decoder(x)
    hidden[0, 4].sum().backward()
    reach = x.grad[0].abs().sum(-1)
    assert (reach[:5] > 0).all() and (reach[5:] == 0).all()


def test_images_go_where_their_tokens_are(clip_folder, qwen_folder):
    """Splice by hand: a loop over positions."""
    llava = Llava.from_parts(clip_folder, qwen_folder)
    ids, pixels, _ = batch_of(llava)
    vectors = llava.adaptor(llava.encode_images(pixels)).reshape(-1, 32)
    expected, used = llava.decoder.embedding(ids).clone(), 0
    for b in range(ids.shape[0]):
        for t in range(ids.shape[1]):
            if ids[b, t] == llava.config.image_token_id:
                expected[b, t] = vectors[used]
                used += 1
    torch.testing.assert_close(llava.embed(ids, llava.encode_images(pixels)), expected, atol=0, rtol=0)
    with pytest.raises(ValueError, match="2 images of 4 positions each, but its rows have room for 2, 0, 1"):
        llava(ids, pixels[:2])


def test_rotary_turns_pairs_by_position_times_frequency():
    cos, sin = rope_angles(torch.tensor([[3]]), head_dim=4, theta=100.0)
    torch.testing.assert_close(cos[0, 0, 0], torch.cos(torch.tensor([3.0, 0.3, 3.0, 0.3])))
    torch.testing.assert_close(sin[0, 0, 0], torch.sin(torch.tensor([3.0, 0.3, 3.0, 0.3])))


def test_generation_with_cache_equals_running_the_whole_text_again(clip_folder, qwen_folder):
    llava = Llava.from_parts(clip_folder, qwen_folder)
    upcycle(llava, 4, 2)
    ids, pixels, lengths = batch_of(llava)
    new = llava.generate(ids, pixels, max_new_tokens=6, eos_token_id=[])
    text = [row[:n].tolist() for row, n in zip(ids, lengths)]
    for t in range(6):
        T = max(map(len, text))
        grown = torch.tensor([row + [llava.config.pad_token_id] * (T - len(row)) for row in text])
        logits = llava(grown, pixels)
        for b, row in enumerate(text):
            token = int(logits[b, len(row) - 1].argmax())
            assert token == new[b, t]
            row.append(token)


def test_generation_stops_each_row_at_its_end_token(clip_folder, qwen_folder):
    llava = Llava.from_parts(clip_folder, qwen_folder)
    ids, pixels, _ = batch_of(llava)
    free = llava.generate(ids, pixels, max_new_tokens=8, eos_token_id=[])
    end = int(free[0, 2])
    new = llava.generate(ids, pixels, max_new_tokens=8, eos_token_id=end)
    for b in range(3):
        row = free[b].tolist()
        stop = row.index(end) + 1 if end in row else 8
        assert new[b, :stop].tolist() == row[:stop][:new.shape[1]]
        assert (new[b, stop:] == llava.config.pad_token_id).all()
    torch.manual_seed(0)
    assert llava.generate(ids, pixels, max_new_tokens=4, temperature=5.0).shape[0] == 3


def test_image_token_takes_the_first_free_id_and_the_matrix_grows_when_full(tmp_path, clip_folder):
    make_qwen(tmp_path, vocab=39, tied=False)                        # the tokenizer has about 36 words
    llava = Llava.from_parts(clip_folder, tmp_path)
    size = len(json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"])
    assert (llava.config.image_token_id, llava.config.pad_token_id) == (size, size + 1)
    make_qwen(tmp_path, vocab=size, tied=False)
    grown = Llava.from_parts(clip_folder, tmp_path)
    assert grown.decoder.embedding.weight.shape[0] == grown.decoder.lm_head.weight.shape[0] == 64
    assert grown.config.decoder.vocab_size == 64


def test_the_adaptor_is_drawn_from_the_seed(clip_folder, qwen_folder):
    weights = [Llava.from_parts(clip_folder, qwen_folder, seed=seed).adaptor.linear_1.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# -----------------------------------------------------------------------------
# Bad checkpoints: one line that names the key and both shapes

def damage(folder, change):
    from safetensors.torch import load_file
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_tensors(tensors, folder)


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        place = config["text_config"] if key in config["text_config"] and key != "model_type" else config
        place[key] = value
    (folder / "config.json").write_text(json.dumps(config))


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


KEY = "language_model.model.layers.1.self_attn.q_proj.weight"
BAD = {
    "missing": (lambda f: damage(f, lambda t: t.pop(KEY)), f"tensor {KEY} is missing"),
    "unknown": (lambda f: damage(f, lambda t: t.update(extra=torch.zeros(1))), "unknown tensor extra"),
    "misshapen": (lambda f: damage(f, lambda t: t.update({KEY: torch.zeros(3, 2)})),
                  "has shape (3, 2), expected (32, 32)"),
    "truncated": (lambda f: truncate(f / "model.safetensors", 2000), "cannot be read"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights here"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file; is "),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json line 1: malformed JSON"),
    "other model": (lambda f: edit_config(f, model_type="llava_next"),
                    'model_type: found "llava_next", expected "llava"'),
    "other act": (lambda f: edit_config(f, hidden_act="gelu"),
                  'hidden_act: found "gelu", expected "silu", the only value'),
    "wrong type": (lambda f: edit_config(f, hidden_size="wide"),
                   'hidden_size: found "wide", expected a number from 1 to'),
    "wrong width": (lambda f: edit_config(f, intermediate_size=50), "has shape (32, 48), expected (32, 50)"),
    "other tokenizer": (lambda f: edit_config(f, image_token_index=7), "not of one checkpoint"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoints_end_in_one_line(tmp_path, clip_folder, qwen_folder, name):
    Llava.from_parts(clip_folder, qwen_folder).save_pretrained(tmp_path)
    spoil, message = BAD[name]
    spoil(tmp_path)
    with pytest.raises(UserError) as caught:
        Llava.from_pretrained(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
