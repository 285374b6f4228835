"""The options of `captum-generic-attn explain` and `verify`, as the user chose them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from captum_generic_attn.cli.seen import Seen, see
from captum_generic_attn.cli.terminal import fail, passed_on, short

if TYPE_CHECKING:
    from captum_generic_attn.models.preprocessing import ImageModel


@dataclass(frozen=True)
class Choices:
    """The options as values; `methods` are those to compare, empty for `GenericAttention` alone."""

    image: Path | None
    model: str | None
    weights: Path | None
    texts: tuple[str, ...]
    targets: tuple[str, ...]
    top: int | None = None
    output: Path = Path("explanation.png")
    start_layer: int = 0
    methods: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The title of the image."""
        return short("image" if self.image is None else self.image.name)

    @property
    def several_methods(self) -> bool:
        """Whether other methods than `GenericAttention` explain."""
        return bool(self.methods)

    def seen(self, model: ImageModel) -> Seen:
        """The image, and what the model sees of it; if it cannot be read, that is said."""
        from captum_generic_attn import demo
        from captum_generic_attn.errors import UnreadableImageError
        from captum_generic_attn.files.images import open_rgb

        try:
            if self.image is None:
                image = demo.canvases()[0].image()
            else:
                with passed_on():
                    image = open_rgb(self.image)
        except UnreadableImageError as error:
            fail(str(error))
        return see(model, image)
