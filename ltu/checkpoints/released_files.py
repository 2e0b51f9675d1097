"""The table of what the authors released, and the way from a row of it to files on this disk.

The authors round sizes and give no hashes: a sha256 stands here only where somebody published it.
"""

import argparse
import difflib
import importlib
import json
import os
import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from ltu.checkpoints.download import DownloadError, RemoteFile, fetch
from ltu.data.examples import NO_AUDIO
from ltu.files import replace_file

VICUNA, CAV_MAE, TLTR = "lmsys/vicuna-7b-v1.1", "CAV-MAE", "TLTR on Whisper large-v1"


@dataclass(frozen=True)
class Released:
    """One row. None: unknown, or without meaning for it."""

    name: str
    link: str  # whole, or below https://www.dropbox.com/scl/, where fo/ is a folder
    kind: str
    size: int | str | None = None  # bytes; text where the authors round it
    llm: str | None = None
    audio_encoder: str | None = None
    cutoff: int | None = None  # text ids
    steps: int | None = None
    precision: str | None = (
        None  # of Whisper's features: fp32 is the authors' "old GPU", fp16 the "new"
    )
    unanswerable: str | None = None  # questions without an answer: in or out
    sha256: str | None = None
    note: str = ""

    @property
    def url(self) -> str:
        return self.link if "://" in self.link else f"https://www.dropbox.com/scl/{self.link}&dl=1"

    @property
    def file(self) -> str:
        return (
            f"{self.name}.zip"
            if self.link.startswith("fo/")
            else self.link.split("?")[0].split("/")[-1]
        )


