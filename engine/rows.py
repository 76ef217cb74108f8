"""
Rows of a user's JSON as conversations: LLaVA's rows, preference pairs, and the shapes that other tools write.

    {"id", "image": name or [names], "conversations": [{"from": "human" or "gpt", "value": text}, ...]}
    {"id", "image", "chosen": [turns], "rejected": [turns]}

Whatever else a row holds is an error that says what was found and what was expected; nothing is guessed.
"""
import re

from configurator import UserError, shorten
from data import IMAGE, as_text, check_turns


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
    if "messages" in raw and "conversations" not in raw:
        raw = {"conversations" if key == "messages" else key: value for key, value in raw.items()}
        if "images" in raw and not raw.get("image"):
            raw["image"] = raw.pop("images")
    return raw | {key: [llava_turn(turn) for turn in raw[key]]
                  for key in ("conversations", "chosen", "rejected") if isinstance(raw.get(key), list)}


def llava_turn(turn):
    if not isinstance(turn, dict) or turn.get("from") in ("human", "gpt"):
        return turn
    speaker, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if isinstance(value, list):
        value = "".join(text_of_part(part) for part in value)
    return {"from": {"user": "human", "assistant": "gpt"}.get(speaker, speaker) if isinstance(speaker, str) else speaker, "value": value}


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
    return names, [chosen, rejected]


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
        if value and isinstance(value, (str, list, dict)) and re.search("image|img|picture|photo", key, re.IGNORECASE):
            raise UserError(f'"{key}" is {shorten(value)}, but the row has no "image"; name the picture there, or remove "{key}"')
    return raw.get("image")


def check_row(image, conversations):
    """The row's "image" as a list of names, and its conversations, with one <image> in the questions for each name."""
    names = image_names(image)
    for conversation in conversations:
        check_turns(conversation)
    questions = [turn["value"].strip() for turn in conversations[0][0::2]]
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
