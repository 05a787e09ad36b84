"""The functions that automation tasks call: signatures, values and the words people ask with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

Draw = Callable[[Random], Any]


@dataclass(frozen=True)
class Function:
    """A function. ``parameters``: name -> (type as shown, how to draw a value). ``requests``: templates."""

    name: str
    parameters: Mapping[str, tuple[str, Draw]]
    requests: tuple[str, ...]

    @property
    def signature(self) -> str:
        return f"{self.name}({', '.join(f'{name}: {kind}' for name, (kind, _) in self.parameters.items())})"

    def say(self, parameter: str, value: Any) -> str:
        """A value as a person says it."""
        if isinstance(value, bool):
            return "on" if value else "off"
        if isinstance(value, list):
            return " and ".join(map(str, value))
        return str(value)


def _one_of(*values: Any) -> Draw:
    return lambda rng: rng.choice(values)


def _between(low: int, high: int, step: int = 1) -> Draw:
    return lambda rng: rng.randrange(low, high + 1, step)


def _some(values: tuple[str, ...], count: int) -> Draw:
    return lambda rng: rng.sample(values, count)


_NAMES = (
    "Ana", "Ben", "Carla", "David", "Elif", "Farid", "Grace", "Hiro", "Ines", "Jonas", "Kemi", "Lena", "Marco", "Nina",
)  # fmt: skip
_TITLES = (
    "team sync", "dentist", "budget review", "lunch", "yoga class", "project kickoff", "call with the bank",
    "piano lesson", "design review", "birthday party", "interview", "school meeting", "flight to Rome", "gym",
    "book club",
)  # fmt: skip
_FILES = (
    "report.txt", "notes.md", "photo.jpg", "data.csv", "invoice.pdf", "todo.txt", "draft.docx", "backup.zip",
    "song.mp3", "budget.xlsx", "slides.pptx", "map.png", "log.txt", "recipe.md", "letter.pdf",
)  # fmt: skip
_FOLDERS = ("archive", "photos", "work", "backup", "desktop", "projects", "taxes", "music", "shared", "inbox")
_ROOMS = ("kitchen", "bedroom", "living room", "bathroom", "garage", "office", "hall", "nursery", "attic", "studio")
_TEXTS = (
    "I am running late", "dinner is ready", "the meeting is moved", "see you tomorrow", "please call me back",
    "the parcel has arrived", "thanks for your help", "I sent the file", "happy birthday", "we need more milk",
    "the train is delayed", "can you send the slides", "I am at the door", "the game starts soon",
)  # fmt: skip
_WORDS = ("invoice", "holiday", "contract", "recipe", "budget", "ticket", "password", "summary", "garden", "insurance")

_DAY = ("string", _one_of("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"))
_HOUR = ("integer", _between(7, 21))
_TITLE = ("string", _one_of(*_TITLES))
_NAME = ("string", _one_of(*_NAMES))
_FILE = ("string", _one_of(*_FILES))
_FOLDER = ("string", _one_of(*_FOLDERS))
_ROOM = ("string", _one_of(*_ROOMS))
_TEXT = ("string", _one_of(*_TEXTS))
_SWITCH = ("boolean", _one_of(True, False))
_LIMIT = ("integer", _between(3, 30))
_LENGTH = ("integer", _between(15, 180, 15))
_DAYS = ("integer", _between(1, 30))
_PERCENT = ("integer", _between(10, 100, 10))
_TWO = ("list of strings", _some(_NAMES, 2))
_THREE = ("list of strings", _some(_NAMES, 3))
_TWO_FILES = ("list of strings", _some(_FILES, 2))
_TWO_ROOMS = ("list of strings", _some(_ROOMS, 2))
_NEW = ("string", _one_of("final.txt", "old.csv", "copy.pdf", "new.md", "v2.zip"))
_ARCHIVE = ("string", _one_of("all.zip", "pack.zip", "old.zip"))
_COLOR = ("string", _one_of("red", "blue", "green", "white", "yellow", "purple"))
_GENRE = ("string", _one_of("jazz", "rock", "piano", "folk", "techno", "opera"))
_WORD = ("string", _one_of(*_WORDS))

CALENDAR = (
    Function("list_events", {"day": _DAY}, (
        "What is on my calendar on {day}?", "Show me my events for {day}.", "What do I have planned on {day}?")),
    Function("cancel_event", {"title": _TITLE, "day": _DAY}, (
        "Cancel the {title} on {day}.", "Please remove {title} from {day}.",
        "I can't make {title} on {day}, delete it.")),
    Function("set_reminder", {"text": _TITLE, "minutes": ("integer", _between(5, 90, 5))}, (
        "Remind me of {text} in {minutes} minutes.", "In {minutes} minutes, remind me about {text}.",
        "Set a reminder for {text} {minutes} minutes from now.")),
    Function("find_free_slot", {"day": _DAY, "minutes": ("integer", _between(15, 120, 15))}, (
        "Find {minutes} free minutes on {day}.", "When am I free for {minutes} minutes on {day}?")),
    Function("move_event", {"title": _TITLE, "day": _DAY, "hour": _HOUR}, (
        "Move {title} to {day} at {hour} o'clock.", "Reschedule {title} for {day}, hour {hour}.",
        "Please shift {title} to {day} at hour {hour}.")),
    Function("create_event", {"title": _TITLE, "day": _DAY, "hour": _HOUR, "minutes": _LENGTH}, (
        "Schedule {title} on {day} at {hour} o'clock for {minutes} minutes.",
        "Put {title} in my calendar: {day}, hour {hour}, {minutes} minutes.",
        "On {day} at hour {hour} I have {title} for {minutes} minutes, add it.")),
    Function("invite", {"title": _TITLE, "day": _DAY, "people": _TWO}, (
        "Invite {people} to {title} on {day}.", "Ask {people} to join {title} on {day}.")),
)  # fmt: skip

FILES = (
    Function("open_file", {"name": _FILE}, ("Open {name}.", "Show me {name}, please.", "I want to see {name}.")),
    Function("delete_file", {"name": _FILE, "permanent": _SWITCH}, (
        "Delete {name}, with permanent deletion {permanent}.", "Get rid of {name} (permanent: {permanent}).")),
    Function("rename_file", {"old": _FILE, "new": _NEW}, (
        "Rename {old} to {new}.", "Change the name of {old} to {new}.", "Call {old} {new} from now on.")),
    Function("copy_file", {"name": _FILE, "folder": _FOLDER}, (
        "Copy {name} to the folder {folder}.", "Put a copy of {name} into {folder}.")),
    Function("move_file", {"name": _FILE, "folder": _FOLDER}, (
        "Move {name} to {folder}.", "{name} belongs in the folder {folder}, move it there.")),
    Function("search_files", {"word": _WORD, "folder": _FOLDER, "limit": _LIMIT}, (
        "Find up to {limit} files about {word} in {folder}.", "Search {folder} for {word}, at most {limit} results.",
        "Look in {folder} for {limit} files that mention {word}.")),
    Function("compress", {"names": _TWO_FILES, "archive": _ARCHIVE}, (
        "Zip {names} into {archive}.", "Pack {names} together as {archive}.")),
    Function("share_file", {"name": _FILE, "person": _NAME, "days": _DAYS, "can_edit": _SWITCH}, (
        "Share {name} with {person} for {days} days, editing {can_edit}.",
        "Give {person} access to {name} for {days} days with editing {can_edit}.")),
)  # fmt: skip

MESSAGES = (
    Function("read_messages", {"sender": _NAME}, (
        "Read me the messages from {sender}.", "What did {sender} write?", "Any news from {sender}? Read it out.")),
    Function("send_message", {"to": _NAME, "text": _TEXT}, (
        "Tell {to}: {text}.", 'Send {to} the message "{text}".', "Write to {to} that {text}.", "Text {to}: {text}.")),
    Function("block_sender", {"sender": _NAME, "days": ("integer", _between(1, 60))}, (
        "Block {sender} for {days} days.", "I don't want to hear from {sender} for {days} days.")),
    Function("forward_last", {"sender": _NAME, "to": _NAME}, (
        "Forward the last message of {sender} to {to}.", "Send what {sender} wrote last on to {to}.")),
    Function("search_messages", {"word": _WORD, "sender": _NAME, "limit": _LIMIT}, (
        "Find up to {limit} messages from {sender} about {word}.",
        "Search {sender}'s messages for {word}, {limit} at most.")),
    Function("send_email", {"to": _NAME, "subject": _WORD, "text": _TEXT}, (
        "E-mail {to} with subject {subject}: {text}.", 'Mail {to}, subject {subject}, saying "{text}".')),
    Function("send_group", {"people": _THREE, "text": _TEXT, "urgent": _SWITCH}, (
        "Send {people}: {text}. Urgent flag {urgent}.", 'Write "{text}" to {people} with the urgent flag {urgent}.')),
)  # fmt: skip

HOME = (
    Function("lock_doors", {"room": _ROOM}, ("Lock the {room} door.", "Make sure the door of the {room} is locked.")),
    Function("switch_light", {"room": _ROOM, "on": _SWITCH}, (
        "Turn {on} the light in the {room}.", "Switch the {room} light {on}.", "{room} light {on}, please.")),
    Function("set_temperature", {"room": _ROOM, "celsius": ("integer", _between(15, 26))}, (
        "Set the {room} to {celsius} degrees.", "I want {celsius} degrees in the {room}.",
        "Heat the {room} to {celsius} degrees.")),
    Function("set_blinds", {"room": _ROOM, "percent": ("integer", _between(0, 100, 10))}, (
        "Set the blinds in the {room} to {percent} percent.", "{percent} percent for the {room} blinds, please.")),
    Function("set_lamp", {"room": _ROOM, "color": _COLOR, "percent": _PERCENT}, (
        "Make the {room} lamp {color} at {percent} percent.",
        "I'd like {color} light at {percent} percent in the {room}.")),
    Function("play_music", {"room": _ROOM, "genre": _GENRE, "volume": ("integer", _between(1, 10))}, (
        "Play {genre} in the {room} at volume {volume}.", "Some {genre} for the {room}, volume {volume}.")),
    Function("start_vacuum", {"rooms": _TWO_ROOMS, "hour": _HOUR, "quiet": _SWITCH}, (
        "Vacuum the {rooms} at {hour} o'clock with quiet mode {quiet}.",
        "At hour {hour}, start the vacuum in the {rooms}, quiet mode {quiet}.")),
    Function("schedule_light", {"room": _ROOM, "on": _SWITCH, "day": _DAY, "hour": _HOUR}, (
        "On {day} at {hour} o'clock, turn {on} the {room} light.",
        "Turn the {room} light {on} on {day} at hour {hour}.")),
)  # fmt: skip
