"""Moves between layouts: the list of steps that the written-out program runs and that the cost model counts.

A layout is, per dim, the tuple of mesh axes that split it, major first. `moves` says how an array gets from one to
another, and how a partial sum over mesh axes ends in one (the "partialsum-x" of Pope et al., arXiv 2211.05102):

    >>> for step in moves((("x",), ()), ((), ("x",))): print(step.kind, step.source, step.dim, step.axes)
    all_to_all 0 1 ('x',)
    >>> [step.kind for step in moves(((), ()), ((), ("x",)), partial=("x", "y"))]
    ['reduce_scatter', 'all_reduce']

`sharding.layout.manual` executes the steps and `sharding.cost.traffic` counts them; neither has rules of its own.
"""

import dataclasses
from collections.abc import Mapping

from sharding.layout.rules import Rules, ShardingError, mesh_axes

Axes = tuple[str, ...]
Split = tuple[Axes, ...]  # per dim, the mesh axes that split it
Names = tuple[str | None, ...]  # per dim, its logical axis; None = not split

KINDS = ("slice", "all_to_all", "all_gather", "reduce_scatter", "all_reduce")
_IN_BLOCKS: Mapping[int, Axes] = {}  # no dim's entries in an order of their own
_ANY_ORDER = ("attn_heads", "attn_out_heads")  # in which a chip's query heads attend


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a move.

    kind     one of KINDS; a slice keeps this chip's part and sends nothing
    axes     the mesh axes along which chips talk, or are told apart
    dim      the dim whose split changes; an all-to-all's target, which gains `axes`; None for an all-reduce
    source   the dim that loses `axes` in an all-to-all, else None
    have     the split of every dim before the step
    then     the split of every dim after it
    order    per dim, the order in which all axes of the move would split it
    """

    kind: str
    axes: Axes
    dim: int | None
    source: int | None
    have: Split
    then: Split
    order: Split


def moves(have: Split, want: Split, partial: Axes = (), orders: Mapping[int, Axes] = _IN_BLOCKS) -> tuple[Step, ...]:
    """The steps from `have` to `want`: slices first, then all-to-alls, then all-gathers.

    A dim of which neither layout continues the other (x, then y+z) is gathered up to the axes they share before it is
    split again, so that every chip ends with one block. `orders`: dims whose entries may be held in any order as long
    as it is undone on the way back, with all axes that may split them; they are not.

    `partial`: the array is a sum still open over these axes. It is reduce-scattered into the dims that `want` splits
    over them and all-reduced over the rest.

    Raises ShardingError for a move that no such steps make.
    """
    route = _Route(have, want, orders)
    if partial:
        route.end_sum(partial)
    route.reshard(want)
    return tuple(route.steps)


def any_order(rules: Rules, mesh: Mapping[str, int], have: Names, want: Names) -> dict[int, Axes]:
    """The `orders` of a move between logical axes: query heads that attend to one K/V head may lie in any order while
    they do."""
    dims = [d for d, pair in enumerate(zip(have, want, strict=True)) if any(n in _ANY_ORDER for n in pair)]
    stored = mesh_axes(rules, "q_heads") if dims else ()
    return {d: stored + tuple(a for a in mesh if a not in stored) for d in dims}


def full_order(have: Axes, want: Axes) -> Axes:
    """The order in which a dim would be split by all axes of both. Raises ShardingError unless one contains the
    other, in its order."""
    long, short = (want, have) if set(have) <= set(want) else (have, want)
    if [a for a in long if a in short] != list(short):
        raise ShardingError(
            f"a dim split over {'+'.join(have) or 'nothing'} cannot become {'+'.join(want) or 'whole'} "
            "without moving rows between the blocks; take another layout."
        )
    return long


class _Route:
    """The steps so far, and the split they have led to."""

    def __init__(self, have: Split, want: Split, orders: Mapping[int, Axes]):
        self.now, self.want, self.orders = list(have), want, orders
        self.order: list[Axes] = [()] * len(self.now)
        self.steps: list[Step] = []

    def step(self, kind: str, axes: Axes, after: Mapping[int, Axes], dim: int | None, source: int | None = None):
        """Adds one step; `after`: the new splits of the dims that it changes."""
        have = tuple(self.now)
        for changed, split in after.items():
            self.now[changed] = split
        self.steps.append(Step(kind, axes, dim, source, have, tuple(self.now), tuple(self.order)))

    # --- a change of layout ---

    def reshard(self, want: Split) -> None:
        """Goes from the present split to `want`."""
        for dim, axes in enumerate(want):
            shared = _shared(self.now[dim], axes)
            if dim not in self.orders and shared not in (self.now[dim], axes):
                self.order[dim] = self.now[dim]
                self.gather(dim, shared)
        self.order = [self.orders.get(d) or max(self.now[d], axes, key=len) for d, axes in enumerate(want)]
        leaving = {axis: dim for dim, axes in enumerate(self.now) for axis in axes if axis not in want[dim]}
        for dim in range(len(want)):
            self.gain(dim, want, leaving)
        for dim, axes in enumerate(want):
            self.gather(dim, axes)

    def gather(self, dim: int, kept: Axes) -> None:
        """Gathers `dim` over the axes that are not in `kept`."""
        gone = tuple(a for a in self.now[dim] if a not in kept)
        if gone:
            self.step("all_gather", gone, {dim: tuple(a for a in self.now[dim] if a in kept)}, dim)

    def gain(self, dim: int, want: Split, leaving: dict[str, int]) -> None:
        """Splits `dim` over the axes it lacks: by an all-to-all where they leave another dim, else by a slice."""
        added = [a for a in want[dim] if a not in self.now[dim]]
        if added:
            self.forget(dim, want)
        while added:
            source, run = leaving.get(added[0]), [added.pop(0)]
            if source is None:
                self.slice(dim, run[0])
                continue
            while added and leaving.get(added[0]) == source:
                run.append(added.pop(0))
            self.forget(source, want)
            self.exchange(source, dim, tuple(run))
            for axis in run:
                del leaving[axis]

    def forget(self, dim: int, want: Split) -> None:
        """Gathers `dim` over the axes that no dim will be split over, before others join or leave it."""
        self.gather(dim, tuple(a for axes in want for a in axes))

    def slice(self, dim: int, axis: str) -> None:
        self.step("slice", (axis,), {dim: self.with_axes(dim, (axis,))}, dim)

    def exchange(self, source: int, dim: int, axes: Axes) -> None:
        missing = [a for a in self.order[dim] if a not in self.now[dim]]
        moved = tuple(a for a in missing if a in axes)
        if not _neighbours(missing, moved):
            raise ShardingError(f"axes {'+'.join(axes)} are not neighbours in the order of the dim they move to.")
        left = tuple(a for a in self.now[source] if a not in axes)
        self.step("all_to_all", moved, {source: left, dim: self.with_axes(dim, axes)}, dim, source)

    def with_axes(self, dim: int, axes: Axes) -> Axes:
        """The split of `dim` once it is also split over `axes`."""
        return tuple(a for a in self.order[dim] if a in self.now[dim] or a in axes)

    # --- the end of a sum ---

    def end_sum(self, partial: Axes) -> None:
        """Reduces a sum over `partial`; what remains to `want` is a change of layout."""
        want = self.want
        leaving = [a for dim, axes in enumerate(self.now) for a in axes if a not in want[dim]]
        if leaving:  # what moves to another dim does so first: the sum can wait
            first = tuple(tuple(a for a in w if a in h or a in leaving) for h, w in zip(self.now, want, strict=True))
            if any(w[: len(f)] != f for f, w in zip(first, want, strict=True)):
                raise ShardingError(f"a sum over {'+'.join(partial)} cannot end in {want} from {tuple(self.now)}.")
            self.reshard(first)
        scattered: set[str] = set()
        for dim, axes in enumerate(want):
            self.order[dim] = self.orders.get(dim) or _toward(self.now[dim], axes)
            held = [axis for split in self.now for axis in split]
            sliced = [a for a in axes if a not in partial and a not in held]
            into = tuple(a for a in axes if a in partial and a not in self.now[dim])
            if sliced or into:
                full_order(self.now[dim], self.order[dim])
            for axis in sliced:
                self.slice(dim, axis)
            self.scatter(dim, into)
            scattered |= set(into)
        rest = tuple(a for a in partial if a not in scattered)
        if rest:
            self.step("all_reduce", rest, {}, None)

    def scatter(self, dim: int, axes: Axes) -> None:
        """Reduce-scatters into `dim`, at once where `axes` are neighbours in its order, else one by one."""
        missing = [a for a in self.order[dim] if a not in self.now[dim]]
        for run in [axes] if _neighbours(missing, axes) else [(a,) for a in axes]:
            if run:
                self.step("reduce_scatter", run, {dim: self.with_axes(dim, run)}, dim)


def _neighbours(order: list[str], axes: Axes) -> bool:
    """Whether `axes` stand side by side in `order`."""
    at = order.index(axes[0]) if axes else 0
    return tuple(order[at : at + len(axes)]) == axes


def _shared(one: Axes, other: Axes) -> Axes:
    """The leading axes that both split a dim over."""
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return one[:count]


def _toward(have: Axes, want: Axes) -> Axes:
    """The order of splits while going from `have` to `want`, axes that leave later kept."""
    return want if set(have) <= set(want) else tuple(have) + tuple(a for a in want if a not in have)
