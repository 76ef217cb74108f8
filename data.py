r"""
From files on disk to padded tensors: everything that happens before the model sees a batch.

A training row is a conversation about some images:

    {"id": "7", "image": "cat.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWhat is on the mat?"},
        {"from": "gpt",   "value": "A cat."}]}

and it becomes one sequence of token ids with a mask of the same length (here per character, and with 3 image tokens):

    A chat between ... USER: <image><image><image>\nWhat is on the mat? ASSISTANT: A cat.<|endoftext|>
    00000000000000000000000000000000000000000000000000000000000000000000000000000011111111111111111111

The mask is the whole point. Only what the assistant says, and the token with which it stops, is ever learned or
distilled; system text, questions and image positions are context. A mask that is one token off is the classic
silent bug of this trade, so one function, `render`, owns it. See its work with `show(ids, mask, tokenizer)`.

Read top-down: 1. conversations to ids and mask, 2. images to pixels, 3. files to datasets, 4. samples to batches,
5. the order of batches. B = batch, T = tokens, N = images of a batch, S = image side in pixels.
"""
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch.utils.data import DataLoader


class DataError(ValueError):
    """The user's data is wrong; one line says which file and row, what was found there and what to do."""

# --------------------------------------------------------------------------------------------------------------
# 1. Conversations to ids and mask

IMAGE = "<image>"  # where an image stands in the text; render repeats it once per patch, as Hugging Face does

# A template is five strings; {} takes the question or the answer. Learned is answer + end, and nothing else.
TEMPLATES = {
    # Vicuna's layout with Qwen's end token: what LLaVA-MoD trains with (its code calls it "qwen"). The prompt stops
    # right after "ASSISTANT:", and the space that follows belongs to the answer: BPE glues it to the first word.
    "vicuna": {
        "start": "A chat between a curious user and an artificial intelligence assistant. "
                 "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
        "ask": "USER: {} ASSISTANT:",
        "answer": " {}",
        "end": "<|endoftext|>",
        "after": "",
    },
    # Qwen's own chat layout. The newline after <|im_end|> is typed by the template, never by the model.
    "chatml": {
        "start": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        "ask": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        "answer": "{}",
        "end": "<|im_end|>",
        "after": "\n",
    },
}


def render(conversations: list[dict], tokenizer: Tokenizer, template: str = "vicuna",
           image_tokens: int = 576) -> tuple[list[int], list[int]]:
    """
    A conversation -> (ids, mask), two lists of the same length; the mask is 1 on answers and their end tokens.

    We write the text turn by turn and note, character by character, which of it the assistant has to write itself.
    Then the whole text is tokenised once, so that the ids are what Hugging Face's processor gives for it, and a
    token is learned if its first character is. (Tokenising piece by piece is not the same where pieces fuse: a
    chatml answer that starts with a newline makes one token, "\\n\\n", with the newline of the template.)

    A conversation that ends with a question gives a generation prompt: it stops where the assistant is to speak.
    An empty answer is legal, and teaches the model to stop at once.
    """
    if template not in TEMPLATES:
        raise DataError(f"unknown template {template!r}, expected one of {', '.join(TEMPLATES)}")
    layout = TEMPLATES[template]
    check_turns(conversations)

    text, learned = layout["start"], bytearray(len(layout["start"]))  # one byte of learned per character of text
    for turn in conversations:
        value = turn["value"].replace(IMAGE, IMAGE * image_tokens)
        if turn["from"] == "human":
            pieces = [(layout["ask"].format(value), 0)]
        else:
            pieces = [(layout["answer"].format(value) + layout["end"], 1), (layout["after"], 0)]
        for piece, is_learned in pieces:
            text += piece
            learned += bytes([is_learned]) * len(piece)

    for token in [IMAGE, layout["end"]]:
        if token in text and tokenizer.token_to_id(token) is None:
            raise DataError(f"the tokenizer does not know {token}, which the {template} conversation needs; "
                            "take the tokenizer of a LLaVA checkpoint with that template")
    try:
        encoding = tokenizer.encode(text, add_special_tokens=False)
    except (TypeError, UnicodeEncodeError):  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
        raise DataError("the text holds a lone surrogate (\\ud800 to \\udfff), not a character; remove it") from None
    return encoding.ids, [learned[start] for start, _ in encoding.offsets]


