"""
bench.py at toy sizes: do both sides of every comparison compute the same, and do its instruments measure right?

    python -m pytest tests/test_bench.py

Nothing here looks at a time.
"""
import argparse
import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tools import bench


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    bench.main(["--quick", "--repeats=2", "--device=cpu", f"--out={path}"])
    return json.loads(path.read_text())


@pytest.fixture
def args(tmp_path):
    return argparse.Namespace(device="cpu", quick=True, repeats=3, folder=str(tmp_path))


def rows_of(report, section, measure):
    return [row for row in report["sections"][section] if row["measure"].startswith(measure)]


def test_every_section_reports_what_it_promises(report):
    promised = {
        "loss": ["time", "memory above inputs"],
        "moe": ["time", "bare matrix products"],
        "step": ["speed", "memory, all included", "memory above weights"],
        "generate": ["tokens per second", "prompt and first token", "further tokens"],
        "data": ["images per second", "padding, of all tokens"],
        "cache": ["time", "memory, all included"],
    }
    assert report["sections"].keys() == promised.keys() == bench.SECTIONS.keys()
    for section, measures in promised.items():
        for measure in measures:
            rows = rows_of(report, section, measure)
            assert rows and all(row["value"] is not None for row in rows), (section, measure)
    assert {"cpu", "threads", "device"} <= report["machine"].keys()
    assert {"python", "torch", "transformers"} <= report["versions"].keys()


def test_our_results_are_those_of_the_peers(report):
    def check(section, measure, bound, kind="", count=1):
        values = {f"{row['case']}, {row['measure']}": row["value"] for row in rows_of(report, section, measure)
                  if kind in row["case"]}
        assert len(values) == count and all(value <= bound for value in values.values()), values

    check("loss", "largest relative difference", 0.02, count=5)                 # bf16 products, summed in another order
    check("moe", "largest relative difference", 1e-5, "fp32", count=6)          # three shapes, transformers' two ways
    check("moe", "largest relative difference", 0.03, "bf16", count=6)
    check("step", "largest relative difference", 1e-5, count=4)                 # loss, gradient norm, adaptor; in fp32
    check("data", "largest difference, of 255", 1.0)
    check("generate", "our tokens' logits below", 0.1, count=4)
    same = [row for row in rows_of(report, "generate", "tokens equal") if "fp32" in row["case"]]
    assert len(same) == 2 and all(row["value"] == 1 for row in same), same


def test_memory_of_a_known_allocation_is_found(monkeypatch, args):
    def allocate(case, side, size, args):
        return lambda: torch.ones(int(side) * 2 ** 18).sum()                    # so many MiB, dead at the end
    monkeypatch.setitem(bench.CASES, "loss", allocate)
    found = bench.measure_memory("loss", "any", "200", args)
    assert 199 <= found["above"] / 2 ** 20 < 210 and found["total"] > found["above"]


def test_memory_is_measured_in_a_process_of_its_own():
    command = [sys.executable, bench.__file__, "loss", "--memory=ce frozen,ours", "--quick", "--device=cpu"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0 <= found["above"] < found["total"]


def test_sides_take_turns(args):
    order = []
    seconds = bench.take_turns({name: lambda name=name: order.append(name) for name in "ab"}, args)
    assert "".join(order) == "ababab" and [len(each) for each in seconds.values()] == [3, 3]


@pytest.mark.parametrize("stage", ["d2s", "pd"])
def test_the_products_listed_are_those_that_run(stage, args):
    """Against torch's own counter, on a step of ours. Only the routers' products and attention's are not in the list."""
    size = bench.QUICK["step"]
    bench.save_pair(size, args)
    step = bench.our_step(stage, size, args)
    with FlopCounterMode(display=False) as counter:
        step()
    counted = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    tokens, D, E = size["rows"] * (size["vision"].patches + size["text"]), size["student"].n_embd, 4
    _, listed = bench.bare_products(bench.describe_step(stage, size, args)[0], torch.float32, "cpu")
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
    _, listed = bench.bare_products(bench.prompt_products(llava, batch["input_ids"]), torch.float32, "cpu")
    assert listed + routers == counted


def test_ratios_are_taken_round_by_round_and_a_missed_target_says_so():
    missed = bench.row("case", "time", "s", [1.0, 4.0, 3.0], [1.0, 2.0, 2.0], "peer", "<= 1.2")
    assert missed["each"] == [1.0, 2.0, 1.5] and missed["value"] == 1.5 and missed["met"] is False
    assert bench.show(missed) == "| case | time | 3 s | 2 s (peer) | x 1.5 (1 to 2) | <= 1.2 | **missed** |"
    met = bench.row("case", "share", "", 0.7, target=">= 0.6")
    assert met["met"] is True and bench.show(met) == "| case | share | 0.7  |  |  | >= 0.6 | met |"
    alone = bench.row("case", "speed", "/s", [1.0], None, "transformers, None", ">= 2")
    assert alone["met"] is None and "not installed" in bench.show(alone)
