"""Schedules for CPUs through LLVM."""

from .inline import find_parsers_by_frames

find_parsers_by_frames()
