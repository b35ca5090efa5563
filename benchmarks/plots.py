"""Pictures of measurements; needs matplotlib, which `pip install shoal[bench]` brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WIDTH, HEIGHT, DPI = 9, 5, 120


def save_bars(path: Path, groups: list[str], bars: dict[str, list[float]], *, ylabel: str, label: str) -> None:
    """One group of bars side by side for each of `groups`, one colour for each of `bars`; `label` formats a height."""
    figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT))
    width = 0.8 / len(bars)
    for number, (name, heights) in enumerate(bars.items()):
        places = [group + (number - (len(bars) - 1) / 2) * width for group in range(len(groups))]
        drawn = axes.bar(places, heights, width, label=name)
        axes.bar_label(drawn, fmt=lambda height: label.format(height) if height else "", fontsize=7)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(ylabel)
    axes.legend()
    _save(figure, path)


def save_lines(path: Path, panels: dict[str, dict[str, tuple[list[float], list[float]]]], *, xlabel: str) -> None:
    """A panel for each entry, side by side, titled by its y axis: lines through (xs, ys)."""
    figure, all_axes = plt.subplots(1, len(panels), figsize=(WIDTH, HEIGHT), squeeze=False)
    for axes, (ylabel, lines) in zip(all_axes[0], panels.items(), strict=True):
        for name, (xs, ys) in lines.items():
            axes.plot(xs, ys, marker="o", label=name)
        ticks = sorted({x for xs, _ in lines.values() for x in xs})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{x / 1024:g}k" if x >= 1024 else f"{x:g}" for x in ticks])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(xlabel)
        axes.set_title(ylabel)
        axes.grid(alpha=0.3)
        axes.legend()
    _save(figure, path)


def save_fractions(path: Path, fractions: dict[str, float], *, xlabel: str) -> None:
    """A bar from the left for each name, from the top, up to its fraction of 1."""
    figure, axes = plt.subplots(figsize=(WIDTH, 1 + 0.2 * len(fractions)))
    drawn = axes.barh(range(len(fractions)), list(fractions.values()))
    axes.bar_label(drawn, fmt="{:.0%}", fontsize=7)
    axes.set_yticks(range(len(fractions)), list(fractions), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.05)
    axes.set_xlabel(xlabel)
    axes.grid(alpha=0.3, axis="x")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
