#!/usr/bin/env bash
# datasets 5.2.0 (pyarrow 26.0.1): one parquet file without rows makes the whole folder unreadable for load_dataset.
# Expected: a valid file of no rows, with the same schema as its neighbours, adds no rows; pyarrow reads it so.
# Seen: ArrowInvalid, "BatchSize must be greater than 0, got 0": the reader takes the first row group's length as the
#   size of its batches, and a file without rows has a row group of none.
# Why it matters: of data that several workers write, a shard where nothing was left to write hides all the others.
# FINDINGS_PYTHON=/path/to/python uses that interpreter's packages and installs nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv "$folder/env"
  python=$folder/env/bin/python
  "$python" -m pip install --quiet datasets==5.2.0 pyarrow==26.0.1
fi
export TMPDIR=$folder HF_HOME=$folder/huggingface HF_HUB_OFFLINE=1
"$python" -W ignore - "$folder" 2>"$folder/stderr" <<'EOF' || { cat "$folder/stderr" >&2; exit 1; }
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet

datasets.disable_progress_bars()
schema = pyarrow.schema([("prompt", pyarrow.string())])


def shards(name, *counts):
    place = Path(sys.argv[1], name)
    place.mkdir()
    for at, count in enumerate(counts):
        rows = pyarrow.table({"prompt": [f"question {i}" for i in range(count)]}, schema=schema)
        pyarrow.parquet.write_table(rows, place / f"train-{at:05}-of-{len(counts):05}.parquet")
    return place


def rows_of(place):
    try:
        return len(datasets.load_dataset(str(place), split="train"))
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        return f"{type(error).__name__}: {error}"


full, gap = shards("full", 3, 2), shards("gap", 3, 0, 2)
print(f"shards of 3 and 2 rows:     {rows_of(full)}")
print(f"shards of 3, 0 and 2 rows:  {(found := rows_of(gap))}")
print(f"the same by pyarrow:        {pyarrow.parquet.read_table(gap).num_rows}")
assert pyarrow.parquet.read_table(gap).num_rows == 5 and rows_of(full) == 5, "the input is not what it should be"
assert "BatchSize must be greater than 0" in str(found), "no longer so"
EOF
