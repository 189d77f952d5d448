"""Schedules for CPUs through LLVM."""
