"""Classes made at run time that pass for the class they extend.

Pipelines ask for the exact type of their scheduler, and diffusers saves classes by their names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


@functools.cache
def masked_class(mixin: Any, stock: Any, methods: tuple[str, ...]) -> Any:
    """The class (mixin, stock) with the name and module of `stock`, equal to it by ==.

    Called, it makes an instance of `stock`.

    methods: the names of those of `mixin` that show the signature of the stock class's.
    """

    class Masked(type(stock)):  # type: ignore[misc]
        def __eq__(cls, other: Any) -> bool:
            return other is cls or other is stock

        def __call__(cls, *args: Any, **options: Any) -> Any:
            return stock(*args, **options)  # also by from_config and from_pretrained

        def __ne__(cls, other: Any) -> bool:
            return not cls == other

        def __hash__(cls) -> int:
            return hash(stock)

    return Masked(
        stock.__name__,
        (mixin, stock),
        {
            "__module__": stock.__module__,
            "__qualname__": stock.__qualname__,
            "__doc__": stock.__doc__,
            "_masked": stock,
            **{name: dressed(getattr(mixin, name), getattr(stock, name)) for name in methods},
        },
    )


def dressed(method: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    """The method under the signature of a stock one, which pipelines read to see what it takes."""

    @functools.wraps(stock)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        return method(self, *args, **options)

    return call


def stock_class(kind: type[Any]) -> type[Any]:
    """The class that a masked one passes for; any other as it is."""
    return vars(kind).get("_masked", kind)
