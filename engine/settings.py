"""
Which values a setting of train.py may have, which settings exclude or need each other, and which have no effect where they
stand. All of it is checked before anything is loaded; the settings themselves, with their defaults, are in train.py.
"""
import os
from pathlib import Path

import torch

from configurator import (BELOW_ONE, FRACTION, GREEDY_OR_TEMPERATURE, NON_NEGATIVE, POSITIVE, TEMPERATURE, Config, UserError,
                          check_uses, check_values)
from data import TEMPLATES
from engine.hf import read_llava_config
from losses import PREFERENCE_LOSSES, TOKEN_LOSSES
from moe import sparse_layers

STAGES = ["align", "sft", "d2d", "d2s", "pd"]
WITH_TEACHER = ["d2d", "d2s", "pd"]
FEATURE_WEIGHTS = ["hidden_weight", "affinity_weight", "relation_weight"]     # need the teacher's hidden states

ALLOWED = {
    "stage": STAGES, "template": ["", *TEMPLATES], "kd_tokens": ["response", "all", "response+image"],
    "kd_loss": list(TOKEN_LOSSES), "kd_shift": ["aligned", "late"], "hidden_tokens": ["response", "all"],
    "preference_loss": list(PREFERENCE_LOSSES), "dtype": ["bfloat16", "float32"], "device": ["", "cpu", "cuda"],
    "parallel": ["ddp", "fsdp"],
    **dict.fromkeys(["batch_size", "micro_batch_size", "epochs", "learning_rate", "save_every", "log_every",
                     "eps", "num_experts", "top_k", "teacher_top_k", "on_policy_tokens", "beta"], POSITIVE),
    **dict.fromkeys(["weight_decay", "grad_clip", "max_steps", "val_rows", "val_every", "balance_coef", "seed", "ce_weight", "kd_weight",
                     *FEATURE_WEIGHTS], NON_NEGATIVE),
    "kd_temperature": TEMPERATURE, "on_policy_temperature": GREEDY_OR_TEMPERATURE,
    "warmup_ratio": FRACTION, "on_policy": FRACTION, "beta1": BELOW_ONE, "beta2": BELOW_ONE,
    "jsd_beta": ("a number between 0 and 1", lambda x: 0 < x < 1),
    "num_workers": ("a number from 0 to 1000", lambda x: 0 <= x <= 1000),
    "max_length": ("a number from 1 to a million", lambda x: 1 <= x <= 10**6),
}
# Settings that may change when an interrupted run is resumed.
MAY_CHANGE = ["out_dir", "device", "micro_batch_size", "num_workers", "parallel", "deterministic", "compile", "checkpointing",
              "save_every", "log_every", "val_every", "dry_run"]
# What a run is made from: the places may change, the content must stay the same (`fingerprints`).
INPUTS = ["student", "teacher", "vision", "llm", "data"]
# Settings that may differ from machine to machine.
MACHINE_LOCAL = [*INPUTS, "image_dir", "teacher_cache", "device", "num_workers"]


def may_change(config: Config) -> list[str]:
    """MAY_CHANGE, without what this run's loss depends on: kto_pair takes a mean over the pairs of a micro-batch."""
    return [key for key in MAY_CHANGE if key != "micro_batch_size" or config.preference_loss != "kto_pair"]


