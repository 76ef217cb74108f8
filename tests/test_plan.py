"""
tools/plan.py's formulas against what really happens: every product that torch's counter sees, every byte that a step of
train.py holds on to. Models are small, yet wide enough that what a formula leaves out does not dominate.

    python -m pytest tests/test_plan.py
"""
import shutil
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from engine import chunked, distributed
from engine.settings import WITH_TEACHER
from tools import plan
import train
from configurator import Config, UserError, load_config
from model import DecoderConfig, Llava, LlavaConfig, VisionConfig
from moe import upcycle
from processes import ended, start

STAGES = ["align", "sft", "d2d", "d2s", "pd"]
VISION = VisionConfig(image_size=112, n_embd=128, n_layer=3, n_head=4, n_ffn=512)      # 64 patches
TEXT = dict(vocab_size=2048, n_embd=256, n_layer=3, n_head=4, n_kv_head=4, n_ffn=704)


def make(stage, items=2, tokens=300, response=60, text={}, **settings):
    """A run's config, student, teacher, one micro-batch as `collate` gives it, and the same as tools/plan.py sees it."""
    torch.manual_seed(0)
    config = Config(train.DEFAULTS, stage=stage, teacher="one" if stage in WITH_TEACHER else "", **settings)
    text, dtype = TEXT | text, getattr(torch, config.dtype)
    special = dict(image_token_id=text["vocab_size"] - 2, pad_token_id=text["vocab_size"] - 1, eos_token_id=None,
                   template=None)
    student, teacher = Llava(LlavaConfig(VISION, DecoderConfig(**text), **special)), None
    if stage in ("d2s", "pd"):
        upcycle(student, config.num_experts, config.top_k)
    student.decoder.checkpointing = config.checkpointing
    train.choose_trainable(student, config, dtype)
    if config.teacher:
        wider = DecoderConfig(**text | dict(n_embd=384, n_layer=2, n_ffn=1024))
        teacher = Llava(LlavaConfig(VISION, wider, **special)).to(dtype).requires_grad_(False)
        teacher.vision = student.vision
    rows = items * (2 if stage == "pd" else 1)
    ids = torch.randint(0, text["vocab_size"] - 2, (rows, tokens))
    ids[:, 4:4 + VISION.patches] = special["image_token_id"]
    mask = torch.zeros(rows, tokens, dtype=torch.bool)
    mask[:, -response:] = True
    batch = {"input_ids": ids, "mask": mask, "pixel_values": torch.randn(items, 3, 112, 112)}
    batch = train.add_positions(batch, student.config, config)
    return config, student, teacher, batch, plan.Batch.of(config, items, tokens, response)


def run_pass(config, objective, student, teacher, batch, between=lambda what: None):
    """What train.py does with a micro-batch; `between` is called after each part of it."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.dtype == "bfloat16"):
        features = train.image_features(student, batch, config.stage)
        between("ViT")
        reference = train.teacher_reference(teacher, batch, features, config) if teacher is not None else None
        between("teacher")
        total = {"response": 9, "distilled": 9, "hidden": 9, "image_rows": 2, "rows": 2, "pairs": 1}
        loss, _ = objective(batch, features, reference, total)
        between("forward")
    loss.backward()
    between("backward")


# -----------------------------------------------------------------------------
# Parameters, and where the models come from

def test_published_names_give_the_published_sizes():
    """method.md's table, in billions: the decoder dense, with 4 experts in every second layer, and active of it."""
    expected = {"Qwen/Qwen1.5-0.5B": (0.464, 0.775, 0.568), "Qwen/Qwen1.5-1.8B": (1.837, 3.054, 2.243),
                "Qwen/Qwen2-0.5B": (0.494, 0.965, 0.651), "Qwen/Qwen2-1.5B": (1.544, 3.278, 2.122)}
    for name, sizes in expected.items():
        dense, teacher = plan.build(Config(train.DEFAULTS, stage="d2d", student=name, teacher="Qwen/Qwen1.5-7B"))
        sparse, _ = plan.build(Config(train.DEFAULTS, stage="pd", student=name))
        counts = sparse.count_parameters()
        found = (dense.count_parameters()["decoder"], counts["decoder"], counts["decoder_active"])
        assert tuple(round(size / 1e9, 3) for size in found) == sizes
    assert round(teacher.count_parameters()["decoder"] / 1e9, 3) == 7.721 and teacher.vision is dense.vision


