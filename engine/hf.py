"""
Hugging Face checkpoint folders, in and out: names, configs, files. Nothing here computes.

    load_llava(folder)                 a LLaVA folder, ours or transformers'
    assemble_llava(clip, qwen)         a CLIP folder + a Qwen1.5, Qwen2, Qwen2.5 or Qwen3 folder + a fresh adaptor
    save_llava(llava, folder)          what `load_llava` and stock transformers open
    describe_llava, describe_parts     the same models on torch's meta device: everything but the weights

One table of tensor names and one of config keys serve both directions. Reading is strict: an unknown tensor, a missing
one, a wrong shape, or a config of another architecture is a UserError that names it.
"""
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from torch import nn
from torch.overrides import TorchFunctionMode

from configurator import UserError, expected, reading, require_memory, shorten, user_file
from data import CLIP_MEAN, CLIP_STD, TEMPLATES, render
from data import IMAGE as IMAGE_TOKEN
from engine.files import atomic, read_json, read_text, sync, write_json, write_text
from model import Adaptor, DecoderConfig, Llava, LlavaConfig, VisionConfig
from moe import MAX_EXPERTS

PAD_TOKEN = "<pad>"
NOT_A_FOLDER = "is {} a Hugging Face checkpoint folder?"     # what to ask if its config.json is missing
REFETCH = "fetch or write it again"
WEIGHTS = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
WEIGHT_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# -----------------------------------------------------------------------------
# Tensor names. Left, our parameter (numbers are {}); right, the published key inside its tower.

VISION_KEYS = {
    "class_embedding": "embeddings.class_embedding",
    "patch_embedding": "embeddings.patch_embedding",
    "position_embedding": "embeddings.position_embedding",
    "pre_norm": "pre_layrnorm",                                      # sic
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
    "blocks.{}.attn.q_norm": "model.layers.{}.self_attn.q_norm",     # Qwen3
    "blocks.{}.attn.k_norm": "model.layers.{}.self_attn.k_norm",
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

# Published tensors that we do not hold: buffers of old releases, and the text half of a full CLIP checkpoint.
IGNORED = re.compile(r".*\.(position_ids|rotary_emb\.inv_freq)|logit_scale"
                     r"|(text_model|text_projection|visual_projection)\..*")
# qwen2_moe has a shared expert, our model has none. We write one of width 0, with a zero gate, so that transformers
# finds every tensor it expects.
SHARED_EXPERT = re.compile(r".*\.mlp\.(shared_expert\.(gate|up|down)_proj|shared_expert_gate)\.weight")
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def published_key(tower: str, name: str) -> str:
    """Our parameter name inside a tower ("blocks.3.attn.q_proj.weight") -> its key in a LLaVA folder."""
    prefix, table = TOWERS[tower]
    if name in table:                                                # a bare parameter, without .weight or .bias
        return prefix + table[name]
    module, _, kind = NUMBER.sub("{}", name).rpartition(".")
    return prefix + table[module].format(*NUMBER.findall(name)) + "." + kind


def canonical_key(key: str) -> str:
    """Any layout of a LLaVA folder's key -> the published one.

    transformers has moved the towers: `model.language_model.layers`, `vision_tower.encoder`, a top-level lm_head.
    """
    key = re.sub(r"^model\.(?=(vision_tower|multi_modal_projector|language_model)\.)", "", key)
    key = re.sub(r"^lm_head\.weight$", "language_model.lm_head.weight", key)
    key = re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", key)
    return re.sub(r"^language_model\.(?!model\.|lm_head\.)", "language_model.model.", key)


# -----------------------------------------------------------------------------
# Configs. Left, Hugging Face's key; right, our field and what transformers assumes if the key is missing (it leaves out
# what equals its default), or the only value that this code computes.

VISION_CONFIG = {
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 32),
    "hidden_size": ("n_embd", 768),
    "num_hidden_layers": ("n_layer", 12),
    "num_attention_heads": ("n_head", 12),
    "intermediate_size": ("n_ffn", 3072),
    "layer_norm_eps": ("norm_eps", 1e-5),
    "hidden_act": "quick_gelu",
    "num_channels": 3,
}
DECODER_CONFIG = {
    "vocab_size": ("vocab_size", 151936),
    "hidden_size": ("n_embd", None),
    "num_hidden_layers": ("n_layer", None),
    "num_attention_heads": ("n_head", None),
    "num_key_value_heads": ("n_kv_head", None),
    "intermediate_size": ("n_ffn", None),
    "rope_theta": ("rope_theta", 10000.0),
    "rms_norm_eps": ("norm_eps", 1e-6),
    "tie_word_embeddings": ("tied", False),
    "max_position_embeddings": ("max_positions", 32768),
    "hidden_act": "silu",
    "use_sliding_window": False,
}
DECODER_DEFAULTS = {                                                 # of the keys that have None above, by model_type
    "qwen2": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
              "intermediate_size": 22016},
    "qwen2_moe": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16,
                  "intermediate_size": 5632, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
                  "shared_expert_intermediate_size": 5632},
    "qwen3": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
              "intermediate_size": 22016, "head_dim": 128},
    "qwen3_moe": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 4,
                  "intermediate_size": 6144, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
}
SPARSE_CONFIG = {                                                    # of a sparse one, on top of the above
    "num_experts": ("num_experts", None),
    "num_experts_per_tok": ("top_k", None),
    "norm_topk_prob": ("norm_topk", False),
}
LLAVA_CONFIG = {
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
}
RANGES = {"n_layer": (1, 1000), "num_experts": (1, MAX_EXPERTS), "norm_eps": (0, 10**8),
          "image_size": (1, 10**4)}                                  # the others: 1 to 10**8


