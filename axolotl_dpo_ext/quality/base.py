"""What a check sees, what a check is, what an embedder is: all that a third party needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from axolotl_dpo_ext.settings import Policy, QualitySettings


@dataclass(frozen=True)
class PairBatch:
    """Some preference pairs, as flat text and as lengths. All fields have one entry per pair.

    Attributes:
        prompts: Text of the prompt; several messages are joined as ``role: text`` lines. ``""`` without one.
        chosen: Text of the chosen answer; ``""`` where it is malformed.
        rejected: Text of the rejected answer; ``""`` where it is malformed.
        chosen_tokens: Length of the chosen answer in tokens, shape ``(n,)``; 0 for malformed pairs.
        rejected_tokens: Length of the rejected answer in tokens, shape ``(n,)``; 0 for malformed pairs.
        faults: What is wrong with the pair's form, ``""`` where nothing is. Empty: all are well-formed.
    """

    prompts: list[str]
    chosen: list[str]
    rejected: list[str]
    chosen_tokens: NDArray[np.int64]
    rejected_tokens: NDArray[np.int64]
    faults: Sequence[str] = ()

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return len(self.chosen)

    def take(self, rows: Sequence[int]) -> PairBatch:
        """Returns the pairs at these positions of the batch, in this order."""
        return PairBatch(
            prompts=[self.prompts[row] for row in rows],
            chosen=[self.chosen[row] for row in rows],
            rejected=[self.rejected[row] for row in rows],
            chosen_tokens=self.chosen_tokens[rows],
            rejected_tokens=self.rejected_tokens[rows],
            faults=[self.faults[row] for row in rows] if self.faults else (),
        )


@runtime_checkable
class Embedder(Protocol):
    """Turns texts into vectors. The built-in one and a third party's are the same to every check.

    Attributes:
        name: What users write behind ``embedder:``.
    """

    name: str

    def encode(self, texts: Sequence[str]) -> Any:
        """Returns one row per text, shape ``(n, d)``, as a NumPy array or a SciPy sparse matrix.

        Rows need not be normalised. A text's row must not depend on the other texts of the call, so that
        scores depend neither on row order nor on batch size.
        """


class PairCheck(ABC):
    """Scores every pair; a pair is flagged where its score is above the threshold.

    A score says how strongly a pair shows the fault; it must not depend on the threshold, on the other pairs
    of the batch or on row order. That is what makes re-thresholding possible without recomputation.

    Attributes:
        name: What users write under ``policy:``, such as ``length_ratio``.
        summary: What a flagged pair is, in a few words, for tables.
        default_policy: What happens to flagged pairs unless the user says otherwise.
        setting: Key of the setting that holds the threshold, for advice; ``""`` where the threshold is fixed.
        sees_malformed: Whether malformed pairs are scored too. Others never see them; their score is NaN.
    """

    name: str
    summary: str
    default_policy: Policy = "flag"
    setting: str = ""
    sees_malformed: bool = False

    @abstractmethod
    def threshold(self, settings: QualitySettings) -> float:
        """Returns the score above which a pair is flagged."""

    @abstractmethod
    def score(self, batch: PairBatch, settings: QualitySettings, embedder: Embedder) -> NDArray[np.float64]:
        """Returns one score per pair, shape ``(n,)``; NaN where the check does not apply."""
