"""
On-policy distillation: what the student samples, what of it is supervised, and that it does not depend on how a batch
is cut. Runs of train.py with it: test_signals.py.

    python -m pytest tests/test_on_policy.py
"""
import json

import pytest
import torch

import data
import train
from configurator import Config, UserError
from engine import on_policy
from engine.distributed import init_distributed
from engine.index import InstructionData
from engine.on_policy import answer_starts, is_on_policy, sample_answers
from model import Llava
from test_train import flags, records


@pytest.fixture(scope="module", params=["dense", "sparse"])
def student(world, request):
    return Llava.from_pretrained(world / request.param)


@pytest.fixture(scope="module")
def teacher(world):
    return Llava.from_pretrained(world / "teacher").requires_grad_(False)


@pytest.fixture(scope="module")
def dataset(world):
    return open_dataset(world, world / "rows.json", Llava.from_pretrained(world / "dense"))


def open_dataset(world, file, llava, max_length=2048):
    return InstructionData([(str(file), 1.0)], str(world / "images"), llava.tokenizer, "vicuna", 4, 28, max_length)


def settings(**more):
    return Config(train.DEFAULTS, stage="d2d", teacher="one", on_policy=1.0, on_policy_tokens=12, **more)


def batch_of(dataset, student, rows):
    return data.collate([dataset[row] for row in rows], student.config.pad_token_id)


def answer_of(batch, i):
    """The supervised ids of a row of a sampled batch, and the row's prompt."""
    ids, mask = batch["input_ids"][i], batch["mask"][i]
    first = int(mask.nonzero()[0])
    assert mask[first:first + int(mask.sum())].all()                 # one run
    return ids[mask].tolist(), ids[:first].tolist()


# Rows of the world: 0 has two turns, 3 and 11 two images, 7 none, the others one turn and one image.
ROWS = [0, 3, 7, 1, 4, 11]


# -----------------------------------------------------------------------------
# The coin

def test_the_share_of_on_policy_steps_is_the_probability():
    """10,000 throws: the standard deviation of the share is 0.005 at most."""
    for p in (0.1, 0.5, 0.8):
        throws = [is_on_policy(Config(on_policy=p, seed=seed), step) for seed in range(100) for step in range(1, 101)]
        assert sum(throws) / len(throws) == pytest.approx(p, abs=0.02)
    for seed in range(3):                                            # along one run, too
        run = [is_on_policy(Config(on_policy=0.5, seed=seed), step) for step in range(1, 2001)]
        assert sum(run) / len(run) == pytest.approx(0.5, abs=0.05)


def test_all_steps_or_none():
    steps = [(seed, step) for seed in range(20) for step in range(1, 101)]
    assert all(is_on_policy(Config(on_policy=1.0, seed=seed), step) for seed, step in steps)
    assert not any(is_on_policy(Config(on_policy=0.0, seed=seed), step) for seed, step in steps)


def test_random_numbers_of_rows_and_coin_are_independent(dataset, student, monkeypatch):
    """A row's numbers do not depend on the batch, differ between rows, steps and seeds, and are not the coin's."""
    drawn = {}

    def spy(input_ids, pixels, max_new, temperature, uniforms, banned):
        drawn[key] = uniforms
        return torch.full((len(input_ids), 1), student.config.eos_token_id)

    monkeypatch.setattr(student, "generate", spy)
    batch = batch_of(dataset, student, [0, 1])
    config = Config(settings(), on_policy=0.5)
    heads = [step for step in range(1, 400) if is_on_policy(config, step)]
    for key in heads:
        sample_answers(student, batch, [0, 1], config, key)
    first = torch.stack([drawn[step][:, 0] for step in heads])       # (steps, 2), the numbers of the first tokens
    assert first.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.07) and first.max() > 0.95
    assert len(set(torch.cat([drawn[step].flatten() for step in heads]).tolist())) == 2 * 12 * len(heads)
    key = "swapped"
    sample_answers(student, batch, [1, 0], config, heads[0])
    assert torch.equal(drawn["swapped"], drawn[heads[0]].flip(0))
    key = "seed"
    sample_answers(student, batch, [0, 1], Config(config, seed=1), heads[0])
    assert (drawn["seed"] != drawn[heads[0]]).all()