def read_fields(path: Path, config: dict, table: dict, kind: type | None = None) -> dict:
    """Check a published config against a table -> the values by our names, in the types of the dataclass `kind`."""
    values = {}
    for key, row in table.items():
        if isinstance(row, tuple):
            field, default = row
            field_type = kind.__dataclass_fields__[field].type
            values[field] = read_value(path, config, key, field_type, default, *RANGES.get(field, ()))
        else:
            require(path, key, config.get(key, row), row)
    return values


def write_fields(config: object, table: dict) -> dict:
    """The reverse: our values and the fixed ones by the published keys."""
    return {key: getattr(config, row[0]) if isinstance(row, tuple) else row for key, row in table.items()}


def read_value(path: Path, config: dict, key: str, kind: type, default: object, least: int = 1,
               most: int = 10**8) -> int | float | bool:
    """A number in its range, or a bool."""
    value = default if config.get(key) is None else config[key]
    if kind is bool and type(value) is not bool:
        raise expected(f"{path}: {key}", value, "true or false")
    if kind is not bool and (type(value) not in (int, kind) or not least <= value <= most):
        raise expected(f"{path}: {key}", value, f"a number from {least} to {most:,}")
    return kind(value)


def read_object(path: Path, config: dict, key: str) -> dict:
    """A part of a config that may be missing or null."""
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise expected(f"{path}: {key}", value, "an object")
    return value or {}


def require(path: Path, key: str, found: object, only: object) -> None:
    """The architecture is fixed; a checkpoint of another one must not load silently."""
    if found != only:
        raise expected(f"{path}: {key}", found, f"{shorten(only)}, the only value that this code computes")


def read_vision_config(path: Path, config: dict) -> VisionConfig:
    vision = VisionConfig(**read_fields(path, config, VISION_CONFIG, VisionConfig))
    if vision.image_size % vision.patch_size:
        raise expected(f"{path}: image_size", vision.image_size, f"a multiple of patch_size, {vision.patch_size}")
    if vision.n_embd % vision.n_head:
        raise expected(f"{path}: hidden_size", vision.n_embd, f"a multiple of num_attention_heads, {vision.n_head}")
    check_normalization(path.parent)
    return vision


def check_normalization(folder: Path) -> None:
    """Pixels get CLIP's mean and deviation (data.transform_image): a tower trained with others must not load silently."""
    path, config = folder / "preprocessor_config.json", {}
    if os.path.exists(path):
        config = read_json(path)
    elif os.path.exists(folder / "processor_config.json"):           # where transformers 5 has it
        path = folder / "processor_config.json"
        config = read_object(path, read_json(path), "image_processor")
    for key in ("do_rescale", "do_normalize"):
        require(path, key, config.get(key, True), True)
    for key, ours in (("rescale_factor", [1 / 255]), ("image_mean", list(CLIP_MEAN)), ("image_std", list(CLIP_STD))):
        found = config.get(key, ours)
        numbers = found if isinstance(found, list) else [found]
        if len(numbers) != len(ours) or any(type(x) not in (int, float) or not math.isclose(x, y, rel_tol=1e-3)
                                            for x, y in zip(numbers, ours)):
            raise expected(f"{path}: {key}", found, f"{shorten(ours)}, CLIP's")


