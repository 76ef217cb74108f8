"""
Rows of a user's JSON as conversations: LLaVA's rows, preference pairs, and the shapes that other tools write.

    {"id", "image": name or [names], "conversations": [{"from": "human" or "gpt", "value": text}, ...]}
    {"id", "image", "chosen": [turns], "rejected": [turns]}

Whatever else a row holds is an error that says what was found and what was expected; nothing is guessed.
"""
import re

from configurator import UserError, shorten
from data import IMAGE, as_text, check_turns

MEDIA_KEY = re.compile("image|img|picture|photo|video|audio|^media$|^frames?$", re.IGNORECASE)     # of what a row shows
FILE_KEY = re.compile("file|path|url", re.IGNORECASE)                # of any file, a picture or not
PICTURE_NAME = re.compile(r"\.(jpe?g|png|gif|webp|bmp|tiff?)\b", re.IGNORECASE)
IMAGE_TAG = re.compile(r"<img>\s*\S+?\s*</img>")                    # Qwen-VL's


def parse_instruction(raw: object) -> tuple[list[str], list[list[dict]]]:
    """
    LLaVA's row -> (its image names, [its conversation]).

    {"id", "image": name or [names], "conversations": [turns]}, without "image" if there is none.
    """
    raw = llava_row(raw)
    check_keys(raw, ["conversations"])
    return check_row(find_image(raw, ["image"]), [raw["conversations"]])


def llava_row(raw: object) -> object:
    """
    Rows of other tools in LLaVA's words; LLaVA's own rows, and what is no row, unchanged.

    {"messages": [{"role": "user" or "assistant", "content": text or parts}], "image" or "images": name or [names]}; a
    part is {"type": "text", "text"} or {"type": "image"}. Turns "from" user and assistant are human and gpt.
    """
    if not isinstance(raw, dict):
        return raw
    for key in ("system", "system_prompt"):
        if raw.get(key):
            raise UserError(f'"{key}" is {shorten(raw[key])}, and the template has its own system text; put this one in '
                            'front of the first question, or remove it')
    refuse_two(raw, "conversations", "messages", llava_turns)
    if "messages" in raw and "conversations" not in raw:
        raw = {"conversations" if key == "messages" else key: value for key, value in raw.items()}
        if "images" in raw and not raw.get("image"):
            raw["image"] = raw.pop("images")
    return raw | {key: llava_turns(raw[key]) for key in ("conversations", "chosen", "rejected") if key in raw}


def llava_turns(turns):
    return [llava_turn(turn) for turn in turns] if isinstance(turns, list) else turns


def llava_turn(turn):
    if not isinstance(turn, dict):
        return turn
    refuse_two(turn, "from", "role", llava_speaker)
    refuse_two(turn, "value", "content", llava_text)
    speaker = llava_speaker(turn.get("from", turn.get("role")))
    for key in ("loss", "train", "weight"):
        if speaker == "gpt" and isinstance(turn.get(key), (bool, int, float)) and turn[key] != 1:
            raise UserError(f'found "{key}": {shorten(turn[key])} in a turn, but all answers are trained on alike; remove '
                            'it, or end the row before that turn')
    if turn.get("from") in ("human", "gpt"):
        return turn
    return {"from": speaker, "value": llava_text(turn.get("value", turn.get("content")))}


def llava_speaker(name):
    return {"user": "human", "assistant": "gpt"}.get(name, name) if isinstance(name, str) else name


def llava_text(content):
    return "".join(text_of_part(part) for part in content) if isinstance(content, list) else content


def refuse_two(found, first, second, read):
    """UserError if both keys are there and say different things, as `read` reads them: one would be ignored."""
    if found.get(first) is not None and found.get(second) is not None and read(found[first]) != read(found[second]):
        raise UserError(f'"{first}" is {shorten(found[first])} and "{second}" is {shorten(found[second])}, expected only '
                        'one of them')


def text_of_part(part):
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "image" and part.keys() <= {"type", "index", "text"}:
        return f"{IMAGE}\n"
    raise UserError(f'found {shorten(part)} in a content, expected {{"type": "text", "text": …}} or {{"type": "image"}}, with the '
                    'names of the files in the row\'s "image"')