def test_an_answer_that_cannot_be_sampled_ends_the_run_after_a_save(world, tmp_path, monkeypatch):
    def sample(student, batch, rows, config, step):
        if step == 3:
            raise UserError("the model's logits are NaN")
        return sample_answers(student, batch, rows, config, step)
    monkeypatch.setattr(train, "sample_answers", sample)
    with pytest.raises(UserError, match="the model's logits are NaN"):
        train.main(flags(world, "d2d", tmp_path, max_steps=4, on_policy=1.0, on_policy_tokens=4))
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step_00000002.pt"]


# -----------------------------------------------------------------------------
# What is sampled

@torch.no_grad()
def greedy(student, prompt, pixels, tokens, banned):
    """Token by token, without a cache."""
    ids, ends = list(prompt), student.config.eos_token_id
    for _ in range(tokens):
        logits = student(torch.tensor([ids]), pixels)[0, -1]
        logits[banned] = -torch.inf
        ids.append(int(logits.argmax()))
        if ids[-1] == ends:
            break
    return ids[len(prompt):]


def test_at_temperature_0_the_answers_are_those_of_generate(dataset, student):
    batch = batch_of(dataset, student, ROWS)
    sampled, counts = sample_answers(student, batch, ROWS, settings(on_policy_temperature=0.0), 1)
    banned = student.unanswerable_ids()
    for i, row in enumerate(ROWS):
        answer, prompt = answer_of(sampled, i)
        sample = dataset[row]
        pixels = torch.stack(sample["images"]) if sample["images"] else None
        generated = student.generate(torch.tensor([prompt]), pixels, 12, banned=banned)[0].tolist()
        assert answer == generated == greedy(student, prompt, pixels, 12, banned)
        assert prompt == sample["input_ids"][:len(prompt)]           # multi-turn rows keep the data's history
        last = len(sample["mask"]) - 1 - sample["mask"][::-1].index(0)   # where the last question ends
        assert len(prompt) == last + 1
    assert counts == {"answers": 6, "answer_tokens": int(sampled["mask"].sum()),
                      "unfinished": sum(answer_of(sampled, i)[0][-1] != student.config.eos_token_id for i in range(6))}
    assert sampled["sampled"].shape == (6,) and torch.equal(sampled["pixel_values"], batch["pixel_values"])


def test_at_temperature_1_the_answers_follow_the_students_distribution(dataset, student):
    """1,500 first tokens against softmax(logits / T): for each of the likely ones within 4 standard deviations."""
    batch, config = batch_of(dataset, student, [1]), Config(settings(), on_policy_tokens=1, on_policy_temperature=20.0)
    many = {"input_ids": batch["input_ids"].repeat(300, 1), "mask": batch["mask"].repeat(300, 1),
            "pixel_values": batch["pixel_values"].repeat(300, 1, 1, 1)}
    counts = torch.zeros(64)
    for step in range(5):
        sampled, _ = sample_answers(student, many, list(range(300)), config, step)
        counts += torch.bincount(sampled["input_ids"][sampled["mask"]], minlength=64)
    prompt = answer_of(sampled, 0)[1]
    with torch.no_grad():
        logits = student(torch.tensor([prompt]), batch["pixel_values"])[0, -1]
    logits[student.unanswerable_ids()] = -torch.inf
    p = (logits / 20).softmax(-1)
    assert counts[p == 0].sum() == 0 and counts.sum() == 1500
    assert ((counts - 1500 * p).abs() < 4 * (1500 * p * (1 - p)).sqrt() + 1e-6).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_rows_sampled_alone_and_together_give_the_same_answers(dataset, student, temperature):
    """In fp32: the batch may be cut into micro-batches and over ranks in any way."""
    config = settings(on_policy_temperature=temperature)
    together, counts = sample_answers(student, batch_of(dataset, student, ROWS), ROWS, config, 3)
    alone = [sample_answers(student, batch_of(dataset, student, [row]), [row], config, 3) for row in ROWS]
    for i, (batch, _) in enumerate(alone):
        assert answer_of(batch, 0) == answer_of(together, i)
    assert counts == {key: sum(count[key] for _, count in alone) for key in counts}


