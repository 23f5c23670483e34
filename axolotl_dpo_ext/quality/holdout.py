"""The held-out split: whole groups of pairs with the same prompt, chosen by hash.

A row-level split puts pairs of one prompt on both sides, and the held-out accuracy then measures memory.
Here pairs are grouped by their normalised prompt, and groups are taken in the order of a hash of the prompt
until the wanted number of pairs is reached. So the split has the right size even on small sets, depends on
neither row order, run nor machine, and adding rows moves few groups: a group's place in the order never
changes, only the place of the cut does. (A plain "hash below the fraction" would move none, but on a hundred
pairs its size would be off by a third.)
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


def split(keys: NDArray[np.uint64], holdout: float) -> NDArray[np.bool_]:
    """Chooses the pairs to hold out.

    Groups are taken in hash order; one that would overshoot is passed over for later, smaller ones. If the
    number is not reached exactly, one group is added or exchanged where that comes closer.

    Args:
        keys: Group key of every pair, shape ``(n,)``.
        holdout: 0 for no split, a fraction below 1, or a number of pairs.

    Returns:
        True where a pair is held out, shape ``(n,)``. At least one pair is on each side, unless ``holdout``
        is 0.

    Raises:
        ConfigurationError: If ``holdout`` is no such number, or if there are too few prompts for both sides.
        PromptLeakError: If a prompt ended up on both sides.
    """
    n = len(keys)
    wanted = _wanted(n, holdout)
    if wanted == 0:
        return np.zeros(n, dtype=np.bool_)
    _, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise ConfigurationError([_one_group(n, holdout)])
    held_out: NDArray[np.bool_] = _choose(sizes, wanted)[group]
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


def _choose(sizes: NDArray[np.intp], wanted: int) -> NDArray[np.bool_]:
    """Returns which groups, given in hash order with their sizes, are held out."""
    room = min(wanted, int(sizes.sum()) - 1)
    chosen = np.zeros(len(sizes), dtype=np.bool_)
    for group, size in enumerate(sizes.tolist()):
        if size <= room:
            chosen[group] = True
            room -= size
            if room == 0:
                return chosen
    return _adjust(sizes, chosen, room)


def _adjust(sizes: NDArray[np.intp], chosen: NDArray[np.bool_], room: int) -> NDArray[np.bool_]:
    """Adds one group, or exchanges one, if that comes closer to the ``room`` pairs still missing."""
    left = np.flatnonzero(~chosen)
    # Of groups of one size, the last in hash order goes and the first comes: those nearest to the cut.
    comes, first = np.unique(sizes[left], return_index=True)
    taken = np.flatnonzero(chosen)[::-1]
    goes, last = np.unique(sizes[taken], return_index=True)
    goes = np.concatenate([[0], goes])  # 0: nothing goes
    miss = np.abs(comes[None, :] - goes[:, None] - room)
    if len(left) == 1:
        miss[0] = np.iinfo(miss.dtype).max  # the only group left to train on cannot come for nothing
    out, into = np.unravel_index(np.argmin(miss), miss.shape)
    if miss[out, into] < room or not len(taken):
        chosen[left[first[into]]] = True
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