LTU = partial(Released, kind="ltu", llm=VICUNA, audio_encoder=CAV_MAE)
LTU_AS = partial(Released, kind="ltu_as", llm=VICUNA, audio_encoder=TLTR)
PAPER = {"cutoff": 108, "unanswerable": "in"}
LONG = {"cutoff": 160, "steps": 40_000, "unanswerable": "out"}
WHISPER = "e4b87e7e0bf463eb8e6956e646f1e277e901512310def2c24bf0e11bd3c28e9a"  # A part of OpenAI's link: the sha256.
# fmt: off
TABLE = (
    LTU("ltu_ori_paper", "fi/ir69ci3bhf4cthxnnnl76/ltu_ori_paper.bin?rlkey=zgqin9hh1nn2ua39jictcdhil",
        size="370M", steps=20_000, **PAPER, note="default"),
    LTU("ltu_full", "fi/m9ypar9aydlec5i635zl2/full_ft_2e-5_20000.bin?rlkey=jxv8poda31exdja0r777mtfbd",
        size="27G", steps=20_000, **PAPER, note="with the language model, which was trained too"),
    LTU("ltu_stages", "fo/dqe01g38sfl1oo8mqpjs7/h?rlkey=kch4eogr9bzmb39plyausdhuv", note="stages 1-4, loss logs"),
    LTU("ltu_13b", "fo/pik0pubn1qg7q0rorkn3b/h?rlkey=x83qhk4mpwgrgns0e4rholcsr", llm="LLaMA-13B",
        note="stages 1-4, the last with 108 and 192 ids; recommended inside: stage4_all_mix_long_seq"),
    LTU_AS("ltu_as_ori_paper", "fi/34y1p8bfuwlcdepwd2e1o/ltuas_ori_paper.bin?rlkey=um20nlxzng1nig9o4ib2difoo",
           size="200M", steps=40_000, precision="fp32", **PAPER),
    LTU_AS("ltu_as_long_noqa_old_gpu", size="200M", precision="fp32", **LONG,
           link="fi/co2m4ljyxym7f3w3dl6u4/ltuas_long_noqa_old_gpu.bin?rlkey=23sxa0f6l98wbci4t67y0se7v"),
    LTU_AS("ltu_as_long_noqa_a6", "fi/ryoqai0ayt45k07ib71yt/ltuas_long_noqa_a6.bin?rlkey=1ivttmj8uorf63dptbdd6qb2i",
           size="200M", precision="fp16", **LONG, note="default"),
    LTU_AS("ltu_as_full", size="27G", precision="fp32", **LONG, note="with the language model, which was trained too",
           link="fi/iq1fwkgkzueugqioge83g/ltuas_long_noqa_old_gpus_fullft.bin?rlkey=yac3gbjp6fbjy446qtblmht0w"),
    LTU_AS("ltu_as_stages", "fo/fujzoplziworiw29nleji/h?rlkey=tdl68lnu5ftbd27dnpi6zclrv",
           note="stages 1-3, the last as v1 and v2, loss logs"),
    LTU_AS("ltu_as_13b", "fo/mldw9tuwhx8kv010zahax/h?rlkey=gtdl7jshhg1bnoow8rod8env7", llm="LLaMA-13B",
           note="stages 1-3, the last with and without unanswerable; recommended inside: stage3_long_seq_exclude_noqa"),
    Released("vicuna", "fo/mjn5wdnc1j67kkhbu0j9d/h?rlkey=anna5roa7netrmkjjm8p2hvyy", "llm", llm=VICUNA),
    Released("vicuna_ltu", "fo/wzw72e9e88x6nfd94zwi7/h?rlkey=9izvxo6eegww5qfkukz2bhdch", "start", llm=VICUNA,
             audio_encoder=CAV_MAE, note="for --init --audio_encoder; the authors' scripts link vicuna's two shards into it"),
    Released("vicuna_ltuas", "fo/254wkiknythx5vlenic3j/h?rlkey=zzneclei6tmagbxhqlewkj7l3", "start", llm=VICUNA,
             audio_encoder=TLTR, note="the same for LTU-AS"),
    Released("whisper_large_v1", f"https://openaipublic.azureedge.net/main/whisper/models/{WHISPER}/large-v1.pt",
             "whisper", sha256=WHISPER, note="the authors' copy: "
             "https://www.dropbox.com/scl/fi/r7sfa5y2kh7nc8lpmdv9a/large-v1.pt?rlkey=ffc8abmxjy69vxairb336mkhq&dl=1"),
    Released("openaqa_toy", "fi/3g2b9dzeklunqwjs4ae05/openaqa_toy.json?rlkey=1a7gjjtjrvvpbnucur8wq46vr", "toy"),
    Released("openaqa_toy_audio", "fo/jdlkm9ggj3ascp2g8oehk/h?rlkey=tuh31ii3dpyg70zoaaxtllx3a", "toy"),
    Released("openasqa_toy", "fi/63szdwo0mv519o4nmgvd3/openasqa_toy.json?rlkey=coch9fc1hwyor8ezxx1bf5d9b", "toy"),
    Released("openasqa_toy_audio", "fo/ko9qykuwbe4nodtsx8vl4/h?rlkey=nxaslb9f9g8j8k82xfxsf86ls", "toy",
             note="Whisper features too"),
    Released("openaqa_5.6M", "fi/4k64am7ha8gy2ojl1t29e/openaqa_5.6M.json?rlkey=hqhg6bly8kbqqm09l1735ke0f", "data",
             size="2.3GB", unanswerable="in"),
    Released("openaqa_subsets", "fo/iip9zxdt693esl8db3vkq/h?rlkey=nlesigkgjz106uwv448s7bxlh", "data"),
    Released("openasqa_10.3M_v2", "fi/nsnjivql7vb1i7vcf37d1/openasqa_10.3M_v2.json?rlkey=hy9xmbkaorqdlf72xmir1exe7",
             "data", size="4.6GB", unanswerable="in"),
    Released("openasqa_subsets", "fo/nvn2k1wrmgjz4wglcs9zy/h?rlkey=2l4lz83d90swlooxizn26uubp", "data"),
    Released("ltu_eval", "fo/juh1dk9ltvhghuj0l1sag/h?rlkey=0n2cd5kebzh8slwanjzrfn7q6", "eval"),
    Released("ltu_as_eval", "fo/o91k6cnwqft84tgmuotwg/h?rlkey=6bnjobvrbqbt4rqt3f1tgaeb8", "eval"),
)
# Of each kind: default checkpoint, name of the data, full set, and each stage's rows as the authors' scripts call them.
PREP = {
    "ltu": ("ltu_ori_paper", "openaqa", "openaqa_5.6M",
            ("combine_cla.json", "combine_cla.json", "all_closed_qa.json", "openaqa_5.6M.json")),
    "ltu_as": ("ltu_as_long_noqa_a6", "openasqa", "openasqa_10.3M_v2",
               ("openasqa_classification.json", "openasqa_classification.json", "openasqa_10.3M_v2.json")),
}
# fmt: on


