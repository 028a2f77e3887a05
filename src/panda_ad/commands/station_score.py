# SPDX-License-Identifier: Apache-2.0
"""Score images with the model in this folder, or compare this machine with the one that exported it.

    python score.py PICTURES... [--out verdicts.csv] [--heatmaps FOLDER]
    python score.py --self-test

`panda-ad export` puts it, as score.py, beside the model and the code that scores. Exit codes: 0 done, 2 a mistake to
correct or a damaged folder, 3 the self-test found another verdict.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKSUMS, EXPECTED = "SHA256SUMS", "sample/expected.csv"


def damaged(folder: Path) -> list[str]:
    """Return the files that are not as they were exported."""
    found = []
    for line in (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines():
        digest, name = line.split("  ", 1)
        file = folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            found.append(name)
    return found


def read(file: Path) -> dict[str, dict[str, str]]:
    """Return a CSV's rows by path."""
    with open(file, newline="", encoding="utf-8") as f:
        return {row["path"]: row for row in csv.DictReader(f)}


def self_test() -> int:
    """Score the sample and say how far it is from what the exporting machine had."""
    from panda_ad.commands.score import score_paths

    expected = read(HERE / EXPECTED)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "found.csv"
        score_paths([HERE / "sample" / name for name in expected], None, HERE / "model", out, None, None)
        found = {Path(path).name: row for path, row in read(out).items()}
    largest = max(abs(float(found[name]["score"]) - float(row["score"])) for name, row in expected.items())
    flipped = [name for name, row in expected.items() if found[name]["decision"] != row["decision"]]
    print(f"self-test: {len(expected)} images, largest difference {largest:.3g}, verdicts that differ: {len(flipped)}")
    return 3 if flipped else 0


def main() -> int:
    """Parse the command line and score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, help="CSV file; default: standard output")
    parser.add_argument("--heatmaps", type=Path, help="folder for overlays")
    parser.add_argument("--self-test", action="store_true")
    arguments = parser.parse_args()
    if not arguments.pictures and not arguments.self_test:
        parser.error("name pictures, or --self-test")
    if not all(sys.argv[1:]):
        parser.error("an argument is empty (is a variable of the shell unset?)")
    if names := damaged(HERE):
        print(f"{HERE}: damaged, not as exported: {', '.join(names[:5])}; copy the folder again", file=sys.stderr)
        return 2
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(HERE))
    from panda_ad.commands.score import score_paths
    from panda_ad.errors import UserError

    try:
        if arguments.self_test:
            return self_test()
        score_paths(arguments.pictures, None, HERE / "model", arguments.out, arguments.heatmaps, None)
    except UserError as e:
        print(f"score.py: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
