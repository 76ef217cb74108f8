"""
The study's statistics and its page, from the raw lines alone.

Per seed, arm minus reference. Over the n seeds that both have:

    interval     mean ± t · s / sqrt(n), with t the 97.5 % point of Student's distribution with n - 1 degrees of freedom
    sign test    how probable are so many seeds of one sign, or more, if both signs were equally likely? Two-sided, exact;
                 it cannot go below 2 / 2^n: 0.031 for 6 seeds, 0.002 for 10
    Holm         of m p-values the smallest is multiplied by m, the next by m - 1, ..., and none falls below an earlier
                 one: the probability of even one false finding in the family stays below the bound

The verdict follows the interval, by a rule: *reproduced* if it excludes 0 with the paper's sign, *opposite* if it
excludes 0 with the other, *undecided* if it holds 0. Where no paper claims anything: higher, lower or undecided.
"""
import math
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from configurator import UserError
from engine.files import read_rows, read_text, write_text
from tools.look import BLUE, GRAY, ORANGE, RED, is_number, new_figure, save
from tools.study_arms import ARMS, DATA_CURVE, OWN_SEEDS, QUESTIONS, Claim

BEGIN, END = "<!-- made by python -m tools.study --report: begin -->", "<!-- end -->"
COUNTED = range(100)            # seeds; later ones are for tuning
LABELS = {"score": "score", "f1": "POPE F1", "yes_no": "yes/no", "yes_rate": "yes %", "existence": "existence",
          "color": "color", "count": "count", "which": "which", "mean4": "mean of 4", "resp": "halluc. resp.",
          "ment": "halluc. ment.",
          "coverage": "coverage", "phantom": "phantoms", "kl": "KL", "kl_caption": "KL, captions",
          "agree_right": "as the teacher where right", "agree_wrong": "where wrong", "unseen_score": "score, unseen style"}
LOWER_IS_BETTER = ["resp", "ment", "phantom", "kl", "kl_caption"]
IN_NATS = ["kl", "kl_caption"]


# -----------------------------------------------------------------------------
# Statistics

