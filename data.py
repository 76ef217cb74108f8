r"""
Conversations to token ids and a loss mask, images to pixels, samples to batches: all that happens before the model.

A training row is a conversation about some images:

    {"id": "7", "image": "cat.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWhat is on the mat?"},
        {"from": "gpt",   "value": "A cat."}]}

It becomes one sequence of token ids and a mask of the same length (here per character, and with 3 image tokens):

    A chat between ... USER: <image><image><image>\nWhat is on the mat? ASSISTANT: A cat.<|endoftext|>
    00000000000000000000000000000000000000000000000000000000000000000000000000000011111111111111111111

The mask is the point. Cross-entropy and distillation see the answers and the end token that closes each of them; the
system text, the questions and the image positions are context. A mask that is off by one token raises no error and
ruins the training, so a single function, `render`, builds it. Row 3 of a file, what is supervised in green:

    python data.py data/tiny/train/d2d.json:3 --model=out/tiny/pd

Read top-down: 1. conversations to ids and mask, 2. images to pixels, 3. samples to batches, 4. the order of batches. What
a row of a user's file may look like is in engine/rows.py; where millions of them are on disk, in engine/index.py.

    B batch    T tokens    N images of a batch    S image side in pixels
"""
from configurator import UserError, load_config, open_regular, reading, run, shorten     # first: for Ctrl-C from here on

import glob
import itertools
import math
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset


# -----------------------------------------------------------------------------
# 1. Conversations to ids and mask

IMAGE = "<image>"  # the place of an image in the text; render repeats it once per patch, as Hugging Face does
CUT = "\ufdd0"      # a character that Unicode keeps for programs: the text is tokenized in two pieces there, without it

# A template is five strings; {} takes the question or the answer. Supervised: answer + end, nothing else.
TEMPLATES = {
    # Vicuna's layout with Qwen's end token: what LLaVA-MoD trains with (its code calls it "qwen"). The prompt stops
    # right after "ASSISTANT:", and the space that follows belongs to the answer: BPE merges it into the first word.
    "vicuna": {
        "start": "A chat between a curious user and an artificial intelligence assistant. "
                 "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
        "ask": "USER: {} ASSISTANT:",
        "answer": " {}",
        "end": "<|endoftext|>",
        "after": "",
    },
    # Qwen's own chat layout. The newline after <|im_end|> belongs to the template; the model never generates it.
    "chatml": {
        "start": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        "ask": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        "answer": "{}",
        "end": "<|im_end|>",
        "after": "\n",
    },
}