def read_decoder_config(path: Path, config: dict) -> DecoderConfig:
    kind = config.get("model_type")
    if kind not in list(DECODER_DEFAULTS):
        raise expected(f"{path}: model_type of the language model", kind, " or ".join(f'"{each}"' for each in DECODER_DEFAULTS))
    is_qwen3 = kind.startswith("qwen3")
    if is_qwen3:
        require(path, "attention_bias", config.get("attention_bias", False), False)
    else:
        require(path, "qkv_bias", config.get("qkv_bias", True), True)
    if "num_local_experts" in config:                                # transformers' other name
        config = {"num_experts": config["num_local_experts"]} | config
    rope = read_object(path, config, "rope_scaling") or read_object(path, config, "rope_parameters")
    require(path, "rope_type", rope.get("rope_type", rope.get("type", "default")), "default")
    config = DECODER_DEFAULTS[kind] | config | {"rope_theta": rope.get("rope_theta", config.get("rope_theta"))}
    if config["num_key_value_heads"] is None:
        config["num_key_value_heads"] = config["num_attention_heads"]

    head_dim = {}
    if is_qwen3 and config.get("head_dim") is not None:
        head_dim = {"head_dim": read_value(path, config, "head_dim", int, None)}
    decoder = DecoderConfig(**read_fields(path, config, DECODER_CONFIG, DecoderConfig), **head_dim, qk_norm=is_qwen3)
    if decoder.n_embd % decoder.n_head and not head_dim:
        raise expected(f"{path}: hidden_size", decoder.n_embd, f"a multiple of num_attention_heads, {decoder.n_head}")
    if decoder.n_head % decoder.n_kv_head:
        raise expected(f"{path}: num_attention_heads", decoder.n_head,
                       f"a multiple of num_key_value_heads, {decoder.n_kv_head}")
    if kind.endswith("_moe"):
        if not is_qwen3:
            require(path, "shared_expert_intermediate_size", config["shared_expert_intermediate_size"], 0)
        require(path, "moe_intermediate_size", config["moe_intermediate_size"], decoder.n_ffn)
        for field, value in read_fields(path, config, SPARSE_CONFIG, DecoderConfig).items():
            setattr(decoder, field, value)
        if decoder.top_k > decoder.num_experts:
            raise expected(f"{path}: num_experts_per_tok", decoder.top_k, f"at most num_experts, {decoder.num_experts}")
        step = read_value(path, config, "decoder_sparse_step", int, default=1, least=0)
        dense = config.get("mlp_only_layers") or []
        if not isinstance(dense, list):
            raise expected(f"{path}: mlp_only_layers", dense, "a list of layer numbers")
        decoder.sparse_layers = [i for i in range(decoder.n_layer) if step and (i + 1) % step == 0 and i not in dense]
        if decoder.num_experts * len(decoder.sparse_layers) > 30 * MAX_EXPERTS:   # more take minutes to set up
            raise expected(f"{path}: num_experts", decoder.num_experts, f"at most {30 * MAX_EXPERTS:,} in all sparse layers "
                           f"together, of which there are {len(decoder.sparse_layers)}")
    return decoder


def read_token_id(places: list[tuple[Path, dict]], key: str, vocab_size: int) -> int | list[int] | None:
    """A token id from the first config that has it; None if none has. There may be several end tokens."""
    path, value = next(((path, config[key]) for path, config in places if config.get(key) is not None), (places[0][0], None))
    ids = value if key == "eos_token_id" and isinstance(value, list) else [value]
    if value is not None and not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise expected(f"{path}: {key}", value, f"an id below vocab_size {vocab_size}")
    return value