def test_a_row_that_was_cut_after_an_unanswered_image(world, tmp_path, student):
    """max_length leaves the second question's image, but not its answer: the first answer is the last one."""
    row = {"image": ["0.png", "1.png"], "conversations": [
        {"from": "human", "value": "<image>\nwhat is there"}, {"from": "gpt", "value": "a red cup"},
        {"from": "human", "value": "and is the blue cat in the image <image>"}, {"from": "gpt", "value": "no"}]}
    (tmp_path / "rows.json").write_text(json.dumps([row, row]))
    whole = open_dataset(world, tmp_path / "rows.json", student)[0]
    length = max(t for t, token in enumerate(whole["input_ids"]) if token == student.config.image_token_id) + 2
    cut = open_dataset(world, tmp_path / "rows.json", student, length)
    batch = batch_of(cut, student, [0, 1])
    assert len(batch["pixel_values"]) == 4 and answer_starts(batch["mask"]) == [whole["mask"].index(1)] * 2
    sampled, _ = sample_answers(student, batch, [0, 1], settings(), 1)
    assert torch.equal(sampled["pixel_values"], batch["pixel_values"][[0, 2]])
    assert answer_of(sampled, 0)[1] == whole["input_ids"][:whole["mask"].index(1)]
    student.hidden_states(sampled["input_ids"], student.encode_images(sampled["pixel_values"]))


# -----------------------------------------------------------------------------
# What is supervised

