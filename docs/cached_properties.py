"""For the site's reference: an attribute that is computed once is an attribute, and no method."""

from __future__ import annotations

from typing import Any

import griffe


class CachedProperties(griffe.Extension):  # type: ignore[misc]  # which is Any where it is not installed
    """Shows what ``overspill.base.cached.cached_property`` decorates as properties."""

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Put an attribute in the place of each such method."""
        for name, member in list(cls.members.items()):
            if isinstance(member, griffe.Function) and any(
                "cached_property" in decorator.callable_path for decorator in member.decorators
            ):
                attribute = griffe.Attribute(
                    name,
                    lineno=member.lineno,
                    endlineno=member.endlineno,
                    annotation=member.returns,
                    docstring=member.docstring,
                    parent=cls,
                )
                attribute.labels |= {"property"}
                cls.members[name] = attribute
