"""Points and lines drawn with braille characters: eight dots to a character, one colour."""

from __future__ import annotations

from dataclasses import dataclass

from rich.text import Text

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of the dots of a braille character, rows from the top, columns from the left."""
_BRAILLE = 0x2800


@dataclass(frozen=True, slots=True)
class Range:
    """What an axis shows."""

    low: float
    high: float

    def part(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        return (value - self.low) / ((self.high - self.low) or 1.0)


class Canvas:
    """A field of ``width`` by ``height`` characters. What is drawn later takes over a character's colour."""

    def __init__(self, width: int, height: int, x: Range, y: Range) -> None:
        self._columns, self._rows = 2 * width, 4 * height
        self._x, self._y = x, y
        self._bits = [[0] * width for _ in range(height)]
        self._styles = [[""] * width for _ in range(height)]

    def point(self, x: float, y: float, style: str, *, size: int = 1) -> None:
        """A dot, or with ``size`` 2 a square of four; nothing outside of the axes."""
        column, row = self._place(x, y)
        for i in range(size):
            for k in range(size):
                self._dot(column + i, row + k, style)

    def horizontal(self, y: float, x0: float, x1: float, style: str, *, every: int = 1) -> None:
        """A line, or every so many dots of one."""
        start, row = self._place(x0, y)
        end, _ = self._place(x1, y)
        for column in range(start, end + 1, every):
            self._dot(column, row, style)

    def vertical(self, x: float, y0: float, y1: float, style: str) -> None:
        """A line."""
        column, first = self._place(x, max(y0, y1))
        _, last = self._place(x, min(y0, y1))
        for row in range(first, last + 1):
            self._dot(column, row, style)

    def mark(self, x: float, y: float, character: str, style: str) -> None:
        """A character instead of dots."""
        column, row = self._place(x, y)
        if 0 <= column < self._columns and 0 <= row < self._rows:
            self._bits[row // 4][column // 2] = ord(character) - _BRAILLE
            self._styles[row // 4][column // 2] = style

    def lines(self) -> list[Text]:
        """The rows from the top."""
        return [
            Text.assemble(*((chr(_BRAILLE + bits), style) for bits, style in zip(row, styles, strict=True)))
            for row, styles in zip(self._bits, self._styles, strict=True)
        ]

    def _place(self, x: float, y: float) -> tuple[int, int]:
        column = round(self._x.part(x) * (self._columns - 1))
        return column, round((1 - self._y.part(y)) * (self._rows - 1))

    def _dot(self, column: int, row: int, style: str) -> None:
        if not (0 <= column < self._columns and 0 <= row < self._rows):
            return
        line, place = row // 4, column // 2
        if 0 <= self._bits[line][place] <= 0xFF:  # else a character stands there
            self._bits[line][place] |= _DOTS[row % 4][column % 2]
            self._styles[line][place] = style
