"""The held-out split: whole groups of pairs with the same prompt, chosen by hash.

A row-level split puts pairs of one prompt on both sides, and the held-out accuracy then measures memory.
Here pairs are grouped by their normalised prompt, and groups are taken in the order of a hash of the prompt
until the wanted number of pairs is reached. So the split has the right size even on small sets, depends on
neither row order, run nor machine, and adding rows moves few groups: a group's place in the order never
changes, only the place of the cut does. (A plain "hash below the fraction" would move none, but on a hundred
pairs its size would be off by a third.)

With sources given, each has a cut of its own, so that each gives its share of the pairs. Else a source with a
twentieth of the data could by chance give twice its share, and the held-out figures would be about other data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from axolotl_dpo_ext.quality.text import prompt_key, stable_hash
from axolotl_dpo_ext.settings import holdout_fault
from axolotl_dpo_ext.vocabulary import ConfigurationError, Problem

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from axolotl_dpo_ext.quality.pairs import Pair

_SETTING = "dpo_ext.quality.holdout"


class PromptLeakError(RuntimeError):
    """The same normalised prompt is on both sides of a split: a bug in this package, not in the data."""


def group_key(pair: Pair) -> int:
    """Returns 64 bits that are equal for pairs with the same normalised prompt.

    A pair without any prompt is recognised by its two answers instead; else all such pairs were one group.
    Two prompts that collide are only held out together, so a collision cannot leak.
    """
    if pair.prompt:
        return stable_hash(prompt_key(pair.prompt))
    answers = sorted((prompt_key(pair.chosen), prompt_key(pair.rejected)))
    return stable_hash("\0".join(["", *answers]))


def split(keys: NDArray[np.uint64], holdout: float, strata: NDArray[np.intp] | None = None) -> NDArray[np.bool_]:
    """Chooses the pairs to hold out.

    Groups are taken in hash order; one that would overshoot is passed over for later, smaller ones. If the
    number is not reached exactly, one group is added, removed or exchanged where that comes closer.

    With ``strata``, each source gives its share by the largest remainder, as nearly as the sizes of its groups
    allow, and what it gives too much or too little is made up by larger sources. A group is never divided: it
    counts for the source that has most of its pairs. A small source may have no pair held out.

    Args:
        keys: Group key of every pair, shape ``(n,)``.
        holdout: 0 for no split, a fraction below 1, or a number of pairs.
        strata: Number of every pair's source, shape ``(n,)``. Only which pairs have the same number matters.
            Without it all are of one source.

    Returns:
        True where a pair is held out, shape ``(n,)``. At least one pair is on each side, unless ``holdout``
        is 0.

    Raises:
        ConfigurationError: If ``holdout`` is no such number, or if there are too few prompts for both sides.
        PromptLeakError: If a prompt ended up on both sides.
        ValueError: If ``strata`` has not one number per pair.
    """
    n = len(keys)
    if strata is not None and strata.shape != (n,):
        raise ValueError(f"strata has shape {strata.shape} for {n} pairs; expected one source number each")
    wanted = _wanted(n, holdout)
    if wanted == 0:
        return np.zeros(n, dtype=np.bool_)
    _, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise ConfigurationError([_one_group(n, holdout)])
    homes = np.zeros(len(sizes), dtype=np.intp) if strata is None else _home_sources(group, _renumber(group, strata))
    held_out: NDArray[np.bool_] = _choose(sizes, homes, min(wanted, n - 1))[group]
    shared = np.intersect1d(keys[held_out], keys[~held_out])
    if len(shared) or not 0 < int(held_out.sum()) < n:
        raise PromptLeakError(f"{len(shared)} prompts are on both sides of the held-out split of {n} pairs")
    return held_out


def check_holdout(holdout: float) -> list[Problem]:
    """Returns what is wrong with the size of a held-out split, whatever the data."""
    fault = holdout_fault(float(holdout))
    if not fault:
        return []
    return [
        Problem(
            setting=_SETTING,
            found=f"holdout: {holdout:g}",
            reason=fault,
            fix="set for example `holdout: 0.1` or `holdout: 200`, or `holdout: 0` for none",
        )
    ]


def _wanted(n: int, holdout: float) -> int:
    """Returns the number of pairs to hold out of ``n``."""
    problems = check_holdout(holdout)
    if holdout >= max(n, 1):
        problems.append(
            Problem(
                setting=_SETTING,
                found=f"holdout: {holdout:g}",
                reason=f"only {n} pairs are left after the checks, so none would be left to train on",
                fix=f"set a number below {n}, or a fraction such as `holdout: 0.1`",
            )
        )
    if problems:
        raise ConfigurationError(problems)
    if holdout == 0 or holdout >= 1:
        return int(holdout)
    # Half up, not half to even as `round` does, so that more data never means fewer pairs held out.
    return max(1, int(np.floor(holdout * n + 0.5)))


def _renumber(group: NDArray[np.intp], strata: NDArray[np.intp]) -> NDArray[np.intp]:
    """Numbers the sources 0, 1, … in the order of the hashes of their prompts.

    Ties between sources go to the lower number. The caller's numbers may depend on what else is in the data,
    so that one more source would decide all ties anew. Sources that are equal here hold the same prompts
    equally often; then it makes no difference which of them is first.
    """
    _, number, counts = np.unique(strata, return_inverse=True, return_counts=True)
    by_source = np.split(group[np.lexsort((group, number))].astype(">u8"), np.cumsum(counts)[:-1])
    order = sorted(range(len(by_source)), key=lambda source: by_source[source].tobytes())
    return np.argsort(order)[number]


def _home_sources(group: NDArray[np.intp], strata: NDArray[np.intp]) -> NDArray[np.intp]:
    """Returns the source that each group counts for, numbered 0, 1, … without gaps: that with most of its pairs."""
    width = int(strata.max()) + 1
    cells, counts = np.unique(group * width + strata, return_counts=True)
    groups, sources = np.divmod(cells, width)
    order = np.lexsort((sources, -counts, groups))
    _, most = np.unique(groups[order], return_index=True)
    return np.unique(sources[order][most], return_inverse=True)[1]


def _choose(sizes: NDArray[np.intp], homes: NDArray[np.intp], wanted: int) -> NDArray[np.bool_]:
    """Returns which groups, given in hash order with their sizes and sources, are held out."""
    chosen = _choose_by_source(sizes, homes, wanted) if homes.any() else np.zeros(len(sizes), dtype=np.bool_)
    room = wanted - int(sizes[chosen].sum())
    # Too many go from the end of the hash order, too few come from its start.
    side = np.flatnonzero(~chosen) if room > 0 else np.flatnonzero(chosen)[::-1]
    chosen[side[_fill(sizes[side], abs(room))]] = room > 0
    return _adjust(sizes, chosen, wanted - int(sizes[chosen].sum()), both_sides=True)


def _choose_by_source(sizes: NDArray[np.intp], homes: NDArray[np.intp], wanted: int) -> NDArray[np.bool_]:
    """Returns which groups are held out when each source gives its share, as nearly as its groups allow."""
    pairs = np.bincount(homes, weights=sizes).astype(np.int64)
    shares = _apportion(pairs, wanted)
    members = np.split(np.argsort(homes, kind="stable"), np.cumsum(np.bincount(homes))[:-1])
    chosen = np.zeros(len(sizes), dtype=np.bool_)
    missing, rest = 0, int(pairs.sum())
    # The smallest first: the large ones have many groups, and with them make up for what the small ones miss.
    for source in np.argsort(pairs, kind="stable").tolist():
        share, size = int(shares[source]), int(pairs[source])
        groups = members[source]
        chosen[groups] = _nearest(sizes[groups], max(0, share + round(missing * size / rest)))
        missing += share - int(sizes[groups[chosen[groups]]].sum())
        rest -= size
    return chosen


def _apportion(pairs: NDArray[np.int64], wanted: int) -> NDArray[np.int64]:
    """Divides ``wanted`` pairs among sources in proportion to their pairs, by the largest remainder."""
    shares, remainders = np.divmod(pairs * wanted, pairs.sum())
    largest = np.argsort(-remainders, kind="stable")
    shares[largest[: wanted - int(shares.sum())]] += 1
    return shares


def _nearest(sizes: NDArray[np.intp], wanted: int) -> NDArray[np.bool_]:
    """Returns which groups of one source, given in hash order, are held out; none or all may be."""
    chosen = _fill(sizes, wanted)
    room = wanted - int(sizes[chosen].sum())
    return _adjust(sizes, chosen, room, both_sides=False) if room else chosen


def _fill(sizes: NDArray[np.intp], room: int) -> NDArray[np.bool_]:
    """Takes groups in their order, passing over each that does not fit into what is left of ``room`` pairs."""
    chosen = np.zeros(len(sizes), dtype=np.bool_)
    if room == 0:
        return chosen
    for group, size in enumerate(sizes.tolist()):
        if size <= room:
            chosen[group] = True
            room -= size
            if room == 0:
                break
    return chosen


def _adjust(sizes: NDArray[np.intp], chosen: NDArray[np.bool_], room: int, *, both_sides: bool) -> NDArray[np.bool_]:
    """Adds, removes or exchanges one group, if that comes closer to the ``room`` pairs that are missing.

    Args:
        sizes: Pairs of each group, in hash order.
        chosen: Which groups are held out.
        room: How many pairs too few these are; negative for too many.
        both_sides: Whether one group at least has to be held out, and one at least not.
    """
    left, taken = np.flatnonzero(~chosen), np.flatnonzero(chosen)[::-1]
    # Of groups of one size, the last in hash order goes and the first comes: those nearest to the cut.
    comes, first = np.unique(sizes[left], return_index=True)
    goes, last = np.unique(sizes[taken], return_index=True)
    comes, goes = np.concatenate([[0], comes]), np.concatenate([[0], goes])  # 0: nothing comes, nothing goes
    miss = np.abs(comes[None, :] - goes[:, None] - room)
    if both_sides:
        held_out = len(taken) + (comes > 0)[None, :] - (goes > 0)[:, None]
        miss[(held_out == 0) | (held_out == len(sizes))] = np.iinfo(miss.dtype).max
    out, into = np.unravel_index(np.argmin(miss), miss.shape)
    if into:
        chosen[left[first[into - 1]]] = True
    if out:
        chosen[taken[last[out - 1]]] = False
    return chosen


def _one_group(n: int, holdout: float) -> Problem:
    return Problem(
        setting=_SETTING,
        found=f"holdout: {holdout:g}",
        reason=f"the {n} pairs left after the checks share one prompt, and a prompt cannot be on both sides",
        fix="set `holdout: 0`, name held-out data of your own under `test_datasets`, or check that "
        "the prompts are in a column `prompt`",
    )