def read_llava_config(path: Path) -> LlavaConfig:
    config = read_json(path, hint=NOT_A_FOLDER.format(path.parent))
    if config.get("model_type") != "llava":
        raise expected(f"{path}: model_type", config.get("model_type"), '"llava"; to join a CLIP and a Qwen folder use '
                       "Llava.from_parts (train.py: --vision and --llm)")
    for part in ("vision_config", "text_config"):
        if not isinstance(config.get(part), dict):
            raise expected(f"{path}: {part}", config.get(part), "an object")
    read_fields(path, config, LLAVA_CONFIG)
    clip = "clip_vision_model"
    require(path, "model_type of the vision tower", config["vision_config"].get("model_type", clip), clip)

    vision = read_vision_config(path, config["vision_config"])
    embedding_layer = -vision.n_layer - 1                            # hidden state 0, before the first block
    vision.feature_layer = read_value(path, config, "vision_feature_layer", int, -2, least=embedding_layer, most=-1)
    decoder = read_decoder_config(path, config["text_config"])
    template = config.get("template")
    if template is not None and template not in list(TEMPLATES):
        raise expected(f"{path}: template", template, f"one of {', '.join(TEMPLATES)}")

    generation = path.with_name("generation_config.json")            # which end tokens there are is said here first
    places = [(path, config), (path, config["text_config"])]
    generation_places = [(generation, read_json(generation))] if os.path.exists(generation) else []
    image_key = "image_token_index" if "image_token_index" in config else "image_token_id"
    image_token_id = read_token_id(places, image_key, decoder.vocab_size)
    pad_token_id = read_token_id(places + generation_places, "pad_token_id", decoder.vocab_size)
    eos_token_id = read_token_id(generation_places + places, "eos_token_id", decoder.vocab_size)
    if image_token_id is None:
        raise expected(f"{path}: {image_key}", None, f"an id below vocab_size {decoder.vocab_size}")
    for key, value in [("pad_token_id", [pad_token_id]), ("eos_token_id", eos_token_id)]:
        if value == image_token_id or isinstance(value, list) and image_token_id in value:
            raise expected(f"{path}: {key}", image_token_id, f"another id than {image_key}'s")
    return LlavaConfig(vision, decoder, image_token_id, pad_token_id, eos_token_id, template)


def config_files(llava: Llava, dtype: torch.dtype) -> dict[str, dict]:
    """The JSON files of a LLaVA folder, by name."""
    config, vision, decoder = llava.config, llava.config.vision, llava.config.decoder
    ends = {"pad_token_id": config.pad_token_id, "eos_token_id": config.eos_token_id}
    vision_config = {"model_type": "clip_vision_model", **write_fields(vision, VISION_CONFIG), "projection_dim": 768}
    text_config = {
        "model_type": ("qwen3" if decoder.qk_norm else "qwen2") + ("_moe" if decoder.num_experts else ""),
        **write_fields(decoder, DECODER_CONFIG),
        "rope_parameters": {"rope_type": "default", "rope_theta": decoder.rope_theta},   # as transformers 5 spells it
        "attention_dropout": 0.0, **ends,
    }
    if decoder.qk_norm:
        text_config |= {"head_dim": decoder.head_dim, "attention_bias": False}
    if decoder.num_experts:
        text_config |= {
            **write_fields(decoder, SPARSE_CONFIG),
            "moe_intermediate_size": decoder.n_ffn, "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i in range(decoder.n_layer) if i not in decoder.sparse_layers],
            **({} if decoder.qk_norm else {"shared_expert_intermediate_size": 0}),
        }
    square = {"height": vision.image_size, "width": vision.image_size}
    files = {
        "config.json": {
            "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
            "dtype": str(dtype).removeprefix("torch."), "template": config.template,
            "vision_config": vision_config, "text_config": text_config,
            "image_token_index": config.image_token_id, "image_seq_length": config.image_tokens,
            "vision_feature_layer": vision.feature_layer, **write_fields(config, LLAVA_CONFIG),
            "tie_word_embeddings": decoder.tied, **ends,
        },
        "generation_config.json": {"do_sample": False, **ends},
        "preprocessor_config.json": {
            "image_processor_type": "LlavaImageProcessor", "processor_class": "LlavaProcessor",
            "do_convert_rgb": True, "do_pad": True, "do_resize": True, "size": {"shortest_edge": vision.image_size},
            "resample": 3, "do_center_crop": True, "crop_size": square, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD),
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor", "image_token": IMAGE_TOKEN, "patch_size": vision.patch_size,
            "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default",   # CLS, and its removal
        },
    }
    if llava.tokenizer is not None:
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "LlavaProcessor",
            "eos_token": token_of(llava, config.eos_token_id), "pad_token": token_of(llava, config.pad_token_id),
            "extra_special_tokens": {"image_token": IMAGE_TOKEN}, "padding_side": "right",
            "model_max_length": decoder.max_positions, "clean_up_tokenization_spaces": False,
        }
        if config.template is not None:
            files["tokenizer_config.json"]["chat_template"] = chat_template(config.template)
    return files


def token_of(llava: Llava, token_id: int | list[int] | None) -> str | None:
    """The name of a token, or of the first of several end tokens."""
    token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
    return llava.tokenizer.id_to_token(token_id) if isinstance(token_id, int) else None


