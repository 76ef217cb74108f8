"""
bench.py at toy sizes: do both sides of every comparison compute the same thing, and do its instruments measure right?

    python -m pytest tests/test_bench.py

Nothing here looks at a time.
"""
import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    bench.main(["--quick", "--repeats=2", "--device=cpu", f"--out={path}"])
    return json.loads(path.read_text())


def values(report, section, measure):
    """{case + measure: value} of the rows whose measure begins so."""
    return {f"{row['case']}, {row['measure']}": row["value"] for row in report["sections"][section]
            if row["measure"].startswith(measure)}


def test_every_section_reports_what_it_promises(report):
    promised = {
        "loss": ["time", "memory above inputs"],
        "moe": ["time", "speed of the bare matrix products"],
        "step": ["samples per second", "share of that speed", "memory, all included", "memory above weights"],
        "generate": ["speed, all", "speed, prompt and first token", "speed, each further token"],
        "data": ["images per second", "of all tokens"],
    }
    assert report["sections"].keys() == promised.keys() == bench.SECTIONS.keys()
    for section, measures in promised.items():
        for measure in measures:
            found = values(report, section, measure)
            assert found and all(value is not None for value in found.values()), (section, measure)
    assert {"cpu", "threads", "device", "python", "torch", "transformers"} <= report["machine"].keys()
    for rows in report["sections"].values():
        for row in rows:
            if row["target"]:
                relation, bound = row["target"].split()
                assert row["met"] == (row["value"] <= float(bound) if relation == "<=" else row["value"] >= float(bound))
            if "ours" in row and row["unit"] == "s":
                assert len(row["ours"]) == len(row["peer"]) == len(row["ratios"]) == 2


def test_our_results_are_those_of_the_peers(report):
    def check(section, measure, bound, where="", count=1):
        found = {name: value for name, value in values(report, section, measure).items() if where in name}
        assert len(found) >= count and all(value <= bound for value in found.values()), found

    check("loss", "largest relative difference", 0.02, count=7)                 # bf16 products, summed in another order
    check("moe", "largest relative difference", 1e-5, "fp32", count=6)          # three shapes, two ways of transformers
    check("moe", "largest relative difference", 0.03, "bf16", count=6)
    check("step", "largest relative difference", 1e-5, count=4)                 # loss, gradient norm, adaptor; in fp32
    check("data", "largest difference of 255", 1.0)
    same = values(report, "generate", "tokens as transformers'")
    assert len(same) == 4 and all(value == 100 for name, value in same.items() if "fp32" in name), same
    check("generate", "our tokens behind", 0.1, count=4)


def test_the_memory_of_a_known_allocation_is_found(monkeypatch):
    def allocate(case, side, size, args):
        return lambda: torch.ones(int(side) * 2 ** 18).sum()                    # so many MiB, dead at the end
    monkeypatch.setitem(bench.CASES, "loss", allocate)
    found = bench.measure_memory("loss", "any", "200", bench.parse(["--quick", "--device=cpu"]))
    assert 199 <= found["above"] / 2 ** 20 < 210 and found["total"] > found["above"]


def test_memory_is_measured_in_a_process_of_its_own():
    command = [sys.executable, bench.__file__, "loss", "--memory=ce frozen,ours", "--quick", "--device=cpu"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0 <= found["above"] < found["total"]


def test_sides_take_turns():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = bench.take_turns(runs, bench.parse(["--repeats=3", "--device=cpu"]))
    assert "".join(order) == "ababab" and [len(each) for each in seconds.values()] == [3, 3]


@pytest.mark.parametrize("stage, images", [("d2s", 2), ("pd", 1)])
def test_the_products_counted_are_those_that_run(stage, images, tmp_path):
    """Against torch's own counter on our step. The router's products and attention's are not in the list."""
    size = bench.QUICK["step"]
    args = bench.parse(["--quick", "--device=cpu"])
    args.folder = tmp_path
    bench.save_pair(size, args)
    step = bench.our_step(stage, "ours", size, args)
    with FlopCounterMode(display=False) as counter:
        step()
    counted = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    T, D, E = size["rows"] * (size["vision"].patches + size["response"]), size["student"].n_embd, 4
    _, listed = bench.bare_products(bench.step_products(size, images), torch.float32, "cpu")
    assert listed + 3 * 2 * T * D * E == counted


def test_ratios_are_of_the_same_round_and_a_missed_target_says_so(capsys):
    row = bench.cost("case", "time", [1.0, 4.0, 3.0], [1.0, 2.0, 2.0], "peer", "<= 1.2")
    assert row["ratios"] == [1.0, 2.0, 1.5] and row["value"] == 1.5 and bench.is_met(row) is False
    row2 = bench.speed("case", "speed", [1.0, 2.0], [4.0, 4.0], "peer", ">= 2.5")
    assert row2["ratios"] == [4.0, 2.0] and row2["value"] == 3.0 and bench.is_met(row2) is True
    alone = bench.speed("case", "alone", [1.0], None, "peer", ">= 2")
    assert bench.is_met(alone) is None
    bench.print_table("title", [row, row2, alone])
    lines = capsys.readouterr().out.splitlines()
    assert "**missed**" in lines[-3] and lines[-2].endswith("| met |") and "peer not installed" in lines[-1]
