"""
tools/bench.py at toy sizes: do both sides of every comparison compute the same? And does tools/measure.py measure well?

    python -m pytest tests/test_bench.py

Nothing here looks at a time.
"""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from configurator import Config, UserError
from tools import bench, measure

ROOT = Path(bench.__file__).parents[1]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    bench.main(["--quick", "--repeats=2", "--device=cpu", f"--out={path}"])
    return json.loads(path.read_text())


@pytest.fixture
def options(tmp_path):
    return Config(bench.DEFAULTS, device="cpu", quick=True, repeats=3, folder=str(tmp_path))


def rows_of(report, section, measure):
    return [row for row in report["sections"][section] if row["measure"].startswith(measure)]


def test_every_section_reports_what_it_promises(report):
    promised = {
        "loss": ["time", "memory above inputs"],
        "moe": ["time", "bare matrix products"],
        "step": ["speed", "memory, all included", "memory above weights"],
        "signals": ["time", "memory, all included", "memory above weights"],
        "generate": ["tokens per second", "prompt and first token", "further tokens"],
        "data": ["images per second", "padding, of all tokens"],
        "cache": ["time", "memory, all included"],
    }
    assert report["sections"].keys() == promised.keys() == bench.SECTIONS.keys()
    for section, names in promised.items():
        for name in names:
            rows = rows_of(report, section, name)
            assert rows and all(row["value"] is not None for row in rows), (section, name)
    assert {"cpu", "threads", "device"} <= report["machine"].keys()
    assert {"python", "torch", "transformers"} <= report["versions"].keys()


def test_our_results_are_those_of_the_peers(report):
    def check(section, measure, bound, kind="", count=1):
        values = {f"{row['case']}, {row['measure']}": row["value"] for row in rows_of(report, section, measure)
                  if kind in row["case"]}
        assert len(values) == count and all(value <= bound for value in values.values()), values

    check("loss", "largest relative difference", 0.02, count=9)                 # bf16 products, summed in another order
    check("moe", "largest relative difference", 1e-5, "fp32", count=6)          # three shapes, transformers' two ways
    check("moe", "largest relative difference", 0.03, "bf16", count=6)
    check("step", "largest relative difference", 1e-5, count=4)                 # loss, gradient norm, adaptor; in fp32
    check("data", "largest difference, of 255", 1.0)
    check("generate", "our tokens' logits below", 0.1, count=4)
    same = [row for row in rows_of(report, "generate", "tokens equal") if "fp32" in row["case"]]
    assert len(same) == 2 and all(row["value"] == 1 for row in same), same


def test_memory_of_a_known_allocation_is_found(monkeypatch, options):
    def allocate(case, side, size, options):
        return lambda: torch.ones(int(side) * 2 ** 18).sum()                    # so many MiB, freed at the end

    monkeypatch.setitem(bench.CASES, "loss", allocate)
    found = bench.measure_memory("loss", "any", "200", options)
    assert 199 <= found["above"] / 2 ** 20 < 210 and found["total"] > found["above"]


def test_memory_is_measured_in_a_process_of_its_own():
    command = [sys.executable, "-m", "tools.bench", "--sections=loss", "--memory=ce frozen,ours", "--quick",
               "--device=cpu"]
    found = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert 0 <= found["above"] < found["total"]


def test_sides_take_turns(options):
    order = []
    seconds = measure.take_turns({name: lambda name=name: order.append(name) for name in "ab"}, options)
    assert "".join(order) == "ababab" and [len(each) for each in seconds.values()] == [3, 3]


@pytest.mark.parametrize("stage", ["d2s", "pd"])
def test_the_products_listed_are_those_that_run(stage, options):
    """Against torch's own counter, on a step of ours. The list leaves out the routers' products and attention's."""
    size = bench.QUICK["step"]
    bench.save_pair(size, options.folder, True, "cpu")
    step = bench.our_step(stage, size, options)
    with FlopCounterMode(display=False) as counter:
        step()
    counted = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    tokens, D, E = size["rows"] * (size["vision"].patches + size["response"]), size["student"].n_embd, 4
    _, listed = measure.bare_products(bench.describe_step(stage, size, options)[0], torch.float32, "cpu")
    assert listed + 3 * 2 * tokens * D * E == counted


