"""Open sets of config classes: a root knows its members by a tag, so that a method is one file and one registry line.

class Attention(Tagged, root="name"): ...
@dataclasses.dataclass(frozen=True)
class Heads(Attention, tag="heads"): ...

Attention.of("heads", n_heads=4) == Heads(n_heads=4)
"""

import dataclasses
import difflib
from typing import Any, ClassVar

from kvattn.errors import UserError


class Tagged:
    """Base of the roots. `root` names the field under which a ConfigDict holds the tag; `tag` registers a member."""

    members: ClassVar[dict[str, type]]
    tag_field: ClassVar[str]
    tag: ClassVar[str] = ""

    def __init_subclass__(cls, root: str = "", tag: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if root:
            cls.members, cls.tag_field = {}, root
        if tag:
            cls.tag, cls.members[tag] = tag, cls

    @classmethod
    def known(cls, tag: Any, where: str = "") -> type:
        """The member of that tag. Raises UserError for an unknown one, with the nearest."""
        if tag in cls.members:
            return cls.members[tag]
        near = difflib.get_close_matches(str(tag), list(cls.members), n=1, cutoff=0.4)
        nearest = f" (nearest valid: {near[0]})" if near else ""
        field = f"{where or cls.__name__.lower()}.{cls.tag_field}"
        raise UserError(f"{field} is {tag!r}{nearest}; choose one of {', '.join(sorted(cls.members))}.")

    @classmethod
    def of(cls, tag: str, **fields: Any) -> Any:
        """A member from its tag and fields. Raises UserError for an unknown tag or field."""
        member = cls.known(tag)
        names = [f.name for f in dataclasses.fields(member)]
        for name in fields:
            if name not in names:
                raise UserError(
                    f"{cls.__name__.lower()}.{name} has no meaning for {cls.tag_field} {tag!r}, which reads "
                    f"{', '.join(names) or 'nothing'}."
                )
        return member(**fields)
