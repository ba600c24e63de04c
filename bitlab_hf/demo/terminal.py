"""What may be written to a terminal: text of files and models without what would steer it."""

from __future__ import annotations

import re

# Control characters but for tabs and line ends, what turns the direction of text, and halves of
# characters, which no encoding has.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)  # fmt: skip


def printable(text: str) -> str:
    """Returns text with each character that would steer a terminal written as its escape."""
    return _STEERING.sub(lambda found: found.group().encode("unicode_escape").decode(), text)
