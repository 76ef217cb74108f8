"""
Hugging Face checkpoint folders, in and out: names, configs, files. Nothing here computes.

    load_llava(folder)                 a LLaVA folder, ours or transformers'
    assemble_llava(clip, qwen)         a CLIP folder + a Qwen1.5/Qwen2 folder + a fresh adaptor
    save_llava(llava, folder)          what `load_llava` and stock transformers open
    describe_llava, describe_parts     the same models on torch's meta device: everything but the weights

Every tensor of a folder is accounted for: an unknown key, a missing one or a wrong shape ends as a UserError that names it.
"""
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from torch import nn

from configurator import UserError, shorten
from engine.files import read_json, write_text
from model import Adaptor, DecoderConfig, Llava, LlavaConfig, VisionConfig

# -----------------------------------------------------------------------------
# Names. Left, our parameter (numbers are {}); right, the published key inside its tower.

VISION_KEYS = {
    "class_embedding": "embeddings.class_embedding",
    "patch_embedding": "embeddings.patch_embedding",
    "position_embedding": "embeddings.position_embedding",
    "pre_norm": "pre_layrnorm",                                      # sic, in every CLIP checkpoint
    "blocks.{}.norm1": "encoder.layers.{}.layer_norm1",
    "blocks.{}.attn.q_proj": "encoder.layers.{}.self_attn.q_proj",
    "blocks.{}.attn.k_proj": "encoder.layers.{}.self_attn.k_proj",
    "blocks.{}.attn.v_proj": "encoder.layers.{}.self_attn.v_proj",
    "blocks.{}.attn.out_proj": "encoder.layers.{}.self_attn.out_proj",
    "blocks.{}.norm2": "encoder.layers.{}.layer_norm2",
    "blocks.{}.fc1": "encoder.layers.{}.mlp.fc1",
    "blocks.{}.fc2": "encoder.layers.{}.mlp.fc2",
    "post_norm": "post_layernorm",
}
ADAPTOR_KEYS = {"linear_1": "linear_1", "linear_2": "linear_2"}
DECODER_KEYS = {
    "embedding": "model.embed_tokens",
    "blocks.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blocks.{}.attn.q_proj": "model.layers.{}.self_attn.q_proj",
    "blocks.{}.attn.k_proj": "model.layers.{}.self_attn.k_proj",
    "blocks.{}.attn.v_proj": "model.layers.{}.self_attn.v_proj",
    "blocks.{}.attn.o_proj": "model.layers.{}.self_attn.o_proj",
    "blocks.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.ffn.gate_proj": "model.layers.{}.mlp.gate_proj",
    "blocks.{}.ffn.up_proj": "model.layers.{}.mlp.up_proj",
    "blocks.{}.ffn.down_proj": "model.layers.{}.mlp.down_proj",
    "blocks.{}.ffn.router": "model.layers.{}.mlp.gate",
    "blocks.{}.ffn.experts.{}.gate_proj": "model.layers.{}.mlp.experts.{}.gate_proj",
    "blocks.{}.ffn.experts.{}.up_proj": "model.layers.{}.mlp.experts.{}.up_proj",
    "blocks.{}.ffn.experts.{}.down_proj": "model.layers.{}.mlp.experts.{}.down_proj",
    "norm": "model.norm",
    "lm_head": "lm_head",
}
TOWERS = {   # our module -> (its prefix in a LLaVA folder, its table)
    "vision": ("vision_tower.vision_model.", VISION_KEYS),
    "adaptor": ("multi_modal_projector.", ADAPTOR_KEYS),
    "decoder": ("language_model.", DECODER_KEYS),
}

# Published keys that we do not hold, on purpose: buffers of old releases, and the text half of a full CLIP checkpoint.
IGNORED = re.compile(r".*\.(position_ids|rotary_emb\.inv_freq)|logit_scale"
                     r"|(text_model|text_projection|visual_projection)\..*")
# qwen2_moe has a shared expert, which we do not: width 0 and a gate that multiplies nothing, written so that transformers
# finds every tensor it expects.
SHARED_EXPERT = re.compile(r".*\.mlp\.(shared_expert\.(gate|up|down)_proj|shared_expert_gate)\.weight")


