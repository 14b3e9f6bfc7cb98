"""What a run remembers of its data, so that it is neither resumed with other data nor measured with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class DataRecord:
    """The data set that a network was trained on."""

    name: str
    content: str
    """A hash of images, labels and the facts below."""
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    """``(channels, height, width)``"""
    mean: tuple[float, ...]
    """Per channel, in units of [0, 1]; likewise ``std``."""
    std: tuple[float, ...]
    counts: dict[str, int]
    """Samples of train and test."""

    @classmethod
    def from_json(cls, text: str | bytes) -> DataRecord:
        """Read what `json` has written.

        Raises:
            ValueError: the text is no such record.
        """
        fields = json.loads(text)
        try:
            dict(fields["counts"])
            lists = {key: tuple(fields[key]) for key in ("classes", "image_shape", "mean", "std")}
            return cls(**(fields | lists))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"no record of data: {error}") from None

    def json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def metadata(self) -> dict[str, str]:
        """For the metadata of a safetensors file: one entry, for safetensors writes several in any order."""
        return {"data": json.dumps(self.json())}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None) -> DataRecord | None:
        """Read what `metadata` has made; ``None`` if it is not there, as in files of earlier versions."""
        text = (metadata or {}).get("data")
        return None if text is None else cls.from_json(text)

    def difference(self, before: DataRecord) -> str | None:
        """How the data differ from what they were; ``None`` if they do not, whatever they are called.

        Example:
            >>> from dataclasses import replace
            >>> cats = DataRecord("pets", "a1", ("cat", "dog"), (1, 8, 8), (0.5,), (0.2,), {"train": 9, "test": 3})
            >>> replace(cats, content="b2", classes=("cat", "cow")).difference(cats)
            "class 1 is 'cow', was 'dog'"
        """
        if self.content == before.content:
            return None
        if len(self.classes) != len(before.classes):
            return f"{len(self.classes)} classes, were {len(before.classes)}"
        for number, (now, then) in enumerate(zip(self.classes, before.classes, strict=True)):
            if now != then:
                return f"class {number} is {now!r}, was {then!r}"
        if self.image_shape != before.image_shape:
            return f"images of {_times(self.image_shape)}, were of {_times(before.image_shape)}"
        for part, count in self.counts.items():
            if count != before.counts.get(part):
                return f"{count:,} {part} images, were {before.counts.get(part, 0):,}"
        for what, now_values, then_values in (("mean", self.mean, before.mean), ("std", self.std, before.std)):
            if (now_text := _rounded(now_values)) != (then_text := _rounded(then_values)):
                return f"{what} {now_text}, was {then_text}"
        return "as many images of the same classes, but other pixels or labels"


def _times(shape: tuple[int, int, int]) -> str:
    return "×".join(map(str, shape))


def _rounded(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.7g}" for value in values)