def check_turns(conversations):
    """Turns are {"from", "value"} and alternate, human first; images stand in what the human says."""
    if not isinstance(conversations, list) or not conversations:
        raise DataError(f"found {shorten(conversations)} as a conversation, expected a list of at least one turn")
    for i, turn in enumerate(conversations):
        expected = ["human", "gpt"][i % 2]
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise DataError(f'turn {i} is {shorten(turn)}, expected {{"from": "{expected}", "value": "some text"}}')
        if turn.get("from") != expected:
            raise DataError(f"turn {i} is from {shorten(turn.get('from'))}, expected \"{expected}\": "
                            "turns alternate human, gpt, human, ...")
        if expected == "gpt" and IMAGE in turn["value"]:
            raise DataError(f"turn {i} is an answer and holds {IMAGE}; images can only stand in questions")


def show(ids: list[int], mask: list[int], tokenizer: Tokenizer) -> None:
    """Print a sample: what the model has to learn in green, a run of image tokens as <image>×576."""
    image_id = tokenizer.token_to_id(IMAGE)
    kinds = [(token == image_id, is_learned) for token, is_learned in zip(ids, mask)]
    for (is_image, is_learned), run in itertools.groupby(range(len(ids)), key=lambda t: kinds[t]):
        run = [ids[t] for t in run]
        text = f"{IMAGE}×{len(run)}" if is_image else tokenizer.decode(run, skip_special_tokens=False)
        print(f"\033[32m{text}\033[0m" if is_learned else text, end="")
    print()


def shorten(value):
    """A found value as JSON, short enough for a one-line message."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."

# --------------------------------------------------------------------------------------------------------------
# 2. Images to pixels

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PAD_COLOUR = tuple(int(255 * mean) for mean in CLIP_MEAN)  # (122, 116, 104), nearly 0 once normalised


def transform_image(image: Image.Image, size: int = 336, pad: bool = True) -> torch.Tensor:
    """
    A PIL image -> (3, size, size) float32, as CLIP was trained to see it.

    CLIP's own recipe scales the short edge to `size` and crops the middle, which loses the ends of a wide photo.
    LLaVA-1.5 pads to a square first (pad=True): smaller, but all there.
    """
    image = to_rgb(image)
    width, height = image.size
    if pad and width != height:
        side = max(width, height)
        square = Image.new("RGB", (side, side), PAD_COLOUR)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image, width, height = square, side, side

    short = min(width, height)
    width, height = int(size * width / short), int(size * height / short)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.crop((left, top, left + size, top + size))

    pixels = np.array(image, dtype=np.float32) / 255  # (S, S, 3)
    pixels = (pixels - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # (3, S, S)


def to_rgb(image):
    """Any PIL mode to RGB. What is transparent becomes white, as in transformers: the colour hidden there is junk."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_image(path: str) -> Image.Image:
    """Read and fully decode an image file, as RGB. EXIF rotation is ignored, as in the official code."""
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except FileNotFoundError:
        raise DataError(f"{path}: no such image file") from None
    except Exception as error:  # broken bytes make Pillow's decoders raise nearly anything: OSError, SyntaxError, ...
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{path}: not a readable image ({reason}); replace the file") from None

# --------------------------------------------------------------------------------------------------------------
# 3. Files to datasets


def parse_sources(text: str) -> list[tuple[str, float]]:
    """
    "a.json:0.5,b.jsonl" -> [("a.json", 0.5), ("b.jsonl", 1.0)]: files to mix, each with its weight (default 1).

    A file of weight w gives round(w * rows) of its rows to an epoch: below 1 a random subset, drawn anew each epoch;
    above 1 all rows floor(w) times, and a random subset once more.
    """
    sources = []
    for item in text.split(","):
        path, weight = item.strip(), 1.0
        if not path.endswith((".json", ".jsonl")):
            path, _, number = path.rpartition(":")
            try:
                weight = float(number)
            except ValueError:
                weight = math.nan
            if not path.endswith((".json", ".jsonl")) or not 0 < weight < math.inf:
                raise DataError(f"data: found {item!r}, expected FILE.json, FILE.jsonl or FILE.json:WEIGHT "
                                "with a weight above 0; separate several by commas")
        sources.append((path, weight))
    return sources


