"""What a check sees, what a check is, what an embedder is: all that a third party needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from axolotl_dpo_ext.quality.tokens import TokenIds

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from axolotl_dpo_ext.settings import Policy, QualitySettings


@dataclass(frozen=True, eq=False)
class PairBatch:
    """Some preference pairs, as flat text and as token ids. All sequences have one entry per pair.

    Rows of unpaired data (``rl: kto``) are here too: their one answer is ``chosen``, whatever its label, and
    ``rejected`` is empty. Only checks with ``on_singles`` see them.

    Attributes:
        prompts: Text of the prompt; several messages are joined as ``role: text`` lines. ``""`` without one.
        chosen: Text of the chosen answer; ``""`` where it is malformed.
        rejected: Text of the rejected answer; ``""`` where it is malformed.
        prompt_ids: The prompt as the model will see it, after the chat template, with what opens the sequence.
        chosen_ids: The chosen answer as the model will see it, with what ends it. Empty for malformed pairs.
        rejected_ids: The rejected answer likewise.
        faults: What is wrong with the pair's form, ``""`` where nothing is. Empty: all are well-formed.
        tools: The row's tools as text; empty where the data has none.
        figures: Numbers that the data holds of the pairs, by name, float64, shape ``(n,)``, NaN where unknown:
            ``margin`` (score of chosen minus rejected), ``chosen_logp`` and ``rejected_logp`` (summed log-probability
            under the reference model, nats).
        desirable: For unpaired data, whether each answer is a good one, shape ``(n,)``; ``None`` for pairs.
        in_test: Row of the test data that has the same prompt, -1 if none has, shape ``(n,)``; ``None`` without
            test data.
        max_length: Tokens of prompt and answer that the run keeps; ``None`` keeps all.
        bos: Id of the token that begins a sequence; ``None`` if there is none or no tokenizer was given.
    """

    prompts: list[str]
    chosen: list[str]
    rejected: list[str]
    prompt_ids: TokenIds
    chosen_ids: TokenIds
    rejected_ids: TokenIds
    faults: Sequence[str] = ()
    tools: Sequence[str] = ()
    figures: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    desirable: NDArray[np.bool_] | None = None
    in_test: NDArray[np.int64] | None = None
    max_length: int | None = None
    bos: int | None = None

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return len(self.chosen)

    @property
    def chosen_tokens(self) -> NDArray[np.int64]:
        """Length of each chosen answer in tokens, shape ``(n,)``."""
        return self.chosen_ids.lengths

    @property
    def rejected_tokens(self) -> NDArray[np.int64]:
        """Length of each rejected answer in tokens, shape ``(n,)``."""
        return self.rejected_ids.lengths

    @property
    def answers(self) -> tuple[TokenIds, ...]:
        """The token ids of the answers: chosen and rejected, or the one of unpaired data."""
        return (self.chosen_ids,) if self.desirable is not None else (self.chosen_ids, self.rejected_ids)

    def take(self, rows: Sequence[int]) -> PairBatch:
        """Returns the pairs at these positions of the batch, in this order."""
        return PairBatch(
            prompts=[self.prompts[row] for row in rows],
            chosen=[self.chosen[row] for row in rows],
            rejected=[self.rejected[row] for row in rows],
            prompt_ids=self.prompt_ids.take(rows),
            chosen_ids=self.chosen_ids.take(rows),
            rejected_ids=self.rejected_ids.take(rows),
            faults=[self.faults[row] for row in rows] if self.faults else (),
            tools=[self.tools[row] for row in rows] if self.tools else (),
            figures={name: values[rows] for name, values in self.figures.items()},
            desirable=None if self.desirable is None else self.desirable[rows],
            in_test=None if self.in_test is None else self.in_test[rows],
            max_length=self.max_length,
            bos=self.bos,
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


class Scores(NamedTuple):
    """Scores with the rows that they were found against.

    Attributes:
        values: One score per pair, shape ``(n,)``; NaN where the check does not apply.
        matched: Row of the data that each pair was found against, -1 for none, shape ``(n,)``.
    """

    values: NDArray[np.float64]
    matched: NDArray[np.int64]


class Check(ABC):
    """What every check says of itself. A pair is flagged where its score is above the threshold.

    A score says how strongly a pair shows the fault. It must depend neither on the threshold nor on row order:
    that is what makes re-thresholding possible without recomputation.

    Attributes:
        name: What users write under ``policy:``, such as ``length_ratio``.
        summary: What a flagged pair is, in a few words, for tables.
        default_policy: What happens to flagged pairs unless the user says otherwise.
        setting: Key of the setting that holds the threshold, for advice; ``""`` where the threshold is fixed.
        sees_malformed: Whether malformed pairs are scored too. Others never see them; their score is NaN.
        on_singles: Whether the check also makes sense on the single answers of unpaired data.
        matches_test_data: Whether its matched rows are those of the test data, not of the audited data.
        needs: What the check cannot do without, for the table where it scores nothing, such as ``max_length``.
    """

    name: str
    summary: str
    default_policy: Policy = "flag"
    setting: str = ""
    sees_malformed: bool = False
    on_singles: bool = False
    matches_test_data: bool = False
    needs: str = ""

    @abstractmethod
    def threshold(self, settings: QualitySettings) -> float:
        """Returns the score above which a pair is flagged."""


class PairCheck(Check):
    """Scores every pair by itself."""

    @abstractmethod
    def score(self, batch: PairBatch, settings: QualitySettings, embedder: Embedder) -> NDArray[np.float64] | Scores:
        """Returns one score per pair, shape ``(n,)``; NaN where the check does not apply."""


class SetCheck(Check):
    """Scores every pair against all others, from a few numbers that it keeps of each."""

    @abstractmethod
    def sketch(self, batch: PairBatch, settings: QualitySettings) -> NDArray[Any]:
        """Returns what is kept of each pair until all have been read, shape ``(n, …)``; a few bytes each."""

    @abstractmethod
    def compare(self, sketches: NDArray[Any], settings: QualitySettings, read: ReadTexts) -> Scores:
        """Scores all pairs.

        Args:
            sketches: Those of all pairs that the check sees, shape ``(n, …)``.
            settings: Thresholds.
            read: Reads the texts of some of the pairs again, by their position among the sketches.

        Returns:
            Scores of the pairs in the order of the sketches; ``matched`` by position among the sketches.
        """


# Prompt, chosen and rejected of some pairs.
ReadTexts = Callable[["Sequence[int] | NDArray[np.int64]"], Sequence[tuple[str, str, str]]]
