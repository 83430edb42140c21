"""What leaves a tier, and when: decisions over plain data, without torch, SQL or a clock.

`orders` say who goes first (lru, lfu, gdsf, sieve); `rules` are what an operator sets for a tier; a `Keeper` applies
rules and order to one tier. The same code serves, simulates and is tested; carrying a decision out is the tiers' work.
"""

from adapterhub.swap.policies.keeper import Keeper
from adapterhub.swap.policies.orders import Item, Order, Policy, new_order
from adapterhub.swap.policies.rules import OwnerRule, Rules, TierRules

__all__ = ["Item", "Keeper", "Order", "OwnerRule", "Policy", "Rules", "TierRules", "new_order"]
