"""One name for one thing: every set's icon names brought to the same concept.

The sets name the same emoji differently ("mage" and "person-mage", "wave" and "waterwave"). Unicode's code
points tie them together: the sets that know the code points of their icons teach a table, and the others
look their names up in it, by their aliases, by Unicode's own character names, and, where a set joins its
words ("alarmclock"), by cutting the name back into words.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence

from edgeflow.training.emoji_sources import Icon, IconSet

_SKIN_TONE = re.compile(r"(light|medium|dark)-skin-tone|-tone\d|-type-\d")
#: What short-spoken sets leave out ("angry" is "angry-face", "walking" is "person-walking").
_LEFT_OUT = ("{}", "{}face", "person{}")
#: A joined name this close to a known one is a misspelling of it ("saggitarius").
_SPELLING_CUTOFF = 0.9
_SPELLING_MIN_LETTERS = 7
#: A set with a smaller share of hyphened names joins its words.
_JOINING_SHARE = 0.1
#: Blocks of arrows, signs and pictographs, full since Unicode 8: their names' words are words too.
_PICTURE_BLOCKS = (range(0x2190, 0x2C00), range(0x1F300, 0x1F650), range(0x1F680, 0x1F6C6))


def is_skin_tone(icon: Icon, icon_set: IconSet, names: frozenset[str]) -> bool:
    """Whether the drawing is another one in another skin tone, by its words or by its set's suffixes.

    A bare suffix counts only where the set has both ends of the scale ("man-light" and "man-dark", but
    not "traffic-light"). ``names`` are all names of the set.
    """
    if _SKIN_TONE.search(icon.name):
        return True
    for suffix in icon_set.source.tone_suffixes:
        stem = icon.name.removesuffix(suffix)
        if stem != icon.name:
            return {f"{stem}-light", f"{stem}-dark"} <= names
    return False


class NameTable:
    """What the sets with code points teach about names. Earlier sets decide what a concept is called."""

    def __init__(self, icon_sets: Sequence[IconSet]):
        self._name_of: dict[str, str] = {}
        self._codepoint_of: dict[str, str] = {}
        for icon_set in icon_sets:
            for name, codepoint in sorted(icon_set.codepoints.items()):
                self._name_of.setdefault(codepoint, _plain(name))
        for icon_set in icon_sets:
            for name, codepoint in sorted(icon_set.codepoints.items()):
                for also in (name, *icon_set.also_called.get(name, ())):
                    self._codepoint_of.setdefault(_squash(also), codepoint)
        for codepoint in sorted(self._name_of):
            if said := _unicode_name(codepoint):
                self._codepoint_of.setdefault(_squash(said), codepoint)
        self._words = frozenset(self._known_words(icon_sets))
        self._by_words = {_bag(_words(name)): code for code, name in sorted(self._name_of.items())}
        self._spellings = sorted(key for key in self._codepoint_of if "tone" not in key)

    def _known_words(self, icon_sets: Sequence[IconSet]) -> Iterable[str]:
        for codepoint, name in self._name_of.items():
            yield from _words(name)
            yield from _words(_unicode_name(codepoint).lower())
        for icon_set in icon_sets:
            for icon in icon_set.icons:
                if "-" in icon.name:
                    yield from _words(icon.name)
        for block in _PICTURE_BLOCKS:
            for character in block:
                yield from _words(unicodedata.name(chr(character), ""))

    def concept(self, icon: Icon, icon_set: IconSet) -> str | None:
        """The concept in words ("grinning face with big eyes"); None where the name is no words at all."""
        codepoint = icon_set.codepoints.get(icon.name)
        if codepoint is None:
            codepoint = self._look_up((icon.name, *icon_set.also_called.get(icon.name, ())))
        if codepoint is not None:
            return " ".join(_words(self._name_of[codepoint]))
        name = _plain(icon.name)
        if "-" in name or name in self._words or not _joins_words(icon_set):
            return " ".join(_words(name))
        cut = self._cut(name)
        if cut and (known := self._by_words.get(_bag(cut))):
            return " ".join(_words(self._name_of[known]))
        if len(name) >= _SPELLING_MIN_LETTERS:
            close = difflib.get_close_matches(name, self._spellings, n=1, cutoff=_SPELLING_CUTOFF)
            if close:
                return " ".join(_words(self._name_of[self._codepoint_of[close[0]]]))
        return " ".join(cut) if cut else None

    def _look_up(self, names: Iterable[str]) -> str | None:
        squashed = [_squash(_plain(name)) for name in names]
        for pattern in _LEFT_OUT:
            for name in squashed:
                codepoint = self._codepoint_of.get(pattern.format(name))
                if codepoint is not None:
                    return codepoint
        return None

    def _cut(self, name: str) -> list[str]:
        """Cut a joined name into the fewest known words, long words first; empty where it can't be done."""
        best: list[tuple[int, int, list[str]] | None] = [(0, 0, [])] + [None] * len(name)
        for end in range(1, len(name) + 1):
            for start in range(end):
                before, word = best[start], name[start:end]
                if before is None or not (word.isdigit() or (len(word) > 1 and word in self._words)):
                    continue
                found = (before[0] + 1, before[1] - len(word) ** 2, [*before[2], word])
                now = best[end]
                if now is None or found[:2] < now[:2]:
                    best[end] = found
        last = best[len(name)]
        return last[2] if last else []


def _joins_words(icon_set: IconSet) -> bool:
    """Whether the set writes its names in one ("alarmclock"): hardly any has a hyphen."""
    hyphened = sum("-" in icon.name for icon in icon_set.icons)
    return hyphened < _JOINING_SHARE * len(icon_set.icons)


def _plain(name: str) -> str:
    """A set's own habits taken out of a name ("flag-for-flag-peru", "flag-for-peru" → "flag-peru")."""
    name = name.lower().replace("_", "-")
    return re.sub(r"^flag-(for-)?(flag-)?", "flag-", name)


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]


def _bag(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(words))


def _squash(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _unicode_name(codepoint: str) -> str:
    """Unicode's name of a single character ("" for a sequence of several)."""
    if "-" in codepoint:
        return ""
    return unicodedata.name(chr(int(codepoint, 16)), "")
