"""transformers' Auto classes give patched models: `register`, `unregister`, `registered`.

An Auto class looks the config's class up in its mapping and calls `from_pretrained` or
`from_config` of what it finds. Registered, it finds a subclass that loads with transformers' own
class and patches the result. So weights are read once and nothing that transformers looks at while
it loads (device map, tensor parallel plan, tied weights, shards) changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass, _LazyAutoMapping

from hf_fuse.patches import ARCHITECTURES
from hf_fuse.patching import check_arguments, patch

_MISSING: Any = object()


class _Registration:
    """The mappings' entries that `register` made, and what was there before."""

    def __init__(self, arguments: dict[str, Any]):
        self.arguments = arguments
        self.entries: list[tuple[_LazyAutoMapping, type, Any, Any]] = []

    def add(self, mapping: _LazyAutoMapping, config_class: type) -> None:
        present: Any = mapping.get(config_class, None)
        if present is None or not present.__module__.startswith("transformers."):
            return  # no class for this task, or the user's own
        fused = _patching(present, self.arguments)
        earlier = mapping._extra_content.get(config_class, _MISSING)
        mapping._extra_content[config_class] = fused  # its `register` passes over transformers' own
        self.entries.append((mapping, config_class, earlier, fused))

    def take_back(self) -> None:
        for mapping, config_class, earlier, fused in self.entries:
            if mapping._extra_content.get(config_class) is not fused:
                continue  # registered anew by the user since
            if earlier is _MISSING:
                del mapping._extra_content[config_class]
            else:
                mapping._extra_content[config_class] = earlier


_present: _Registration | None = None


def register(**arguments: Any) -> None:
    """Let AutoModel, AutoModelForCausalLM and the Auto classes of every other task give patched
    models, by `from_pretrained` and by `from_config`, for every supported architecture.

    arguments: `hf_fuse.patch`'s. Here `strict` is False where not given: a model that cannot be
        patched is loaded as it is, and `report` says why. Registering again takes the new ones.

    What is saved from such a model names transformers' own classes and loads anywhere. Classes that
    the user has registered stay. Raises TypeError and ValueError for arguments that `patch` would
    refuse.
    """
    global _present
    try:
        chosen = inspect.signature(patch).bind(nn.Module(), **arguments)
    except TypeError as error:
        raise TypeError(
            f"hf_fuse.register: arguments are those of hf_fuse.patch: {error}"
        ) from None
    chosen.apply_defaults()
    check_arguments(chosen.args[0], chosen.kwargs["ops"], chosen.kwargs["backend"])
    unregister()
    _present = _Registration({"strict": False, **arguments})
    for mapping in _mappings():
        for architecture in ARCHITECTURES:
            _present.add(mapping, architecture.backbone.config_class)


def unregister() -> None:
    """Give the Auto classes' mappings back as they were. Models that were loaded stay patched."""
    global _present
    if _present is not None:
        _present.take_back()
    _present = None


@contextmanager
def registered(**arguments: Any) -> Iterator[None]:
    """`with registered():` registers for the block; afterwards what was registered before is."""
    earlier = _present
    register(**arguments)
    try:
        yield
    finally:
        unregister()
        if earlier is not None:
            register(**earlier.arguments)


def _mappings() -> list[_LazyAutoMapping]:
    autos = (
        value
        for value in vars(modeling_auto).values()
        if isinstance(value, type) and issubclass(value, _BaseAutoModelClass)
    )
    mappings: list[Any] = [auto._model_mapping for auto in autos]
    return [mapping for mapping in mappings if mapping is not None]


def _patching(original: type[PreTrainedModel], arguments: dict[str, Any]) -> type[PreTrainedModel]:
    """A class that goes by the name of `original` and makes patched models of it."""

    class Patching(original):  # type: ignore[misc, valid-type]
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return patch(original(*args, **kwargs), **arguments)

        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            loaded = original.from_pretrained(*args, **kwargs)
            # With output_loading_info the model comes with that.
            patch(loaded[0] if isinstance(loaded, tuple) else loaded, **arguments)
            return loaded

        @classmethod
        def _from_config(cls, *args: Any, **kwargs: Any) -> PreTrainedModel:
            return patch(original._from_config(*args, **kwargs), **arguments)

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Patching, name, getattr(original, name))
    return Patching