def read_rows(path: str) -> list:
    """The rows of a .json file (one list) or of a .jsonl file (one row per line; blank lines do not count)."""
    line = 0
    try:
        with open(path, encoding="utf-8") as file:
            if not path.endswith(".jsonl"):
                rows = json.load(file)
            else:
                rows = []
                for line, row in enumerate(file, start=1):
                    if row.strip():
                        rows.append(json.loads(row))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except json.JSONDecodeError as error:
        place = f"{path} line {line or error.lineno}"
        hint = "; one object per line? then name the file .jsonl" if error.msg == "Extra data" and not line else ""
        raise DataError(f"{place}: malformed JSON, {error.msg} at column {error.colno}{hint}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of 5,000 digits, a million brackets
        place = f"{path} after line {line}" if line else path
        raise DataError(f"{place}: malformed JSON, {' '.join(str(error).split())}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: found {shorten(rows)}, expected a list of rows")
    return rows


def image_names(value):
    """The row's "image": absent, one name, or a list of names -> a list of names."""
    names = [] if value is None else value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str):
            raise DataError(f'"image" is {shorten(value)}, expected a file name or a list of file names')
    return names


class RowData(torch.utils.data.Dataset):
    """
    What both datasets share: read all files, check every row and learn its length, before any training starts.

    An instruction row is one conversation, a preference row is two about the same images. A subclass says how to
    get them out of a raw row (`parse`), and what to do with a sequence that is too long (`fit`).

    A row that is *wrong* stops everything with a DataError that names it. A row that is right but unusable, too
    long or without anything to learn, is cut or dropped, and counted: print `notes`, one line for each such group.

    rows      [(image paths, conversations)], the rows kept
    lengths   tokens of each row kept, image tokens included; for a pair, of its longer side
    sources   [(first row, last row + 1, weight)] of each file, for the Sampler
    """

    def __init__(self, files: list[tuple[str, float]], image_dir: str, tokenizer: Tokenizer, template: str,
                 image_tokens: int, image_size: int, max_length: int):
        self.image_dir, self.tokenizer, self.template = image_dir, tokenizer, template
        self.image_tokens, self.image_size, self.max_length = image_tokens, image_size, max_length
        self.rows, self.lengths, self.sources, self.notes = [], [], [], []
        seen, total = set(), 0  # image files known to exist; rows read
        cut, too_long, silent = [], [], []  # where the rows stand that we report

        for path, weight in files:
            first = len(self.rows)
            for index, raw in enumerate(read_rows(path)):
                total += 1
                where = f"{path} row {index}"  # counted from 0: json.load(file)[index]
                try:
                    if not isinstance(raw, dict):
                        raise DataError(f"found {shorten(raw)}, expected an object")
                    where += f" id {shorten(raw.get('id', raw.get('idx')))}"
                    names, sides = self.parse(raw)
                    sequences = [self.encode(side) for side in sides]
                    self.check_images(names, sides[0], seen)
                except DataError as error:
                    raise DataError(f"{where}: {error}") from None

                kept = [self.fit(ids, mask) for ids, mask in sequences]
                if any(sum(mask) == 0 for _, mask in sequences):
                    silent.append(where)
                elif None in kept:
                    too_long.append(where)
                else:
                    if kept != sequences:
                        cut.append(where)
                    self.rows.append(([os.path.join(image_dir, name) for name in names], sides))
                    self.lengths.append(max(len(ids) for ids, _ in kept))
            self.sources.append((first, len(self.rows), weight))
        self.fingerprint = f"{len(self.lengths)} {sum(self.lengths)} {max_length}"  # TEMPORARY

        if cut or too_long:
            long = len(cut) + len(too_long)
            self.notes.append(f"{long:,} of {total:,} rows are longer than max_length={max_length}: {len(cut):,} cut, "
                              f"{len(too_long):,} dropped since {self.why_dropped} (first: {(too_long + cut)[0]})")
        if silent:
            self.notes.append(f"{len(silent):,} of {total:,} rows have no answer to learn from and are dropped "
                              f"(first: {silent[0]})")
        if not self.rows:
            found = "; ".join(self.notes) or "the files are empty"
            raise DataError(f"{', '.join(path for path, _ in files)}: no row left to train on: {found}")

    def encode(self, conversation):
        return render(conversation, self.tokenizer, self.template, self.image_tokens)

    def check_images(self, names, conversation, seen):
        """As many <image> as images, and every file there. Whether it can be decoded shows when it is used."""
        holes = sum(turn["value"].count(IMAGE) for turn in conversation)
        if holes != len(names):
            raise DataError(f"{holes} {IMAGE} in the text but {len(names)} images in the row; "
                            f"each image needs its own {IMAGE}")
        for name in names:
            path = os.path.join(self.image_dir, name)
            if path not in seen and not os.path.isfile(path):
                raise DataError(f"image {path!r} does not exist; check image_dir and the name")
            seen.add(path)

    def load_images(self, paths):
        return [transform_image(load_image(path), self.image_size) for path in paths]

    def __len__(self):
        return len(self.rows)