def published_key(tower: str, name: str) -> str:
    """Our parameter name inside a tower ("blocks.3.attn.q_proj.weight") -> its key in a LLaVA folder."""
    prefix, table = TOWERS[tower]
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
    module, dot, kind = re.sub(r"(?<=\.)\d+(?=\.)", "{}", name).rpartition(".")
    if name in table:                                                # a bare parameter, without .weight or .bias
        return prefix + table[name]
    return prefix + table[module].format(*numbers) + dot + kind


def canonical_key(key: str) -> str:
    """Any layout of a LLaVA folder's key -> the published one.

    transformers has moved the towers around (`model.language_model.layers`, `vision_tower.encoder`, a top-level lm_head).
    """
    key = key.removeprefix("model.") if key.startswith(("model.vision_tower.", "model.multi_modal_projector.",
                                                        "model.language_model.")) else key
    if key == "lm_head.weight":
        return "language_model.lm_head.weight"
    if key.startswith("vision_tower.") and not key.startswith("vision_tower.vision_model."):
        return key.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if key.startswith("language_model.") and not key.startswith(("language_model.model.", "language_model.lm_head.")):
        return key.replace("language_model.", "language_model.model.", 1)
    return key


# -----------------------------------------------------------------------------
# Reading

def expect(path: Path, config: dict, key: str, only: object, default: object = None) -> None:
    """The architecture is fixed here; a checkpoint that asks for another one must not load quietly."""
    found = config.get(key, only if default is None else default)
    if found != only:
        raise UserError(f"{path}: {key} is {shorten(found)}, but this code computes {only!r} only")


def take(path: Path, config: dict, key: str, kind: type, default: object = None, least: int = 1,
         most: int = 10**8) -> object:
    """A number or a bool from a config, checked."""
    value = config.get(key)
    value = default if value is None else value
    if kind is bool:
        good, expected = isinstance(value, bool), "true or false"
    else:
        good = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
        good, expected = good and least <= value <= most, f"a number from {least} to {most:,}"
    if not good:
        raise UserError(f"{path}: {key} is {shorten(value)}, expected {expected}")
    return kind(value)


def take_object(path: Path, config: dict, key: str) -> dict:
    """A part of a config that may be absent."""
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path}: {key} is {shorten(value)}, expected an object")
    return value or {}


def read_vision_config(path: Path, config: dict) -> VisionConfig:
    expect(path, config, "hidden_act", "quick_gelu")
    expect(path, config, "num_channels", 3)
    default = VisionConfig()
    vision = VisionConfig(
        # the defaults here are Hugging Face's own, for files that omit a key
        image_size=take(path, config, "image_size", int, 224),
        patch_size=take(path, config, "patch_size", int, 32),
        n_embd=take(path, config, "hidden_size", int, 768),
        n_layer=take(path, config, "num_hidden_layers", int, 12, most=1000),
        n_head=take(path, config, "num_attention_heads", int, 12),
        n_ffn=take(path, config, "intermediate_size", int, 3072),
        norm_eps=take(path, config, "layer_norm_eps", float, default.norm_eps, least=0),
    )
    if vision.image_size % vision.patch_size:
        raise UserError(f"{path}: image_size {vision.image_size} is not a multiple of patch_size "
                              f"{vision.patch_size}")
    if vision.n_embd % vision.n_head:
        raise UserError(f"{path}: hidden_size {vision.n_embd} is not a multiple of num_attention_heads "
                              f"{vision.n_head}")
    return vision