# -----------------------------------------------------------------------------
# Tokenizer and chat template

# `chat_template` sets its variables in front of it.
JINJA = """
{%- macro text(content) -%}
  {%- if content is string -%} {{- content -}}
  {%- else -%} {%- for part in content -%} {{- image if part['type'] == 'image' else part['text'] -}} {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{{- start -}}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%} {{- before_question + text(message['content']) + after_question -}}
  {%- elif message['role'] == 'assistant' -%} {{- prompt + before_answer + text(message['content']) + after_answer -}}
  {%- else -%} {{- raise_exception('this chat template has the roles user and assistant only') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%} {{- prompt -}} {%- endif -%}"""


def chat_template(template: str) -> str:
    """A template of data.py in Jinja, for transformers' processors. A test compares the two renderings."""
    layout = TEMPLATES[template]
    before_question, after_question = layout["ask"].split("{}")
    before_answer, after_answer = (layout["answer"] + layout["end"] + layout["after"]).split("{}")
    # In data.py `ask` includes the generation prompt. transformers writes chatml's only before an answer or on request.
    # It is what follows the token that ends every turn. vicuna has no such token and always writes its " ASSISTANT:".
    prompt = ""
    if after_question.startswith(after_answer):
        after_question, prompt = after_answer, after_question.removeprefix(after_answer)
    strings = {"image": IMAGE_TOKEN + "\n", "start": layout["start"], "prompt": prompt,
               "before_question": before_question, "after_question": after_question,
               "before_answer": before_answer, "after_answer": after_answer}
    return "\n".join(f"{{%- set {name} = {json.dumps(string)} -%}}" for name, string in strings.items()) + JINJA


def read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    path = folder / "tokenizer.json"
    text = read_text(path, "a language model's folder needs its tokenizer in this form")
    with reading(path, "not a tokenizer", REFETCH):
        tokenizer = Tokenizer.from_str(text)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    last = max(tokenizer.get_vocab().values(), default=0)
    if last >= vocab_size:
        raise expected(path, last, f"token ids below the vocab_size of config.json, {vocab_size}")
    return tokenizer


def require_tokenizer(llava: Llava, folder: str | Path) -> None:
    """Raise UserError if the folder lacks what turns a conversation into ids, and ids into an answer that ends."""
    if llava.tokenizer is None:
        raise UserError(f"{folder}: has no tokenizer.json; add the one that the model was trained with")
    if llava.config.template is None:
        raise UserError(f"{folder}: config.json does not say which template the model was trained with; add "
                        '"template": "vicuna" or "chatml"')
    config, tokenizer, path = llava.config, llava.tokenizer, Path(folder) / "tokenizer.json"
    end = TEMPLATES[config.template]["end"]
    end_id = tokenizer.token_to_id(end)
    try:
        turns = [{"from": "human", "value": IMAGE_TOKEN}, {"from": "gpt", "value": ""}]
        ids, mask = render(turns, tokenizer, config.template, image_tokens=2)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    answer = [token for token, supervised in zip(ids, mask) if supervised]
    for token, found in ((IMAGE_TOKEN, ids.count(config.image_token_id) == 2), (end, answer[-1:] == [end_id])):
        if not found:
            raise UserError(f'{path}: reads {token} in a text as other tokens; add it to its "added_tokens"')
    special = [token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special]
    for token in (end_id, config.pad_token_id):                      # both follow an answer, and are no part of its text
        name = None if token is None else tokenizer.id_to_token(token)
        if name is not None and token not in special:
            raise UserError(f'{path}: {name} would stay in the text of answers; say "special": true of it in "added_tokens"')
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if end_id not in ends:
        raise UserError(f"{folder}: eos_token_id is {config.eos_token_id}, and answers of template {config.template} end "
                        f"with {end}, id {end_id}; correct one of the two in generation_config.json and config.json")


def require_finite(llava: Llava, folder: str | Path) -> None:
    """Raise UserError for a weight that is infinite in the model's dtype: its answers would be taken for any others."""
    for name, parameter in llava.named_parameters():
        if not bool(parameter.isfinite().all()):
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise UserError(f"{folder}: {name} is not finite in {dtype}; the checkpoint is of a run that diverged, or needs "
                            "another --dtype")


# -----------------------------------------------------------------------------
# Reading

