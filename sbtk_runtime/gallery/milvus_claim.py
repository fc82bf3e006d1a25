"""Keep pushes of the same photos to Milvus, which has no locks, apart.

A push writes a claim, and continues if it then sees no other one. It renews the claim every few
seconds; one that stays the same for `LEASE_S` belongs to a push that was killed, and is taken over.
Clocks of other machines do not matter: each push measures how long it has seen no change.
"""

from __future__ import annotations

import contextlib
import random
import secrets
import threading
import time
from collections.abc import Callable

from sbtk_runtime.errors import SbtkError
from sbtk_runtime.gallery.milvus_documents import Document, Documents
from sbtk_runtime.gallery.remote import WHOLE, Notify, RemoteError, RemoteUnavailable
from sbtk_runtime.gallery.remote_address import Address
from sbtk_runtime.manifest import PhotoShard

LEASE_S = 20.0
_BEAT_S = 2.0


class Claim:
    """The right to change the photos of a source, or of a shard of it.

    Args:
        documents: of the collection.
        address: for messages.
        source: the source.
        shard: `WHOLE` excludes all shards of the source; they do not exclude each other.
    """

    def __init__(
        self, documents: Documents, address: Address, source: str, shard: PhotoShard
    ) -> None:
        self._documents = documents
        self._address = address
        self._source = source
        self._shard = shard
        self._name = f"{shard}/{secrets.token_hex(16)}"
        self._beats = 0
        self._beaten_s = 0.0
        self._is_lost = False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, patience_s: float, notify: Notify) -> None:
        """Wait until no other push holds a claim, at most `patience_s` for one that goes on.

        Raises:
            RemoteUnavailable: another push of these photos runs.
        """
        ends = time.monotonic() + patience_s
        seen: dict[str, tuple[object, float]] = {}
        is_told = False
        while True:
            others = self._others()
            if not others:
                self._write(is_held=False)
                others = self._others()
                if not others:
                    self._write(is_held=True)
                    break
                # Both have seen each other: both give way, and not for the same time.
                self._documents.delete("claim", self._name)
            now, is_alive = time.monotonic(), False
            for name, other in others.items():
                last, since = seen.setdefault(name, (other["beats"], now))
                if last != other["beats"]:
                    is_alive = True
                    seen[name] = (other["beats"], now)
                elif now - since > LEASE_S:
                    self._documents.delete("claim", name)
            if is_alive and now > ends:
                raise RemoteUnavailable(
                    f"another push of these photos to {self._address.shown} is running",
                    "one push at a time of a source, or of a shard of it",
                    "wait until it ends, then run the same command again",
                )
            if not is_told:
                notify("waiting for another push of these photos, or for what a killed one left")
                is_told = True
            time.sleep(_BEAT_S * random.uniform(0.3, 0.6))  # noqa: S311
        self._thread = threading.Thread(target=self._renew, name="sbtk-claim", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Make sure that the claim still holds.

        Raises:
            RemoteError: this process stood still for so long that another push took over.
        """
        if time.monotonic() - self._beaten_s > LEASE_S and not self._is_lost:
            self._confirm()
        if self._is_lost:
            raise RemoteError(
                f"{self._address.shown} did not hear of this push for more than {LEASE_S:.0f} s, "
                "and another one took over",
                "",
                "run the same command again: it resumes",
            )

    def release(self) -> None:
        """End the claim; other pushes may go on at once."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(2 * _BEAT_S)
        with contextlib.suppress(SbtkError):
            self._documents.delete("claim", self._name)

    def _write(self, *, is_held: bool) -> None:
        self._beats += 1
        now = time.monotonic()
        document = {
            "source": self._source,
            "shard": str(self._shard),
            "beats": self._beats,
            "is_held": is_held,
        }
        self._documents.write("claim", self._name, document)
        self._beaten_s = now

    def _others(self) -> dict[str, Document]:
        """Return the claims that exclude this one."""
        return self._excluding(self._documents.read("claim", consistency="Strong"))

    def _excluding(self, found: dict[str, Document]) -> dict[str, Document]:
        own = str(self._shard)
        return {
            name: claim
            for name, claim in found.items()
            if name != self._name
            and claim["source"] == self._source
            and (claim["shard"] == own or str(WHOLE) in (claim["shard"], own))
        }

    def _confirm(self) -> None:
        """Renew the claim, unless another push took it for one of a killed push."""
        found = self._documents.read("claim", consistency="Strong")
        taken = any(other["is_held"] for other in self._excluding(found).values())
        if taken or self._name not in found:
            self._is_lost = True
        else:
            self._write(is_held=True)

    def _renew(self) -> None:
        while not self._is_lost and not self._ended.wait(_BEAT_S):
            with contextlib.suppress(RemoteError):  # `check` asks again, and raises
                self._confirm()


def exclusively(
    documents: Documents, address: Address, notify: Notify, work: Callable[[], None]
) -> None:
    """Run what only one push may do at a time, such as making the collection."""
    # No source has an empty name.
    claim = Claim(documents, address, "", WHOLE)
    claim.acquire(LEASE_S, notify)
    try:
        work()
    finally:
        claim.release()
