"""Parts of an answer and the contract of everything that finds them in a growing text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text the model wrote for itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins; `call` counts from 0 in each choice."""

    call: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, as JSON text."""

    call: int
    text: str


Part = Content | Reasoning | CallStart | CallArguments


class PartParser(Protocol):
    """Belongs to one choice. What is given out never has to be taken back."""

    def push(self, text: str) -> list[Part]:
        """Parts that `text` completes."""

    def flush(self) -> list[Part]:
        """What is still held back, at the end."""


class PlainParser:
    """Everything is content."""

    def push(self, text: str) -> list[Part]:
        return [Content(text)] if text else []

    def flush(self) -> list[Part]:
        return []
