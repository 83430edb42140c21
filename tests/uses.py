"""Uses of adapters to record, for tests and for the processes that they start; light to import."""

from __future__ import annotations

from adapterhub.swap.ref import Tier, Use

_TIERS = (Tier.DEVICE, Tier.RAM, Tier.DISK, Tier.REMOTE)


def use(index: int, *, adapters: int = 7, owners: int = 3) -> Use:
    """The use number `index`: of one of `adapters`, of one of `owners`, one second after the one before."""
    which = index % adapters
    digest, owner = f"{which:064x}", f"owner-{which % owners}"
    return Use(1e9 + index, f"version-{which}", digest, owner, 256 * (which + 1), _TIERS[index % 4], index / 2)