@pytest.mark.parametrize("stage, folder", [("align", "dense"), ("d2d", "dense"), ("d2s", "dense"), ("pd", "sparse")])
def test_a_folder_gives_what_train_would_open(world, stage, folder):
    config = Config(train.DEFAULTS, stage=stage, student=str(world / folder), teacher=str(world / "teacher"))
    planned, teacher = plan.build(config)
    opened = train.open_student(config)
    train.choose_trainable(opened, config, torch.bfloat16)

    def facts(llava):
        return {name: (p.shape, p.dtype, p.requires_grad) for name, p in llava.named_parameters()}
    assert facts(planned) == facts(opened)
    real = Llava.from_pretrained(world / "teacher", dtype=torch.bfloat16).requires_grad_(False)
    assert facts(teacher) == facts(real)


def test_parts_of_a_new_model(clip_folder, qwen_folder):
    folders, _ = plan.build(Config(train.DEFAULTS, stage="align", vision=str(clip_folder), llm=str(qwen_folder)))
    opened = Llava.from_parts(clip_folder, qwen_folder)
    assert [p.shape for p in folders.parameters()] == [p.shape for p in opened.parameters()]
    names, _ = plan.build(Config(train.DEFAULTS, stage="align", vision=plan.TOWER, llm="Qwen/Qwen2-0.5B"))
    assert names.config.vision == VisionConfig() and names.config.decoder == plan.DECODERS["Qwen/Qwen2-0.5B"]


def test_folders_that_are_not_there_yet_may_bear_a_published_name(tmp_path):
    new = Config(train.DEFAULTS, stage="align", vision=f"weights/{plan.TOWER}", llm=f"{tmp_path}/Qwen/Qwen1.5-0.5B")
    assert plan.build(new)[0].config.decoder == plan.DECODERS["Qwen/Qwen1.5-0.5B"]


@pytest.mark.parametrize("keys", [dict(student="Qwen/Qwen3"), dict(vision=plan.TOWER, llm="Qwen/Qwen3"),
                                  dict(vision="clip", llm="Qwen/Qwen2-0.5B")])
def test_a_name_that_is_neither_folder_nor_published(keys):
    with pytest.raises(UserError, match="Qwen3: is neither a .* folder .* nor, for a dry run, one of Qwen/"
                                              "|clip: is not openai/clip"):
        plan.report(Config(train.DEFAULTS, stage="align", **keys), 1)


def test_a_dense_folder_has_no_experts_to_train(world):
    with pytest.raises(UserError, match="dense: is dense, and stage pd trains experts"):
        plan.build(Config(train.DEFAULTS, stage="pd", student=str(world / "dense"), teacher=str(world / "teacher")))


# -----------------------------------------------------------------------------
# Arithmetic

def one_product(query, key, causal):
    batch, heads, t, d = query
    return 2 * batch * heads * t * key[2] * d * (0.5 if causal else 1)


def attention(query, key, value, dropout=0.0, causal=False, **_):
    return 2 * one_product(query, key, causal)


def attention_backward(grad, query, key, value, out, logsumexp, dropout, causal, **_):
    return 5 * one_product(query, key, causal)


def add_product(total, a, b, **_):
    return 2 * a[0] * a[1] * b[1]


# torch's counter knows the attention kernels of GPUs only, and counts them as if nothing was masked; we count the half
# that causality leaves. Nor does it know the product added in place, with which chunked_loss sums up the head's gradient.
KERNELS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
           torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
           torch.ops.aten.addmm_: add_product}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_flops_are_those_that_torch_counts(stage, checkpointing):
    """To a thousandth: no rest is left but the routers' and the adaptor's roundings of tokens to experts."""
    text = dict(tied=stage == "pd", n_kv_head=2)
    config, student, teacher, batch, shape = make(stage, tokens=160, text=text, checkpointing=checkpointing)
    counted = {}
    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        run_pass(config, train.Objective(student, config), student, teacher, batch,
                 lambda what: counted.update({what: counter.get_total_flops()}))
    ViT, asking, forward, backward = (after - before for before, after in zip([0, *counted.values()], counted.values()))
    expected = plan.flops(student, teacher, config, shape)
    head, theirs = expected["student backward"]["head"], 0
    if stage in ("d2d", "d2s"):
        theirs = expected["teacher forward"]["head"]
    # chunked_loss asks for the teacher's logits, and takes the gradients of the student's, while the student runs forward.
    assert ViT == pytest.approx(expected["ViT"].total(), rel=1e-3)
    assert asking == pytest.approx(expected["teacher forward"].total() - theirs, rel=1e-3)
    assert forward == pytest.approx(expected["student forward"].total() + head + theirs, rel=1e-3)
    assert backward == pytest.approx(expected["student backward"].total() - head
                                     + expected["student's blocks again"].total(), rel=1e-3)


