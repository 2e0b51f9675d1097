"""The table of what the authors released, and the functions that download and convert its files.

The authors round sizes and publish no hashes: a row has a sha256 only where somebody published it.
"""

import difflib
import os
import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from ltu.checkpoints.convert import CONVERTERS
from ltu.checkpoints.download import DownloadError, fetch
from ltu.data.check_examples import NO_AUDIO
from ltu.data.dataset_io import typed_examples
from ltu.files import read_json_object, write_json
from ltu.models.provenance import STATE, read_record

VICUNA = "lmsys/vicuna-7b-v1.1"
CAV_MAE = "CAV-MAE"
TLTR = "TLTR on Whisper large-v1"


@dataclass(frozen=True)
class Released:
    """A row of the table. None: unknown, or without meaning for this row.

    Attributes:
        name: of the row.
        link: a whole link, or the part below https://www.dropbox.com/scl/, where fo/ is a folder.
        kind: ltu, ltu_as, llm, components, whisper, toy, data or eval.
        size: in bytes; a text where the authors round it.
        llm: the language model that a checkpoint was trained with.
        audio_encoder: the audio encoder of a checkpoint.
        cutoff: length that text was cut to, in tokens.
        steps: training steps.
        precision: of Whisper's features: fp32 on the authors' "old GPU", fp16 on the "new" one.
        unanswerable: whether questions without an answer are "in" or "out".
        sha256: hash of the file.
        note: anything else.
    """

    name: str
    link: str
    kind: str
    size: int | str | None = None
    llm: str | None = None
    audio_encoder: str | None = None
    cutoff: int | None = None
    steps: int | None = None
    precision: str | None = None
    unanswerable: str | None = None
    sha256: str | None = None
    note: str = ""

    @property
    def url(self) -> str:
        if "://" in self.link:
            return self.link
        return f"https://www.dropbox.com/scl/{self.link}&dl=1"

    @property
    def file(self) -> str:
        """Name of the file on this disk."""
        if self.link.startswith("fo/"):
            return f"{self.name}.zip"
        return self.link.split("?")[0].split("/")[-1]


LTU = partial(Released, kind="ltu", llm=VICUNA, audio_encoder=CAV_MAE)
LTU_AS = partial(Released, kind="ltu_as", llm=VICUNA, audio_encoder=TLTR)
PAPER = {"cutoff": 108, "unanswerable": "in"}
LONG = {"cutoff": 160, "steps": 40_000, "unanswerable": "out"}
# OpenAI's link contains the sha256 of the file.
WHISPER = "e4b87e7e0bf463eb8e6956e646f1e277e901512310def2c24bf0e11bd3c28e9a"

