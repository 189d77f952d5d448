"""The opening of Lewis Carroll's "Alice's Adventures in Wonderland" (1865)."""

from pathlib import Path

FILE = Path(__file__).parent.parent / "text" / "alice.txt"


def whole() -> str:
    return FILE.read_text()


def passages() -> list[str]:
    """Its paragraphs."""
    return [line for line in whole().splitlines() if line]
