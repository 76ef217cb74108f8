"""
Pictures of a run: does the loss fall, does every expert get tokens, what do the models say?

    python -m tools.look curves out/tiny/*/log.jsonl     the loss and its parts, one line per run
    python -m tools.look experts out/tiny/d2s            each expert's share of the image tokens and of the text tokens
    python -m tools.look scenes data/tiny                scenes of the tiny world with a true and a biased caption;
                                                         --models=out/tiny/teacher,out/tiny/pd adds what these say
    python -m tools.look pipeline                        the five stages: what is trained, what is frozen, which loss

The picture goes to COMMAND.png in the current folder, or to --out=NAME.png or --out=NAME.svg. Drawing needs matplotlib,
which nothing else here does: pip install matplotlib.
"""
import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.common import decode_base64, decode_image, need
from configurator import POSITIVE, UserError, check_uses, check_values, expected, load_config, run
from data import render, transform_image
from engine.files import atomic, parse_json, read_json, read_rows, read_text
from model import Llava
from tiny.scene import PARTNERS

DEFAULTS = dict(
    out="",                     # NAME.png or NAME.svg; empty: COMMAND.png in the current folder
    models="",                  # scenes: checkpoint folders, with commas
    last=100,                   # experts: average over so many records at the end of log.jsonl
)
STYLE = {"font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False,
         "axes.spines.right": False, "axes.linewidth": 0.7, "svg.hashsalt": "look"}
# Okabe and Ito's colors, which stay apart for colorblind readers
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GRAY = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9",
                                               "#777777")
LINES = [(color, style) for style in ("-", "--", ":") for color in (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, "#000000")]


def new_figure(width: float, height: float):
    """A matplotlib figure, in inches."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib, which is not installed: pip install matplotlib") from None
    matplotlib.rcParams.update(STYLE)
    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path: Path) -> None:
    with atomic(path) as tmp:
        if path.suffix == ".svg":
            figure.savefig(tmp, format="svg", metadata={"Date": None})
        else:
            figure.savefig(tmp, format="png", dpi=150)
            picture = Image.open(tmp).convert("RGB")                 # 256 colors: a third of the bytes, looks the same
            picture.quantize(256, Image.Quantize.MAXCOVERAGE).save(tmp, format="png", optimize=True)
    print(path)


# -----------------------------------------------------------------------------
# curves: log.jsonl, a record per step

NOT_A_LOSS = ["step", "lr", "grad_norm", "tokens", "tokens_per_s", "seconds", "peak_gb",
              "on_policy", "answer_tokens", "unfinished", "generation_s"]
TITLES = {"ce": "cross-entropy (ce)", "kd": "KL to the teacher (kd)", "balance": "balance loss, sum of layers",
          "preference": "preference loss", "margin": "margin, chosen - rejected", "accuracy": "pairs ranked correctly",
          "chosen": "log-prob of the chosen", "rejected": "log-prob of the rejected"}


def read_log(path: str) -> list[dict]:
    """The records of a run, given its folder or its log.jsonl. A last line still being written is left out."""
    file = Path(path, "log.jsonl") if Path(path).is_dir() else Path(path)
    lines = read_text(file, "expected the folder of a run, or its log.jsonl").split("\n")
    records = [parse_json(line, f"{file} line {i}") for i, line in enumerate(lines[:-1], start=1) if line.strip()]
    for i, record in enumerate(records, start=1):
        if not isinstance(record, dict) or not all(is_number(record.get(key)) for key in ("step", "loss")):
            raise expected(f"{file} record {i}", record, "a record of train.py with step and loss, two finite numbers")
    if not records:
        raise UserError(f"{file}: is empty; wait until the run has made its first step")
    return records


def is_number(value: object) -> bool:
    """A finite one, with room for arithmetic."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100