def test_flops_of_the_map_and_without_the_teachers_head():
    config, student, teacher, batch, shape = make("d2d", tokens=160, hidden_weight=1.0, kd_weight=0.0)
    counted = {}
    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        run_pass(config, train.Objective(student, config, 384), student, teacher, batch,
                 lambda what: counted.update({what: counter.get_total_flops()}))
    expected = plan.flops(student, teacher, config, shape)
    assert counted["teacher"] - counted["ViT"] == pytest.approx(expected["teacher forward"].total(), rel=1e-3)
    assert counted["backward"] == pytest.approx(sum(parts.total() for parts in expected.values()), rel=1e-3)


@pytest.mark.parametrize("stage", ["d2d", "d2s"])
def test_flops_of_generation(stage):
    """The prompt, then token by token from the cache; half of the steps of on_policy=0.5."""
    config, student, teacher, batch, shape = make(stage, tokens=160, on_policy=0.5, on_policy_tokens=12)
    prompts = batch["input_ids"][:, :100]                            # rows of 160 with answers of 60
    with (torch.autocast("cpu", dtype=torch.bfloat16),
          FlopCounterMode(display=False, custom_mapping=KERNELS) as counter):
        student.generate(prompts, batch["pixel_values"], 12, eos_token_id=[])
    assert shape.prompt == 100
    expected = plan.flops(student, teacher, config, shape)["generation"].total()
    assert 0.5 * counter.get_total_flops() == pytest.approx(expected, rel=2e-3)
    assert not plan.flops(student, teacher, Config(config, on_policy=0.0), shape)["generation"]


def test_a_sampled_answer_may_follow_the_longest_prompt():
    config = Config(train.DEFAULTS, stage="d2d", teacher="t", max_length=512, on_policy_tokens=64)
    assert plan.longest_rows(config).tokens == 512
    assert plan.longest_rows(Config(config, on_policy=0.5)).tokens == 576


def test_the_report_of_an_on_policy_run():
    """By hand: 128 rows on 16 GPUs are 4 micro-batches of 2; 64 tokens each; 2 x 1.837e9 bytes each at 2e12 a second."""
    base = dict(stage="d2d", student="Qwen/Qwen1.5-1.8B", teacher="Qwen/Qwen1.5-7B", batch_size=128, micro_batch_size=2)
    report = plan.report(Config(train.DEFAULTS, **base, on_policy=0.5), 16)
    assert "generation" in report and "answers of 64 tokens" in report and "takes 0.5 s more in such a step" in report
    assert "generat" not in plan.report(Config(train.DEFAULTS, **base), 16)
    config = Config(train.DEFAULTS, **base, on_policy=1.0)
    student, teacher = plan.build(config)
    step = plan.average_step(student, config)
    assert step.prompt == 576 + 250 - 180
    per_token = 24 * (4 * 2048**2 + 3 * 2048 * 5504)
    head = 2 * 64 * 151936 * 2048
    generated = plan.flops(student, teacher, config, step)["generation"]
    assert generated["head"] == 128 * head
    adaptor = 2 * 576 * (1024 * 2048 + 2048 * 2048)
    vit = 128 * adaptor + plan.flops(student, teacher, config, step)["ViT"]["matrices"]
    assert generated["matrices"] - vit == pytest.approx(128 * 2 * (step.prompt + 63) * per_token, rel=1e-3)


@pytest.mark.parametrize("tokens, targets", [("response", 180), ("all", 250), ("response+image", 180 + 576)])
def test_targets_of_an_average_row(tokens, targets):
    models = dict(student="Qwen/Qwen1.5-1.8B", teacher="Qwen/Qwen1.5-7B")
    config = Config(train.DEFAULTS, stage="d2d", kd_tokens=tokens, **models)
    step = plan.average_step(plan.build(config)[0], config)
    assert step.targets == 128 * targets and step.prompt == 576 + 250 - 180