TABLE = (
    LTU(
        name="ltu_ori_paper",
        link="fi/ir69ci3bhf4cthxnnnl76/ltu_ori_paper.bin?rlkey=zgqin9hh1nn2ua39jictcdhil",
        size="370M",
        steps=20_000,
        **PAPER,
        note="default",
    ),
    LTU(
        name="ltu_full",
        link="fi/m9ypar9aydlec5i635zl2/full_ft_2e-5_20000.bin?rlkey=jxv8poda31exdja0r777mtfbd",
        size="27G",
        steps=20_000,
        **PAPER,
        note="with the language model, which was trained too",
    ),
    LTU(
        name="ltu_stages",
        link="fo/dqe01g38sfl1oo8mqpjs7/h?rlkey=kch4eogr9bzmb39plyausdhuv",
        note="stages 1-4, loss logs",
    ),
    LTU(
        name="ltu_13b",
        link="fo/pik0pubn1qg7q0rorkn3b/h?rlkey=x83qhk4mpwgrgns0e4rholcsr",
        llm="LLaMA-13B",
        note=(
            "stages 1-4, the last with 108 and 192 text tokens; recommended inside: "
            "stage4_all_mix_long_seq"
        ),
    ),
    LTU_AS(
        name="ltu_as_ori_paper",
        link="fi/34y1p8bfuwlcdepwd2e1o/ltuas_ori_paper.bin?rlkey=um20nlxzng1nig9o4ib2difoo",
        size="200M",
        steps=40_000,
        precision="fp32",
        **PAPER,
    ),
    LTU_AS(
        name="ltu_as_long_noqa_old_gpu",
        link="fi/co2m4ljyxym7f3w3dl6u4/ltuas_long_noqa_old_gpu.bin?rlkey=23sxa0f6l98wbci4t67y0se7v",
        size="200M",
        precision="fp32",
        **LONG,
    ),
    LTU_AS(
        name="ltu_as_long_noqa_a6",
        link="fi/ryoqai0ayt45k07ib71yt/ltuas_long_noqa_a6.bin?rlkey=1ivttmj8uorf63dptbdd6qb2i",
        size="200M",
        precision="fp16",
        **LONG,
        note="default",
    ),
    LTU_AS(
        name="ltu_as_full",
        link=(
            "fi/iq1fwkgkzueugqioge83g/ltuas_long_noqa_old_gpus_fullft.bin"
            "?rlkey=yac3gbjp6fbjy446qtblmht0w"
        ),
        size="27G",
        precision="fp32",
        **LONG,
        note="with the language model, which was trained too",
    ),
    LTU_AS(
        name="ltu_as_stages",
        link="fo/fujzoplziworiw29nleji/h?rlkey=tdl68lnu5ftbd27dnpi6zclrv",
        note="stages 1-3, the last as v1 and v2, loss logs",
    ),
    LTU_AS(
        name="ltu_as_13b",
        link="fo/mldw9tuwhx8kv010zahax/h?rlkey=gtdl7jshhg1bnoow8rod8env7",
        llm="LLaMA-13B",
        note=(
            "stages 1-3, the last with and without unanswerable; recommended inside: "
            "stage3_long_seq_exclude_noqa"
        ),
    ),
    Released(
        name="vicuna",
        link="fo/mjn5wdnc1j67kkhbu0j9d/h?rlkey=anna5roa7netrmkjjm8p2hvyy",
        kind="llm",
        llm=VICUNA,
    ),
    Released(
        name="vicuna_ltu",
        link="fo/wzw72e9e88x6nfd94zwi7/h?rlkey=9izvxo6eegww5qfkukz2bhdch",
        kind="components",
        llm=VICUNA,
        audio_encoder=CAV_MAE,
        note="for --init --audio_encoder; the authors' scripts link vicuna's two shards into it",
    ),
    Released(
        name="vicuna_ltuas",
        link="fo/254wkiknythx5vlenic3j/h?rlkey=zzneclei6tmagbxhqlewkj7l3",
        kind="components",
        llm=VICUNA,
        audio_encoder=TLTR,
        note="the same for LTU-AS",
    ),
    Released(
        name="whisper_large_v1",
        link=f"https://openaipublic.azureedge.net/main/whisper/models/{WHISPER}/large-v1.pt",
        kind="whisper",
        sha256=WHISPER,
        note=(
            "the authors' copy: "
            "https://www.dropbox.com/scl/fi/r7sfa5y2kh7nc8lpmdv9a/large-v1.pt"
            "?rlkey=ffc8abmxjy69vxairb336mkhq&dl=1"
        ),
    ),
    Released(
        name="openaqa_toy",
        link="fi/3g2b9dzeklunqwjs4ae05/openaqa_toy.json?rlkey=1a7gjjtjrvvpbnucur8wq46vr",
        kind="toy",
    ),
    Released(
        name="openaqa_toy_audio",
        link="fo/jdlkm9ggj3ascp2g8oehk/h?rlkey=tuh31ii3dpyg70zoaaxtllx3a",
        kind="toy",
    ),
    Released(
        name="openasqa_toy",
        link="fi/63szdwo0mv519o4nmgvd3/openasqa_toy.json?rlkey=coch9fc1hwyor8ezxx1bf5d9b",
        kind="toy",
    ),
    Released(
        name="openasqa_toy_audio",
        link="fo/ko9qykuwbe4nodtsx8vl4/h?rlkey=nxaslb9f9g8j8k82xfxsf86ls",
        kind="toy",
        note="Whisper features too",
    ),
    Released(
        name="openaqa_5.6M",
        link="fi/4k64am7ha8gy2ojl1t29e/openaqa_5.6M.json?rlkey=hqhg6bly8kbqqm09l1735ke0f",
        kind="data",
        size="2.3GB",
        unanswerable="in",
    ),
    Released(
        name="openaqa_subsets",
        link="fo/iip9zxdt693esl8db3vkq/h?rlkey=nlesigkgjz106uwv448s7bxlh",
        kind="data",
    ),
    Released(
        name="openasqa_10.3M_v2",
        link="fi/nsnjivql7vb1i7vcf37d1/openasqa_10.3M_v2.json?rlkey=hy9xmbkaorqdlf72xmir1exe7",
        kind="data",
        size="4.6GB",
        unanswerable="in",
    ),
    Released(
        name="openasqa_subsets",
        link="fo/nvn2k1wrmgjz4wglcs9zy/h?rlkey=2l4lz83d90swlooxizn26uubp",
        kind="data",
    ),
    Released(
        name="ltu_eval",
        link="fo/juh1dk9ltvhghuj0l1sag/h?rlkey=0n2cd5kebzh8slwanjzrfn7q6",
        kind="eval",
    ),
    Released(
        name="ltu_as_eval",
        link="fo/o91k6cnwqft84tgmuotwg/h?rlkey=6bnjobvrbqbt4rqt3f1tgaeb8",
        kind="eval",
    ),
)


