"""Whose turn it is, so that no tenant's many or long requests starve another's.

Source:
    Virtual token counters: Sheng et al., "Fairness in Serving Large Language Models",
    arXiv:2401.00588, algorithm 2.
"""

PROMPT_WEIGHT, GENERATED_WEIGHT = 1.0, 2.0


class FairShare:
    """Counts what each tenant has been served; who has least comes first.

    A tenant that comes back after a pause does not get the time that it did not use: its counter is
    lifted to the least of those who are there.
    """

    def __init__(self) -> None:
        """Start with nobody."""
        self._served: dict[str, float] = {}
        self._present: dict[str, int] = {}

    def arrive(self, tenant: str) -> None:
        """Count one more request of a tenant."""
        if not self._present.get(tenant):
            least = min((self._served[t] for t in self._present), default=0.0)
            self._served[tenant] = max(self._served.get(tenant, 0.0), least)
            self._present[tenant] = 0
        self._present[tenant] += 1

    def leave(self, tenant: str) -> None:
        """Count one request less."""
        self._present[tenant] -= 1
        if not self._present[tenant]:
            del self._present[tenant]
            if not self._present:
                self._served.clear()  # nobody is there to be compared with

    def charge(self, tenant: str, *, prompt: int = 0, generated: int = 0) -> None:
        """Count tokens that were computed for a tenant."""
        self._served[tenant] += PROMPT_WEIGHT * prompt + GENERATED_WEIGHT * generated

    def served(self, tenant: str) -> float:
        """Return what a tenant has been served; who has less comes first."""
        return self._served[tenant]
