import json
from pathlib import Path

import pytest
from small_videos import record, write_records

from videonsa_jax.data.annotations import AnnotationFile, find_annotations, kind_of, read_annotations
from videonsa_jax.data.records import DataError

QA = ("open_ended", "multi_choice")


@pytest.fixture
def published(tmp_path):
    """The folders and names of LLaVA-Video-178K, a record in each file."""
    names = {
        "1_2_m_academic_v0_1": ["academic_oe_v0_1_qa", "academic_mc_v0_1_qa", "academic_v0_1_cap"],
        "2_3_m_youtube_v0_1": ["youtube_oe_v0_1_qa", "youtube_v0_1_cap"],
        "1_2_m_nextqa": ["nextqa_mc_qa"],
        "llava_hound": [],
        "gpt4o_qa_prompt": [],
    }
    root = tmp_path / "LLaVA-Video-178K"
    for folder, files in names.items():
        (root / folder).mkdir(parents=True)
        for name in files:
            path = root / folder / f"{folder[:5]}_{name}_processed.json"
            write_records(path, [record(f"some_source/{folder}/{name}.mp4", data_source=folder)])
    write_records(root / "llava_hound" / "sharegptvideo_qa_255k_processed.json", [record("a/b")])
    (root / "gpt4o_qa_prompt" / "prompt.json").write_text("{}")
    return root


def read(source, kinds=QA, video_root=""):
    return read_annotations(
        find_annotations(str(source), video_root), kinds, needs_options=False, max_failure_share=0.0
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("0_30_s_academic_v0_1_cap_processed.json", "caption"),
        ("0_30_s_academic_oe_v0_1_qa_processed.json", "open_ended"),
        ("30_60_s_perceptiontest_mc_qa_processed.json", "multi_choice"),
        ("sharegptvideo_qa_255k_processed.json", "open_ended"),
        ("1_2_m_nextqa.json", None),
        ("escape_room.json", None),
    ],
)
def test_kinds_by_name(name, kind):
    assert kind_of(name) == kind


def test_a_folder_as_published(published):
    records, dropped = read(published)
    assert dropped == {"of kind caption": 2}
    assert [Path(r.video).relative_to(published).parts[0] for r in records] == [
        "1_2_m_academic_v0_1",
        "1_2_m_academic_v0_1",
        "1_2_m_nextqa",
        "2_3_m_youtube_v0_1",
        "llava_hound",
    ]
    folder = "1_2_m_academic_v0_1"
    assert records[0].video == str(published / folder / f"some_source/{folder}/academic_mc_v0_1_qa.mp4")


def test_a_pattern_of_folders_and_one_of_files(published):
    records, dropped = read(published / "*_v0_1", kinds=["open_ended"])
    assert [Path(r.video).name for r in records] == ["academic_oe_v0_1_qa.mp4", "youtube_oe_v0_1_qa.mp4"]
    assert dropped == {"of kind multi_choice": 1, "of kind caption": 2}
    assert read(published / "*_v0_1" / "*_oe_*.json")[0] == records


def test_videos_elsewhere_keep_their_folders(published):
    for source in (published, published / "*", published / "*" / "*_qa_*.json"):
        videos = {r.video for r in read(source, video_root="/videos")[0]}
        assert "/videos/2_3_m_youtube_v0_1/some_source/2_3_m_youtube_v0_1/youtube_oe_v0_1_qa.mp4" in videos
        assert len(videos) == 5


def test_one_file_is_read_whatever_its_name(published):
    path = published / "1_2_m_academic_v0_1" / "1_2_m_academic_v0_1_cap_processed.json"
    assert find_annotations(str(path)) == [AnnotationFile(path, str(path.parent))]
    assert len(read(path)[0]) == 1
    assert read(path, video_root="/elsewhere")[0][0].video.startswith("/elsewhere/some_source")


LIST = """
datasets:
  - json_path: 1_2_m_academic_v0_1/1_2_m_academic_oe_v0_1_qa_processed.json
    sampling_strategy: all
  # - json_path: left/out.json
  - json_path: 2_3_m_youtube_v0_1/2_3_m_youtube_oe_v0_1_qa_processed.json
    sampling_strategy: "first:50%"
    video_root: youtube
  - json_path: 1_2_m_academic_v0_1/1_2_m_academic_v0_1_cap_processed.json
"""


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_list_of_files(published, suffix):
    import yaml

    path = published / f"exp{suffix}"
    path.write_text(LIST if suffix == ".yaml" else json.dumps(yaml.safe_load(LIST)))
    files = find_annotations(str(path))
    assert [file.sampling for file in files] == ["all", "first:50%", "all"]
    records, dropped = read(path)
    assert [Path(r.video).relative_to(published).parts[:2] for r in records] == [
        ("1_2_m_academic_v0_1", "some_source"),
        ("youtube", "some_source"),
    ]
    assert dropped == {"of kind caption": 1}
    assert read(path, video_root="/videos")[0][0].video.startswith("/videos/some_source/")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("datasets: [", "expected a list of datasets in YAML"),
        ("- a", r"datasets is 'None'"),
        ("datasets: []", r"datasets is '\[\]', expected a list of entries with a json_path"),
        ("datasets: [3]", r"datasets\[0\] is '3', expected texts under json_path"),
        ("datasets: [{json_path: ''}]", r"datasets\[0\] is "),
        ("datasets: [{json_path: a.json, data_root: b}]", r"datasets\[0\] is .*data_root"),
        ("datasets: [{json_path: a.json, sampling_strategy: 5}]", r"datasets\[0\] is "),
    ],
)
def test_a_list_that_is_none_stops(tmp_path, content, sentence):
    (tmp_path / "exp.yaml").write_text(content)
    with pytest.raises(DataError, match=rf"exp\.yaml: .*{sentence}"):
        find_annotations(str(tmp_path / "exp.yaml"))


def test_nothing_found_stops(tmp_path, published):
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "no*thing"):
        with pytest.raises(DataError, match=r"no file of records in it, expected names such as"):
            find_annotations(str(source))
    with pytest.raises(DataError, match=r"none\.json: no such file"):
        read(tmp_path / "none.json")
    with pytest.raises(DataError, match="and 4 more hold caption, multi_choice, open_ended, expected one of") as error:
        read(published / "*_v0_1", kinds=[])
    assert "expected one of " in str(error.value)
