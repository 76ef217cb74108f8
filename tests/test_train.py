"""
train.py as users run it: what moves in each stage, that the loss curve does not depend on how a batch is cut, and that an
interrupted run ends where an uninterrupted one does.

    python -m pytest tests/test_train.py
"""
import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from configurator import Config, UserError
from engine.settings import WITH_TEACHER
from engine.index import PreferenceData
from model import Llava
from processes import run, start, train_py

ROOT = Path(__file__).resolve().parent.parent
STAGES = ["align", "sft", "d2d", "d2s", "pd"]


def flags(world, stage, out_dir, **more):
    student = {"d2s": "dense", "pd": "sparse"}.get(stage, "dense")
    settings = dict(stage=stage, student=world / student, data=world / ("pairs.json" if stage == "pd" else "rows.json"),
                    image_dir=world / "images", out_dir=out_dir, batch_size=8, micro_batch_size=8, max_steps=4,
                    learning_rate=1e-2, warmup_ratio=0.25, dtype="float32", device="cpu", log_every=1)
    if stage in WITH_TEACHER:
        settings["teacher"] = world / "teacher"
    settings |= more
    return [f"--{key}={value}" for key, value in settings.items()]


def records(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]


def weights(folder):
    return dict(Llava.from_pretrained(folder).named_parameters())


def command_line(arguments, nproc=None):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc else []
    return [sys.executable, *torchrun, str(ROOT / "train.py"), *arguments]


@pytest.mark.parametrize("stage", STAGES)
def test_exactly_what_the_stage_trains_moves(world, tmp_path, stage):
    before_teacher = weights(world / "teacher")
    train.main(flags(world, stage, tmp_path, max_steps=1, warmup_ratio=0.0))
    if stage == "d2s":     # compare with the upcycled student that the stage began with
        from moe import upcycle
        start = Llava.from_pretrained(world / "dense")
        upcycle(start, 4, 2, "even", True, seed=0)
        before = dict(start.named_parameters())
    else:
        before = weights(world / ("sparse" if stage == "pd" else "dense"))
    after = weights(tmp_path)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {
        "align": lambda n: n.startswith("adaptor."),
        "sft": lambda n: n.startswith(("adaptor.", "decoder.")),
        "d2d": lambda n: n.startswith(("adaptor.", "decoder.")),
        "d2s": lambda n: n.startswith("adaptor.") or ".experts." in n or ".router." in n,
        "pd": lambda n: n.startswith("adaptor.") or ".experts." in n or ".router." in n,
    }[stage]
    assert moved == {name for name in before if expected(name)}
    after_teacher = weights(world / "teacher")
    assert all(torch.equal(before_teacher[name], after_teacher[name]) for name in before_teacher)


def test_train_dense_ffn_adds_the_ffns_of_the_dense_layers(world, tmp_path):
    train.main(flags(world, "pd", tmp_path, max_steps=1, warmup_ratio=0.0, train_dense_ffn=True))
    before, after = weights(world / "sparse"), weights(tmp_path)
    dense = {f"decoder.blocks.1.ffn.{name}_proj.weight" for name in ("gate", "up", "down")}      # layers 0 and 2 are sparse
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert dense <= moved and all(n.startswith("adaptor.") or ".experts." in n or ".router." in n for n in moved - dense)


def test_train_dense_ffn_without_a_dense_layer_is_refused(world, tmp_path):
    with pytest.raises(UserError, match="train_dense_ffn=True: has no effect, since every layer"):
        train.main(flags(world, "d2s", tmp_path, train_dense_ffn=True, moe_layers="all"))


def test_frozen_routers_stay_exact_in_bfloat16(world, tmp_path):
    """Stage align on a sparse student: what it does not train is bf16, but for the routers, and comes out as it went in."""
    shutil.copytree(world / "sparse", tmp_path / "start")
    train.main(flags(world, "align", tmp_path / "out", student=tmp_path / "start", vision="", llm="", template="", max_steps=1,
                     dtype="bfloat16"))
    before, after = weights(tmp_path / "start"), weights(tmp_path / "out")
    routers = [name for name in before if ".router." in name]
    assert routers and all(torch.equal(before[name], after[name]) for name in routers)
    assert any(not torch.equal(before[name], after[name]) for name in before if ".experts." in name)     # else nothing is rounded


