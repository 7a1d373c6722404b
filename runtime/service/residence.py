"""Which models are in memory: those asked for last, within a budget. What is put out comes back when it is asked for.

Pure but for `Resident`, an engine behind which the real one may come and go.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..engine import Capabilities, Engine
from ..errors import BundleError, EngineFailed

if TYPE_CHECKING:
    from torch import Tensor

    from fewstep.models.bundle import Bundle

STAY = 4.0
"""A model that is in use stays for this many times as long as loading it takes, so that loading is no more than a
fifth of the time where the models in use do not fit together."""


class Resident:
    """An engine that may be put out of memory and opened again by `reopen`; None keeps it where it is."""

    def __init__(self, engine: Engine, reopen: Callable[[], Engine] | None) -> None:
        self.name: str = engine.name
        self.capabilities: Capabilities = engine.capabilities
        self.reopen = reopen
        self._engine: Engine | None = engine

    def run(self, role: str, feeds: "Mapping[str, Tensor]") -> "tuple[Tensor, ...]":
        if self._engine is None:
            raise EngineFailed(f"engine {self.name} is not in memory")
        return self._engine.run(role, feeds)

    def close(self) -> None:
        """Put it out. It must not be running."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def bring_back(self) -> None:
        """Errors: those of opening it."""
        if self._engine is None and self.reopen is not None:
            engine = self.reopen()
            if not self.capabilities.roles <= engine.capabilities.roles:
                engine.close()
                raise EngineFailed(f"engine {self.name} came back without {self.capabilities.roles}")
            self._engine = engine


@dataclass
class Tenant:
    """A model and what it takes: bytes, seconds to load. `fixed`: it cannot be put out. inside: since when it is in
    memory, None while it is out."""

    bytes: int
    load_s: float
    fixed: bool
    used_s: float
    inside_s: float | None


class Residence:
    """Least recently used first. budget_bytes: None is no bound."""

    def __init__(self, budget_bytes: int | None) -> None:
        self.budget_bytes = budget_bytes
        self._tenants: dict[str, Tenant] = {}

    @property
    def bytes(self) -> int:
        """What is in memory."""
        return sum(tenant.bytes for tenant in self._tenants.values() if tenant.inside_s is not None)

    def check(self, name: str, size: int) -> None:
        """Errors: `BundleError` where a model cannot fit, whatever is put out."""
        fixed = sum(t.bytes for n, t in self._tenants.items() if t.fixed and n != name)
        if self.budget_bytes is not None and fixed + size > self.budget_bytes:
            raise BundleError(
                f"{name} takes {size} bytes beside {fixed} that stay; memory_budget_bytes is {self.budget_bytes}: "
                "raise it, or serve a smaller model"
            )

    def enter(self, name: str, size: int, now_s: float, load_s: float, *, fixed: bool) -> None:
        """A model is in memory, for the first time or again."""
        self._tenants[name] = Tenant(size, load_s, fixed, now_s, now_s)

    def leave(self, name: str) -> None:
        """A model is put out of memory; it is known, and may come back."""
        self._tenants[name].inside_s = None

    def forget(self, name: str) -> None:
        self._tenants.pop(name, None)

    def use(self, name: str, now_s: float) -> bool:
        """Say that a model is asked for; whether it is in memory."""
        tenant = self._tenants[name]
        tenant.used_s = now_s
        return tenant.inside_s is not None

    def inside(self, name: str) -> bool:
        return self._tenants[name].inside_s is not None

    def size(self, name: str) -> int:
        return self._tenants[name].bytes

    def victims(self, name: str, size: int, now_s: float, busy: Collection[str]) -> tuple[str, ...] | float:
        """Who has to go so that a model of `size` bytes fits, or after how many seconds to ask again.

        Those that no request needs go first, then those in use that have stayed long enough; within each, the one that
        was asked for longest ago.
        """
        if self.budget_bytes is None:
            return ()
        over = self.bytes + size - self.budget_bytes
        here = [
            (n in busy, t.used_s, n)
            for n, t in self._tenants.items()
            if t.inside_s is not None and not t.fixed and n != name
        ]
        going: list[str] = []
        wait_s = math.inf
        for used, _, other in sorted(here):
            if over <= 0:
                break
            tenant = self._tenants[other]
            stay_s = STAY * tenant.load_s - (now_s - (tenant.inside_s or 0.0)) if used else 0.0
            if stay_s > 0.0:
                wait_s = min(wait_s, stay_s)
                continue
            going.append(other)
            over -= tenant.bytes
        return tuple(going) if over <= 0 else wait_s


def weight_bytes(bundle: "Bundle") -> int:
    """What a bundle is counted as: the bytes of its weight files, without those of exported engines."""
    files = (path for path in bundle.root.rglob("*.safetensors") if path.relative_to(bundle.root).parts[0] != "engines")
    return sum(path.stat().st_size for path in files)
