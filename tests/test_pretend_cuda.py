"""
The code that runs on a GPU, run on one that is not there (pretend_cuda.py): every stage and signal, saving and resuming,
the teacher cache, generation, evaluation. No tensor meets one of another device, planted faults are found, and how often
the CPU waits for the GPU in a micro-batch is counted.

    python -m pytest tests/test_pretend_cuda.py
"""
import inspect
import sys
import textwrap
import warnings

import pytest
import torch

import evaluate
import moe
import model
import train
from configurator import Config
from engine import chunked, distributed, on_policy, teacher_cache
from engine.settings import WITH_TEACHER
from model import DecoderConfig, Llava, LlavaConfig, VisionConfig
from moe import upcycle
from pretend_cuda import CPU, CUDA, device_of, pretend_cuda, put
from test_distributed import unfinish
from test_evaluate_model import checkpoint, pope                     # noqa: F401, fixtures
from test_train import flags, records

warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")


# -----------------------------------------------------------------------------
# What it allows, refuses and counts

def test_devices_of_results_and_of_views():
    with pretend_cuda() as gpu:
        x = torch.arange(6.0, device="cuda").view(2, 3)
        layer = torch.nn.Linear(3, 2).to("cuda")
        y = layer(x)
        y.sum().backward()
        there = [x[0], x.T, x + 1, x * torch.tensor(2.0), x.new_zeros(3), torch.zeros_like(x), y, layer.weight.grad,
                 torch.nn.functional.one_hot(x.long(), 9), x.bfloat16(), torch.cat([x, x])]
        assert all(tensor.device == CUDA and tensor.is_cuda for tensor in there)
        assert not gpu.waits["? copy to the CPU"]
        for tensor in (torch.zeros(3), x.cpu(), x.to("cpu"), torch.tensor(x.tolist())):
            assert tensor.device == CPU and not tensor.is_cuda
    assert device_of(x) == CUDA and x.tolist() == [[0, 1, 2], [3, 4, 5]]