def test_distilling_the_prompt_too_counts_more_tokens_and_keeps_the_cross_entropy(world, tmp_path):
    for name, more in (("response", {}), ("all", dict(kd_tokens="all")), ("cut", dict(kd_tokens="all", micro_batch_size=2))):
        train.main(flags(world, "d2s", tmp_path / name, max_steps=2, **more))
    response, everything, cut = (records(tmp_path / name) for name in ("response", "all", "cut"))
    assert response[0]["ce"] == pytest.approx(everything[0]["ce"], abs=1e-5)
    assert abs(response[0]["kd"] - everything[0]["kd"]) > 1e-3
    for a, b in zip(everything, cut, strict=True):
        assert a["kd"] == pytest.approx(b["kd"], abs=1e-5) and a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_the_logged_loss_is_the_sum_of_its_parts(world, tmp_path):
    """eq. 7 plus the balance term, once."""
    train.main(flags(world, "d2s", tmp_path, max_steps=2, kd_weight=0.7, ce_weight=0.4, balance_coef=0.05))
    for record in records(tmp_path):
        expected = 0.7 * record["kd"] + 0.4 * record["ce"] + 0.05 * record["balance"]
        assert record["loss"] == pytest.approx(expected, abs=1e-5)
        for loads in (record["image_load"], record["text_load"]):
            assert torch.tensor(loads).shape == (2, 4)
            torch.testing.assert_close(torch.tensor(loads).sum(1), torch.ones(2), atol=1e-3, rtol=0)


def test_d2s_without_distillation_needs_no_teacher(world, tmp_path):
    train.main(flags(world, "d2s", tmp_path, max_steps=1, teacher="", kd_weight=0.0))
    assert "kd" not in records(tmp_path)[0]


@pytest.mark.parametrize("kind", ["kto_pair", "ipo", "hinge"])
def test_every_preference_loss_runs(world, tmp_path, kind):
    train.main(flags(world, "pd", tmp_path, max_steps=1, preference_loss=kind))
    assert records(tmp_path)[0]["preference"] >= 0


def test_the_learning_rate_warms_up_and_falls_along_half_a_cosine():
    config = Config(train.DEFAULTS, learning_rate=1.0, warmup_ratio=0.2)
    rates = [train.learning_rate(step, 10, config) for step in range(10)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])               # 2 steps of warm-up, then the top of the cosine
    assert rates[6] == pytest.approx(0.5) and rates[9] == pytest.approx(0.5 * (1 - 0.9238795), abs=1e-6)


def test_the_teacher_in_memory_never_changes(world, tmp_path, monkeypatch):
    seen = {}
    original = Llava.from_pretrained.__func__

    def watched(cls, path, **more):
        llava = original(cls, path, **more)
        if Path(path).name == "teacher":
            seen["teacher"], seen["before"] = llava, {n: p.clone() for n, p in llava.named_parameters()}
        return llava

    monkeypatch.setattr(Llava, "from_pretrained", classmethod(watched))
    train.main(flags(world, "d2s", tmp_path, max_steps=2))
    teacher = seen["teacher"]
    assert not teacher.training and not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert all(torch.equal(p, seen["before"][n]) for n, p in teacher.named_parameters())


@pytest.mark.parametrize("stage", STAGES)
def test_same_loss_curve_however_the_batch_is_cut(world, tmp_path, stage):
    """Gradient accumulation: 1e-5. The rows include text-only ones. test_distributed.py has the same for several processes."""
    train.main(flags(world, stage, tmp_path / "one"))
    train.main(flags(world, stage, tmp_path / "accumulated", micro_batch_size=2))
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "accumulated"), strict=True):
        for key in a.keys() - {"tokens_per_s", "seconds"}:
            torch.testing.assert_close(torch.tensor(b[key]), torch.tensor(a[key]), rtol=1e-5, atol=1e-5,
                                       msg=lambda m: f"step {a['step']} {key}: {m}")


def test_experts_without_tokens_do_not_stop_two_processes(world, tmp_path):
    """A router that sends everything to two experts of four, the other two idle: the gradients are zero, not missing."""
    student = Llava.from_pretrained(world / "sparse")
    with torch.no_grad():
        for i in student.config.decoder.sparse_layers:
            # the norm in front makes the hidden state's sign vary, so bias by a direction present in every token
            norm, router = student.decoder.blocks[i].ffn_norm, student.decoder.blocks[i].ffn.router
            norm.weight.zero_()                                      # all tokens look the same: logits 0 everywhere
            router.weight.zero_()                                    # a tie, and top-k takes the same two each time
    student.save_pretrained(tmp_path / "idle")
    for name, nproc, micro in (("one", None, 8), ("two", 2, 2)):
        done = run(flags(world, "pd", tmp_path / name, student=tmp_path / "idle", micro_batch_size=micro, max_steps=2), nproc)
        assert done.returncode == 0, done.stderr
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        loads = torch.tensor(a["text_load"])                         # (layers, E)
        assert ((loads == 0).sum(1) == 2).all()


