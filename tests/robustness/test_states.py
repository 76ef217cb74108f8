"""
Saved states: a run is continued by itself alone, told by its settings and by the content of what it reads.

    python -m pytest tests/robustness/test_states.py
"""
import json
import shutil

import pytest
import torch

import train
from configurator import UserError
from engine import resume
from engine.files import claim, release
from model import Llava
from test_faults import same, unfinish
from test_train import flags, records


def two_steps(world, out, **more):
    return flags(world, "align", out, **dict(max_steps=2, save_every=1) | more)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    train.main(two_steps(world, out))
    return out


@pytest.fixture
def out(whole, tmp_path):
    """A copy of it as if it had been killed after its last save, with the states of steps 1 and 2."""
    shutil.copytree(whole, tmp_path / "out")
    unfinish(tmp_path / "out")
    return tmp_path / "out"


def newest(out):
    return out / "state" / "step_00000002.pt"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


# -----------------------------------------------------------------------------
# A state that is not what this run has written

NAME = "student.adaptor.linear_1.weight"


def put(value, *path):
    def change(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value
    return change


def nan(*path):
    def change(state):
        for key in path:
            state = state[key]
        state.view(-1)[7] = torch.nan
    return change


# Each is saved anew, so that the file's own checksums are right.
GIVE_WAY = {      # damage that shows in the file alone: the state before is taken
    "NaN in a weight": (nan("weights", NAME), f"a wrong number in weights, {NAME}"),
    "infinity in a weight": (lambda state: state["weights"][NAME].view(-1)[0:1].fill_(torch.inf), "a wrong number in weights"),
    "NaN in Adam's average": (nan("adam", NAME, "exp_avg"), f"a wrong number in {NAME}, exp_avg"),
    "NaN in Adam's square": (nan("adam", NAME, "exp_avg_sq"), f"a wrong number in {NAME}, exp_avg_sq"),
    "another step in Adam": (put(torch.tensor(7.0), "adam", NAME, "step"), f"a wrong number in {NAME}, step"),
    "another step": (put(1, "step"), "holds step 1"),
    "of another run": (put("0" * 64, "run"), "of another run"),
    "of an older format": (lambda state: state.pop("run"), "KeyError"),
    "no Adam": (lambda state: state.pop("adam"), "KeyError"),
    "weights of another kind": (put([1, 2], "weights"), "AttributeError"),
    "Adam of another kind": (put(7, "adam", NAME), "AttributeError"),
}
REFUSED = {       # what only the model shows
    "a weight missing": lambda state: state["weights"].pop(NAME),
    "an unknown weight": put(torch.zeros(3), "weights", "student.adaptor.linear_3.weight"),
    "another shape": lambda state: put(state["weights"][NAME].T.contiguous()[:1], "weights", NAME)(state),
    "another dtype": lambda state: put(state["weights"][NAME].to(torch.bfloat16), "weights", NAME)(state),
    "integers": lambda state: put(state["weights"][NAME].int(), "weights", NAME)(state),
    "Adam's average missing": lambda state: state["adam"][NAME].pop("exp_avg_sq"),
    "Adam's step missing": lambda state: state["adam"][NAME].pop("step"),
    "Adam of another shape": put(torch.zeros(2, 2), "adam", NAME, "exp_avg"),
    "a parameter without Adam": lambda state: state["adam"].pop(NAME),
}


def rewrite(path, change):
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize("kind", GIVE_WAY)
def test_a_state_with_a_wrong_value_gives_way_to_the_one_before(world, whole, out, capsys, kind):
    change, reason = GIVE_WAY[kind]
    rewrite(newest(out), change)
    train.main(two_steps(world, out))
    said = capsys.readouterr().out
    assert f"{newest(out)} is damaged ({reason}" in said and "continuing from step 1" in said
    assert (out / "state" / "step_00000002.damaged").exists()        # kept, for who wants to know
    same(whole, out)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_state_of_another_model_is_refused_and_kept(world, out, kind):
    rewrite(newest(out), REFUSED[kind])
    before = contents(out)
    with pytest.raises(UserError) as caught:
        train.main(two_steps(world, out))
    assert str(newest(out)) in str(caught.value) and "is missing, or is not what this run trains" in str(caught.value)
    assert "\n" not in str(caught.value) and contents(out) == before


@pytest.mark.parametrize("other", [dict(seed=1), dict(learning_rate=1e-3), dict(stage="sft"), dict(data="longer.json"),
                                   dict(student="other")], ids=lambda other: next(iter(other)))
def test_a_state_from_another_runs_folder_is_not_taken(world, whole, out, tmp_path, capsys, other):
    """Of the same step, and in all but one case of the same names and shapes."""
    if "data" in other:
        rows = json.loads((world / "rows.json").read_text())
        (tmp_path / "longer.json").write_text(json.dumps(rows[::-1]))
        other = dict(data=tmp_path / "longer.json")
    if "student" in other:
        other = dict(student=other_student(world, tmp_path / "other"))
    train.main(flags(world, **dict(stage="align", out_dir=tmp_path / "elsewhere", max_steps=2, save_every=1) | other))
    shutil.copy(newest(tmp_path / "elsewhere"), newest(out))
    train.main(two_steps(world, out))
    assert f"{newest(out)} is damaged (of another run); continuing from step 1" in capsys.readouterr().out
    same(whole, out)


def other_student(world, folder):
    student = Llava.from_pretrained(world / "dense")
    with torch.no_grad():
        student.decoder.norm.weight[0] += 0.01
    student.save_pretrained(folder)
    return folder


# -----------------------------------------------------------------------------
# What the run reads: content counts, names and times do not

def test_inputs_may_move(world, whole, out, tmp_path):
    newest(out).unlink()
    shutil.copy(world / "rows.json", tmp_path / "moved.json")
    shutil.copytree(world / "dense", tmp_path / "moved")
    (tmp_path / "moved" / "README.md").write_text("not read")
    train.main(two_steps(world, out, data=tmp_path / "moved.json", student=tmp_path / "moved"))
    same(whole, out)


@pytest.mark.parametrize("key", ["data", "student", "weight", "teacher"])
def test_inputs_of_other_content_are_refused(world, tmp_path, key):
    """Under the same name, with the same number of rows or tensors."""
    inputs = dict(data=shutil.copy(world / "rows.json", tmp_path), student=shutil.copytree(world / "dense", tmp_path / "dense"))
    stage = "align"
    if key == "teacher":
        stage, inputs["teacher"] = "d2d", shutil.copytree(world / "teacher", tmp_path / "teacher")
    train.main(flags(world, stage, tmp_path / "out", max_steps=1, **inputs))
    unfinish(tmp_path / "out")
    message = f"{key}={inputs.get(key)}: has changed since the run in {tmp_path / 'out'} began"
    if key == "data":
        text = (tmp_path / "rows.json").read_text()
        row = json.loads(text)[5]["conversations"][-1]["value"]
        (tmp_path / "rows.json").write_text(text.replace(json.dumps(row), json.dumps(row[::-1]), 1))
    elif key == "weight":
        inputs["data"] = f"{inputs['data']}:0.5"
        message = f"data={inputs['data']}: has changed since the run"
    else:
        path = inputs[key] / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError) as caught:
        train.main(flags(world, stage, tmp_path / "out", max_steps=1, **inputs))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("key, value, before", [("seed", 2, 0), ("batch_size", 16, 8), ("learning_rate", 0.5, 0.01),
                                                ("image_dir", "elsewhere", None), ("max_length", 99, 2048)])
