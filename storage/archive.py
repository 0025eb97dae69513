"""One file that holds studies and checkpoints: written whole or not at all, read with suspicion.

The file is a zip. `manifest.json` says what else is in it, with the size and the SHA-256 of every
member; `studies/N.json` holds the rows of one study (:mod:`storage.archive_rows`), deflated;
`checkpoints/N.pt` is a checkpoint as :mod:`storage.checkpoints` wrote it, stored as it is, for
weights do not compress.

A file may come from anywhere. Its members are read by the names that the manifest may give them,
never extracted by their own; sizes are held against what the file can contain before anything is
read, and again while it is; checkpoints are loaded with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.archive_checks import parse_study
from storage.archive_rows import ArchiveError, StudyRows
from storage.checkpoints import state_in, sync_folder, temporary_of
from storage.retries import reason

FORMAT = "sweep archive"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"

MAX_MANIFEST_BYTES = 64 * 2**20
MAX_STUDY_BYTES = 4 * 2**30
"""Rows of one study as JSON; 1,000 trials of 100 epochs are 10 MB."""
MAX_MEMBERS = 100_000
MAX_RATIO = 200
"""How many times its deflated size a study may be; rows are 3 to 30 times."""

_ALWAYS_ALLOWED = 2**20
_CHUNK = 2**20
_LONGEST = 240
_MEMBER = re.compile(r"(studies|checkpoints)/(0|[1-9][0-9]{0,8})\.(json|pt)")
# So that the same state makes the same file, whenever it is written.
_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class CheckpointEntry:
    """A checkpoint in the file: which trial it is of, and its member."""

    study: str
    number: int
    member: str


# --- writing ------------------------------------------------------------------------------------


class ArchiveWriter:
    """Collects members in a temporary file beside the final one; see :func:`writing`."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._members: dict[str, dict[str, Any]] = {}
        self._studies: list[dict[str, Any]] = []
        self._checkpoints: list[dict[str, Any]] = []

    def add_study(self, study: StudyRows) -> None:
        """Add the rows of a study."""
        member = f"studies/{len(self._studies)}.json"
        self._studies.append({"name": study.name, "trials": len(study.trials), "member": member})
        content = json.dumps(study.as_json(), separators=(",", ":"), allow_nan=False).encode()
        self._add(member, content, zipfile.ZIP_DEFLATED)

    def add_checkpoint(self, study: str, number: int, content: bytes) -> None:
        """Add the checkpoint file of a trial."""
        member = f"checkpoints/{len(self._checkpoints)}.pt"
        self._checkpoints.append({"study": study, "number": number, "member": member})
        self._add(member, content, zipfile.ZIP_STORED)

    def add_manifest(self, sweep: str, versions: Mapping[str, Any]) -> None:
        """Add the table of contents, last."""
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "sweep": sweep,
            "versions": dict(versions),
            "studies": self._studies,
            "checkpoints": self._checkpoints,
            "members": self._members,
        }
        content = json.dumps(manifest, indent=1).encode()
        self._archive.writestr(_info(MANIFEST, zipfile.ZIP_DEFLATED), content)

    def _add(self, member: str, content: bytes, compression: int) -> None:
        self._members[member] = {
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        self._archive.writestr(_info(member, compression), content, compresslevel=1)


def _info(member: str, compression: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(member, _DATE)
    info.compress_type = compression
    info.external_attr = 0o644 << 16
    return info


@contextmanager
def writing(path: Path, *, overwrite: bool) -> Iterator[ArchiveWriter]:
    """Write an archive that has its name only when it is whole and on the disk.

    Args:
        path: the file; of a link that is to be overwritten, what it leads to is replaced.
        overwrite: whether it may replace another.

    Raises:
        ArchiveError: the file exists, or cannot be written; nothing of it is left.
    """
    if overwrite:
        path = path.resolve()
    temporary = temporary_of(path)
    try:
        try:
            with temporary.open("xb") as stream:
                with zipfile.ZipFile(stream, "w") as archive:
                    yield ArchiveWriter(archive)
                stream.flush()
                os.fsync(stream.fileno())
            _give_name(temporary, path, overwrite)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise ArchiveError(
            f"cannot write {path} ({error.strerror or error}); choose a folder with room that you "
            "may write to"
        ) from error


def _give_name(temporary: Path, path: Path, overwrite: bool) -> None:
    if overwrite:
        temporary.replace(path)
        return
    try:
        # Unlike a rename, a link never replaces what came to be there meanwhile.
        os.link(temporary, path)
    except FileExistsError:
        raise exists_already(path) from None
    except OSError:  # a file system without links
        if path.exists():
            raise exists_already(path) from None
        temporary.replace(path)


def exists_already(path: Path) -> ArchiveError:
    """The refusal to overwrite a file."""
    return ArchiveError(f"{path} exists already; name another file, or add --force to replace it")


# --- reading ------------------------------------------------------------------------------------


class Archive:
    """An archive that was opened. Its manifest is checked; its members are when they are read.

    Attributes:
        sweep: which sweep it holds.
        versions: of the programs that wrote it.
        checkpoints: those in it.
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._zip = archive
        self._infos = self._check_members()
        manifest = self._manifest()
        self._members: dict[str, tuple[int, str]] = {}
        for member, entry in _dict(manifest["members"], "members").items():
            if not _MEMBER.fullmatch(member):
                raise ArchiveError(f"its manifest names a member {member[:60]!r}")
            fields = _dict(entry, member)
            size, digest = fields.get("size"), fields.get("sha256")
            if type(size) is not int or not isinstance(digest, str):
                raise ArchiveError(f"its manifest gives no size and SHA-256 for {member}")
            self._members[member] = (size, digest)
        present = set(self._infos) - {MANIFEST}
        if odd := sorted(present ^ set(self._members)):
            is_listed = odd[0] in self._members
            told = "lacks {}, which its manifest lists" if is_listed else "has {}, unlisted"
            raise ArchiveError(f"it {told.format(repr(odd[0][:60]))}")
        for member, (size, _) in self._members.items():
            if self._infos[member].file_size != size:
                raise ArchiveError(f"{member} is not as long as the manifest says")
        self.sweep: str = manifest["sweep"]
        self.versions: dict[str, Any] = _dict(manifest["versions"], "versions")
        self._studies = self._entries(manifest["studies"], "studies", ("name", "trials"))
        self.checkpoints = [
            CheckpointEntry(entry["study"], entry["number"], entry["member"])
            for entry in self._entries(manifest["checkpoints"], "checkpoints", ("study", "number"))
        ]
        listed = [entry["member"] for entry in self._studies]
        listed += [entry.member for entry in self.checkpoints]
        if sorted(listed) != sorted(self._members):
            raise ArchiveError("its manifest lists a member twice, or does not say what it is")

    def studies(self) -> list[StudyRows]:
        """Read and check the rows of all studies.

        Raises:
            ArchiveError: they are damaged, or not what Optuna's tables hold.
        """
        found = []
        for entry in self._studies:
            study = parse_study(_json(self._read(entry["member"]), entry["member"]))
            if (study.name, len(study.trials)) != (entry["name"], entry["trials"]):
                raise ArchiveError(f"{entry['member']} is not the study that the manifest says")
            found.append(study)
        return found

    def checkpoint(self, entry: CheckpointEntry) -> bytes:
        """Read a checkpoint file and check that it is the one that was written.

        Raises:
            ArchiveError: it is damaged.
        """
        return self._read(entry.member)

    def check_checkpoint(self, entry: CheckpointEntry) -> None:
        """Load a checkpoint as a worker would.

        Raises:
            ArchiveError: it is damaged, is larger inside than outside, or would run code.
        """
        content = self.checkpoint(entry)
        try:
            state_in(content)
        except MemoryError:
            raise
        except Exception as error:
            raise ArchiveError(
                f"{entry.member} is not a checkpoint of tensors and plain values "
                f"({reason(error)[:160]})"
            ) from error

    def _check_members(self) -> dict[str, zipfile.ZipInfo]:
        infos = self._zip.infolist()
        if len(infos) > MAX_MEMBERS:
            raise ArchiveError(f"it has {len(infos)} members; accepted: {MAX_MEMBERS}")
        # Of a file that was cut short zipfile may find a checkpoint, which is a zip as well.
        if min((info.header_offset for info in infos), default=0) != 0:
            raise ArchiveError("it is not a whole archive; copy it again")
        size = os.fstat(self._zip.fp.fileno()).st_size  # type: ignore[union-attr]
        if sum(info.compress_size for info in infos) > size:
            raise ArchiveError("its members are longer together than the file")
        found: dict[str, zipfile.ZipInfo] = {}
        for info in infos:
            # As written in the file: zipfile itself cuts names at a NUL.
            name = info.orig_filename
            if name != MANIFEST and not _MEMBER.fullmatch(name):
                raise ArchiveError(f"it has a member named {name[:60]!r}")
            if name in found:
                raise ArchiveError(f"it has {name} twice")
            if info.flag_bits & 0x1:
                raise ArchiveError(f"{name} is encrypted")
            _check_size(info, name)
            found[name] = info
        if MANIFEST not in found:
            raise ArchiveError(f"it has no {MANIFEST}")
        return found

    def _manifest(self) -> dict[str, Any]:
        content = self._read_chunks(MANIFEST, self._infos[MANIFEST].file_size)
        manifest = _dict(_json(content, MANIFEST), MANIFEST)
        if manifest.get("format") != FORMAT:
            raise ArchiveError("it is a zip file of another program")
        version = manifest.get("format_version")
        if version != FORMAT_VERSION or type(version) is not int:
            raise ArchiveError(
                f"its format is version {str(version)[:20]}, and this program reads "
                f"{FORMAT_VERSION}; use a version of sweep as new as the one that wrote it"
            )
        for key, kind in _MANIFEST_KEYS.items():
            if not isinstance(manifest.get(key), kind):
                raise ArchiveError(f"its manifest has no {key}")
        return manifest

    def _entries(self, value: Any, where: str, keys: tuple[str, str]) -> list[dict[str, Any]]:
        for entry in value:
            known = _dict(entry, where)
            if not isinstance(known.get(keys[0]), str) or type(known.get(keys[1])) is not int:
                raise ArchiveError(f"its manifest has an entry of {where} without {keys}")
            member = known.get("member")
            if not isinstance(member, str) or not member.startswith(f"{where}/"):
                raise ArchiveError(f"its manifest has an entry of {where} without its member")
            if member not in self._members:
                raise ArchiveError(f"it lacks {member[:60]!r}, which its manifest lists")
        return list(value)

    def _read(self, member: str) -> bytes:
        size, digest = self._members[member]
        content = self._read_chunks(member, size)
        if hashlib.sha256(content).hexdigest() != digest:
            raise ArchiveError(f"{member} is damaged: its SHA-256 is not the manifest's")
        return content

    def _read_chunks(self, member: str, size: int) -> bytes:
        content = bytearray()
        with _damage(), self._zip.open(self._infos[member]) as stream:
            while chunk := stream.read(_CHUNK):
                content += chunk
                if len(content) > size:
                    break
        if len(content) != size:
            raise ArchiveError(f"{member} is not as long as it says")
        return bytes(content)


_MANIFEST_KEYS = {
    "sweep": str, "versions": dict, "studies": list, "checkpoints": list, "members": dict,
}  # fmt: skip


@contextmanager
def reading(path: Path) -> Iterator[Archive]:
    """Open an archive and check its table of contents.

    Raises:
        ArchiveError: it cannot be read, or is not a whole archive; the path is added to every
            such error of the block, too.
    """
    with ExitStack() as stack:
        try:
            with _damage():
                archive = stack.enter_context(zipfile.ZipFile(stack.enter_context(path.open("rb"))))
            yield Archive(archive)
        except FileNotFoundError as error:
            if error.filename != str(path):
                raise
            raise ArchiveError(f"{path} does not exist; sweep export writes such a file") from error
        except ArchiveError as error:
            # What a file holds may be of any length, and stand in the message.
            words = " ".join(str(error).split())
            words = words if len(words) <= _LONGEST else f"{words[:_LONGEST]}…"
            raise ArchiveError(f"{path} cannot be imported: {words}") from error


@contextmanager
def _damage() -> Iterator[None]:
    """What zipfile raises on files that were cut short or made up, as our own error."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ArchiveError(f"it cannot be read ({error.strerror or error})") from error
    except _DAMAGE as error:
        raise ArchiveError(
            f"it is not a whole archive ({reason(error)[:120]}); copy it again"
        ) from error


_DAMAGE: tuple[type[Exception], ...] = (
    zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, struct.error, zlib.error,
    UnicodeDecodeError,
)  # fmt: skip


def _check_size(info: zipfile.ZipInfo, name: str) -> None:
    """Refuse sizes that a member of this kind cannot have, before it is read."""
    stored = info.compress_type == zipfile.ZIP_STORED
    if name.startswith("checkpoints/"):
        if not stored or info.file_size != info.compress_size:
            raise ArchiveError(f"{name} is compressed; checkpoints are stored as they are")
        return
    if not stored and info.compress_type != zipfile.ZIP_DEFLATED:
        raise ArchiveError(f"{name} is compressed by a method other than deflate")
    most = min(
        MAX_MANIFEST_BYTES if name == MANIFEST else MAX_STUDY_BYTES,
        max(_ALWAYS_ALLOWED, MAX_RATIO * info.compress_size),
    )
    if info.file_size > most:
        raise ArchiveError(
            f"{name} would be {info.file_size:,} bytes long; accepted: {most:,}, by its size in "
            "the file"
        )


def _json(content: bytes, where: str) -> Any:
    def refuse(word: str) -> None:
        raise ArchiveError(f"{where} holds {word}, which is not a number")

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ArchiveError(f"{where} has the key {key[:60]!r} twice")
            found[key] = value
        return found

    try:
        return json.loads(content, parse_constant=refuse, object_pairs_hook=unique)
    except ArchiveError:
        raise
    except RecursionError:
        raise ArchiveError(f"{where} is nested too deeply") from None
    except ValueError as error:
        raise ArchiveError(f"{where} is not JSON ({str(error)[:80]})") from None


def _dict(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ArchiveError(f"{where} is no table")
    return value