class InstructionData(RowData):
    """
    LLaVA's instruction rows: {"id", "image": name or [names], "conversations": [turns]}; "image" may be absent.

    A row longer than max_length is cut on the right, as long as it keeps all its image tokens and something to learn.
    """
    why_dropped = "no answer is left, or not every image"

    def parse(self, raw):
        if "conversations" not in raw:
            raise DataError(f'no "conversations", found the keys {shorten(sorted(raw))}')
        return image_names(raw.get("image")), [raw["conversations"]]

    def fit(self, ids, mask):
        image_id = self.tokenizer.token_to_id(IMAGE)
        if sum(mask[:self.max_length]) == 0 or image_id in ids[self.max_length:]:
            return None
        return ids[:self.max_length], mask[:self.max_length]

    def __getitem__(self, row):
        paths, [conversation] = self.rows[row]
        ids, mask = self.fit(*self.encode(conversation))
        return {"input_ids": ids, "mask": mask, "images": self.load_images(paths)}


class PreferenceData(RowData):
    """
    Two answers to one question: {"id", "image", "chosen": [turns], "rejected": [turns]}, or RLAIF-V's own columns,
    "question", "chosen" and "rejected" (plain strings) and "image" or "image_path", where we put the image first.

    A pair that does not fit max_length is dropped, never cut: the loss compares the summed log-probabilities of whole
    answers, and a cut answer is another answer.
    """
    why_dropped = "a cut answer is another answer"

    def parse(self, raw):
        for key in ["chosen", "rejected"]:
            if key not in raw:
                raise DataError(f'no "{key}", found the keys {shorten(sorted(raw))}')
        chosen, rejected = raw["chosen"], raw["rejected"]
        if isinstance(chosen, str):  # RLAIF-V
            names = image_names(raw["image"] if "image" in raw else raw.get("image_path"))
            question = raw.get("question")
            if not isinstance(question, str):
                raise DataError(f'"question" is {shorten(question)}, expected a text, as "chosen" is one')
            ask = {"from": "human", "value": f"{IMAGE}\n" * len(names) + question}
            return names, [[ask, {"from": "gpt", "value": answer}] for answer in (chosen, rejected)]

        check_turns(chosen)
        check_turns(rejected)
        if [turn["value"] for turn in chosen[0::2]] != [turn["value"] for turn in rejected[0::2]]:
            raise DataError('the human turns of "chosen" and "rejected" differ; a pair answers one question twice')
        return image_names(raw.get("image")), [chosen, rejected]

    def fit(self, ids, mask):
        return (ids, mask) if len(ids) <= self.max_length else None

    def __getitem__(self, row):
        paths, sides = self.rows[row]
        (chosen_ids, chosen_mask), (rejected_ids, rejected_mask) = [self.encode(side) for side in sides]
        return {"chosen_ids": chosen_ids, "chosen_mask": chosen_mask,
                "rejected_ids": rejected_ids, "rejected_mask": rejected_mask, "images": self.load_images(paths)}