def check_settings(config: Config) -> None:
    """Whatever can be known to be wrong before anything is loaded."""
    check_values(config, ALLOWED)
    for key in ("out_dir", "data"):
        if not config[key]:
            raise UserError(f"{key} is empty: say --{key}=… or set it in the config file")
    if bool(config.student) == bool(config.vision or config.llm) or bool(config.vision) != bool(config.llm):
        raise UserError("give either student=…, a checkpoint to start from, or both vision=… and llm=… for a new model")
    signals = [key for key in ("kd_weight", *FEATURE_WEIGHTS, "on_policy") if config[key]]
    alone = config.stage == "d2s" and not signals                    # Table 6's baseline, made sparse without distillation
    if config.stage in WITH_TEACHER and not config.teacher and not alone:
        raise UserError(f"stage {config.stage} needs a teacher: say --teacher=…, a LLaVA folder")
    if config.stage not in WITH_TEACHER and config.teacher:
        raise UserError(f"stage {config.stage} uses no teacher: leave teacher empty, or choose one of "
                        f"{', '.join(WITH_TEACHER)}")
    if config.teacher_cache and not config.teacher:
        raise UserError("teacher_cache keeps the outputs of a teacher: say --teacher=…, the one they come from")
    for key in [*FEATURE_WEIGHTS, "on_policy"]:
        if config[key] and config.teacher_cache:
            raise UserError(f"{key}={config[key]} needs the teacher in memory, and teacher_cache holds its distributions of the "
                            "data's answers only: leave one of the two out")
    if config.on_policy and not any(config[key] for key in ("kd_weight", *FEATURE_WEIGHTS)):
        raise UserError(f"on_policy={config.on_policy} samples answers to compare with the teacher's: set kd_weight or one "
                        f"of {', '.join(FEATURE_WEIGHTS)}")
    distills = config.stage in ("d2d", "d2s")
    if distills and config.teacher and not signals:
        raise UserError(f"teacher={config.teacher}: would be ignored, since kd_weight, {', '.join(FEATURE_WEIGHTS)} are all "
                        "0; set one of them, or leave the teacher out (d2d without one is stage sft)")
    if config.stage != "pd" and not config.ce_weight and not (distills and signals):
        raise UserError("ce_weight is 0, and so is every other weight of a loss: nothing would be trained; set one of them")
    if config.teacher_cache:
        run, cache = Path(os.path.realpath(config.out_dir)), Path(os.path.realpath(config.teacher_cache))
        if run.is_relative_to(cache) or cache.is_relative_to(run):
            raise UserError(f"teacher_cache={config.teacher_cache} and out_dir={config.out_dir} are one folder, or one lies "
                            "in the other; choose two that are apart")
    if config.on_policy and config.parallel == "fsdp":
        raise UserError("on_policy samples from the whole student, and parallel=fsdp keeps a shard of it per rank: say "
                        "--parallel=ddp")
    if config.on_policy and config.deterministic:
        raise UserError("deterministic and on_policy: torch has no deterministic cumulative sum on a GPU, which sampling needs; "
                        "leave one of the two out")
    if config.kd_loss == "mse" and (config.kd_temperature != 1 or config.kd_standardize):
        raise UserError("kd_loss=mse standardizes the logits by itself: leave kd_temperature and kd_standardize at their defaults")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch finds no GPU here; say --device=cpu")


def check_no_effect(config: Config, defaults: dict, given: dict) -> None:
    """No setting is ignored without a word: what was given and would change nothing is an error."""
    if config.max_steps and "epochs" in given:
        raise UserError(f"epochs={config.epochs} and max_steps={config.max_steps} both say how long to train: leave one of "
                        "them out, or say --max_steps=0")
    stage, path, experts = config.stage, Path(config.student) / "config.json", None
    if config.student and path.is_file():
        decoder = read_llava_config(path).decoder
        experts = decoder if decoder.num_experts else None
    distills = stage in ("d2d", "d2s") and config.teacher
    kd, signals = distills and config.kd_weight, ["kd_weight", *FEATURE_WEIGHTS, "on_policy"]
    check_uses(config, defaults, [
        (["template"], not config.student, "a new model (vision and llm): a checkpoint has its own"),
        (["num_experts", "top_k", "moe_layers", "norm_topk"], stage == "d2s" or experts, "stage d2s, which makes a student sparse"),
        (["balance_coef"], stage in ("d2s", "pd") or experts, "a sparse student"),
        (["train_dense_ffn"], stage in ("d2s", "pd"), f"the stages d2s and pd, this is {stage}"),
        (["ce_weight"], stage != "pd", "the other stages, this is pd"),
        (["ce_weight"], config.on_policy < 1, "steps on the data's answers, and with on_policy=1 there are none"),
        (signals, stage in ("d2d", "d2s"), f"the stages d2d and d2s, this is {stage}"),
        (["kd_loss", "kd_tokens", "kd_temperature", "kd_standardize", "kd_shift"], kd, "d2d and d2s with a teacher and a kd_weight"),
        (["jsd_beta"], kd and config.kd_loss == "jsd", "kd_loss=jsd"),
        (["val_every"], config.val_rows, "a val_rows above 0"),
        (["hidden_tokens"], config.hidden_weight, "a hidden_weight above 0"),
        (["on_policy_tokens", "on_policy_temperature"], config.on_policy, "an on_policy above 0"),
        (["preference_loss", "beta"], stage == "pd", f"stage pd, this is {stage}"),
        (["teacher_top_k"], config.teacher_cache and kd, "a teacher_cache in d2d or d2s"),
    ])
    if experts:
        own = {"num_experts": experts.num_experts, "top_k": experts.top_k, "norm_topk": experts.norm_topk,
               "moe_layers": experts.sparse_layers}
        for key, value in own.items():
            wanted = sparse_layers(layer_numbers(config), experts.n_layer) if key == "moe_layers" else config[key]
            if key in given and wanted != value:
                raise UserError(f"{key}={config[key]}: the student {config.student} is sparse already, with {value}; leave "
                                f"{key} out, or start from a dense student")


def layer_numbers(config: Config) -> str | list[int]:
    """moe_layers as `upcycle` takes it."""
    layers = config.moe_layers
    if not (layers[:1].isdigit() or layers[:1] == "-"):
        return layers
    try:
        return [int(number) for number in layers.split(",")]
    except ValueError:
        raise UserError(f"moe_layers is {layers!r}, expected layer numbers separated by commas") from None