def test_other_settings_are_another_run(world, out, key, value, before):
    """Of the settings that change the order of the rows or the numbers, none may change."""
    before = repr(before) if before is not None else ""
    with pytest.raises(UserError, match=f"{out} holds a run with {key}={before}.*, this one has {key}={value!r}"):
        train.main(two_steps(world, out, **{key: value}))


def test_an_input_that_comes_or_goes_is_another_run(world, out, clip_folder, qwen_folder):
    with pytest.raises(UserError, match="holds a run with student="):
        train.main(two_steps(world, out, student="", vision=clip_folder, llm=qwen_folder))


# -----------------------------------------------------------------------------
# Two runs, and the log

@pytest.mark.parametrize("there", [True, False], ids=["interrupted", "absent"])
def test_a_run_that_ends_while_the_second_one_starts(world, whole, tmp_path, monkeypatch, there):
    """The second run has looked at the folder, and loads its model; meanwhile the first one saves and ends."""
    out, arguments = tmp_path / "out", two_steps(world, tmp_path / "out")
    if there:
        shutil.copytree(whole, out)
        unfinish(out)
        newest(out).unlink()
    original = train.open_student

    def slowly(config, device):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(whole, out)
        return original(config, device)

    with monkeypatch.context() as patch:
        patch.setattr(train, "open_student", slowly)
        with pytest.raises(UserError, match="another run has saved this state in the meantime; repeat the same command"):
            train.main(arguments)
    assert contents(out).keys() == {out / path.relative_to(whole) for path in contents(whole)}
    assert all(path.read_bytes() == (whole / path.relative_to(out)).read_bytes() for path in contents(out))
    train.main(arguments)                                            # "finished already"


def test_a_finished_run_is_only_looked_at(world, whole, monkeypatch, capsys):
    """So it may lie on a read-only disk."""
    monkeypatch.setattr(resume, "claim", None)
    before = contents(whole)
    train.main(two_steps(world, whole))
    assert "finished already" in capsys.readouterr().out and contents(whole) == before


def test_first_losses_of_a_log_that_a_user_has_edited(tmp_path):
    losses = [2.5, None, "x", [1.0], True, 10 ** 400, 1.5]
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses)]
    lines = ['{"step": 1}', '{"step": 1, "note": "a\u2028\ufffd"}', *lines, ""]
    (tmp_path / "log.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert resume.first_losses(tmp_path, 20) == [2.5, 1.5] and resume.first_losses(tmp_path, 3) == [2.5]
    assert resume.first_losses(tmp_path / "none", 3) == []


@pytest.mark.parametrize("broken", ['{"step": 2, "lo', "", "5", '"x"', "{}", '{"step": "2"}', "\x00" * 9, "[" * 100_000])
def test_a_broken_line_in_the_middle_of_the_log_takes_no_other_with_it(tmp_path, capsys, broken):
    claim(tmp_path, resume.OWNER)
    release(tmp_path)
    lines = [json.dumps({"step": step}) for step in (1, 2, 3, 4)]
    (tmp_path / "log.jsonl").write_text("\n".join([lines[0], broken, *lines[2:], '{"step": 5, "l']))
    resume.go_back(tmp_path, 3)
    assert [record["step"] for record in records(tmp_path)] == [1, 3]
    assert capsys.readouterr().err.startswith(f"{tmp_path / 'log.jsonl'} line 2: damaged, left out")
