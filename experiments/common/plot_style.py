"""One look for every picture: colours, an empty figure, axes without frame. matplotlib is imported when one is made."""

from typing import Any

INK, GREY, PALE, GRID = "#1a1a1a", "#8a8a8a", "#c9c9c9", "#eeeeee"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#6a3d9a", "#b8860b", "#17869c", "#7f0000")
LIMIT = "#b00020"  # a bound that no bar may pass


def figure(width: float, height: float, rows: int = 1, columns: int = 1, dpi: int = 130) -> tuple[Any, Any]:
    """(figure, its axes as an array [rows, columns]), off screen: no window, no global state of pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(made)
    return made, made.subplots(rows, columns, squeeze=False)


def plain(axes: Any, grid: str = "both") -> None:
    """Pale grid lines (`grid`: both | x | y) behind the marks; no frame above and to the right."""
    axes.grid(axis=grid, color=GRID, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def title(axes: Any, text: str, size: float = 10) -> None:
    """`text` above the left edge."""
    axes.set_title(text, loc="left", fontsize=size, color=INK)
