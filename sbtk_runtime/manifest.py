"""Manifests of model bundles and galleries: frozen dataclasses, read from and written to JSON."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self, cast, get_args

from sbtk_runtime.errors import BadConfig, BadGallery, BadModel, SbtkError
from sbtk_runtime.files import read_json_object, write_json_atomically

BUNDLE_FORMAT = 1
#: The newest; see `GalleryManifest.format`.
GALLERY_FORMAT = 5
MANIFEST_NAME = "manifest.json"

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

_EMBEDDINGS_FORMAT, _BINARY_FORMAT, _SIGN_CODES_FORMAT, _SHARD_FORMAT, _REGIONS_FORMAT = range(1, 6)
_MOST_NUMBER = (1 << 63) - 1
_HEX64 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """One file of a bundle: its SHA-256 and size in bytes."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class MatchRule:
    """Which cosines between a sketch and its hits are close, calibrated for one model.

    The best cosine grows with the number of photos, whether or not one of them shows the same
    thing, so the rule does too: a hit among `N` photos is close from
    `intercept + per_decade * log10(N)`. `benchmarks/doubt.py` fits it.
    """

    intercept: float
    per_decade: float

    def lowest_close(self, photos: int) -> float:
        """Return the lowest cosine that is close among `photos`, at least 1, photos."""
        return self.intercept + self.per_decade * math.log10(photos)


@dataclass(frozen=True)
class BundleManifest:
    """The `manifest.json` of a model bundle.

    Attributes:
        model_id: `<name>@<12 hex digits>`; bundles with the same id compute the same embeddings.
        method: `sbtknet`, `dsn` or `sake`.
        backbone: `resnet50-v1` or `resnet50-v1.5`.
        dim: length of an embedding.
        domain_input: name of the ONNX input for the kind of image; `None` if the model has none.
        preprocessing: name of the `sbtk_runtime.preprocess.Preprocessing` of the training images.
        files: all files of the bundle except the manifest, by name.
        training: data, split, recipe, seeds, licence; for people and the model card.
        metrics: of quality, each with its protocol.
        parity: for each precision, the distance of its embeddings to torch's.
        versions: of the libraries that made the bundle.
        match_rule: which hits are close; `None` if the model was not calibrated.
    """

    name: str
    model_id: str
    method: str
    backbone: str
    dim: int
    preprocessing: str
    files: dict[str, FileRecord]
    domain_input: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    parity: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    match_rule: MatchRule | None = None
    format: int = BUNDLE_FORMAT

    def write(self, folder: Path) -> None:
        """Write the manifest into `folder`, atomically."""
        write_json_atomically(folder / MANIFEST_NAME, asdict(self))


@dataclass(frozen=True)
class GraphRecord:
    """The HNSW graph of a gallery's generation, with facts that hnswlib's file lacks.

    Attributes:
        file: its name.
        sha256: of the file.
        count: rows in the graph.
        m: links of a node.
        ef_construction: search width while the graph was built.
        ef: search width of queries.
    """

    file: str
    sha256: str
    count: int
    m: int
    ef_construction: int
    ef: int


@dataclass(frozen=True)
class SnapshotRecord:
    """The copy of the catalogue that readers of a generation use.

    Attributes:
        file: its plain name.
        sha256: of its bytes.
        size_bytes, mtime_ns: as it was written; `None` if an older sbtk published it.
    """

    file: str
    sha256: str
    size_bytes: int | None = None
    mtime_ns: int | None = None


@dataclass(frozen=True)
class FileStamp:
    """A file as it was written: SHA-256, size in bytes, and time of modification."""

    sha256: str
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class CodesRecord:
    """The sign codes of a gallery's embeddings, by which candidates are found.

    Attributes:
        folder: its plain name in the gallery.
        bits: length of a code.
        rows: rows 0 to `rows - 1` of the vectors have codes.
        centred_rows: the number of rows there were when the centre was computed.
        files: the rotation and the shards, by their plain names.
    """

    folder: str
    bits: int
    rows: int
    centred_rows: int
    files: dict[str, FileStamp]