@dataclass(frozen=True)
class Preparation:
    """What the training scripts of a kind need.

    Attributes:
        checkpoint: row of the default checkpoint.
        data: name of the data.
        full_set: row of the full set.
        stage_files: the dataset file of each stage, as the authors' scripts name it.
    """

    checkpoint: str
    data: str
    full_set: str
    stage_files: tuple[str, ...]


PREP = {
    "ltu": Preparation(
        checkpoint="ltu_ori_paper",
        data="openaqa",
        full_set="openaqa_5.6M",
        stage_files=(
            "combine_cla.json",
            "combine_cla.json",
            "all_closed_qa.json",
            "openaqa_5.6M.json",
        ),
    ),
    "ltu_as": Preparation(
        checkpoint="ltu_as_long_noqa_a6",
        data="openasqa",
        full_set="openasqa_10.3M_v2",
        stage_files=(
            "openasqa_classification.json",
            "openasqa_classification.json",
            "openasqa_10.3M_v2.json",
        ),
    ),
}


def find(name: str) -> Released:
    """Return the row of that name.

    Raises:
        DownloadError: there is none. The message has the most similar names.
    """
    rows = {row.name: row for row in TABLE}
    if name not in rows:
        near = difflib.get_close_matches(name, rows, n=5, cutoff=0.4) or rows
        raise DownloadError(
            f"No released file has the name {name!r}. Similar names: {', '.join(near)}. "
            "python -m ltu.released lists all."
        )
    return rows[name]


def address(row: Released, mirror: str | None) -> str:
    """Return where a row's file is downloaded from: its link, or a mirror (a folder or address)."""
    return f"{mirror.rstrip('/')}/{row.file}" if mirror else row.url


def size_of(row: Released) -> str:
    """Return the size of a row's file in words."""
    if isinstance(row.size, int):
        return f"{row.size:,} bytes"
    return f"about {row.size}" if row.size else "size unknown"


def download(row: Released | str, folder: str | Path, mirror: str | None = None) -> Path:
    """Download the file of a row into a folder, unless it is there already.

    Args:
        row: the row, or its name.
        folder: is created.
        mirror: a folder, or the address of one, instead of the row's link.

    Returns:
        the path of the file, or the folder with the content of a zip.

    Raises:
        DownloadError: as `fetch`.
    """
    if isinstance(row, str):
        row = find(row)
    size = row.size if isinstance(row.size, int) else None  # A text is rounded.
    return fetch(address(row, mirror), Path(folder, row.file), size, row.sha256)


def conversion(row: Released, models: Path, llm: str) -> list[str]:
    """Return the flags of `convert_checkpoint` that make a checkpoint folder of a row's file.

    Args:
        row: a single checkpoint.
        models: the folder of the file; the checkpoint folder is written next to it.
        llm: the language model, a folder or hub id.
    """
    flags = ["--llm", llm]
    flags += ["--checkpoint", str(models / row.file)]
    flags += ["--output_dir", str(models / row.name)]
    if row.precision:
        flags += ["--feature_precision", row.precision]
    return flags