def parse_pair(raw: object) -> tuple[list[str], list[list[dict]]]:
    """
    Two answers to one question -> (image names, [the chosen conversation, the rejected one]).

    {"id", "image", "chosen": [turns], "rejected": [turns]}, or RLAIF-V's own columns: "question", "chosen" and
    "rejected" as plain strings; the images are then put in front of the question. "image_path" will do for "image".
    """
    raw = llava_row(raw)
    check_keys(raw, ["chosen", "rejected"])
    image, conversations = find_image(raw, ["image", "image_path"]), [raw["chosen"], raw["rejected"]]
    if isinstance(raw["chosen"], str):  # RLAIF-V
        question = raw.get("question")
        if not isinstance(question, str):
            raise UserError(f'"question" is {shorten(question)}, expected a text, as "chosen" is one')
        ask = {"from": "human", "value": f"{IMAGE}\n" * len(image_names(image)) + question}
        conversations = [[ask, {"from": "gpt", "value": raw[side]}] for side in ("chosen", "rejected")]

    names, (chosen, rejected) = check_row(image, conversations)
    if [turn["value"] for turn in chosen[0::2]] != [turn["value"] for turn in rejected[0::2]]:
        raise UserError('the human turns of "chosen" and "rejected" differ; a pair answers one question twice')
    for key in ("question", "prompt"):
        if not said_by_human(raw.get(key)) <= said_by_human(conversations[0]):
            raise UserError(f'"{key}" is {shorten(raw[key])}, which the human turns of the pair do not say; remove it, or '
                            'correct them')
    return names, [chosen, rejected]


def said_by_human(value):
    """The texts of the human turns, or the one text, without <image> and white space around."""
    turns = llava_turns(value) if isinstance(value, list) else [{"from": "human", "value": value}]
    texts = [turn.get("value") for turn in turns if isinstance(turn, dict) and turn.get("from") == "human"]
    return {text.replace(IMAGE, "").strip() for text in texts if isinstance(text, str)} - {""}


def check_keys(raw, keys):
    if not isinstance(raw, dict):
        raise UserError(f"found {shorten(raw)}, expected an object")
    for key in keys:
        if key not in raw:
            raise UserError(f'no "{key}", found the keys {shorten(sorted(raw))}')


def find_image(raw, keys):
    """The row's "image", under the first of the keys that is set. A picture under another key would be lost without a word."""
    for key in keys:
        if raw.get(key):
            return raw[key]
    for key, value in raw.items():
        names = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        is_lost = MEDIA_KEY.search(key) or FILE_KEY.search(key) and any(
            isinstance(name, str) and PICTURE_NAME.search(name) for name in names)
        if is_lost and value and isinstance(value, (str, list, dict)):
            raise UserError(f'"{key}" is {shorten(value)}, but the row has no "image"; name the picture there, or remove '
                            f'"{key}" (pictures are all that a model sees here)')
    return raw.get("image")


def check_row(image, conversations):
    """The row's "image" as a list of names, and its conversations, with one <image> in the questions for each name."""
    names = image_names(image)
    for conversation in conversations:
        check_turns(conversation)
    questions = [turn["value"].strip() for turn in conversations[0][0::2]]
    for question in questions:
        if tag := IMAGE_TAG.search(question):
            raise UserError(f'found {shorten(tag[0])} in a question; write {IMAGE} there, and name the picture in "image"')
    slots = sum(question.count(IMAGE) for question in questions)
    # In a row without images <image> is text, unless it is where LLaVA puts an image: before or after all of the text.
    if not names and not any(question.startswith(IMAGE) or question.endswith(IMAGE) for question in questions):
        return names, [without_images(conversation) for conversation in conversations]
    if slots != len(names):
        raise UserError(f"{slots} {IMAGE} in the text but {len(names)} images in the row; "
                        f"each image needs its own {IMAGE}")
    return names, conversations


def without_images(conversation: list[dict]) -> list[dict]:
    return [turn | {"value": as_text(turn["value"])} for turn in conversation]


def image_names(value):
    """The row's "image": absent, one name, or a list of names -> a list of names."""
    names = [] if value is None else value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str):
            raise UserError(f'"image" is {shorten(value)}, expected a file name or a list of file names')
    return names