def render(conversation: list[dict], tokenizer: Tokenizer, template: str = "vicuna",
           image_tokens: int = 576) -> tuple[list[int], list[int]]:
    """
    A conversation -> (ids, mask), two lists of equal length; the mask is 1 on answers and their end tokens.

    In a question, <image> is an image; in an answer it is text like any other.
    A conversation that ends with a question gives a generation prompt: it stops where the answer begins.
    An empty answer is legal: it trains the model to stop at once.
    """
    if template not in TEMPLATES:
        raise UserError(f"unknown template {template!r}, expected one of {', '.join(TEMPLATES)}")
    layout = TEMPLATES[template]
    check_turns(conversation)

    # Write the text turn by turn, and with it one mask byte per character.
    text = layout["start"]
    char_mask = bytearray(len(text))
    for turn in conversation:
        if turn["from"] == "human":
            pieces = [(layout["ask"].format(turn["value"].replace(IMAGE, IMAGE * image_tokens)), 0)]
        else:
            pieces = [(layout["answer"].format(as_text(turn["value"])) + layout["end"], 1), (layout["after"], 0)]
        for piece, supervised in pieces:
            text += piece
            char_mask += bytes([supervised]) * len(piece)

    for token in (IMAGE, layout["end"]):
        if token in text and tokenizer.token_to_id(token) is None:
            raise UserError(f"the tokenizer does not know {token}, which the {template} conversation needs; "
                            "use the tokenizer of a LLaVA checkpoint with that template")

    # Tokenize the whole text at once: the ids are then those of Hugging Face's processor. Tokenizing piece by piece
    # differs where pieces merge: a chatml answer that starts with a newline shares one token, "\n\n", with the
    # template's newline. A token is supervised if its first character is.
    ids, mask, start = [], [], 0
    for piece in text.split(CUT):                                    # one piece, unless there is an <image> that is text
        try:
            encoding = tokenizer.encode(piece, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
            raise UserError("the text has a lone surrogate (\\ud800 to \\udfff), not a character; remove it") from None
        except Exception as error:  # the tokenizers library raises bare Exception
            raise UserError(f"the tokenizer cannot encode the text ({error}); correct tokenizer.json") from None
        ids += encoding.ids
        mask += [char_mask[start + at] for at, _ in encoding.offsets]
        start += len(piece) + 1
    return ids, mask


def as_text(value: str) -> str:
    """Let every <image> in a question be text, not an image: a special token is only found whole."""
    return value.replace(IMAGE, f"<{CUT}image>")


def check_turns(conversation):
    """Turns are {"from", "value"} and alternate, human first."""
    if not isinstance(conversation, list) or not conversation:
        raise UserError(f"found {shorten(conversation)} as a conversation, expected a list of at least one turn")
    for i, turn in enumerate(conversation):
        speaker = ("human", "gpt")[i % 2]
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise UserError(f'turn {i} is {shorten(turn)}, expected {{"from": "{speaker}", "value": "some text"}}')
        found, hint = turn.get("from"), "turns alternate human, gpt, human, ..."
        if (i, found) == (0, "system"):
            hint = "the template has its own system text; put this one in front of the first question, or remove it"
        elif (i, found) == (0, "gpt"):
            hint += "; put a question in front of it, or remove it"
        if found != speaker:
            raise UserError(f"turn {i} is from {shorten(found)}, expected \"{speaker}\": {hint}")


def show(ids: list[int], mask: list[int], tokenizer: Tokenizer) -> None:
    """Print a sample: the supervised tokens in green, a run of image tokens as <image>×576."""
    image_id = tokenizer.token_to_id(IMAGE)
    kinds = [(token == image_id, supervised) for token, supervised in zip(ids, mask)]
    for (is_image, supervised), positions in itertools.groupby(range(len(ids)), key=lambda t: kinds[t]):
        run = [ids[t] for t in positions]
        text = f"{IMAGE}×{len(run)}" if is_image else tokenizer.decode(run, skip_special_tokens=False)
        print(f"\033[32m{text}\033[0m" if supervised else text, end="")
    print()


# -----------------------------------------------------------------------------
# 2. Images to pixels

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PAD_COLOR = tuple(int(255 * mean) for mean in CLIP_MEAN)  # (122, 116, 104), almost 0 after normalization
MAX_PIXELS = 90_000_000           # of an image; Pillow, too, takes more for a decompression bomb
MAX_SIDE = math.isqrt(MAX_PIXELS)
warnings.simplefilter("ignore", Image.DecompressionBombWarning)   # `load_image` has the bound above
warnings.filterwarnings("ignore", "Corrupt EXIF data")            # which then say nothing


def transform_image(image: Image.Image, size: int = 336, pad: bool = True) -> torch.Tensor:
    """
    A PIL image -> (3, S, S) float32, normalized as in CLIP's training.

    CLIP's own recipe scales the short edge to `size` and crops the center, which loses the ends of a wide photo.
    LLaVA-1.5 pads to a square first (pad=True): everything is smaller, but nothing is lost.
    """
    image = bound_sides(to_rgb(image), pad)
    width, height = image.size
    if pad and width != height:
        side = max(width, height)
        square = Image.new("RGB", (side, side), PAD_COLOR)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image, width, height = square, side, side

    short = min(width, height)
    width, height = int(size * width / short), int(size * height / short)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.crop((left, top, left + size, top + size))

    pixels = np.array(image).transpose(2, 0, 1).astype(np.float32, order="C") / 255  # (3, S, S)
    mean, std = (np.float32(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return torch.from_numpy((pixels - mean) / std)


def bound_sides(image, pad):
    """A very long image, shortened: its padded square, or its resized whole, would take gigabytes. All others as they are."""
    if pad:
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        return image
    width, height = image.size
    x, y = max(0, width - 100 * height) // 2, max(0, height - 100 * width) // 2   # only the middle will be kept
    return image.crop((x, y, width - x, height - y)) if x or y else image


def to_rgb(image):
    """Any PIL mode to RGB. Transparent pixels become white, as in transformers; their hidden color is arbitrary."""
    if image.mode[0] in "IF":
        image = eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def eight_bits(image):
    """Gray levels in 16 or 32 bits or as floats, scaled to 8 bits; Pillow's own conversion clips them at 255."""
    levels = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
    # White is 65535 where the mode says so. "I" and "F" do not say: the smallest usual value that holds all levels.
    whites = {"I": [255, 65535], "F": [1, 255, 65535]}.get(image.mode, [65535])
    brightest = levels.max(initial=0)
    white = next((white for white in whites if brightest <= white), brightest)
    return Image.fromarray(np.uint8(np.rint(levels.clip(min=0) * (255 / white))))


def image_bytes(path: str) -> int:
    """The size of an image file; UserError unless it is there."""
    if not os.path.isfile(path):
        found = " as a file" if os.path.exists(path) else ""
        # OCR-VQA's pictures, for one, come as .gif and .png, and its rows call all of them .jpg.
        others = glob.glob(glob.escape(os.path.splitext(path)[0]) + ".*") if "\0" not in path else []
        near = f" (there is {os.path.basename(others[0])})" if others and path not in others else ""
        raise UserError(f"image {path!r} does not exist{found}; check image_dir and the name{near}")
    return os.path.getsize(path)


def load_image(source: str | Path | BinaryIO, official: bool = False) -> Image.Image:
    """
    Read and fully decode an image file, as RGB: turned as its EXIF data say (a phone stores a photo lying on its side, with a
    note), transparent pixels white, 16 bits scaled to 8.

    official: nothing of that. The official LLaVA code converts and no more, so evaluate.py does too, in the official benchmarks.
    """
    with (reading(source, "not a readable image", "replace the file"),
          open_regular(source) if isinstance(source, (str, Path)) else source as file, Image.open(file) as image):
        if image.width * image.height > MAX_PIXELS:                  # known before anything is decoded
            raise UserError(f"{source}: {image.width:,} x {image.height:,} pixels, expected at most {MAX_PIXELS:,} in all; "
                            "replace the file by a smaller one")
        return image.convert("RGB") if official else to_rgb(turn_upright(image))


def turn_upright(image):
    with suppress(Exception):                                        # damaged EXIF data say nothing
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            return ImageOps.exif_transpose(image)
    return image


# -----------------------------------------------------------------------------
# 3. Samples to batches


def collate(samples: list[dict], pad_token_id: int) -> dict:
    """
    B samples -> input_ids (B, T) long, mask (B, T) bool, pixel_values (N, 3, S, S), or None without any image.

    Padding is on the right: positions then need no correction, and causal attention never sees it. Images are in
    reading order, row after row; the model assigns them to the image tokens in that order.
    """
    return {"input_ids": pad_right([sample["input_ids"] for sample in samples], pad_token_id),
            "mask": pad_right([sample["mask"] for sample in samples], 0).bool(),
            "pixel_values": stack_images(samples)}


def collate_pairs(samples: list[dict], pad_token_id: int) -> dict:
    """
    B pairs -> the same with 2B rows: all chosen answers, then all rejected ones, so that one pass scores both.

    pixel_values has the images of each pair once: the vision tower runs once per image, and the caller repeats the
    features for the second half.
    """
    sides = [(sample, side) for side in ("chosen", "rejected") for sample in samples]
    return {"input_ids": pad_right([sample[f"{side}_ids"] for sample, side in sides], pad_token_id),
            "mask": pad_right([sample[f"{side}_mask"] for sample, side in sides], 0).bool(),
            "pixel_values": stack_images(samples)}


def pad_right(rows: list[list[int]], value: int) -> torch.Tensor:
    out = torch.full((len(rows), max(map(len, rows))), value)  # (B, T)
    for i, row in enumerate(rows):
        out[i, :len(row)] = torch.tensor(row)
    return out


def stack_images(samples):
    images = [image for sample in samples for image in sample["images"]]
    return torch.stack(images) if images else None  # (N, 3, S, S)


# -----------------------------------------------------------------------------
# 4. The order of batches


class Sampler:
    """
    The rows of global batch 0, 1, 2, ...: a pure function of (seed, step). The position in the data is just the
    step, so a resumed run continues with the batch that the interrupted run would have had.

    `sources` are (first row, last row + 1, weight); rows in `held_out` are left out of them. An epoch draws
    round(weight * rows) rows of each, shuffles all, sorts every 50 batches' worth by length, cuts it into batches, and
    shuffles the batches.
    """
    # Sorting makes the rows of a batch similar in length, which saves padding; sorting only so many batches at a
    # time keeps it random which rows share a batch. More batches: less padding, less randomness.
    MEGABATCH = 50

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int = 0,
                 sources: list[tuple[int, int, float]] | None = None, held_out: np.ndarray | None = None):
        for name, value, least in [("batch_size", batch_size, 1), ("seed", seed, 0)]:
            if value < least:
                raise UserError(f"{name}={value}, expected at least {least}")
        self.lengths, self.batch_size, self.seed = np.asarray(lengths), batch_size, seed
        held_out = np.array([], int) if held_out is None else held_out
        self.sources = [(np.setdiff1d(np.arange(start, stop), held_out), weight)
                        for start, stop, weight in sources or [(0, len(lengths), 1.0)]]
        rows_per_epoch = sum(round(weight * len(rows)) for rows, weight in self.sources)
        self.steps_per_epoch = rows_per_epoch // batch_size  # the remainder is dropped, a different one each epoch
        if rows_per_epoch > 10**9:
            raise UserError(f"an epoch has {rows_per_epoch:,} rows, and their order would take {rows_per_epoch * 16 / 1e9:,.0f} GB of "
                            "memory; lower the weights of the files")
        if self.steps_per_epoch == 0:
            raise UserError(f"an epoch has {rows_per_epoch} rows, fewer than batch_size={batch_size}; "
                            "lower batch_size or add data")
        self.cached_epoch, self.cached_batches = None, None  # the epoch that was computed last

    def batch(self, step: int) -> list[int]:
        """The rows of global batch `step`, sorted by length."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self.cached_epoch:
            self.cached_epoch, self.cached_batches = epoch, self.shuffle(epoch)
        return self.cached_batches[position].tolist()

    def visited(self, steps: int) -> np.ndarray:
        """The rows that the first `steps` batches hold, each once, in ascending order."""
        epochs = range(math.ceil(steps / self.steps_per_epoch))
        return np.unique(np.concatenate([self.shuffle(epoch)[:steps - epoch * self.steps_per_epoch].ravel() for epoch in epochs]))

    def shuffle(self, epoch):
        """All batches of an epoch, (steps_per_epoch, batch_size) row numbers."""
        rng = np.random.default_rng([self.seed, epoch])
        drawn = []
        for rows, weight in self.sources:
            missing = round(weight * len(rows))
            while missing > 0:  # weight 2.5: all rows, all rows again, a random half
                drawn.append(rows[rng.permutation(len(rows))[:missing]])
                missing -= len(drawn[-1])
        rows = rng.permutation(np.concatenate(drawn))[:self.steps_per_epoch * self.batch_size]

        megabatch = self.MEGABATCH * self.batch_size
        for i in range(0, len(rows), megabatch):
            part = rows[i:i + megabatch]
            rows[i:i + megabatch] = part[np.argsort(self.lengths[part], kind="stable")]
        return rng.permutation(rows.reshape(self.steps_per_epoch, self.batch_size))


def micro_batches(rows: list[int], micro_batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """
    This rank's part of a global batch, cut into micro-batches.

    `rows` are sorted by length, and neighboring cuts go to different ranks: in each micro-step all ranks have rows
    of similar length, and no rank waits long. 2 ranks, micro-batches of 2: the ranks own 0 0 1 1 0 0 1 1.
    """
    if micro_batch_size < 1:
        raise UserError(f"micro_batch_size={micro_batch_size}, expected at least 1")
    per_micro_step = micro_batch_size * world_size
    if len(rows) % per_micro_step:
        fitting = math.ceil(len(rows) / per_micro_step) * per_micro_step
        raise UserError(f"batch_size={len(rows)} is not a multiple of micro_batch_size={micro_batch_size} x "
                        f"{world_size} ranks = {per_micro_step}; try batch_size={fitting}")
    starts = range(rank * micro_batch_size, len(rows), per_micro_step)
    return [rows[start:start + micro_batch_size] for start in starts]


def batches(dataset: Dataset, sampler: Sampler, micro_batch_size: int, rank: int, world_size: int,
            start_step: int, end_step: int, num_workers: int, collate_fn: Callable,
            pin_memory: bool = False) -> Iterator[list[dict]]:
    """Yield the list of this rank's collated micro-batches for each step from start_step to end_step - 1."""
    groups = (rows for step in range(start_step, end_step)
              for rows in micro_batches(sampler.batch(step), micro_batch_size, rank, world_size))
    micro_steps = sampler.batch_size // (micro_batch_size * world_size)
    batch = []
    for micro_batch in prefetch(dataset, groups, collate_fn, num_workers, micro_steps, pin_memory):
        batch.append(micro_batch)
        if len(batch) == micro_steps:
            yield batch
            batch = []


def prefetch(dataset: Dataset, groups: Iterable[list[int]], collate_fn: Callable, num_workers: int, ahead: int = 1,
             pin_memory: bool = False) -> Iterator[dict]:
    """
    Yield each group of rows, collated. num_workers > 0: so many processes read rows and decode images, at least
    `ahead` groups ahead. pin_memory: batches can be copied to a GPU while it computes (`non_blocking`).
    """
    # batch_size=None because `groups` already says which rows belong together. The DataLoader draws a seed for its
    # workers; from a generator of its own, so that the global random state stays as it was.
    loader = DataLoader(CollatedRows(dataset, collate_fn), sampler=groups, batch_size=None, collate_fn=identity,
                        num_workers=num_workers, worker_init_fn=leave_signals_to_parent, pin_memory=pin_memory,
                        prefetch_factor=1 + math.ceil(ahead / num_workers) if num_workers else None,
                        generator=torch.Generator())
    try:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except (RuntimeError, ConnectionError, EOFError) as error:       # the last two: it died while it handed over a tensor
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(f"a process that reads the data died ({error}); "
                        "if the machine ran out of memory, lower num_workers") from None


class CollatedRows:
    """
    dataset[rows] -> those rows, collated. A UserError is returned as a value: raised in a worker process, it would
    reach the user inside torch's traceback instead of as one line.
    """

    def __init__(self, dataset, collate_fn):
        self.dataset, self.collate_fn = dataset, collate_fn

    def __getitem__(self, rows):
        try:
            return self.collate_fn([self.dataset[row] for row in rows])
        except UserError as error:
            return error


def identity(micro_batch):
    return micro_batch


GRACE_S = 20


def leave_signals_to_parent(worker):
    """
    Ctrl-C and a cluster's SIGTERM reach every process of a run, and the training loop may want to finish its step. So
    a worker ignores the first, and after the second exits without an error, but only GRACE_S seconds later.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_S))
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))


# -----------------------------------------------------------------------------
# A row, printed

DEFAULTS = dict(
    model="out/tiny/pd",        # a LLaVA folder: its tokenizer, template and image size
)


def main(argv: list[str]) -> None:
    """Print row N of FILE as that model is trained on it: argv[0] is FILE:N, counted from 0."""
    from engine.hf import describe_llava, require_tokenizer          # upwards: only this program within a library needs them
    from engine.index import scan_rows, row_name
    from engine.rows import parse_instruction, parse_pair
    path, _, number = argv[0].rpartition(":") if argv else ("", "", "")
    if not path or not number.isdecimal() or len(number) > 15:
        raise UserError("name a row: python data.py FILE.json:N, counted from 0")
    config = load_config(DEFAULTS, argv[1:])
    llava = describe_llava(Path(config.model))
    require_tokenizer(llava, config.model)
    row = next(itertools.islice((row for _, _, row in scan_rows(path)), int(number), None), None)
    if row is None:
        raise UserError(f"{path}: has no row {number}")
    with_pair = isinstance(row, dict) and "chosen" in row
    try:
        names, conversations = (parse_pair if with_pair else parse_instruction)(row)
        samples = [render(conversation, llava.tokenizer, llava.config.template, llava.config.image_tokens)
                   for conversation in conversations]
    except UserError as error:
        raise UserError(f"{row_name(path, number, row)}: {error}") from None
    for ids, mask in samples:                                        # of a pair: chosen, then rejected
        show(ids, mask, llava.tokenizer)
        print(f"[{len(ids)} positions, {ids.count(llava.config.image_token_id)} of them of images; {sum(mask)} supervised, in green; "
              f"images: {', '.join(names) or 'none'}]\n")


if __name__ == "__main__":
    run(main, __doc__, DEFAULTS)