REFUSED = {
    "a sum": lambda gpu, cpu: gpu + cpu,
    "a product": lambda gpu, cpu: gpu @ cpu.T,
    "an index_add": lambda gpu, cpu: cpu.index_add(0, torch.zeros(1, dtype=torch.long, device="cuda"), gpu[:1]),
    "a tensor on the CPU by an index": lambda gpu, cpu: cpu[torch.tensor([1], device="cuda")],
    "a row of an embedding": lambda gpu, cpu: torch.nn.functional.embedding(torch.tensor([1]), gpu),
    "a GPU's number into the CPU's": lambda gpu, cpu: torch.zeros(()).add_(gpu.sum()),
    "numbers from both in one tensor": lambda gpu, cpu: torch.stack([gpu.sum(), cpu.sum()]),
    "numpy": lambda gpu, cpu: gpu.numpy(),
    "a backward": lambda gpu, cpu: torch.autograd.graph._engine_run_backward(
        (gpu.requires_grad_() * gpu,), (torch.ones(2, 3),), False, False, (), allow_unreachable=True, accumulate_grad=True),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cuda_refuses_is_refused(what):
    with pretend_cuda(), pytest.raises((RuntimeError, TypeError), match="same device|to numpy"):
        REFUSED[what](torch.ones(2, 3, device="cuda"), torch.ones(2, 3))


WAITS = {
    "item": (lambda x: x.sum().item(), 1), "an if": (lambda x: bool((x > 0).all()), 1), "a list": (lambda x: x.tolist(), 1),
    "a mask": (lambda x: x[x > 0], 1), "an assignment by a mask": (lambda x: x.__setitem__(x > 0, 1.0), 1),
    "nonzero": (lambda x: (x > 0).nonzero(), 1), "where": (lambda x: torch.where(x > 0), 1),
    "bincount": (lambda x: x.long().flatten().bincount(minlength=9), 2), "a new tensor": (lambda x: torch.tensor([1], device="cuda"), 1),
    "a copy": (lambda x: torch.ones(3).to("cuda"), 1), "a copy that is not waited for": (lambda x: torch.ones(3).to("cuda", non_blocking=True), 0),
    "an index on the CPU": (lambda x: x[torch.tensor([1])], 1), "an index": (lambda x: x.index_select(0, x[0].long()), 0),
    "rows of known number": (lambda x: torch.repeat_interleave(x[0].long(), output_size=1), 0),
    "a product": (lambda x: x @ x.T, 0), "one_hot": (lambda x: torch.nn.functional.one_hot(x.long(), 3), 0),
}


@pytest.mark.parametrize("what", WAITS)
def test_waits_are_counted(what):
    act, times = WAITS[what]
    with pretend_cuda() as gpu:
        x = torch.eye(2, device="cuda")
        act(x)
    assert gpu.waits.total() == times, gpu.waits


# -----------------------------------------------------------------------------
# Runs

SHORT = dict(device="cuda", batch_size=2, micro_batch_size=1, max_steps=1)
RUNS = {   # together every stage, dtype, signal and switch
    "align": ("align", {}),
    "sft": ("sft", dict(checkpointing=True, dtype="bfloat16", grad_clip=0.5)),
    "d2d": ("d2d", dict(dtype="bfloat16", kd_tokens="all", kd_standardize=True, hidden_weight=1.0, hidden_tokens="all", ce_weight=1.0)),
    "d2d on-policy": ("d2d", dict(on_policy=1.0, on_policy_tokens=3, kd_loss="reverse", kd_temperature=2.0)),
    "d2s": ("d2s", dict(dtype="bfloat16", checkpointing=True)),
    "d2s features": ("d2s", dict(affinity_weight=1.0, relation_weight=1.0, kd_loss="jsd", kd_tokens="response+image")),
    "d2s top 1": ("d2s", dict(top_k=1, kd_loss="mse", kd_shift="late", train_dense_ffn=True)),
    "d2s on-policy": ("d2s", dict(on_policy=1.0, on_policy_tokens=3, hidden_weight=1.0)),
    "d2s alone": ("d2s", dict(teacher="", kd_weight=0.0, norm_topk=False, dtype="bfloat16")),
    "pd": ("pd", dict(dtype="bfloat16", batch_size=2, micro_batch_size=2)),
    "pd kto": ("pd", dict(preference_loss="kto_pair", micro_batch_size=2)),
}


def numbers(out_dir):
    """What a run logs, without its times and its memory."""
    return [{key: value for key, value in record.items() if not key.endswith("_s") and key not in ("seconds", "peak_gb")}
            for record in records(out_dir)]


@pytest.mark.parametrize("name", RUNS)
def test_every_stage_and_signal_stays_on_one_device(world, tmp_path, capsys, name):
    """And computes what it does on the CPU."""
    stage, more = RUNS[name]
    with pretend_cuda() as gpu:
        train.main(flags(world, stage, tmp_path / "gpu", **SHORT | more))
    assert not [wait for wait in gpu.waits if "on the CPU" in wait], gpu.waits
    assert records(tmp_path / "gpu")[0]["peak_gb"] == 1.0 and "tok/s  1.0 GB" in capsys.readouterr().out
    if name in ("align", "d2s", "pd kto"):
        train.main(flags(world, stage, tmp_path / "cpu", **SHORT | more | dict(device="cpu")))
        for record, expected in zip(numbers(tmp_path / "gpu"), numbers(tmp_path / "cpu"), strict=True):
            assert record.keys() == expected.keys()
            for key in record:
                torch.testing.assert_close(torch.tensor(record[key]), torch.tensor(expected[key]), rtol=1e-5, atol=1e-6)


def resume(world, folder):
    """A run of two steps, and its second step again."""
    train.main(flags(world, "align", folder / "run", **SHORT | dict(max_steps=2, save_every=1)))
    unfinish(folder / "run", folder / "resumed", 1)
    train.main(flags(world, "align", folder / "resumed", **SHORT | dict(max_steps=2, save_every=1)))


def cache(world, folder, stage="d2s"):
    """The run that fills the cache, and one that reads it."""
    for name in ("fills", "reads"):
        more = dict(teacher_cache=folder / "cache", micro_batch_size=2) | (dict(teacher_top_k=4) if stage == "d2s" else {})
        train.main(flags(world, stage, folder / name, **SHORT | more))


def test_resuming_and_caches_stay_on_one_device(world, tmp_path):
    with pretend_cuda() as gpu:
        resume(world, tmp_path / "resume")
        cache(world, tmp_path / "d2s")
        cache(world, tmp_path / "pd", "pd")
    assert numbers(tmp_path / "resume" / "run") == numbers(tmp_path / "resume" / "resumed")
    assert not [wait for wait in gpu.waits if "on the CPU" in wait], gpu.waits


def answer(checkpoint, pope, folder):
    evaluate.main([f"--model={checkpoint}", "--benchmark=pope", f"--data={pope}", f"--out_dir={folder}", "--device=cuda",
                   "--max_new_tokens=3", "--dtype=float32"])


def generate(world, folder):
    """Unequal prompts, a sparse model, sampling."""
    llava = Llava.from_pretrained(world / "sparse", device="cuda")
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 62, 62]], device="cuda")
    return llava.generate(ids, None, 3, temperature=1.0, banned=[3], uniforms=torch.ones(2, 3, device="cuda") / 2)


