"""Point the audio_ids of a file at local clips.

    python -m data.relocate --data_path A.json --output_path B.json --folder /disk/audioset --folder /disk/vggsound
    python -m data.relocate --data_path A.json --output_path B.json --prefix /data/sls/audioset=/disk/audioset
    python -m data.relocate --data_path A.json --output_path B.json --table OUT/audio_ids.csv

Notable:
- Tried in this order: a table (its first column is an id or path, its second a path, relative to the table's folder;
  `data.prepare_audio` writes one), a prefix, a folder. In folders, clips are found by name: without folder and ending,
  a YouTube id with or without what stands around it. One that two different files have is an error.
- A clip counts only if its file is there. Rows without a clip are left out with --drop_missing, else it is an error.
- Memory grows with the number of local files (some 200 bytes each), not with the rows. `--relative` writes paths
  relative to the output.
"""

import os
from collections import Counter
from functools import lru_cache
from pathlib import Path

from data.audio_names import NO_AUDIO, SUFFIXES, read_cells, stem, youtube
from data.command import command_parser, run
from data.recipe import write_recipe
from ltu.row_files import RowWriter, stream_rows

HEADERS = {("id", "audio_id"), ("audio_id", "path"), ("audio_id", "file")}


class Places:
    """Where clips lie here."""

    def __init__(self, tables: list[Path], prefixes: list[tuple[str, str]], folders: list[Path]):
        self.prefixes = prefixes
        self.table: dict[str, str] = {}
        self.files: dict[str, str] = {}
        for path in tables:
            self._read_table(path)
        for folder in folders:
            if not folder.is_dir():
                raise ValueError(f"--folder {folder} is no folder.")
            for place, _, names in os.walk(folder, followlinks=True):
                for name in sorted(names):
                    if os.path.splitext(name)[1].lower() in SUFFIXES:
                        self._add(os.path.join(place, name))
        self.find = lru_cache(maxsize=2**17)(self._find)

    def _add(self, path: str) -> None:
        known = self.files.setdefault(youtube(path) or stem(path), path)
        if known != path:
            raise ValueError(f"{known} and {path} have one name. Give their folders by --prefix, or a --table.")

    def _read_table(self, path: Path) -> None:
        for number, cells in read_cells(path):
            if len(cells) != 2:
                raise ValueError(f"{path}, line {number}: {len(cells)} cells, not an id and its path: {cells}")
            if number > 1 or tuple(cells) not in HEADERS:
                self.table[cells[0]] = str(path.parent / cells[1])

    def _find(self, audio_id: str) -> str | None:
        name, video = stem(audio_id), youtube(audio_id)
        tried = [self.table.get(key) for key in (audio_id, name, video)]
        tried += [new + audio_id[len(old) :] for old, new in self.prefixes if audio_id.startswith(old)]
        tried += [self.files.get(video or name)]
        return next((path for path in tried if path and os.path.isfile(path)), None)


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--table", action="append", default=[], type=Path, help="CSV or TSV of two columns")
    parser.add_argument("--prefix", action="append", default=[], metavar="OLD=NEW")
    parser.add_argument("--folder", action="append", default=[], type=Path, help="of clips, searched with its folders")
    parser.add_argument("--drop_missing", action="store_true", help="leave out rows whose clip is not here")
    parser.add_argument("--relative", action="store_true", help="paths relative to the output")
    args = parser.parse_args(argv)
    if not (args.table or args.prefix or args.folder) or any("=" not in prefix for prefix in args.prefix):
        parser.error("give --folder DIR, --prefix OLD=NEW or --table FILE")
    prefixes = [(old, new) for old, _, new in (prefix.partition("=") for prefix in args.prefix)]
    places = Places(args.table, prefixes, args.folder)
    asked, here, first_missing = Counter(), Counter(), []
    base = args.output_path.parent.absolute()
    with RowWriter(args.output_path, [args.data_path]) as output:
        for number, row in enumerate(stream_rows(args.data_path), start=1):
            audio_id, dataset = row.get("audio_id"), str(row.get("dataset"))
            if audio_id not in NO_AUDIO:
                asked[dataset] += 1
                if (path := places.find(str(audio_id))) is None:
                    first_missing += [f"row {number}: {audio_id}"] if len(first_missing) < 5 else []
                    continue
                here[dataset] += 1
                path = os.path.abspath(path)
                row["audio_id"] = os.path.relpath(path, base) if args.relative else path
            output.write(row)
        missing = asked.total() - here.total()
        if missing and not args.drop_missing:
            raise ValueError(
                f"{missing:,} of {asked.total():,} rows have a clip that is not here ({'; '.join(first_missing)}). "
                "Give more folders, or leave them out with --drop_missing."
            )
    coverage = {name: {"rows": number, "found": here[name]} for name, number in asked.most_common()}
    sources = {"folders": [str(path) for path in args.folder], "prefixes": args.prefix}
    facts = {"rows": output.count, "coverage": coverage, "missing": missing, **sources}
    write_recipe(args.output_path, "relocate", [args.data_path, *args.table], **facts)
    for name, numbers in coverage.items():
        print(f"  {name}: {numbers['found']:,} of {numbers['rows']:,} rows")
    print(f"{args.output_path}: {output.count:,} rows; {missing:,} left out")
    return 0


if __name__ == "__main__":
    run(main)