def open_weights(path: Path) -> object:
    """A .safetensors file, opened lazily, or the dict of a .bin file; both have keys()."""
    with user_file(path, hint=REFETCH) as file:
        if path.suffix == ".safetensors":
            return safe_open(path, framework="pt")
        # openai/clip-vit-large-patch14-336 has only this; weights_only refuses pickled code
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not all(isinstance(key, str) and isinstance(tensor, torch.Tensor)
                                                for key, tensor in tensors.items()):
        raise UserError(f"{path}: holds other things than tensors by name; save the model's state_dict() there")
    return tensors


def weight_files(folder: Path) -> dict[str, tuple[Path, object]]:
    """Every tensor of a folder -> its file, path and opened. Of several sets of weights, the one that transformers reads."""
    name = next((name for name in WEIGHTS if os.path.exists(folder / name)), None)
    if name is None:
        raise UserError(f"{folder}: no weights here; expected one of {', '.join(WEIGHTS)}")
    index, names, tensors = {}, [name], {}
    if name.endswith(".json"):
        path = folder / name
        index = read_object(path, read_json(path), "weight_map")
        for key, name in index.items():
            if not isinstance(name, str) or not name or Path(name).name != name:
                raise expected(f"{path}: {key}", name, "the name of a file in the same folder")
        names = list(dict.fromkeys(index.values()))
    for name in names:
        path, file = folder / name, open_weights(folder / name)
        for key in file.keys():
            if key in tensors:
                raise UserError(f"{path}: holds tensor {key}, which {tensors[key][0].name} holds too; remove the older files")
            tensors[key] = path, file
    for key, name in index.items():
        if key not in tensors or tensors[key][0].name != name:
            raise UserError(f"{folder / name}: has no tensor {key}, though the index of its folder says so")
    return tensors


def read_tensors(folder: Path, wanted: dict[str, torch.Size],
                 rename: Callable[[str], str] = canonical_key) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (key, tensor) for every key of `wanted`, if the folder holds exactly those, in those shapes."""
    found = {}                                                       # wanted key -> (path, file, key in the file)
    for key, (path, file) in weight_files(folder).items():
        name = rename(key)
        if name in wanted:
            found[name] = path, file, key
        elif name == "language_model.lm_head.weight" and "language_model.model.embed_tokens.weight" in wanted:
            continue                                                 # a tied head that was stored all the same
        elif not IGNORED.fullmatch(key) and not SHARED_EXPERT.fullmatch(name):
            raise UserError(f"{path}: unknown tensor {key}; the folder's config.json does not describe it")
    missing = [key for key in wanted if key not in found]
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{folder}: tensor {missing[0]} is missing{more}")
    for name, (path, file, key) in found.items():
        with reading(path, hint=REFETCH):
            tensor = file[key] if isinstance(file, dict) else file.get_tensor(key)
        if tensor.dtype not in WEIGHT_DTYPES or tensor.layout != torch.strided:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{path}: tensor {key} is {kind}, {tensor.layout}, expected dense floating-point weights")
        if not tensor.sum(dtype=torch.float32).isfinite():
            raise UserError(f"{path}: tensor {key} holds NaN or infinite numbers; {REFETCH}")
        if tensor.shape != wanted[name]:
            raise UserError(f"{path}: tensor {key} has shape {tuple(tensor.shape)}, expected {tuple(wanted[name])}")
        yield name, tensor


def load_tensors(llava: Llava, towers: list[str], folder: Path, dtype: torch.dtype, device: str | torch.device,
                 rename: Callable[[str], str] = canonical_key) -> None:
    """Fill some towers of a model on the meta device, one tensor at a time."""
    ours, shapes = {}, {}
    for tower in towers:
        for name, parameter in getattr(llava, tower).named_parameters():
            key = published_key(tower, name)
            ours[key], shapes[key] = (tower, name), parameter.shape
    size = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    require_memory(size, f"{folder}: the model that its config.json describes", torch.device(device))
    states = {tower: {} for tower in towers}
    for key, tensor in read_tensors(folder, shapes, rename):
        tower, name = ours[key]
        states[tower][name] = tensor.to(device=device, dtype=stored_dtype(name, dtype)).contiguous()
    for tower in towers:
        getattr(llava, tower).load_state_dict(states[tower], strict=True, assign=True)


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Of a parameter, by our name or the published one, where the others have `dtype`. Routers are stored and kept in fp32 at
    least: rounded to bf16, some tokens would go to other experts than in training."""
    is_router = name.endswith((".router.weight", ".mlp.gate.weight"))
    return torch.promote_types(dtype, torch.float32) if is_router else dtype