def read_decoder_config(path: Path, config: dict) -> DecoderConfig:
    kind = config.get("model_type")
    if kind not in ("qwen2", "qwen2_moe"):
        raise UserError(f"{path}: the language model is of type {kind!r}; this code reads qwen2 and qwen2_moe")
    expect(path, config, "hidden_act", "silu")
    expect(path, config, "use_sliding_window", False)
    expect(path, config, "qkv_bias", True)
    rope = take_object(path, config, "rope_parameters") or take_object(path, config, "rope_scaling")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise UserError(f"{path}: rope_type is {rope_type!r}, but this code computes 'default' only")
    n_head = take(path, config, "num_attention_heads", int)
    text = DecoderConfig(
        vocab_size=take(path, config, "vocab_size", int),
        n_embd=take(path, config, "hidden_size", int),
        n_layer=take(path, config, "num_hidden_layers", int, most=1000),
        n_head=n_head,
        n_kv_head=take(path, config, "num_key_value_heads", int, n_head),
        n_ffn=take(path, config, "intermediate_size", int),
        rope_theta=take(path, {**config, **rope}, "rope_theta", float, 10000.0),
        norm_eps=take(path, config, "rms_norm_eps", float, 1e-6, least=0),
        tied=take(path, config, "tie_word_embeddings", bool, False),
        max_positions=take(path, config, "max_position_embeddings", int, 32768),
    )
    if text.n_embd % text.n_head or text.n_head % text.n_kv_head:
        raise UserError(f"{path}: hidden_size {text.n_embd}, {text.n_head} heads and {text.n_kv_head} kv heads do not "
                              "divide one another")
    if kind == "qwen2_moe":
        expect(path, config, "shared_expert_intermediate_size", 0, default=5632)
        expect(path, config, "moe_intermediate_size", text.n_ffn, default=1408)
        text.num_experts = take(path, config, "num_experts", int, 60, most=1000)
        text.top_k = take(path, config, "num_experts_per_tok", int, 4)
        text.norm_topk = take(path, config, "norm_topk_prob", bool, False)
        step, dense = take(path, config, "decoder_sparse_step", int, 1, least=0), config.get("mlp_only_layers") or []
        if not isinstance(dense, list):
            raise UserError(f"{path}: mlp_only_layers is {shorten(dense)}, expected a list of layer numbers")
        text.sparse_layers = [i for i in range(text.n_layer) if step and (i + 1) % step == 0 and i not in dense]
        if not 1 <= text.top_k <= text.num_experts:
            raise UserError(f"{path}: num_experts_per_tok {text.top_k} must lie between 1 and num_experts "
                                  f"{text.num_experts}")
    return text


def weight_files(folder: Path) -> dict[str, Path]:
    """Every tensor of a folder -> the file that holds it. A single file or shards with an index; .safetensors or .bin."""
    for index_name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index_name).is_file():
            index = read_json(folder / index_name).get("weight_map")
            if not isinstance(index, dict):
                raise UserError(f"{folder / index_name}: has no weight_map")
            for key, name in index.items():
                if not isinstance(name, str) or not name or Path(name).name != name:
                    raise UserError(f"{folder / index_name}: {key} is in {shorten(name)}, expected a file beside the index")
            return {key: folder / name for key, name in index.items()}
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return {key: folder / name for key in TensorFile(folder / name).keys()}
    raise UserError(f"{folder}: no weights here; expected model.safetensors, model.safetensors.index.json or "
                          "pytorch_model.bin")


class TensorFile:
    """One weight file, opened lazily where its format allows."""

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: no such file, though the index of its folder names it")
        try:
            if path.suffix == ".safetensors":
                self.file = safe_open(path, framework="pt")
            else:   # openai/clip-vit-large-patch14-336 has only this; weights_only refuses pickled code
                self.file = torch.load(path, map_location="cpu", weights_only=True)
        except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError, AttributeError) as error:
            raise self.damaged(error) from None
        except Exception as error:   # pickle raises its own
            if "pickle" not in type(error).__name__.lower():
                raise
            raise self.damaged(error) from None

    def damaged(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:200]
        return UserError(f"{self.path}: cannot be read ({reason}); fetch or write it again")

    def keys(self) -> list[str]:
        return list(self.file.keys())

    def get(self, key: str) -> torch.Tensor:
        if key not in self.keys():
            raise UserError(f"{self.path}: has no tensor {key}, though the index of its folder says so")
        return self.file.get_tensor(key) if self.path.suffix == ".safetensors" else self.file[key]