def test_generation_and_evaluation_stay_on_one_device(world, checkpoint, pope, tmp_path):
    with pretend_cuda():
        assert generate(world, tmp_path).device == CUDA
        answer(checkpoint, pope, tmp_path)


# -----------------------------------------------------------------------------
# Planted faults: (where, function, what it says, what it would say with the fault, a run that comes by)

def stage(world, folder, name, **more):
    train.main(flags(world, name, folder / "out", **SHORT | more))


FAULTS = [
    (model, "rope_angles", "device=positions.device", "", lambda *at: stage(*at, "align")),
    (model, "valid_positions", "device=input_ids.device", "", generate),
    (Llava, "stream", "torch.tensor(ends, dtype=torch.long, device=input_ids.device)", "torch.tensor(ends, dtype=torch.long)", generate),
    (Llava, "stream", "torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)",
     "torch.zeros(len(input_ids), dtype=torch.bool)", generate),
    (model.KVCache, "__init__", "torch.zeros(rows, dtype=torch.long, device=device)", "torch.zeros(rows, dtype=torch.long)", generate),
    (model.KVCache, "start_pass", "torch.arange(T, device=self.k.device)", "torch.arange(T)", generate),
    (model.KVCache, "start_pass", "torch.arange(self.length, device=self.k.device)", "torch.arange(self.length)", generate),
    (model.KVCache, "append", "device=k.device", "", generate),
    (moe.SparseFFN, "forward", ", device=assigned.device", "", generate),
    (moe.SparseFFN, "forward", "torch.zeros_like(x_BTD)", "torch.zeros(x_BTD.shape)", lambda *at: stage(*at, "pd", micro_batch_size=2)),
    (Llava, "embed", "(0, image,", "(0, image.cpu(),", lambda *at: stage(*at, "align")),
    (moe, "balance_loss", "routing.probs_NE.new_zeros(", "torch.zeros(", lambda *at: stage(*at, "d2s")),
    (chunked, "head_forward", "x.new_empty(", "torch.empty(", lambda *at: stage(*at, "sft", dtype="bfloat16")),
    (train, "to_device", "value.to(", 'value if key == "head" else value.to(', lambda *at: stage(*at, "sft")),
    (train, "to_device", "value.to(", 'value if key == "targets" else value.to(', lambda *at: stage(*at, "sft")),
    (train, "teacher_reference", "head=teacher.decoder.head_weight", "head=teacher.decoder.head_weight.cpu()",
     lambda *at: stage(*at, "d2d")),
    (train, "sequence_logprobs", ", device=states.device", "", lambda *at: stage(*at, "pd", micro_batch_size=2)),
    (train, "train_step", "torch.zeros((), device=dist.device)", "torch.zeros(())", lambda *at: stage(*at, "align")),
    (train, "setup", "open_student(config, dist.device)", "open_student(config)", lambda *at: stage(*at, "align")),
    (train, "open_teacher", ", device=device", "", lambda *at: stage(*at, "d2d")),
    (train, "cached_reference", 'batch["teacher_tail"]', 'batch["teacher_tail"].cpu()', cache),
    (train, "teacher_targets", "to_device(device, batch)", "batch", cache),
    (teacher_cache, "fill", "tensor.cpu().split", "tensor.split", cache),
    (distributed, "restore", "torch.zeros_like(parameter).copy_(shard(adam[name][key], parameter))",
     "shard(adam[name][key], parameter).clone()", resume),
    (distributed, "restore", ".to(parameter.device, copy=True)", ".clone()", resume),
    (on_policy, "sample_answers", "torch.from_numpy(uniforms).to(device)", "torch.from_numpy(uniforms)",
     lambda *at: stage(*at, "d2d", on_policy=1.0, on_policy_tokens=3)),
    (on_policy, "sample_answers", "pad_right(prompts, pad_id).to(device)", "pad_right(prompts, pad_id)",
     lambda *at: stage(*at, "d2d", on_policy=1.0, on_policy_tokens=3)),
]