def make_checkpoint(row: Released, models: Path, llm: str, mirror: str | None = None) -> Path:
    """Return the checkpoint folder of a row; download and convert it unless that was done before.

    Raises:
        DownloadError: the row is not a single checkpoint, or cannot be downloaded.
    """
    if row.kind not in PREP or not row.file.endswith(".bin"):
        raise DownloadError(
            f"{row.name} is not a single checkpoint. Download it with: python -m ltu.released "
            f"download {row.name}, and convert the file that you want with: "
            "python -m ltu.convert_checkpoint."
        )
    folder = models / row.name
    if not (folder / STATE).is_file():  # The conversion writes it last.
        if row.kind not in CONVERTERS:
            raise DownloadError(
                f"{row.name} is of {row.kind}. Use the commands of {row.kind}: "
                f"python -m {row.kind}.released"
            )
        download(row, models, mirror)
        settings = {"feature_precision": row.precision} if row.precision else {}
        converter = CONVERTERS[row.kind](**settings)
        converter.convert_original(models / row.file, llm, folder)
    return folder


def newest_checkpoint(kind: str, roots: tuple[str, ...] = ("exp", "pretrained_mdls")) -> Path:
    """Return the checkpoint folder of a kind that was written last.

    An initial checkpoint, from which training starts, is returned only if there is no other. The
    checkpoints inside a run, and those of a run that has not finished, do not count.

    Raises:
        FileNotFoundError: there is none.
    """
    candidates = []
    for root in roots:
        for state in Path(root).rglob(STATE):  # The last file that is written.
            folder = state.parent
            config = folder / "config.json"
            if folder.name.startswith("checkpoint-") or not config.is_file():
                continue
            record = read_record(folder)
            model_type = read_json_object(config).get("model_type")
            if model_type != kind or record.get("finished") is False:
                continue
            is_initial = record.get("stage") == "init"
            candidates.append((not is_initial, state.stat().st_mtime, folder))
    if not candidates:
        raise FileNotFoundError(
            f"No checkpoint of {kind} is in {' or '.join(roots)}. Name one, --model DIR or a name "
            "of python -m ltu.released, or train the small one: bash quickstart.sh"
        )
    _, _, folder = max(candidates)
    return folder


def find_or_make(name: str, kind: str, llm: str | None = None, mirror: str | None = None) -> str:
    """Return the path of a checkpoint.

    Args:
        name: a row of the table, which is downloaded and converted; a folder or hub id, which is
            returned as it is; or "", the newest checkpoint of the kind.
        kind: ltu or ltu_as.
        llm: the language model of a row's checkpoint.
        mirror: a folder, or the address of one, instead of the row's link.

    Raises:
        DownloadError: the row is of another kind, or as `make_checkpoint`.
        FileNotFoundError: as `newest_checkpoint`.
    """
    rows = {row.name: row for row in TABLE}
    if name not in rows or Path(name).is_dir():
        return name or str(newest_checkpoint(kind))
    row = rows[name]
    if row.kind in PREP and row.kind != kind:
        raise DownloadError(f"{name} is of {row.kind}: bash {row.kind}/inference.sh --model {name}")
    return str(make_checkpoint(row, Path("pretrained_mdls"), llm or VICUNA, mirror))


