"""The options of a pruning as one value, and the older words for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

from sfw_dist.errors import UserError
from sfw_dist.pruning.criteria import CRITERIA
from sfw_dist.pruning.granularity import GRANULARITIES, GranularityName, Ranking
from sfw_dist.pruning.scope import Scope
from sfw_dist.pruning.sparsities import check_sparsity

OLD_KINDS: dict[str, tuple[GranularityName, Ranking]] = {
    "global": ("weight", "global"),
    "layerwise": ("weight", "layerwise"),
    "2:4": ("2:4", "global"),
    "filters": ("filter", "global"),
    "filters-layerwise": ("filter", "layerwise"),
    "low_rank": ("rank", "global"),
}
"""What the word ``kind`` of earlier command lines, configurations and result files meant: granularity and ranking."""


@dataclass(frozen=True)
class PruningOptions:
    """How a network is pruned, apart from the sparsity.

    Raises:
        UserError: an unknown word, a combination without a meaning, or ``recalibrate`` below 0.

    Example:
        >>> options = PruningOptions(granularity="2:4")
        >>> options.scope, options.ranking, options.criterion
        ('weights', 'global', 'magnitude')
        >>> options.default_sparsities([0.5, 0.9])
        [0.5]
    """

    scope: Scope = "weights"
    """weights: of convolutions and linear layers; all: every parameter, as published."""
    granularity: GranularityName = "weight"
    """What is removed as one piece: a weight, two of every four along the input channels (2:4), a whole filter, or a
    rank (a singular value)."""
    ranking: Ranking = "global"
    """What the pieces are ranked against: those of the whole network (global) or of their layer (layerwise)."""
    criterion: str = "magnitude"
    """What makes a weight worth keeping: its magnitude."""
    recalibrate: int = 50
    """Batches of training images over which BatchNorm's statistics are measured again after pruning, at most one pass;
    accuracy is measured without and with that. 0: only without."""

    def __post_init__(self) -> None:
        for key, value, valid in (
            ("scope", self.scope, get_args(Scope)),
            ("granularity", self.granularity, tuple(GRANULARITIES)),
            ("ranking", self.ranking, get_args(Ranking)),
            ("criterion", self.criterion, tuple(CRITERIA)),
        ):
            if value not in valid:
                raise UserError(f"unknown {key} {value!r}: choose one of {', '.join(valid)}")
        if self.recalibrate < 0:
            raise UserError(f"recalibrate must be at least 0, got {self.recalibrate}: write 50, or 0 for none")
        GRANULARITIES[self.granularity].check(self.ranking, self.criterion)

    @property
    def only_sparsity(self) -> float | None:
        """The one sparsity that the granularity takes; ``None``: it takes any."""
        return GRANULARITIES[self.granularity].only_sparsity

    def default_sparsities(self, configured: Sequence[float]) -> list[float]:
        """What is measured where no list is given: the configured sparsities, or the only one that is possible."""
        return list(configured) if self.only_sparsity is None else [self.only_sparsity]

    def check_sparsity(self, sparsity: float) -> None:
        """Raise :class:`UserError` for a sparsity outside [0, 1), or one that the granularity does not take."""
        check_sparsity(sparsity)
        if self.only_sparsity not in (None, sparsity):
            raise UserError(
                f"granularity {self.granularity} removes exactly {self.only_sparsity}, got sparsity {sparsity}: set it "
                f"to {self.only_sparsity} or use another granularity"
            )

    def record(self) -> dict[str, str]:
        """What a result file says of how the masks were chosen, in the older word ``kind``, too."""
        chosen = (self.granularity, self.ranking)
        # 2:4 layerwise, which has no older word, is 2:4.
        kind = next((kind for kind, words in OLD_KINDS.items() if words == chosen), self.granularity)
        words = {"granularity": self.granularity, "ranking": self.ranking, "criterion": self.criterion}
        return {"scope": self.scope, "kind": kind, **words}

    @classmethod
    def of_record(cls, record: Mapping[str, Any], default: PruningOptions | None = None) -> PruningOptions:
        """The options in a result file or a submission's record, whichever words it is written in.

        Args:
            record: with any of the fields' names or ``kind``; other keys, and values that are ``None``, are ignored.
            default: what holds for the fields that the record lacks.
        """
        known = {field.name for field in fields(cls)}
        default = cls() if default is None else default
        options = {name: getattr(default, name) for name in known}
        given = {key: value for key, value in record.items() if value is not None}
        if "granularity" in given:
            given.pop("kind", None)
        return cls(**options | {key: value for key, value in without_old_words(given).items() if key in known})


def without_old_words(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the older word ``kind``, if it is there, replaced by granularity and ranking.

    Raises:
        UserError: an unknown kind, or one next to a granularity or ranking.

    Example:
        >>> without_old_words({"scope": "all", "kind": "filters"})
        {'scope': 'all', 'granularity': 'filter', 'ranking': 'global'}
    """
    new = dict(options)
    if "kind" not in new:
        return new
    kind = new.pop("kind")
    if kind not in OLD_KINDS:
        raise UserError(
            f"unknown kind {kind!r}: choose one of {', '.join(OLD_KINDS)}, or write granularity and ranking instead"
        )
    for key in ("granularity", "ranking"):
        if key in new:
            raise UserError(f"kind {kind} is an older word for granularity and ranking, got {key} too: leave kind out")
    granularity, ranking = OLD_KINDS[kind]
    return {**new, "granularity": granularity, "ranking": ranking}