# --------------------------------------------------------------------------------------------------------------
# 4. Samples to batches


def collate(samples: list[dict], pad_token_id: int) -> dict:
    """
    B samples -> input_ids (B, T) long, mask (B, T) bool, pixel_values (N, 3, S, S), or None if no row has an image.

    Rows are padded on the right: positions need no correction then, and causal attention never looks at padding.
    The N images stand in reading order, row after row; the model deals them out to the image tokens in that order.
    """
    return {"input_ids": pad_right([sample["input_ids"] for sample in samples], pad_token_id),
            "mask": pad_right([sample["mask"] for sample in samples], 0).bool(),
            "pixel_values": stack_images(samples)}


def collate_pairs(samples: list[dict], pad_token_id: int) -> dict:
    """
    B pairs -> the same with 2B rows: first all chosen answers, then all rejected ones, so that one pass scores both.

    pixel_values holds the images of each pair once: the vision tower sees them once, and the caller repeats their
    features for the second half.
    """
    sides = [(sample, side) for side in ("chosen", "rejected") for sample in samples]
    return {"input_ids": pad_right([sample[f"{side}_ids"] for sample, side in sides], pad_token_id),
            "mask": pad_right([sample[f"{side}_mask"] for sample, side in sides], 0).bool(),
            "pixel_values": stack_images(samples)}


def pad_right(rows, value):
    out = torch.full((len(rows), max(map(len, rows))), value)  # (B, T)
    for i, row in enumerate(rows):
        out[i, :len(row)] = torch.tensor(row)
    return out


def stack_images(samples):
    images = [image for sample in samples for image in sample["images"]]
    return torch.stack(images) if images else None  # (N, 3, S, S)

# --------------------------------------------------------------------------------------------------------------
# 5. The order of batches