@pytest.mark.parametrize("sparse", [False, True])
def test_the_products_listed_for_a_prompt_are_those_that_run(sparse):
    size = bench.QUICK["generate"]
    llava, batch = bench.make_llava(size["student"], size["vision"], 0, sparse, "cpu"), bench.make_batch(size, "cpu")
    llava.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        llava.generate(batch["input_ids"], batch["pixel_values"], max_new_tokens=1)
    counted = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    routers = sparse * 2 * batch["input_ids"].numel() * size["student"].n_embd * 4
    _, listed = measure.bare_products(bench.prompt_products(llava, batch["input_ids"]), torch.float32, "cpu")
    assert listed + routers == counted


def test_ratios_are_taken_round_by_round_and_a_missed_target_says_so():
    missed = measure.row("case", "time", "s", [1.0, 4.0, 3.0], [1.0, 2.0, 2.0], "peer", "<= 1.2")
    assert missed["each"] == [1.0, 2.0, 1.5] and missed["value"] == 1.5 and missed["met"] is False
    assert measure.show(missed) == "| case | time | 3 s | 2 s (peer) | x 1.5 (1 to 2) | <= 1.2 | **missed** |"
    met = measure.row("case", "share", "", 0.7, target=">= 0.6")
    assert met["met"] is True and measure.show(met) == "| case | share | 0.7  |  |  | >= 0.6 | met |"
    alone = measure.row("case", "speed", "/s", [1.0], None, "transformers, None", ">= 2")
    assert alone["met"] is None and "not installed" in measure.show(alone)


def test_every_signal_is_in_its_step(options):
    """Its term is in the loss, its tokens are counted, and the run of which time is taken, with models shared by all
    signals, computes what the run does whose memory is measured."""
    size = bench.QUICK["signals"]
    bench.save_pair(size, options.folder, False, "cpu")
    rows, patches, prompt, response = size["rows"], size["vision"].patches, size["prompt"], size["response"]
    text = prompt + response
    expected = {
        "KL": ({"ce", "kd"}, rows * response),
        "KL + hidden": ({"ce", "kd", "hidden"}, rows * response),
        "KL + affinity": ({"ce", "kd", "affinity"}, rows * response),
        "KL + relation": ({"ce", "kd", "relation"}, rows * response),
        "KL, prompt and response": ({"ce", "kd"}, rows * text),
        "KL, response and image": ({"ce", "kd"}, rows * (response + patches)),
        "KL, on-policy": ({"kd"}, rows * response),
    }
    assert expected.keys() == bench.SIGNALS.keys()
    shared, batch = bench.make_run(bench.make_config("d2d", size, options, hidden_weight=1.0, on_policy=1.0), size)
    for case, (names, tokens) in expected.items():
        config = bench.make_config("d2d", size, options, **bench.SIGNALS[case])
        alone, _ = bench.make_run(config, size)
        losses = []
        for run in (alone, bench.with_settings(shared, config)):
            batch = train.add_positions(batch, run.student.config, config)
            batches = train.sample_step(run, [batch], 1)[0] if config.on_policy else [batch]
            total = train.count_batch(batches, config)
            loss, parts, grad_norm = train.train_step(run, batches, total, lr=0.0)
            assert parts.keys() == names and total["distilled"] == tokens, case
            terms = [parts[name].item() for name in names - {"ce"}]             # its weight is 0 in d2d
            assert loss == pytest.approx(sum(terms), rel=1e-6) and min(terms) > 0 and grad_norm > 0, case
            losses.append((loss, grad_norm))
        assert losses[0] == losses[1], case


def test_a_mistyped_section_or_device_is_named():
    with pytest.raises(UserError, match="--sections.*\"lose\".*loss, moe, step, signals, generate, evaluate, data, cache"):
        bench.main(["--sections=loss,lose"])
    with pytest.raises(UserError, match="device"):
        bench.main(["--device=tpu"])