# -----------------------------------------------------------------------------
# Memory

class Live(TorchDispatchMode):
    """The bytes of all tensors that were made under it, as long as they are there."""

    def __init__(self, *before):
        super().__init__()
        self.before = {tensor.untyped_storage()._cdata for tensor in before}      # these do not count
        self.storages, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.before:
                    self.storages[storage._cdata] = weakref.ref(storage)
        self.look()
        return out

    def look(self):
        there = {key: storage for key, reference in self.storages.items() if (storage := reference()) is not None}
        self.storages = {key: self.storages[key] for key in there}
        self.now = sum(storage.nbytes() for storage in there.values())            # 0 for one that fsdp has emptied
        self.peak = max(self.peak, self.now)


class NormOnGPU(torch.autograd.Function):
    """torch's CUDA kernel keeps its input, the weight and a number per row; on the CPU, the normed input as well."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return x * scale * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        ahead = grad * weight
        grad_x = scale * (ahead - x * scale ** 2 * (ahead * x).mean(-1, keepdim=True))
        return grad_x, (grad * x * scale).sum((0, 1)) if ctx.needs_input_grad[1] else None, None


class AttentionOnGPU(torch.autograd.Function):
    """The CUDA kernel writes (B, T, H, Dh), and o_proj's input is a view of it; the CPU's (B, H, T, Dh), a copy."""

    @staticmethod
    def forward(ctx, q, k, v, causal):
        y, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        y = y.transpose(1, 2).contiguous().transpose(1, 2)
        ctx.save_for_backward(q, k, v, y, logsumexp)
        ctx.causal = causal
        return y

    @staticmethod
    def backward(ctx, grad):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return *kernel(grad, *ctx.saved_tensors, 0.0, ctx.causal), None


def be_like_a_gpu(set_attribute):
    set_attribute(F, "rms_norm", lambda x, shape, weight, eps: NormOnGPU.apply(x, weight, eps))
    set_attribute(F, "scaled_dot_product_attention", lambda q, k, v, attn_mask=None, is_causal=False, enable_gqa=False:
                  AttentionOnGPU.apply(q, k, v, is_causal))
    set_attribute(chunked, "LOGITS", dict.fromkeys(chunked.LOGITS, chunked.LOGITS["cpu"]))                # plan counts on a GPU
    set_attribute(plan, "PER_PRODUCT", {"cuda": chunked.PER_PRODUCT["cpu"]})
    set_attribute(chunked, "ROWS", {"cpu": 256})                           # blocks of the head that are small next to logits


def passing(items):
    """The items of plan.memory that come and go with a pass."""
    return sum(size for name, size in items.items() if name.startswith(("low-precision", "activations", "working")))


SIZES = {"many small rows": dict(items=4, tokens=120, text=dict(n_kv_head=2, n_layer=5, n_ffn=512)),
         "large vocabulary": dict(tokens=200, text=dict(vocab_size=20000, tied=True))}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", STAGES)
def test_what_a_pass_keeps_and_the_most_that_it_takes(monkeypatch, stage, size, checkpointing):
    """Within 5 and 6%. Left out are masks, indices, routers' probabilities, rotary angles, the teacher's answers."""
    be_like_a_gpu(monkeypatch.setattr)
    config, student, teacher, batch, shape = make(stage, **SIZES[size], checkpointing=checkpointing)
    standing = [*student.parameters(), *(teacher.parameters() if teacher is not None else [])]
    for p in student.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
            standing.append(p.grad)
    forward, kept = student.hidden_states, []

    def forward_and_look(*inputs):
        hidden, routings = forward(*inputs)
        live.look()
        kept.append(live.now - hidden.numel() * hidden.element_size())
        return hidden, routings
    monkeypatch.setattr(student, "hidden_states", forward_and_look)
    with Live(*standing) as live:
        run_pass(config, train.Objective(student, config), student, teacher, batch)

    items = plan.memory(student, teacher, config, 1, shape)
    expected = items["activations"] + items["low-precision copies of weights"]
    few = stage == "align" and checkpointing                         # so little is kept that what is left out shows
    assert kept[0] == pytest.approx(expected, rel=0.15 if few else 0.05)
    assert live.peak == pytest.approx(passing(items), rel=0.06)
    standing = plan.size_of({id(tensor): tensor for tensor in standing}.values())
    Adam = 8 * plan.count(p for p in student.parameters() if p.requires_grad)
    assert sum(items.values()) - passing(items) - plan.OVERHEAD == standing + Adam


FEATURES = dict(hidden_weight=1.0, hidden_tokens="all", affinity_weight=1.0, relation_weight=1.0)
SIGNALS = [("d2d", "many small rows", FEATURES), ("d2s", "many small rows", dict(hidden_weight=1.0)),
           ("d2s", "large vocabulary", dict(kd_loss="jsd", kd_temperature=2.0)),
           ("d2d", "large vocabulary", dict(kd_loss="reverse", kd_standardize=True))]


@pytest.mark.parametrize("stage, size, signals", SIGNALS)
def test_the_signals_take_what_is_planned(monkeypatch, stage, size, signals):
    """The map and its gradient exactly; the peak, with the teacher's states, within the same 6%."""
    be_like_a_gpu(monkeypatch.setattr)
    config, student, teacher, batch, shape = make(stage, **SIZES[size], **signals)
    objective = train.Objective(student, config, 384)
    trainable = [p for p in objective.parameters() if p.requires_grad]
    standing = [*objective.parameters(), *teacher.parameters()]
    for p in trainable:
        p.grad = torch.zeros_like(p)
        standing.append(p.grad)
    with Live(*standing) as live:
        run_pass(config, objective, student, teacher, batch)
    items = plan.memory(student, teacher, config, 1, shape)
    assert live.peak == pytest.approx(passing(items), rel=0.06)
    standing = plan.size_of({id(tensor): tensor for tensor in standing}.values())
    assert sum(items.values()) - passing(items) - plan.OVERHEAD == standing + 8 * plan.count(trainable)
    kept = items.get("activations: the teacher's states", 0)
    assert kept == 2 * shape.rows * shape.tokens * 384 * ("hidden_weight" in signals)


