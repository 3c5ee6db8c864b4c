"""What can go wrong with the stream, told apart by what the caller should do."""

from services.errors import Deadline, UserError


class StreamUnavailable(UserError):  # noqa: N818 - the state of affairs, like Deadline
    """There is no usable Redis at the given address when a run starts. Never holds the password."""


class StreamLost(Deadline):
    """Redis stopped answering during a run, for longer than the caller's patience."""


class StreamFull(Exception):  # noqa: N818
    """Redis refused a write for want of memory or disk; nothing was changed."""


class LedgerError(Exception):
    """The ledger was asked for something that would break an invariant; nothing was changed."""


class LedgerLost(LedgerError):  # noqa: N818
    """Redis no longer holds what the driver wrote last, or another driver has claimed the ledger. Nothing changed."""


class LedgerForgetting(LedgerLost):
    """The run's keys are being removed, or whoever began that has died: nothing may be written meanwhile."""


class LedgerTaken(LedgerError, UserError):  # noqa: N818
    """Another driver has claimed the ledger after this one: it is no longer this one's to write, nor to make anew.

    The run ends with it; going back to the last commit would take the ledger from the other.
    """


class CodecError(Exception):
    """Bytes that are not a record of this schema version."""