def run_names(paths: list[str]) -> list[str]:
    """out/tiny/d2s/log.jsonl -> d2s, with more of the path where two would be called the same."""
    folders = [Path(path).parent if Path(path).name == "log.jsonl" else Path(path) for path in paths]
    names = Counter(folder.name for folder in folders)
    return [folder.name if names[folder.name] == 1 and folder.name else str(folder) for folder in folders]


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a tenth of the run around each step; at both ends, over the half of it that exists."""
    half = len(values) // 20
    sums = np.cumsum(np.concatenate([[0.0], values]))
    i = np.arange(len(values))
    first, last = np.maximum(i - half, 0), np.minimum(i + half, len(values) - 1)
    return (sums[last + 1] - sums[first]) / (last + 1 - first)


def differs(log: list[dict], part: str) -> bool:
    """Is this part not the whole loss? In align and sft, ce is, and needs no panel of its own."""
    return any(is_number(record.get(part)) and not math.isclose(record[part], record["loss"], rel_tol=1e-4)
               for record in log)


def draw_curves(paths: list[str]):
    logs = dict(zip(run_names(paths), map(read_log, paths)))
    parts = dict.fromkeys(key for log in logs.values() for record in log for key, value in record.items()
                          if is_number(value) and key not in NOT_A_LOSS + ["loss"] and not key.startswith("val_"))
    parts = ["loss"] + [key for key in parts if any(differs(log, key) for log in logs.values())]
    columns = 2 if len(parts) in (2, 4) else min(3, len(parts))
    rows = math.ceil(len(parts) / columns)
    figure = new_figure(8.6 if columns > 1 else 5.5, 0.6 + 2.2 * rows if rows > 1 else 3.4)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for part, panel in itertools.zip_longest(parts, panels):
        if part is None:
            panel.set_visible(False)
            continue
        shown = []
        for (name, log), (color, style) in zip(logs.items(), itertools.cycle(LINES)):
            points = [(record["step"], record[part]) for record in log if is_number(record.get(part))]
            if not points:
                continue
            steps, values = np.array(points, dtype=float).T
            panel.plot(steps, values, color=color, alpha=0.25, linewidth=0.6)
            panel.plot(steps, smooth(values), color=color, linestyle=style, linewidth=1.4, label=name)
            shown.append(smooth(values))
            held_out = [(record["step"], record[f"val_{part}"]) for record in log if is_number(record.get(f"val_{part}"))]
            if held_out:                                             # dots, next to the curve of the rows that are trained on
                panel.plot(*np.array(held_out, dtype=float).T, "o", color=color, markersize=3.5)
                shown.append(np.array([value for _, value in held_out]))
        low, high = min(line.min() for line in shown), max(line.max() for line in shown)
        if low > 0 and high > 20 * low:
            panel.set_yscale("log")
            panel.set_ylim(low / 1.5, high * 1.5)
            panel.yaxis.set_major_formatter("{x:g}")
        panel.set_title(TITLES.get(part, part), loc="left")
        panel.grid(alpha=0.25, linewidth=0.5)
    for panel in figure.axes[max(0, len(parts) - columns):len(parts)]:
        panel.set_xlabel("step")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    in_a_row = math.ceil(len(labels) / math.ceil(len(labels) / 6))
    figure.legend(handles, labels, loc="outside upper center", ncols=in_a_row, frameon=False)
    return figure


# -----------------------------------------------------------------------------
# experts: image_load and text_load of log.jsonl, (layers, experts) each

def expert_shares(path: str, last: int) -> np.ndarray:
    """(2, layers, experts): the shares of image tokens and of text tokens, averaged over the last records."""
    records = [record for record in read_log(path) if "image_load" in record][-last:]
    if not records:
        raise UserError(f"{path}: is the log of a dense model, without image_load; give a run of d2s or pd")
    try:
        shares = np.array([[record["image_load"], record["text_load"]] for record in records], dtype=float).mean(0)
    except (ValueError, KeyError, TypeError, OverflowError):
        shares = np.array([])
    if shares.ndim != 3 or not shares.size or not np.isfinite(shares).all():
        raise UserError(f"{path}: expected image_load and text_load as lists of layers x experts, of one size in every "
                        "record")
    return shares


def draw_experts(paths: list[str], last: int):
    runs = {name: expert_shares(path, last) for name, path in zip(run_names(paths), paths)}
    columns = min(4, max(shares.shape[1] for shares in runs.values()))
    rows = [math.ceil(shares.shape[1] / columns) for shares in runs.values()]
    figure = new_figure(1.0 + 2.5 * columns, 0.5 + 2.2 * sum(rows))
    panels = figure.subplots(sum(rows), columns, squeeze=False, sharey=True)
    for panel in panels.flat:
        panel.set_visible(False)
    first_row = 0
    for (name, shares), used in zip(runs.items(), rows):
        _, layers, experts = shares.shape
        for layer, panel in zip(range(layers), panels[first_row:first_row + used].flat):
            panel.set_visible(True)
            for kind, color, offset in ((0, BLUE, -0.2), (1, ORANGE, 0.2)):
                panel.bar(np.arange(experts) + offset, 100 * shares[kind, layer], 0.38, color=color,
                          label=("image tokens", "text tokens")[kind])
            panel.axhline(100 / experts, color=GRAY, linewidth=1, linestyle="--", label="even")
            panel.set_title(f"{name}, sparse layer {layer + 1} of {layers}", loc="left")
            panel.set_xticks(range(experts))
            panel.set_xlabel("expert")
            if layer % columns == 0:
                panel.set_ylabel("share of routed tokens (%)")
        first_row += used
        kind, layer, expert = np.unravel_index(shares.argmin(), shares.shape)
        print(f"{name}: the least used is expert {expert} of sparse layer {layer + 1}, with {100 * shares.min():.1f} % "
              f"of the {('image', 'text')[kind]} tokens (even: {100 / experts:.1f} %)")
    even, *bars = zip(*figure.axes[0].get_legend_handles_labels())
    figure.legend(*zip(*bars, even), loc="outside upper center", ncols=3, frameon=False)
    return figure


# -----------------------------------------------------------------------------
# scenes: the tiny world as its files have it

def phrases(caption: str) -> list[str]:
    """"a red kite and a blue cup ." -> ["a red kite", "a blue cup"]"""
    return [phrase for phrase in caption.strip(" .").split(" and ") if phrase]


def thing(phrase: str) -> str:
    """a blue traffic light -> traffic light"""
    return phrase.split(" ", 2)[-1]


def read_scenes(folder: Path, count: int) -> list[dict]:
    """Held-out scenes in which a partner is missing, one per trigger: image, prompt, true and biased caption."""
    partners = {trigger: partner for trigger, (partner, _) in PARTNERS.items()}
    objhal = folder / "bench" / "objhal"
    notes = read_json(objhal / "annotations" / "captions_val2014.json")["annotations"]
    truth = {note["image_id"]: phrases(note["caption"]) for note in notes}
    scenes = {}
    for where, row in read_rows(objhal / "obj_halbench_300_with_image.jsonl"):
        true = truth[row["image_id"]]
        things = [thing(phrase) for phrase in true]
        trigger = next((one for one in things if one in partners), None)
        if trigger is None or partners[trigger] in things or trigger in scenes:
            continue
        i = things.index(trigger)
        phantom = f"{' '.join(true[i].split()[:2])} {partners[trigger]}"     # in the color of its trigger
        image = decode_image(decode_base64(need(row, "image", str, where), where), where)
        scenes[trigger] = {"image": image, "prompt": need(row, "question", str, where), "true": true,
                           "biased": [*true[:i + 1], phantom, *true[i + 1:]]}
    if not scenes:
        raise UserError(f"{objhal}: holds no scene with a missing partner; make a larger world")
    return list(scenes.values())[:count]


@torch.no_grad()
def describe(model: str, scenes: list[dict]) -> list[list[str]]:
    """Greedy captions of a checkpoint."""
    llava = Llava.from_pretrained(model).eval()
    if llava.tokenizer is None or llava.config.template is None:
        raise UserError(f"{model}: has no tokenizer.json or no template; give a folder that train.py wrote")
    said = []
    for scene in scenes:
        question = [{"from": "human", "value": "<image>\n" + scene["prompt"]}]
        ids, _ = render(question, llava.tokenizer, llava.config.template, llava.config.image_tokens)
        pixel_values = transform_image(scene["image"], llava.config.vision.image_size)[None]     # (1, 3, S, S)
        new = llava.generate(torch.tensor([ids]), pixel_values, max_new_tokens=40)[0].tolist()
        said.append(phrases(llava.tokenizer.decode(new, skip_special_tokens=True)))
    return said


def draw_scenes(folder: str, models: list[str]):
    try:
        scenes = read_scenes(Path(folder), count=4)
    except (LookupError, TypeError, AttributeError):
        raise UserError(f"{folder}: has other rows than those of a tiny world; give the folder that python -m tiny "
                        "made") from None
    texts = {f"{kind} caption": [scene[kind] for scene in scenes] for kind in ("true", "biased")}
    texts |= {name: describe(model, scenes) for name, model in zip(run_names(models), models)}
    heights = [1.8, *(0.1 + 0.19 * max(map(len, column)) for column in texts.values())]
    figure = new_figure(8.6, sum(heights) + 0.35)
    figure.get_layout_engine().set(h_pad=0.0, hspace=0.0)
    grid = figure.add_gridspec(len(heights), len(scenes) + 1, height_ratios=heights,
                               width_ratios=[0.7] + [1] * len(scenes))
    for j, scene in enumerate(scenes, start=1):
        panel = figure.add_subplot(grid[0, j])
        panel.imshow(scene["image"], interpolation="nearest")
        panel.set_axis_off()
    for i, (name, column) in enumerate(texts.items(), start=1):
        write_lines(figure.add_subplot(grid[i, 0]), [(name, "#000000")], bold=True)
        for j, said in enumerate(column):
            lines = [(phrase, "#000000" if phrase in scenes[j]["true"] else RED) for phrase in said]
            write_lines(figure.add_subplot(grid[i, j + 1]), lines)
    figure.supxlabel("bold and red: not in the picture", fontsize=9, color=RED)
    return figure


def write_lines(panel, lines: list[tuple[str, str]], bold: bool = False) -> None:
    panel.set_axis_off()
    for i, (text, color) in enumerate(lines):
        text = text if len(text) <= 26 else text[:25] + "…"           # an untrained model may never write " and "
        panel.annotate(text, (0, 1), xytext=(0, -13 * i), textcoords="offset points", va="top", color=color,
                       weight="bold" if bold or color == RED else "normal", in_layout=False)


# -----------------------------------------------------------------------------
# pipeline

TRAINED, FROZEN = SKY, "#E4E4E4"
STUDENT = [  # stage, left edge, is the LLM trained, is it sparse, loss
    ("align", 0, False, False, "cross-entropy\n(eq. 5)"),
    ("d2d", 38, True, False, "KL(teacher ‖ student)\n(eq. 6)"),
    ("d2s", 60, False, True, "KL + cross-entropy\n+ 0.01 balance (eq. 7)"),
    ("pd", 82, False, True, "DPO, teacher as reference\n+ 0.01 balance (eq. 8)"),
]
TEACHER = [("align", 0, False, False, "cross-entropy"), ("sft", 19, True, False, "cross-entropy")]
WIDTH, BLOCK = 15, 3.4        # of a card; height of a block in it


def draw_pipeline():
    figure = new_figure(8.6, 4.5)
    panel = figure.subplots()
    panel.set_axis_off()
    panel.set_xlim(-3, 99)
    panel.set_ylim(-3, 47)
    for height, label, cards in ((28, "teacher", TEACHER), (2, "student", STUDENT)):
        panel.text(-2.5, height + 7.7, label, rotation=90, ha="center", va="center", weight="bold", fontsize=10)
        for card in cards:
            draw_card(panel, height, *card)

    draw_block(panel, 38, 32, 59, 7.4, FROZEN, "teacher, frozen")
    for height, left, right in ((35.7, 15, 19), (35.7, 34, 38), (9.7, 15, 38), (9.7, 53, 60), (9.7, 75, 82)):
        draw_arrow(panel, (left + 0.3, height), (right - 0.3, height))
    panel.text(56.5, 10.3, "upcycle", ha="center", va="bottom", fontsize=7.5)
    for x, label in ((45.5, "distributions"), (67.5, "distributions"), (89.5, "log-probs")):
        draw_arrow(panel, (x, 31.5), (x, 21.5), color=GREEN)
        panel.text(x + 1, 26.5, label, va="center", color=GREEN)
    for y, color, label in ((17, TRAINED, "trained"), (13, FROZEN, "frozen")):
        draw_block(panel, 21, y, 4, 2.6, color)
        panel.text(26, y + 1.3, label, va="center")
    return figure


def draw_card(panel, bottom: float, stage: str, left: float, llm_trained: bool, sparse: bool, loss: str) -> None:
    """The model in one stage: ViT, adaptor, LLM from bottom to top; its name above, its loss below."""
    draw_block(panel, left, bottom, WIDTH, BLOCK, FROZEN, "ViT")
    draw_block(panel, left, bottom + 4, WIDTH, BLOCK, TRAINED, "adaptor")
    if sparse:
        draw_block(panel, left, bottom + 8, WIDTH, BLOCK, FROZEN, "rest of the LLM")
        draw_block(panel, left, bottom + 12, 6, BLOCK, TRAINED, "router")
        for i in range(4):
            draw_block(panel, left + 6.6 + 2.15 * i, bottom + 12, 1.95, BLOCK, TRAINED, f"E{i}")
    else:
        draw_block(panel, left, bottom + 8, WIDTH, 2 * BLOCK + 0.6, TRAINED if llm_trained else FROZEN, "LLM")
    panel.text(left + WIDTH / 2, bottom + 16.2, stage, ha="center", va="bottom", weight="bold", fontsize=11)
    panel.text(left + WIDTH / 2, bottom - 1, loss, ha="center", va="top", fontsize=8)


def draw_block(panel, x: float, y: float, width: float, height: float, color: str, label: str = "") -> None:
    from matplotlib.patches import FancyBboxPatch
    panel.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.5", facecolor=color,
                                   edgecolor=GRAY, linewidth=0.6))
    panel.text(x + width / 2, y + height / 2, label, ha="center", va="center", fontsize=8)


def draw_arrow(panel, start: tuple[float, float], end: tuple[float, float], color: str = "#333333") -> None:
    panel.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.1, "shrinkA": 0,
                                               "shrinkB": 0})


# -----------------------------------------------------------------------------

def main(argv: list[str]) -> None:
    names = [arg for arg in argv if not arg.startswith("-")]
    config = load_config(DEFAULTS, [arg for arg in argv if arg.startswith("-")])
    check_values(config, {"last": POSITIVE})
    command, paths = (names[0], names[1:]) if names else ("", [])
    wanted = {"curves": "log.jsonl of one or more runs", "experts": "the folders of one or more sparse runs",
              "scenes": "the folder of a tiny world", "pipeline": "nothing"}
    if command not in wanted:
        raise expected("command", command, f"one of {', '.join(wanted)}")
    if bool(paths) == (command == "pipeline") or (command == "scenes" and len(paths) > 1):
        raise expected(f"{command}: what to draw", " ".join(paths), wanted[command])
    check_uses(config, DEFAULTS, [(["models"], command == "scenes", "scenes"), (["last"], command == "experts", "experts")])
    out = Path(config.out or f"{command}.png")
    if out.suffix not in (".png", ".svg"):
        raise expected("--out", config.out, "a name that ends in .png or .svg")

    if command == "curves":
        figure = draw_curves(paths)
    elif command == "experts":
        figure = draw_experts(paths, config.last)
    elif command == "scenes":
        figure = draw_scenes(paths[0], [name for name in config.models.split(",") if name])
    else:
        figure = draw_pipeline()
    save(figure, out)


if __name__ == "__main__":
    run(main, __doc__, DEFAULTS)