def test_the_map_is_counted_exactly():
    """D = 2048, D' = 4096: 2048 x 4096 + 4096 and 4096 x 4096 + 4096; 16 bytes each, and 2 of its bf16 copy."""
    config = Config(train.DEFAULTS, stage="d2d", student="Qwen/Qwen1.5-1.8B", teacher="Qwen/Qwen1.5-7B")
    student, teacher = plan.build(config)
    size, mapped = 2048 * 4096 + 4096 + 4096 * 4096 + 4096, Config(config, hidden_weight=1.0, hidden_tokens="all")
    assert plan.count(plan.hidden_map(student, teacher, mapped)) == size == 25_174_016
    assert plan.hidden_map(student, teacher, config) == [] == plan.hidden_map(student, None, config)
    batch = plan.longest_rows(config)
    before, after = (plan.memory(student, teacher, c, 1, batch) for c in (config, mapped))
    for name, size_of_one in (("trainable weights, fp32", 4), ("gradients, fp32", 4), ("Adam's moments, fp32", 8),
                              ("low-precision copies of weights", 2), ("frozen weights", 0), ("teacher", 0)):
        assert after[name] - before[name] == size_of_one * size
    sharded = [plan.memory(student, teacher, Config(c, parallel="fsdp"), 16, batch) for c in (config, mapped)]
    assert sharded[1]["trainable weights, fp32"] - sharded[0]["trainable weights, fp32"] == 4 * size / 16
    flops = [plan.flops(student, teacher, c, batch) for c in (config, mapped)]
    matrices = 2048 * 4096 + 4096 * 4096
    positions = config.micro_batch_size * config.max_length
    for what, per_number in (("student forward", 2), ("student backward", 4)):
        assert flops[1][what]["matrices"] - flops[0][what]["matrices"] == per_number * matrices * positions
    report = plan.report(mapped, 16)
    assert "map of hidden states" in report and "25,174,016" in report and "the teacher's states" in report


def test_two_ranks_hold_what_is_planned():
    codes, errors = ended(start(2, two_ranks), 300)
    assert codes == [0, 0], errors