def read_tensors(folder: Path, wanted: dict[str, torch.Size],
                 rename=canonical_key) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (key, tensor) for every key of `wanted`, having checked that the folder holds exactly those, in those shapes.

    Every tensor is accounted for: an unknown key, a missing one or a wrong shape is a UserError.
    """
    where = {}                                                       # wanted key -> (file, key in the file)
    for key, path in weight_files(folder).items():
        name = rename(key)
        if name in wanted:
            where[name] = (path, key)
        elif not IGNORED.fullmatch(key) and not SHARED_EXPERT.fullmatch(name):
            # a tied head is sometimes stored all the same; it is the embedding once more
            if not (name == "language_model.lm_head.weight" and "language_model.model.embed_tokens.weight" in wanted):
                raise UserError(f"{path}: unknown tensor {key}; the config.json beside it does not describe it")
    missing = [key for key in wanted if key not in where]
    if missing:
        raise UserError(f"{folder}: tensor {missing[0]} is missing"
                              + (f", and {len(missing) - 1} more" if len(missing) > 1 else ""))
    open_files = {}
    for name, (path, key) in where.items():
        if path not in open_files:
            open_files[path] = TensorFile(path)
        tensor = open_files[path].get(key)
        if tensor.shape != wanted[name]:
            raise UserError(f"{path}: tensor {key} has shape {tuple(tensor.shape)}, "
                                  f"expected {tuple(wanted[name])}")
        yield name, tensor


def load_tensors(llava: Llava, towers: list[str], folder: Path, dtype: torch.dtype, device: str | torch.device,
                 rename=canonical_key) -> None:
    """Fill some towers of a model that lies on the meta device, one tensor at a time."""
    place, shapes = {}, {}
    for tower in towers:
        for name, parameter in getattr(llava, tower).named_parameters():
            key = published_key(tower, name)
            place[key], shapes[key] = (tower, name), parameter.shape
    states = {tower: {} for tower in towers}
    for key, tensor in read_tensors(folder, shapes, rename):
        tower, name = place[key]
        states[tower][name] = tensor.to(device=device, dtype=dtype).contiguous()
    for tower in towers:
        getattr(llava, tower).load_state_dict(states[tower], strict=True, assign=True)


def read_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; a language model's folder needs its tokenizer in this form")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:   # the tokenizers library raises bare Exception
        raise UserError(f"{path}: not a tokenizer ({' '.join(str(error).split())[:200]})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def describe_llava(folder: Path) -> Llava:
    """All of a LLaVA folder but its weights: the model on the meta device, with its tokenizer."""
    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type") != "llava":
        raise UserError(f"{path}: model_type is {config.get('model_type')!r}, expected 'llava'; to join a CLIP and a "
                              "Qwen folder use Llava.from_parts (train.py: --vision and --llm)")
    for part in ("vision_config", "text_config"):
        if not isinstance(config.get(part), dict):
            raise UserError(f"{path}: {part} is {config.get(part)!r}, expected an object")
    expect(path, config, "vision_feature_select_strategy", "default")
    expect(path, config, "projector_hidden_act", "gelu")
    expect(path, config, "multimodal_projector_bias", True)
    if config["vision_config"].get("model_type", "clip_vision_model") != "clip_vision_model":
        raise UserError(f"{path}: the vision tower is of type {config['vision_config']['model_type']!r}; this code "
                              "reads clip_vision_model")
    vision = read_vision_config(path, config["vision_config"])
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int) or not -vision.n_layer - 1 <= layer <= -1:
        raise UserError(f"{path}: vision_feature_layer is {layer!r}, expected a negative number down to "
                              f"-{vision.n_layer + 1}")
    vision.feature_layer = layer
    text = read_decoder_config(path, config["text_config"])
    image_token_id = config.get("image_token_index", config.get("image_token_id"))
    if not isinstance(image_token_id, int) or not 0 <= image_token_id < text.vocab_size:
        raise UserError(f"{path}: image_token_index is {image_token_id!r}, expected an id below vocab_size "
                              f"{text.vocab_size}")

    def special(name: str) -> object:
        value = config[name] if config.get(name) is not None else config["text_config"].get(name)
        ids = value if isinstance(value, list) and name == "eos_token_id" else [] if value is None else [value]
        if not all(type(token) is int and 0 <= token < text.vocab_size for token in ids):
            raise UserError(f"{path}: {name} is {shorten(value)}, expected an id below vocab_size {text.vocab_size}")
        return value

    template = config.get("template")
    if template is not None and template not in list(TEMPLATE_FILES):
        raise UserError(f"{path}: template is {shorten(template)}, expected one of {', '.join(TEMPLATE_FILES)}")
    llava_config = LlavaConfig(vision, text, image_token_id, special("pad_token_id"), special("eos_token_id"), template)
    tokenizer = read_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
    if tokenizer is not None and tokenizer.token_to_id(IMAGE_TOKEN) != image_token_id:
        raise UserError(f"{folder}: tokenizer.json gives {IMAGE_TOKEN} the id {tokenizer.token_to_id(IMAGE_TOKEN)}, "
                              f"config.json {image_token_id}; the two files are not of one checkpoint")
    with torch.device("meta"):
        return Llava(llava_config, tokenizer)


def load_llava(folder: Path, dtype: torch.dtype, device: str | torch.device) -> Llava:
    llava = describe_llava(folder)
    load_tensors(llava, list(TOWERS), folder, dtype, device)
    return llava


def describe_parts(vision_folder: Path, llm_folder: Path, template: str) -> Llava:
    """The same of a new model, before its vocabulary grows."""
    if template not in TEMPLATE_FILES:
        raise UserError(f"template is {template!r}, expected one of {', '.join(TEMPLATE_FILES)}")
    path = vision_folder / "config.json"
    config = read_json(path)
    kind = config.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise UserError(f"{path}: model_type is {kind!r}, expected 'clip' or 'clip_vision_model'")
    vision = read_vision_config(path, config if kind == "clip_vision_model" else take_object(path, config, "vision_config"))
    text = read_decoder_config(llm_folder / "config.json", read_json(llm_folder / "config.json"))

    tokenizer = read_tokenizer(llm_folder)
    for token in (IMAGE_TOKEN, PAD_TOKEN):   # the first free ids; for Qwen1.5/2 151646 and 151647
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    end_token = TEMPLATE_FILES[template]["end"]
    eos_token_id = tokenizer.token_to_id(end_token)
    if eos_token_id is None:
        raise UserError(f"{llm_folder / 'tokenizer.json'}: has no token {end_token}, with which template "
                              f"{template!r} ends an answer")
    llava_config = LlavaConfig(vision, text, tokenizer.token_to_id(IMAGE_TOKEN), tokenizer.token_to_id(PAD_TOKEN),
                               eos_token_id, template)
    with torch.device("meta"):
        return Llava(llava_config, tokenizer)


def assemble_llava(vision_folder: Path, llm_folder: Path, seed: int, template: str) -> Llava:
    llava = describe_parts(vision_folder, llm_folder, template)
    # Some CLIP folders hold the vision tower alone, with or without its prefix, some the text tower as well.
    load_tensors(llava, ["vision"], vision_folder, torch.float32, "cpu",
                 rename=lambda key: TOWERS["vision"][0] + key.removeprefix("vision_model."))
    load_tensors(llava, ["decoder"], llm_folder, torch.float32, "cpu", rename=lambda key: TOWERS["decoder"][0] + key)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        llava.adaptor = Adaptor(llava.config.vision.n_embd, llava.config.decoder.n_embd)
    grow_vocabulary(llava, max(llava.config.image_token_id, llava.config.pad_token_id) + 1)
    return llava


def grow_vocabulary(llava: Llava, needed: int) -> None:
    """Give embedding and head at least `needed` rows, a multiple of 64. Qwen's matrices have spare rows: no change."""
    text = llava.config.decoder
    if needed <= text.vocab_size:
        return
    text.vocab_size = (needed + 63) // 64 * 64
    for module in [llava.decoder.embedding] + ([] if text.tied else [llava.decoder.lm_head]):
        old = module.weight.data
        new = old.mean(0, keepdim=True).expand(text.vocab_size - len(old), -1)   # neither likely nor unlikely
        module.weight = nn.Parameter(torch.cat([old, new]))
    llava.decoder.embedding.num_embeddings = text.vocab_size


