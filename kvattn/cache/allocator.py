"""Pages on the host: who owns which page of a pool of fixed-size pages, given out by a table (arXiv 2309.06180).

    pool    leaf -> [pages, heads, P, dim] (along lanes [pages, heads, dim, P]; token scales [pages, heads, P])
    table   [B, n] int32, page of tokens [i P, (i + 1) P) of a row; 0 = none
    token t of row b lies at page table[b, t // P], offset t % P

Page 0 is reserved for entries of the table that have no page: what is read there is masked, nothing is written to it.
On the device a table is data; who owns which page is decided on the host, by an `Allocator`: it raises OutOfPages
before anything is written. One table serves all owner layers, so one page id is a page of each of them (each cache
holds its own copy of the table, 4 B n bytes, as caches are donated).

A forked row shares the full pages of its source; the page that is partly written is copied (copy on write, done when
forking: its next token is a write). Shared pages are full, hence never written again.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from kvattn.errors import UserError


class OutOfPages(UserError):
    """The pool has fewer free pages than are asked for; nothing was changed."""


def pages_for(tokens: int, page: int) -> int:
    return -(-tokens // page)


class Allocator:
    """Who owns which page of a pool of `pages` (numbered from 1) of `page_size` tokens. Rows are any ints.

    Invariant: free pages + distinct pages in use = pages, and a page's references are the rows that have it.
    """

    def __init__(self, pages: int, page_size: int):
        self.pages, self.page_size = pages, page_size
        self._free = list(range(pages, 0, -1))  # the lowest number is given out first
        self._references = [0] * (pages + 1)
        self._rows: dict[int, list[int]] = {}
        self._published: dict[bytes, int] = {}  # key of a page's tokens and all before them -> page
        self._keys: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def rows(self) -> dict[int, tuple[int, ...]]:
        """Row -> its pages, in order of tokens."""
        return {row: tuple(pages) for row, pages in self._rows.items()}

    def references(self, page: int) -> int:
        return self._references[page]

    def allocate(self, tokens: Mapping[int, int]) -> None:
        """Gives each row pages for that many tokens in all (a row that has them keeps them). All rows or none: raises
        OutOfPages with nothing changed."""
        need = {row: max(0, pages_for(n, self.page_size) - len(self._rows.get(row, ()))) for row, n in tokens.items()}
        if sum(need.values()) > self.free:
            raise OutOfPages(
                f"{sum(need.values())} pages of {self.page_size} tokens are needed and {self.free} of cache.pages = "
                f"{self.pages} are free; set cache.pages higher (0 = as many as the batch needs), or send fewer or "
                "shorter sequences."
            )
        for row, count in need.items():
            self._rows.setdefault(row, []).extend(self._take() for _ in range(count))

    def fork(self, source: int, target: int, length: int, tokens: int = 0) -> list[tuple[int, int]]:
        """Row `target` becomes row `source` as of `length` written tokens, with pages for `tokens` in all (0 = length).

        Returns the page copies (from, to) that `apply` must make. Raises UserError for an unknown source, a target in
        use, a length beyond the source's pages; OutOfPages with nothing changed.
        """
        pages = self._rows.get(source)
        if pages is None or target in self._rows:
            raise UserError(f"row {source} cannot be forked to {target}: the source must have pages, the target none.")
        if not 0 <= length <= len(pages) * self.page_size:
            raise UserError(f"row {source} has pages for {len(pages) * self.page_size} tokens, not {length} to fork.")
        full, part = divmod(length, self.page_size)
        self._share(target, pages[:full])
        try:
            self.allocate({target: max(tokens, length)})
        except OutOfPages:
            self.release(target)
            raise
        return [(pages[full], self._rows[target][full])] if part else []

    def release(self, row: int) -> None:
        """Gives back a row's pages; those that no other row has become free. Raises UserError for an unknown row."""
        if row not in self._rows:
            raise UserError(f"row {row} has no pages to release.")
        for page in reversed(self._rows.pop(row)):
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)
                key = self._keys.pop(page, None)
                if key is not None:
                    del self._published[key]

    def publish(self, row: int, ids: Sequence[int]) -> None:
        """Lets later rows reuse the full pages of `row`, which hold the tokens `ids`; call it once they are written."""
        for page, key in zip(self._rows[row], _page_keys(ids, self.page_size), strict=False):
            if key not in self._published:
                self._published[key], self._keys[page] = page, key

    def reuse(self, row: int, ids: Sequence[int]) -> int:
        """Starts `row` with the published pages that hold the first tokens of `ids`; returns how many tokens that is: a
        multiple of the page, fewer than len(ids), as a model must see one to go on. Raises UserError for a row in use.
        """
        if row in self._rows:
            raise UserError(f"row {row} has pages already; release it first.")
        pages = []
        for key in _page_keys(ids[: len(ids) - 1], self.page_size):
            if key not in self._published:
                break
            pages.append(self._published[key])
        self._share(row, pages)
        return len(pages) * self.page_size

    def table(self, batch: int, width: int) -> np.ndarray:
        """[batch,width] int32: pages of rows 0 .. batch - 1, 0 where there is none. Raises UserError for a row with
        more pages than `width`."""
        out = np.zeros((batch, width), np.int32)
        for row, pages in self._rows.items():
            if len(pages) > width:
                raise UserError(f"row {row} has {len(pages)} pages and the table {width}; give it more capacity.")
            if row < batch:
                out[row, : len(pages)] = pages
        return out

    def _take(self) -> int:
        page = self._free.pop()
        self._references[page] = 1
        return page

    def _share(self, row: int, pages: Sequence[int]) -> None:
        for page in pages:
            self._references[page] += 1
        self._rows[row] = list(pages)


def _page_keys(ids: Sequence[int], page: int) -> list[bytes]:
    """A key for each full page of `ids` that depends on its tokens and on all before them."""
    keys, last = [], b""
    for start in range(0, len(ids) - page + 1, page):
        last = hashlib.sha256(last + np.asarray(ids[start : start + page], np.int64).tobytes()).digest()
        keys.append(last)
    return keys