class Sent(Live):
    """Also the bytes that this rank sends in collectives, as a ring does it."""
    SHARE = {"allreduce_": 2, "broadcast_": 1, "_allgather_base_": 1, "_reduce_scatter_base_": 1}
    sent = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("c10d::")
        if name in self.SHARE:
            whole = max(tree_leaves(args), key=lambda leaf: leaf.nbytes if isinstance(leaf, torch.Tensor) else 0)
            self.sent += self.SHARE[name] * whole.nbytes * (dist.get_world_size() - 1) / dist.get_world_size()
        return super().__torch_dispatch__(function, types, args, kwargs)


def two_ranks(rank):
    """A step of two micro-batches; then one more, in which DDP arranges its buckets anew. Models do not count, they were
    there before, but gradients and buckets do."""
    be_like_a_gpu(setattr)
    ranks = distributed.init_distributed("cpu")
    for stage, how in (("sft", "ddp"), ("d2s", "ddp"), ("sft", "fsdp"), ("d2s", "fsdp")):
        config, student, teacher, batch, shape = make(stage, parallel=how, checkpointing=True, batch_size=8, micro_batch_size=2)
        items = plan.memory(student, teacher, config, 2, shape)
        before = [p.data for model in (student, teacher) if model is not None for p in model.parameters()]
        with Sent(*before) as live:
            objective, optimizer, _ = distributed.parallelize(train.Objective(student, config), ranks, how, torch.bfloat16, lr=1e-5)
            live.peak = live.sent = 0                                # DDP sends all weights once, 250 MB at a time
            with distributed.no_sync(objective):
                run_pass(config, objective, student, teacher, batch)
            run_pass(config, objective, student, teacher, batch)
            peak = live.peak
            optimizer.step()
            sent = live.sent
            distributed.zero_grad(objective, optimizer)
            if how == "ddp":
                live.peak = 0
                run_pass(config, objective, student, teacher, batch)
        grads = [distributed.local(p.grad) for p in student.parameters() if p.grad is not None]
        weights = {id(p): distributed.local(p) for model in (student, teacher) if model is not None for p in model.parameters()}
        Adam = [distributed.local(state[key]) for state in distributed.local_optimizer(optimizer).state.values()
                for key in ("exp_avg", "exp_avg_sq")]
        # Pieces are not all of one size: where the rows of a matrix do not divide, rank 0 has one more.
        assert max(ranks.all_gather(plan.size_of(Adam))) == pytest.approx(items["Adam's moments, fp32"], rel=0.01)
        assert plan.size_of(weights.values()) == pytest.approx(
            items["trainable weights, fp32"] + items["frozen weights"] + items["teacher"], rel=0.01)
        planned = passing(items) + items["gradients, fp32"]
        if how == "ddp":
            assert plan.size_of(grads) == pytest.approx(items["gradients, fp32"], rel=0.01)
            assert live.peak < max(1.1 * planned, 2.05 * items["gradients, fp32"]) + plan.size_of(Adam)
        else:                                                        # its shards are new tensors
            planned += items["trainable weights, fp32"] + items["frozen weights"] - plan.size_of(student.vision.parameters())
        assert peak == pytest.approx(planned, rel=0.1), (stage, how)
        assert sent == pytest.approx(sum(plan.communication(student, teacher, config, 2).values()), rel=0.01), (stage, how)
    dist.destroy_process_group()


# -----------------------------------------------------------------------------
# By hand