class SkipInit(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        drawn = nn.init.normal_, nn.init.kaiming_uniform_, nn.init.uniform_, torch.Tensor.normal_
        return (args or tuple(kwargs.values()))[0] if func in drawn else func(*args, **(kwargs or {}))


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules made here are on the meta device, not initialized: to "draw" numbers there, torch loads its compiler for 4 s."""
    with torch.device("meta"), SkipInit():
        yield


def describe_llava(folder: Path) -> Llava:
    """A LLaVA folder without its weights: the model on the meta device, with its tokenizer."""
    config = read_llava_config(folder / "config.json")
    path, tokenizer = folder / "tokenizer.json", None
    if os.path.exists(path):
        tokenizer = read_tokenizer(folder, config.decoder.vocab_size)
    if tokenizer is not None and tokenizer.token_to_id(IMAGE_TOKEN) != config.image_token_id:
        raise UserError(f"{folder}: tokenizer.json gives {IMAGE_TOKEN} the id {tokenizer.token_to_id(IMAGE_TOKEN)}, "
                        f"config.json {config.image_token_id}; the two files are not of one checkpoint")
    with without_weights():
        return Llava(config, tokenizer)


def load_llava(folder: Path, dtype: torch.dtype, device: str | torch.device) -> Llava:
    llava = describe_llava(folder)
    load_tensors(llava, list(TOWERS), folder, dtype, device)
    return llava


def describe_parts(vision_folder: Path, llm_folder: Path, template: str) -> Llava:
    """A new model without its weights, and before its vocabulary grows."""
    if template not in TEMPLATES:
        raise expected("template", template, f"one of {', '.join(TEMPLATES)}")
    path = vision_folder / "config.json"
    config = read_json(path, hint=NOT_A_FOLDER.format(path.parent))
    kind = config.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise expected(f"{path}: model_type", kind, '"clip" or "clip_vision_model"')
    vision = read_vision_config(path, read_object(path, config, "vision_config") if kind == "clip" else config)
    path = llm_folder / "config.json"
    decoder = read_decoder_config(path, read_json(path, hint=NOT_A_FOLDER.format(llm_folder)))

    tokenizer = read_tokenizer(llm_folder, decoder.vocab_size)
    for token in (IMAGE_TOKEN, PAD_TOKEN):                           # the first free ids: Qwen1.5/2's 151646 and 151647
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    end = TEMPLATES[template]["end"]
    if tokenizer.token_to_id(end) is None:
        raise UserError(f"{llm_folder / 'tokenizer.json'}: has no token {end}, the end of an answer in {template}")
    llava_config = LlavaConfig(vision, decoder, tokenizer.token_to_id(IMAGE_TOKEN), tokenizer.token_to_id(PAD_TOKEN),
                               tokenizer.token_to_id(end), template)
    with without_weights():
        return Llava(llava_config, tokenizer)


def assemble_llava(vision_folder: Path, llm_folder: Path, seed: int, template: str,
                   device: str | torch.device = "cpu") -> Llava:
    llava = describe_parts(vision_folder, llm_folder, template)
    # Some CLIP folders hold the vision tower alone, with or without its prefix, some the text tower as well.
    load_tensors(llava, ["vision"], vision_folder, torch.float32, device,
                 rename=lambda key: TOWERS["vision"][0] + key.removeprefix("vision_model."))
    load_tensors(llava, ["decoder"], llm_folder, torch.float32, device, rename=lambda key: TOWERS["decoder"][0] + key)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        llava.adaptor = Adaptor(llava.config.vision.n_embd, llava.config.decoder.n_embd).to(device)
    grow_vocabulary(llava, max(llava.config.image_token_id, llava.config.pad_token_id) + 1)
    return llava


def grow_vocabulary(llava: Llava, needed: int) -> None:
    """Give embedding and head at least `needed` rows, a multiple of 64. Qwen's matrices have spare rows: no change."""
    config = llava.config.decoder
    if needed <= config.vocab_size:
        return
    config.vocab_size = (needed + 63) // 64 * 64
    for module in [llava.decoder.embedding] + ([] if config.tied else [llava.decoder.lm_head]):
        old = module.weight.data
        new = old.mean(0, keepdim=True).expand(config.vocab_size - len(old), -1)   # neither likely nor unlikely
        module.weight = nn.Parameter(torch.cat([old, new]))
    llava.decoder.embedding.num_embeddings = config.vocab_size


# -----------------------------------------------------------------------------
# Writing

def published_tensors(llava: Llava, weights: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """All tensors of a LLaVA folder by their published keys; `weights` as in `Llava.save_pretrained`."""
    weights = weights or dict(llava.named_parameters())
    tensors = {published_key(*name.split(".", 1)): tensor.detach() for name, tensor in weights.items()}
    D = llava.config.decoder.n_embd
    shared_experts = [] if llava.config.decoder.qk_norm else llava.config.decoder.sparse_layers
    for i in shared_experts:                                         # see SHARED_EXPERT
        mlp = f"language_model.model.layers.{i}.mlp."
        tensors[mlp + "shared_expert.gate_proj.weight"] = torch.zeros(0, D)
        tensors[mlp + "shared_expert.up_proj.weight"] = torch.zeros(0, D)
        tensors[mlp + "shared_expert.down_proj.weight"] = torch.zeros(D, 0)
        tensors[mlp + "shared_expert_gate.weight"] = torch.zeros(1, D)
    return tensors


def save_tensors(tensors: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype | None = None,
                 max_shard_bytes: int = 5 * 10**9) -> None:
    """`model.safetensors`, or shards of at most `max_shard_bytes` with an index."""
    dtypes = {key: stored_dtype(key, dtype or tensor.dtype) for key, tensor in tensors.items()}
    sizes = {key: tensor.numel() * dtypes[key].itemsize for key, tensor in tensors.items()}
    shards, room = [[]], max_shard_bytes
    for key, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(key)
        room -= size
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]

    # Renaming one file is atomic, renaming several is not: a crash in between must not leave shards of two saves that
    # look like one. All shards are written under temporary names first. Then the index is removed, the shards get their
    # names, and the index is written last; without it the folder cannot be opened.
    index = folder / "model.safetensors.index.json"
    with ExitStack() as renames:
        for name, keys in zip(names, shards):
            tmp = renames.enter_context(atomic(folder / name, size=sum(sizes[key] for key in keys)))
            shard = {key: tensors[key].to(device="cpu", dtype=dtypes[key]).contiguous() for key in keys}
            save_file(shard, tmp, metadata={"format": "pt"})
            sync(tmp)                                                # the slow part, before the index is removed
        if len(shards) > 1:
            index.unlink(missing_ok=True)
            (folder / "model.safetensors").unlink(missing_ok=True)
            sync(folder)
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards) for key in keys}
        write_json(index, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    else:
        index.unlink(missing_ok=True)
    for old in folder.glob("model-[0-9]*-of-[0-9]*.safetensors"):    # of an earlier save with another number of shards
        if old.name not in names:
            old.unlink()


def save_llava(llava: Llava, folder: Path, dtype: torch.dtype | None = None,
               weights: dict[str, torch.Tensor] | None = None) -> None:
    save_tensors(published_tensors(llava, weights), folder, dtype)
    if llava.tokenizer is not None:
        write_text(folder / "tokenizer.json", llava.tokenizer.to_str(pretty=True))
        if llava.config.template is not None:
            write_text(folder / "chat_template.jinja", chat_template(llava.config.template))
    for name, content in config_files(llava, dtype or llava.adaptor.linear_1.weight.dtype).items():
        write_json(folder / name, content)


# -----------------------------------------------------------------------------
# Student and teacher

def check_same_tokens(student: Llava, teacher: Llava, student_folder: str, teacher_folder: str) -> None:
    """UserError unless both have the same tokens, template and image positions: otherwise they predict different things."""
    def vocabulary(llava: Llava) -> tuple[dict, set]:
        added = {token.content for token in llava.tokenizer.get_added_tokens_decoder().values()}
        return json.loads(llava.tokenizer.to_str())["model"], added

    where = f"teacher {teacher_folder} and student {student_folder}"
    if teacher.tokenizer is None or vocabulary(teacher)[0] != vocabulary(student)[0] or \
            teacher.tokenizer.get_added_tokens_decoder().keys() != student.tokenizer.get_added_tokens_decoder().keys():
        why = ""
        if teacher.tokenizer is not None and vocabulary(teacher)[0] == vocabulary(student)[0]:
            only = sorted(vocabulary(teacher)[1] ^ vocabulary(student)[1])
            why = (f": only one of them has {', '.join(only[:3])}; Qwen1.5 and Qwen2 share a tokenizer, Qwen2.5 has special tokens "
                   "more and Qwen3 still more, so teacher and student must be of one generation")
        raise UserError(f"{where}: their tokenizers differ{why}; distillation compares token by token and needs the same one")
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
