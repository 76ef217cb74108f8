"""
Faults during training: kills, signals, full and read-only disks, damaged files, ranks that disagree, losses that are
not finite. Runs that were stopped are compared with uninterrupted ones, bit for bit.

    python -m pytest tests/robustness/test_faults.py        (kill_study.py does the killing in larger numbers)
"""
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from configurator import Config, Stopped, UserError
from engine import resume
from engine.files import atomic, claim, disk_errors, write_text
from engine.hf import read_tensors, save_tensors
from kill_study import logged, settings_for, study
from model import Llava
from processes import ROOT, ended, start, train_py
from test_train import command_line, flags, records


def same(a, b):
    """Two runs ended with the same weights and logged the same numbers."""
    first, second = load_file(Path(a) / "model.safetensors"), load_file(Path(b) / "model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    logs = [[{key: value for key, value in record.items() if key not in ("seconds", "tokens_per_s")}
             for record in records(folder)] for folder in (a, b)]
    assert logs[0] == logs[1]


def unfinish(folder):
    """As if the process had been killed right after its last save."""
    run_json = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run_json | {"finished": False}))


def wait_for(condition, alive, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert alive() and time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """An uninterrupted run of 6 steps that saved every second one; states 4 and 6 are kept."""
    out = tmp_path_factory.mktemp("whole") / "out"
    train.main(flags(world, "d2s", out, max_steps=6, save_every=2))
    return out


# -----------------------------------------------------------------------------
# Kills

@pytest.fixture(scope="module")
def studied(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("kills")
    return out, study(3, lambda out_dir, **more: flags(world, "d2s", out_dir, **more), out)


def test_three_kills(studied):
    """While a state is written, during a step, while the folder is written; `study` compares the ends."""
    assert [found.split(",")[0] for _, found, _ in studied[1]] == ["running"] * 3


def test_torchrun_restarts_a_killed_rank(world, studied, tmp_path):
    """--max_restarts: a rank dies, torchrun starts all again, and the run goes on by itself."""
    command = command_line(flags(world, "d2s", tmp_path / "out", **settings_for(3)), nproc=2)
    command.insert(command.index("--standalone"), "--max_restarts=1")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: resume.saved_states(tmp_path / "out"), lambda: process.poll() is None)
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    victim = next(pid for pid in workers if b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(victim, signal.SIGKILL)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors
    same(studied[0] / "untouched", tmp_path / "out")


def test_the_newest_two_states_are_kept_and_nothing_half_written(whole):
    assert [path.name for path in resume.saved_states(whole)] == ["step_00000004.pt", "step_00000006.pt"]
    assert sorted(path.name for path in (whole / "state").iterdir()) == ["step_00000004.pt", "step_00000006.pt"]


def test_a_kill_after_the_last_save_leaves_no_old_folder(world, whole, tmp_path, capsys):
    """The state is of the last step, the model of an earlier one: the restart exports the model."""
    shutil.copytree(whole, tmp_path / "out")
    unfinish(tmp_path / "out")
    Llava.from_pretrained(world / "sparse").save_pretrained(tmp_path / "out")       # other weights
    (tmp_path / "out" / "state" / "step_00000008.pt.tmp").write_text("half")
    (tmp_path / "out" / "model.safetensors.tmp").write_text("half")
    train.main(flags(world, "d2s", tmp_path / "out", max_steps=6, save_every=2))
    same(whole, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"] is True
    train.main(flags(world, "d2s", tmp_path / "out", max_steps=6, save_every=2))
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize("before, after", [(0, 1), (1, 0), (300, 0), (0, 300), (300, 300), (300, 700)])
def test_shards_of_two_saves_never_mix(tmp_path, monkeypatch, before, after):
    """`before` and `after`: bytes per shard, 0 for a single file. Stop the second save before each of its file
    operations: the folder holds the old tensors, the new ones, or is refused."""
    old = {f"w{i}": torch.full((50,), 1.0) for i in range(8)}
    new = {f"w{i}": torch.full((50,), 2.0) for i in range(8)}
    shapes = {key: tensor.shape for key, tensor in old.items()}
    save = lambda tensors, folder, size: save_tensors(tensors, folder, max_shard_bytes=size or 10**9)

    class Killed(Exception):
        pass

    outcomes = []
    for moment in range(40):
        folder = tmp_path / str(moment)
        folder.mkdir()
        save(old, folder, before)
        calls = []

        def maybe(original):
            def operation(*args, **more):
                calls.append(args)
                if len(calls) > moment:
                    raise Killed
                return original(*args, **more)
            return operation

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", maybe(os.replace))
            patch.setattr(Path, "unlink", maybe(Path.unlink))
            try:
                save(new, folder, after)
                finished = True
            except Killed:
                finished = False
        try:
            values = {tensor[0].item() for _, tensor in read_tensors(folder, shapes, rename=lambda key: key)}
        except UserError:
            values = "refused"
        assert values in ({1.0}, {2.0}, "refused"), f"before operation {moment}: a mix"
        outcomes.append(values)
        if finished:
            break
    assert outcomes[0] == {1.0} and outcomes[-1] == {2.0}
    if not after:
        assert "refused" not in outcomes                             # replacing a single file is atomic


# -----------------------------------------------------------------------------
# Signals

@pytest.mark.parametrize("number, nproc", [(signal.SIGINT, None), (signal.SIGTERM, 2)])
def test_a_signal_ends_the_step_saves_and_stops(world, tmp_path, number, nproc):
    """Two workers decode images; under torchrun they get the signal as well and must not take the run with them."""
    settings = dict(max_steps=40, save_every=1000, micro_batch_size=4)
    arguments = flags(world, "d2s", tmp_path / "out", **settings, num_workers=2)
    process = subprocess.Popen(command_line(arguments, nproc), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    wait_for(lambda: len(logged(tmp_path / "out")) >= 2, lambda: process.poll() is None)
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    step = len(logged(tmp_path / "out"))
    assert 2 <= step < 40 and [path.name for path in resume.saved_states(tmp_path / "out")] == [f"step_{step:08d}.pt"]
    line = f"{number.name}: stopped after step {step}, which is saved; the same command goes on from there\n"
    assert errors.count(line) == 1
    if nproc is None:                                                # torchrun prints more and has its own exit code
        assert errors == line and process.returncode == 128 + number

    train.main(flags(world, "d2s", tmp_path / "out", **settings))    # with one rank and no workers
    assert [record["step"] for record in records(tmp_path / "out")] == list(range(1, 41))
    if nproc is None:
        train.main(flags(world, "d2s", tmp_path / "whole", **settings))
        same(tmp_path / "whole", tmp_path / "out")


SECOND_SIGNAL = """
import os, signal, sys, time
from engine.resume import Stop
stop = Stop()
stop.listen()
stop.can_wait = sys.argv[1] == "training"
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGTERM)             # a launcher's copy of the first one
print(stop.votes(), flush=True)
time.sleep(1.1)
os.kill(os.getpid(), signal.SIGINT)
print("still here")
"""


@pytest.mark.parametrize("when, code, out, err", [
    ("training", 130, "{'SIGTERM': 1, 'SIGINT': 0, 'error': 0}\n", "SIGINT again, ending at once\n"),
    ("starting", 143, "", "SIGTERM before the first step: nothing to save\n")])
def test_a_second_signal_and_one_before_the_first_step_end_at_once(when, code, out, err):
    done = subprocess.run([sys.executable, "-c", SECOND_SIGNAL, when], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def test_a_signal_during_the_first_step_does_not_call_it_saved():
    votes = {"SIGTERM": 1, "SIGINT": 0, "error": 0}
    with pytest.raises(Stopped, match="^SIGTERM: stopped before the first step; nothing to save$"):
        resume.Stop().end(votes, step=0, rank=0)
    with pytest.raises(Stopped, match="stopped after step 3, which is saved"):
        resume.Stop().end(votes, step=3, rank=0)


# -----------------------------------------------------------------------------
# Disks

def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 0xFF
    path.write_bytes(content if how == "flipped" else content[:len(content) * 2 // 3])


@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_a_damaged_state_gives_way_to_the_one_before(world, whole, tmp_path, how, capsys):
    shutil.copytree(whole, tmp_path / "out")
    unfinish(tmp_path / "out")
    damage(tmp_path / "out" / "state" / "step_00000006.pt", how)
    arguments = flags(world, "d2s", tmp_path / "out", max_steps=6, save_every=2)
    train.main(arguments)
    out = capsys.readouterr().out
    [line] = [line for line in out.splitlines() if "is damaged" in line]
    assert line.startswith(f"{tmp_path / 'out' / 'state' / 'step_00000006.pt'} is damaged (")
    assert line.endswith("; continuing from step 4") and "resuming after step 4" in out
    same(whole, tmp_path / "out")
    assert not resume.find_damage(tmp_path / "out" / "state" / "step_00000006.pt")


def test_without_a_good_state_nothing_is_overwritten(world, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    unfinish(tmp_path / "out")
    for path in resume.saved_states(tmp_path / "out"):
        damage(path, "cut")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="step_00000006.pt is damaged .* no state is left to continue from"):
        train.main(flags(world, "d2s", tmp_path / "out", max_steps=6, save_every=2))
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for path in resume.saved_states(tmp_path / "out"):
        path.unlink()
    train.main(flags(world, "d2s", tmp_path / "out", max_steps=6, save_every=2))      # no state at all: from step 0
    same(whole, tmp_path / "out")


def run_with_file_limit(arguments, limit):
    """No file may grow beyond `limit` bytes: like a full disk, without a disk of its own."""
    def work(rank):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        train_py(arguments)(rank)
    [code], [errors] = ended(start(1, work))
    return code, errors


def test_no_room_for_a_state(world, whole, tmp_path):
    """The state of step 2 is there, that of step 4 does not fit; with room again, the run goes on."""
    arguments = flags(world, "d2s", tmp_path / "out", max_steps=6, save_every=2)
    state, folder = (whole / "state" / "step_00000006.pt").stat().st_size, (whole / "model.safetensors").stat().st_size
    shutil.copytree(whole, tmp_path / "out")
    unfinish(tmp_path / "out")
    (tmp_path / "out" / "state" / "step_00000006.pt").unlink()
    code, errors = run_with_file_limit(arguments, 200_000)
    assert folder > 200_000 and state > 200_000 and code == 2
    assert errors.startswith(f"error: {tmp_path / 'out' / 'state' / 'step_00000006.pt'}: cannot be written "
                             "(File too large); it needs 4") and errors.count("\n") == 1
    assert errors.endswith(" are free there; the state of step 4 is intact: make room and repeat the same command\n")
    assert not list((tmp_path / "out").rglob("*.tmp"))
    train.main(arguments)
    same(whole, tmp_path / "out")


def test_no_room_for_the_exported_model(world, tmp_path):
    """Only the adaptor is trained: its state is small, the exported model is not."""
    code, errors = run_with_file_limit(flags(world, "align", tmp_path / "out", max_steps=2), 100_000)
    assert code == 2 and errors.count("\n") == 1
    assert f"{tmp_path / 'out' / 'model.safetensors'}: cannot be written (File too large)" in errors
    assert "the state of step 2 is intact" in errors and not list((tmp_path / "out").rglob("*.tmp"))
    train.main(flags(world, "align", tmp_path / "out", max_steps=2))
    train.main(flags(world, "align", tmp_path / "whole", max_steps=2))
    same(tmp_path / "whole", tmp_path / "out")


def test_no_room_is_seen_before_writing_and_the_log_counts_too(world, tmp_path, monkeypatch):
    free = shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: free)
        with pytest.raises(UserError, match=r"step_00000001.pt: cannot be written \(No space left on device\); it "
                                            "needs .* kB, 5 kB are free there; no state was saved before"):
            train.main(flags(world, "align", tmp_path / "out", max_steps=1))
    assert not list((tmp_path / "out" / "state").iterdir())
    claim(tmp_path / "log", resume.OWNER)
    (tmp_path / "log" / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"log.jsonl: cannot be written \(No space left on device\)"):
        train.main(flags(world, "align", tmp_path / "log", max_steps=1))
    assert not (tmp_path / "log" / "state").exists()                 # no state ahead of the log


def test_other_errors_while_writing_pass_through(tmp_path):
    for writing in (atomic, disk_errors):
        with pytest.raises(RuntimeError, match="a bug"), writing(tmp_path / "x", 1):
            raise RuntimeError("a bug")
        with pytest.raises(UserError, match="Input/output error"), writing(tmp_path / "x", 1):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert not list(tmp_path.iterdir())


def test_the_outer_of_two_notes_is_the_one_shown(tmp_path):
    """A function that writes one file does not know what else is safe; its caller does."""
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError) as caught, disk_errors(tmp_path / "run", note="the state of step 3 is intact"):
        write_text(tmp_path / "file" / "x", "text")
    assert str(caught.value).startswith(f"{tmp_path / 'file' / 'x'}: cannot be written (")
    assert str(caught.value).endswith(" are free there; the state of step 3 is intact")


def test_no_room_for_the_teacher_cache(world, tmp_path):
    """The first file does not fit; with room again, the cache is completed and the run is as without the fault."""
    arguments = flags(world, "d2d", tmp_path / "out", max_steps=1, teacher_cache=tmp_path / "cache")
    code, errors = run_with_file_limit(arguments, 20_000)
    assert code == 2 and errors.count("\n") == 1
    assert errors.startswith(f"error: {tmp_path / 'cache' / 'rows-000000000.safetensors'}: cannot be written "
                             "(File too large); it needs ")
    assert errors.endswith("what was filled before is intact: make room and repeat the same command\n")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["lock", "teacher_cache.json"]
    train.main(arguments)
    train.main(flags(world, "d2d", tmp_path / "whole", max_steps=1, teacher_cache=tmp_path / "whole_cache"))
    same(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize("key", ["out_dir", "teacher_cache"])
def test_a_folder_that_cannot_be_written_ends_in_one_line(world, tmp_path, key):
    """/proc is read-only even for root."""
    settings = dict(out_dir=tmp_path / "out", teacher_cache=tmp_path / "cache", max_steps=1) | {key: "/proc/here"}
    with pytest.raises(UserError) as caught:
        train.main(flags(world, "d2d", **settings))
    assert str(caught.value).startswith("/proc/here/") and "cannot be written (" in str(caught.value)
    assert "\n" not in str(caught.value)


# -----------------------------------------------------------------------------
# Numbers and data

@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_a_loss_that_is_not_a_number_stops_before_the_weights_change(world, tmp_path, layout):
    """A learning rate that destroys the weights: step 1 is fine, step 2 is not. Both ranks end; one says why."""
    arguments = flags(world, "d2s", tmp_path / "out", max_steps=4, save_every=1, learning_rate=1e30, warmup_ratio=0.0,
                      micro_batch_size=4, parallel=layout)
    codes, [errors, other_errors] = ended(start(2, train_py(arguments)))
    assert codes == [2, 2] and errors.count("\n") == 1 and other_errors == ""
    assert errors.startswith("error: step 2: loss nan, gradient norm nan; finite parts of the loss: none, not finite: "
                             "ce, kd, balance; gradients not finite: student.adaptor.linear_1.weight, ")
    assert "; the batch: " in errors and " and 4 more; the weights were not touched" in errors
    assert [path.name for path in resume.saved_states(tmp_path / "out")] == ["step_00000001.pt"]
    assert len(records(tmp_path / "out")) == 1


def test_a_gradient_that_is_not_finite_is_named(world, tmp_path, monkeypatch):
    """The loss is finite, one gradient is not: only that parameter is named. Clipping must not spread it to others."""
    original = train.choose_trainable

    def spoilt(student, *rest):
        original(student, *rest)
        student.adaptor.linear_2.bias.register_hook(lambda grad: grad * float("inf"))

    monkeypatch.setattr(train, "choose_trainable", spoilt)
    with pytest.raises(UserError) as caught:
        train.main(flags(world, "sft", tmp_path / "out", max_steps=2, grad_clip=1.0))
    message = str(caught.value)
    assert "step 1: loss " in message and "loss nan" not in message
    assert ("finite parts of the loss: ce, not finite: none; gradients not finite: student.adaptor.linear_2.bias; "
            "the batch: ") in message


def test_broken_data_on_one_rank_ends_all_and_saves_the_step_before(world, tmp_path):
    """An image that is there but cannot be decoded: found by the rank whose row it is."""
    shutil.copytree(world / "images", tmp_path / "images")
    shutil.copy(tmp_path / "images" / "0.png", tmp_path / "images" / "broken.png")
    rows = [{"id": str(i), "image": "0.png", "conversations": [{"from": "human", "value": "<image>\nis there a cat"},
                                                               {"from": "gpt", "value": "yes"}]} for i in range(32)]
    rows[17]["image"] = "broken.png"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    arguments = flags(world, "d2s", tmp_path / "out", data=tmp_path / "rows.json", image_dir=tmp_path / "images",
                      micro_batch_size=4, max_steps=30)
    (tmp_path / "images" / "broken.png").write_bytes(b"not a picture")
    codes, errors = ended(start(2, train_py(arguments)))
    assert codes == [2, 2] and sorted(errors)[0] == ""
    line = sorted(errors)[1]
    assert line.startswith(f"error: {tmp_path / 'rows.json'} row 17: ") and line.count("\n") == 1
    assert f"{tmp_path / 'images' / 'broken.png'}: not a readable image" in line
    step = len(records(tmp_path / "out"))
    saved = [resume.step_of(path) for path in resume.saved_states(tmp_path / "out")]
    assert step < 4 and saved == ([step] if step else [])
    shutil.copy(tmp_path / "images" / "0.png", tmp_path / "images" / "broken.png")
    train.main(arguments)
    assert [record["step"] for record in records(tmp_path / "out")] == list(range(1, 31))


def test_ranks_that_disagree_stop(world, tmp_path):
    arguments = flags(world, "d2s", tmp_path / "out", micro_batch_size=4)
    codes, errors = ended(start(2, train_py(arguments, arguments + ["--learning_rate=0.5"])))
    assert codes == [2, 2] and errors[1] == ""
    assert errors[0] == ("error: learning_rate is 0.01 on rank 0, but 0.5 on rank 1; every rank has to run the same "
                         "command on the same files\n")
    assert not (tmp_path / "out").exists()


def test_an_error_in_setting_up_one_rank_ends_all(world, tmp_path):
    arguments = flags(world, "d2s", tmp_path / "out", micro_batch_size=4)
    codes, errors = ended(start(2, train_py(arguments, arguments + ["--student=nowhere"])))
    assert codes == [2, 2] and errors[0] == "" and errors[1].count("\n") == 1
    assert errors[1].startswith("error: nowhere/config.json: ") and "no such file" in errors[1].lower()


def test_a_rank_that_dies_ends_the_others(world, tmp_path):
    """Without torchrun, and in the middle of a step: the other rank must not wait forever."""
    ranks = start(2, train_py(flags(world, "d2s", tmp_path / "out", micro_batch_size=4, max_steps=300)))
    wait_for(lambda: len(logged(tmp_path / "out")) >= 2, lambda: ranks[0].is_alive())
    os.kill(ranks[1].pid, signal.SIGKILL)
    codes, errors = ended(ranks, 60)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None)


def test_ranks_that_read_other_files_disagree(world, tmp_path):
    """One row less, or another student, under the same name: the fingerprints differ, and so the ranks stop."""
    def prints(folder):
        config = Config(train.DEFAULTS, student=str(folder / "dense"))
        student = Llava.from_pretrained(folder / "dense")
        rows = train.InstructionData([(str(folder / "rows.json"), 1.0)], str(folder / "images"), student.tokenizer,
                                          "vicuna", 4, 28, 2048)
        return train.fingerprints(config, rows)

    shutil.copytree(world, tmp_path / "other")
    assert prints(world) == prints(tmp_path / "other")
    rows = json.loads((world / "rows.json").read_text())
    (tmp_path / "other" / "rows.json").write_text(json.dumps(rows[:-1]))
    (tmp_path / "other" / "dense" / "config.json").write_text((world / "dense" / "config.json").read_text() + "\n")
    one, two = prints(world), prints(tmp_path / "other")
    assert {key for key in one if one[key] != two[key]} == {"data", "student"}


def test_settings_of_the_machine_may_change_on_resuming(world, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    unfinish(tmp_path / "out")
    (tmp_path / "out" / "state" / "step_00000006.pt").unlink()
    train.main(flags(world, "d2s", tmp_path / "out", max_steps=6, save_every=2, checkpointing=True, parallel="fsdp"))
    same(whole, tmp_path / "out")
    with pytest.raises(UserError, match="parallel is 'zero', expected one of ddp, fsdp"):
        train.main(flags(world, "d2s", tmp_path / "out", max_steps=6, parallel="zero"))
    (tmp_path / "out" / "run.json").unlink()
    with pytest.raises(UserError, match="run.json: no such file, but .* holds states of a run"):
        train.main(flags(world, "d2s", tmp_path / "out", max_steps=6, save_every=2))


def test_two_runs_do_not_write_to_one_folder(world, tmp_path):
    out = tmp_path / "out"
    arguments = flags(world, "align", out, max_steps=2000, save_every=10_000)
    [first] = start(None, train_py(arguments))
    try:
        deadline = time.time() + 100
        while not (out / "log.jsonl").is_file():
            assert time.time() < deadline and first.exitcode is None
            time.sleep(0.05)
        with pytest.raises(UserError, match="another run is writing there"):
            train.main(arguments)
    finally:
        first.kill()
        first.join()
    train.main(flags(world, "align", tmp_path / "other", max_steps=1))      # and a dead run holds no lock
    resume.lock(out, 0)