# 97.5 % points of Student's t for 1, 2, ... degrees of freedom (tests/test_study.py integrates the density)
T_975 = [12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
         2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
         2.0452]


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % t interval: (mean, low, high)."""
    n = len(differences)
    t = T_975[min(n - 2, len(T_975) - 1)]                            # beyond 30 seeds that of 30: a little too wide
    half = t * stdev(differences) / math.sqrt(n) if n > 1 else math.inf
    return mean(differences), mean(differences) - half, mean(differences) + half


def sign_test(differences: list[float]) -> float:
    """Two-sided exact p; zeros say nothing and are dropped."""
    positive, negative = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    n = positive + negative
    tail = sum(math.comb(n, k) for k in range(min(positive, negative) + 1)) / 2 ** n
    return min(1.0, 2 * tail)


def holm(p_values: list[float]) -> list[float]:
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def verdict(low: float, high: float, sign: int) -> str:
    if low <= 0 <= high:
        return "undecided"
    seen = 1 if low > 0 else -1
    if sign == 0:
        return "higher" if seen > 0 else "lower"
    return "reproduced" if seen == sign else "opposite"


# -----------------------------------------------------------------------------
# From the lines to the comparisons

class Finding(NamedTuple):
    claim: Claim
    n: int
    mean: float
    low: float
    high: float
    wins: int                   # seeds in which the arm is better
    p: float
    p_holm: float
    verdict: str


Lines = dict[tuple[str, int], dict]


def read_results(path: Path) -> Lines:
    """{(arm, seed): line}, of counted and of tuning seeds."""
    lines = {}
    for where, line in read_rows(path, hint="run python -m tools.study first"):
        require_line(where, line, lines)
        lines[line["arm"], line["seed"]] = line
    return lines


def require_line(where: str, line: object, others: Lines) -> None:
    """UserError unless it is a whole line, of a known arm, and none of `others` has its arm and seed."""
    try:
        scores, cpu_s = line["scores"], line["cpu_s"]
        numbers = [line["seed"], line["flops"], cpu_s["training"], cpu_s["judging"], *cpu_s["shared"].values()]
        numbers += [scores[name] for name in LABELS if name == "score" or scores[name] is not None]     # None: over nothing
        fits = line["arm"] in ARMS and all(map(is_number, numbers)) and (line["arm"], line["seed"]) not in others
    except (LookupError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise UserError(f"{where}: expected a run of a known arm, with each arm and seed once; restore the file")


def compare(question: list[Claim], lines: Lines, seeds: range) -> list[Finding]:
    """The claims of a question that have at least two seeds."""
    rows = []
    for claim in question:
        pairs = [(lines[claim.arm, seed]["scores"][claim.metric], lines[claim.reference, seed]["scores"][claim.metric])
                 for seed in seeds if (claim.arm, seed) in lines and (claim.reference, seed) in lines]
        differences = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
        if len(differences) > 1:
            rows.append((claim, differences))
    findings = []
    for (claim, differences), p_holm in zip(rows, holm([sign_test(differences) for _, differences in rows])):
        average, low, high = interval(differences)
        better = -1 if claim.metric in LOWER_IS_BETTER else 1
        findings.append(Finding(claim, len(differences), average, low, high, sum(better * d > 0 for d in differences),
                                sign_test(differences), p_holm, verdict(low, high, claim.sign)))
    return findings


# -----------------------------------------------------------------------------
# The page

def write_report(results: Path, page: Path, assets: Path) -> None:
    """Replace what is between BEGIN and END in `page`, or make the page; draw the figures."""
    everything = read_results(results)
    lines = {key: line for key, line in everything.items() if key[1] in COUNTED}
    tuning = {key: line for key, line in everything.items() if key[1] not in COUNTED}
    findings = {question.title: compare(question.claims, lines, question.seeds) for question in QUESTIONS}
    findings = {title: some for title, some in findings.items() if some}
    fresh = {key: line for key, line in lines.items() if key[1] in OWN_SEEDS}
    first = {key: line for key, line in lines.items() if key not in fresh}      # apart: only a few arms have those
    arms = ["## All arms\n\nMeans over the seeds; different arms may have different seeds, so differences belong to the "
            "tables above. Hallucination, phantoms (captions that name a missing partner) and KL: lower is better.\n\n"
            + arms_table(first)]
    if fresh:
        seeds = sorted({seed for _, seed in fresh})
        arms.append(f"The same on the seeds {seeds[0]} to {seeds[-1]}:\n\n{arms_table(fresh)}")
    body = "\n\n".join([tuning_table(tuning), summary(lines), operating_point(first), *question_tables(findings, lines), *arms,
                        undecided(findings), compute(lines)])
    text = read_text(page) if page.exists() else f"# The study\n\n{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{page}: lacks the line {BEGIN!r} or, after it, {END!r}; restore them")
    draw(findings, lines, assets)
    write_text(page, f"{before}{BEGIN}\n\n{body}\n\n{END}{after}")
    print(f"{page}: {len(lines)} counted runs, {len(tuning)} for tuning")


def tuning_table(lines: Lines) -> str:
    """Per arm its level, and the spread of its difference to sft, from which follows what ten seeds can see."""
    rows = []
    for name in ARMS:
        if not (seeds := [seed for arm, seed in lines if arm == name]):
            continue
        pairs = [(lines[name, seed]["scores"]["score"], lines["sft", seed]["scores"]["score"])
                 for seed in seeds if ("sft", seed) in lines]
        differences = [ours - theirs for ours, theirs in pairs]
        cells = ["", ""]
        if name != "sft" and len(differences) > 1:
            deviation = stdev(differences)
            cells = [f"{number(mean(differences), 'score')} ± {deviation:.1f}", f"{3.15 * deviation / math.sqrt(10):.1f}"]
        rows.append([name, str(len(seeds)), *(spread(lines, name, column) for column in ("f1", "mean4", "score", "kl")), *cells])
    return ("## On the tuning seeds\n\nMean ± standard deviation over seeds from 100 on; the last column is the difference of "
            "scores that ten seeds find in four of five cases (3.15 standard errors: the t quantiles of 97.5 and 80 %).\n\n" + table(
                ["arm", "n", *(LABELS[column] for column in ("f1", "mean4", "score", "kl")), "score − sft's", "10 seeds see"],
                rows))


def summary(lines: Lines) -> str:
    seeds = sorted({seed for _, seed in lines})
    return (f"{len(lines)} runs of {len({arm for arm, _ in lines})} arms on {len(seeds)} seeds. *Score* is the mean of the "
            "accuracies on yes/no questions, on existence and on color, in percent. Differences are arm minus reference, "
            "paired by seed, with a 95 % t interval; p is the exact sign test's, then after Holm's correction over the "
            "comparisons of the same table. Compute is training alone, from the warm student on: the ratio of FLOPs, and "
            "CPU seconds.\n\n![All differences with their intervals](../assets/study_findings.svg)")


def operating_point(lines: Lines) -> str:
    columns = ["f1", "yes_no", "existence", "color", "count", "which", "score", "kl"]
    rows = [[name, *(spread(lines, name, column) for column in columns)]
            for name in ("teacher", "warm", "sft", "kd", "paper") if values(lines, name, "score")]
    return "## The operating point\n\nMean ± standard deviation over the seeds.\n\n" + table(
        ["", *(LABELS[column] for column in columns)], rows)


def question_tables(findings: dict[str, list[Finding]], lines: Lines) -> list[str]:
    parts, seeds = [], {question.title: question.seeds for question in QUESTIONS}
    for title, some in findings.items():
        rows = []
        for finding in some:
            claim = finding.claim
            rows.append([name_of(claim), claim.says or "–", number(finding.mean, claim.metric),
                         f"{number(finding.low, claim.metric)} to {number(finding.high, claim.metric)}",
                         f"{finding.wins} of {finding.n}", f"{finding.p:.3f}, {finding.p_holm:.3f}", finding.verdict,
                         ratio(lines, claim, seeds[title])])
        parts.append(f"## {title}\n\n" + table(["arm − reference", "a paper says", "we see", "95 % interval", "better in",
                                                "p, after Holm", "verdict", "compute"], rows))
        if title == "How much data?":
            parts.append("![Score over scenes](../assets/study_data.svg)")
    return parts


def ratio(lines: Lines, claim: Claim, seeds: range) -> str:
    """The arm's FLOPs over the reference's, and the CPU seconds of both."""
    seeds = [seed for seed in seeds if (claim.arm, seed) in lines and (claim.reference, seed) in lines]
    pairs = [[mean(lines[arm, seed][key] if key == "flops" else lines[arm, seed][key]["training"] for seed in seeds)
              for arm in (claim.arm, claim.reference)] for key in ("flops", "cpu_s")]
    (ours, theirs), (our_seconds, their_seconds) = pairs
    times = f"×{ours / theirs:.2f}, " if theirs else ""
    return f"{times}{our_seconds:.0f} s, {their_seconds:.0f} s"


def arms_table(lines: Lines) -> str:
    columns = list(LABELS)
    rows = []
    for name in ARMS:
        if seeds := [seed for arm, seed in lines if arm == name]:
            cells = [f"{mean(scores):.{3 if column in IN_NATS else 1}f}" if (scores := values(lines, name, column)) else "–"
                     for column in columns]
            gflops = mean(lines[name, seed]["flops"] for seed in seeds) / 1e9
            seconds = mean(lines[name, seed]["cpu_s"]["training"] for seed in seeds)
            rows.append([name, str(len(seeds)), *cells, f"{gflops:,.0f}", f"{seconds:.0f}"])
    return table(["arm", "n", *(LABELS[column] for column in columns), "GFLOPs", "CPU s"], rows)


def undecided(findings: dict[str, list[Finding]]) -> str:
    lines = []
    for some in findings.values():
        for finding in some:
            line = (f"- {name_of(finding.claim)}: anything from {number(finding.low, finding.claim.metric)} to "
                    f"{number(finding.high, finding.claim.metric)} ({finding.n} seeds)")
            if finding.verdict == "undecided" and line not in lines:
                lines.append(line)
    return "## What stays undecided, and how large it could still be\n\n" + ("\n".join(lines) or "Nothing.")


def compute(lines: Lines) -> str:
    own = {key: sum(line["cpu_s"][key] for line in lines.values()) for key in ("training", "judging")}
    shared: dict[tuple[str, int], float] = {}
    for (_, seed), line in lines.items():
        shared |= {(name, seed): seconds for name, seconds in line["cpu_s"]["shared"].items()}
    minutes = {"training of the arms (what two of them share is counted twice)": own["training"], "judging": own["judging"],
               "worlds, base models, teachers and warm students": sum(shared.values())}
    return "## What it took\n\n" + table(["", "CPU minutes"], [[name, f"{s / 60:,.0f}"] for name, s in minutes.items()])


# Small helpers

def name_of(claim: Claim) -> str:
    return f"{claim.arm} − {claim.reference}" + ("" if claim.metric == "score" else f", {LABELS[claim.metric]}")


def values(lines: Lines, arm: str, metric: str) -> list[float]:
    """The arm's scores, without those that are a mean over nothing."""
    return [score for (name, _), line in lines.items() if name == arm and (score := line["scores"][metric]) is not None]


