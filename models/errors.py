"""Errors of the bottom room. The runtime's tree (`fewstep.runtime.errors`) grows from the same root.

FewstepError
├── BundleError          a bundle folder cannot be used; the message names the file or field
└── SpecError            a sampling contract is incomplete or inconsistent; the message names the field
"""


class FewstepError(Exception):
    """Root of every error a user can cause. The message says what is wrong and what to do."""


class BundleError(FewstepError):
    """A bundle folder is missing a file, has a wrong digest, an unknown version, or holds code."""


class SpecError(FewstepError):
    """A sampler spec has a missing, unknown or impossible field."""