class Sampler:
    """
    Which rows form the global batch of step 0, 1, 2, ...: a pure function of (seed, step). So the position in the
    data is just the step, and a resumed run goes on with the very batch that the interrupted one would have had.

    An epoch draws its rows (see `parse_sources` for weights), shuffles them, and takes them 50 batches at a time:
    each such stretch is sorted by length and cut into batches, and then all batches of the epoch are shuffled. So
    rows of one batch are of similar length, which saves padding, while it stays random which rows meet. A batch has
    exactly batch_size rows; the few left over at the end of an epoch are dropped, other ones each time.
    """
    STRETCH = 50  # batches sorted together: more means less padding and less chance

    def __init__(self, lengths: list[int], batch_size: int, seed: int = 0,
                 sources: list[tuple[int, int, float]] | None = None):
        for name, value, least in [("batch_size", batch_size, 1), ("seed", seed, 0)]:
            if value < least:
                raise DataError(f"{name}={value}, expected at least {least}")
        self.lengths, self.batch_size, self.seed = np.asarray(lengths), batch_size, seed
        self.sources = sources or [(0, len(lengths), 1.0)]
        rows_per_epoch = sum(round(weight * (stop - start)) for start, stop, weight in self.sources)
        self.steps_per_epoch = rows_per_epoch // batch_size
        if self.steps_per_epoch == 0:
            raise DataError(f"an epoch has {rows_per_epoch} rows, fewer than batch_size={batch_size}; "
                            "lower batch_size or give more data")
        self._epoch, self._batches = None, None  # the epoch worked out last

    def batch(self, step: int) -> list[int]:
        """The rows of global batch `step`, sorted by length."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self.shuffle(epoch)
        return self._batches[position].tolist()

    def shuffle(self, epoch):
        """All batches of an epoch, (steps_per_epoch, batch_size) row numbers."""
        rng = np.random.default_rng([self.seed, epoch])
        rows = []
        for start, stop, weight in self.sources:
            left = round(weight * (stop - start))
            while left > 0:
                rows.append(start + rng.permutation(stop - start)[:left])
                left -= len(rows[-1])
        rows = rng.permutation(np.concatenate(rows))[:self.steps_per_epoch * self.batch_size]

        stretch = self.STRETCH * self.batch_size
        for i in range(0, len(rows), stretch):
            part = rows[i:i + stretch]
            rows[i:i + stretch] = part[np.argsort(self.lengths[part], kind="stable")]
        return rng.permutation(rows.reshape(self.steps_per_epoch, self.batch_size))

    def state_dict(self) -> dict:
        """What must be the same after a restart, for a step to mean the same rows."""
        return {"seed": self.seed, "rows": len(self.lengths), "batch_size": self.batch_size,
                "sources": [list(source) for source in self.sources]}

    def load_state_dict(self, state: dict) -> None:
        """Check that this is the sampler whose state was saved; there is nothing else to restore."""
        for key, now in self.state_dict().items():
            if state.get(key) != now:
                raise DataError(f"the interrupted run had {key}={state.get(key)}, this one has {key}={now}; "
                                "resume with the same data and settings, or start in a new out_dir")


def micro_batches(rows: list[int], micro_batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """
    This rank's share of a global batch, cut into passes of micro_batch_size rows.

    `rows` come sorted by length, and neighbouring cuts go to different ranks: in every pass the ranks have rows of
    about the same length, and none waits long for the others. 2 ranks with passes of 2 rows own 0 0 1 1 0 0 1 1.
    """
    if micro_batch_size < 1:
        raise DataError(f"micro_batch_size={micro_batch_size}, expected at least 1")
    at_once = micro_batch_size * world_size
    if len(rows) % at_once:
        raise DataError(f"batch_size={len(rows)} is not a multiple of micro_batch_size={micro_batch_size} x "
                        f"{world_size} ranks = {at_once}; try batch_size={math.ceil(len(rows) / at_once) * at_once}")
    starts = range(rank * micro_batch_size, len(rows), at_once)
    return [rows[start:start + micro_batch_size] for start in starts]


def batches(dataset: RowData, sampler: Sampler, micro_batch_size: int, rank: int, world_size: int,
            start_step: int, end_step: int, num_workers: int, collate_fn: Callable) -> Iterator[list[dict]]:
    """
    Yield, for each step from start_step to end_step - 1, the list of this rank's collated micro-batches.
    """
    def wanted():
        for step in range(start_step, end_step):
            yield from micro_batches(sampler.batch(step), micro_batch_size, rank, world_size)

    step = []
    for micro_batch in prefetch(dataset, wanted(), collate_fn, num_workers):
        step.append(micro_batch)
        if len(step) * micro_batch_size * world_size == sampler.batch_size:
            yield step
            step = []


def prefetch(dataset: RowData, groups: Iterable[list[int]], collate_fn: Callable, num_workers: int) -> Iterator[dict]:
    """Yield each group of rows, collated. With num_workers > 0 as many processes decode images and keep ahead."""
    # batch_size=None: `groups` already says which rows go together. The DataLoader draws a seed for its workers; it
    # gets a generator of its own for that, to leave the global random state as it was.
    loader = DataLoader(MicroBatches(dataset, collate_fn), sampler=groups, batch_size=None, collate_fn=as_it_is,
                        num_workers=num_workers, generator=torch.Generator())
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


class MicroBatches:
    """
    dataset[rows] -> those rows, collated. A DataError is handed over as a value: raised inside a worker process, it
    would reach the user wrapped in torch's traceback instead of as its one line.
    """

    def __init__(self, dataset, collate_fn):
        self.dataset, self.collate_fn = dataset, collate_fn

    def __getitem__(self, rows):
        try:
            return self.collate_fn([self.dataset[row] for row in rows])
        except DataError as error:
            return error


def as_it_is(micro_batch):
    return micro_batch