def spread(lines: Lines, arm: str, metric: str) -> str:
    some, digits = values(lines, arm, metric), 3 if metric in IN_NATS else 1
    return (f"{mean(some):.{digits}f}" if some else "–") + (f" ± {stdev(some):.{digits}f}" if len(some) > 1 else "")


def number(value: float, metric: str) -> str:
    text = f"{value:+.{3 if metric in IN_NATS else 1}f}"
    return text.replace("-", "−")


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# -----------------------------------------------------------------------------
# The figures

def draw(findings: dict[str, list[Finding]], lines: Lines, assets: Path) -> None:
    colors = {"reproduced": BLUE, "opposite": RED, "undecided": GRAY, "higher": ORANGE, "lower": ORANGE}
    rows = []                                                  # (label, finding or None for a title), from the top
    for title, some in findings.items():
        points = [finding for finding in some if finding.claim.metric not in IN_NATS]
        rows += [(title, None)] + [(name_of(finding.claim), finding) for finding in points]
    figure = new_figure(8, 1 + 0.2 * len(rows))
    panel = figure.subplots()
    for y, (_, finding) in enumerate(rows):
        if finding:
            color = colors[finding.verdict]
            panel.plot([finding.low, finding.high], [y, y], color=color, linewidth=1.4)
            panel.plot([finding.mean], [y], "o", color=color, markersize=4)
    panel.axvline(0, color="black", linewidth=0.7)
    panel.set_xscale("symlog", linthresh=4)
    panel.set_xticks([-40, -20, -10, -4, -2, 0, 2, 4, 10, 20, 40], [-40, -20, -10, -4, -2, 0, 2, 4, 10, 20, 40])
    panel.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=7)
    for tick, (_, finding) in zip(panel.get_yticklabels(), rows):
        tick.set_fontweight("normal" if finding else "bold")
    panel.set_ylim(len(rows), -1)
    panel.grid(axis="x", alpha=0.25, linewidth=0.5)
    panel.set_xlabel("arm − reference, points, with 95 % interval; logarithmic beyond ±4")
    for text in dict.fromkeys(finding.verdict for _, finding in rows if finding):
        panel.plot([], [], "o-", color=colors[text], label=text)
    panel.legend(loc="best", frameon=False, fontsize=7)
    save(figure, assets / "study_findings.svg")

    figure = new_figure(4.2, 3)
    panel = figure.subplots()
    for (name, arms), color in zip(DATA_CURVE.items(), (GRAY, BLUE)):
        seeds = [seed for seed in COUNTED if all((arm, seed) in lines for arm in arms)]
        if len(seeds) > 1:
            points = [interval([lines[arm, seed]["scores"]["score"] for seed in seeds]) for arm in arms]
            x = [50, 100, 200]
            panel.plot(x, [point[0] for point in points], "o-", color=color, label=name, markersize=4)
            panel.fill_between(x, [point[1] for point in points], [point[2] for point in points], color=color, alpha=0.15)
    panel.set_xscale("log", base=2)
    panel.set_xticks([50, 100, 200], [50, 100, 200])
    panel.set_xlabel("scenes, 14 rows each")
    panel.set_ylabel("score")
    if panel.lines:
        panel.legend(frameon=False)
        save(figure, assets / "study_data.svg")