def test_the_2b_students_dense_distillation_worked_by_hand():
    """
    config/d2d.py on 16 GPUs: Qwen1.5-1.8B is distilled from Qwen1.5-7B, 4 rows per micro-batch, 2,048 positions each.

    parameters    a block has q, k, v of 2048^2 + 2048, o of 2048^2, an FFN of 3 x 2048 x 5504 and norms of 2 x 2048:
                  50,604,032; 24 of them, embedding and head of 151,936 x 2048, a norm of 2048: 1,836,828,672.
                  The adaptor has 1024 x 2048 + 2048 + 2048^2 + 2048 = 6,295,552. All these are trainable: 1,843,124,224.
    weights       4 bytes each: 7.372 GB, and 7.372 GB of gradients.
    Adam          8 bytes each and a sixteenth would be 0.92 GB, but the ranks with the embedding and the head have
                  8 x 151,936 x 2048 = 2.489 GB and nothing else.
    frozen        the ViT's 303,507,456 x 2 bytes = 0.607 GB; the teacher's 7,742,304,256 x 2 = 15.485 GB.
    activations   the stream is fp32, and in a block a position leaves the norms' inputs, 2 x 4 x 2048 bytes; their
                  outputs in bf16, 2 x 2 x 2048; q, k, v and the attention's output, 4 x 2 x 2048;
                  log-sum-exp, 4 x 16; gate, silu, up and product, 4 x 2 x 5504. Together 85,056. 24 blocks and 8,192
                  of the last norm, for 4 x 2048 positions: 16.790 GB. The adaptor's: 4 x 576 x (2 x (1024 + 2 x 2048)
                  + 4 x 2048) = 0.042 GB.
    sent          of the gradients, 7.372 GB, 2 x 15/16 in an all-reduce; of the weights 15/16 in a broadcast: 20.735 GB.
    arithmetic    2 x 826 positions a row x 24 (4 x 2048^2 + 3 x 2048 x 5504) = 2.006 TFLOPs in the blocks' matrices,
                  twice that backward; a step has 128 rows.
    """
    recipe = str(Path(plan.__file__).parents[1] / "config/d2d.py")
    config = load_config(train.DEFAULTS, [recipe, "--student=Qwen/Qwen1.5-1.8B", "--teacher=Qwen/Qwen1.5-7B"])
    student, teacher = plan.build(config)
    items = plan.memory(student, teacher, config, 16, plan.longest_rows(config))
    expected = {"trainable weights, fp32": 7.372, "gradients, fp32": 7.372, "Adam's moments, fp32": 2.489,
                "frozen weights": 0.607, "teacher": 15.485, "activations": 16.790 + 0.042}
    assert {name: items[name] / 1e9 for name in expected} == pytest.approx(expected, abs=1e-3)
    assert sum(plan.communication(student, teacher, config, 16).values()) / 1e9 == pytest.approx(20.735, abs=1e-3)
    passes = plan.flops(student, teacher, config, plan.average_step(student, config))
    adaptor = 2 * 576 * (1024 * 2048 + 2048 * 2048)
    assert passes["student forward"]["matrices"] / 128 - adaptor == pytest.approx(2.006e12, rel=1e-3)
    assert passes["student backward"]["matrices"] / 128 == pytest.approx(2 * 2.006e12, rel=5e-3)


def test_the_teachers_communication_worked_by_hand():
    """
    config/teacher_sft.py on 16 GPUs, FSDP in bf16: of 7.742 billion numbers in decoder and adaptor, all are gathered for the
    forward, those of the blocks (6.477 billion) for the backward, 2 bytes each; all gradients are reduced, 4 bytes each.
    15/16 of it: 55.7 GB per micro-batch. One of 8 rows per step sends that once, 8 of one row eight times.

    On 16 GPUs a step of 5.7 PFLOPs at 40% of 312 TFLOP/s takes 2.86 s; 446 GB at 80 GB/s take 5.57 s, 2.7 s of it not hidden.
    """
    recipe = [str(Path(plan.__file__).parents[1] / "config/teacher_sft.py"), "--student=Qwen/Qwen1.5-7B"]
    for flags, sent, exposed in (([], 55.7, 0.0), (["--micro_batch_size=1"], 445.6, 2.7)):
        config = load_config(train.DEFAULTS, recipe + flags)
        student, _ = plan.build(config)
        found = plan.communication(student, None, config, 16)
        assert sum(found.values()) / 1e9 == pytest.approx(sent, abs=0.1)
        passes = plan.flops(student, None, config, plan.average_step(student, config))
        assert plan.exposed_seconds(passes, found, config, 16, 80e9) == pytest.approx(exposed, abs=0.05)
        assert plan.communication(student, None, config, 1) == {}


def gigabytes(stage, world_size=16, **settings):
    config = Config(train.DEFAULTS, stage=stage, student="Qwen/Qwen1.5-1.8B", teacher="Qwen/Qwen1.5-7B", **settings)
    student, teacher = plan.build(config)
    return sum(plan.memory(student, teacher, config, world_size, plan.longest_rows(config)).values()) / 1e9


