"""Errors a trainer raises on purpose; all grow from `FewstepError`, so the command line prints them as one line."""

from fewstep.models.errors import FewstepError


class RecipeError(FewstepError):
    """A recipe, or a setting of one, is unknown or impossible."""


class DataError(FewstepError):
    """A data set cannot be read; the message names the file."""


class CheckpointError(FewstepError):
    """A checkpoint is missing, unreadable, or belongs to another run."""


class TrainingDiverged(FewstepError):
    """The loss stayed non-finite for too many steps in a row."""