#: The most shards that photos can be divided into.
MOST_SHARDS = 1_000_000


def path_hash(path: bytes) -> int:
    """Return the first 63 bits of the SHA-256 of a path, which databases store as a number."""
    return int.from_bytes(hashlib.sha256(path).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class PhotoShard:
    """One of `count` parts of the photos below some folders, by the SHA-256 of relative paths.

    The part does not depend on the machine, nor on where the folders are mounted, so that
    independent machines index each photo once.

    Attributes:
        index: from 1 to `count`.
        count: at least 1.
    """

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the shard that a text such as "3/8" names.

        Raises:
            BadConfig: it names none.
        """
        found = re.fullmatch(r"([0-9]{1,7})/([0-9]{1,7})", text)
        index, count = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= index <= count <= MOST_SHARDS:
            raise BadConfig(
                f"there is no shard {text!r}",
                f"i/n with 1 <= i <= n <= {MOST_SHARDS:,}, such as 1/4 for the first of four",
            )
        return cls(index, count)

    def has(self, relative_path: bytes) -> bool:
        """Return whether a photo is in this shard; the path is relative to the indexed folder."""
        return path_hash(relative_path) in self.hashes()

    def hashes(self) -> range:
        """Return the values of `path_hash` of this shard's photos."""
        bounds = [-(-(index << 63) // self.count) for index in (self.index - 1, self.index)]
        return range(*bounds)


@dataclass(frozen=True)
class RegionsRecord:
    """The regions that a gallery keeps of each photo.

    Attributes:
        count: regions of a photo, as in `regions.grid_of`; panoramas have several times as many,
            tiny photos none.
        rows: rows of regions of the searchable photos.
    """

    count: int
    rows: int


@dataclass(frozen=True)
class GalleryManifest:
    """The `manifest.json` of a gallery; it is replaced last, so it names only complete files.

    Attributes:
        generation: increases by one with each published state.
        model_id: of the bundle that made the embeddings.
        precision: of the ONNX file that made the embeddings.
        dim: length of an embedding.
        preprocessing: name of the `sbtk_runtime.preprocess.Preprocessing` of the model.
        live: number of searchable photos.
        graph: the HNSW graph; `None` when there is none yet, and in a binary gallery.
        bits: length of the codes that a binary gallery keeps in place of embeddings.
        snapshot: the generation's catalogue; `None` if an older sbtk published it.
        codes: the sign codes of the embeddings; `None` in a binary gallery, and if an older sbtk
            published it.
        shard: which part of the photos the gallery holds; `None` for all of them.
        regions: of each photo; `None` if only whole frames are kept.
        format: 5 for a gallery with regions, 4 for a shard, else 2 for a binary gallery, 3 for one
            with sign codes, else 1. An older sbtk refuses newer formats.
    """

    generation: int
    model_id: str
    precision: str
    dim: int
    preprocessing: str
    live: int
    graph: GraphRecord | None = None
    created: str = ""
    bits: int | None = None
    snapshot: SnapshotRecord | None = None
    codes: CodesRecord | None = None
    shard: PhotoShard | None = None
    regions: RegionsRecord | None = None
    format: int = field(init=False)

    def __post_init__(self) -> None:
        written = _EMBEDDINGS_FORMAT if self.codes is None else _SIGN_CODES_FORMAT
        if self.bits is not None:
            written = _BINARY_FORMAT
        if self.shard is not None:
            written = _SHARD_FORMAT
        if self.regions is not None:
            written = _REGIONS_FORMAT
        object.__setattr__(self, "format", written)

    def write(self, folder: Path) -> None:
        """Write the manifest and its checksum into `folder`, atomically."""
        values = asdict(self)
        for name in ("codes", "shard", "regions"):
            if values[name] is None:
                del values[name]  # older versions refuse unknown keys
        write_json_atomically(folder / MANIFEST_NAME, values | {"checksum": _checksum(values)})


def _checksum(values: dict[str, Any]) -> str:
    """Return the SHA-256 of the values of a gallery's manifest, whatever its layout."""
    signed = {key: value for key, value in values.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()


def read_bundle_manifest(folder: Path) -> BundleManifest:
    """Return the checked manifest of the bundle in `folder`.

    Raises:
        BadModel: it is missing, damaged, malicious or of a newer format.
    """
    path = folder / MANIFEST_NAME
    reader = _Fields(read_json_object(path, BadModel), path, BadModel)
    reader.format(BUNDLE_FORMAT)
    files = {
        reader.plain_name(name): FileRecord(record.sha256("sha256"), record.count("size_bytes"))
        for name, record in reader.objects("files")
    }
    rule = reader.optional_object("match_rule")
    return BundleManifest(
        match_rule=None
        if rule is None
        else MatchRule(rule.number("intercept"), rule.number("per_decade")),
        name=reader.text("name"),
        model_id=reader.text("model_id"),
        method=reader.text("method"),
        backbone=reader.text("backbone"),
        dim=reader.count("dim", at_least=1, at_most=65_536),
        preprocessing=reader.text("preprocessing"),
        files=files,
        domain_input=reader.optional_text("domain_input"),
        training=reader.mapping("training"),
        metrics=reader.mapping("metrics"),
        parity=reader.mapping("parity"),
        versions=reader.texts("versions"),
        created=reader.text("created"),
    )


def read_gallery_manifest(folder: Path) -> GalleryManifest:
    """Return the checked manifest of the gallery in `folder`.

    Raises:
        BadGallery: it is missing, damaged, malicious or of a newer format.
    """
    path = folder / MANIFEST_NAME
    values = read_json_object(path, BadGallery)
    reader = _Fields(values, path, BadGallery)
    reader.format(GALLERY_FORMAT)
    _check_sum(values, reader, path)
    snapshot = reader.optional_object("snapshot")
    graph = reader.optional_object("graph")
    codes = reader.optional_object("codes")
    shard = reader.optional_object("shard")
    regions = reader.optional_object("regions")
    manifest = GalleryManifest(
        generation=reader.count("generation"),
        model_id=reader.text("model_id"),
        precision=reader.text("precision"),
        dim=reader.count("dim", at_least=1, at_most=65_536),
        preprocessing=reader.text("preprocessing"),
        live=reader.count("live"),
        graph=None
        if graph is None
        else GraphRecord(
            file=graph.plain_name(graph.text("file")),
            sha256=graph.sha256("sha256"),
            count=graph.count("count"),
            m=graph.count("m", at_least=2, at_most=512),
            ef_construction=graph.count("ef_construction", at_least=1, at_most=100_000),
            ef=graph.count("ef", at_least=1, at_most=100_000),
        ),
        created=reader.text("created"),
        bits=reader.optional_count("bits", at_least=8, at_most=65_536),
        snapshot=None
        if snapshot is None
        else SnapshotRecord(
            file=snapshot.plain_name(snapshot.text("file")),
            sha256=snapshot.sha256("sha256"),
            size_bytes=snapshot.optional_count("size_bytes", at_least=0, at_most=_MOST_NUMBER),
            mtime_ns=snapshot.optional_count("mtime_ns", at_least=0, at_most=_MOST_NUMBER),
        ),
        codes=None if codes is None else _codes_record(codes),
        shard=None if shard is None else _photo_shard(shard),
        regions=None
        if regions is None
        else RegionsRecord(
            regions.count("count", at_least=1, at_most=65_536), regions.count("rows")
        ),
    )
    if manifest.format != reader.count("format") or (manifest.bits or 0) % 8:
        what = "embeddings" if manifest.bits is None else f"{manifest.bits}-bit codes"
        raise BadGallery(f"{path} describes {what} in another format", "a manifest written by sbtk")
    return manifest


def _photo_shard(reader: _Fields) -> PhotoShard:
    count = reader.count("count", at_least=1, at_most=MOST_SHARDS)
    return PhotoShard(reader.count("index", at_least=1, at_most=count), count)


def _codes_record(reader: _Fields) -> CodesRecord:
    return CodesRecord(
        folder=reader.plain_name(reader.text("folder")),
        bits=reader.count("bits", at_least=8, at_most=65_536),
        rows=reader.count("rows", at_least=1),
        centred_rows=reader.count("centred_rows"),
        files={
            reader.plain_name(name): FileStamp(
                stamp.sha256("sha256"),
                stamp.count("size_bytes"),
                stamp.count("mtime_ns", at_most=_MOST_NUMBER),
            )
            for name, stamp in reader.objects("files")
        },
    )


def _check_sum(values: dict[str, Any], reader: _Fields, path: Path) -> None:
    """Check the checksum of a gallery's manifest.

    Only manifests by older versions, which have no snapshot, have no checksum. An unknown field
    means that the name of a field is damaged.
    """
    known = {each.name for each in fields(GalleryManifest)} | {"checksum"}
    is_older = "snapshot" not in values and "checksum" not in values
    if values.keys() <= known and (is_older or reader.sha256("checksum") == _checksum(values)):
        return
    raise BadGallery(f"{path} is damaged: its checksum differs", "a manifest written by sbtk")


class _Fields:
    """Reads typed fields of a JSON object; its errors name the file."""

    def __init__(self, values: dict[str, Any], path: Path, error: type[SbtkError]) -> None:
        self._values = values
        self._path = path
        self._error = error

    def format(self, known: int) -> None:
        found = self.count("format", at_least=1)
        if found > known:
            raise self._error(
                f"{self._path} has format {found}, of a newer version of sbtk",
                f"format {known} or older",
                "pip install --upgrade sbtk",
            )

    def text(self, key: str) -> str:
        value = self._get(key)
        # Texts are printed and become file names: no escapes, no lone surrogates.
        if not isinstance(value, str) or len(value) > 4096 or not value.isprintable():
            raise self._wrong(key, "one line of text")
        return value

    def optional_text(self, key: str) -> str | None:
        return None if self._values.get(key) is None else self.text(key)

    def count(self, key: str, at_least: int = 0, at_most: int = 1 << 48) -> int:
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, "a whole number")
        if not at_least <= value <= at_most:
            raise self._wrong(key, f"{at_least} to {at_most}")
        return value

    def optional_count(self, key: str, at_least: int, at_most: int) -> int | None:
        return None if self._values.get(key) is None else self.count(key, at_least, at_most)

    def number(self, key: str) -> float:
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e6:
            raise self._wrong(key, "a number")
        return float(value)

    def sha256(self, key: str) -> str:
        value = self._get(key)
        if not isinstance(value, str) or not _HEX64.fullmatch(value):
            raise self._wrong(key, "64 hexadecimal digits")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        value = self._get(key)
        if not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return cast("dict[str, Any]", value)

    def texts(self, key: str) -> dict[str, str]:
        values = _Fields(self.mapping(key), self._path, self._error)
        return {name: values.text(name) for name in values._values}

    def objects(self, key: str) -> list[tuple[str, _Fields]]:
        pairs = []
        for name, value in self.mapping(key).items():
            if not isinstance(value, dict):
                raise self._wrong(f"{key}.{name}", "an object")
            pairs.append((name, _Fields(value, self._path, self._error)))
        return pairs

    def optional_object(self, key: str) -> _Fields | None:
        if self._values.get(key) is None:
            return None
        return _Fields(self.mapping(key), self._path, self._error)

    def plain_name(self, name: str) -> str:
        """Return `name` if it is the name of a file in the manifest's own folder."""
        is_plain = PurePosixPath(name).name == name and "\\" not in name and name.isprintable()
        if not is_plain or name in ("", ".", "..", MANIFEST_NAME):
            raise self._error(f"{self._path} names the file {name!r}", "a plain file name")
        return name

    def _get(self, key: str) -> Any:
        if key not in self._values:
            raise self._error(f"{self._path} has no {key!r}", "a manifest written by sbtk")
        return self._values[key]

    def _wrong(self, key: str, expected: str) -> SbtkError:
        value = repr(self._values.get(key))
        return self._error(f"{self._path}: {key} is {value[:80]}", expected)