def test_what_saves_memory_and_what_takes_it():
    base = dict(stage="d2d", micro_batch_size=2)
    assert gigabytes(**base, checkpointing=True) < gigabytes(**base) < gigabytes("d2d", micro_batch_size=4)
    assert gigabytes(**base, parallel="fsdp") < gigabytes(**base) < gigabytes(**base, world_size=1)
    assert gigabytes(**base, max_length=1024) < gigabytes(**base)
    assert gigabytes(**base, teacher_cache="answers") == pytest.approx(gigabytes(**base) - 15.485, abs=1e-3)


def test_the_report_names_the_verdict_and_every_assumption(world):
    config = Config(train.DEFAULTS, stage="sft", student="Qwen/Qwen1.5-7B", batch_size=128, micro_batch_size=1)
    text = plan.report(config, 16)
    assert "80 GB: does not fit; --parallel=fsdp --micro_batch_size=" in text
    assert "5,197 steps" in text and "665,298" in text and "40% of 312 TFLOP/s" in text and "1.5 GB" in text
    told = plan.report(config, 16, lengths=[100, 300], steps=10)
    assert "1 x 300 positions  1 x 200 positions" in told and "10 steps of 25,600 positions" in told
    assert "665,298" not in told and "on average" not in told
    tiny = plan.report(Config(config, student=str(world / "dense")), 1)
    assert "80 GB: fits, up to micro_batch_size=128" in tiny


def test_the_report_says_what_a_teacher_cache_takes():
    """d2s, 10,937 steps of 128 rows, at most all of 1.4 million; 130 response tokens of 516 bytes each."""
    recipe = [str(Path(plan.__file__).parents[1] / "config/d2s.py"), "--teacher_cache=out/cache"]
    models = ["--student=Qwen/Qwen1.5-1.8B", "--teacher=Qwen/Qwen1.5-7B"]
    text = plan.report(load_config(train.DEFAULTS, recipe + models), 16)
    assert f"still to be filled: {10937 * 128:,} rows, {10937 * 128 * 130 * 516 / 1e9:.1f} GB, " in text
    text = plan.report(load_config(train.DEFAULTS, recipe + models + ["--max_steps=100000"]), 16)
    assert "still to be filled: 1,400,000 rows" in text


def test_the_table_has_every_stage_of_every_student():
    lines = plan.table().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert len(cells) == 2 * (3 + 2 * 5) and all(len(row) == 9 for row in cells)
    for first_row in (3, 8, 16, 21):                                 # the four students: align, d2d, d2s, pd, all
        hours = [float(row[7]) for row in cells[first_row:first_row + 5]]
        assert all(float(row[7]) <= float(first) <= float(second) <= float(third) for row in cells[first_row:first_row + 5]
                   for first, second, third in [row[8].split(" / ")])
        assert [row[1] for row in cells[first_row:first_row + 5]] == ["align", "d2d", "d2s", "pd", "all"]
        assert sum(hours[:4]) == pytest.approx(hours[4], abs=2)


def test_the_command_takes_train_py_s_command_line(world, tmp_path, monkeypatch, capsys):
    """Without weights in the student's folder: the rows are measured, the models described."""
    shutil.copytree(world / "dense", tmp_path / "dense", ignore=shutil.ignore_patterns("*.safetensors"))
    command = ["--stage=d2s", f"--student={tmp_path}/dense", f"--teacher={world}/teacher", f"--data={world}/rows.json",
               f"--image_dir={world}/images", f"--out_dir={tmp_path}/out", "--max_length=64", "--batch_size=8",
               "--micro_batch_size=4", "--epochs=3", "--device=cpu", "--dry_run"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    plan.main(command)
    said = capsys.readouterr().out
    assert "stage d2s on 2 GPUs, 8 rows a step" in said and "12 steps of" in said            # 3 x 32 rows / 8
    assert "rows.json" in said and "32 rows" in said and not (tmp_path / "out").exists()
    monkeypatch.setenv("RANK", "1")                                  # under torchrun, rank 0 alone reports
    plan.main(command)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="unknown key 'lerning_rate'"):
        plan.main([*command, "--lerning_rate=1"])
    with pytest.raises(UserError, match="data is empty"):
        plan.main(["--stage=align", "--out_dir=x"])


def test_without_a_config_the_table(monkeypatch, capsys):
    monkeypatch.setattr(plan, "table", lambda: "| model |")
    plan.main([])
    assert capsys.readouterr().out == "| model |\n"