@pytest.mark.parametrize("stage", ["d2s", "pd"])
def test_killed_and_resumed_is_bit_for_bit_the_same(world, tmp_path, stage):
    more = dict(max_steps=6, save_every=3)
    train.main(flags(world, stage, tmp_path / "whole", **more))
    arguments = flags(world, stage, tmp_path / "killed", **more)
    # run until the save at step 3 is there, then SIGKILL; the log may be ahead of the save
    [process] = start(None, train_py(arguments))
    deadline = time.time() + 60
    while not (tmp_path / "killed" / "state" / "step_00000003.pt").is_file():
        assert process.exitcode is None and time.time() < deadline, Path(process.errors.name).read_text()
        time.sleep(0.001)
    process.kill()
    process.join()
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(a[name], b[name]) for name in a)
    for x, y in zip(records(tmp_path / "whole"), records(tmp_path / "killed"), strict=True):
        assert {k: v for k, v in x.items() if "second" not in k and k != "tokens_per_s"} == \
               {k: v for k, v in y.items() if "second" not in k and k != "tokens_per_s"}
    again = run(arguments)
    assert again.returncode == 0 and "finished already" in again.stdout


def test_resuming_with_other_settings_is_refused(world, tmp_path):
    train.main(flags(world, "align", tmp_path, max_steps=1))
    done = run(flags(world, "align", tmp_path, max_steps=1, learning_rate=1e-3))
    assert done.returncode == 2 and "learning_rate=0.01" in done.stderr and done.stderr.count("\n") == 1


def test_the_micro_batch_may_change_unless_the_loss_depends_on_it(world, tmp_path):
    for kind, cut, refused in (("sigmoid", 1, False), ("kto_pair", 1, True), ("kto_pair", 2, False)):
        settings = dict(max_steps=2, save_every=1, preference_loss=kind, out_dir=tmp_path / f"{kind}{cut}")
        train.main(flags(world, "pd", **settings, micro_batch_size=2))
        (settings["out_dir"] / "run.json").write_text((settings["out_dir"] / "run.json").read_text().replace(
            '"finished": true', '"finished": false'))
        again = flags(world, "pd", **settings, micro_batch_size=cut)
        if refused:
            with pytest.raises(UserError, match="micro_batch_size=2"):
                train.main(again)
        else:
            train.main(again)


def test_one_batch_overfits(world, tmp_path):
    """The whole path learns: a student with every weight free memorises eight rows."""
    (tmp_path / "eight.json").write_text(json.dumps(json.loads((world / "rows.json").read_text())[:8]))
    train.main(flags(world, "sft", tmp_path / "out", data=tmp_path / "eight.json", max_steps=40, log_every=20))
    log = records(tmp_path / "out")
    assert log[-1]["loss"] < 0.2 * log[0]["loss"]


def test_kl_is_zero_when_the_teacher_is_the_student(world, tmp_path):
    train.main(flags(world, "d2d", tmp_path, teacher=world / "dense", max_steps=1))
    assert abs(records(tmp_path)[0]["kd"]) < 1e-6


def test_dpo_is_log_2_when_the_teacher_is_the_student(world, tmp_path):
    train.main(flags(world, "pd", tmp_path, teacher=world / "sparse", max_steps=1))
    record = records(tmp_path)[0]
    assert record["preference"] == pytest.approx(0.693147, abs=1e-5) and record["margin"] == pytest.approx(0, abs=1e-4)


def test_the_vit_runs_once_per_image(world, tmp_path, monkeypatch):
    from model import VisionTower
    images = []
    original = VisionTower.forward
    monkeypatch.setattr(VisionTower, "forward", lambda self, pixels: images.append(len(pixels)) or original(self, pixels))
    train.main(flags(world, "pd", tmp_path, max_steps=1))
    import data
    expected = 0
    pairs = json.loads((world / "pairs.json").read_text())
    teacher = Llava.from_pretrained(world / "teacher")
    dataset = PreferenceData([(str(world / "pairs.json"), 1.0)], str(world / "images"), teacher.tokenizer, "vicuna", 4, 28, 2048)
    for row in data.Sampler(dataset.lengths, 8, 0, dataset.sources).batch(0):
        expected += 2 if isinstance(pairs[row].get("image"), list) else int("image" in pairs[row])
    assert sum(images) == expected