def find(name: str) -> Released:
    """The row of that name. Raises DownloadError with the names that come near."""
    rows = {row.name: row for row in TABLE}
    if name not in rows:
        near = difflib.get_close_matches(name, rows, n=5, cutoff=0.4) or rows
        raise DownloadError(
            f"No released {name!r}. Near: {', '.join(near)}. python -m ltu.released lists all."
        )
    return rows[name]


def address(row: Released, source: str | None) -> str:
    return f"{source.rstrip('/')}/{row.file}" if source else row.url


def size_of(row: Released) -> str:
    return (
        f"{row.size:,} bytes"
        if isinstance(row.size, int)
        else f"about {row.size}"
        if row.size
        else "size unknown"
    )


def download(row: Released | str, folder: str | Path, source: str | None = None) -> Path:
    """Bring a row into a folder, once, from its link or from `source`: a folder, or the address of one; see `fetch`."""
    row = find(row) if isinstance(row, str) else row
    remote_file = RemoteFile(row.name, row.file, row.size, row.sha256)
    return fetch(remote_file, address(row, source), Path(folder))


def conversion(row: Released, models: Path, llm: str) -> list[str]:
    """Flags of `convert_checkpoint` that make a row's file a checkpoint folder beside it."""
    words = [
        "--llm",
        llm,
        "--checkpoint",
        str(models / row.file),
        "--output_dir",
        str(models / row.name),
    ]
    return words + (["--feature_precision", row.precision] if row.precision else [])


def make_checkpoint(row: Released, models: Path, llm: str, source: str | None = None) -> Path:
    """The checkpoint folder of a row, brought and converted unless that was done before.

    Raises:
        DownloadError: the row is no single checkpoint.
    """
    if row.kind not in PREP or not row.file.endswith(".bin"):
        raise DownloadError(
            f"{row.name} is no single checkpoint. Bring it, python -m ltu.released download {row.name}, and convert "
            "the file that you want, python -m ltu.convert_checkpoint."
        )
    folder = models / row.name
    if not (folder / "ltu_state.json").is_file():  # Written last.
        download(row, models, source)
        # By name, because ltu imports nothing of ltu_as.
        importlib.import_module(f"{row.kind}.convert_checkpoint").main(conversion(row, models, llm))
    return folder


def newest_checkpoint(kind: str, roots: tuple[str, ...] = ("exp", "pretrained_mdls")) -> Path:
    """The checkpoint folder of that kind that was written last; one to start training from only if there is no other.

    Raises:
        FileNotFoundError: there is none.
    """
    found = []
    for file in (file for root in roots for file in Path(root).rglob("model.safetensors")):
        config, state = file.with_name("config.json"), file.with_name("ltu_state.json")
        if (
            config.is_file()
            and state.is_file()
            and json.loads(config.read_bytes())["model_type"] == kind
        ):
            is_start = json.loads(state.read_bytes()).get("stage") == "init"
            found.append((not is_start, file.stat().st_mtime, file.parent))
    if not found:
        raise FileNotFoundError(
            f"No checkpoint of {kind} is in {' or '.join(roots)}. Name one, --model DIR or a name of python -m "
            "ltu.released, or train the small one: bash quickstart.sh"
        )
    return max(found)[2]


