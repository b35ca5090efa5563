"""Processes that descend from another process."""

from __future__ import annotations

import os


def actor_pids(title: str, ancestor: int) -> set[int]:
    """Actors below `ancestor` whose process title, which Ray makes from the class, begins with ray::`title`."""
    found = set()
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                command = file.read()
            if command.startswith(f"ray::{title}".encode()) and ancestor in ancestors(int(entry)):
                found.add(int(entry))
        except OSError:  # it has ended meanwhile
            continue
    return found


def descendants(ancestor: int) -> set[int]:
    """Processes below `ancestor`."""
    found = set()
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if ancestor in ancestors(int(entry)):
                found.add(int(entry))
        except OSError:  # it has ended meanwhile
            continue
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not yet waited for does not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ancestors(pid: int) -> list[int]:
    """Its parent, the parent of that, and so on."""
    found = []
    while pid > 1:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            pid = int(file.read().rpartition(")")[2].split()[1])
        found.append(pid)
    return found
