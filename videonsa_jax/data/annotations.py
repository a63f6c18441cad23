"""Where a data set's records are: one file, a folder as LLaVA-Video-178K is published, a pattern, or a list of files.

LLaVA-Video-178K has a folder for every length and source of videos. In it are the videos, to which the records' paths
are relative, and a JSON file of each kind: `*_cap_*` (captions), `*_oe_*` (open-ended), `*_mc_*` (multiple choice).

    1_2_m_academic_v0_1/1_2_m_academic_oe_v0_1_qa_processed.json
    1_2_m_academic_v0_1/academic_source/Charades/RW587.mp4

A list is the YAML file that LLaVA's own trainer takes, with one field more, the folder of the videos:

    datasets:
      - json_path: 1_2_m_academic_v0_1/1_2_m_academic_oe_v0_1_qa_processed.json
        sampling_strategy: first:10%      # all, first, end or random, with a number or a percentage
        video_root: /videos/1_2_m_academic_v0_1
"""

import glob
import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from videonsa_jax.data.config import Kind
from videonsa_jax.data.records import DataError, Record, raw_records, read_records

logger = logging.getLogger("videonsa_jax.data")

_KIND_OF_MARK: dict[str, Kind] = {"cap": "caption", "mc": "multi_choice", "oe": "open_ended"}
_LIST_FIELDS = ("json_path", "sampling_strategy", "video_root")


@dataclass(frozen=True)
class AnnotationFile:
    """A file of records.

    Attributes:
      path: the file.
      video_root: folder that its records' videos are relative to.
      kind: what its name says it holds; None = its name says nothing.
      sampling: which of its records count (`records.read_records`).
    """

    path: Path
    video_root: str
    kind: Kind | None = None
    sampling: str = "all"


def kind_of(name: str) -> Kind | None:
    """What a file of LLaVA-Video-178K holds, by its name."""
    marks = re.split(r"[^a-z]+", Path(name).stem.lower())
    found = next((kind for mark, kind in _KIND_OF_MARK.items() if mark in marks), None)
    return found or ("open_ended" if "qa" in marks else None)


def _list_entries(path: Path) -> list | None:
    """The entries of a list of files; None where a JSON file holds records instead."""
    is_yaml = path.suffix in (".yaml", ".yml")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if not is_yaml and not text.lstrip().startswith("{"):
            return None
        parsed = yaml.safe_load(text) if is_yaml else json.loads(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {' '.join(str(error).split())}, expected a list of datasets in YAML") from error
    except json.JSONDecodeError:
        return None  # one record a line, or nothing that can be read: the reader of records says what
    entries = parsed.get("datasets") if isinstance(parsed, dict) else None
    if not is_yaml and entries is None:
        return None
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: datasets is {str(entries)[:60]!r}, expected a list of entries with a json_path")
    return entries


def _listed(path: Path, entries: Sequence[object], video_root: str) -> list[AnnotationFile]:
    files = []
    for place, entry in enumerate(entries):
        fields = entry if isinstance(entry, dict) else {}
        unknown = [name for name in fields if name not in _LIST_FIELDS]
        if unknown or not all(isinstance(value, str) for value in fields.values()) or not fields.get("json_path"):
            raise DataError(
                f"{path}: datasets[{place}] is {str(entry)[:80]!r}, expected texts under json_path and, if need be, "
                "sampling_strategy and video_root"
            )
        file = path.parent / fields["json_path"]
        root = str(path.parent / fields["video_root"]) if fields.get("video_root") else video_root
        sampling = fields.get("sampling_strategy", "all")
        files.append(AnnotationFile(file, root or str(file.parent), kind_of(file.name), sampling))
    return files


def _in_folder(folder: Path, video_root: str) -> list[AnnotationFile]:
    """The files of a folder that are annotations by their names, those of its folders included."""
    paths = [path for pattern in ("*.json", "*/*.json") for path in sorted(folder.glob(pattern))]
    files = []
    for path in paths:
        root = Path(video_root) / path.parent.relative_to(folder) if video_root else path.parent
        if kind_of(path.name) is not None:
            files.append(AnnotationFile(path, str(root), kind_of(path.name)))
        else:
            logger.info("%s: left alone, as its name says neither cap, oe, mc nor qa", path)
    return files


def find_annotations(source: str, video_root: str = "") -> list[AnnotationFile]:
    """The files of records that `source` names, in an order that every host finds.

    Args:
      source: a JSON or JSONL file of records; a list of such files (YAML, or JSON with "datasets"); a folder as
        LLaVA-Video-178K is published; or a pattern of files and folders, such as LLaVA-Video-178K/*_v0_1.
      video_root: folder of the videos; of a folder's or pattern's files, the folder in which theirs is found by its
        name. Empty = beside each file.

    Raises:
      DataError: there is no such file, or a list is malformed.
    """
    path = Path(source)
    if path.is_dir():
        files = _in_folder(path, video_root)
    elif glob.has_magic(source) and not path.exists():
        files = []
        for found in map(Path, sorted(glob.glob(source))):
            root = str(Path(video_root) / (found.name if found.is_dir() else found.parent.name)) if video_root else ""
            if found.is_dir():
                files += _in_folder(found, root)
            else:
                files.append(AnnotationFile(found, root or str(found.parent), kind_of(found.name)))
    else:
        entries = _list_entries(path) if path.is_file() else None
        if entries is None:
            return [AnnotationFile(path, video_root or str(path.parent))]
        files = _listed(path, entries, video_root)
    if not files:
        raise DataError(f"{source}: no file of records in it, expected names such as 1_2_m_academic_oe_v0_1_qa.json")
    return files


def read_annotations(
    files: Sequence[AnnotationFile], kinds: Sequence[Kind], *, needs_options: bool, max_failure_share: float
) -> tuple[list[Record], Counter[str]]:
    """The records of all files, in their order.

    Args:
      files: where they are.
      kinds: files of another kind are left out, their records counted; one whose name says nothing is read.
      needs_options: as `read_records`.
      max_failure_share: as `read_records`, of each file.

    Returns:
      (the good records, the number of others by reason).

    Raises:
      DataError: a file cannot be used (`read_records`), or there is none of the kinds.
    """
    records: list[Record] = []
    dropped: Counter[str] = Counter()
    for file in files:
        if file.kind is not None and file.kind not in kinds:
            dropped[f"of kind {file.kind}"] += len(raw_records(file.path))
            continue
        read, others = read_records(
            file.path,
            video_root=file.video_root,
            needs_options=needs_options,
            max_failure_share=max_failure_share,
            sampling=file.sampling,
        )
        records += read
        dropped += others
    if not records:
        seen = ", ".join(sorted({str(file.kind) for file in files}))
        raise DataError(f"{files[0].path} and {len(files) - 1} more hold {seen}, expected one of {', '.join(kinds)}")
    return records, dropped