# -----------------------------------------------------------------------------
# Writing

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
# as in data.py, which transforms with them; a test compares the two
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

# Each template's end-of-answer token, and the template once more in the language that transformers' processors speak.
# data.py renders conversations for training and evaluation; a test holds the two against each other.
PARTS = ("{%- macro text(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}"
         "{%- if part['type'] == 'image' -%}{{ '<image>\n' }}{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}"
         "{%- endif -%}{%- endmacro -%}")
TEMPLATE_FILES = {
    "vicuna": {
        "end": "<|endoftext|>",
        "jinja": PARTS
        + "{{ \"A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. \" }}"
        "{%- for message in messages -%}{%- if message['role'] == 'user' -%}{{ 'USER: ' + text(message['content']) + ' ASSISTANT:' }}"
        "{%- else -%}{{ ' ' + text(message['content']) + '<|endoftext|>' }}{%- endif -%}{%- endfor -%}",
    },
    "chatml": {
        "end": "<|im_end|>",
        "jinja": PARTS + "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
        "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' + text(message['content']) + '<|im_end|>\n' }}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}",
    },
}


def config_files(llava: Llava, dtype: torch.dtype) -> dict[str, dict]:
    """The JSON files of a LLaVA folder, by name."""
    config, vision, text = llava.config, llava.config.vision, llava.config.decoder
    ends = {"pad_token_id": config.pad_token_id, "eos_token_id": config.eos_token_id}
    text_config = {
        "model_type": "qwen2_moe" if text.num_experts else "qwen2",
        "vocab_size": text.vocab_size, "hidden_size": text.n_embd, "num_hidden_layers": text.n_layer,
        "num_attention_heads": text.n_head, "num_key_value_heads": text.n_kv_head, "intermediate_size": text.n_ffn,
        "hidden_act": "silu", "rms_norm_eps": text.norm_eps, "rope_theta": text.rope_theta,
        # the same once more, as transformers 5 spells it
        "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta},
        "max_position_embeddings": text.max_positions, "use_sliding_window": False, "attention_dropout": 0.0,
        "tie_word_embeddings": text.tied, **ends,
    }
    if text.num_experts:
        text_config |= {
            "num_experts": text.num_experts, "num_experts_per_tok": text.top_k, "norm_topk_prob": text.norm_topk,
            "moe_intermediate_size": text.n_ffn, "shared_expert_intermediate_size": 0, "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i in range(text.n_layer) if i not in text.sparse_layers],
        }
    vision_config = {
        "model_type": "clip_vision_model", "image_size": vision.image_size, "patch_size": vision.patch_size,
        "hidden_size": vision.n_embd, "num_hidden_layers": vision.n_layer, "num_attention_heads": vision.n_head,
        "intermediate_size": vision.n_ffn, "hidden_act": "quick_gelu", "layer_norm_eps": vision.norm_eps,
        "num_channels": 3, "projection_dim": 768,
    }
    square = {"height": vision.image_size, "width": vision.image_size}
    files = {
        "config.json": {
            "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
            "dtype": str(dtype).removeprefix("torch."), "template": config.template,
            "vision_config": vision_config, "text_config": text_config,
            "image_token_index": config.image_token_id, "image_seq_length": config.image_tokens,
            "vision_feature_layer": vision.feature_layer, "vision_feature_select_strategy": "default",
            "projector_hidden_act": "gelu", "multimodal_projector_bias": True, "tie_word_embeddings": text.tied, **ends,
        },
        "generation_config.json": {"do_sample": False, **ends},
        "preprocessor_config.json": {
            "image_processor_type": "LlavaImageProcessor", "processor_class": "LlavaProcessor",
            "do_convert_rgb": True, "do_pad": True, "do_resize": True, "size": {"shortest_edge": vision.image_size},
            "resample": 3, "do_center_crop": True, "crop_size": square, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor", "image_token": IMAGE_TOKEN, "patch_size": vision.patch_size,
            "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default",   # + CLS, and it is dropped
        },
    }
    if llava.tokenizer is not None:
        token = lambda i: None if i is None or not isinstance(i, int) else llava.tokenizer.id_to_token(i)
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "LlavaProcessor",
            "eos_token": token(config.eos_token_id), "pad_token": token(config.pad_token_id),
            "extra_special_tokens": {"image_token": IMAGE_TOKEN}, "padding_side": "right",
            "model_max_length": text.max_positions, "clean_up_tokenization_spaces": False,
        }
        if config.template is not None:
            files["tokenizer_config.json"]["chat_template"] = TEMPLATE_FILES[config.template]["jinja"]
    return files