def test_ids_and_mask_worked_by_hand(dataset, student, monkeypatch):
    """An empty answer, one with an end token, one that reached the limit: no end token is made up for it."""
    end, pad = student.config.eos_token_id, student.config.pad_token_id
    monkeypatch.setattr(student, "generate", lambda *_, **more: torch.tensor(
        [[end, pad, pad], [5, end, pad], [5, 6, 7], [end, 5, 6]]))
    rows = [1, 3, 7, 0]
    sampled, counts = sample_answers(student, batch_of(dataset, student, rows), rows, settings(), 1)
    assert [answer_of(sampled, i)[0] for i in range(4)] == [[end], [5, end], [5, 6, 7], [end]]
    assert counts == {"answers": 4, "answer_tokens": 7, "unfinished": 1}
    at = train.add_positions(sampled, student.config, settings())
    T = sampled["input_ids"].shape[1]
    for i in range(4):
        answer, prompt = answer_of(sampled, i)
        p, n = len(prompt), len(answer)
        for kind in ("is_response", "is_distilled"):                 # those that predict the answer's tokens, no others
            positions = at["head"][at[kind]]
            assert positions[positions // T == i].tolist() == [i * T + t for t in range(p - 1, p + n - 1)]
        assert sampled["input_ids"][i, p + n:].eq(pad).all() and not sampled["mask"][i, p + n:].any()


def test_the_end_token_is_supervised_when_it_was_sampled(dataset, student):
    """At a high temperature most tokens are equally likely: short, empty and unfinished answers all come up."""
    end, kinds = student.config.eos_token_id, set()
    for step in range(8):
        sampled, counts = sample_answers(student, batch_of(dataset, student, ROWS), ROWS,
                                         Config(settings(on_policy_temperature=1e3), on_policy_tokens=30), step)
        unfinished = 0
        for i in range(len(ROWS)):
            answer, _ = answer_of(sampled, i)
            assert end not in answer[:-1] and len(answer) <= 30
            assert answer[-1] == end or len(answer) == 30
            unfinished += answer[-1] != end
            kinds.add("empty" if answer == [end] else "ended" if answer[-1] == end else "unfinished")
            assert not set(answer) & set(student.unanswerable_ids())
        assert counts["unfinished"] == unfinished and counts["answer_tokens"] == sampled["mask"].sum()
    assert kinds == {"empty", "ended", "unfinished"}


def slow_kl(student, teacher, sampled, shift=0):
    """Mean KL(teacher || student) over the tokens of the answers, each row alone; `shift` moves the positions."""
    values, image = [], 0
    for i in range(len(sampled["input_ids"])):
        answer, prompt = answer_of(sampled, i)
        ids = torch.tensor([prompt + answer])
        n_images = int((ids == student.config.image_token_id).sum()) // 4
        pixels = sampled["pixel_values"][image:image + n_images] if n_images else None
        image += n_images
        with torch.no_grad():
            log_p, log_q = (llava(ids, pixels)[0, :, :64].double().log_softmax(-1) for llava in (teacher, student))
        for k in range(len(answer)):                                 # the logits before a token predict it
            t = len(prompt) + k - 1 + shift
            if t < ids.shape[1]:
                values.append((log_p[t].exp() * (log_p[t] - log_q[t])).sum().item())
    return sum(values) / len(values)


def test_teacher_and_student_are_compared_where_they_predict_the_answer(dataset, student, teacher):
    """Against a slow loop; one position more to the left or to the right gives another value."""
    rows, config = ROWS, settings(on_policy_temperature=30.0)
    sampled, _ = sample_answers(student, batch_of(dataset, student, rows), rows, config, 2)
    objective = train.Objective(student, config)
    expected = slow_kl(student, teacher, sampled)

    def distilled(batch):
        batch = train.add_positions(batch, student.config, config)
        total = train.count_batch([batch], config)
        reference = train.teacher_reference(teacher, batch, teacher.encode_images(batch["pixel_values"]), config)
        loss, parts = objective(batch, student.encode_images(batch["pixel_values"]), reference, total)
        return parts["kd"].item(), loss.item()

    kd, loss = distilled(sampled)
    assert kd == pytest.approx(expected, rel=1e-5) and "sampled" in sampled
    for shift in (-1, 1):
        moved = sampled | {"mask": sampled["mask"].roll(shift, dims=1)}
        assert abs(distilled(moved)[0] - expected) > 1e-2 * expected
        assert abs(slow_kl(student, teacher, sampled, shift) - expected) > 1e-2 * expected


def test_no_gradient_goes_through_the_sampling(dataset, student, teacher):
    """The gradient of an on-policy step is that of the same answers given as data, the cross-entropy off."""
    config = settings(on_policy_temperature=1.0, balance_coef=0.0)
    with torch.enable_grad():
        sampled, _ = sample_answers(student, batch_of(dataset, student, ROWS), ROWS, config, 5)
    assert not any(value.requires_grad for value in sampled.values())
    assert all(parameter.grad is None for parameter in student.parameters())
    objective, gradients = train.Objective(student, config), []
    as_data = {key: value.clone() for key, value in sampled.items() if key != "sampled"}
    for batch, ce_weight in ((sampled, 1.0), (as_data, 0.0)):
        objective.config = Config(config, ce_weight=ce_weight)
        batch = train.add_positions(batch, student.config, config)
        total = train.count_batch([batch], config)
        reference = train.teacher_reference(teacher, batch, teacher.encode_images(batch["pixel_values"]), config)
        loss, parts = objective(batch, student.encode_images(batch["pixel_values"]), reference, total)
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
        student.zero_grad()
        assert ("ce" in parts) == ("sampled" not in batch)
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


# -----------------------------------------------------------------------------
# In a run

@pytest.mark.parametrize("stage", ["d2d", "d2s"])
def test_the_log_of_on_policy_steps(world, tmp_path, stage):
    """Their cross-entropy is neither in the loss nor in the log, and every other number of them is."""
    more = dict(ce_weight=0.4, kd_weight=0.7, on_policy=0.5, on_policy_tokens=5, max_steps=6)
    if stage == "d2s":
        more["balance_coef"] = 0.05
    train.main(flags(world, stage, tmp_path, **more))
    log = records(tmp_path)
    config = Config(on_policy=0.5, seed=0)
    assert [record["on_policy"] for record in log] == [int(is_on_policy(config, step)) for step in range(1, 7)]
    assert {record["on_policy"] for record in log} == {0, 1}
    for record in log:
        balance = 0.05 * record["balance"] if stage == "d2s" else 0
        if record["on_policy"]:
            assert "ce" not in record and record["loss"] == pytest.approx(0.7 * record["kd"] + balance, abs=1e-5)
            assert 1 <= record["answer_tokens"] <= 5 and 0 <= record["unfinished"] <= 8
            assert 0 < record["generation_s"] <= record["seconds"]
        else:
            assert record["loss"] == pytest.approx(0.7 * record["kd"] + 0.4 * record["ce"] + balance, abs=1e-5)
            assert record.keys().isdisjoint({"answer_tokens", "unfinished", "generation_s"})


def test_a_run_without_it_logs_nothing_of_it(world, tmp_path):
    train.main(flags(world, "d2s", tmp_path, max_steps=1))
    assert records(tmp_path)[0].keys().isdisjoint({"on_policy", "answer_tokens", "unfinished", "generation_s"})


def test_every_step_on_policy_with_features_and_another_loss(world, tmp_path):
    train.main(flags(world, "d2d", tmp_path, max_steps=3, on_policy=1.0, on_policy_tokens=4, kd_loss="reverse",
                     hidden_weight=0.5, hidden_tokens="all", affinity_weight=0.3, relation_weight=0.2))
    for record in records(tmp_path):
        parts = {"kd": 1.0, "hidden": 0.5, "affinity": 0.3, "relation": 0.2}
        assert record["on_policy"] == 1 and "ce" not in record
        assert record["loss"] == pytest.approx(sum(w * record[name] for name, w in parts.items()), abs=1e-5)


def test_the_sampled_rows_are_those_of_the_step(world, tmp_path, monkeypatch):
    """The random numbers of a row belong to its number in the data set, in each micro-batch."""
    seen, original = [], on_policy.sample_answers

    def spy(student, batch, rows, config, step):
        seen.append((step, rows, [dataset[row]["input_ids"] for row in rows], batch["input_ids"]))
        return original(student, batch, rows, config, step)

    llava = Llava.from_pretrained(world / "dense")
    dataset = open_dataset(world, world / "rows.json", llava)
    monkeypatch.setattr(train, "sample_answers", spy)
    train.main(flags(world, "d2d", tmp_path, max_steps=2, micro_batch_size=2, on_policy=1.0, on_policy_tokens=2))
    sampler = data.Sampler(dataset.lengths, 8, 0, dataset.sources)
    assert [step for step, *_ in seen] == [1] * 4 + [2] * 4
    for step in (1, 2):
        rows = [row for at, numbers, *_ in seen if at == step for row in numbers]
        assert rows == sampler.batch(step - 1)
    for _, _, expected, ids in seen:
        for row, found in zip(expected, ids):
            assert found[:len(row)].tolist() == row and found[len(row):].eq(llava.config.pad_token_id).all()


def test_sampling_compiles_nothing(world, dataset, student):
    """Each length of the cache would be another graph, until dynamo gives up on the training step's as well."""
    from torch._dynamo.testing import CompileCounter
    counter = CompileCounter()
    for block in student.decoder.blocks:
        block.compile(backend=counter)
    sampler = data.Sampler(dataset.lengths, 8, 0, dataset.sources)
    config = Config(settings(), dtype="float32", batch_size=8, micro_batch_size=4)
    run = train.Run(config, init_distributed("cpu"), student, None, None, None, None, {}, sampler=sampler)
    micro_batches = [batch_of(dataset, student, rows) for rows in data.micro_batches(sampler.batch(0), 4)]
    sampled, counts = train.sample_step(run, micro_batches, 1)
    assert counter.frame_count == 0 and counts["answers"] == 8 and len(sampled) == 2
    for block in student.decoder.blocks:
        block._compiled_call_impl = None
