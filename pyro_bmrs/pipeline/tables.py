"""The two tables that end a run."""

from collections.abc import Mapping, Sequence

__all__ = ["cost_table", "structure_table"]

Row = tuple[str, float, float, str, str]
"""Name, dense, pruned, how to write them, and what stands under change; by default their ratio."""


def structure_table(sizes: Mapping[str, int], kept: Mapping[str, int]) -> str:
    """Return what is left of each layer's structures."""
    width = max(26, *map(len, sizes))
    lines = [f"{'layer':<{width}}{'structures':>12}{'kept':>12}{'kept %':>10}", "-" * (width + 34)]
    for layer, size in sizes.items():
        lines.append(f"{layer:<{width}}{size:>12,}{kept[layer]:>12,}{100 * kept[layer] / size:>9.1f}%")
    return "\n".join(lines)


def cost_table(rows: Sequence[Row], before: str = "dense", after: str = "pruned") -> str:
    """Return what two networks cost and how good they are, side by side."""
    lines = [f"{'':<26}{before:>12}{after:>12}{'change':>10}", "-" * 60]
    for name, dense, pruned, form, change in rows:
        shown = change or (f"{100 * (pruned / dense - 1):.1f}%" if dense else "")
        lines.append(f"{name:<26}{dense:>12{form}}{pruned:>12{form}}{shown:>10}")
    return "\n".join(lines)