def published_tensors(llava: Llava, weights: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    weights = weights or dict(llava.named_parameters())
    tensors = {published_key(*name.split(".", 1)): tensor.detach() for name, tensor in weights.items()}
    D = llava.config.decoder.n_embd
    for i in llava.config.decoder.sparse_layers:                        # see SHARED_EXPERT
        mlp = f"language_model.model.layers.{i}.mlp."
        empty = {"shared_expert.gate_proj": (0, D), "shared_expert.up_proj": (0, D), "shared_expert.down_proj": (D, 0),
                 "shared_expert_gate": (1, D)}
        tensors |= {f"{mlp}{name}.weight": torch.zeros(shape) for name, shape in empty.items()}
    return tensors


def save_tensors(tensors: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype | None = None,
                 max_shard_bytes: int = 5 * 10**9) -> None:
    """`model.safetensors`, or shards of at most `max_shard_bytes` with an index."""
    shards, room = [[]], max_shard_bytes
    for key, tensor in tensors.items():
        size = tensor.numel() * (dtype or tensor.dtype).itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(key)
        room -= size
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, keys in zip(names, shards):
        part = {key: tensors[key].to(device="cpu", dtype=dtype or tensors[key].dtype).contiguous() for key in keys}
        save_file(part, folder / (name + ".tmp"), metadata={"format": "pt"})
    # One file is swapped for another at a stroke, several are not: a kill in between must not leave shards of two saves
    # that look like one. So the index goes first and comes back last; without it the folder cannot be opened.
    index = folder / "model.safetensors.index.json"
    if len(shards) > 1:
        for first in (index, folder / "model.safetensors"):
            first.unlink(missing_ok=True)
    for name in names:
        os.replace(folder / (name + ".tmp"), folder / name)
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards) for key in keys}
        total = sum(t.numel() * (dtype or t.dtype).itemsize for t in tensors.values())
        write_text(index, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))
    else:
        index.unlink(missing_ok=True)
    for old in folder.glob("model*.safetensors"):                    # of an earlier save with another number of shards
        if old.name not in names:
            old.unlink()