def link(file: Path, path: Path) -> None:
    """Give a file a second name, by a relative link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_symlink():
        path.symlink_to(os.path.relpath(file, path.parent))


def remap_toy_paths(meta: Path, clips: Path, output: Path) -> None:
    """Rewrite a dataset file with paths of clips relative to it, and link the clips there.

    The new path of a clip is `audio/` and the last four parts of the authors' path (three folders
    and the name), because the authors' Whisper features are named after these.

    Args:
        meta: the dataset file of the authors.
        clips: the folder of the clips, which are found by name.
        output: the new dataset file.

    Raises:
        DatasetError: the dataset file is damaged.
        DownloadError: no clip of the examples is in the folder.
    """
    examples = list(typed_examples(meta))
    files_by_name: dict[str, list[Path]] = {}
    for path in sorted(clips.rglob("*")):
        if path.is_file():
            files_by_name.setdefault(path.name, []).append(path)
    matched = set()
    missing = set()
    for example in examples:
        audio_id = example.get("audio_id")
        if audio_id in NO_AUDIO:
            continue
        parts = [part for part in PurePosixPath(audio_id).parts if part not in ("/", "..")][-4:]
        if parts[-1] not in files_by_name:
            missing.add(audio_id)
            continue
        new_id = "/".join(["audio", *parts])
        # Of several clips with this name, take the one that shares most folders with `audio_id`.
        candidates = files_by_name[parts[-1]]
        clip = max(candidates, key=partial(_count_shared, parts=parts))
        link(clip, output.parent / new_id)
        example["audio_id"] = new_id
        matched.add(new_id)
    if not matched:
        raise DownloadError(
            f"{meta}: no clip of its {len(examples)} examples is in {clips}. "
            "Is that zip the right one?"
        )
    write_json(examples, output)
    print(
        f"{output}: {len(examples)} examples, {len(matched)} clips matched, {len(missing)} not: "
        f"{sorted(missing)[:5]}"
    )


def _count_shared(path: Path, parts: list[str]) -> int:
    """Return how many of these parts are also parts of a path."""
    return sum(part in path.parts for part in parts)


def prep(
    kind: str,
    root: Path,
    llm: str,
    mirror: str | None = None,
    with_full_set: bool = False,
    with_eval: bool = False,
    dry_run: bool = False,
) -> None:
    """Download what the scripts of a kind need, convert it and put it where they look for it.

    Files that are there already are not touched.

    Args:
        kind: ltu or ltu_as.
        root: the folder of pretrained_mdls and data.
        llm: the language model of the checkpoint, a folder or hub id.
        mirror: a folder, or the address of one, instead of the rows' links.
        with_full_set: also prepare the dataset files of the stages.
        with_eval: also download the authors' evaluation questions.
        dry_run: only print links, sizes, paths and commands.

    Raises:
        DownloadError: a file cannot be downloaded, or a stage's dataset file is not in the data.
    """
    if kind not in CONVERTERS and not dry_run:
        raise DownloadError(
            f"Use the commands of {kind}: python -m {kind}.released prep --kind {kind}"
        )
    needed = PREP[kind]
    name = needed.data
    models = root / "pretrained_mdls"
    toy = root / "data" / f"{name}_toy"
    data = root / "data" / name
    downloads = [
        (f"{name}_toy", toy / "original"),
        (f"{name}_toy_audio", toy / "original"),
        (needed.checkpoint, models),
    ]
    if with_full_set:
        downloads += [(needed.full_set, data), (f"{name}_subsets", data)]
    if with_eval:
        downloads += [(f"{kind}_eval", root / "data" / f"{name}_eval")]
    for row_name, folder in downloads:
        row = find(row_name)
        print(f"{row_name}: {address(row, mirror)} ({size_of(row)}) -> {folder}", flush=True)
        if not dry_run:
            download(row, folder, mirror)

    row = find(needed.checkpoint)
    flags = shlex.join(conversion(row, models, llm))
    print(f"{kind}: python -m {kind}.convert_checkpoint {flags}", flush=True)
    if dry_run:
        return
    meta = toy / f"{name}_toy.json"
    if not meta.is_file():
        remap_toy_paths(toy / "original" / meta.name, toy / "original" / f"{name}_toy_audio", meta)
    checkpoint_folder = make_checkpoint(row, models, llm, mirror)
    if with_full_set:
        for number, file in enumerate(needed.stage_files, start=1):
            found = sorted(data.rglob(file))
            if not found:
                raise DownloadError(
                    f"{data} has no {file}. Make {data}/stage{number}.json of the subsets there."
                )
            link(found[0], data / f"stage{number}.json")
    feature_folders = sorted({str(path.parent) for path in toy.rglob("*.npz")})
    print(f"Ready: {checkpoint_folder}, {meta}; features: {feature_folders}")