def plant(monkeypatch, owner, name, right, wrong):
    """Give a function of the project another text."""
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(right) == 1, (name, right)
    module = owner if inspect.ismodule(owner) else sys.modules[owner.__module__]
    namespace = {}
    exec(compile(source.replace(right, wrong), module.__file__, "exec"), vars(module), namespace)
    for user in {owner, train} if inspect.ismodule(owner) else {owner}:      # train.py imports some by name
        if hasattr(user, name):
            monkeypatch.setattr(user, name, namespace[name])


@pytest.mark.parametrize("owner, name, right, wrong, run", FAULTS, ids=lambda value: value if isinstance(value, str) else "")
def test_planted_faults_are_found(world, tmp_path, monkeypatch, owner, name, right, wrong, run):
    """Tensors of two devices, or an index that is copied to the GPU on the way."""
    plant(monkeypatch, owner, name, right, wrong)
    with pretend_cuda() as gpu:
        try:
            run(world, tmp_path)
            found = any("on the CPU" in wait for wait in gpu.waits)
        except (RuntimeError, TypeError) as error:
            found = "same device" in str(error) or "to numpy" in str(error)
    assert found


# -----------------------------------------------------------------------------
# Waits in a micro-batch, with as many layers as the 2B student and its teacher have

def make(n_layer, width, seed):
    torch.manual_seed(seed)
    vision = VisionConfig(image_size=28, n_embd=16, n_layer=2, n_head=2, n_ffn=32)
    text = DecoderConfig(vocab_size=64, n_embd=width, n_layer=n_layer, n_head=2, n_kv_head=2, n_ffn=32)
    return Llava(LlavaConfig(vision, text, image_token_id=62, pad_token_id=63, eos_token_id=0, template=None))


def waits_of(stage, **more):
    """(of each micro-batch, of a step besides)"""
    config = Config(train.DEFAULTS, stage=stage, teacher="one" if stage in WITH_TEACHER else "", device="cuda", **more)
    ids = torch.randint(0, 62, (2, 40))
    ids[:, 3:7], ids[1, 36:] = 62, 63
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[:, 20:36] = True
    batch = {"input_ids": ids, "mask": mask, "pixel_values": torch.randn(1 if stage == "pd" else 2, 3, 28, 28)}
    student, counts = make(24, 16, 0), []
    batch = train.add_positions(batch, student.config, config)
    with pretend_cuda() as gpu:
        dist = distributed.init_distributed("cuda")
        if stage in ("d2s", "pd"):
            upcycle(student)
        train.choose_trainable(student, config, torch.bfloat16)
        student.to(dist.device)
        student.decoder.checkpointing = config.checkpointing
        teacher = make(32, 24, 1).to(torch.bfloat16).to(dist.device).requires_grad_(False)
        teacher.vision = student.vision
        objective, optimizer, trainable = distributed.parallelize(train.Objective(student, config, 24), dist, "ddp",
                                                                  torch.bfloat16, lr=1e-4)
        run = train.Run(config, dist, student, teacher if config.teacher else None, None, objective, optimizer, trainable)
        for micro_batches in ([batch], [batch] * 2):
            total = train.count_batch(micro_batches, config)
            gpu.waits.clear()
            train.train_step(run, micro_batches, total, 1e-4)
            counts.append(gpu.waits.total())
    return counts[1] - counts[0], 2 * counts[0] - counts[1]


@pytest.mark.parametrize("stage, more, waits", [
    ("d2s", {}, 12), ("d2s", dict(checkpointing=True), 24), ("d2d", {}, 0), ("pd", {}, 12), ("sft", {}, 0)])
def test_waits_per_micro_batch(stage, more, waits):
    assert waits_of(stage, **more) == (waits, 3)