BAD_SETTINGS = [
    (dict(stage="d3s"), "stage is 'd3s', expected one of align, sft, d2d, d2s, pd"),
    (dict(lerning_rate=1.0), "did you mean learning_rate?"),
    (dict(learning_rate="fast"), "expected float"),
    (dict(batch_size=9), "batch_size=9 is not a multiple of micro_batch_size=8"),
    (dict(batch_size=64, micro_batch_size=64), "fewer than batch_size=64"),
    (dict(teacher=""), "stage d2s needs a teacher"),
    (dict(student="nowhere"), "nowhere/config.json: no such file"),
    (dict(data="nowhere.json"), "nowhere.json"),
    (dict(image_dir="nowhere"), "nowhere"),
    (dict(moe_layers="odd"), "moe_layers='odd' is not known"),
    (dict(moe_layers="0,7"), "layer numbers must lie between 0 and 2"),
    (dict(top_k=5), "top_k=5 must lie between 1 and num_experts=4"),
    (dict(preference_loss="dpo"), "expected one of sigmoid"),
    (dict(vision="clip"), "give either student"),
    # what would be ignored
    (dict(epochs=4), "epochs=4 and max_steps=4 both say how long to train"),
    (dict(stage="sft", teacher="", kd_tokens="all"), "kd_tokens=all: belongs to d2d and d2s with a teacher and a kd_weight"),
    (dict(kd_weight=0.0, teacher="", kd_loss="reverse"), "kd_loss=reverse: belongs to d2d and d2s with a teacher"),
    (dict(stage="d2d", beta=0.2), "beta=0.2: belongs to stage pd, this is d2d"),
    (dict(stage="d2d", num_experts=8), "num_experts=8: belongs to stage d2s, which makes a student sparse"),
    (dict(stage="align", teacher="", balance_coef=0.1), "balance_coef=0.1: belongs to a sparse student"),
    (dict(stage="sft", teacher="", train_dense_ffn=True), "train_dense_ffn=True: belongs to the stages d2s and pd"),
    (dict(stage="pd", ce_weight=0.5), "ce_weight=0.5: belongs to the other stages, this is pd"),
    (dict(jsd_beta=0.3), "jsd_beta=0.3: belongs to kd_loss=jsd"),
    (dict(hidden_tokens="all"), "hidden_tokens=all: belongs to a hidden_weight above 0"),
    (dict(on_policy_tokens=9), "on_policy_tokens=9: belongs to an on_policy above 0"),
    (dict(teacher_top_k=9), "teacher_top_k=9: belongs to a teacher_cache"),
    (dict(template="chatml"), "template=chatml: belongs to a new model"),
    (dict(kd_weight=0.0), "teacher: would be ignored, since kd_weight, hidden_weight, affinity_weight, relation_weight"),
    (dict(kd_weight=0.0, stage="d2d", ce_weight=1.0), "teacher: would be ignored, since kd_weight"),
    (dict(on_policy=1.0, ce_weight=5.0), "ce_weight=5.0: belongs to steps on the data's answers, and with on_policy=1"),
    # what would train nothing
    (dict(stage="sft", teacher="", ce_weight=0.0), "ce_weight is 0, and so is every other weight of a loss"),
    (dict(stage="align", teacher="", ce_weight=0.0), "nothing would be trained"),
    (dict(teacher="", kd_weight=0.0, ce_weight=0.0), "nothing would be trained"),
]


@pytest.mark.parametrize("change, message", BAD_SETTINGS, ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_bad_settings_end_in_one_line(world, tmp_path, change, message):
    """In-process for speed: the same errors as the command line's, whose exit code the next test checks."""
    with pytest.raises(UserError) as caught:
        train.main(flags(world, **(dict(stage="d2s", out_dir=tmp_path / "out") | change)))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out, cache", [("run", "run/cache"), ("run", "run/state"), ("cache/run", "cache"),
                                        ("run", "a/../run"), ("link", "run/cache")])
def test_run_and_cache_are_apart(world, tmp_path, monkeypatch, out, cache):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.setattr(train, "open_student", lambda *_: pytest.fail("loaded a model first"))
    with pytest.raises(UserError, match="are one folder, or one lies in the other; choose two that are apart"):
        train.main(flags(world, "d2d", tmp_path / out, teacher_cache=tmp_path / cache))
    config = train.configure(flags(world, "d2d", tmp_path / "run", teacher_cache=tmp_path / "run_cache"))
    assert config.teacher_cache == str(tmp_path / "run_cache")