def find_or_make(name: str, kind: str, llm: str | None = None, source: str | None = None) -> str:
    """Where the checkpoint `name` lies: a row of the table is brought and converted; "" is the newest of that kind."""
    row = next((row for row in TABLE if row.name == name and not Path(name).is_dir()), None)
    if row is None:
        return name or str(newest_checkpoint(kind))
    if row.kind in PREP and row.kind != kind:
        raise DownloadError(f"{name} is of {row.kind}: bash {row.kind}/inference.sh --model {name}")
    return str(make_checkpoint(row, Path("pretrained_mdls"), llm or VICUNA, source))


def link(file: Path, place: Path) -> None:
    """Give a file a second name, by a relative link."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.is_symlink():
        place.symlink_to(os.path.relpath(file, place.parent))


def remap_toy_paths(meta: Path, clips: Path, output: Path) -> None:
    """Write rows again with every `audio_id` relative to them, and link its clip there.

    Its place is `audio/` and the last three folders of the authors' path: after those their Whisper features are named.
    """
    rows, found, missing = json.loads(meta.read_text(encoding="utf-8")), set(), set()
    files: dict[str, list[Path]] = {}
    for path in sorted(clips.rglob("*")):
        if path.is_file():
            files.setdefault(path.name, []).append(path)
    for row in rows:
        parts = [
            part for part in PurePosixPath(row["audio_id"] or "").parts if part not in ("/", "..")
        ][-4:]
        if row["audio_id"] in NO_AUDIO:
            continue
        if parts[-1] not in files:
            missing.add(row["audio_id"])
            continue
        row["audio_id"] = "/".join(["audio", *parts])
        # Of clips with one name, the one whose folders are more like the row's.
        clip = max(files[parts[-1]], key=lambda path: sum(part in path.parts for part in parts))
        link(clip, output.parent / row["audio_id"])
        found.add(row["audio_id"])
    if not found:
        raise DownloadError(
            f"{meta}: no clip of its {len(rows)} rows is in {clips}. Is that zip the right one?"
        )
    replace_file(output, json.dumps(rows, indent=1, ensure_ascii=False).encode())
    print(
        f"{output}: {len(rows)} rows, {len(found)} clips matched, {len(missing)} not: {sorted(missing)[:5]}"
    )


def prep(args: argparse.Namespace) -> None:
    """What the scripts of a kind need, brought, converted and put where they look; what is there is left alone."""
    checkpoint, name, full_set, stages = PREP[args.kind]
    models, toy, data = (
        args.root / place for place in ("pretrained_mdls", f"data/{name}_toy", f"data/{name}")
    )
    jobs = [
        (f"{name}_toy", toy / "original"),
        (f"{name}_toy_audio", toy / "original"),
        (checkpoint, models),
    ]
    jobs += [(full_set, data), (f"{name}_subsets", data)] if args.full else []
    jobs += [(f"{args.kind}_eval", args.root / "data" / f"{name}_eval")] if args.eval else []
    row, meta = find(checkpoint), toy / f"{name}_toy.json"
    for job, place in jobs:
        print(
            f"{job}: {address(find(job), args.source)} ({size_of(find(job))}) -> {place}",
            flush=True,
        )
        if not args.dry_run:
            download(job, place, args.source)
    words = shlex.join(conversion(row, models, args.llm))
    print(f"{args.kind}: python -m {args.kind}.convert_checkpoint {words}", flush=True)
    if args.dry_run:
        return
    if not meta.is_file():
        remap_toy_paths(toy / "original" / meta.name, toy / "original" / f"{name}_toy_audio", meta)
    folder = make_checkpoint(row, models, args.llm, args.source)
    for number, file in enumerate(stages if args.full else (), start=1):
        rows = next(iter(sorted(data.rglob(file))), None)
        if rows is None:
            raise DownloadError(
                f"{data} holds no {file}. Make {data}/stage{number}.json of the subsets there."
            )
        link(rows, data / f"stage{number}.json")
    print(
        f"Ready: {folder}, {meta}; features: {sorted({str(p.parent) for p in toy.rglob('*.npz')})}"
    )
