#!/usr/bin/env bash
# datasets 5.2.0: DownloadManager.extract gives the first content of a .gz file for ever, also after it was rewritten.
# Expected: another content at the same path is extracted anew, as load_dataset does for .gz data files.
# Seen: extracted files are kept under a hash of the path alone; nothing of the archive's time, size or content is in it.
# Why it matters: a data set that is exported again under the same name trains as it was the first time, without a word.
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
import gzip
import json
import sys
from pathlib import Path

import datasets

datasets.disable_progress_bars()
path = Path(sys.argv[1], "rows.jsonl.gz")


def written(answer):
    with gzip.open(path, "wt") as file:
        file.write(json.dumps({"prompt": "How many?", "completion": answer}) + "\n")
    extracted = Path(datasets.DownloadManager().extract(str(path))).read_text()
    loaded = datasets.load_dataset("json", data_files=str(path), split="train")[0]
    return json.loads(extracted)["completion"], loaded["completion"]


first, second = written("three"), written("four, after a correction")
print(f"written: three                      extracted: {first[0]:<8} loaded: {first[1]}")
print(f"written: four, after a correction   extracted: {second[0]:<8} loaded: {second[1]}")
assert first == ("three", "three") and second == ("three", "four, after a correction"), "no longer so"
EOF