def save_llava(llava: Llava, folder: Path, dtype: torch.dtype | None = None,
               weights: dict[str, torch.Tensor] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(published_tensors(llava, weights), folder, dtype)
    if llava.tokenizer is not None:
        write_text(folder / "tokenizer.json", llava.tokenizer.to_str(pretty=True))
        if llava.config.template is not None:
            write_text(folder / "chat_template.jinja", TEMPLATE_FILES[llava.config.template]["jinja"])
    for name, content in config_files(llava, dtype or llava.adaptor.linear_1.weight.dtype).items():
        write_text(folder / name, json.dumps(content, indent=2))


# -----------------------------------------------------------------------------
# What training asks of a checkpoint, and of two

def require_text(llava: Llava, folder: str | Path) -> None:
    """UserError unless the checkpoint can render a conversation: it needs a tokenizer and a template."""
    if llava.tokenizer is None:
        raise UserError(f"{folder}: has no tokenizer.json; copy the one that the model was trained with into the folder")
    if llava.config.template is None:
        raise UserError(f"{folder}: config.json does not say which template the model was trained with; add "
                        '"template": "vicuna" or "chatml"')


def check_same_tokens(student: Llava, teacher: Llava, student_folder: str, teacher_folder: str) -> None:
    """UserError unless both have the same tokens, template and image positions: otherwise they predict different things."""
    def vocabulary(llava: Llava) -> dict:
        return json.loads(llava.tokenizer.to_str())["model"] | {"added": llava.tokenizer.get_added_tokens_decoder().keys()}

    where = f"teacher {teacher_folder} and student {student_folder}"
    if teacher.tokenizer is None or vocabulary(teacher) != vocabulary(student):
        raise UserError(f"{where}: their tokenizers differ; distillation compares token by token and needs the same one")
    for what in ("template", "image_token_id", "image_tokens"):
        if getattr(teacher.config, what) != getattr(student.config, what):
            raise UserError(f"{where}: {what} is {getattr(teacher.config, what)!r} and {getattr(student.config, what)!r}; "
                            "they must agree")
    if teacher.config.vision.image_size != student.config.vision.image_size:
        raise UserError(f"{where}: image sizes are {teacher.config.vision.image_size} and "
                        f"{student.config.vision.image_size} pixels; they must agree")


def same_vision(a: Llava, b: Llava) -> bool:
    """True if both towers compute the same features, so that one pass serves both."""
    if a.config.vision != b.config.vision:
        return False
    theirs = dict(b.vision.named_parameters())
    return all(torch.equal(p, theirs[name]) for name, p in a.vision.named_parameters())