@pytest.mark.parametrize("stage", ["d2s", "pd", "sft"])
def test_a_sparse_student_keeps_its_experts(world, tmp_path, stage):
    """It has 4 experts, 2 active, in layers 0 and 2. To ask for the same is no mistake, to ask for others is."""
    def run_with(**more):
        teacher = {} if stage == "sft" else {"teacher": world / "teacher"}
        train.main(flags(world, stage, tmp_path / "out", student=world / "sparse", max_steps=1, **teacher, **more))
    for key, value, own in [("num_experts", 8, "4"), ("num_experts", 3, "4"), ("top_k", 1, "2"), ("norm_topk", False, "True"),
                            ("moe_layers", "all", "[0, 2]"), ("moe_layers", "1", "[0, 2]")]:
        with pytest.raises(UserError, match=f"{key}={value}: the student .* is sparse already, with {re.escape(own)}"):
            run_with(**{key: value})
    assert not (tmp_path / "out").exists()
    run_with(num_experts=4, top_k=2, moe_layers="0,2", norm_topk=True, balance_coef=0.02)


def test_a_config_files_steps_and_a_flags_epochs(world, tmp_path):
    (tmp_path / "a.py").write_text("max_steps = 18750\n")
    settings = [str(tmp_path / "a.py"), *flags(world, "sft", tmp_path / "out", epochs=1)]
    settings.remove("--max_steps=4")
    with pytest.raises(UserError, match="epochs=1 and max_steps=18750 both say how long to train"):
        train.configure(settings)
    assert train.configure([*settings, "--max_steps=0"]).epochs == 1


def test_bad_settings_exit_with_2_and_one_line(world, tmp_path):
    done = run(flags(world, "d2s", tmp_path, lerning_rate=1.0))
    assert done.returncode == 2
    assert done.stderr == "error: --lerning_rate: unknown key 'lerning_rate'; did you mean learning_rate?\n"


def test_teacher_of_another_tokenizer_or_template_is_refused(world, tmp_path):
    teacher = Llava.from_pretrained(world / "teacher")
    teacher.tokenizer.add_tokens(["zebra"])
    teacher.save_pretrained(tmp_path / "words")
    with pytest.raises(UserError, match="their tokenizers differ"):
        train.main(flags(world, "d2d", tmp_path / "out", teacher=tmp_path / "words"))
    teacher = Llava.from_pretrained(world / "teacher")
    teacher.config.template = "chatml"
    teacher.save_pretrained(tmp_path / "chatml")
    with pytest.raises(UserError, match="template is 'chatml' and 'vicuna'"):
        train.main(flags(world, "d2d", tmp_path / "out", teacher=tmp_path / "chatml"))


def test_dry_run_reads_the_data_and_no_weights(world, tmp_path, monkeypatch, capsys):
    shutil.copytree(world / "dense", tmp_path / "dense", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    train.main(flags(world, "d2s", tmp_path / "out", student=tmp_path / "dense", max_steps=0, epochs=3, dry_run=True))
    said = capsys.readouterr().out
    assert "stage d2s on 2 GPUs, 8 rows a step" in said and "12 steps of" in said            # 3 x 32 rows / 8
    assert "rows.json" in said and "32 rows" in said and not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="nor, for a dry run, one of Qwen/Qwen1.5-0.5B"):
        train.main(flags(world, "d2s", tmp_path / "out", teacher=tmp_path / "nowhere", dry_run=True))


def test_bfloat16_runs_every_stage(world, tmp_path):
    """The real recipe's dtype: frozen weights and products in bf16, what learns in fp32; the loss stays near fp32's."""
    for stage in STAGES:
        train.main(flags(world, stage, tmp_path / f"{stage}32", max_steps=1))
        train.main(flags(world, stage, tmp_path / f"{stage}16", max_steps=1, dtype="bfloat16"))
        a, b = records(tmp_path / f"{stage}32")[0], records(tmp_path / f"{stage}16")[0]
        assert b["loss"] == pytest.approx(a["loss"], rel=0.05)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler for the CPU")
@pytest.mark.skipif(sys.getfilesystemencoding() != "utf-8", reason="torch cannot read its own sources in this locale")
def test_compiled_layers_give_the_same_loss_curve(world, tmp_path, monkeypatch):
    """The graphs that torch.compile takes from our layers, forward and backward; turning these into C++, which is torch's
    work, would take a minute."""
    compile_layer = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *layer, **how: compile_layer(*layer, **how, backend="aot_eager"))
    train.main(flags(world, "d2s", tmp_path / "plain", max_steps=2))
    train.main(flags(world, "d2s", tmp_path / "compiled", max_steps=2, compile=True))
    torch._dynamo.reset()
    for a, b in zip(records(tmp_path / "plain"), records(tmp_path / "compiled"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5) and b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
