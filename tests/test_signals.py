"""
Every distillation signal through train.py: the value it logs against slow loops, its place in the sum, and that it
survives ranks, accumulation, kills and the teacher cache. What on-policy steps sample: test_on_policy.py.

    python -m pytest tests/test_signals.py
"""
import json
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import train
from configurator import Config, UserError
from engine import on_policy, resume
from processes import start
from model import Llava
from test_distributed import on_ranks
from test_train import flags, records


@pytest.fixture(scope="module")
def dense(world):
    return Llava.from_pretrained(world / "dense")


@pytest.fixture(scope="module")
def teacher(world):
    return Llava.from_pretrained(world / "teacher").requires_grad_(False)


# -----------------------------------------------------------------------------
# Which positions, worked by hand

def by_hand(llava):
    """Two rows of 10 positions, one image of 4 in the first; positions t, the token there and the mask:

        0 1 2 3 4 5 6 7 8 9                      0 1 2 3 4 5 6 7 8 9
        s I I I I q a e . .   one answer, "a e"   s q a e q q b c e .   two, "a e" and "b c e"
        0 0 0 0 0 0 1 1 0 0                      0 0 1 1 0 0 1 1 1 0
    """
    I, end, pad = llava.config.image_token_id, llava.config.eos_token_id, llava.config.pad_token_id
    ids = torch.tensor([[1, I, I, I, I, 2, 3, end, pad, pad], [1, 2, 3, end, 4, 5, 6, 7, end, pad]])
    mask = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0, 1, 1, 1, 0]]).bool()
    return {"input_ids": ids, "mask": mask, "pixel_values": torch.randn(1, 3, 28, 28)}


RESPONSE = [[5, 6], [1, 2, 5, 6, 7]]
DISTILLED = {                                                        # the positions whose distributions are compared
    ("response", "aligned"): RESPONSE,
    ("response", "late"): [[6, 7], [2, 3, 6, 7, 8]],                 # one later: not the first answer token, but what
                                                                     # comes after the end token
    ("all", "aligned"): [[4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 7]],       # whatever predicts a token of text
    ("all", "late"): [[0, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7, 8]],    # whatever is a token of text
    ("response+image", "aligned"): [[1, 2, 3, 4, 5, 6], [1, 2, 5, 6, 7]],
    ("response+image", "late"): [[1, 2, 3, 4, 6, 7], [2, 3, 6, 7, 8]],
}


