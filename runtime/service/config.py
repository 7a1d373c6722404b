"""Settings of a runtime that are not part of a request and not part of a model."""

from dataclasses import dataclass

DEFAULT_BUDGET_S = 2.0


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """See each field; all have working defaults.

    threads: CPU threads of the engines; None leaves the library's own choice.
    text_cache: how many prompts' embeddings are kept per model.
    max_batch: upper bound on network evaluations per engine call, below the engine's own.
    memory_budget_bytes: how much the models in memory may take, as their weights are counted; those asked for longest
        ago are put out, and come back when they are asked for. None is no bound.
    calibration_budget_s: time spent per model at start to warm the engine and to measure what batching costs. None
        means 2 seconds for engines opened by the runtime and nothing for injected ones. 0 is off: no warm-up, and rows
        are not batched before the measurements of live calls say that it pays.
    policy: which work goes next: "earliest-due" (`runtime.schedule.scheduler`), or "first-come"
        (`runtime.schedule.first_come`), the baseline of `fewstep bench load`.
    """

    threads: int | None = None
    text_cache: int = 512
    max_batch: int | None = None
    calibration_budget_s: float | None = None
    memory_budget_bytes: int | None = None
    policy: str = "earliest-due"

    def __post_init__(self) -> None:
        if self.policy not in ("earliest-due", "first-come"):
            raise ValueError(f"policy is {self.policy!r}; it must be 'earliest-due' or 'first-come'")
        for name in ("threads", "max_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1, or None")
        if self.memory_budget_bytes is not None and self.memory_budget_bytes < 1:
            raise ValueError(f"memory_budget_bytes is {self.memory_budget_bytes}; it must be at least 1, or None")
        if self.text_cache < 0:
            raise ValueError(f"text_cache is {self.text_cache}; it must be 0 or more")
        if self.calibration_budget_s is not None and self.calibration_budget_s < 0:
            raise ValueError(f"calibration_budget_s is {self.calibration_budget_s}; it must be 0 or more seconds")
