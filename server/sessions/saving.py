"""Sessions on disk: what is written for them, what is known of them after a restart, and what may go again.

Owns the records, and those of tenants who have not come yet: whose they are stands in them as a digest only, so they
wake when a call brings owner and salt. Engine thread only; K and V are written by the manager's disk tier.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from retrieval.segments import TokenIds, common_prefix
from server.engine.session_info import SessionKey
from server.errors import DiskUnavailableError, UnavailableError
from server.sessions.manager import SessionManager
from server.sessions.records import SessionRecord, SessionRecords, tenant_tag
from server.sessions.session import Session
from server.sessions.session_paths import SessionPaths


class Saving:
    """Saves sessions, wakes saved ones and lets their files go; without records, nothing can be saved."""

    def __init__(
        self,
        manager: SessionManager,
        paths: SessionPaths,
        records: SessionRecords | None,
        clock: Callable[[], float],
    ) -> None:
        self._manager, self._paths, self._records, self._clock = manager, paths, records, clock
        self._dormant: dict[str, list[SessionRecord]] = defaultdict(list)  # by tenant
        for record in records.load() if records is not None else []:
            self._dormant[record.tenant].append(record)

    @property
    def num_dormant(self) -> int:
        """Saved sessions whose tenants have not come yet."""
        return sum(len(records) for records in self._dormant.values())

    def wake(self, owner: str, salt: str) -> list[Session]:
        """A tenant has come: the sessions saved in earlier processes."""
        records = self._dormant.pop(tenant_tag(owner, salt), []) if self._dormant else []
        return [Session.from_record(SessionKey(owner, salt, record.name), record) for record in records]

    def begin(self, session: Session) -> None:
        """Have its segments written in the background; `end` tells when they are there."""
        if self._records is None:
            raise DiskUnavailableError("this server keeps nothing on disk: start it with --kv-disk-path")
        if self._manager.num_tokens_saved(session.token_ids, session.key.salt) < len(session.token_ids):
            self._paths.complete(session, "saved")
        self._manager.persist(self._paths.find(session))
        session.saving_token_ids = session.token_ids

    def is_writing(self, session: Session) -> bool:
        """Whether its segments are being written."""
        return session.is_saving and self._manager.is_persisting(self._paths.find(session))

    def end(self, session: Session, others: Iterable[Session]) -> bool:
        """Write the record of what is on disk now; False: not all of it yet. Raises when it cannot be written."""
        token_ids, key = session.saving_token_ids, session.key
        if token_ids is None or self._records is None:
            return True  # another call has ended it
        num_saved = self._manager.num_tokens_saved(token_ids, key.salt)
        if num_saved < len(token_ids) and self.is_writing(session):
            return False
        session.saving_token_ids = None
        if num_saved < len(token_ids):
            raise UnavailableError(
                f"only {num_saved} of {len(token_ids)} tokens could be written; the server's log has the cause",
                code="kv_disk_full",
            )
        now = self._clock()
        try:
            self._records.write(
                SessionRecord(tenant_tag(key.owner, key.salt), key.name, session.created, now, token_ids)
            )
        except OSError as error:
            raise UnavailableError(f"the session's record cannot be written: {error}", code="kv_disk_full") from error
        before, session.saved_token_ids, session.saved_at = session.saved_token_ids, token_ids, now
        needed = [token_ids, *self._contexts(key, before, others)]
        self._manager.give_up(before, key.salt, [(ids, key.salt) for ids in needed], deletes=False)
        return True

    def delete(self, session: Session, others: Iterable[Session]) -> None:
        """Delete its record, and the files that serve no other session."""
        key, others = session.key, list(others)
        if session.saved_at is not None and self._records is not None:
            self._records.delete(tenant_tag(key.owner, key.salt), key.name)
        for token_ids in (session.token_ids, session.saved_token_ids):
            needed = self._contexts(key, token_ids, others)
            self._manager.give_up(token_ids, key.salt, [(ids, key.salt) for ids in needed], deletes=True)

    def _contexts(self, key: SessionKey, token_ids: TokenIds, others: Iterable[Session]) -> list[TokenIds]:
        """Contexts of other sessions that begin as these tokens do, and may share files with them.

        The salt of one that has not come is not known: it is taken for the same.
        """
        found = [record.token_ids for records in self._dormant.values() for record in records]
        for other in others:
            if other.key != key and other.key.salt == key.salt:
                found += [other.token_ids, other.saved_token_ids]
                found += [other.saving_token_ids] if other.saving_token_ids is not None else []
        return [ids for ids in found if common_prefix(ids, token_ids)]