def positions(flat, T=10, rows=2):
    """Flat positions by row."""
    return [[i % T for i in flat.tolist() if i // T == row] for row in range(rows)]


@pytest.mark.parametrize("tokens, shift", DISTILLED)
def test_the_distilled_positions_worked_by_hand(dense, tokens, shift):
    config = Config(train.DEFAULTS, stage="d2d", teacher="one", kd_tokens=tokens, kd_shift=shift)
    batch = by_hand(dense)
    at = train.add_positions(batch, dense.config, config)
    assert positions(at["head"][at["is_distilled"]]) == DISTILLED[tokens, shift]
    assert positions(at["head"][at["is_response"]]) == RESPONSE == positions(at["hidden"])   # the cross-entropy is never late
    assert (at["is_distilled"] | at["is_response"]).all()
    assert at["targets"][at["is_response"]].tolist() == batch["input_ids"][batch["mask"]].tolist()
    assert positions(at["image"]) == [[1, 2, 3, 4], []] and positions(at["valid"]) == [list(range(8)), list(range(9))]
    every = train.add_positions(batch, dense.config, Config(config, hidden_tokens="all"))
    assert positions(every["hidden"]) == [list(range(8)), list(range(9))]      # valid, the image included
    total = train.count_batch([at, at], config)
    n = sum(map(len, DISTILLED[tokens, shift]))
    assert total == {"response": 14, "distilled": 2 * n, "hidden": 14, "image_rows": 2, "rows": 4, "pairs": 0,
                     "tokens": 34}


def test_stages_without_distillation_have_the_response_only(dense):
    for stage, teacher in (("sft", ""), ("align", ""), ("d2s", ""), ("pd", "one")):
        config = Config(train.DEFAULTS, stage=stage, teacher=teacher, kd_tokens="all", kd_shift="late")
        batch = by_hand(dense)
        if stage == "pd":
            batch["pixel_values"] = None
            batch["input_ids"][0, 1:5] = 9
        at = train.add_positions(batch, dense.config, config)
        assert positions(at["head"]) == RESPONSE and at["is_distilled"].all() and at["is_response"].all()


def test_an_end_token_that_also_pads_is_distilled(dense):
    """Qwen's own tokenizers pad with the end token of the template vicuna."""
    config = Config(train.DEFAULTS, stage="d2d", teacher="one", kd_tokens="all", hidden_tokens="all")
    batch = by_hand(dense)
    batch["input_ids"][0, 7] = end = 3                               # the last token of the shorter row
    batch["input_ids"][batch["input_ids"] == dense.config.pad_token_id] = end
    at = train.add_positions(batch, replace(dense.config, pad_token_id=end), config)
    assert positions(at["head"][at["is_distilled"]]) == DISTILLED["all", "aligned"]
    assert positions(at["valid"]) == positions(at["hidden"]) == [list(range(8)), list(range(9))]


def test_known_ids_under_both_shifts(dense):
    """A rendered row, the official mask (labels kept where they are) and ours: which tokens are predicted there."""
    tokenizer = dense.tokenizer
    turns = [{"from": "human", "value": "<image>\nwhat do you see"}, {"from": "gpt", "value": "a red cup"}]
    ids, mask = data.render(turns, tokenizer, "vicuna", 4)
    words = [tokenizer.decode([i], skip_special_tokens=False) for i in ids]

    def predicted(shift):
        config = Config(train.DEFAULTS, stage="d2d", teacher="one", kd_shift=shift)
        batch = train.add_positions({"input_ids": torch.tensor([ids]), "mask": torch.tensor([mask]).bool(),
                                     "pixel_values": torch.randn(1, 3, 28, 28)}, dense.config, config)
        [at] = positions(batch["head"][batch["is_distilled"]], len(ids), 1)
        return [words[t + 1] if t + 1 < len(words) else None for t in at]
    assert predicted("aligned") == ["a", "red", "cup", "<|endoftext|>"]
    assert predicted("late") == ["red", "cup", "<|endoftext|>", None]


# -----------------------------------------------------------------------------
# The loss of a batch against slow loops

def slow_parts(student, teacher, batch, tokens, shift, hidden_map):
    """kd, ce, hidden, affinity and relation of `by_hand`'s batch, position by position in fp64."""
    with torch.no_grad():
        hidden = [llava.hidden_states(batch["input_ids"], llava.encode_images(batch["pixel_values"]))[0]
                  for llava in (student, teacher)]
        logits = [llava.decoder.head(h).double() for llava, h in zip((student, teacher), hidden)]
        kd = ce = mse = 0.0
        for row, at in enumerate(DISTILLED[tokens, shift]):
            for t in at:
                log_q, log_p = (x[row, t, :64].log_softmax(-1) for x in logits)
                kd += sum(math.exp(p) * (p - q) for p, q in zip(log_p.tolist(), log_q.tolist()))
        for row, at in enumerate(RESPONSE):
            for t in at:
                ce -= logits[0][row, t].log_softmax(-1)[batch["input_ids"][row, t + 1]].item()
        for row in range(2):
            for t in range((8, 9)[row]):
                mapped = hidden_map(hidden[0][row, t])
                mse += sum((a - b) ** 2 for a, b in zip(mapped.tolist(), hidden[1][row, t].tolist())) / 48
        cosine = lambda h, s, t: torch.dot(h[0, s].double(), h[0, t].double()).item() / (
            h[0, s].double().norm() * h[0, t].double().norm()).item()
        pairs = [(s, t) for s in (1, 2, 3, 4) for t in (5, 6)]       # only the first row has an image
        affinity = sum((cosine(hidden[0], s, t) - cosine(hidden[1], s, t)) ** 2 for s, t in pairs) / 8
        grams = [torch.tensor([cosine(h, s, t) for s in (1, 2, 3, 4) for t in (1, 2, 3, 4)]) for h in hidden]
        relation = 1 - (grams[0] @ grams[1] / grams[0].norm() / grams[1].norm()).item()
    n = sum(map(len, DISTILLED[tokens, shift]))
    return {"kd": kd / n, "ce": ce / 7, "hidden": mse / 17, "affinity": affinity, "relation": relation}


@pytest.mark.parametrize("tokens, shift", DISTILLED)
def test_each_part_against_a_slow_loop(dense, teacher, tokens, shift):
    config = Config(train.DEFAULTS, stage="d2d", teacher="one", kd_tokens=tokens, kd_shift=shift, hidden_tokens="all",
                    hidden_weight=0.5, affinity_weight=2.0, relation_weight=3.0, kd_weight=0.7, ce_weight=0.2)
    batch, objective = train.add_positions(by_hand(dense), dense.config, config), train.Objective(dense, config, 48)
    features = dense.encode_images(batch["pixel_values"])
    reference = train.teacher_reference(teacher, batch, teacher.encode_images(batch["pixel_values"]), config)
    loss, parts = objective(batch, features, reference, train.count_batch([batch], config))
    expected = slow_parts(dense, teacher, batch, tokens, shift, objective.hidden_map)
    assert {name: value.item() for name, value in parts.items()} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    weights = {"kd": 0.7, "ce": 0.2, "hidden": 0.5, "affinity": 2.0, "relation": 3.0}
    assert loss.item() == pytest.approx(sum(weights[name] * expected[name] for name in weights), rel=1e-4)


# -----------------------------------------------------------------------------
# Runs

SUMS = {
    "kd and ce": ("d2d", dict(kd_weight=0.7, ce_weight=0.4)),
    "reverse": ("d2d", dict(kd_loss="reverse", kd_temperature=2.0)),
    "jsd": ("d2s", dict(kd_loss="jsd", jsd_beta=0.3, kd_tokens="all")),
    "mse": ("d2d", dict(kd_loss="mse", kd_tokens="response+image")),
    "standardized": ("d2d", dict(kd_standardize=True, kd_shift="late")),
    "hidden": ("d2d", dict(hidden_weight=0.3, hidden_tokens="all")),
    "affinity": ("d2s", dict(affinity_weight=5.0, kd_weight=0.5)),
    "relation": ("d2s", dict(relation_weight=0.5, kd_weight=0.0)),
    "all": ("d2s", dict(hidden_weight=0.3, affinity_weight=5.0, relation_weight=0.5, ce_weight=0.1)),
}


@pytest.mark.parametrize("case", SUMS)
def test_the_logged_loss_is_the_weighted_sum_of_its_parts(world, tmp_path, case):
    stage, more = SUMS[case]
    train.main(flags(world, stage, tmp_path, max_steps=2, **more))
    weights = {"ce": float(stage == "d2s"), "kd": 1.0, "balance": 0.01 if stage == "d2s" else 0.0}
    weights |= {key.removesuffix("_weight"): value for key, value in more.items() if key.endswith("_weight")}
    for record in records(tmp_path):
        parts = {name: record[name] for name in weights if name in record}
        assert parts.keys() == {name for name, weight in weights.items() if weight} | {"ce"}
        assert record["loss"] == pytest.approx(sum(weights[name] * value for name, value in parts.items()), abs=1e-5)
        assert all(value >= 0 for value in parts.values())


LLAVADI = dict(stage="d2d", ce_weight=1.0, kd_tokens="all", kd_standardize=True, hidden_weight=1.0, hidden_tokens="all")
ROBUST = {                                                           # hidden + logits, affinity + relation, on-policy
    "hidden": LLAVADI,
    "affinity": dict(stage="d2s", affinity_weight=5.0, relation_weight=0.5, kd_loss="jsd"),
    "dense": dict(stage="d2d", ce_weight=0.5, on_policy=0.5, on_policy_tokens=6, hidden_weight=0.5),
    "sparse": dict(stage="d2s", on_policy=0.5, on_policy_tokens=6, kd_loss="reverse"),
}
COMMON = dict(batch_size=8, max_steps=6, save_every=3, grad_clip=0.5)
SECONDS = ("seconds", "tokens_per_s", "generation_s")


def test_batches_without_an_image_have_nothing_to_relate(world, tmp_path):
    rows = [row for row in json.loads((world / "rows.json").read_text()) if "image" not in row]
    (tmp_path / "text.json").write_text(json.dumps(2 * rows))
    train.main(flags(world, "d2d", tmp_path / "out", data=tmp_path / "text.json", max_steps=1, kd_weight=0.0,
                     affinity_weight=5.0, relation_weight=0.5))
    [record] = records(tmp_path / "out")
    assert record["affinity"] == record["relation"] == record["loss"] == record["grad_norm"] == 0


@pytest.mark.parametrize("name", ["hidden", "affinity"])
def test_bfloat16_stays_near_fp32(world, tmp_path, name):
    for dtype in ("float32", "bfloat16"):
        train.main(flags(world, out_dir=tmp_path / dtype, max_steps=1, dtype=dtype, **ROBUST[name]))
    [a], [b] = records(tmp_path / "float32"), records(tmp_path / "bfloat16")
    assert b["loss"] == pytest.approx(a["loss"], rel=0.05)
    for part in ("kd", "hidden", "affinity", "relation"):
        assert (part in a) == (part in b) and b.get(part, 0) == pytest.approx(a.get(part, 0), rel=0.05)


def test_on_policy_in_bfloat16(world, tmp_path):
    train.main(flags(world, "d2s", tmp_path, max_steps=2, dtype="bfloat16", on_policy=1.0, on_policy_tokens=4))
    assert all(math.isfinite(record["loss"]) and record["answer_tokens"] >= 1 for record in records(tmp_path))


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    """Each of ROBUST in one go, accumulated over 4 micro-batches, and on two ranks with 2 micro-batches each."""
    out = tmp_path_factory.mktemp("signals")
    for name, settings in ROBUST.items():
        train.main(flags(world, out_dir=out / f"{name}-one", **COMMON, **settings))
        train.main(flags(world, out_dir=out / f"{name}-cut", **COMMON | dict(micro_batch_size=2), **settings))
    two = [dict(out_dir=out / f"{name}-two", **COMMON | dict(micro_batch_size=2), **settings)
           for name, settings in ROBUST.items()]
    on_ranks(2, world, two + [dict(out_dir=out / "hidden-fsdp", **COMMON | dict(micro_batch_size=2, parallel="fsdp"),
                                   **LLAVADI)])
    return out


def numbers(out_dir):
    return [{key: value for key, value in record.items() if key not in SECONDS} for record in records(out_dir)]


def state_of(out_dir):
    return torch.load(out_dir / "state" / "step_00000006.pt", weights_only=True)


@pytest.mark.parametrize("name, other", [*((name, other) for name in ROBUST for other in ("cut", "two")),
                                         ("hidden", "fsdp")])
def test_accumulation_and_two_ranks_give_the_same_curve(done, name, other):
    """1e-5 in every number of the log, and in the weights, those of the map included."""
    for a, b in zip(numbers(done / f"{name}-one"), numbers(done / f"{name}-{other}"), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(torch.tensor(b[key]), torch.tensor(a[key]), rtol=1e-5, atol=1e-5,
                                       msg=lambda m: f"step {a['step']} {key}: {m}")
    one, others = (state_of(done / f"{name}-{kind}")["weights"] for kind in ("one", other))
    assert one.keys() == others.keys()
    assert max((one[key] - others[key]).abs().max() for key in one) < 1e-5


def killed(world, out_dir, **settings):
    """Run in a fork until the state of step 3 is saved and step 4 logged, then SIGKILL."""
    [rank] = start(1, lambda _: train.main(flags(world, out_dir=out_dir, **settings)))
    deadline = time.monotonic() + 60
    while not ((out_dir / "state" / "step_00000003.pt").is_file() and len(records(out_dir)) >= 4):
        assert rank.exitcode is None and time.monotonic() < deadline, Path(rank.errors.name).read_text()
        time.sleep(0.001)
    os.kill(rank.pid, signal.SIGKILL)
    rank.join()
    assert rank.exitcode == -signal.SIGKILL
    return [resume.step_of(path) for path in resume.saved_states(out_dir)]


@pytest.mark.parametrize("name", ROBUST)
def test_killed_and_resumed_is_bit_for_bit_the_same(world, done, tmp_path, name, monkeypatch):
    """The map and the sampled answers included; another global random state after the restart must not matter."""
    slower = train.train_step                                        # so that the kill comes between step 4 and the end

    def train_step(run, *rest):
        time.sleep(0.2 if rest[-1] > 3 else 0)
        return slower(run, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", train_step)
        assert killed(world, tmp_path / "out", **COMMON, **ROBUST[name]) == [3]
    torch.manual_seed(12345)
    train.main(flags(world, out_dir=tmp_path / "out", **COMMON, **ROBUST[name]))
    whole, resumed = done / f"{name}-one", tmp_path / "out"
    assert numbers(whole) == numbers(resumed)
    a, b = state_of(whole), state_of(resumed)
    assert a["weights"].keys() == b["weights"].keys()
    for key in a["weights"]:
        assert torch.equal(a["weights"][key], b["weights"][key]), key
        assert all(torch.equal(a["adam"][key][what], b["adam"][key][what]) for what in a["adam"][key]), key
    first, second = load_file(whole / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


MAP = {"hidden_map.0.weight": (48, 32), "hidden_map.0.bias": (48,),
       "hidden_map.2.weight": (48, 48), "hidden_map.2.bias": (48,)}


@pytest.mark.parametrize("kind", ["one", "two", "fsdp"])
def test_the_map_is_trained_clipped_and_saved(world, dense, done, kind):
    state = state_of(done / f"hidden-{kind}")
    assert {name: tuple(w.shape) for name, w in state["weights"].items() if not name.startswith("student.")} == MAP
    fresh = train.Objective(dense, Config(train.DEFAULTS, hidden_weight=1.0), 48)
    for name, parameter in fresh.named_parameters():
        if name in MAP:                                              # drawn from the seed, and moved since
            assert 1e-3 < (state["weights"][name] - parameter).abs().max() < 6 * 1e-2
            assert state["adam"][name]["exp_avg"].abs().max() > 0 and state["adam"][name]["step"] == 6


def test_the_map_counts_in_the_gradient_norm_and_is_clipped(world, dense, teacher, tmp_path):
    """Adam's first average is (1 - beta1) x the clipped gradient, over student and map together."""
    train.main(flags(world, out_dir=tmp_path, **COMMON | dict(max_steps=1), **LLAVADI))
    state = torch.load(tmp_path / "state" / "step_00000001.pt", weights_only=True)
    clipped = {name: adam["exp_avg"] / (1 - 0.9) for name, adam in state["adam"].items()}
    norm = torch.stack([gradient.norm() for gradient in clipped.values()]).norm().item()
    assert MAP.keys() <= clipped.keys()
    assert records(tmp_path)[0]["grad_norm"] > 0.5 and norm == pytest.approx(0.5, rel=1e-4)
    without = torch.stack([gradient.norm() for name, gradient in clipped.items() if name not in MAP]).norm().item()
    assert without < 0.5 - 1e-4


def test_the_exported_folder_is_the_student_s_alone(world, done):
    from transformers import LlavaForConditionalGeneration
    for name in ROBUST:
        source = "sparse" if ROBUST[name]["stage"] == "d2s" else "dense"
        assert load_file(done / f"{name}-one" / "model.safetensors").keys() == \
               load_file(world / source / "model.safetensors").keys()
    for kind in ("one", "two", "fsdp"):
        folder = done / f"hidden-{kind}"
        _, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert Llava.from_pretrained(folder).config == Llava.from_pretrained(world / "dense").config


def test_on_policy_runs_have_both_kinds_of_steps(done):
    for name in ("dense", "sparse"):
        kinds = [record["on_policy"] for record in records(done / f"{name}-one")]
        assert {0, 1} == set(kinds[:3]) == set(kinds[3:])            # before and after the kill
        assert kinds == [int(on_policy.is_on_policy(Config(on_policy=0.5, seed=0), step)) for step in range(1, 7)]


# -----------------------------------------------------------------------------
# From the teacher cache, at k = V

CACHED = {
    "reverse": dict(kd_loss="reverse"),
    "jsd": dict(kd_loss="jsd", jsd_beta=0.3),
    "mse": dict(kd_loss="mse"),
    "temperature": dict(kd_temperature=2.0),
    "standardized": dict(kd_standardize=True),
    "reverse, softened twice": dict(kd_loss="reverse", kd_temperature=0.5, kd_standardize=True),
    "jsd on all tokens": dict(kd_loss="jsd", kd_tokens="all", kd_temperature=3.0),
    "mse on the image": dict(kd_loss="mse", kd_tokens="response+image"),
    "late": dict(kd_shift="late"),
    "reverse, late on all": dict(kd_loss="reverse", kd_shift="late", kd_tokens="all"),
    "late on the image": dict(kd_shift="late", kd_tokens="response+image", stage="d2s"),
}


@pytest.mark.parametrize("case", CACHED)
def test_the_cache_at_all_of_the_vocabulary_equals_the_online_run(world, tmp_path, case):
    settings = dict(stage="d2d", max_steps=2, ce_weight=0.3) | CACHED[case]
    train.main(flags(world, out_dir=tmp_path / "online", **settings))
    train.main(flags(world, out_dir=tmp_path / "cached", micro_batch_size=4, teacher_cache=tmp_path / "cache",
                     teacher_top_k=1000, **settings))
    for a, b in zip(numbers(tmp_path / "online"), numbers(tmp_path / "cached"), strict=True):
        assert a["kd"] > 0
        for key in a:
            torch.testing.assert_close(torch.tensor(b[key]), torch.tensor(a[key]), rtol=1e-5, atol=1e-5,
                                       msg=lambda m: f"step {a['step']} {key}: {m}")


@pytest.mark.parametrize("key, value, before", [
    ("kd_temperature", 2.0, "1.0"), ("kd_standardize", True, "False"), ("kd_shift", "late", "'aligned'"),
    ("kd_tokens", "response+image", "'response'")])
def test_a_cache_of_other_positions_or_softening_is_refused(world, tmp_path, key, value, before):
    cache = dict(stage="d2d", max_steps=1, teacher_cache=tmp_path / "cache")
    train.main(flags(world, out_dir=tmp_path / "a", **cache))
    with pytest.raises(UserError) as caught:
        train.main(flags(world, out_dir=tmp_path / "b", **cache | {key: value}))
    assert f"was made with {key}={before}, this run has {key}={value!r}" in str(caught.value)


# -----------------------------------------------------------------------------
# LLaVADI's recipe

@pytest.mark.parametrize("name, d2d", [("llavadi.py", "d2d.py"), ("tiny/llavadi.py", "tiny/d2d.py")])
def test_the_config_is_d2d_with_its_signals(name, d2d):
    folder = Path(train.__file__).parent / "config"
    config, plain = train.configure([str(folder / name)]), train.configure([str(folder / d2d)])
    assert {key: config[key] for key in LLAVADI} == LLAVADI and config.kd_loss == "forward" and config.kd_weight == 1.0
    signals = [*LLAVADI, "out_dir"]
    if name == "llavadi.py":
        assert (config.batch_size, config.learning_rate, config.warmup_ratio) == (128, 2e-5, 0.03)
        assert config.weight_decay == 0.0
        assert (config.epochs, config.max_steps, config.max_length, config.checkpointing) == (1, 0, 2048, True)
        signals += ["data", "max_steps", "beta2", "eps", "checkpointing"]
    assert {key: value for key, value in config.items() if key not in signals} == \
           {key: value for key, value in plain.items() if key not in signals}


# -----------------------------------------------------------------------------
# Bad input

SIGNALS = dict(hidden_weight=1.0, affinity_weight=1.0, relation_weight=1.0, on_policy=0.5)
WEIGHTS = ["ce_weight", "kd_weight", "hidden_weight", "affinity_weight", "relation_weight", "on_policy_temperature"]
BAD = [({key: value}, f"{key} is {value}, expected a non-negative number") for key in WEIGHTS for value in (-0.1, math.nan)]
BAD += [(dict(on_policy=p), f"on_policy is {p}, expected a number from 0 to 1") for p in (-0.1, 1.5, math.nan)]
BAD += [(dict(jsd_beta=b), f"jsd_beta is {b}, expected a number between 0 and 1") for b in (0.0, 1.0)]
BAD += [(dict(kd_temperature=t), f"kd_temperature is {t}, expected a positive number") for t in (0.0, -1.0)]
BAD += [(dict(on_policy_tokens=0), "on_policy_tokens is 0, expected a positive number"),
        (dict(kd_loss="kl"), "kd_loss is 'kl', expected one of forward, reverse, jsd, mse"),
        (dict(kd_tokens="image"), "kd_tokens is 'image', expected one of response, all, response+image"),
        (dict(kd_shift="early"), "kd_shift is 'early', expected one of aligned, late"),
        (dict(hidden_tokens="image"), "hidden_tokens is 'image', expected one of response, all"),
        (dict(kd_loss="mse", kd_temperature=2.0), "kd_loss=mse standardizes"),
        (dict(kd_loss="mse", kd_standardize=True), "kd_loss=mse standardizes"),
        (dict(on_policy=0.5, parallel="fsdp"), "on_policy samples from the whole student"),
        (dict(on_policy=0.5, kd_weight=0.0, ce_weight=1.0), "on_policy=0.5 samples answers to compare with the teacher's")]
for key, value in SIGNALS.items():
    elsewhere = f"{key}={value}: belongs to the stages d2d and d2s, this is"
    BAD += [({key: value, "stage": stage, "teacher": ""}, f"{elsewhere} {stage}") for stage in ("align", "sft")]
    BAD += [({key: value, "stage": "pd"}, f"{elsewhere} pd"),
            ({key: value, "teacher": ""}, "stage d2d needs a teacher"),
            ({key: value, "teacher": "", "stage": "d2s", "kd_weight": 0.0}, "stage d2s needs a teacher"),
            ({key: value, "teacher_cache": "cache"}, f"{key}={value} needs the teacher in memory")]


@pytest.mark.parametrize("change, message", BAD, ids=lambda v: json.dumps(v) if isinstance(v, dict) else "")
def test_bad_settings_end_in_one_line(world, tmp_path, change, message):
    with pytest.raises(UserError) as caught:
        train.main(flags(world, **(dict(stage="d2d", out_dir=tmp_path / "out") | change)))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
