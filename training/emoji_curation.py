"""What of the artwork is worth drawing: which icons stay, which go and why.

Every icon that goes is counted under a reason; the data card lists the counts.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgeflow.training.emoji_names import NameTable, is_skin_tone
from edgeflow.training.emoji_sources import Icon, IconSet, Source

#: Share of (concept, style) pairs held out for the test split, and how many other styles of the concept
#: must stay in train for that.
TEST_SHARE = 0.04
MIN_STYLES_IN_TRAIN = 2

ALIAS = "another name of the same picture"
HIDDEN = "replaced by its own set"
SKIN_TONE = "skin-tone variant"
NO_WORDS = "name is not words"
SECOND_DRAWING = "second drawing of a concept in the same style"
SAME_PICTURE = "same picture as another"
BLANK = "blank or nearly blank"
UNDRAWABLE = "cannot be rendered"


@dataclass(frozen=True)
class Family:
    """Pictures that are many of a kind, or writing: a few stay as examples, named here so that a further
    source never changes which."""

    reason: str
    pattern: re.Pattern[str]
    kept: frozenset[str]


def _family(reason: str, pattern: str, *kept: str) -> Family:
    return Family(reason, re.compile(pattern), frozenset(kept))


FAMILIES: tuple[Family, ...] = (
    _family("clock face", r"\b(oclock|thirty)\b", "three oclock", "ten thirty"),
    _family(
        "flag",
        r"^flag\b|\bflag$",
        *("flag japan", "flag france", "flag italy", "flag germany", "flag canada", "flag brazil"),
        *("flag united kingdom", "flag united states", "flag south korea", "flag switzerland"),
        *("flag in hole", "pirate flag", "rainbow flag", "chequered flag", "black flag", "white flag"),
        *("triangular flag",),
    ),
    _family(
        "keycap, digit or letter",
        r"\bkeycap\b|^digit\b|^\d+$|^ten$|\bletters?\b|\bregional indicator|\blatin\b"
        r"|^(asterisk|pound symbol)$|^(a|b|o|p|ab|m|circled m)( button)?( blood type)?$"
        r"|^negative squared\b.*\bcapti?al\b|\bfont size$",
        "keycap 1",
        "a button blood type",
    ),
    _family("squared ideograph", r"^japanese .*button$|ideograph|\bkatakana\b|^squared\b"),
    _family(
        "button or arrow with a word on it",
        r"^(cl|cool|free|id|new|ng|ok|sos|up|up exclamation|vs) button$|^squared (cool|free|new|ok|sos)$"
        r"|^input\b|^(back|end|on|on exclamation|soon|top) arrow$|^on arrow\b"
        r"|^(copyright|registered|trade mark|information|atm sign|water closet|e mail)$",
        "sos button",
        "ok button",
    ),
    _family(
        "zodiac sign",
        r"^(aries|taurus|gemini|cancer|leo|virgo|libra|scorpio|scorpius|sagittarius|capricorn|aquarius|pisces"
        r"|ophiuchus)$",
        "leo",
        "pisces",
    ),
    _family(
        "bare direction or window sign",
        r"^(up|down|left|right|index|hands?|overlap|minimize|maximize|outbox|pages?)$|^three rays\b"
        r"|^sideways\b|^(upper|lower) (left|right) \w+ circle$",
    ),
    _family(
        "family by members",
        r"^family (man|woman|adult|boy|girl|child)\b",
        "family man woman girl boy",
        "family man boy",
        "family woman girl",
    ),
)


@dataclass(frozen=True)
class Entry:
    """One icon that may stay: what it shows, in which style, and how it is drawn."""

    source: Source
    icon: Icon
    concept: str

    @property
    def key(self) -> str:
        return f"{self.source.name}__{self.icon.name}"

    @property
    def caption(self) -> str:
        return f"{self.concept}, {self.source.style} style"


def curate(icon_sets: Sequence[IconSet]) -> tuple[list[Entry], dict[str, Counter[str]]]:
    """The icons worth rendering, and by source how many went for which reason.

    Raises nothing: an odd icon is a counted one. The order is that of the sources, then by name.
    """
    table = NameTable(icon_sets)
    kept: list[Entry] = []
    dropped: dict[str, Counter[str]] = {}
    for icon_set in icon_sets:
        counts = dropped.setdefault(icon_set.source.name, Counter())
        counts[ALIAS] += icon_set.num_aliases
        counts[HIDDEN] += len(icon_set.hidden)
        names = frozenset(icon.name for icon in icon_set.icons)
        named: dict[str, list[Entry]] = {}
        for icon in icon_set.icons:
            concept = table.concept(icon, icon_set)
            reason = _why_not(icon, icon_set, names, concept)
            if reason or concept is None:
                counts[reason or NO_WORDS] += 1
            else:
                named.setdefault(concept, []).append(Entry(icon_set.source, icon, concept))
        for concept, drawings in named.items():
            first = min(drawings, key=lambda entry: (_letters(entry.icon.name) != _letters(concept),))
            kept.append(first)
            counts[SECOND_DRAWING] += len(drawings) - 1
    return kept, dropped


def _why_not(icon: Icon, icon_set: IconSet, names: frozenset[str], concept: str | None) -> str | None:
    if is_skin_tone(icon, icon_set, names):
        return SKIN_TONE
    if concept is None:
        return NO_WORDS
    for family in FAMILIES:
        if family.pattern.search(concept) and concept not in family.kept:
            return family.reason
    return None


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def assign_splits(pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Say for each (concept, style) whether it trains or tests.

    A pair is a candidate by its own hash alone, and is held out when at least ``MIN_STYLES_IN_TRAIN`` other
    styles of its concept are no candidates. So a further source never brings a held-out pair back into train;
    it can only hold out a candidate whose concept had too few styles before.
    """
    pairs = set(pairs)
    certain = Counter(concept for concept, style in pairs if not _is_candidate(concept, style))
    return {
        (concept, style): "test"
        if _is_candidate(concept, style) and certain[concept] >= MIN_STYLES_IN_TRAIN
        else "train"
        for concept, style in sorted(pairs)
    }


def _is_candidate(concept: str, style: str) -> bool:
    digest = hashlib.sha256(f"{concept}\n{style}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < TEST_SHARE * 2**64
